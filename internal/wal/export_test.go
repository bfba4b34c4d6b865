package wal

import (
	"os"
	"time"
)

// InstanceAt is the id that a directory has for a process on a machine.
func InstanceAt(dir, machine, host string) (string, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	at := placeOf(machine, host, dir)
	id, err := at.read(root)
	if id == "" && err == nil {
		id, err = at.begin(root, func(*os.File) error { return nil })
	}
	return id, err
}

// Untouched is what a record of a file that had a status of this time, and was
// read from begun on, says of a file of another.
func Untouched(changed, begun, now time.Time) bool {
	return record{Changed: changed.UnixNano(), Begun: begun.UnixNano()}.untouched(now.UnixNano())
}
