package main

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/lab"
)

// objects are the digests of all objects of the archive, by file.
func (w *world) objects() map[string][32]byte {
	w.t.Helper()
	all := make(map[string][32]byte)
	err := filepath.WalkDir(filepath.Join(w.s3.Data, "prod/clusters"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			all[path] = sha256.Sum256(read(w.t, path))
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return all
}

// clone starts a copy of a data directory, with settings.
func (w *world) clone(base, name string, settings map[string]string, signals ...string) *lab.Postgres {
	w.t.Helper()
	dir := filepath.Join(w.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", base, filepath.Join(dir, "data")).CombinedOutput(); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	for _, signal := range signals {
		w.write(filepath.Join(name, "data", signal), "")
	}
	p, err := lab.StartPostgres(w.t.Context(), lab.PostgresOptions{Dir: dir, Settings: settings})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { p.Stop() })
	return p
}

// writeWAL makes a server write a segment of WAL, and returns its name.
func (w *world) writeWAL(p *lab.Postgres, text string) string {
	w.t.Helper()
	w.query(p, fmt.Sprintf("SELECT pg_logical_emit_message(false, 'test', '%s')::text", text))
	return w.query(p, "SELECT pg_walfile_name(pg_switch_wal())")
}

// archiver waits until a column of pg_stat_archiver has a value that will do.
func (w *world) archiver(p *lab.Postgres, column string, will func(string) bool) {
	w.t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !will(w.query(p, "SELECT coalesce("+column+"::text, '') FROM pg_stat_archiver")) {
		if time.Now().After(deadline) {
			w.t.Fatalf("%s does not get there: %s", column, w.query(p, "SELECT row_to_json(a)::text FROM pg_stat_archiver a"))
		}
		<-time.After(20 * time.Millisecond)
	}
}

func is(name string) func(string) bool { return func(s string) bool { return s == name } }

func TestTheSecondOfTwoClonesIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	base := filepath.Join(w.dir, "base")
	out, err := w.pg.Command(t.Context(), "pg_basebackup", "-d", w.pg.Conninfo(), "-D", base, "-X", "fetch", "-c", "fast", "--no-sync").CombinedOutput()
	if err != nil {
		t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	w.archiver(w.pg, "last_archived_wal", is(w.writeWAL(w.pg, "the first")))
	before := w.objects()

	clone := w.clone(base, "clone", map[string]string{"archive_mode": "on", "archive_command": w.program + " push --config " + w.host + " %p"})
	segment := w.writeWAL(clone, "the second")
	w.archiver(clone, "last_failed_wal", is(segment)) // what came before is the same on both
	if after := w.objects(); !maps.Equal(before, after) {
		t.Errorf("the clone changed the archive: %d objects, then %d", len(before), len(after))
	}
	w.wal(12, "on host ", clone.DataDir, "push", "--config", w.host, "pg_wal/"+segment)
	w.archiver(w.pg, "last_archived_wal", is(w.writeWAL(w.pg, "the first goes on")))

	// Told to, the other one goes on, and the first is refused.
	status, said := w.as(t.Context(), clone.DataDir, w.program, "claim", "--config", w.host)
	if status != 0 || !strings.Contains(said, "until now it was one's on host") {
		t.Errorf("claim = %d, %s", status, said)
	}
	w.archiver(w.pg, "last_failed_wal", is(w.writeWAL(w.pg, "the first is refused")))
	w.wal(11, "SHA-256", clone.DataDir, "push", "--config", w.host, "pg_wal/"+segment) // the first has been there
}

// Both are on timeline 2 then, with the same history to the byte.
func TestTheSecondOfTwoPromotedClonesIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t, 1)
	base := filepath.Join(w.dir, "base")
	out, err := w.pg.Command(t.Context(), "pg_basebackup", "-d", w.pg.Conninfo(), "-D", base, "-X", "none", "-c", "fast", "--no-sync").CombinedOutput()
	if err != nil {
		t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	w.archiver(w.pg, "last_archived_wal", is(w.writeWAL(w.pg, "before")))
	if err := w.pg.Restart(t.Context(), map[string]string{"archive_command": "false"}); err != nil { // its time is over
		t.Fatal(err)
	}
	replay := map[string]string{"restore_command": w.program + " fetch --timeout 1s --config " + w.restore + " %f %p"}
	one := w.clone(base, "one", replay, "standby.signal")
	two := w.clone(base, "two", replay, "standby.signal")
	for _, p := range []*lab.Postgres{one, two} {
		w.query(p, "SELECT pg_promote()::text")
	}
	if !strings.Contains(string(read(t, filepath.Join(one.DataDir, "pg_wal/00000002.history"))), "1\t") {
		t.Fatal("no history")
	}
	same(t, filepath.Join(one.DataDir, "pg_wal/00000002.history"), filepath.Join(two.DataDir, "pg_wal/00000002.history"))

	first := w.writeWAL(one, "one")
	if status, said := w.as(t.Context(), one.DataDir, w.program, "push", "--config", w.host, "pg_wal/00000002.history"); status != 0 {
		t.Fatalf("%d, %s", status, said)
	}
	w.wal(0, "", one.DataDir, "push", "--config", w.host, "pg_wal/"+first)
	before := w.objects()
	w.wal(0, "", two.DataDir, "push", "--config", w.host, "pg_wal/00000002.history") // the same: nothing is written
	second := w.writeWAL(two, "two")
	w.wal(12, "timeline 00000002", two.DataDir, "push", "--config", w.host, "pg_wal/"+second)
	if after := w.objects(); !maps.Equal(before, after) {
		t.Errorf("the second clone changed the archive: %d objects, then %d", len(before), len(after))
	}
}
