package repo_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

var (
	histories   = flag.Int("histories", 5, "random histories to play")
	historyFrom = flag.Uint64("history", 1, "seed of the first")
)

// Whatever happens to a cluster, to uploads and to backups, in whatever order,
// every backup that is listed reads back byte for byte; and when all are
// deleted, nothing is left.
func TestC1C2Histories(t *testing.T) {
	scratch := t.TempDir()
	signer := setup(t, new(store.Mem), false).operator.Signer
	for seed := *historyFrom; seed < *historyFrom+uint64(*histories); seed++ {
		h := history{rnd: rand.New(rand.NewPCG(seed, 0)), mem: new(store.Mem), disk: make(disk), live: make(map[int]disk), scratch: scratch}
		r, _, err := repo.Init(ctx, h.mem, repo.Access{Signer: signer, Version: "1"}, nil, now)
		if err != nil {
			t.Fatal(err)
		}
		h.r = r
		for step := range 14 {
			if err := h.step(t); err != nil {
				t.Fatalf("history %d, step %d: %v\n%s", seed, step, err, strings.Join(h.log, "\n"))
			}
		}
		if err := h.end(); err != nil {
			t.Fatalf("history %d, end: %v\n%s", seed, err, strings.Join(h.log, "\n"))
		}
	}
}

type history struct {
	rnd     *rand.Rand
	mem     *store.Mem
	r       *repo.Repo
	disk    disk
	old     []disk       // what it was before
	live    map[int]disk // backups that exist
	open    []int        // unfinished ones
	next    int          // number of the next backup
	scratch string
	log     []string
}

func (h *history) note(format string, args ...any) {
	h.log = append(h.log, fmt.Sprintf(format, args...))
}

func (h *history) step(t *testing.T) error {
	switch n := h.rnd.IntN(20); {
	case n < 6 || len(h.live) == 0:
		h.change()
		return h.backUp(h.mem)
	case n < 9:
		return h.attempt()
	case n < 12:
		return h.backUpWhileDeleting(t)
	case n < 14:
		return h.deleteWhileBackingUp(t)
	case n < 15:
		return h.deleteWhilePublishing(t)
	case n < 17:
		return h.cutDelete(t)
	default:
		if err := h.delete(h.mem, h.any()); err != nil {
			return err
		}
	}
	return h.check(t)
}

// any returns the number of a backup that exists, or is unfinished.
func (h *history) any() int {
	all := append(slices.Sorted(maps.Keys(h.live)), h.open...)
	return all[h.rnd.IntN(len(all))]
}

// change does to the files what databases do.
func (h *history) change() {
	h.old = append(h.old, maps.Clone(h.disk))
	for range 1 + h.rnd.IntN(6) {
		p := fmt.Sprintf("data/base/%d", h.rnd.IntN(5))
		b := bytes.Clone(h.disk[p])
		what := "new"
		switch n := h.rnd.IntN(10); {
		case n == 0:
			delete(h.disk, p)
			h.note("%s deleted", p)
			continue
		case n == 1 && len(b) > 0:
			what, b = "cut", b[:h.rnd.IntN(len(b))]
		case n == 2: // as it was once: the same content in the same place
			what, b = "as once", bytes.Clone(h.old[h.rnd.IntN(len(h.old))][p])
		case n == 3 && len(b) > 0: // cut, and grown again
			once := h.old[h.rnd.IntN(len(h.old))][p]
			at := h.rnd.IntN(len(b))
			what, b = "regrown", b[:at]
			if len(once) > at {
				b = append(b, once[at:]...)
			}
		case n == 4 && len(b) > 0:
			what = "zeros"
			at := h.rnd.IntN(len(b))
			clear(b[at:min(len(b), at+h.rnd.IntN(100_000))])
		case n == 5:
			what, b = "grown", append(b, pages(h.rnd.IntN(1000), 1+h.rnd.IntN(20))...)
		case n < 9 && len(b) > 0:
			what = "pages"
			for range 1 + h.rnd.IntN(5) {
				at := h.rnd.IntN(len(b)) / 8192 * 8192
				copy(b[at:], pages(h.rnd.IntN(1000), 1))
			}
		default:
			b = pages(h.rnd.IntN(1000), 1+h.rnd.IntN(90))
			switch h.rnd.IntN(4) {
			case 0:
				b = b[:h.rnd.IntN(len(b))]
			case 1:
				b = b[:min(len(b), 64<<10+h.rnd.IntN(3)-1)]
			}
		}
		h.disk[p] = b
		h.note("%s %s, %d bytes", p, what, len(b))
	}
	h.disk[label] = fmt.Appendf(nil, "%d", h.rnd.IntN(3))
}

