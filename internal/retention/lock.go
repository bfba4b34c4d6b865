package retention

import (
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Lock says for how long whatever stands is locked in its store, so that nobody
// destroys it. The zero Lock leaves locks alone.
type Lock struct {
	// For is how long a lock is when it is made anew, which happens when half of it
	// has passed. What was let go stays for as much longer.
	For time.Duration
	// Compliance: nobody can end a lock early, else whoever has the right to. An
	// object that is locked already stays as it is locked.
	Compliance bool
}

// perRun is how many objects are locked in a run, but for the last shelf.
const perRun = 20_000

// A Locking is the decision about locks.
type Locking struct {
	Objects int       `json:"objects"` // that stand
	Due     int       `json:"due"`     // to be locked anew by this run
	Later   int       `json:"later"`   // by the next ones: they are too many at once
	Ends    time.Time `json:"ends,omitzero"`
	Until   time.Time `json:"until"`

	shelves []repo.Shelf // that are due
}

// Decide says which objects are to be locked anew: all of those shelves of which
// more than half of the lock has passed, the most urgent first.
func (l Lock) Decide(shelves []repo.Shelf, now time.Time) Locking {
	d := Locking{Until: now.Add(l.For).UTC().Truncate(time.Second)}
	shelves = slices.SortedStableFunc(slices.Values(shelves), func(a, b repo.Shelf) int { return a.Until.Compare(b.Until) })
	for i, s := range shelves {
		if i == 0 {
			d.Ends = s.Until
		}
		d.Objects += s.Objects
		switch {
		case s.Until.After(now.Add(l.For / 2)):
		case d.Due > 0 && d.Due+s.Objects > perRun:
			d.Later += s.Objects
		default:
			d.Due += s.Objects
			d.shelves = append(d.shelves, s)
		}
	}
	return d
}

// Shelves are those that are to be locked, in this order.
func (d Locking) Shelves() []repo.Shelf { return d.shelves }
