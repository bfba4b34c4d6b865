package cluster_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	osexec "os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
)

// fill makes a database with a little of everything.
func fill(t *testing.T, p *lab.Postgres, database string) {
	t.Helper()
	exec(t, p, database,
		"CREATE TABLE accounts(id int PRIMARY KEY, balance numeric, note text)",
		"INSERT INTO accounts SELECT n, n * 1.5, 'note ' || n FROM generate_series(1, 20000) n",
		`CREATE SCHEMA "od d"`, `CREATE TABLE "od d"."T'x"("a b" jsonb, c bytea, d float8, e timestamptz)`,
		`INSERT INTO "od d"."T'x" SELECT jsonb_build_object('n', n), sha256(n::text::bytea), random(), now() FROM generate_series(1, 1000) n`,
		"CREATE TABLE parted(n int) PARTITION BY HASH (n)",
		"CREATE TABLE parted0 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
		"CREATE TABLE parted1 PARTITION OF parted FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
		"INSERT INTO parted SELECT generate_series(1, 1000)",
		"CREATE SEQUENCE s", "SELECT setval('s', 4711)",
		"CREATE MATERIALIZED VIEW sums AS SELECT sum(balance) FROM accounts",
		"CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
		"SELECT lo_from_bytea(0, sha256(n::text::bytea)) FROM generate_series(1, 50) n",
		"CREATE TABLE hidden(n int)", "INSERT INTO hidden SELECT generate_series(1, 10)",
		"ALTER TABLE hidden ENABLE ROW LEVEL SECURITY", "CREATE POLICY none ON hidden USING (false)",
	)
}

func fingerprint(t *testing.T, p *lab.Postgres, database string) map[string]lab.TableSum {
	t.Helper()
	name := strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(database)
	sums, err := lab.Fingerprint(t.Context(), p.Conninfo()+" dbname='"+name+"'")
	if err != nil {
		t.Fatal(err)
	}
	return sums
}

func TestDumpAndRestoreBringEverythingBack(t *testing.T) {
	ctx := t.Context()
	p, c := start(t, lab.PostgresOptions{})
	tools := tools(t, c)
	exec(t, p, "postgres", `CREATE ROLE "the owner"`)
	for i, name := range []string{
		"plain", "it's", `with "quotes"`, "with blanks ", "-dash", "--file=x", "a=b", "host=/nowhere user=x", "postgres://h/x", "[x]", `back\slash`, "ünï", "%41$HOME`id`",
	} {
		t.Run(name, func(t *testing.T) {
			like := cluster.Database{Owner: "the owner", Encoding: "UTF8", Collate: "C", CType: "C"}
			if err := c.CreateDatabase(ctx, name, like); err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				fill(t, p, name)
			} else {
				exec(t, p, name, "CREATE TABLE t AS SELECT generate_series(1, 10) n")
			}
			if err := c.CheckRights(ctx, []string{name}, true); err != nil {
				t.Fatal(err)
			}
			s, err := c.OpenSnapshot(ctx, name, cluster.SnapshotOptions{})
			if err != nil {
				t.Fatal(err)
			}
			want := fingerprint(t, p, name)
			exec(t, p, name, "CREATE TABLE too_late()")
			dir := filepath.Join(t.TempDir(), "dump")
			err = c.Dump(ctx, cluster.DumpOptions{Tools: tools, Database: name, Snapshot: s.ID, Dir: dir, Jobs: 2})
			s.Close()
			if err != nil {
				t.Fatal(err)
			}
			toc, err := cluster.ListTOC(ctx, tools, dir)
			if err != nil || toc.Tables == 0 || toc.Entries <= toc.Tables || toc.Server.Major() != tools.Version.Major() {
				t.Errorf("table of contents = %+v, %v", toc, err)
			}
			back := name + " back"
			if err := c.CreateDatabase(ctx, back, like); err != nil {
				t.Fatal(err)
			}
			var read int64
			if err := c.Restore(ctx, cluster.RestoreOptions{Tools: tools, Dir: dir, Database: back, Jobs: 2, Progress: func(n int64) { read = n }}); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, fingerprint(t, p, back)); diff != "" {
				t.Errorf("what came back differs (-dumped +restored):\n%s", diff)
			}
			_ = read
		})
	}
}

