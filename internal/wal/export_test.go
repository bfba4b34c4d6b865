package wal

import "os"

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
		id, err = at.begin(root)
	}
	return id, err
}
