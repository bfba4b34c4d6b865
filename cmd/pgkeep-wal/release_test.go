package main

import (
	"bytes"
	"debug/elf"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// Two trees in different directories give one program, and it needs nothing of
// the host. "make reproducible" shows it for the whole release, with empty caches.
func TestTwoTreesGiveOneProgram(t *testing.T) {
	here, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	there := filepath.Join(t.TempDir(), "a directory", "elsewhere")
	err = filepath.WalkDir(here, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(here, path)
		if err != nil {
			return err
		}
		if d.IsDir() {
			if _, nested := os.Stat(filepath.Join(path, "go.mod")); rel != "." && (nested == nil || strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata") {
				return filepath.SkipDir
			}
			return os.MkdirAll(filepath.Join(there, rel), 0o755)
		}
		if name := d.Name(); !strings.HasSuffix(name, ".go") && name != "go.mod" && name != "go.sum" || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(there, rel), b, 0o644)
	})
	if err != nil {
		t.Fatal(err)
	}
	var built [2][]byte
	for i, tree := range []string{here, there} {
		program := filepath.Join(t.TempDir(), "pgkeep-wal")
		cmd := exec.Command("go", "build", "-ldflags=-s -w -X main.version=v0", "-o", program, "./cmd/pgkeep-wal")
		cmd.Dir = tree
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-trimpath -buildvcs=false", "GOWORK=off")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go build in %s: %v\n%s", tree, err, out)
		}
		if built[i], err = os.ReadFile(program); err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(built[i], []byte(here)) || bytes.Contains(built[i], []byte(there)) {
			t.Errorf("the program built in %s names a directory of its source", tree)
		}
	}
	if !bytes.Equal(built[0], built[1]) {
		t.Errorf("%s and %s give different programs", here, there)
	}
	f, err := elf.NewFile(bytes.NewReader(built[0]))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			t.Error("the program is not static")
		}
	}
}
