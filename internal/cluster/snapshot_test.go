package cluster_test

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// commit is one committed row, and where the log stood before its transaction
// ended and after the client had been told: its commit record is in between.
type commit struct {
	id            int64
	before, after pg.LSN
}

// write commits rows, one per transaction, until the context ends.
func write(ctx context.Context, p *lab.Postgres, worker int) ([]commit, error) {
	conn, err := p.Connect(context.WithoutCancel(ctx), "postgres")
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	done := context.WithoutCancel(ctx)
	var ledger []commit
	for id := int64(worker) * 1e9; ctx.Err() == nil; id++ {
		var before, after string
		tx, err := conn.Begin(done)
		if err != nil {
			return nil, err
		}
		if _, err := tx.Exec(done, "INSERT INTO rows VALUES ($1)", id); err != nil {
			return nil, err
		}
		if err := tx.QueryRow(done, "SELECT pg_current_wal_insert_lsn()::text").Scan(&before); err != nil {
			return nil, err
		}
		if err := tx.Commit(done); err != nil {
			return nil, err
		}
		if err := conn.QueryRow(done, "SELECT pg_current_wal_insert_lsn()::text").Scan(&after); err != nil {
			return nil, err
		}
		c := commit{id: id}
		if c.before, err = pg.ParseLSN(before); err != nil {
			return nil, err
		}
		if c.after, err = pg.ParseLSN(after); err != nil {
			return nil, err
		}
		ledger = append(ledger, c)
	}
	return ledger, nil
}

// underLoad runs f while four clients commit rows, and returns the ledger.
func underLoad(t *testing.T, p *lab.Postgres, f func()) []commit {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var g errgroup.Group
	var mu sync.Mutex
	var ledger []commit
	for worker := range 4 {
		g.Go(func() error {
			l, err := write(ctx, p, worker)
			mu.Lock()
			defer mu.Unlock()
			ledger = append(ledger, l...)
			return err
		})
	}
	f()
	stop()
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	return ledger
}

// seen reads the rows that a snapshot shows, in another session, as pg_dump does.
func seen(t *testing.T, c cluster.Cluster, snapshot string) map[int64]bool {
	t.Helper()
	conn, err := c.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	ids := make(map[int64]bool)
	for _, sql := range []string{"BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY", "SET TRANSACTION SNAPSHOT '" + snapshot + "'"} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	rows, err := conn.Query(t.Context(), "SELECT id FROM public.rows")
	if err != nil {
		t.Fatal(err)
	}
	list, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		t.Fatal(err)
	}
	for _, id := range list {
		ids[id] = true
	}
	return ids
}

// check compares what a snapshot shows with the ledger and what LSNBracket
// promises.
func check(t *testing.T, ledger []commit, l cluster.LSNBracket, shown map[int64]bool) {
	t.Helper()
	in, out := 0, 0
	for _, c := range ledger {
		switch {
		case c.after < l.Before && !shown[c.id]:
			t.Errorf("row %d was committed at %v, before %v, and the snapshot lacks it", c.id, c.after, l.Before)
		case c.before >= l.After && shown[c.id]:
			t.Errorf("row %d was committed after %v, not before %v, and the snapshot has it", c.id, c.before, l.After)
		}
		if c.after < l.Before {
			in++
		}
		if c.before >= l.After {
			out++
		}
	}
	if in == 0 || out == 0 {
		t.Errorf("%d rows before the snapshot, %d after it: this proves nothing", in, out)
	}
}

