package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/wal"
)

var manySegments = flag.Int("segments", 100, "archive and replay `NUMBER` segments of 1 MB")

// TestManySegments archives what pgbench writes, compares each object
// with its source, and restores by hand: a base backup, and restore_command.
func TestManySegments(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct{ segments, segmentMB int }{{*manySegments, 1}, {10, 16}} {
		t.Run(fmt.Sprintf("%d MB", tt.segmentMB), func(t *testing.T) { thereAndBack(t, tt.segments, tt.segmentMB) })
	}
}

func thereAndBack(t *testing.T, many, segmentMB int) {
	w := newWorld(t, segmentMB)
	ctx := t.Context()
	if err := w.pg.Restart(ctx, map[string]string{"wal_keep_size": "4GB", "max_wal_size": "4GB"}); err != nil {
		t.Fatal(err)
	}
	pgbench := func(args ...string) {
		t.Helper()
		args = append([]string{"-n", "-h", filepath.Dir(w.pg.DataDir) + "/run", "-U", "postgres"}, args...)
		if out, err := w.pg.Command(ctx, "pgbench", append(args, "postgres")...).CombinedOutput(); err != nil {
			t.Fatalf("pgbench: %v\n%s", err, out)
		}
	}
	pgbench("-i", "-q", "-s", "5")
	base := filepath.Join(w.dir, "base")
	if out, err := w.pg.Command(ctx, "pg_basebackup", "-d", w.pg.Conninfo(), "-D", base, "-X", "none", "-c", "fast", "--no-sync").CombinedOutput(); err != nil {
		t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	first := name(t, w.query(w.pg, "SELECT pg_walfile_name(redo_lsn) FROM pg_control_checkpoint()"))
	from, err := first.Start(pg.SegmentSize(segmentMB) << 20)
	if err != nil {
		t.Fatal(err)
	}
	enough := fmt.Sprintf("SELECT (pg_current_wal_lsn() - '%v' > %d::bigint << 20)::text", from, many*segmentMB)
	for w.query(w.pg, enough) != "true" {
		pgbench("-c", "4", "-j", "2", "-t", "1000")
		if err := w.pg.Exec(ctx, "postgres", "CHECKPOINT"); err != nil { // whole pages are written again
			t.Fatal(err)
		}
	}
	last := name(t, w.query(w.pg, "SELECT pg_walfile_name(pg_switch_wal())"))
	deadline := time.Now().Add(time.Minute)
	for w.query(w.pg, "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver") < last.String() {
		if time.Now().After(deadline) {
			t.Fatalf("%v is not archived: %s", last, w.query(w.pg, "SELECT row_to_json(a)::text FROM pg_stat_archiver a"))
		}
		<-time.After(20 * time.Millisecond)
	}

	cfg, err := config.Load(config.Options{File: w.restore, Hostname: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	r, err := open.Repository(ctx, cfg, "test")
	if err != nil {
		t.Fatal(err)
	}
	server, err := wal.ReadServer(w.pg.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	archive := repo.Archive{Cluster: "main", System: server.System, Major: server.Major}
	var segments []string
	for n := first; ; {
		var content bytes.Buffer
		if err := r.ReadWAL(ctx, archive, n, &content); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(content.Bytes(), read(t, filepath.Join(w.pg.DataDir, "pg_wal", n.String()))) {
			t.Errorf("%v is not what PostgreSQL wrote", n)
		}
		segments = append(segments, n.String())
		if n == last {
			break
		}
		if n, err = n.Next(server.SegmentSize); err != nil {
			t.Fatal(err)
		}
	}
	if len(segments) < many {
		t.Fatalf("%d segments, want %d", len(segments), many)
	}

	want, err := lab.Fingerprint(ctx, w.pg.Conninfo()+" dbname=postgres")
	if err != nil {
		t.Fatal(err)
	}
	p, err := w.recover(base, "replayed", w.restore)
	if err != nil {
		t.Fatal(err)
	}
	got, err := lab.Fingerprint(ctx, p.Conninfo()+" dbname=postgres")
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(want, got); d != "" || len(want) < 4 {
		t.Errorf("%d tables, (-want +got):\n%s", len(want), d)
	}
	log, err := os.ReadFile(filepath.Join(w.dir, "replayed", "log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range segments {
		if !strings.Contains(string(log), `restored log file "`+s+`"`) {
			t.Errorf("%s was not replayed", s)
		}
	}
}

func name(t *testing.T, text string) pg.WALName {
	t.Helper()
	n, err := pg.ParseWALName(text)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