func TestRightsAreToldApartAndTheHintGrantsThem(t *testing.T) {
	ctx := t.Context()
	p, super := start(t, lab.PostgresOptions{})
	exec(t, p, "postgres", "CREATE DATABASE shop", `CREATE ROLE "du mp" LOGIN`, "REVOKE CONNECT ON DATABASE shop FROM PUBLIC")
	fill(t, p, "shop")
	c := as(super, "du mp")
	var refused []string
	for {
		err := c.CheckRights(ctx, []string{"postgres", "shop"}, true)
		if err == nil {
			break
		}
		if !errors.Is(err, fail.PGDenied) {
			t.Fatalf("got %v, want %v", err, fail.PGDenied)
		}
		_, sql, ok := strings.Cut(fail.HintOf(err), "as a superuser: ")
		if !ok {
			t.Fatalf("%v: the hint %q is not SQL", err, fail.HintOf(err))
		}
		refused = append(refused, sql)
		if len(refused) > 5 {
			t.Fatalf("the hints do not help: %q", refused)
		}
		exec(t, p, "shop", sql)
	}
	want := []string{
		`GRANT pg_read_all_data TO "du mp"; ALTER ROLE "du mp" BYPASSRLS;`,
		`GRANT CONNECT ON DATABASE "shop" TO "du mp";`,
		`ALTER ROLE "du mp" SET lo_compat_privileges = on;`,
	}
	if diff := cmp.Diff(want, refused); diff != "" {
		t.Errorf("hints (-want +got):\n%s", diff)
	}

	tools := tools(t, super)
	dir := filepath.Join(t.TempDir(), "dump")
	if err := c.Dump(ctx, cluster.DumpOptions{Tools: tools, Database: "shop", Dir: dir}); err != nil {
		t.Fatal(err)
	}
	exec(t, p, "postgres", "CREATE DATABASE back TEMPLATE template0")
	if err := super.Restore(ctx, cluster.RestoreOptions{Tools: tools, Dir: dir, Database: "back"}); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(fingerprint(t, p, "shop"), fingerprint(t, p, "back")); diff != "" {
		t.Errorf("the role that may dump dumped something else (-source +restored):\n%s", diff)
	}
	file := filepath.Join(t.TempDir(), "globals.sql")
	if err := c.DumpGlobals(ctx, cluster.GlobalsOptions{Tools: tools, File: file, RolePasswords: true}); err != nil {
		t.Error(err)
	}

	// GitLab 2017, F332: what a role cannot see must not be left out in silence.
	exec(t, p, "shop", `ALTER ROLE "du mp" NOBYPASSRLS`)
	err := c.Dump(ctx, cluster.DumpOptions{Tools: tools, Database: "shop", Dir: filepath.Join(t.TempDir(), "dump")})
	if !errors.Is(err, fail.PGDenied) || !strings.Contains(err.Error(), "row-level security") {
		t.Errorf("dump without BYPASSRLS = %v, want %v", err, fail.PGDenied)
	}
	exec(t, p, "shop", `ALTER ROLE "du mp" BYPASSRLS`, `ALTER ROLE "du mp" RESET lo_compat_privileges`)
	err = c.Dump(ctx, cluster.DumpOptions{Tools: tools, Database: "shop", Dir: filepath.Join(t.TempDir(), "dump")})
	if !errors.Is(err, fail.PGDenied) {
		t.Errorf("dump without the large objects = %v, want %v", err, fail.PGDenied)
	}
}

func TestGlobalsHoldPasswordsOnlyWhenAsked(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{})
	exec(t, p, "postgres", "CREATE ROLE clerk LOGIN PASSWORD 'x'", "ALTER ROLE clerk SET work_mem = '1MB'", `CREATE DATABASE "a=b"`)
	c.Conninfo += " dbname='a=b'"
	for _, passwords := range []bool{false, true} {
		file := filepath.Join(t.TempDir(), "globals.sql")
		if err := c.DumpGlobals(t.Context(), cluster.GlobalsOptions{Tools: tools(t, c), File: file, RolePasswords: passwords}); err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(file)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(b), "CREATE ROLE clerk") || !strings.Contains(string(b), "work_mem") ||
			strings.Contains(string(b), "SCRAM-SHA-256$") != passwords || info.Mode() != 0o600 {
			t.Errorf("RolePasswords %v: mode %v:\n%s", passwords, info.Mode(), b)
		}
	}
	file := filepath.Join(t.TempDir(), "globals.sql")
	err := as(c, "nobody").DumpGlobals(t.Context(), cluster.GlobalsOptions{Tools: tools(t, c), File: file})
	if !errors.Is(err, fail.PGDenied) {
		t.Errorf("a role that does not exist: got %v, want %v", err, fail.PGDenied)
	}
	if left, _ := filepath.Glob(filepath.Dir(file) + "/*"); len(left) > 0 {
		t.Errorf("a failed dump left %v", left)
	}
}

