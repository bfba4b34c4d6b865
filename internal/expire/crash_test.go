package expire_test

import (
	"errors"
	"os"
	"strconv"
	"testing"

	"github.com/pgkeep/pgkeep/internal/repo"
)

// Wherever a run is cut, at each deletion and at each write, every backup that is
// listed restores, every moment of the window can be reached, and the next run
// finishes. PGKEEP_TEST_EXPIRE_RUNS is how many runs are cut, at each deletion and at
// some writes; if it is not set, 12 are, at some of both.
func TestC5C9ACrashAtEachDeletion(t *testing.T) {
	runs, each := 12, false
	if n, err := strconv.Atoi(os.Getenv("PGKEEP_TEST_EXPIRE_RUNS")); err == nil {
		runs, each = n, true
	}
	cut, worlds, marked, removed, segments := 0, 0, 0, 0, 0
	for seed := uint64(1); cut < runs; seed++ {
		w := newWorld(t, seed)
		w.live(14 + w.rnd.IntN(10))
		worlds++
		for round := range 3 { // marks, then removals, then again
			promised, err := w.moments(w.now.Add(-policy.Window))
			if err != nil {
				t.Fatal(err)
			}
			plan, err := w.expirer(w.st).PlanAt(t.Context(), w.now)
			if err != nil {
				t.Fatal(err)
			}
			if len(plan.Against) > 0 {
				t.Logf("world %d: %v", seed, plan.Against)
				w.live(1)
				continue
			}
			var keep []repo.ID
			for _, v := range plan.Backups {
				if v.Keep {
					keep = append(keep, v.ID)
				}
			}
			for n := 1; cut < runs; n++ {
				if !each {
					n += w.rnd.IntN(40)
				}
				c := w.copyOf()
				m := &mortal{Store: c.st, n: n, part: c.rnd.IntN(9), deletes: each && n%5 > 0}
				_, err := c.expire(m)
				if !m.dead {
					if err != nil {
						t.Fatalf("world %d, round %d: %v", seed, round, err)
					}
					if m.deletes {
						continue // a multiple of 5 counts all changes
					}
					break
				}
				cut++
				if !errors.Is(err, errCrash) {
					t.Fatalf("world %d, round %d, cut at %d: %v, want the crash", seed, round, n, err)
				}
				if err := c.check(keep, promised); err != nil {
					t.Fatalf("world %d, round %d, cut at %d: %v", seed, round, n, err)
				}
				done, err := c.expire(c.st)
				if err != nil {
					t.Fatalf("world %d, round %d, cut at %d, run again: %v", seed, round, n, err)
				}
				if err := c.check(keep, promised); err != nil {
					t.Fatalf("world %d, round %d, cut at %d, run again: %v", seed, round, n, err)
				}
				if again, err := c.expire(c.st); err != nil || len(again.Marked)+again.Swept.Objects+len(again.WAL) > 0 {
					t.Fatalf("world %d, round %d, cut at %d: a third run did %+v, %v, after %+v", seed, round, n, again, err, done)
				}
			}
			done, err := w.expire(w.st)
			if err != nil {
				t.Fatal(err)
			}
			marked, removed = marked+len(done.Marked), removed+done.Swept.Objects
			for _, a := range done.WAL {
				segments += a.Objects
			}
			if err := w.check(keep, promised); err != nil {
				t.Fatalf("world %d, round %d: %v", seed, round, err)
			}
			w.live(2)
		}
	}
	t.Logf("%d runs cut in %d worlds; %d backups marked, %d objects of them and %d of the log removed", cut, worlds, marked, removed, segments)
	if marked == 0 || removed == 0 || segments == 0 {
		t.Error("nothing was ever removed")
	}
}
