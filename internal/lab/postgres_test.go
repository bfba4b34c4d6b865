package lab_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
)

func TestPostgresKeepsCommittedRowsWhenKilled(t *testing.T) {
	ctx := t.Context()
	p := lab.PostgresForTest(t, lab.PostgresOptions{WALSegmentMB: 1})
	if err := p.Exec(ctx, "postgres", "CREATE TABLE t AS SELECT generate_series(1, 1000) AS n"); err != nil {
		t.Fatal(err)
	}
	p.Kill()
	if _, err := p.Connect(ctx, "postgres"); err == nil {
		t.Fatal("a killed server takes connections")
	}
	if err := p.Restart(ctx, map[string]string{"wal_level": "logical"}); err != nil {
		t.Fatal(err)
	}
	conn, err := p.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var rows int
	var level, size string
	err = conn.QueryRow(ctx, "SELECT count(*), current_setting('wal_level'), current_setting('wal_segment_size') FROM t").Scan(&rows, &level, &size)
	if err != nil || rows != 1000 || level != "logical" || size != "1MB" {
		t.Errorf("after a kill: %d rows, wal_level %s, segments of %s, %v; want 1000, logical, 1MB", rows, level, size, err)
	}
}

func TestPostgresPasswordIsAskedOnLoopback(t *testing.T) {
	ctx := t.Context()
	p := lab.PostgresForTest(t, lab.PostgresOptions{Password: "open sesame"})
	if _, err := lab.Fingerprint(ctx, p.TCPConninfo()+" dbname=postgres password=wrong"); err == nil {
		t.Error("the server took a wrong password")
	}
	if _, err := lab.Fingerprint(ctx, p.TCPConninfo()+" dbname=postgres password='open sesame'"); err != nil {
		t.Error(err)
	}
}

func TestFingerprintTellsContentsApart(t *testing.T) {
	ctx := t.Context()
	p := lab.PostgresForTest(t, lab.PostgresOptions{})
	exec := func(database string, sql ...string) {
		t.Helper()
		if err := p.Exec(ctx, database, sql...); err != nil {
			t.Fatal(err)
		}
	}
	sums := func(database string) map[string]lab.TableSum {
		t.Helper()
		m, err := lab.Fingerprint(ctx, p.Conninfo()+" dbname="+database)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	exec("postgres", "CREATE DATABASE a", "CREATE DATABASE b")
	schema := []string{
		`CREATE TABLE "T x"(a int, b text, c float8, d timestamptz)`,
		"CREATE TABLE parted(n int) PARTITION BY RANGE (n)",
		"CREATE TABLE part1 PARTITION OF parted FOR VALUES FROM (0) TO (10)",
		"CREATE SEQUENCE s",
	}
	exec("a", schema...)
	exec("b", schema...)
	exec("a", `INSERT INTO "T x" VALUES (1, 'x', 0.1, 'epoch'), (2, NULL, 'NaN', 'infinity')`, "INSERT INTO parted VALUES (3)", "SELECT lo_from_bytea(77, 'abc')")
	exec("b", `INSERT INTO "T x" VALUES (2, NULL, 'NaN', 'infinity'), (1, 'x', 0.1, 'epoch')`, "INSERT INTO parted VALUES (3)", "SELECT lo_from_bytea(77, 'abc')")
	if diff := cmp.Diff(sums("a"), sums("b")); diff != "" {
		t.Errorf("the same rows in another order differ:\n%s", diff)
	}
	for _, change := range []string{
		`UPDATE "T x" SET b = '' WHERE a = 2`,
		`INSERT INTO "T x" SELECT * FROM "T x" WHERE a = 1`,
		"SELECT nextval('s')",
		"SELECT lo_put(77, 1, 'X')",
		"CREATE TABLE more()",
	} {
		before := sums("b")
		exec("b", change)
		if cmp.Equal(before, sums("b")) {
			t.Errorf("%s does not show", change)
		}
	}
}

func TestStartPostgresSaysWhatIsWrong(t *testing.T) {
	_, err := lab.StartPostgres(t.Context(), lab.PostgresOptions{Settings: map[string]string{"shared_buffers": "many"}})
	if err == nil {
		t.Fatal("a server with nonsense for settings started")
	}
	if !strings.Contains(err.Error(), "shared_buffers") {
		t.Errorf("the error does not name the setting: %v", err)
	}
}

func TestPostgresRunsEveryVersion(t *testing.T) {
	for major := 14; major <= 18; major++ {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			ctx := t.Context()
			p := lab.PostgresForTest(t, lab.PostgresOptions{Version: major})
			conn, err := p.Connect(ctx, "postgres")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close(ctx)
			var version int
			if err := conn.QueryRow(ctx, "SELECT current_setting('server_version_num')::int / 10000").Scan(&version); err != nil || version != major {
				t.Errorf("version %d, %v; want %d", version, err, major)
			}
			if err := p.Exec(ctx, "postgres", "CREATE EXTENSION amcheck", "SELECT bt_index_check('pg_class_oid_index')"); err != nil {
				t.Error(err)
			}
			other := lab.PostgresForTest(t, lab.PostgresOptions{Version: major})
			one, two := systemID(t, p), systemID(t, other)
			if one == two {
				t.Errorf("two clusters have the system identifier %v", one)
			}
		})
	}
}

// systemID asks all who know it.
func systemID(t *testing.T, p *lab.Postgres) pg.SystemID {
	t.Helper()
	ctx := t.Context()
	conn, err := p.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var id string
	err = conn.QueryRow(ctx, "SELECT system_identifier::text FROM pg_control_system()").Scan(&id)
	if err != nil {
		t.Fatal(err)
	}
	said, err := pg.ParseSystemID(id)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(p.DataDir, "global", "pg_control"))
	if err != nil {
		t.Fatal(err)
	}
	if control, err := pg.ParseControl(b); err != nil || control.System != said {
		t.Errorf("the server says it is %v, pg_control %v, %v", said, control.System, err)
	}
	segments, err := filepath.Glob(filepath.Join(p.DataDir, "pg_wal", "0000*"))
	if err != nil || len(segments) == 0 {
		t.Fatalf("WAL files: %q, %v", segments, err)
	}
	for _, path := range segments {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if header, err := pg.ParsePageHeader(b[:min(len(b), pg.PageHeaderSize)]); err != nil || header.System != said {
			t.Errorf("the server says it is %v, %s %v, %v", said, path, header.System, err)
		}
	}
	return said
}
