// Package expire lets go of what retention says nobody needs: backups first, by
// a mark that can be taken back, then what they held and the log behind them.
package expire

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
	"github.com/pgkeep/pgkeep/internal/store"
)

// An Expirer expires one cluster.
type Expirer struct {
	Name   string // of the cluster
	Policy retention.Policy
	Lock   retention.Lock                            // zero: locks of the store are left alone
	Open   func(context.Context) (*repo.Repo, error) // the repository
}

// Plan says what would go now.
func (x *Expirer) Plan(ctx context.Context) (retention.Plan, error) {
	r, err := x.Open(ctx)
	if err != nil {
		return retention.Plan{}, err
	}
	return x.plan(ctx, r, time.Now())
}

func (x *Expirer) plan(ctx context.Context, r *repo.Repo, now time.Time) (retention.Plan, error) {
	f, err := Gather(ctx, r, x.Name, now)
	if err != nil {
		return retention.Plan{}, fmt.Errorf("expire %s: %w", x.Name, err)
	}
	return retention.Decide(x.Policy, f), nil
}

// Locking says which objects would be locked anew; nil: locks are left alone.
func (x *Expirer) Locking(ctx context.Context) (*retention.Locking, error) {
	if x.Lock.For == 0 {
		return nil, nil
	}
	r, err := x.Open(ctx)
	if err != nil {
		return nil, err
	}
	return x.locking(ctx, r, time.Now())
}

func (x *Expirer) locking(ctx context.Context, r *repo.Repo, now time.Time) (*retention.Locking, error) {
	shelves, err := r.Shelves(ctx, x.Name)
	if err != nil {
		return nil, fmt.Errorf("locks of %s: %w", x.Name, err)
	}
	d := x.Lock.Decide(shelves, now)
	return &d, nil
}

// Relock locks anew what stands and whose lock is about to end, and says what that
// was; nil: locks are left alone. It does so whatever may be removed, and whether or
// not: a manifest that somebody broke is no reason to let locks end.
func (x *Expirer) Relock(ctx context.Context) (*retention.Locking, error) {
	if x.Lock.For == 0 {
		return nil, nil
	}
	r, err := x.Open(ctx)
	if err != nil {
		return nil, err
	}
	return x.relock(ctx, r, time.Now)
}

func (x *Expirer) relock(ctx context.Context, r *repo.Repo, now func() time.Time) (*retention.Locking, error) {
	at := now()
	if err := x.clock(ctx, r, now); err != nil { // what is locked until a wrong year stays so
		return nil, err
	}
	d, err := x.locking(ctx, r, at)
	if err != nil {
		return nil, err
	}
	lock := store.Lock{Until: d.Until, Mode: store.Governance}
	if x.Lock.Compliance {
		lock.Mode = store.Compliance
	}
	for _, s := range d.Shelves() {
		if err := r.Lock(ctx, s, lock); err != nil {
			return nil, fmt.Errorf("locks of %s: %w", x.Name, err)
		}
	}
	return d, nil
}

// clock fails if the clock here and the store's are apart.
func (x *Expirer) clock(ctx context.Context, r *repo.Repo, now func() time.Time) error {
	ahead, err := r.StoreClock(ctx, x.Name, now)
	if err != nil {
		return fmt.Errorf("expire %s: %w", x.Name, err)
	}
	if ahead.Abs() > retention.Skew {
		return fmt.Errorf("expire %s: the store's clock is ahead by %v: %w", x.Name, ahead.Round(time.Second), fail.ClockSkew)
	}
	return nil
}

// Gather reads all that a decision about a cluster rests on. Backups are read
// before the archives: what the newest of them needs is archived by then.
func Gather(ctx context.Context, r *repo.Repo, cluster string, now time.Time) (retention.Facts, error) {
	f := retention.Facts{Cluster: cluster, Now: now, Damage: make(map[repo.Archive]error)}
	var err error
	if f.Backups, err = r.Records(ctx, cluster); err != nil {
		return f, err
	}
	archives, err := r.Archives(ctx, cluster)
	if err != nil {
		return f, err
	}
	for _, a := range archives {
		l, odd, err := audit.Survey(ctx, r, a, audit.Ledger{})
		if err != nil && !audit.Damaged(err) {
			return f, err
		}
		if err = cmp.Or(err, odd.Bad); err != nil {
			f.Damage[a] = err
		}
		f.Archives = append(f.Archives, l)
	}
	return f, nil
}

