package wal_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/pgkeep/pgkeep/internal/wal"
)

// dataDir makes a directory with a pg_wal in it.
func dataDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "data")
	if err := os.MkdirAll(filepath.Join(dir, "pg_wal"), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func instance(t *testing.T, pgdata string) string {
	t.Helper()
	i, err := wal.OpenInstance(pgdata)
	if err != nil || i.ID == "" || filepath.Base(i.Dir) != "pgkeep" {
		t.Fatalf("OpenInstance(%s) = %+v, %v", pgdata, i, err)
	}
	return i.ID
}

func copyTree(t *testing.T, from, to string) string {
	t.Helper()
	if out, err := exec.Command("cp", "-a", from, to).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return to
}

func TestAnInstanceStaysItself(t *testing.T) {
	dir := dataDir(t)
	id := instance(t, dir)
	t.Chdir(dir)
	if got := instance(t, "."); got != id {
		t.Errorf("seen from within it is %s, not %s", got, id)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if got := instance(t, link); got != id {
		t.Errorf("through a link it is %s, not %s", got, id)
	}
	if info, err := os.Stat(filepath.Join(dir, "pg_wal/pgkeep")); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("its directory: %v, %v", info.Mode(), err)
	}
}

func TestACopyIsAnotherInstance(t *testing.T) {
	const file = "pg_wal/pgkeep/instance"
	for what, change := range map[string]func(t *testing.T, dir string) string{
		"cp -a": func(t *testing.T, dir string) string { return copyTree(t, dir, dir+"2") },
		"moved away and copied back, with the same path": func(t *testing.T, dir string) string {
			if err := os.Rename(dir, dir+"2"); err != nil {
				t.Fatal(err)
			}
			return copyTree(t, dir+"2", dir)
		},
		"a clone of the file system": func(t *testing.T, dir string) string { // inodes stay, the path does not
			if err := os.Rename(dir, dir+"2"); err != nil {
				t.Fatal(err)
			}
			return dir + "2"
		},
		"another machine": func(t *testing.T, dir string) string {
			b, err := os.ReadFile(filepath.Join(dir, file))
			if err != nil {
				t.Fatal(err)
			}
			machine, _ := os.ReadFile("/etc/machine-id")
			other := `"machine_id":"0123456789abcdef0123456789abcdef","dir"`
			if m := strings.TrimSpace(string(machine)); m == "" {
				b = bytes.Replace(b, []byte(`"dir"`), []byte(other), 1)
			} else {
				b = bytes.Replace(b, []byte(`"machine_id":"`+m+`","dir"`), []byte(other), 1)
			}
			if !bytes.Contains(b, []byte("0123456789abcdef")) {
				t.Fatalf("no place for a machine in %s", b)
			}
			return inPlace(t, dir, file, b)
		},
		"pg_rewind, which writes the source's file over it": func(t *testing.T, dir string) string {
			source := dataDir(t)
			instance(t, source)
			b, err := os.ReadFile(filepath.Join(source, file))
			if err != nil {
				t.Fatal(err)
			}
			return inPlace(t, dir, file, b)
		},
		"damage":  func(t *testing.T, dir string) string { return inPlace(t, dir, file, []byte("{}")) },
		"nothing": func(t *testing.T, dir string) string { return inPlace(t, dir, file, nil) },
	} {
		t.Run(what, func(t *testing.T) {
			dir := dataDir(t)
			id := instance(t, dir)
			dir = change(t, dir)
			other := instance(t, dir)
			if other == id {
				t.Errorf("it is %s still", id)
			}
			if again := instance(t, dir); again != other {
				t.Errorf("it is %s, and then %s", other, again)
			}
		})
	}
}

// A snapshot of a container keeps the path and the inodes. Where there is no
// machine's id, the host's name tells.
func TestAContainerIsToldByItsName(t *testing.T) {
	for _, tt := range []struct {
		machine, host string
		another       string // host of the copy
		same          bool
	}{
		{"", "one", "one", true},
		{"\n", "one", "two", false},
		{"0123\n", "one", "two", true}, // renamed
	} {
		dir := t.TempDir()
		id, err := wal.InstanceAt(dir, tt.machine, tt.host)
		if err != nil {
			t.Fatal(err)
		}
		again, err := wal.InstanceAt(dir, tt.machine, tt.another)
		if err != nil || (again == id) != tt.same {
			t.Errorf("%+v: %s, and then %s (%v)", tt, id, again, err)
		}
	}
}

// inPlace changes a file that keeps its inode.
func inPlace(t *testing.T, dir, file string, b []byte) string {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, file), b, 0o600); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestTwoWhoBeginAnInstanceAgree(t *testing.T) {
	source := dataDir(t)
	old := instance(t, source)
	for range 20 {
		dir := filepath.Join(t.TempDir(), "data") // with a file that does not count
		copyTree(t, source, dir)
		ids := make([]string, 8)
		var g sync.WaitGroup
		for n := range ids {
			g.Go(func() {
				i, err := wal.OpenInstance(dir)
				if err != nil {
					t.Error(err)
				}
				ids[n] = i.ID
			})
		}
		g.Wait()
		for _, id := range ids {
			if id != ids[0] || id == "" || id == old {
				t.Fatalf("ids %q, that of the source %q", ids, old)
			}
		}
	}
}

func TestNoInstanceWithoutADataDirectory(t *testing.T) {
	if i, err := wal.OpenInstance(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("OpenInstance = %+v, %v", i, err)
	}
}

// Whatever the file holds, there is an instance, and it stays.
func FuzzInstanceFile(f *testing.F) {
	f.Add([]byte(`{"id":"x","inode":1,"dir":"/"}`))
	f.Add([]byte(`{"id":"x","inode":-1}`))
	f.Add([]byte("\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir := dataDir(t)
		id := instance(t, dir)
		inPlace(t, dir, "pg_wal/pgkeep/instance", b)
		if got := instance(t, dir); got == id || got != instance(t, dir) {
			t.Errorf("%q makes it %s", b, got)
		}
	})
}

// An administrator ran pgkeep wal audit --fill, or pgkeep-wal claim, as root before
// PostgreSQL had archived anything. From then on PostgreSQL's user could not open
// what root had made, and nothing was archived.
func TestWhatRootMakesBelongsToTheOwnerOfTheDataDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "data")
	makeServer(t, dir)
	if os.Geteuid() == 0 { // else it is this user's anyway
		err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			return errors.Join(err, os.Chown(path, 65534, 65534))
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := wal.OpenInstance(dir); err != nil {
		t.Fatal(err)
	}
	names := 0
	err = filepath.WalkDir(filepath.Join(dir, "pg_wal/pgkeep"), func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		names++
		info, err := d.Info()
		if err == nil && info.Sys().(*syscall.Stat_t).Uid != want.Sys().(*syscall.Stat_t).Uid {
			t.Errorf("%s belongs to %d", path, info.Sys().(*syscall.Stat_t).Uid)
		}
		return err
	})
	if err != nil || names != 3 {
		t.Errorf("%d names, %v; want the directory, the instance and its lock", names, err)
	}
}
