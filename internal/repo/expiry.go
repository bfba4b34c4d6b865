package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// An Expiry says how much of an archive was let go: below a floor, segments may
// be missing, and that is no hole. Those that a backup needs itself are there all
// the same. The one with the highest number counts; the zero Expiry is that of an
// archive of which nothing was.
type Expiry struct {
	Header
	Archive
	Number int     `json:"expiry"` // from 1
	Floors []Floor `json:"floors"` // by timeline, ascending; none is ever lowered
	// Plan are the floors of the plan that was carried out then, by timeline,
	// ascending. A later plan may need again what an earlier one let go: then its
	// floor is below that of Floors. Without one, it needed the whole timeline.
	Plan      []Floor   `json:"plan"`
	ExpiredAt time.Time `json:"expired_at"`
}

// A Floor is a position of a timeline. All segments from there on are kept.
type Floor struct {
	Timeline pg.Timeline `json:"timeline"`
	From     pg.LSN      `json:"from"`
}

// Floor is that of a timeline; 0: nothing of it was let go.
func (e Expiry) Floor(t pg.Timeline) pg.LSN { return floor(e.Floors, t) }

func floor(floors []Floor, t pg.Timeline) pg.LSN {
	for _, f := range floors {
		if f.Timeline == t {
			return f.From
		}
	}
	return 0
}

// Free is the position of a timeline below which segments may be removed: each
// plan that was carried out since then let them go, and so did the last one before.
// The expiries are in the order of their numbers.
func Free(all []Expiry, since time.Time, t pg.Timeline) pg.LSN {
	low := pg.LSN(math.MaxUint64)
	for _, e := range slices.Backward(all) {
		low = min(low, floor(e.Plan, t))
		if !e.ExpiredAt.After(since) {
			return low
		}
	}
	return 0
}

func (a Archive) expired() string { return a.dir() + "expired/" }

func (a Archive) expiryKey(number int) string { return fmt.Sprintf("%s%06d.json", a.expired(), number) }

// Expiry reads what was let go of an archive.
func (r *Repo) Expiry(ctx context.Context, a Archive) (Expiry, error) {
	numbers, err := r.expiryNumbers(ctx, a)
	if err != nil || len(numbers) == 0 {
		return Expiry{}, err
	}
	return r.expiry(ctx, a, numbers[len(numbers)-1])
}

// expiries reads all that is recorded yet of what was let go of an archive.
func (r *Repo) expiries(ctx context.Context, a Archive) (all []Expiry, err error) {
	numbers, err := r.expiryNumbers(ctx, a)
	for _, n := range numbers {
		e, err := r.expiry(ctx, a, n)
		if err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	return all, err
}

func (r *Repo) expiryNumbers(ctx context.Context, a Archive) (numbers []int, err error) {
	for o, err := range r.st.List(ctx, a.expired(), "") {
		if err != nil {
			return nil, wrap("list", a.expired(), err)
		}
		var n int
		if _, err := fmt.Sscanf(strings.TrimPrefix(o.Key, a.expired()), "%d.json", &n); err == nil && n > 0 && o.Key == a.expiryKey(n) {
			numbers = append(numbers, n)
		}
	}
	slices.Sort(numbers)
	return numbers, nil
}

func (r *Repo) expiry(ctx context.Context, a Archive, number int) (e Expiry, err error) {
	key := a.expiryKey(number)
	err = r.getSigned(ctx, key, "expiry", &e)
	if err == nil && (e.Archive != a || e.Number != number) {
		err = fmt.Errorf("%s: is expiry %d of cluster %q, system %v: %w", key, e.Number, e.Cluster, e.System, fail.Corrupt)
	}
	return e, err
}

// RaiseFloors records the floors of a plan: segments below them are let go, and may
// be removed a grace later; see Free. What may be missing below a floor may be so
// for ever: no floor is lowered. It fails with store.ErrExist if somebody else did
// so just now.
func (r *Repo) RaiseFloors(ctx context.Context, a Archive, plan []Floor, now time.Time, grace time.Duration) (Expiry, error) {
	all, err := r.expiries(ctx, a)
	if err != nil {
		return Expiry{}, err
	}
	var before Expiry
	if len(all) > 0 {
		before = all[len(all)-1]
	}
	order := func(a, b Floor) int { return cmp.Compare(a.Timeline, b.Timeline) }
	plan = slices.SortedFunc(slices.Values(plan), order)
	e := Expiry{r.access.header("expiry"), a, before.Number + 1, slices.Clone(before.Floors), plan, now.UTC().Truncate(time.Second)}
	for _, f := range plan {
		if f.From > before.Floor(f.Timeline) {
			e.Floors = slices.DeleteFunc(e.Floors, func(old Floor) bool { return old.Timeline == f.Timeline })
			e.Floors = append(e.Floors, f)
		}
	}
	slices.SortFunc(e.Floors, order)
	if slices.Equal(e.Plan, before.Plan) && slices.Equal(e.Floors, before.Floors) {
		return before, nil
	}
	if err := putSigned(ctx, r.st, r.access, a.expiryKey(e.Number), e); err != nil {
		return before, err
	}
	// Those before the first that Free asks count no more. The one before this
	// stays in any case, for who is reading it now.
	asked := false
	for _, old := range slices.Backward(all) {
		if asked && old.Number < before.Number {
			err = wrap("delete", a.expiryKey(old.Number), r.st.Delete(ctx, a.expiryKey(old.Number)))
		}
		if err != nil && !errors.Is(err, fail.StoreDenied) {
			return e, err
		}
		asked = asked || !old.ExpiredAt.After(e.ExpiredAt.Add(-grace))
	}
	return e, nil
}

// RemovedWAL is what RemoveWAL did.
type RemovedWAL struct {
	Objects int      `json:"objects"`
	Bytes   int64    `json:"bytes"` // as stored
	Refused *Refused `json:"refused,omitempty"`
}

// RemoveWAL removes the segments, partial segments and notes of backups of an
// archive that were let go before some time, and since, oldest first: those below
// what is Free that needed does not name. Histories stay for ever.
//
// What a listing shows is removed a thousand objects at a time. A deletion that
// the store denies ends it, and stands in the result: the next one tries again.
func (r *Repo) RemoveWAL(ctx context.Context, a Archive, size pg.SegmentSize, since time.Time, needed func(pg.WALName) bool) (done RemovedWAL, err error) {
	all, err := r.expiries(ctx, a)
	if err != nil || len(all) == 0 {
		return done, err
	}
	var keys []string
	var bytes int64
	flush := func() error {
		if len(keys) == 0 {
			return nil
		}
		err := wrap("delete", keys[0], r.st.Delete(ctx, keys...))
		if errors.Is(err, fail.StoreDenied) {
			done.Refused = &Refused{Why: err.Error(), err: err}
			return nil
		}
		if err == nil {
			done.Objects, done.Bytes = done.Objects+len(keys), done.Bytes+bytes
			keys, bytes = nil, 0
		}
		return err
	}
	for o, err := range r.WALObjects(ctx, a, pg.WALName{}) {
		if err != nil {
			return done, err
		}
		n := o.Name
		if n.Kind != pg.Segment && n.Kind != pg.Partial && n.Kind != pg.BackupHistory || n == (pg.WALName{}) {
			continue
		}
		at, err := n.Start(size)
		if err != nil || at >= Free(all, since, n.Timeline) || needed(n) {
			continue // what is odd is not touched
		}
		keys, bytes = append(keys, o.Key), bytes+o.Stored
		if len(keys) == 1000 {
			if err := flush(); err != nil || done.Refused != nil {
				return done, err
			}
		}
	}
	return done, flush()
}