// writeOnly is what who takes backups has of a store: nothing can be deleted there.
func writeOnly(st store.Store) store.Store {
	return &fault.Store{Store: st, Before: func(op, key string) error {
		if op == "delete" {
			return fmt.Errorf("delete %s: %w", key, fail.StoreDenied)
		}
		return nil
	}}
}

func (h *history) writing(n int) repo.Writing {
	return repo.Small(repo.Writing{Ref: repo.Ref{Cluster: "main", ID: backupID(n)}, PackSize: 60_000, Readers: 1 + h.rnd.IntN(4)/3*2})
}

// begin writes the intent of the next backup. It pins some that exist.
func (h *history) begin() (int, error) {
	n := h.next
	h.next++
	var pins []int
	for _, k := range slices.Backward(slices.Sorted(maps.Keys(h.live))) {
		if h.rnd.IntN(4) > 0 && len(pins) < 2 {
			pins = append(pins, k)
		}
	}
	h.note("intent %d, pins %v", n, pins)
	return n, intend(h.r, n, pins...)
}

// finish stores and publishes backup n, through st.
func (h *history) finish(st store.Store, n int) error {
	d := maps.Clone(h.disk)
	r := h.r.Through(writeOnly(st))
	if _, err := store1(r, d, h.writing(n)); err != nil {
		return fmt.Errorf("store %d: %w", n, err)
	}
	if _, err := publish(r, n); err != nil {
		return fmt.Errorf("publish %d: %w", n, err)
	}
	h.note("published %d", n)
	h.live[n] = d
	h.open = slices.DeleteFunc(h.open, func(k int) bool { return k == n })
	return nil
}

func (h *history) backUp(st store.Store) error {
	if len(h.open) > 0 && h.rnd.IntN(2) == 0 { // an attempt goes on
		return h.finish(st, h.open[h.rnd.IntN(len(h.open))])
	}
	n, err := h.begin()
	if err != nil {
		return err
	}
	return h.finish(st, n)
}

// attempt begins a backup, or goes on with one, and is cut.
func (h *history) attempt() error {
	h.change()
	var n int
	var err error
	if len(h.open) > 0 && h.rnd.IntN(2) == 0 {
		n = h.open[h.rnd.IntN(len(h.open))]
	} else {
		if n, err = h.begin(); err != nil {
			return err
		}
		h.open = append(h.open, n)
	}
	puts := 1 + h.rnd.IntN(8)
	cut := errors.New("cut")
	var mu sync.Mutex
	broken := &fault.Store{Store: h.mem, Before: func(op, key string) error {
		mu.Lock()
		defer mu.Unlock()
		if op != "put" {
			return nil
		}
		if puts--; puts <= 0 || strings.Contains(key, "/draft") {
			return cut
		}
		return nil
	}}
	h.note("attempt %d", n)
	if _, err := store1(h.r.Through(broken), h.disk, h.writing(n)); !errors.Is(err, cut) {
		return fmt.Errorf("attempt %d: %w, want it cut", n, err)
	}
	return nil
}

// delete deletes backup n, through st.
func (h *history) delete(st store.Store, n int) error {
	_, err := h.r.Through(st).Delete(ctx, repo.Ref{Cluster: "main", ID: backupID(n)}, now)
	h.note("delete %d: %v", n, err)
	delete(h.live, n)
	h.open = slices.DeleteFunc(h.open, func(k int) bool { return k == n })
	return err
}

// at calls do once, before the n-th call to a store that op names.
func (h *history) at(n int, ops string, do func() error) (st store.Store, failed *error) {
	failed = new(error)
	done := false
	var mu sync.Mutex // others wait until it is done
	return &fault.Store{Store: h.mem, Before: func(op, key string) error {
		mu.Lock()
		defer mu.Unlock()
		if done || !strings.Contains(ops, op) {
			return nil
		}
		if n--; n == 0 {
			done = true
			*failed = do()
		}
		return nil
	}}, failed
}

func (h *history) backUpWhileDeleting(t *testing.T) error {
	h.change()
	victim := h.any()
	st, failed := h.at(1+h.rnd.IntN(12), "put get list delete", func() error { return h.backUp(h.mem) })
	open := slices.Contains(h.open, victim)
	err := h.delete(st, victim)
	if open && errors.Is(*failed, fail.NoBackup) { // it went on with the victim
		*failed = nil
	}
	if err := errors.Join(err, *failed); err != nil {
		return err
	}
	delete(h.live, victim)
	return h.check(t)
}

