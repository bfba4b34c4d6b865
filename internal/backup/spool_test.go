package backup_test

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A dump of which something was lost after it was complete is never published
// as if it were whole.
func TestUploadRefusesADumpWithHoles(t *testing.T) {
	for _, tc := range []struct {
		name string
		harm func(tree string) error
		want fail.Kind
	}{
		{"whole", func(string) error { return nil }, fail.Unknown},
		{"a table lost", func(tree string) error { return os.Remove(filepath.Join(tree, "databases/1/3001.dat")) }, fail.SpoolLost},
		{"a table cut", func(tree string) error { return os.Truncate(filepath.Join(tree, "databases/2/3001.dat"), 10) }, fail.SpoolLost},
		{"a database lost", func(tree string) error { return os.RemoveAll(filepath.Join(tree, "databases/2")) }, fail.SpoolLost},
		{"roles lost", func(tree string) error { return os.Remove(filepath.Join(tree, "globals.sql")) }, fail.SpoolLost},
		{"all lost", os.RemoveAll, fail.SpoolLost},
	} {
		t.Run(tc.name, func(t *testing.T) {
			l, id := spooled(t)
			if err := tc.harm(filepath.Join(l.Spool, l.Name, string(id), "tree")); err != nil {
				t.Fatal(err)
			}
			_, err := l.Upload(t.Context(), id, nil)
			if fail.KindOf(err) != tc.want || (err == nil) != (tc.want == fail.Unknown) {
				t.Errorf("err = %v, want %q", err, tc.want)
			}
		})
	}
}

// spooled returns a spool with a complete dump of two databases, and an empty
// repository.
func spooled(t *testing.T) (*backup.Logical, repo.ID) {
	t.Helper()
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	started := time.Date(2026, 11, 22, 1, 30, 0, 0, time.UTC)
	r, _, err := repo.Init(t.Context(), new(store.Mem), repo.Access{Signer: signer, Version: "1.2.3"}, nil, started)
	if err != nil {
		t.Fatal(err)
	}
	id := repo.NewID(started, "4f2a9c01")
	l := &backup.Logical{Name: "main", Spool: t.TempDir(), Open: func(context.Context) (*repo.Repo, error) { return r, nil }}
	dir := filepath.Join(l.Spool, l.Name, string(id))
	write := func(name string, content []byte) {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, content, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	d := backup.Details{Globals: "globals.sql"}
	write("tree/globals.sql", []byte("CREATE ROLE app;\n"))
	for _, db := range []string{"1", "2"} {
		write("tree/databases/"+db+"/toc.dat", make([]byte, 500))
		write("tree/databases/"+db+"/3001.dat", make([]byte, 1000))
		d.Databases = append(d.Databases, backup.DatabaseDump{Name: "db" + db, Dir: "databases/" + db, Bytes: 1500})
	}
	text, err := json.Marshal(d)
	if err != nil {
		t.Fatal(err)
	}
	write("tree/details.json", text)
	write("done.json", text)
	return l, id
}

// A backup that is deleted while it is taken ends at once: trying again for
// hours would keep the next one from starting.
func TestDeletedWhileTaken(t *testing.T) {
	l, id := spooled(t)
	if _, err := l.Verify(t.Context(), id, nil); !errors.Is(err, fail.NoBackup) {
		t.Errorf("Verify: %v, want no-backup", err)
	}
	if _, err := l.Publish(t.Context(), id, backup.Published{}); !errors.Is(err, fail.NoBackup) {
		t.Errorf("Publish: %v, want no-backup", err)
	}
}