// big makes a database that takes pg_dump a while.
func big(t *testing.T, p *lab.Postgres) {
	t.Helper()
	for _, table := range []string{"big1", "big2"} {
		exec(t, p, "postgres", "CREATE UNLOGGED TABLE "+table+"(n int, t text)",
			"INSERT INTO "+table+" SELECT n, repeat('x', 1000) FROM generate_series(1, 150000) n")
	}
}

// processes lists those that have text in their arguments and have not ended.
func processes(text string) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		args, _ := os.ReadFile(dir + "/cmdline") // empty for one that has ended
		if pid, _ := strconv.Atoi(filepath.Base(dir)); pid != os.Getpid() && bytes.Contains(args, []byte(text)) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// locked makes a table that nobody can dump until the test ends.
func locked(t *testing.T, p *lab.Postgres, table string) {
	t.Helper()
	conn, err := p.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE "+table+" IN ACCESS EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
}

func TestDumpReportsThatItMoves(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{})
	big(t, p)
	dir := filepath.Join(t.TempDir(), "dump")
	var calls []int64
	err := c.Dump(t.Context(), cluster.DumpOptions{
		Tools: tools(t, c), Database: "postgres", Dir: dir, Jobs: 2,
		StallAfter: 500 * time.Millisecond, Progress: func(n int64) { calls = append(calls, n) },
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(calls) < 2 || calls[len(calls)-1] < 10<<20 {
		t.Errorf("progress = %v, want it to grow", calls)
	}
	for _, name := range processes(dir) {
		t.Errorf("process %d is left", name)
	}
}

func TestDumpNoticesThatItHangs(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{})
	big(t, p)
	tools := tools(t, c)
	t.Run("stopped", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "dump")
		stopped := false
		err := c.Dump(t.Context(), cluster.DumpOptions{
			Tools: tools, Database: "postgres", Dir: dir, Jobs: 2, StallAfter: 500 * time.Millisecond,
			Progress: func(n int64) {
				if pids := processes(dir); n > 1<<20 && !stopped && len(pids) > 0 {
					stopped = true
					for _, pid := range pids {
						syscall.Kill(pid, syscall.SIGSTOP)
					}
				}
			},
		})
		if !stopped || !errors.Is(err, fail.Stalled) {
			t.Errorf("stopped = %v, got %v, want %v", stopped, err, fail.Stalled)
		}
		if pids := processes(dir); len(pids) > 0 {
			t.Errorf("processes %v are left", pids)
		}
	})
	t.Run("its leader crashes", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "dump")
		done := make(chan error)
		go func() {
			done <- c.Dump(t.Context(), cluster.DumpOptions{Tools: tools, Database: "postgres", Dir: dir, Jobs: 2})
		}()
		var backend int
		eventually(t, "tables are read", func() bool { backend = copying(t, p); return backend != 0 })
		if err := syscall.Kill(backend, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		defer syscall.Kill(backend, syscall.SIGCONT)
		syscall.Kill(slices.Min(processes(dir)), syscall.SIGKILL)
		if err := <-done; !errors.Is(err, fail.DumpFailed) {
			t.Errorf("got %v, want %v", err, fail.DumpFailed)
		}
		if pids := processes(dir); len(pids) > 0 {
			t.Errorf("processes %v are left", pids)
		}
	})
	locked(t, p, "big1")
	t.Run("a table stays locked", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "dump")
		var log bytes.Buffer
		err := c.Dump(t.Context(), cluster.DumpOptions{
			Tools: tools, Database: "postgres", Dir: dir, Jobs: 2, LockWait: 100 * time.Millisecond, Log: slog.New(slog.NewTextHandler(&log, nil)),
		})
		if !errors.Is(err, fail.Stalled) || !strings.Contains(fail.HintOf(err), "pg_locks") {
			t.Errorf("got %v (hint %q), want %v", err, fail.HintOf(err), fail.Stalled)
		}
		if !strings.Contains(log.String(), "LOCK TABLE") {
			t.Errorf("log = %s, want what pg_dump said", &log)
		}
	})
	t.Run("a table stays locked for longer", func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "dump")
		err := c.Dump(t.Context(), cluster.DumpOptions{Tools: tools, Database: "postgres", Dir: dir, StallAfter: 500 * time.Millisecond})
		if !errors.Is(err, fail.Stalled) {
			t.Errorf("got %v, want %v", err, fail.Stalled)
		}
	})
	t.Run("the server works", func(t *testing.T) {
		// Nothing moves here while the server sleeps in a statement.
		exec(t, p, "postgres", "CREATE DATABASE slow TEMPLATE template0")
		exec(t, p, "slow",
			"CREATE FUNCTION slow(int) RETURNS bool IMMUTABLE LANGUAGE plpgsql AS 'BEGIN PERFORM pg_catalog.pg_sleep(2); RETURN true; END'",
			"CREATE TABLE t(n int)", "INSERT INTO t VALUES (1)", "ALTER TABLE t ADD CHECK (public.slow(n)) NOT VALID", "CREATE INDEX ON t ((public.slow(n)))")
		dir := filepath.Join(t.TempDir(), "dump")
		if err := c.Dump(t.Context(), cluster.DumpOptions{Tools: tools, Database: "slow", Dir: dir}); err != nil {
			t.Fatal(err)
		}
		exec(t, p, "postgres", "CREATE DATABASE back TEMPLATE template0")
		moves := 0
		err := c.Restore(t.Context(), cluster.RestoreOptions{
			Tools: tools, Dir: dir, Database: "back", StallAfter: time.Second, Progress: func(int64) { moves++ },
		})
		if err != nil || moves == 0 {
			t.Errorf("restore with a slow index = %v, %d moves", err, moves)
		}
	})
}

