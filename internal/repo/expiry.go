package repo

import (
	"context"
	"errors"
	"fmt"
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
	Number    int       `json:"expiry"` // from 1
	Floors    []Floor   `json:"floors"` // by timeline, ascending
	ExpiredAt time.Time `json:"expired_at"`
}

// A Floor is a position of a timeline. All segments from there on are kept.
type Floor struct {
	Timeline pg.Timeline `json:"timeline"`
	From     pg.LSN      `json:"from"`
}

// Floor is that of a timeline; 0: nothing of it was let go.
func (e Expiry) Floor(t pg.Timeline) pg.LSN {
	for _, f := range e.Floors {
		if f.Timeline == t {
			return f.From
		}
	}
	return 0
}

func (a Archive) expired() string { return a.dir() + "expired/" }

func (a Archive) expiryKey(number int) string { return fmt.Sprintf("%s%06d.json", a.expired(), number) }

// Expiry reads what was let go of an archive.
func (r *Repo) Expiry(ctx context.Context, a Archive) (Expiry, error) {
	number := 0
	for o, err := range r.st.List(ctx, a.expired(), "") {
		if err != nil {
			return Expiry{}, wrap("list", a.expired(), err)
		}
		var n int
		if _, err := fmt.Sscanf(strings.TrimPrefix(o.Key, a.expired()), "%d.json", &n); err == nil && o.Key == a.expiryKey(n) {
			number = max(number, n)
		}
	}
	if number == 0 {
		return Expiry{}, nil
	}
	var e Expiry
	key := a.expiryKey(number)
	if err := r.getSigned(ctx, key, "expiry", &e); err != nil {
		return Expiry{}, err
	}
	if e.Archive != a || e.Number != number {
		return Expiry{}, fmt.Errorf("%s: is expiry %d of cluster %q, system %v: %w", key, e.Number, e.Cluster, e.System, fail.Corrupt)
	}
	return e, nil
}

// RaiseFloors records that segments below floors are let go, before any of them
// is removed. No floor is ever lowered. It fails with store.ErrExist if somebody
// else did so just now.
func (r *Repo) RaiseFloors(ctx context.Context, a Archive, floors []Floor, now time.Time) (Expiry, error) {
	before, err := r.Expiry(ctx, a)
	if err != nil {
		return before, err
	}
	e := Expiry{r.access.header("expiry"), a, before.Number + 1, slices.Clone(before.Floors), now.UTC().Truncate(time.Second)}
	raised := false
	for _, f := range floors {
		if f.From <= before.Floor(f.Timeline) {
			continue
		}
		raised = true
		e.Floors = slices.DeleteFunc(e.Floors, func(old Floor) bool { return old.Timeline == f.Timeline })
		e.Floors = append(e.Floors, f)
	}
	if !raised {
		return before, nil
	}
	slices.SortFunc(e.Floors, func(a, b Floor) int { return int(int64(a.Timeline) - int64(b.Timeline)) })
	if err := putSigned(ctx, r.st, r.access, a.expiryKey(e.Number), e); err != nil {
		return before, err
	}
	// Those before count no more. The last stays, for who is reading it now.
	if before.Number > 1 {
		err = r.st.Delete(ctx, a.expiryKey(before.Number-1))
		if errors.Is(err, fail.StoreDenied) {
			err = nil
		}
	}
	return e, wrap("delete", a.expiryKey(before.Number-1), err)
}

// RemovedWAL is what RemoveWAL did.
type RemovedWAL struct {
	Objects int      `json:"objects"`
	Bytes   int64    `json:"bytes"` // as stored
	Refused *Refused `json:"refused,omitempty"`
}

// RemoveWAL removes the segments, partial segments and notes of backups of an
// archive that are let go, oldest first: those below their recorded floor that
// needed does not name. Histories stay for ever.
//
// What a listing shows is removed a thousand objects at a time. A deletion that
// the store denies ends it, and stands in the result: the next one tries again.
func (r *Repo) RemoveWAL(ctx context.Context, a Archive, size pg.SegmentSize, needed func(pg.WALName) bool) (done RemovedWAL, err error) {
	e, err := r.Expiry(ctx, a)
	if err != nil || e.Number == 0 {
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
		if err != nil || at >= e.Floor(n.Timeline) || needed(n) {
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