func TestSnapshotStandsWhereItsLSNSays(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{Settings: map[string]string{"wal_level": "logical"}})
	exec(t, p, "postgres", "CREATE TABLE rows(id bigint PRIMARY KEY)")
	for _, tt := range []struct {
		name  string
		wait  time.Duration
		exact bool
	}{
		{"exact", 0, true},
		{"bracket", -1, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			exec(t, p, "postgres", "TRUNCATE rows")
			type taken struct {
				lsn   cluster.LSNBracket
				shown map[int64]bool
			}
			var all []taken
			ledger := underLoad(t, p, func() {
				for range 20 {
					before := count(t, p)
					s, err := c.OpenSnapshot(t.Context(), "postgres", cluster.SnapshotOptions{SlotWait: tt.wait})
					if err != nil {
						t.Fatal(err)
					}
					if s.LSN.Exact != tt.exact || (s.Inexact == nil) != tt.exact {
						t.Errorf("snapshot = %+v, want exact = %v", s, tt.exact)
					}
					after := count(t, p) // the snapshot must not move on
					eventually(t, "more rows", func() bool { return count(t, p) > after })
					all = append(all, taken{s.LSN, seen(t, c, s.ID)})
					if got := len(all[len(all)-1].shown); got < before || got > after {
						t.Errorf("the snapshot shows %d rows; there were %d before it and %d after it", got, before, after)
					}
					s.Close()
				}
			})
			for _, s := range all {
				check(t, ledger, s.lsn, s.shown)
			}
			// A slot's snapshot read too early takes rows away for ever: see settled.
			if got := count(t, p); got != len(ledger) {
				t.Errorf("%d rows were committed, %d are there", len(ledger), got)
			}
			t.Logf("%d commits, bracket of %d bytes", len(ledger), all[0].lsn.After-all[0].lsn.Before)
		})
	}
	if n := number(t, p, "SELECT count(*) FROM pg_replication_slots"); n != 0 {
		t.Errorf("%d slots are left", n)
	}
}

func count(t *testing.T, p *lab.Postgres) int {
	t.Helper()
	return number(t, p, "SELECT count(*) FROM rows")
}

func number(t *testing.T, p *lab.Postgres, sql string) (n int) {
	t.Helper()
	conn, err := p.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	if err := conn.QueryRow(t.Context(), sql).Scan(&n); err != nil {
		t.Fatal(err)
	}
	return n
}

func TestSnapshotIsNotReadBeforeItsTransactionsHaveEnded(t *testing.T) {
	for _, tt := range []struct {
		seen, now string
		want      bool
	}{
		{"100:100:", "100:100:", false},
		{"100:100:", "100:105:100,103", false}, // begun since then
		{"100:110:105", "105:110:105", false},
		{"100:110:105", "104:110:104", true},
		{"100:110:105", "99:110:99", true},
		{"120:110:", "115:130:115", true}, // as slots make them: all before xmin have ended
		{"120:110:", "120:130:120", false},
	} {
		got, err := cluster.AheadOf(tt.seen, tt.now)
		if err != nil || got != tt.want {
			t.Errorf("AheadOf(%s, %s) = %v, %v, want %v", tt.seen, tt.now, got, err, tt.want)
		}
	}
	for _, bad := range []string{"", "1:2", "1:2:3:4", "a:2:", "1:2:,x"} {
		if _, err := cluster.AheadOf(bad, "1:1:"); err == nil {
			t.Errorf("%q is taken for a snapshot", bad)
		}
	}
}

func TestSnapshotKeepsNoSlot(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{Settings: map[string]string{"wal_level": "logical"}})
	s, err := c.OpenSnapshot(t.Context(), "postgres", cluster.SnapshotOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	eventually(t, "the slot goes while the snapshot stays", func() bool {
		return number(t, p, "SELECT count(*) FROM pg_replication_slots") == 0
	})
	if !s.LSN.Exact {
		t.Errorf("snapshot = %+v, want an exact one", s)
	}
}