func TestDumpEndsWithItsContext(t *testing.T) {
	p := lab.PostgresForTest(t, lab.PostgresOptions{Password: canary})
	c := cluster.Cluster{Conninfo: p.TCPConninfo(), Password: canary, BinDir: p.BinDir}
	exec(t, p, "postgres", "CREATE TABLE t()")
	locked(t, p, "t")
	ctx, cancel := context.WithCancel(t.Context())
	dir := filepath.Join(t.TempDir(), "dump")
	done := make(chan error)
	tools := tools(t, c)
	go func() {
		done <- c.Dump(ctx, cluster.DumpOptions{Tools: tools, Database: "postgres", Dir: dir, Jobs: 2})
	}()
	waiting := func() int { return number(t, p, "SELECT count(*) FROM pg_locks WHERE NOT granted") }
	eventually(t, "pg_dump waits", func() bool { return waiting() > 0 })
	if pids := processes(canary); len(pids) > 0 { // F412
		t.Errorf("processes %v show the password in their arguments", pids)
	}
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want %v", err, context.Canceled)
	}
	if pids := processes(dir); len(pids) > 0 {
		t.Errorf("processes %v are left", pids)
	}
	eventually(t, "the server's part ends too", func() bool { return waiting() == 0 })
}

func TestDumpSaysWhyItFailed(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{})
	tools := tools(t, c)
	exec(t, p, "postgres", "CREATE TABLE t(n int)", "CREATE ROLE guest LOGIN")
	for _, tt := range []struct {
		name string
		c    cluster.Cluster
		opt  cluster.DumpOptions
		want fail.Kind
		text string
	}{
		{"no rights", as(c, "guest"), cluster.DumpOptions{Tools: tools, Database: "postgres"}, fail.PGDenied, "permission denied for table t"},
		{"no such database", c, cluster.DumpOptions{Tools: tools, Database: "nowhere"}, fail.BadConfig, "does not exist"},
		{"no such snapshot", c, cluster.DumpOptions{Tools: tools, Database: "postgres", Snapshot: "00000003-0000001B-1"}, fail.DumpFailed, "snapshot"},
		{"server down", cluster.Cluster{Conninfo: "host=/nowhere user=postgres"}, cluster.DumpOptions{Tools: tools, Database: "postgres"}, fail.PGDown, "/nowhere"},
		{"no pg_dump", c, cluster.DumpOptions{Tools: cluster.Tools{Dir: t.TempDir()}, Database: "postgres"}, fail.PGVersion, "pg_dump"},
	} {
		tt.opt.Dir = filepath.Join(t.TempDir(), "dump")
		err := tt.c.Dump(t.Context(), tt.opt)
		if got := fail.KindOf(err); err == nil || got != tt.want || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: got kind %q, %v; want %q and %q", tt.name, got, err, tt.want, tt.text)
		}
	}
}

