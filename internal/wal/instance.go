package wal

import (
	"bytes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/pgkeep/pgkeep/internal/durable"
)

// An Instance is one life of a data directory. A copy of the directory, be it a
// restored backup, a clone, or the same disk in another machine, is another one,
// though PostgreSQL's system identifier is the same.
type Instance struct {
	ID string // random
	// Dir is pgkeep's own directory, made for PostgreSQL's OS user alone. It
	// stands in pg_wal, whose content no base backup takes along.
	Dir string
}

// instanceDir is where pgkeep keeps what belongs to an instance, in a data
// directory.
const instanceDir = "pg_wal/pgkeep"

const (
	instanceFile = "instance"
	instanceLock = "instance.lock"
	maxInstance  = 16 << 10
)

// OpenInstance returns the instance that a data directory is, and begins a new
// one where there is none yet or the directory is a copy. The id is on disk when
// it returns.
func OpenInstance(pgdata string) (Instance, error) {
	i, err := openInstance(pgdata)
	if err != nil {
		return Instance{}, fmt.Errorf("which copy of the data directory is this: %w", err)
	}
	return i, nil
}

func openInstance(pgdata string) (Instance, error) {
	// pg_wal may be a link to a disk of its own.
	walDir, err := os.OpenRoot(filepath.Join(pgdata, filepath.Dir(instanceDir)))
	if err != nil {
		return Instance{}, err
	}
	defer walDir.Close()
	if err := durable.MkdirAll(walDir, filepath.Base(instanceDir), 0o700); err != nil {
		return Instance{}, err
	}
	dir, err := filepath.Abs(filepath.Join(pgdata, instanceDir))
	if err == nil {
		dir, err = filepath.EvalSymlinks(dir)
	}
	if err != nil {
		return Instance{}, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return Instance{}, err
	}
	defer root.Close()
	give, err := giver(pgdata)
	if err != nil {
		return Instance{}, err
	}
	here, err := root.Open(".")
	if err != nil {
		return Instance{}, err
	}
	defer here.Close()
	at, err := thisPlace(dir)
	if err == nil {
		err = give(here)
	}
	if err != nil {
		return Instance{}, err
	}
	id, err := at.read(root)
	if id == "" && err == nil {
		id, err = at.begin(root, give)
	}
	return Instance{ID: id, Dir: dir}, err
}

// giver returns what gives a file to the owner of the data directory, if it is
// root's: PostgreSQL archives as another user, and root may have asked first.
func giver(pgdata string) (give func(*os.File) error, err error) {
	keep := func(*os.File) error { return nil }
	if os.Geteuid() != 0 {
		return keep, nil
	}
	info, err := os.Stat(pgdata)
	if err != nil {
		return nil, err
	}
	owner := info.Sys().(*syscall.Stat_t)
	return func(f *os.File) error {
		info, err := f.Stat()
		if err != nil {
			return err
		}
		have := info.Sys().(*syscall.Stat_t)
		if have.Uid != 0 || !info.IsDir() && have.Nlink > 1 { // one with another name is not ours to give
			return nil
		}
		return f.Chown(int(owner.Uid), int(owner.Gid))
	}, nil
}

// exists reports whether an instance is still the one at its place.
func (i Instance) exists() bool {
	at, err := thisPlace(i.Dir)
	if err != nil {
		return false
	}
	root, err := os.OpenRoot(i.Dir)
	if err != nil {
		return false
	}
	defer root.Close()
	id, err := at.read(root)
	return err == nil && id == i.ID
}

// A place is where a data directory is. It stays the same when the machine is
// rebooted, which a device number does not.
type place struct {
	Machine string `json:"machine_id,omitempty"` // /etc/machine-id; a container may have none
	Host    string `json:"host,omitempty"`       // its name, in place of a machine's id where there is none
	Dir     string `json:"dir"`                  // tells clones of file systems apart
}

func thisPlace(dir string) (place, error) {
	machine, err := os.ReadFile("/etc/machine-id")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return place{}, err
	}
	host, err := os.Hostname()
	return placeOf(string(machine), host, dir), err
}

// placeOf leaves the host's name out where the machine has an id: a host may be
// renamed.
func placeOf(machine, host, dir string) place {
	at := place{Machine: strings.TrimSpace(machine), Dir: dir}
	if at.Machine == "" {
		at.Host = host
	}
	return at
}

// An instanceRecord is the content of the file of an instance. It names the
// file's own inode and place, which a copy of it does not have.
type instanceRecord struct {
	ID    string `json:"id"`
	Inode uint64 `json:"inode"`
	place
}

// read returns the id of the instance at a place, "" if there is none.
func (at place) read(root *os.Root) (string, error) {
	f, err := root.Open(instanceFile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	inode, err := inodeOf(f)
	if err != nil {
		return "", err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxInstance))
	if err != nil {
		return "", err
	}
	r, ok := parseInstance(b)
	if !ok || r.Inode != inode || r.place != at {
		return "", nil
	}
	return r.ID, nil
}

// begin makes a new id, unless somebody else did so just now.
func (at place) begin(root *os.Root, give func(*os.File) error) (string, error) {
	lock, err := root.OpenFile(instanceLock, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return "", err
	}
	defer lock.Close() // and with it the lock
	if err := give(lock); err != nil {
		return "", err
	}
	if err := flock(lock, syscall.LOCK_EX); err != nil {
		return "", err
	}
	if id, err := at.read(root); id != "" || err != nil {
		return id, err
	}
	r := instanceRecord{ID: strings.ToLower(rand.Text()), place: at}
	err = durable.Replace(root, instanceFile, 0o600, func(w io.Writer) (err error) {
		f, _ := w.(*os.File)
		if r.Inode, err = inodeOf(f); err != nil { // it stays when the file gets its name
			return err
		}
		if err := give(f); err != nil {
			return err
		}
		return json.NewEncoder(w).Encode(r)
	})
	return r.ID, err
}

// parseInstance reads the file of an instance. What is damaged is none.
func parseInstance(b []byte) (r instanceRecord, ok bool) {
	err := json.Unmarshal(bytes.TrimSpace(b), &r)
	return r, err == nil && r.ID != ""
}

func inodeOf(f *os.File) (uint64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Ino, nil
}

// flock takes a lock that ends with the process, or with closing f.
func flock(f *os.File, how int) error {
	for {
		err := syscall.Flock(int(f.Fd()), how)
		if err == nil {
			return nil
		}
		if err != syscall.EINTR {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}
