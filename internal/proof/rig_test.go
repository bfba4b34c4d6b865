package proof_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// A rig is a cluster with a base backup and an archive.
type rig struct {
	pg      *lab.Postgres
	dir     string
	archive string
	base    string // the base backup
	space   string // its tablespace
	oid     string // of the tablespace

	system  pg.SystemID
	end     pg.LSN // of the archive
	middle  time.Time
	xid     string                      // of a transaction in the middle
	rows    map[string]map[string]int64 // at the end
	atFirst int64                       // rows of public.orders in the middle
	halts   []restore.Halt              // in the middle, and a little later
	paths   map[string]string           // of relations, below the data directory
}

func newRig(t *testing.T) *rig {
	t.Helper()
	memory := "/dev/shm" // a recovery syncs every file there is
	if _, err := os.Stat(memory); err != nil {
		memory = ""
	}
	dir, err := os.MkdirTemp(memory, "pgkeep-rig-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	r := &rig{dir: dir, archive: dir + "/archive", base: dir + "/base", space: dir + "/space", paths: make(map[string]string)}
	for _, d := range []string{dir, r.archive, r.base, r.space, dir + "/live"} {
		os.MkdirAll(d, 0o777)
		os.Chmod(d, 0o777)
	}
	// PostgreSQL calls the archive command as its own OS user.
	r.pg = lab.PostgresForTest(t, lab.PostgresOptions{WALSegmentMB: 1, Settings: map[string]string{
		"autovacuum":   "off", // what it touches after the backup, replay mends
		"archive_mode": "on", "archive_command": "cp %p " + r.archive + "/.%f && chmod 644 " + r.archive + "/.%f && mv " + r.archive + "/.%f " + r.archive + "/%f",
	}})
	r.own(t, dir+"/live", r.base, r.space)
	r.exec(t, "postgres",
		"CREATE TABLESPACE fast LOCATION '"+dir+"/live'",
		"CREATE DATABASE shop",
		"CREATE TABLE orders (id int PRIMARY KEY, name text, note text)",
		"ALTER TABLE orders ALTER note SET STORAGE EXTERNAL",
		"INSERT INTO orders SELECT i, 'name ' || i, CASE WHEN i < 300 THEN repeat(md5(i::text), 200) END FROM generate_series(1, 3000) i",
		"CREATE INDEX orders_name ON orders (name)",
		"CREATE INDEX orders_icu ON orders (name COLLATE \"en-x-icu\")",
		"CREATE MATERIALIZED VIEW names AS SELECT name FROM orders",
		"CREATE MATERIALIZED VIEW later AS SELECT name FROM orders WITH NO DATA",
		`CREATE TABLE parts (k int, v text) PARTITION BY LIST (k)`,
		`CREATE TABLE parts_1 PARTITION OF parts FOR VALUES IN (1)`,
		`INSERT INTO parts SELECT 1, 'x' FROM generate_series(1, 100)`,
		`SELECT count(*) FROM parts`, // who reads first notes in the page who has committed: after the backup, replay would mend it by that
		`CREATE TABLE twin_a AS SELECT i FROM generate_series(1, 500) i`,
		`CREATE TABLE twin_b AS SELECT i + 5 AS i FROM generate_series(1, 500) i`,
		`CREATE INDEX ON twin_a (i)`, `CREATE INDEX ON twin_b (i)`,
		`CREATE TABLE paged (i int)`, `INSERT INTO paged SELECT generate_series(1, 1000)`, `CREATE INDEX paged_i ON paged (i)`,
		`UPDATE pg_class SET relpages = 100000 WHERE relname LIKE 'paged%'`)
	r.exec(t, "postgres", "SET allow_in_place_tablespaces = on", "CREATE TABLESPACE inside LOCATION ''", "CREATE TABLE within (i int) TABLESPACE inside", "INSERT INTO within VALUES (1)")
	r.exec(t, "shop",
		"CREATE TABLE items (id bigint PRIMARY KEY, price numeric) TABLESPACE fast",
		"INSERT INTO items SELECT i, i * 1.5 FROM generate_series(1, 2000) i",
		// What the source does to whoever opens it.
		"CREATE FUNCTION spy() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'the event trigger fired'; END $$",
		"CREATE EVENT TRIGGER spy ON ddl_command_start EXECUTE FUNCTION spy()")
	for _, rel := range []string{"orders", "orders_pkey", "orders_name", "orders_icu", "names", "parts_1", "twin_a", "twin_b", "twin_a_i_idx", "paged_i", "paged"} {
		r.paths[rel] = r.text(t, "postgres", "SELECT pg_relation_filepath('"+rel+"')")
	}
	r.paths["toast"] = r.text(t, "postgres", "SELECT pg_relation_filepath(reltoastrelid) FROM pg_class WHERE relname = 'orders'")
	r.paths["items"] = r.text(t, "shop", "SELECT pg_relation_filepath('items')")
	r.oid = r.text(t, "postgres", "SELECT oid::text FROM pg_tablespace WHERE spcname = 'fast'")
	system, err := pg.ParseSystemID(r.text(t, "postgres", "SELECT system_identifier::text FROM pg_control_system()"))
	if err != nil {
		t.Fatal(err)
	}
	r.system = system

	r.backup(t)
	r.exec(t, "postgres", "INSERT INTO orders SELECT i, 'name ' || i, 'short' FROM generate_series(3001, 4000) i")
	r.atFirst = 4000
	r.halt(t, "*.*.*")
	r.middle, err = time.Parse("2006-01-02 15:04:05.999999-07", r.text(t, "postgres", "SELECT (clock_timestamp() AT TIME ZONE 'UTC')::text || '+00'"))
	if err != nil {
		t.Fatal(err)
	}
	r.xid = r.text(t, "postgres", "SELECT pg_current_xact_id()::text")
	r.exec(t, "postgres", "SELECT pg_create_restore_point('half')", "INSERT INTO orders SELECT i, 'name ' || i, repeat(md5(i::text), 60) FROM generate_series(4001, 6000) i", "REFRESH MATERIALIZED VIEW names")
	r.halt(t, "*.*.*")
	r.exec(t, "shop", "INSERT INTO items SELECT i, i FROM generate_series(2001, 2500) i")
	// And what it does to hide damage, or to break off whoever looks for it.
	r.exec(t, "postgres",
		"ALTER DATABASE postgres SET zero_damaged_pages = on", "ALTER ROLE ALL SET ignore_checksum_failure = on",
		"ALTER DATABASE shop SET role = pg_monitor",
		"ALTER DATABASE shop SET statement_timeout = 1", "ALTER ROLE ALL IN DATABASE shop SET default_transaction_read_only = on",
		"ALTER DATABASE shop SET lock_timeout = 1", "ALTER DATABASE shop SET session_preload_libraries = 'evil'", "ALTER DATABASE shop SET timezone = 'Asia/Tokyo'")
	end, err := pg.ParseLSN(r.text(t, "template1", "SELECT pg_current_wal_lsn()::text"))
	if err != nil {
		t.Fatal(err)
	}
	r.end = end
	r.rows = map[string]map[string]int64{
		"postgres": {"public.orders": 6000, "public.names": 6000, "public.parts_1": 100},
		"shop":     {"public.items": 2500},
	}
	r.switchWAL(t)
	return r
}

// backup takes the base backup, in place of the one before.
func (r *rig) backup(t *testing.T) {
	t.Helper()
	for _, dir := range []string{r.base, r.space} {
		left, _ := filepath.Glob(dir + "/*")
		for _, path := range left {
			os.RemoveAll(path)
		}
	}
	out, err := r.pg.Command(t.Context(), "pg_basebackup", "--pgdata="+r.base, "--dbname="+r.pg.Conninfo(), "--wal-method=none", "--checkpoint=fast",
		"--tablespace-mapping="+r.dir+"/live="+r.space, "--no-sync").CombinedOutput()
	if err != nil {
		t.Fatalf("pg_basebackup: %v: %s", err, out)
	}
}

// halt counts the rows of tables. Nobody writes meanwhile.
func (r *rig) halt(t *testing.T, tables string) {
	t.Helper()
	all, err := pg.ParseTablePattern(tables)
	if err != nil {
		t.Fatal(err)
	}
	counted, missing, err := cluster.Cluster{Conninfo: r.pg.Conninfo()}.CountRows(t.Context(), []pg.TablePattern{all})
	if err != nil || len(missing) > 0 || len(counted) == 0 {
		t.Fatalf("%+v, %q, %v", counted, missing, err)
	}
	r.halts = append(r.halts, restore.Halt{At: counted[len(counted)-1].After, Counted: counted})
}

// switchWAL has everything archived that was written so far.
func (r *rig) switchWAL(t *testing.T) {
	t.Helper()
	last := r.text(t, "postgres", "SELECT pg_walfile_name(pg_switch_wal())")
	eventually(t, func() bool { _, err := os.Stat(r.archive + "/" + last); return err == nil })
}

func (r *rig) own(t *testing.T, paths ...string) {
	t.Helper()
	for _, p := range paths {
		os.Chmod(p, 0o700)
		if out, err := exec.Command("chown", "-R", "--reference="+r.pg.DataDir, p).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
}

func (r *rig) exec(t *testing.T, db string, sql ...string) {
	t.Helper()
	if err := r.pg.Exec(t.Context(), db, sql...); err != nil {
		t.Fatal(err)
	}
}

func (r *rig) text(t *testing.T, db, query string) (s string) {
	t.Helper()
	conn, err := r.pg.Connect(t.Context(), db)
	if err == nil {
		defer conn.Close(context.Background())
		err = conn.QueryRow(t.Context(), query).Scan(&s)
	}
	if err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return s
}

// sandbox restores the base backup into a new one.
func (r *rig) sandbox(t *testing.T, name string) *sandbox.Sandbox {
	t.Helper()
	s, err := sandbox.Make(t.Context(), sandbox.Options{Parent: r.dir + "/s", Name: name, Memory: 256 << 20, StallAfter: 20 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Remove(); err != nil {
			t.Error(err)
		}
	})
	r.restore(t, s)
	return s
}

func (r *rig) restore(t *testing.T, s *sandbox.Sandbox) {
	t.Helper()
	space := filepath.Join(s.Tablespaces(), r.oid)
	link := filepath.Join(s.Data(), "pg_tblspc", r.oid)
	for _, args := range [][]string{
		{"cp", "-a", r.base + "/.", s.Data()},
		{"cp", "-a", r.space + "/.", space},
		{"ln", "-sfn", space, link},
		{"chmod", "0700", space},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", args, err, out)
		}
	}
}

// test is one that passes.
func (r *rig) test(s *sandbox.Sandbox) proof.Test {
	return proof.Test{
		Sandbox:  s,
		Recovery: &sandbox.Recovery{Command: "cp " + r.archive + "/%f %p"},
		System:   r.system,
		AtLeast:  r.end,
		Timeline: 1,
		Rows:     r.rows,
		Source:   proof.Position{Timeline: 1, LSN: r.end + 100, LastCommit: time.Now()},
		Assertions: []proof.Assertion{
			{Name: "orders are complete", Database: "postgres", Query: "SELECT count(*), max(id) FROM orders", Want: [][]string{{"6000", "6000"}}},
			{Name: "prices are positive", Database: "shop", Query: "SELECT bool_and(price > 0) FROM items"},
		},
		Limit: 2 * time.Minute,
	}
}

// eventually waits until something is so.
func eventually(t *testing.T, so func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !so() {
		select {
		case <-ctx.Done():
			t.Fatal("waited in vain")
		case <-tick.C:
		}
	}
}

// page changes a page of the restored data and gives it the right checksum
// again, so that only who understands the page sees it.
func page(t *testing.T, path string, block int64, change func(page []byte)) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 8192)
	if _, err := f.ReadAt(b, block*8192); err != nil {
		t.Fatal(err)
	}
	change(b)
	sum := pg.PageChecksum(b, uint32(block))
	b[8], b[9] = byte(sum), byte(sum>>8)
	if _, err := f.WriteAt(b, block*8192); err != nil {
		t.Fatal(err)
	}
}

// failures lists what is red.
func failures(r proof.Report) string {
	var lines []string
	for _, c := range r.Checks {
		if c.Verdict == proof.Failed {
			lines = append(lines, fmt.Sprintf("%s [%s]: %s\n   %s", c.Name, c.Kind, c.Message, strings.Join(c.Findings, "\n   ")))
		}
	}
	return strings.Join(lines, "\n")
}

func verdict(r proof.Report, name string) proof.Check {
	for _, c := range r.Checks {
		if c.Name == name {
			return c
		}
	}
	return proof.Check{}
}

// strays lists processes of PostgreSQL whose data is below a directory.
func strays(dir string) (pids []int) {
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		cwd, err := os.Readlink(p + "/cwd")
		if err == nil && strings.HasPrefix(cwd, dir) {
			pid, _ := strconv.Atoi(filepath.Base(p))
			pids = append(pids, pid)
		}
	}
	return pids
}
