package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
)

const canary = "c4n4ry pass'word"

func TestMain(m *testing.M) {
	if lock := os.Getenv("CLUSTER_TEST_DUMP_WITH_LOCK"); lock != "" {
		dumpForEver(lock)
	}
	os.Exit(m.Run())
}

func start(t *testing.T, opt lab.PostgresOptions) (*lab.Postgres, cluster.Cluster) {
	t.Helper()
	p := lab.PostgresForTest(t, opt)
	return p, cluster.Cluster{Conninfo: p.Conninfo(), BinDir: p.BinDir}
}

// as is the cluster as seen by another role.
func as(c cluster.Cluster, role string) cluster.Cluster {
	c.Conninfo = strings.Replace(c.Conninfo, "user=postgres", "user='"+role+"'", 1)
	return c
}

func exec(t *testing.T, p *lab.Postgres, database string, sql ...string) {
	t.Helper()
	if err := p.Exec(t.Context(), database, sql...); err != nil {
		t.Fatal(err)
	}
}

func tools(t *testing.T, c cluster.Cluster) cluster.Tools {
	t.Helper()
	f, err := c.Facts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tools, err := c.Tools(t.Context(), f.Version)
	if err != nil {
		t.Fatal(err)
	}
	return tools
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); {
		if time.Now().After(deadline) {
			t.Fatalf("not within 20 s: %s", what)
		}
		<-time.After(10 * time.Millisecond)
	}
}

func TestConninfoIsReadAsLibpqReadsIt(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"", ""},
		{"host=/tmp user = me\tport= 1", `host='/tmp' user='me' port='1'`},
		{`host='a b' user='it\'s' dbname=back\\slash\ x`, `host='a b' user='it\'s' dbname='back\\slash x'`},
		{`user='' password=secret host=h`, `user='' host='h'`},
		{"postgres://me:secret@db.example:6543/sales?sslmode=verify-full&sslrootcert=/ca.pem",
			`dbname='sales' host='db.example' port='6543' sslmode='verify-full' sslrootcert='/ca.pem' user='me'`},
		{"postgresql:///a%20b?host=/run/postgresql", `dbname='a b' host='/run/postgresql'`},
		{"postgresql://[::1]:5/x", `dbname='x' host='::1' port='5'`},
		{"postgresql://h1:5,h2:6/x", `dbname='x' host='h1,h2' port='5,6'`},
		{"host=h application_name=x client_encoding=latin1 keepalives_idle=5", `host='h' keepalives_idle='5'`},
	} {
		if got := (cluster.Cluster{Conninfo: tt.in}).String(); got != tt.want {
			t.Errorf("%s is read as\n%s, want\n%s", tt.in, got, tt.want)
		}
	}
}

func TestConninfoThatDoesNotParseIsNotQuoted(t *testing.T) {
	for _, in := range []string{
		"password=s3cret s3cret host=h",
		"password='s3cret host=h",
		"password=x s3cret=1",
		"s3cret",
		"postgres://me:s3cret%zz@h/x",
		"postgres://me@h:s3cret/x",
		"postgres://me:x@h/db?password=a&s3cret=1",
		"host=h port=s3cret",
		"host=h hostaddr=1.2.3.4 password=s3cret",
		"sslpassword=s3cret",
		"host=h sslmode=verify-full sslrootcert=/nowhere password=s3cret",
	} {
		c := cluster.Cluster{Conninfo: in}
		_, err := c.Connect(t.Context(), "")
		if !errors.Is(err, fail.BadConfig) {
			t.Errorf("%s: got %v, want %v", in, err, fail.BadConfig)
		}
		if in == "host=h port=s3cret" || in == "postgres://me@h:s3cret/x" {
			continue // that is no place for a password
		}
		for _, shown := range []string{fmt.Sprint(err), fail.HintOf(err), fmt.Sprintf("%v %+v %#v %s", c, c, c, c)} {
			if strings.Contains(shown, "s3cret") {
				t.Errorf("%s shows itself: %s", in, shown)
			}
		}
	}
}

