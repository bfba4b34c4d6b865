package cluster_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
)

func TestListTOCNeedsTheTableOfContentsAlone(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{})
	exec(t, p, "postgres", "CREATE TABLE a()", `CREATE TABLE "b
; 1 TABLE DATA c"()`)
	tools := tools(t, c)
	dir := filepath.Join(t.TempDir(), "dump")
	if err := c.Dump(t.Context(), cluster.DumpOptions{Tools: tools, Database: "postgres", Dir: dir}); err != nil {
		t.Fatal(err)
	}
	toc, err := os.ReadFile(filepath.Join(dir, "toc.dat"))
	if err != nil {
		t.Fatal(err)
	}
	alone := func(content []byte) string {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "toc.dat"), content, 0o600); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	got, err := cluster.ListTOC(t.Context(), tools, alone(toc))
	if err != nil || got.Tables != 2 || got.Entries < 4 || got.Server.Major() != tools.Version.Major() {
		t.Errorf("got %+v, %v, want 2 tables", got, err)
	}
	for name, dir := range map[string]string{
		"nothing":   t.TempDir(),
		"truncated": alone(toc[:len(toc)/2]),
		"empty":     alone(nil),
		"nonsense":  alone([]byte("PGDMP is not all")),
	} {
		if got, err := cluster.ListTOC(t.Context(), tools, dir); !errors.Is(err, fail.Corrupt) {
			t.Errorf("%s: got %+v, %v, want %v", name, got, err, fail.Corrupt)
		}
	}
	if _, err := cluster.ListTOC(t.Context(), cluster.Tools{Dir: t.TempDir()}, dir); err == nil || errors.Is(err, fail.Corrupt) {
		t.Errorf("without pg_restore: got %v, want an error that blames no dump", err)
	}
}

func TestRestoreSaysWhyItFailed(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{})
	tools := tools(t, c)
	exec(t, p, "postgres", "CREATE ROLE clerk", "CREATE TABLE t(n int)", "INSERT INTO t VALUES (1)", "ALTER TABLE t OWNER TO clerk",
		"CREATE TABLE z()", "CREATE DATABASE half TEMPLATE template0")
	exec(t, p, "half", "CREATE TABLE t(n int)")
	dir := filepath.Join(t.TempDir(), "dump")
	if err := c.Dump(t.Context(), cluster.DumpOptions{Tools: tools, Database: "postgres", Dir: dir}); err != nil {
		t.Fatal(err)
	}
	err := c.Restore(t.Context(), cluster.RestoreOptions{Tools: tools, Dir: dir, Database: "half"})
	if !errors.Is(err, fail.RestoreFailed) || !strings.Contains(err.Error(), `relation "t" already exists`) {
		t.Errorf("into a full database: got %v, want %v", err, fail.RestoreFailed)
	}
	if _, ok := fingerprint(t, p, "half")["public.z"]; ok {
		t.Error("it went on after the first error")
	}
	err = c.Restore(t.Context(), cluster.RestoreOptions{Tools: tools, Dir: dir, Database: "nowhere"})
	if !errors.Is(err, fail.BadConfig) {
		t.Errorf("into no database: got %v, want %v", err, fail.BadConfig)
	}
	exec(t, p, "postgres", "DROP OWNED BY clerk", "DROP ROLE clerk", "CREATE DATABASE back")
	err = c.Restore(t.Context(), cluster.RestoreOptions{Tools: tools, Dir: dir, Database: "back"})
	if !errors.Is(err, fail.RestoreFailed) || !strings.Contains(err.Error(), "clerk") {
		t.Errorf("without the owner: got %v, want %v", err, fail.RestoreFailed)
	}
	exec(t, p, "postgres", "DROP DATABASE back", "CREATE DATABASE back")
	if err := c.Restore(t.Context(), cluster.RestoreOptions{Tools: tools, Dir: dir, Database: "back", NoOwner: true}); err != nil {
		t.Errorf("without owners: %v", err)
	}
}

