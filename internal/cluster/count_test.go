package cluster_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// What a dump holds is counted as the snapshot has it, whatever the rows and the
// names look like. Partitions by hash, whose rows another server may put elsewhere,
// and unlogged tables, which a crash empties, are left out.
func TestTheRowsOfADumpAreCounted(t *testing.T) {
	ctx := t.Context()
	p, c := start(t, lab.PostgresOptions{})
	fill(t, p, "postgres")
	exec(t, p, "postgres", "CREATE TABLE empty (i int)", "CREATE TABLE nothing ()", "INSERT INTO nothing DEFAULT VALUES", "INSERT INTO nothing DEFAULT VALUES",
		`CREATE TABLE "TABLE DATA; 1" (t text)`, `INSERT INTO "TABLE DATA; 1" VALUES (E'a\nb\n\\.\n\n'), ('\.'), (NULL), ('')`,
		`CREATE TABLE "od d"."a.b" AS SELECT 1 AS i`, "CREATE TABLE big AS SELECT i, repeat('x', 1000) AS x FROM generate_series(1, 3000) i",
		"CREATE TABLE months (m int) PARTITION BY RANGE (m)", "CREATE TABLE months_1 PARTITION OF months FOR VALUES FROM (1) TO (2)", "INSERT INTO months VALUES (1), (1), (1)",
		"CREATE UNLOGGED TABLE unlogged AS SELECT 1 AS i")
	s, err := c.OpenSnapshot(ctx, "postgres", cluster.SnapshotOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	exec(t, p, "postgres", "DELETE FROM accounts WHERE id < 100", "CREATE TABLE too_late ()")
	dir := filepath.Join(t.TempDir(), "dump")
	if err := c.Dump(ctx, cluster.DumpOptions{Tools: tools(t, c), Database: "postgres", Snapshot: s.ID, Dir: dir}); err != nil {
		t.Fatal(err)
	}
	counted, err := cluster.CountDump(ctx, tools(t, c), s, dir, func() {})
	if err != nil {
		t.Fatal(err)
	}
	got := make(map[string]int64)
	for _, r := range counted {
		got[r.String()] = r.Rows
	}
	want := map[string]int64{"public.accounts": 20000, `"od d"."T'x"`: 1000, "public.hidden": 10, "public.empty": 0, "public.nothing": 2, `public."TABLE DATA; 1"`: 4,
		`"od d"."a.b"`: 1, "public.big": 3000, "public.months_1": 3}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("counted (-want +got):\n%s", diff)
	}
	data, _ := filepath.Glob(dir + "/*.dat")
	for _, name := range data {
		if info, err := os.Stat(name); err != nil || info.Size() < 100_000 {
			continue
		}
		if err := os.Truncate(name, 50_000); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := cluster.CountDump(ctx, tools(t, c), s, dir, func() {}); err == nil {
		t.Error("a dump that was cut was counted")
	}
}

// Rows are counted of the tables that are named and may be read; of others it is
// said what is missing.
func TestRowsAreCountedOfWhatMayBeRead(t *testing.T) {
	ctx := t.Context()
	p, c := start(t, lab.PostgresOptions{})
	exec(t, p, "postgres", "CREATE ROLE counter LOGIN", "CREATE DATABASE other")
	exec(t, p, "other", "CREATE TABLE elsewhere AS SELECT generate_series(1, 7) i", "GRANT SELECT ON elsewhere TO counter")
	exec(t, p, "postgres", "CREATE TABLE mine AS SELECT generate_series(1, 10) i", "GRANT SELECT ON mine TO counter",
		"CREATE TABLE private (i int)", "CREATE SCHEMA closed", "CREATE TABLE closed.door (i int)", "CREATE UNLOGGED TABLE gone (i int)", "CREATE MATERIALIZED VIEW seen AS SELECT 1 AS i",
		"CREATE TABLE hidden (i int)", "ALTER TABLE hidden ENABLE ROW LEVEL SECURITY", "GRANT SELECT ON hidden TO counter",
		"CREATE TABLE parent (i int)", "CREATE TABLE child () INHERITS (parent)", "INSERT INTO child VALUES (1)", "GRANT SELECT ON parent TO counter")
	patterns := func(texts ...string) (all []pg.TablePattern) {
		for _, text := range texts {
			p, err := pg.ParseTablePattern(text)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, p)
		}
		return all
	}
	counter := as(c, "counter")
	counted, missing, err := counter.CountRows(ctx, patterns("postgres.public.mine", "postgres.public.p*", "postgres.closed.*", "postgres.public.hidden", "postgres.public.gone", "*.public.elsewhere", "nowhere.x.y"))
	if err != nil {
		t.Fatal(err)
	}
	rows := make(map[string]int64)
	for _, c := range counted {
		if c.Role != "counter" || c.After == 0 {
			t.Errorf("%+v", c)
		}
		if _, err := pg.ParseSnapshot(c.Snapshot); err != nil {
			t.Error(err)
		}
		for _, r := range c.Tables {
			rows[c.Database+" "+r.String()] = r.Rows
		}
	}
	if diff := cmp.Diff(map[string]int64{"postgres public.mine": 10, "postgres public.parent": 0, "other public.elsewhere": 7}, rows); diff != "" {
		t.Errorf("counted (-want +got):\n%s", diff)
	}
	said := strings.Join(missing, "\n")
	for _, want := range []string{"public.private", "closed.door", `GRANT SELECT ON "public"."private" TO "counter";`, `GRANT USAGE ON SCHEMA "closed" TO "counter";`,
		"table public.hidden: query would be affected by row-level security", "postgres.public.gone: there is no such table", "nowhere.x.y: there is no such table"} {
		if !strings.Contains(said, want) {
			t.Errorf("not said: %s, in\n%s", want, said)
		}
	}
	_, fix, _ := strings.Cut(missing[0], "as a superuser: ")
	exec(t, p, "postgres", fix)
	_, missing, err = counter.CountRows(ctx, patterns("postgres.public.p*", "postgres.closed.*"))
	if err != nil || len(missing) > 0 {
		t.Errorf("after %s: %v, %v", fix, missing, err)
	}
}

// A table that is emptied and filled again in one transaction always has its rows:
// who truncates leaves none to older snapshots, and waits until they are counted.
func TestATruncatedTableIsNeverCountedEmpty(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{})
	exec(t, p, "postgres", "CREATE TABLE turned AS SELECT generate_series(1, 100) i")
	pattern, err := pg.ParseTablePattern("postgres.*.turned")
	if err != nil {
		t.Fatal(err)
	}
	writing, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		conn, err := p.Connect(writing, "postgres")
		for err == nil {
			_, err = conn.Exec(writing, "BEGIN; TRUNCATE turned; INSERT INTO turned SELECT generate_series(1, 100); COMMIT")
		}
		done <- err
	}()
	for range 40 {
		counted, missing, err := c.CountRows(t.Context(), []pg.TablePattern{pattern})
		if err != nil || len(missing) > 0 || len(counted) != 1 || counted[0].Tables[0].Rows != 100 {
			t.Fatalf("%+v, %v, %v", counted, missing, err)
		}
	}
	stop()
	<-done
}