// An Order is what somebody agreed to.
type Order struct {
	// Backups may be let go, those of a plan; others are not, whatever is due by now.
	Backups []repo.ID
	// Confirm is the number that a large plan demands; see retention.Plan.
	Confirm int
}

// Done is what Apply did.
type Done struct {
	Marked []repo.ID    `json:"marked,omitempty"` // backups that were let go
	Swept  repo.Swept   `json:"swept"`            // what was removed of those whose grace had passed
	WAL    []RemovedWAL `json:"wal,omitempty"`
	// Awaited is the physical backup under way before whose end no log is removed.
	Awaited repo.ID `json:"awaited,omitempty"`
}

// RemovedWAL is what was removed of an archive.
type RemovedWAL struct {
	repo.Archive
	repo.RemovedWAL
}

// Refused says what the store did not let go, in words; none: nothing.
func (d Done) Refused() (why []string) {
	for _, b := range d.Swept.Refused {
		why = append(why, fmt.Sprintf("backup %s: %s", b.ID, b.Why))
	}
	for _, w := range d.WAL {
		if w.RemovedWAL.Refused != nil {
			why = append(why, fmt.Sprintf("log of system %v: %s", w.System, w.RemovedWAL.Refused.Why))
		}
	}
	return why
}

// Apply decides anew and carries that out, as far as it was ordered. It may be
// repeated, wherever it was cut. What the store refuses to remove is told, and
// tried again by the next.
//
// The order of things is what keeps every listed backup whole: marks first; then
// what marked backups hold; and of the log only what no backup needs that has a
// manifest still, and what no plan needed for a grace, after it was recorded that it
// may be missing; and none while a physical backup is under way.
func (x *Expirer) Apply(ctx context.Context, o Order) (done Done, err error) {
	r, err := x.Open(ctx)
	if err != nil {
		return done, err
	}
	return x.apply(ctx, r, o, time.Now)
}

func (x *Expirer) apply(ctx context.Context, r *repo.Repo, o Order, now func() time.Time) (done Done, err error) {
	at := now() // one moment for all that is decided, and it is compared with the store's
	p, err := x.plan(ctx, r, at)
	if err != nil {
		return done, err
	}
	if err := p.Err(o.Confirm); err != nil {
		return done, err
	}
	if x.Policy.IsZero() {
		return done, nil
	}
	if err := x.clock(ctx, r, now); err != nil {
		return done, err
	}
	for _, v := range p.Backups {
		if v.Keep || v.Deleted || !slices.Contains(o.Backups, v.ID) {
			continue
		}
		err := r.Mark(ctx, repo.Ref{Cluster: x.Name, ID: v.ID}, at, x.Policy.Grace, v.Reasons...)
		switch {
		case err == nil:
			done.Marked = append(done.Marked, v.ID)
		case !errors.Is(err, fail.Held) && !errors.Is(err, fail.NoBackup): // somebody was faster
			return done, fmt.Errorf("expire %s: %w", x.Name, err)
		}
	}
	if err := r.RenewLatest(ctx, x.Name); err != nil {
		return done, fmt.Errorf("expire %s: %w", x.Name, err)
	}
	if done.Swept, err = r.Sweep(ctx, x.Name, at); err != nil {
		return done, fmt.Errorf("expire %s: %w", x.Name, err)
	}
	if p, err = x.plan(ctx, r, at); err != nil { // what is left
		return done, err
	}
	if len(p.Against) > 0 {
		return done, p.Err(0)
	}
	for _, w := range p.WAL {
		if _, err := r.RaiseFloors(ctx, w.Archive, w.Floors, at, x.Policy.Grace); err != nil {
			return done, fmt.Errorf("expire %s: %w", x.Name, err)
		}
	}
	all, err := r.Records(ctx, x.Name)
	if err != nil {
		return done, fmt.Errorf("expire %s: %w", x.Name, err)
	}
	if done.Awaited = retention.UnderWay(all); done.Awaited != "" {
		return done, nil
	}
	for _, w := range p.WAL {
		removed, err := r.RemoveWAL(ctx, w.Archive, w.SegmentSize, at.Add(-x.Policy.Grace), w.Needed)
		if removed.Objects > 0 || removed.Refused != nil {
			done.WAL = append(done.WAL, RemovedWAL{w.Archive, removed})
		}
		if err != nil {
			return done, fmt.Errorf("expire %s: %w", x.Name, err)
		}
	}
	return done, nil
}
