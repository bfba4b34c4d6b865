package restore_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// prove restores into a sandbox, lets the archive be changed, and tests.
func (s *site) prove(name string, target restore.Target, rows int64, change func(plan restore.PhysicalPlan)) proof.Report {
	s.t.Helper()
	sb, err := sandbox.Make(s.t.Context(), sandbox.Options{Parent: s.mkdir("sandboxes"), Name: name})
	if err != nil {
		s.t.Fatal(err)
	}
	defer func() {
		if err := sb.Remove(); err != nil {
			s.t.Error(err)
		}
	}()
	p := s.physical("unused", target)
	p.Dir, p.Tablespaces = sb.Data(), map[string]string{s.space: filepath.Join(sb.Tablespaces(), s.space)}
	begun := time.Now()
	plan := s.restored(p)
	change(plan)
	test := proof.Expect(p, plan)
	test.Sandbox, test.Fetched = sb, time.Since(begun)
	test.Rows = map[string]map[string]int64{"postgres": {"public.ledger": rows, "public.far": 1000}}
	rep, err := test.Run(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return rep
}

func TestARestoredClusterIsProven(t *testing.T) {
	s := newSite(t)
	s.rows(10)
	few := query[int64](t, s.pg, "SELECT count(*) FROM ledger")
	s.take()
	s.rows(20)
	s.exec("SELECT pg_create_restore_point('half')")
	half := query[int64](t, s.pg, "SELECT count(*) FROM ledger")
	s.rows(20)
	all := query[int64](t, s.pg, "SELECT count(*) FROM ledger")
	last := s.archived()

	nothing := func(restore.PhysicalPlan) {}
	for name, tt := range map[string]struct {
		target restore.Target
		rows   int64
	}{
		"latest": {restore.Target{Kind: restore.Latest}, all},
		"half":   {restore.Target{Kind: restore.ToName, Name: "half"}, half},
	} {
		rep := s.prove(name, tt.target, tt.rows, nothing)
		if rep.Verdict != proof.Passed {
			t.Errorf("%s: %s", name, rep.Summary())
		}
		for _, c := range rep.Checks {
			if c.Verdict == proof.Skipped && c.Name != proof.CheckAssertions {
				t.Errorf("%s: %s is skipped: %s", name, c.Name, c.Message)
			}
		}
	}
	// A segment that was there when the plan was made.
	rep := s.prove("lost", restore.Target{Kind: restore.Latest}, all, func(restore.PhysicalPlan) {
		found, _ := filepath.Glob(filepath.Join(s.dir, "repository/clusters/main/wal/*", last[:8], last+".zst"))
		if len(found) != 1 {
			t.Fatalf("found %v", found)
		}
		if err := os.Remove(found[0]); err != nil {
			t.Fatal(err)
		}
	})
	if rep.Verdict != proof.Failed || !strings.Contains(rep.Summary(), "could not restore file \""+last) {
		t.Errorf("with a lost segment: %s: %s", rep.Verdict, rep.Summary())
	}
	// PostgreSQL looks ahead of what it replays, and needs none of that.
	rep = s.prove("alone", restore.Target{Kind: restore.Immediate}, few, func(plan restore.PhysicalPlan) {
		timeline, at, err := pg.ParseSegmentName(plan.LastWAL, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		next, err := pg.SegmentName(timeline, at+1<<20, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(filepath.Dir(s.object(plan.LastWAL)), next+".zst"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
		s.own()
	})
	if rep.Verdict != proof.Passed {
		t.Errorf("with damage behind the end of the backup: %s: %s", rep.Verdict, rep.Summary())
	}
}

// A store that is down is no reason to test another moment than was asked for.
func TestARandomMomentIsNotDrawnInTheDark(t *testing.T) {
	s := newSite(t)
	s.rows(5)
	s.take()
	s.rows(5)
	s.archived()
	down := false
	broken := &fault.Store{Store: s.store, Before: func(op, key string) error {
		if down && strings.Contains(key, "/wal/") {
			return fail.StoreDown
		}
		return nil
	}}
	tests := proof.Tester{Policy: proof.RandomMoment, Sandbox: sandbox.Options{Parent: s.mkdir("sandboxes")},
		Open: func(ctx context.Context) (*repo.Repo, error) { return repo.Open(ctx, broken, s.access) }}
	subject := func() (proof.Subject, error) {
		now := time.Now()
		q, err := tests.Plan(t.Context(), proof.Request{Cluster: "main"}, repo.NewID(now, "0badcafe"), now, backup.Owner{})
		if cerr := tests.CleanUp(t.Context(), q); cerr != nil {
			t.Error(cerr)
		}
		return q, err
	}
	if q, err := subject(); err != nil || q.Target.Kind != restore.ToTime {
		t.Errorf("to %v, %v", q.Target, err)
	}
	down = true
	if q, err := subject(); !errors.Is(err, fail.StoreDown) {
		t.Errorf("with the log out of reach: to %v, %v", q.Target, err)
	}
}