func (h *history) deleteWhileBackingUp(t *testing.T) error {
	h.change()
	victims := slices.Sorted(maps.Keys(h.live))
	victim := victims[h.rnd.IntN(len(victims))]
	st, failed := h.at(1+h.rnd.IntN(12), "put get list", func() error { return h.delete(h.mem, victim) })
	if err := errors.Join(h.backUp(st), *failed); err != nil {
		return err
	}
	return h.check(t)
}

// deleteWhilePublishing deletes what is just being published, between any two
// calls, and tries to publish it once more.
func (h *history) deleteWhilePublishing(t *testing.T) error {
	h.change()
	n, err := h.begin()
	if err != nil {
		return err
	}
	if _, err := store1(h.r, h.disk, h.writing(n)); err != nil {
		return fmt.Errorf("store %d: %w", n, err)
	}
	h.live[n] = maps.Clone(h.disk) // unless it is deleted
	st, failed := h.at(1+h.rnd.IntN(14), "put get list", func() error { return h.delete(h.mem, n) })
	for range 2 {
		_, err := publish(h.r.Through(writeOnly(st)), n)
		h.note("publish %d: %v", n, err)
		if err = errors.Join(err, *failed); err != nil && (h.live[n] != nil || !errors.Is(err, fail.NoBackup)) {
			return err
		}
	}
	return h.check(t)
}

func (h *history) cutDelete(t *testing.T) error {
	victim := h.any()
	broken := &fault.Store{Store: h.mem, At: 1 + h.rnd.IntN(15), After: h.rnd.IntN(2) == 0}
	was, open := h.live[victim], slices.Contains(h.open, victim)
	if err := h.delete(broken, victim); err != nil && !broken.Hit() {
		return err
	}
	list, err := h.r.Backups(ctx, "main")
	if err != nil {
		return err
	}
	for _, b := range list {
		if b.ID == backupID(victim) && !b.Unfinished { // nothing happened
			h.live[victim] = was
		}
		if b.ID == backupID(victim) && b.Unfinished && open {
			h.open = append(h.open, victim)
		}
	}
	return h.check(t)
}

// check compares what is listed and what it holds with what should be there.
func (h *history) check(t *testing.T) error {
	list, err := h.r.Backups(ctx, "main")
	if err != nil {
		return err
	}
	found := 0
	for _, b := range list {
		if b.Err != nil {
			return b.Err
		}
		if b.Unfinished {
			continue
		}
		found++
		n := 0
		for backupID(n) != b.ID {
			n++
		}
		want, ok := h.live[n]
		if !ok {
			return fmt.Errorf("%d is listed, and was deleted", n)
		}
		keep := h.rnd.IntN(2) == 0 // over whatever the last one left
		if !keep {
			if err := os.RemoveAll(h.scratch); err != nil {
				return err
			}
		}
		if err := os.MkdirAll(h.scratch, 0o700); err != nil {
			return err
		}
		got, _, err := readDisk(t, h.r, b.Manifest, h.scratch, keep)
		if err != nil {
			return fmt.Errorf("read %d: %w", n, err)
		}
		for p := range got {
			if _, ok := want[p]; !ok && (keep || strings.HasSuffix(p, "/")) {
				delete(got, p) // of another backup, or a directory
			}
		}
		if !maps.EqualFunc(got, want, bytes.Equal) {
			return fmt.Errorf("backup %d reads back otherwise", n)
		}
		rep, err := h.r.Read(ctx, b.ID, b.Content, repo.Reading{})
		if err == nil {
			err = rep.Err()
		}
		if err != nil {
			return fmt.Errorf("verify %d: %w", n, err)
		}
	}
	if found != len(h.live) {
		return fmt.Errorf("%d backups are listed, want %d", found, len(h.live))
	}
	return nil
}

// end deletes everything, in any order.
func (h *history) end() error {
	for len(h.live)+len(h.open) > 0 {
		if err := h.delete(h.mem, h.any()); err != nil {
			return err
		}
	}
	// A deletion that was cut, or had to leave something, is repeated by the next.
	n, err := h.begin()
	if err == nil {
		err = h.delete(h.mem, n)
	}
	if err != nil {
		return err
	}
	for o, err := range h.mem.List(ctx, "clusters/", "") {
		if err != nil {
			return err
		}
		return fmt.Errorf("left behind: %s", o.Key)
	}
	return nil
}