func TestMissingRolesAreAllThatTheDumpNames(t *testing.T) {
	ctx := t.Context()
	p, c := start(t, lab.PostgresOptions{})
	tools := tools(t, c)
	exec(t, p, "postgres", `CREATE ROLE "the ""owner"`, "CREATE ROLE reader", `CREATE ROLE "granted, too"`, "CREATE ROLE policied", "CREATE ROLE mapped", "CREATE ROLE by_default", "CREATE ROLE later",
		"CREATE DATABASE d")
	exec(t, p, "d",
		"CREATE TABLE t(a int)", `ALTER TABLE t OWNER TO "the ""owner"`, "GRANT SELECT ON t TO reader WITH GRANT OPTION", `GRANT UPDATE(a) ON t TO "granted, too"`,
		"SET ROLE reader; GRANT SELECT ON t TO PUBLIC; RESET ROLE",
		`CREATE FUNCTION f() RETURNS text LANGUAGE sql AS $$ SELECT '; GRANT ALL ON t TO nobody;' $$`,
		"CREATE POLICY p ON t TO policied USING (a IN (SELECT 1 FROM pg_class))",
		"CREATE FOREIGN DATA WRAPPER w", "CREATE SERVER s FOREIGN DATA WRAPPER w", `CREATE USER MAPPING FOR mapped SERVER s OPTIONS ("user" '; GRANT x TO nobody')`,
		"ALTER DEFAULT PRIVILEGES FOR ROLE by_default GRANT SELECT ON TABLES TO later")
	dir := filepath.Join(t.TempDir(), "dump")
	if err := c.Dump(ctx, cluster.DumpOptions{Tools: tools, Database: "d", Dir: dir}); err != nil {
		t.Fatal(err)
	}
	toc, err := cluster.ListTOC(ctx, tools, dir)
	if err != nil {
		t.Fatal(err)
	}
	_, other := start(t, lab.PostgresOptions{})
	for _, tt := range []struct {
		name string
		c    cluster.Cluster
		opt  cluster.RestoreOptions
		want []string
	}{
		{"where they are", c, cluster.RestoreOptions{}, nil},
		// by_default owns its default privileges; an owner's name is known by its last word
		{"elsewhere", other, cluster.RestoreOptions{}, []string{`"owner`, "by_default", "granted, too", "later", "mapped", "policied", "reader"}},
		{"without owners", other, cluster.RestoreOptions{NoOwner: true}, []string{"by_default", "granted, too", "later", "mapped", "policied", "reader"}},
		{"without privileges", other, cluster.RestoreOptions{NoOwner: true, NoPrivileges: true}, []string{"mapped", "policied"}},
	} {
		tt.opt.Tools, tt.opt.Dir = tools, dir
		got, err := tt.c.MissingRoles(ctx, toc, tt.opt)
		if err != nil {
			t.Errorf("%s: %v", tt.name, err)
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: missing roles (-want +got):\n%s", tt.name, diff)
		}
	}
}

func TestRolesIn(t *testing.T) {
	got := cluster.RolesIn(`
\restrict abc
SET search_path TO nobody; -- GRANT x TO nobody;
GRANT SELECT ON TABLE public."to" TO a, "B ""c", PUBLIC WITH GRANT OPTION;
REVOKE ALL ON FUNCTION public.f("from" integer) FROM d;
CREATE FUNCTION f() RETURNS void LANGUAGE sql AS $x$; GRANT a TO nobody; $x$;
COMMENT ON TABLE t IS 'GRANT a TO nobody; it''s';
COMMENT ON TABLE t IS E'it\'s; GRANT a TO nobody;';
SET SESSION AUTHORIZATION "e";
CREATE POLICY p ON t AS RESTRICTIVE FOR SELECT TO f1,f2 USING (EXISTS (SELECT 1 FROM nobody));
CREATE POLICY q ON t USING (a IN (SELECT x FROM nobody));
CREATE USER MAPPING FOR g SERVER s;
ALTER DEFAULT PRIVILEGES FOR ROLE h IN SCHEMA public REVOKE ALL ON TABLES FROM i;
GRANT unfinished TO nobody`)
	want := []string{`B "c`, "a", "d", "e", "f1", "f2", "g", "h", "i"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("roles (-want +got):\n%s", diff)
	}
}

