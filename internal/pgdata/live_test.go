package pgdata_test

import (
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/pgdata"
)

// A copy is a backup of a server as plain files, made the way pgkeep makes one,
// without a repository.
type copied struct {
	dir     string // for lab.PostgresOptions.Dir
	files   []pgdata.File
	damaged map[string][]int64
	start   cluster.Started
	stop    cluster.Stopped
	notes   []string
	inPlace bool // it has tablespaces in pg_tblspc itself
}

// takeCopy copies a running server. During is called between start and stop,
// when all is listed and nothing is read.
func takeCopy(t *testing.T, p *lab.Postgres, opt pgdata.Options) *copied {
	t.Helper()
	ctx := t.Context()
	c := cluster.Cluster{Conninfo: p.Conninfo(), BinDir: p.BinDir}
	k := &copied{dir: lab.DirForTest(t), damaged: make(map[string][]int64)}
	opt.Note = func(path, why string) { k.notes = append(k.notes, path+": "+why) }
	s, d := begin(t, c, opt)
	defer s.Abort()
	defer d.Close()
	k.start = s.Start
	spaces, err := d.Tablespaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, ts := range spaces {
		k.inPlace = k.inPlace || ts.Path == ""
	}
	control, _, err := d.Control(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start.Check(control); err != nil {
		t.Fatal(err)
	}
	check := pgdata.PageCheck{Start: s.Start.LSN, Now: func() (pg.LSN, error) { return s.Position(ctx) }}
	var paths []string
	for f, err := range d.Files(ctx) {
		if err != nil {
			t.Fatal(err)
		}
		paths = append(paths, f.Path)
		k.take(t, d, f, check)
	}
	if !slices.IsSorted(paths) {
		t.Error("the listing is not in order")
	}
	if err := s.Check(ctx); err != nil {
		t.Fatal(err)
	}
	_, content, err := d.Control(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if k.stop, err = s.Stop(ctx); err != nil {
		t.Fatal(err)
	}
	k.write(t, "data/global/pg_control", content)
	k.write(t, "data/backup_label", []byte(k.stop.Label))
	if k.stop.TablespaceMap != "" {
		k.write(t, "data/tablespace_map", []byte(k.stop.TablespaceMap))
	}
	return k
}

// begin starts a backup, and opens the directory before the next checkpoint.
func begin(t *testing.T, c cluster.Cluster, opt pgdata.Options) (*cluster.BackupSession, *pgdata.Dir) {
	t.Helper()
	for {
		s, err := c.StartBackup(t.Context(), "a copy", true)
		if err != nil {
			t.Fatal(err)
		}
		opt.Config, opt.LogDirectory = s.Start.Config, s.Start.LogDirectory
		d, err := pgdata.Open(s.Start.DataDirectory, opt)
		if err == nil {
			err = d.KeepDatabases()
		}
		var redo pg.LSN
		if err == nil {
			redo, err = s.Redo(t.Context())
		}
		if err != nil {
			t.Fatal(err)
		}
		if redo == s.Start.LSN {
			return s, d
		}
		s.Abort()
		d.Close()
	}
}

func (k *copied) take(t *testing.T, d *pgdata.Dir, f pgdata.File, check pgdata.PageCheck) {
	t.Helper()
	to := filepath.Join(k.dir, f.Path)
	if f.Dir {
		if err := os.MkdirAll(to, 0o700); err != nil {
			t.Fatal(err)
		}
		k.files = append(k.files, f)
		return
	}
	if f.Link != "" {
		k.files = append(k.files, f)
		return
	}
	src, err := d.OpenFile(t.Context(), f, check)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	content, err := io.ReadAll(io.NewSectionReader(src, 0, src.Size()))
	if err != nil {
		t.Fatal(err)
	}
	if d := src.Damaged(); len(d) > 0 {
		k.damaged[f.Path] = d
	}
	k.write(t, f.Path, content)
	k.files = append(k.files, f)
}

func (k *copied) write(t *testing.T, path string, content []byte) {
	t.Helper()
	to := filepath.Join(k.dir, path)
	if err := os.MkdirAll(filepath.Dir(to), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// restore makes the copy a server of its own, with the log that p has.
func (k *copied) restore(t *testing.T, p *lab.Postgres, opt lab.PostgresOptions) *lab.Postgres {
	t.Helper()
	wal, err := os.ReadDir(filepath.Join(p.DataDir, "pg_wal"))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range wal {
		if len(e.Name()) == 24 && e.Name() >= k.start.FirstWAL || strings.HasSuffix(e.Name(), ".history") {
			b, err := os.ReadFile(filepath.Join(p.DataDir, "pg_wal", e.Name()))
			if err != nil {
				t.Fatal(err)
			}
			k.write(t, "data/pg_wal/"+e.Name(), b)
		}
	}
	if k.stop.TablespaceMap != "" { // the server makes links from it
		var b strings.Builder
		for line := range strings.Lines(k.stop.TablespaceMap) {
			oid, _, _ := strings.Cut(line, " ")
			b.WriteString(oid + " " + filepath.Join(k.dir, "tablespaces", oid) + "\n")
		}
		k.write(t, "data/tablespace_map", []byte(b.String()))
	}
	if err := lab.Own(k.dir); err != nil {
		t.Fatal(err)
	}
	opt.Dir, opt.BinDir = k.dir, p.BinDir
	if k.inPlace { // else the server takes their directories for broken links
		opt.Settings = map[string]string{"allow_in_place_tablespaces": "on"}
	}
	return lab.PostgresForTest(t, opt)
}

func TestCopyOfALiveClusterStarts(t *testing.T) {
	ctx := t.Context()
	p := lab.PostgresForTest(t, lab.PostgresOptions{Settings: map[string]string{"max_prepared_transactions": "5"}})
	exec(t, p, "CREATE TABLE t AS SELECT generate_series(1, 10000) AS n", "CREATE UNLOGGED TABLE u AS SELECT 1 AS n", "BEGIN; INSERT INTO t VALUES (0); PREPARE TRANSACTION 'x'")
	k := takeCopy(t, p, pgdata.Options{})
	if len(k.damaged) > 0 || len(k.notes) > 0 {
		t.Errorf("damaged: %v, notes: %q", k.damaged, k.notes)
	}
	if prepared, err := filepath.Glob(filepath.Join(k.dir, "data/pg_twophase/*")); err != nil || len(prepared) != 1 {
		t.Errorf("prepared transactions: %q, %v", prepared, err)
	}
	r := k.restore(t, p, lab.PostgresOptions{Settings: map[string]string{"max_prepared_transactions": "5"}})
	conn, err := r.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var n, u int
	if err := conn.QueryRow(ctx, "SELECT (SELECT count(*) FROM t), (SELECT count(*) FROM u)").Scan(&n, &u); err != nil || n != 10000 || u != 0 {
		t.Errorf("%d rows, %d unlogged, %v; want 10000, 0", n, u, err)
	}
}

// A page that was damaged on disk is named by file and block, and copied as it
// is; pg_checksums names the same one.
func TestDamagedPageOfALiveClusterIsNamed(t *testing.T) {
	ctx := t.Context()
	p := lab.PostgresForTest(t, lab.PostgresOptions{Version: 15, Dir: lab.DirForTest(t)})
	exec(t, p, "CREATE TABLE t AS SELECT n, repeat('x', 100) AS x FROM generate_series(1, 10000) n", "CHECKPOINT")
	conn, err := p.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var name string
	if err := conn.QueryRow(ctx, "SELECT pg_relation_filepath('t')").Scan(&name); err != nil {
		t.Fatal(err)
	}
	if k := takeCopy(t, p, pgdata.Options{}); len(k.damaged) > 0 {
		t.Fatalf("damaged before anything was damaged: %v", k.damaged)
	}
	f, err := os.OpenFile(filepath.Join(p.DataDir, name), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, block := range []int64{3, 77} {
		if _, err := f.WriteAt([]byte("damage"), block*8192+6000); err != nil {
			t.Fatal(err)
		}
	}
	k := takeCopy(t, p, pgdata.Options{})
	if want := map[string][]int64{"data/" + name: {3, 77}}; !maps.EqualFunc(k.damaged, want, slices.Equal) {
		t.Errorf("damaged %v, want %v", k.damaged, want)
	}
	b, err := os.ReadFile(filepath.Join(k.dir, "data", name))
	if err != nil || string(b[3*8192+6000:][:6]) != "damage" {
		t.Errorf("the page is not as it was: %v", err)
	}
	conn.Close(ctx)
	if err := p.Stop(); err != nil {
		t.Fatal(err)
	}
	out, err := p.Command(ctx, "pg_checksums", "--check", "-D", p.DataDir).CombinedOutput()
	if err == nil || strings.Count(string(out), "checksum verification failed") != 2 || !strings.Contains(string(out), "block 3:") || !strings.Contains(string(out), "block 77:") {
		t.Errorf("pg_checksums: %v: %s", err, out)
	}
}

// A standby is copied while its primary is written to. What makes the copy whole
// is the primary's log up to the end that pg_control names.
func TestCopyOfAStandbyStarts(t *testing.T) {
	ctx := t.Context()
	p := lab.PostgresForTest(t, lab.PostgresOptions{Version: 15, Settings: map[string]string{"wal_keep_size": "4GB"}, WALSegmentMB: 1})
	exec(t, p, "CREATE TABLE ledger(n int PRIMARY KEY)", "CREATE EXTENSION amcheck")
	if out, err := p.Command(ctx, "pgbench", "-h", runDir(p), "-U", "postgres", "-i", "-q", "-s", "1", "postgres").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dir := lab.DirForTest(t)
	if out, err := p.Command(ctx, "pg_basebackup", "-d", p.Conninfo(), "-D", filepath.Join(dir, "data"), "-c", "fast", "-R").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	standby := lab.PostgresForTest(t, lab.PostgresOptions{Version: 15, Dir: dir})
	load := startLoad(t, p)
	k := takeCopy(t, standby, pgdata.Options{})
	load.stop()
	if !k.start.InRecovery || len(k.damaged) > 0 {
		t.Errorf("in recovery %v, damaged %v", k.start.InRecovery, k.damaged)
	}
	r := k.restore(t, p, lab.PostgresOptions{Version: 15})
	conn, err := r.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var holes, differ int
	err = conn.QueryRow(ctx, `SELECT (SELECT max(n) - count(*) FROM ledger),
		(SELECT sum(abalance) FROM pgbench_accounts) - (SELECT sum(delta) FROM pgbench_history)`).Scan(&holes, &differ)
	if err != nil || holes != 0 || differ != 0 {
		t.Errorf("%d rows are missing, balances differ by %d, %v", holes, differ, err)
	}
	sound(t, r)
}

// Two backups at once do not disturb each other, and neither leaves anything in
// the data directory.
func TestC7ConcurrentCopiesBothStart(t *testing.T) {
	ctx := t.Context()
	p := lab.PostgresForTest(t, lab.PostgresOptions{Version: 15, Settings: map[string]string{"wal_keep_size": "1GB"}})
	exec(t, p, "CREATE TABLE t AS SELECT 1 AS n")
	other, err := (cluster.Cluster{Conninfo: p.Conninfo()}).StartBackup(ctx, "another", true)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Abort()
	k := takeCopy(t, p, pgdata.Options{})
	if strings.Contains(k.stop.Label, "another") {
		t.Errorf("the label is %q", k.stop.Label)
	}
	if _, err := other.Stop(ctx); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"backup_label", "tablespace_map"} {
		if _, err := os.Stat(filepath.Join(p.DataDir, name)); err == nil {
			t.Errorf("%s is in the data directory", name)
		}
	}
	r := k.restore(t, p, lab.PostgresOptions{Version: 15})
	exec(t, r, "SELECT n FROM t")
}