// F412: rows stand in DETAIL and CONTEXT, and behind a colon in quotes.
func TestErrorsHoldNoRows(t *testing.T) {
	for _, tt := range []struct {
		lines []string
		want  string
	}{
		{
			[]string{
				`pg_restore: error: COPY failed for table "t": ERROR:  invalid input syntax for type integer: "4111 1111"`,
				"DETAIL:  Key (card)=(4111 1111) is duplicated.",
				`CONTEXT:  COPY t, line 1, column card: "4111 1111"`,
			},
			`pg_restore: error: COPY failed for table "t": ERROR: invalid input syntax for type integer`,
		},
		{
			[]string{`pg_restore: error: COPY failed for table "cards": ERROR:  value "4111111111111111" is out of range for type integer`},
			`pg_restore: error: COPY failed for table "cards": ERROR: a value is out of range for type integer`,
		},
		{
			[]string{`pg_restore: error: COPY failed for table "people": ERROR:  date/time field value out of range: "4111-13-45"`},
			`pg_restore: error: COPY failed for table "people": ERROR: date/time field value out of range`,
		},
		{
			[]string{"pg_restore: error: could not execute query: ERROR:  bad customer Smith, card 4111", "born in 4111: error: twice"},
			"pg_restore: error: could not execute query: ERROR: an error of the server, whose words are in the log of this host",
		},
		{
			[]string{"NOTICE:  customer Smith, card 4111", "ERROR: card 4111", "pg_restore: error: could not execute query: FEHLER:  Karte 4111"},
			"ERROR: an error of the server, whose words are in the log of this host",
		},
		{
			[]string{"pg_restore: error: could not execute query: FEHLER:  Karte 4111"},
			"pg_restore: error: could not execute query: FEHLER: an error of the server, whose words are in the log of this host",
		},
		{
			[]string{`pg_dump: error: query failed: ERROR:  invalid input value for enum mood: "4111"`},
			"pg_dump: error: query failed: ERROR: invalid input value for enum mood",
		},
		{
			[]string{`pg_restore: error: COPY failed for table "t": ERROR:  invalid byte sequence for encoding "UTF8": 0x34 0x4111`},
			`pg_restore: error: COPY failed for table "t": ERROR: invalid byte sequence for encoding "UTF8"`,
		},
		{
			[]string{`pg_restore: error: COPY failed for table "t": ERROR:  value too long for type character varying(5)`},
			`pg_restore: error: COPY failed for table "t": ERROR: value too long for type character varying(5)`,
		},
		{
			[]string{`pg_restore: error: could not execute query: ERROR:  could not parse JSON-like "4111" here`},
			"pg_restore: error: could not execute query: ERROR: an error of the server, whose words are in the log of this host",
		},
		{
			[]string{`pg_restore: error: could not execute query: ERROR:  insert or update on table "orders" violates foreign key constraint "orders_customer_fkey"`},
			`pg_restore: error: could not execute query: ERROR: insert or update on table "orders" violates foreign key constraint "orders_customer_fkey"`,
		},
		{
			[]string{`pg_dump: error: connection to server on socket "/run/x" failed: FATAL:  role "guest" does not exist`},
			`pg_dump: error: connection to server on socket "/run/x" failed: FATAL: role "guest" does not exist`,
		},
		{
			[]string{
				`pg_dump: error: Dumping the contents of table "t" failed: PQgetResult() failed.`,
				"pg_dump: detail: Error message from server: ERROR:  permission denied for table t",
				"pg_dump: detail: Command was: COPY public.t (card) TO stdout;",
			},
			`pg_dump: error: Dumping the contents of table "t" failed: PQgetResult() failed. pg_dump: detail: Error message from server: ERROR: permission denied for table t`,
		},
		{[]string{"", "pg_dump: cannot execute: strange"}, "pg_dump: cannot execute: strange"},
		{[]string{"cannot execute: strange 4111"}, ""},
		{[]string{"pg_dump: error: " + strings.Repeat("x", 1000)}, "pg_dump: error: " + strings.Repeat("x", 284) + " …"},
		{nil, ""},
	} {
		if got := cluster.Summary(tt.lines...); strings.Contains(got, "4111") || got != tt.want && !strings.Contains(tt.want, "detail") {
			t.Errorf("summary = %q, want %q", got, tt.want)
		}
	}
}

