package health

import (
	"context"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/human"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// Locks are those of the objects of a cluster, where they are to be kept up.
type Locks struct {
	Cluster string
	For     time.Duration // see retention.Lock
	Shelves []repo.Shelf
	Err     error // why they cannot be read, or made longer
}

// AskLocks reads locks, and tries whether they can be made longer here.
func AskLocks(ctx context.Context, r *repo.Repo, cluster string, mode store.LockMode, wanted time.Duration, now time.Time) Locks {
	l := Locks{Cluster: cluster, For: wanted}
	if l.Shelves, l.Err = r.Shelves(ctx, cluster); l.Err == nil {
		l.Err = r.TryLock(ctx, mode, now)
	}
	return l
}

// Findings are what is wrong with them. Half of a lock is what a run of expire
// leaves; where only a quarter is left, runs were missed.
func (l Locks) Findings(now time.Time) []Finding {
	f := &findings{cluster: l.Cluster}
	switch {
	case fail.KindOf(l.Err) == fail.StoreDenied:
		f.add("lock-denied", Critical, "give its role s3:GetObjectRetention and s3:PutObjectRetention: pgkeep bucket suggest --role expirer", "this host may not make locks of objects longer: %v", l.Err)
		return f.all
	case l.Err != nil:
		f.add("lock-unknown", Critical, fixOf(l.Err), "nobody here can tell for how long objects are locked: %v", l.Err)
		return f.all
	}
	const fix = "pgkeep expire --apply, and a schedule of kind expire that runs"
	open, short, first := 0, 0, time.Time{}
	for _, s := range l.Shelves {
		switch {
		case !s.Until.After(now):
			open += s.Objects
		case s.Until.Before(now.Add(l.For / 4)):
			short += s.Objects
			if first.IsZero() || s.Until.Before(first) {
				first = s.Until
			}
		}
	}
	if open > 0 {
		f.add("lock-ended", Critical, fix, "%s of backups and log are not locked, or only some are: who may delete versions can destroy them", human.Count(open, "object"))
	}
	if short > 0 {
		f.add("lock-ends", Warning, fix, "the locks of %s end in %s, and are kept for %s", human.Count(short, "object"), human.Span(first.Sub(now)), human.Span(l.For))
	}
	return f.all
}