func FuzzRolesIn(f *testing.F) {
	f.Add("GRANT SELECT ON TABLE t TO a, \"B\"\"c\"; $x$ 'it''s' E'\\'' \\restrict")
	f.Fuzz(func(t *testing.T, sql string) {
		if roles := cluster.RolesIn(sql); !slices.IsSorted(roles) {
			t.Errorf("RolesIn(%q) = %q, not in order", sql, roles)
		}
	})
}

func TestCreatedDatabaseIsLikeTheOther(t *testing.T) {
	ctx := t.Context()
	p, c := start(t, lab.PostgresOptions{})
	exec(t, p, "postgres", `CREATE ROLE "o'wner"`,
		`CREATE DATABASE "the ""first""" TEMPLATE template0 OWNER "o'wner" ENCODING 'SQL_ASCII' LC_COLLATE 'C' LC_CTYPE 'POSIX'`,
		"CREATE DATABASE german TEMPLATE template0 LOCALE_PROVIDER icu ICU_LOCALE 'de-u-co-phonebk'")
	find := func(name string) cluster.Database {
		t.Helper()
		f, err := c.Facts(ctx)
		if err != nil {
			t.Fatal(err)
		}
		i := slices.IndexFunc(f.Databases, func(d cluster.Database) bool { return d.Name == name })
		if i < 0 {
			t.Fatalf("there is no database %q", name)
		}
		d := f.Databases[i]
		d.Name, d.OID, d.Bytes = "", 0, 0
		return d
	}
	for i, name := range []string{`the "first"`, "german"} {
		like := find(name)
		back := []string{`it's "back"; --`, "back2"}[i]
		if err := c.CreateDatabase(ctx, back, like); err != nil {
			t.Error(err)
			continue
		}
		if diff := cmp.Diff(like, find(back)); diff != "" {
			t.Errorf("a database like %q differs (-want +got):\n%s", name, diff)
		}
		if err := c.CreateDatabase(ctx, back, like); !errors.Is(err, fail.NotEmpty) {
			t.Errorf("a second time: got %v, want %v", err, fail.NotEmpty)
		}
	}
	if err := c.CreateDatabase(ctx, "free", cluster.Database{Owner: "nobody"}); err != nil {
		t.Errorf("an owner that there is not here: %v", err)
	}
	err := c.CreateDatabase(ctx, "x", cluster.Database{Encoding: "UTF8", Collate: "xx_XX", CType: "xx_XX"})
	if !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "locale") {
		t.Errorf("a locale that there is not here: got %v (hint %q), want %v", err, fail.HintOf(err), fail.BadConfig)
	}
	if err := c.CreateDatabase(ctx, "x", cluster.Database{Provider: "x"}); !errors.Is(err, fail.Unsupported) {
		t.Errorf("an unknown locale provider: got %v, want %v", err, fail.Unsupported)
	}
}