// dumpForEver is the process that a test kills.
func dumpForEver(path string) {
	ctx := context.Background()
	lock, err := cluster.TakeLock(ctx, path)
	if err == nil {
		c := cluster.Cluster{Conninfo: os.Getenv("CLUSTER_TEST_CONNINFO")}
		err = c.Dump(ctx, cluster.DumpOptions{
			Tools: cluster.Tools{Dir: os.Getenv("CLUSTER_TEST_BIN")}, Database: "postgres", Dir: filepath.Join(filepath.Dir(path), "dump"), Jobs: 2, Lock: lock,
		})
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// copying finds a server process that sends a table to pg_dump.
func copying(t *testing.T, p *lab.Postgres) int {
	t.Helper()
	return number(t, p, `SELECT coalesce(min(pid), 0) FROM pg_stat_activity
		WHERE application_name LIKE 'pgkeep %' AND query LIKE 'COPY%' AND state = 'active'`)
}

func TestNothingOutlivesAKilledWorker(t *testing.T) {
	p, _ := start(t, lab.PostgresOptions{})
	big(t, p)
	// worker starts a process that dumps, and returns when it has come so far.
	worker := func(t *testing.T, lock string, until func() bool) *osexec.Cmd {
		t.Helper()
		cmd := osexec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "CLUSTER_TEST_DUMP_WITH_LOCK="+lock, "CLUSTER_TEST_CONNINFO="+p.Conninfo(), "CLUSTER_TEST_BIN="+p.BinDir)
		var said bytes.Buffer
		cmd.Stderr = &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
		eventually(t, "the dump has come so far", until)
		return cmd
	}
	t.Run("while tables are read", func(t *testing.T) {
		dir := t.TempDir()
		lock := filepath.Join(dir, "lock")
		// A server process that stops keeps its pg_dump waiting in the middle of a table.
		var backend int
		cmd := worker(t, lock, func() bool { backend = copying(t, p); return backend != 0 })
		if err := syscall.Kill(backend, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		defer syscall.Kill(backend, syscall.SIGCONT)
		if len(processes(dir)) == 0 {
			t.Fatal("no pg_dump to kill")
		}
		cmd.Process.Kill()
		cmd.Wait()
		eventually(t, "no pg_dump is left", func() bool { return len(processes(dir)) == 0 })
		f, err := cluster.TakeLock(t.Context(), lock)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	})
	t.Run("and pg_dump's own leader is killed too", func(t *testing.T) {
		// Its workers wait for the server and hear of nothing: only the lock tells.
		dir := t.TempDir()
		lock := filepath.Join(dir, "lock")
		var backend int
		cmd := worker(t, lock, func() bool { backend = copying(t, p); return backend != 0 })
		if err := syscall.Kill(backend, syscall.SIGSTOP); err != nil {
			t.Fatal(err)
		}
		defer syscall.Kill(backend, syscall.SIGCONT)
		cmd.Process.Signal(syscall.SIGSTOP)
		syscall.Kill(slices.Min(processes(dir)), syscall.SIGKILL)
		cmd.Process.Kill()
		cmd.Wait()
		if len(processes(dir)) == 0 {
			t.Fatal("no pg_dump is left; this proves nothing")
		}
		f, err := cluster.TakeLock(t.Context(), lock)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if pids := processes(dir); len(pids) > 0 {
			t.Errorf("the lock is free, and processes %v are left", pids)
		}
	})
	t.Run("while a table is locked", func(t *testing.T) {
		dir := t.TempDir()
		lock := filepath.Join(dir, "lock")
		locked(t, p, "big1")
		cmd := worker(t, lock, func() bool { return number(t, p, "SELECT count(*) FROM pg_locks WHERE NOT granted") > 0 })
		cmd.Process.Kill()
		cmd.Wait()
		eventually(t, "no pg_dump is left", func() bool { return len(processes(dir)) == 0 })
		f, err := cluster.TakeLock(t.Context(), lock)
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	})
}

func TestTakeLockWaitsForWhoeverHoldsIt(t *testing.T) {
	path := filepath.Join(t.TempDir(), "lock")
	first, err := cluster.TakeLock(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if f, err := cluster.TakeLock(ctx, path); !errors.Is(err, context.DeadlineExceeded) {
		f.Close()
		t.Fatalf("a lock that is held was given again: %v", err)
	}
	// The number of a group that has nothing to do with the lock: us.
	if _, err := first.WriteAt([]byte(strconv.Itoa(syscall.Getpgrp())+"\n"), 0); err != nil {
		t.Fatal(err)
	}
	second := make(chan error)
	go func() {
		f, err := cluster.TakeLock(t.Context(), path)
		if err == nil {
			err = f.Close()
		}
		second <- err
	}()
	first.Close()
	if err := <-second; err != nil {
		t.Error(err)
	}
}
