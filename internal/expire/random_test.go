package expire_test

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/retention"
)

// Backups of a database that is written to share what did not change. They are let
// go in random order, each with its grace, its packs and the log that nobody needs
// any more; what remains restores all the same, until one is left.
// PGKEEP_TEST_CHURN_BACKUPS is how many there are, of a larger database; if it is not
// set, five. PGKEEP_TEST_CHURN_SEED draws another order.
func TestBackupsThatGoInRandomOrderLeaveTheOthersWhole(t *testing.T) {
	n, w := 5, work{rows: 16_000, pace: 20 * time.Millisecond}
	if more, err := strconv.Atoi(os.Getenv("PGKEEP_TEST_CHURN_BACKUPS")); err == nil {
		n, w.rows = more, 64_000
	}
	w.groups = w.rows / 32
	seed, _ := strconv.ParseUint(cmp.Or(os.Getenv("PGKEEP_TEST_CHURN_SEED"), "1"), 10, 64)
	rnd := rand.New(rand.NewPCG(seed, 3))
	h := newHost(t, w)
	stop := h.load()
	var left []taken
	var full int64 // what the first takes, which shares nothing
	for range n {
		left = append(left, h.take())
		if full == 0 {
			full = h.stored()
		}
		h.mark() // the database goes on between backups, too
	}
	stop()
	h.archived()
	stored := h.stored()
	t.Logf("seed %d: %d backups store %.1f MB, as many full ones would %.1f MB: %.2f of that; %d rows were written", seed, n, mb(stored), mb(full*int64(n)), float64(stored)/float64(full*int64(n)), h.ticks)
	if n >= 30 && 3*stored > full*int64(n) {
		t.Error("that is more than a third")
	}

	in, restores, segments := time.Hour, 0, 0 // all is out of the window by then
	for len(left) > 1 {
		i := rnd.IntN(len(left))
		goes := left[i]
		left = slices.Delete(left, i, i+1)
		segments += h.letGo(goes.id, &in)
		h.listed(left)
		again := left // the last few: each
		if k := rnd.IntN(len(left)); len(left) > 2 {
			again = left[k : k+1]
		}
		for _, b := range again {
			restores++
			name := fmt.Sprintf("r%d", restores)
			got := h.restored(name, restore.Physical{Backup: b.id, Target: restore.Target{Kind: restore.Immediate}})
			if got < b.before || got > b.after {
				t.Errorf("backup %s, after %s went: %d rows, want %d to %d", b.id, goes.id, got, b.before, b.after)
			}
			h.must(os.RemoveAll(filepath.Join(h.dir, name)))
		}
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("%d restores while they went, and %d segments; one backup and its log are %.1f MB", restores, segments, mb(h.stored()))
	if segments == 0 {
		t.Error("no log went: the test has lost its point")
	}
}

func mb(bytes int64) float64 { return float64(bytes) / 1e6 }

// stored is how much there is in the repository of backups, without the log.
func (h *host) stored() (sum int64) {
	h.t.Helper()
	for _, prefix := range []string{"clusters/main/backups/", "clusters/main/packs/"} {
		for o, err := range h.store.List(h.t.Context(), prefix, "") {
			h.must(err)
			sum += o.Size
		}
	}
	return sum
}

// listed fails if other backups are listed than those.
func (h *host) listed(want []taken) {
	h.t.Helper()
	all, err := h.repo.Backups(h.t.Context(), "main")
	h.must(err)
	if !slices.EqualFunc(all, want, func(l repo.Listed, b taken) bool { return l.ID == b.id && l.Err == nil }) {
		h.t.Fatalf("%d backups are listed: %+v; want %d", len(all), all, len(want))
	}
}

// letGo lets a backup go as expire does, and, when its grace is over, what it held
// and the log; the newest, which no rule lets go, as somebody who deletes it would.
// It returns how many segments went.
func (h *host) letGo(id repo.ID, in *time.Duration) (segments int) {
	h.t.Helper()
	x := &expire.Expirer{Name: "main", Policy: retention.Policy{Window: time.Second, Min: 1, Grace: time.Minute}, Open: h.open}
	run := func() (done expire.Done) {
		*in += 2 * time.Minute
		*h.store.by = *in
		now := time.Now().Add(*in)
		plan, err := x.PlanAt(h.t.Context(), now)
		h.must(err)
		done, err = x.ApplyAt(h.t.Context(), expire.Order{Backups: []repo.ID{id}, Confirm: plan.Confirm}, now)
		h.must(err)
		for _, w := range done.WAL {
			segments += w.Objects
		}
		return done
	}
	if done := run(); !slices.Contains(done.Marked, id) {
		h.must(h.repo.Mark(h.t.Context(), repo.Ref{Cluster: "main", ID: id}, time.Now().Add(*in), time.Minute, "a test"))
		h.must(h.repo.RenewLatest(h.t.Context(), "main"))
	}
	if done := run(); !slices.Equal(done.Swept.Backups, []repo.ID{id}) {
		h.t.Errorf("when its grace has passed: %+v, want %s swept", done, id)
	}
	h.must(lab.Own(filepath.Join(h.dir, "repository")))
	return segments
}