func TestEmptyMeansNothingOfAUsers(t *testing.T) {
	ctx := t.Context()
	p, c := start(t, lab.PostgresOptions{})
	for i, tt := range []struct {
		sql   string
		empty bool
	}{
		{"SELECT", true},
		{"CREATE EXTENSION hstore; CREATE EXTENSION earthdistance CASCADE; CREATE EXTENSION pg_stat_statements", true},
		{"CREATE TEMPORARY TABLE t(n int)", true},
		{"DROP SCHEMA public; CREATE SCHEMA public", true},
		{"CREATE TABLE t()", false},
		{"CREATE VIEW v AS SELECT 1", false},
		{"CREATE SEQUENCE s", false},
		{"CREATE SCHEMA other", false},
		{"CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'", false},
		{"CREATE TYPE e AS ENUM ('a')", false},
		{"CREATE TYPE e AS (a int)", false},
		{"CREATE DOMAIN e AS int", false},
		{"SELECT lo_create(0)", false},
		{"CREATE PUBLICATION x FOR ALL TABLES", false},
	} {
		name := fmt.Sprint("d", i)
		exec(t, p, "postgres", "CREATE DATABASE "+name)
		exec(t, p, name, tt.sql)
		got, err := c.IsEmpty(ctx, name)
		if err != nil || got != tt.empty {
			t.Errorf("after %s: empty = %v, %v, want %v", tt.sql, got, err, tt.empty)
		}
	}
	if _, err := c.IsEmpty(ctx, "nowhere"); !errors.Is(err, fail.BadConfig) {
		t.Errorf("a database that there is not: got %v, want %v", err, fail.BadConfig)
	}
}

func TestWALArchivedTellsWhatTheArchiverHasTaken(t *testing.T) {
	ctx := t.Context()
	p, c := start(t, lab.PostgresOptions{WALSegmentMB: 1})
	ask := func(at pg.LSN) cluster.Archived {
		t.Helper()
		a, err := c.WALArchived(ctx, at)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	if a := ask(1 << 20); a.State != cluster.ArchiveOff || a.Timeline != 1 {
		t.Errorf("without archiving: %+v", a)
	}
	archive := filepath.Join(p.DataDir, "..", "archive")
	if err := p.Restart(ctx, map[string]string{"archive_mode": "on", "archive_command": "mkdir -p " + archive + " && cp %p " + archive + "/%f"}); err != nil {
		t.Fatal(err)
	}
	s, err := c.OpenSnapshot(ctx, "postgres", cluster.SnapshotOptions{})
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
	if a := ask(s.LSN.After); a.State != cluster.ArchivePending {
		t.Errorf("before the file is full: %+v", a)
	}
	exec(t, p, "postgres", "CREATE TABLE t()", "SELECT pg_switch_wal()")
	var a cluster.Archived
	eventually(t, "the file is archived", func() bool { a = ask(s.LSN.After); return a.State == cluster.ArchiveDone })
	if _, err := os.Stat(filepath.Join(archive, a.Needed)); err != nil || a.Failing != "" {
		t.Errorf("%+v, but: %v", a, err)
	}

	if err := p.Restart(ctx, map[string]string{"archive_command": "false"}); err != nil {
		t.Fatal(err)
	}
	exec(t, p, "postgres", "CREATE TABLE t2()", "SELECT pg_switch_wal()")
	far := s.LSN.After + 16<<20
	eventually(t, "the archiver fails", func() bool { a = ask(far); return a.Failing != "" })
	if a.State != cluster.ArchivePending {
		t.Errorf("with a failing archive_command: %+v", a)
	}
}

func TestArchivedThrough(t *testing.T) {
	const needed = "000000020000000000000042"
	for last, want := range map[string]bool{
		"":                                         false,
		"000000020000000000000041":                 false,
		"000000020000000000000042":                 true,
		"000000020000000100000000":                 true,
		"000000030000000000000042":                 true,
		"000000010000000000000043":                 false, // the end of another history
		"00000003.history":                         false,
		"000000020000000000000042.00000028.backup": true,
		"000000020000000000000041.00000028.backup": false,
		"000000020000000000000042.partial":         false,
		"000000020000000000000043.partial":         true,
		"000000020000000000000000.partial":         false,
		"nonsense":                                 false,
	} {
		if got := cluster.ArchivedThrough(last, needed, 16<<20); got != want {
			t.Errorf("archived %q, needed %s: got %v, want %v", last, needed, got, want)
		}
	}
}