func TestConnectSaysWhatStandsInTheWay(t *testing.T) {
	p := lab.PostgresForTest(t, lab.PostgresOptions{Password: canary})
	good := cluster.Cluster{Conninfo: p.TCPConninfo(), Password: canary}
	if conn, err := good.Connect(t.Context(), ""); err != nil {
		t.Error(err)
	} else {
		conn.Close(t.Context())
	}
	nobody, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	nobody.Close()
	port := nobody.Addr().(*net.TCPAddr).Port
	for _, tt := range []struct {
		name, database string
		c              cluster.Cluster
		want           fail.Kind
	}{
		{"refused", "", cluster.Cluster{Conninfo: fmt.Sprintf("host=127.0.0.1 port=%d user=postgres", port), Password: canary}, fail.PGDown},
		{"no socket", "", cluster.Cluster{Conninfo: "host=/nowhere user=postgres password='" + strings.ReplaceAll(canary, "'", `\'`) + "'"}, fail.PGDown},
		{"no such host", "", cluster.Cluster{Conninfo: "host=nowhere.invalid user=postgres", Password: canary}, fail.PGDown},
		{"wrong password", "", cluster.Cluster{Conninfo: p.TCPConninfo(), Password: canary + "x"}, fail.PGDenied},
		{"no password", "", cluster.Cluster{Conninfo: p.TCPConninfo()}, fail.PGDenied},
		{"no such role", "", cluster.Cluster{Conninfo: p.Conninfo() + " user=nobody", Password: canary}, fail.PGDenied},
		{"no such database", "nowhere", good, fail.BadConfig},
		{"TLS wanted, not offered", "", cluster.Cluster{Conninfo: p.TCPConninfo() + " sslmode=require", Password: canary}, fail.PGDown},
	} {
		conn, err := tt.c.Connect(t.Context(), tt.database)
		if err == nil {
			conn.Close(t.Context())
		}
		if got := fail.KindOf(err); err == nil || got != tt.want {
			t.Errorf("%s: got kind %q (%v), want %q", tt.name, got, err, tt.want)
		}
		if err != nil && (strings.Contains(err.Error(), canary) || strings.Contains(err.Error(), "\n")) {
			t.Errorf("%s: %q shows the password, or has several lines", tt.name, err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := good.Connect(ctx, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: got %v", err)
	}
}

func TestSessionsOutliveTheTimeoutsOfTheirRole(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{})
	exec(t, p, "postgres",
		"ALTER ROLE postgres SET statement_timeout = 1000", "ALTER ROLE postgres SET lock_timeout = 1000",
		"ALTER ROLE postgres SET idle_in_transaction_session_timeout = 1000", "ALTER ROLE postgres SET idle_session_timeout = 1000",
		"ALTER ROLE postgres SET search_path = public, pg_catalog", "ALTER ROLE postgres SET client_encoding = latin1")
	conn, err := c.Connect(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	rows, err := conn.Query(t.Context(), `SELECT name || '=' || setting FROM pg_settings WHERE name IN ('statement_timeout', 'lock_timeout',
		'idle_in_transaction_session_timeout', 'idle_session_timeout', 'search_path', 'client_encoding', 'application_name') ORDER BY name`)
	if err != nil {
		t.Fatal(err)
	}
	got, err := pgx.CollectRows(rows, pgx.RowTo[string])
	want := []string{"application_name=pgkeep", "client_encoding=UTF8", "idle_in_transaction_session_timeout=0", "idle_session_timeout=0",
		"lock_timeout=0", "search_path=pg_catalog", "statement_timeout=0"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("settings = %v, %v, want %v", got, err, want)
	}
}

func TestFactsAreTheServersOwn(t *testing.T) {
	ctx := t.Context()
	p, c := start(t, lab.PostgresOptions{WALSegmentMB: 1, Settings: map[string]string{
		"wal_level": "logical", "archive_mode": "on", "archive_command": "true",
	}})
	exec(t, p, "postgres", "CREATE ROLE owner", `CREATE DATABASE "it's = [odd]" OWNER owner`, "CREATE ROLE guest LOGIN",
		`REVOKE CONNECT ON DATABASE "it's = [odd]" FROM PUBLIC`,
		"CREATE DATABASE icu TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de' ALLOW_CONNECTIONS false CONNECTION LIMIT 7")
	f, err := c.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	out, err := p.Command(ctx, "pg_controldata", p.DataDir).Output()
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf("Database system identifier:           %v\n", f.System); !strings.Contains(string(out), want) {
		t.Errorf("system identifier = %v; pg_controldata says\n%s", f.System, out)
	}
	if f.Timeline != 1 || f.Version.Major() < 13 || f.InRecovery || f.WALLevel != "logical" || f.ArchiveMode != "on" ||
		!f.ArchiveCommandSet || !f.Archiving() || f.SegmentSize != 1<<20 || !f.DataChecksums || f.DataDirectory != p.DataDir {
		t.Errorf("facts = %+v", f)
	}
	find := func(f cluster.Facts, name string) cluster.Database {
		i := slices.IndexFunc(f.Databases, func(d cluster.Database) bool { return d.Name == name })
		if i < 0 {
			t.Fatalf("no database %q in %+v", name, f.Databases)
		}
		return f.Databases[i]
	}
	odd, icu := find(f, "it's = [odd]"), find(f, "icu")
	if odd.Owner != "owner" || odd.Bytes < 1<<20 || odd.Encoding != "UTF8" || odd.Collate != "C.UTF-8" || odd.Provider != cluster.Libc || !odd.Dumpable() || odd.ConnLimit != -1 {
		t.Errorf("database = %+v", odd)
	}
	if icu.Provider != cluster.ICU || icu.Locale != "de" || icu.Dumpable() || icu.ConnLimit != 7 {
		t.Errorf("database = %+v", icu)
	}
	if find(f, "template1").Dumpable() {
		t.Error("a template is dumped")
	}

	f, err = as(c, "guest").Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if f.DataDirectory != "" || find(f, "it's = [odd]").Bytes != -1 || find(f, "postgres").Bytes <= 0 {
		t.Errorf("a role with no rights sees %+v", f)
	}
}

func TestToolsAreNeverOlderThanTheServer(t *testing.T) {
	fake := func(versions ...string) string {
		dir := t.TempDir()
		for i, name := range []string{"pg_dump", "pg_dumpall", "pg_restore"}[:len(versions)] {
			script := fmt.Sprintf("#!/bin/sh\necho '%s (PostgreSQL) %s'\n", name, versions[i])
			if err := os.WriteFile(filepath.Join(dir, name), []byte(script), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	for _, tt := range []struct {
		name string
		dir  string
		want string // of the tools; "": refused
	}{
		{"same", fake("15.18 (Debian 15.18-0+deb12u1)", "15.18", "15.18"), "15.18"},
		{"newer", fake("16.1", "16.1", "16.1"), "16.1"},
		{"older minor", fake("15.1", "15.1", "15.1"), "15.1"},
		{"not yet released", fake("19beta1", "19beta1", "19beta1"), "19.0"},
		{"older", fake("14.9", "14.9", "14.9"), ""},
		{"mixed", fake("15.18", "15.18", "14.9"), ""},
		{"one missing", fake("15.18", "15.18"), ""},
		{"none", t.TempDir(), ""},
		{"nonsense", fake("x", "x", "x"), ""},
	} {
		got, err := cluster.Cluster{BinDir: tt.dir}.Tools(t.Context(), 150018)
		if tt.want != "" {
			if err != nil || got.Version.String() != tt.want || got.Dir != tt.dir {
				t.Errorf("%s: got %+v, %v, want %s", tt.name, got, err, tt.want)
			}
			continue
		}
		if !errors.Is(err, fail.PGVersion) || !strings.Contains(fail.HintOf(err), "postgresql-client-15") {
			t.Errorf("%s: got %+v, %v (hint %q), want %v and the package to install", tt.name, got, err, fail.HintOf(err), fail.PGVersion)
		}
	}
	t.Setenv("PATH", fake("99.0", "99.0", "99.0"))
	if got, err := (cluster.Cluster{}).Tools(t.Context(), 990000); err != nil || got.Version.Major() != 99 {
		t.Errorf("in PATH: got %+v, %v", got, err)
	}
	if got, err := (cluster.Cluster{}).Tools(t.Context(), 150018); err != nil || got.Version.Major() == 99 {
		t.Errorf("the server's own version comes before PATH: got %+v, %v", got, err)
	}
}
