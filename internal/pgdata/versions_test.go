package pgdata_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pgdata"
)

// Each major version is copied under load while tables and databases come, go
// and are rewritten. The copy must start, hold every row that was committed
// before the stop, and be sound by all that judges it.
func TestCopyUnderLoadIsSound(t *testing.T) {
	for major := 14; major <= 18; major++ {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			t.Parallel()
			copyUnderLoad(t, major)
		})
	}
}

func copyUnderLoad(t *testing.T, major int) {
	ctx := t.Context()
	settings := map[string]string{"wal_keep_size": "4GB", "checkpoint_timeout": "30s", "max_wal_size": "4GB", "allow_in_place_tablespaces": "on"}
	if major >= 17 {
		settings["summarize_wal"] = "on"
	}
	if major < 15 {
		delete(settings, "allow_in_place_tablespaces")
	}
	p := lab.PostgresForTest(t, lab.PostgresOptions{Version: major, Settings: settings, WALSegmentMB: 1})
	ts := filepath.Join(lab.DirForTest(t), "ts")
	if err := errors.Join(os.Mkdir(ts, 0o700), lab.Own(ts)); err != nil {
		t.Fatal(err)
	}
	exec(t, p, "CREATE TABLESPACE away LOCATION '"+ts+"'", "CREATE TABLE far TABLESPACE away AS SELECT generate_series(1, 20000) AS n",
		"CREATE TABLE ledger(n int PRIMARY KEY)", "CREATE EXTENSION amcheck", "CREATE UNLOGGED TABLE u AS SELECT generate_series(1, 1000) AS n")
	if major >= 15 {
		exec(t, p, "CREATE TABLESPACE inside LOCATION ''", "CREATE TABLE near TABLESPACE inside AS SELECT generate_series(1, 20000) AS n")
	}
	if out, err := p.Command(ctx, "pgbench", "-h", runDir(p), "-U", "postgres", "-i", "-q", "-s", "2", "postgres").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	load := startLoad(t, p)
	k := takeCopy(t, p, pgdata.Options{})
	promised := load.committed() // before the stop, some of them only just
	load.stop()
	if len(k.damaged) > 0 {
		t.Errorf("pages are called damaged that are not: %v", k.damaged)
	}
	k.link(t)
	k.manifest(t, p, major)
	r := k.restore(t, p, lab.PostgresOptions{Version: major})
	conn, err := r.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	for query, want := range map[string]int{
		"SELECT count(*) FROM far": 20000,
		"SELECT count(*) FROM u":   0,
		"SELECT (SELECT sum(bbalance) FROM pgbench_branches) - (SELECT sum(delta) FROM pgbench_history)":     0,
		"SELECT (SELECT sum(abalance) FROM pgbench_accounts) - (SELECT sum(delta) FROM pgbench_history)":     0,
		fmt.Sprintf("SELECT count(*) FROM generate_series(1, %d) n WHERE n NOT IN (TABLE ledger)", promised): 0,
	} {
		var got int
		if err := conn.QueryRow(ctx, query).Scan(&got); err != nil || got != want {
			t.Errorf("%s: %d, %v; want %d", query, got, err, want)
		}
	}
	if promised == 0 {
		t.Error("nothing was committed during the copy")
	}
	sound(t, r)
	if major == 15 { // the others come without it
		conn.Close(ctx)
		if err := r.Stop(); err != nil {
			t.Fatal(err)
		}
		if out, err := p.Command(ctx, "pg_checksums", "--check", "-D", r.DataDir).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
		if err := r.Restart(ctx, nil); err != nil {
			t.Fatal(err)
		}
	}
}

func exec(t *testing.T, p *lab.Postgres, sql ...string) {
	t.Helper()
	if err := p.Exec(t.Context(), "postgres", sql...); err != nil {
		t.Fatal(err)
	}
}

func runDir(p *lab.Postgres) string { return filepath.Join(filepath.Dir(p.DataDir), "run") }

// sound reads every page and checks every table and index of every database.
func sound(t *testing.T, p *lab.Postgres) {
	t.Helper()
	ctx := t.Context()
	conn, err := p.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	rows, _ := conn.Query(ctx, "SELECT datname::text FROM pg_database WHERE datallowconn AND datconnlimit <> -2")
	databases, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	for _, database := range databases {
		err := p.Exec(ctx, database, "CREATE EXTENSION IF NOT EXISTS amcheck",
			`SELECT bt_index_check(c.oid, heapallindexed => true) FROM pg_class c JOIN pg_am a ON a.oid = c.relam JOIN pg_index i ON i.indexrelid = c.oid
			  WHERE a.amname = 'btree' AND c.relkind = 'i' AND i.indisvalid AND i.indisready AND c.relpersistence <> 't'`,
			`DO $$ DECLARE r record; BEGIN
				FOR r IN SELECT c.oid::regclass AS rel, v.* FROM pg_class c, LATERAL verify_heapam(c.oid) v
				          WHERE c.relkind IN ('r', 't', 'm') AND c.relpersistence <> 't'
				LOOP RAISE EXCEPTION 'corrupt: %', r; END LOOP; END $$`)
		if err != nil {
			t.Errorf("database %s of the copy: %v", database, err)
		}
	}
}

