package durable_test

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/pgkeep/pgkeep/internal/durable"
)

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	cut := errors.New("cut")
	put := func(s string, fail error) error { return durable.WriteFile(path, 0o640, writes(s, fail)) }
	if err := put("old", nil); err != nil {
		t.Fatal(err)
	}
	if err := put("new", cut); !errors.Is(err, cut) {
		t.Errorf("err = %v, want %v", err, cut)
	}
	if b, _ := os.ReadFile(path); string(b) != "old" {
		t.Errorf("after a failed write the file holds %q", b)
	}
	if err := put("new", nil); err != nil {
		t.Fatal(err)
	}
	if b, _ := os.ReadFile(path); string(b) != "new" {
		t.Errorf("after a write the file holds %q", b)
	}
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o640 {
		t.Errorf("its mode is %v, want 0640 (%v)", info.Mode(), err)
	}
	wantNames(t, dir, "f")
}

// A path without a directory means the current one, not the system's /tmp.
func TestWriteFileRelative(t *testing.T) {
	t.Chdir(t.TempDir())
	t.Setenv("TMPDIR", filepath.Join(t.TempDir(), "missing"))
	if err := durable.WriteFile("f", 0o600, writes("x", nil)); err != nil {
		t.Fatal(err)
	}
}

func TestUnfinishedFilesAreKnown(t *testing.T) {
	dir := t.TempDir()
	err := durable.WriteFile(filepath.Join(dir, "f"), 0o600, func(io.Writer) error {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 || !durable.IsTemp(entries[0].Name()) {
			t.Errorf("while writing: %v, %v, want one temporary file", entries, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if durable.IsTemp("f") {
		t.Error("f is taken for a temporary file")
	}
}

func TestOfManyCreatorsOneWins(t *testing.T) {
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if err := durable.MkdirAll(root, "a/b", 0o700); err != nil {
		t.Fatal(err)
	}
	errs := make([]error, 10)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = durable.Create(root, "a/b/f", 0o600, writes(string(rune('0'+i)), nil)) })
	}
	wg.Wait()
	won := ""
	for i, err := range errs {
		switch {
		case err == nil:
			won += string(rune('0' + i))
		case !errors.Is(err, fs.ErrExist):
			t.Errorf("creator %d: %v", i, err)
		}
	}
	if b, err := root.ReadFile("a/b/f"); err != nil || string(b) != won {
		t.Errorf("%q won, and the file holds %q (%v)", won, b, err)
	}
	wantNames(t, filepath.Join(root.Name(), "a/b"), "f")
}

func TestNothingIsWrittenOutsideTheRoot(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "root"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("..", filepath.Join(dir, "root/up")); err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(filepath.Join(dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for _, name := range []string{"../f", "up/f", "/f"} {
		if err := durable.Replace(root, name, 0o600, writes("x", nil)); err == nil {
			t.Errorf("wrote %s", name)
		}
		if err := durable.Create(root, name, 0o600, writes("x", nil)); err == nil {
			t.Errorf("created %s", name)
		}
	}
	wantNames(t, dir, "root")
}

func writes(s string, fail error) func(io.Writer) error {
	return func(w io.Writer) error {
		_, err := io.WriteString(w, s)
		return errors.Join(err, fail)
	}
}

func wantNames(t *testing.T, dir string, want string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != want {
		t.Errorf("%s holds %v (%v), want %s alone", dir, entries, err, want)
	}
}