func TestSnapshotFallsBackToABracket(t *testing.T) {
	ctx := t.Context()
	p, c := start(t, lab.PostgresOptions{Settings: map[string]string{"wal_level": "logical", "max_replication_slots": "1"}})
	exec(t, p, "postgres", "CREATE ROLE dump LOGIN")
	expect := func(what string, c cluster.Cluster, opt cluster.SnapshotOptions, why string) {
		t.Helper()
		s, err := c.OpenSnapshot(ctx, "postgres", opt)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			return
		}
		defer s.Close()
		if s.LSN.Exact || s.Inexact == nil || !strings.Contains(s.Inexact.Error(), why) || s.LSN.Before == 0 || s.LSN.After < s.LSN.Before || s.ID == "" || s.Text == "" {
			t.Errorf("%s: got %+v, want a bracket because of %q", what, s, why)
		}
	}
	expect("a role that may not replicate", as(c, "dump"), cluster.SnapshotOptions{}, "may not replicate")

	exec(t, p, "postgres", "CREATE TABLE t()")
	conn, err := p.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	if _, err := conn.Exec(ctx, "BEGIN; DROP TABLE t"); err != nil {
		t.Fatal(err)
	}
	expect("a long transaction", c, cluster.SnapshotOptions{SlotWait: 300 * time.Millisecond}, "some transaction has run for longer")
	eventually(t, "the slot that was not waited for goes", func() bool {
		return number(t, p, "SELECT count(*) FROM pg_replication_slots") == 0
	})
	if _, err := conn.Exec(ctx, "ROLLBACK"); err != nil {
		t.Fatal(err)
	}

	exec(t, p, "postgres", "SELECT pg_create_physical_replication_slot('taken')")
	expect("no free slot", c, cluster.SnapshotOptions{}, "all replication slots are in use")

	if err := p.Restart(ctx, map[string]string{"wal_level": "replica"}); err != nil {
		t.Fatal(err)
	}
	expect("wal_level replica", c, cluster.SnapshotOptions{}, "wal_level is replica")

	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	if s, err := c.OpenSnapshot(cancelled, "postgres", cluster.SnapshotOptions{}); err == nil {
		s.Close()
		t.Error("a cancelled context took a snapshot")
	}
}

func TestSnapshotOfAStandby(t *testing.T) {
	ctx := t.Context()
	p, _ := start(t, lab.PostgresOptions{})
	exec(t, p, "postgres", "CREATE TABLE rows(id bigint PRIMARY KEY)")
	dir := standbyDir(t, p)
	s := lab.PostgresForTest(t, lab.PostgresOptions{Dir: dir, Settings: map[string]string{"hot_standby": "on"}})
	standby := cluster.Cluster{Conninfo: s.Conninfo(), BinDir: s.BinDir}
	f, err := standby.Facts(ctx)
	if err != nil || !f.InRecovery {
		t.Fatalf("facts = %+v, %v, want a standby", f, err)
	}
	type taken struct {
		lsn   cluster.LSNBracket
		shown map[int64]bool
	}
	var all []taken
	ledger := underLoad(t, p, func() {
		for range 10 {
			have := count(t, s)
			eventually(t, "rows arrive at the standby", func() bool { return count(t, s) > have })
			snap, err := standby.OpenSnapshot(ctx, "postgres", cluster.SnapshotOptions{})
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, taken{snap.LSN, seen(t, standby, snap.ID)})
			snap.Close()
		}
		have := count(t, p)
		eventually(t, "more rows", func() bool { return count(t, p) > have+10 })
	})
	for _, s := range all {
		for _, c := range ledger {
			if c.before >= s.lsn.After && s.shown[c.id] {
				t.Errorf("row %d was committed after %v, not before %v, and the snapshot has it", c.id, c.before, s.lsn.After)
			}
		}
	}
	snap, err := standby.OpenSnapshot(ctx, "postgres", cluster.SnapshotOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	out := filepath.Join(t.TempDir(), "dump")
	if err := standby.Dump(ctx, cluster.DumpOptions{Tools: tools(t, standby), Database: "postgres", Snapshot: snap.ID, Dir: out, Jobs: 2}); err != nil {
		t.Errorf("dump of a standby: %v", err)
	}
}

// standbyDir copies a server into a directory that lab starts as its standby.
func standbyDir(t *testing.T, p *lab.Postgres) string {
	t.Helper()
	host := strings.Split(p.Conninfo(), "'")[1]
	dir := filepath.Dir(host) + "/standby"
	cmd := p.Command(t.Context(), "pg_basebackup", "--pgdata="+dir+"/data", "--write-recovery-conf", "--checkpoint=fast", "--no-sync",
		"--dbname="+p.Conninfo())
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatal(fmt.Errorf("pg_basebackup: %w: %s", err, out))
	}
	return dir
}
