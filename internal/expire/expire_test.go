package expire_test

import (
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
)

// days takes a physical backup on each of so many days.
func (w *world) days(n int) (ids []repo.ID) {
	for range n {
		ids = append(ids, w.backUp(repo.Physical, false).ID)
		w.archiveSegment()
		w.pass(11 * time.Hour)
		w.archiveSegment()
		w.pass(12 * time.Hour)
	}
	w.pass(-12 * time.Hour)
	return ids
}

// run lets go what a policy says.
func (w *world) run(p retention.Policy) expire.Done {
	w.t.Helper()
	x := w.expirer(w.st)
	x.Policy = p
	plan, err := x.PlanAt(w.t.Context(), w.now)
	w.must(err)
	done, err := x.ApplyAt(w.t.Context(), expire.Order{Backups: plan.Removals(), Confirm: plan.Confirm}, w.now)
	w.must(err)
	return done
}

// A standby's last restartpoint may be older than anything that a plan knows of.
func TestC9NoLogGoesWhileAPhysicalBackupIsUnderWay(t *testing.T) {
	w := newWorld(t, 5)
	w.days(4)
	p := retention.Policy{Window: 12 * time.Hour, Min: 1}
	ref := w.begin(repo.Physical)
	if done := w.run(p); len(done.WAL) > 0 || done.Awaited != ref.ID {
		t.Errorf("while %s goes on: %+v", ref.ID, done)
	}
	w.pass(time.Hour)
	w.backUp(repo.Physical, false) // so that was given up
	if done := w.run(p); len(done.WAL) == 0 || done.Awaited != "" {
		t.Errorf("after it: %+v", done)
	}
}

// A window that becomes one day by a slip costs nothing if it is put right in time.
func TestC5AWindowThatShrankCanBePutRight(t *testing.T) {
	w := newWorld(t, 1)
	w.days(12)
	month := retention.Policy{Window: 30 * day, Daily: 30, Min: 2, Grace: 7 * day}
	slip := month
	slip.Window = day
	before, err := w.moments(time.Time{})
	w.must(err)
	for _, p := range []retention.Policy{month, slip, month, slip} {
		if done := w.run(p); len(done.WAL) > 0 {
			t.Errorf("with a window of %v: %+v", p.Window, done.WAL)
		}
		w.days(2)
	}
	after, err := w.moments(time.Time{})
	w.must(err)
	for s := range before {
		if !after[s] {
			t.Errorf("%s cannot be reached any more", s.key())
		}
	}
}

// A clock that leaps after it was compared with the store's decides nothing.
func TestC9AClockThatLeapsEndsNoGrace(t *testing.T) {
	w := newWorld(t, 2)
	w.days(7)
	p := retention.Policy{Window: 2 * day, Min: 1, Grace: 7 * day}
	marked := w.run(p).Marked
	x := w.expirer(w.st)
	x.Policy = p
	asked := 0
	done, err := x.ApplyBy(t.Context(), expire.Order{}, func() time.Time {
		if asked++; asked > 2 {
			return w.now.AddDate(1, 0, 0)
		}
		return w.now
	})
	if err != nil || done.Swept.Objects > 0 || len(done.WAL) > 0 || len(marked) == 0 {
		t.Errorf("%+v, %v, after %v", done, err, marked)
	}
	for _, id := range marked {
		w.must(w.r.Undelete(t.Context(), repo.Ref{Cluster: "main", ID: id}))
	}
}