// A load writes to a server until it is stopped.
type load struct {
	mu sync.Mutex
	n  int // rows 1 to n of the ledger are committed

	cancel context.CancelFunc
	done   sync.WaitGroup
}

func startLoad(t *testing.T, p *lab.Postgres) *load {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	l := &load{cancel: cancel}
	t.Cleanup(l.stop)
	bench := p.Command(ctx, "pgbench", "-h", runDir(p), "-U", "postgres", "-n", "-c", "2", "-T", "300", "postgres")
	l.done.Go(func() { bench.Run() })
	l.done.Go(func() {
		for i := 1; ctx.Err() == nil; i++ {
			if err := p.Exec(ctx, "postgres", fmt.Sprintf("INSERT INTO ledger VALUES (%d)", i)); err != nil {
				if ctx.Err() == nil {
					t.Error(err)
				}
				return
			}
			l.mu.Lock()
			l.n = i
			l.mu.Unlock()
		}
	})
	l.done.Go(func() {
		for i := 1; ctx.Err() == nil; i++ {
			err := p.Exec(ctx, "postgres",
				fmt.Sprintf("CREATE TABLE churn%d AS SELECT n, repeat('x', 500) AS t FROM generate_series(1, 3000) n", i),
				fmt.Sprintf("CREATE INDEX ON churn%d(n)", i),
				fmt.Sprintf("CREATE TEMP TABLE temp%d AS SELECT generate_series(1, 1000) AS n", i),
				fmt.Sprintf("DELETE FROM churn%d WHERE n %% 2 = 0", i), fmt.Sprintf("VACUUM FULL churn%d", i),
				fmt.Sprintf("TRUNCATE churn%d", i), fmt.Sprintf("INSERT INTO churn%d SELECT n, 'y' FROM generate_series(1, 100) n", i),
				fmt.Sprintf("CREATE DATABASE d%d", i), fmt.Sprintf("DROP TABLE churn%d", i), fmt.Sprintf("DROP DATABASE d%d", i))
			if err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
		}
	})
	for deadline := time.Now().Add(time.Minute); l.committed() < 5; {
		if time.Now().After(deadline) {
			t.Fatal("the load does not begin")
		}
		<-time.After(10 * time.Millisecond)
	}
	return l
}

func (l *load) committed() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.n
}

func (l *load) stop() {
	l.cancel()
	l.done.Wait()
}

// link makes the links of the tablespaces lead to their copies.
func (k *copied) link(t *testing.T) {
	t.Helper()
	for _, f := range k.files {
		if f.Link != "" {
			if err := os.Symlink(filepath.Join(k.dir, "tablespaces", filepath.Base(f.Path)), filepath.Join(k.dir, f.Path)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// manifest has PostgreSQL's own programs judge the copy by a manifest.
func (k *copied) manifest(t *testing.T, p *lab.Postgres, major int) {
	t.Helper()
	ctx := t.Context()
	write := func(major int) []byte {
		var b bytes.Buffer
		m := pgdata.NewManifest(&b, major, k.start.System)
		files := append([]pgdata.File{{Path: "data/backup_label"}, {Path: "data/global/pg_control"}}, k.files...)
		if k.stop.TablespaceMap != "" {
			files = append(files, pgdata.File{Path: "data/tablespace_map"})
		}
		for _, f := range files {
			if f.Dir || f.Link != "" {
				continue
			}
			content, err := os.ReadFile(filepath.Join(k.dir, f.Path))
			if err != nil {
				t.Fatal(err)
			}
			if err := m.Add(f.Path, int64(len(content)), f.Modified, crc32.Checksum(content, crc32.MakeTable(crc32.Castagnoli))); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.Finish(pgdata.WALRange{Timeline: k.start.Timeline, Start: k.start.LSN, End: k.stop.LSN}); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	// Debian's pg_verifybackup is that of 15, and knows version 1.
	k.write(t, "data/backup_manifest", write(min(major, 16)))
	if err := lab.Own(k.dir); err != nil {
		t.Fatal(err)
	}
	out, err := p.Command(ctx, "pg_verifybackup", "--no-parse-wal", filepath.Join(k.dir, "data")).CombinedOutput()
	if err != nil {
		t.Errorf("pg_verifybackup: %v: %s", err, out)
	}
	if err := os.Remove(filepath.Join(k.dir, "data/backup_manifest")); err != nil {
		t.Fatal(err)
	}
	if major < 17 {
		return
	}
	// A server takes a manifest for an incremental backup, if it is whole and its own.
	conn, err := pgconn.Connect(ctx, p.Conninfo()+" dbname=postgres replication=true")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	whole := write(major)
	if _, err := conn.CopyFrom(ctx, bytes.NewReader(whole), "UPLOAD_MANIFEST"); err != nil {
		t.Errorf("the server refuses the manifest: %v", err)
	}
	if _, err := conn.CopyFrom(ctx, bytes.NewReader(bytes.Replace(whole, []byte("CRC32C"), []byte("CRC32c"), 1)), "UPLOAD_MANIFEST"); err == nil {
		t.Error("the server takes a manifest that was changed")
	}
}
