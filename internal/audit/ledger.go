// Package audit proves what the archive of a cluster is good for: which
// segments are there, which are missing, and to which moments they lead from
// which backup.
package audit

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Ledger is what one archive holds. It is small, whatever the archive holds:
// as JSON it stands in workflow histories, where the next audit finds it.
type Ledger struct {
	repo.Archive
	SegmentSize pg.SegmentSize `json:"segment_size"` // 0: the archive holds no segment
	Timelines   []Timeline     `json:"timelines"`    // ascending
}

// A Timeline is what an archive holds of one timeline.
type Timeline struct {
	ID       pg.Timeline `json:"timeline"`
	Ranges   []Range     `json:"ranges"`             // ascending, with a gap between any two
	Partials []pg.LSN    `json:"partials,omitempty"` // where the partial segments begin, ascending
	Forks    []pg.Fork   `json:"forks,omitempty"`    // where it comes from, oldest first; none: no history is archived
	Born     time.Time   `json:"born,omitzero"`      // when its history was archived, by the store's clock
	Lost     time.Time   `json:"lost,omitzero"`      // since when a history is there that cannot be read; zero: none such
	LostKey  string      `json:"-"`                  // the object of that history; only a new survey knows it
	Floor    pg.LSN      `json:"floor,omitempty"`    // below it, segments were let go: see repo.Expiry
	Notes    int         `json:"-"`                  // how many base backups left a note; only a full survey counts them
}

// A Range is a run of segments without a gap.
type Range struct {
	From  pg.LSN    `json:"from"`
	To    pg.LSN    `json:"to"`              // where the next segment would begin
	First time.Time `json:"first"`           // when the earliest of them was archived, by the store's clock
	Last  time.Time `json:"last"`            // when the one with the highest position was
	Bytes int64     `json:"bytes,omitempty"` // as stored; of a range that was cut, an estimate
}

// Segments is how many segments r has.
func (r Range) Segments(size pg.SegmentSize) int { return int(uint64(r.To-r.From) / uint64(size)) }

// timeline returns the entry of t, which it makes if there is none.
func (l *Ledger) timeline(t pg.Timeline) *Timeline {
	i, found := slices.BinarySearchFunc(l.Timelines, t, func(a Timeline, t pg.Timeline) int { return cmp.Compare(a.ID, t) })
	if !found {
		l.Timelines = slices.Insert(l.Timelines, i, Timeline{ID: t})
	}
	return &l.Timelines[i]
}

// of returns what there is of t, which may be nothing.
func (l Ledger) of(t pg.Timeline) Timeline {
	for _, have := range l.Timelines {
		if have.ID == t {
			return have
		}
	}
	return Timeline{ID: t}
}

// Bytes is what the segments take as stored.
func (l Ledger) Bytes() (sum int64) {
	for _, t := range l.Timelines {
		for _, r := range t.Ranges {
			sum += r.Bytes
		}
	}
	return sum
}

// Add enters a file that is no history, archived at that time. It fails for a
// name that the segment size rules out.
func (l *Ledger) Add(n pg.WALName, archived time.Time) error { return l.add(n, archived, 0) }

// add is Add, with what it takes.
func (l *Ledger) add(n pg.WALName, archived time.Time, stored int64) error {
	start, err := n.Start(l.SegmentSize)
	if err != nil {
		return err
	}
	end := start + pg.LSN(l.SegmentSize)
	if end < start {
		return fmt.Errorf("%v: the log cannot be that long", n)
	}
	t := l.timeline(n.Timeline)
	switch n.Kind {
	case pg.Segment:
		t.add(Range{start, end, archived, archived, stored})
	case pg.Partial:
		if i, found := slices.BinarySearch(t.Partials, start); !found {
			t.Partials = slices.Insert(t.Partials, i, start)
		}
	case pg.BackupHistory:
		t.Notes++
	}
	return nil
}

// AddHistory enters the history of t, archived at that time.
func (l *Ledger) AddHistory(t pg.Timeline, forks []pg.Fork, archived time.Time) {
	entry := l.timeline(t)
	entry.Forks, entry.Born = forks, archived
}

// add enters r, and joins it with what it touches.
func (t *Timeline) add(r Range) {
	i, _ := slices.BinarySearchFunc(t.Ranges, r.From, func(have Range, from pg.LSN) int { return cmp.Compare(have.To, from) })
	j := i
	for ; j < len(t.Ranges) && t.Ranges[j].From <= r.To; j++ {
		have := t.Ranges[j]
		if have.To > r.To || have.To == r.To && have.Last.After(r.Last) {
			r.Last = have.Last
		}
		if have.First.Before(r.First) {
			r.First = have.First
		}
		r.From, r.To, r.Bytes = min(r.From, have.From), max(r.To, have.To), r.Bytes+have.Bytes
	}
	t.Ranges = slices.Replace(t.Ranges, i, j, r)
}

// Newest is the end of the log in the archive: the last segment of the newest
// timeline that has any. at is when it was archived, by the store's clock; zero
// if there is none.
func (l Ledger) Newest() (at time.Time, t pg.Timeline, to pg.LSN) {
	for _, tl := range slices.Backward(l.Timelines) {
		if n := len(tl.Ranges); n > 0 {
			return tl.Ranges[n-1].Last, tl.ID, tl.Ranges[n-1].To
		}
	}
	return at, t, to
}

// A stretch is a part of the log that a server reads on one timeline.
type stretch struct {
	timeline pg.Timeline
	from, to pg.LSN // of segments; to is where the first of the next timeline begins
	left     pg.LSN // the very position at which the timeline was left
}

// end is beyond every position there is a segment for.
const end = ^pg.LSN(0)

// path is the log of a server on timeline t, from the beginning: it begins on
// the oldest ancestor. The segment in which a timeline was left is read on the
// one that goes on (XLogFileReadAnyTLI in access/transam/xlogrecovery.c).
func (l Ledger) path(t pg.Timeline) []stretch {
	var path []stretch
	from := pg.LSN(0)
	for _, f := range l.of(t).Forks {
		to := f.At - f.At%pg.LSN(max(1, l.SegmentSize)) // there may be histories alone
		path = append(path, stretch{f.Timeline, from, to, f.At})
		from = to
	}
	return append(path, stretch{t, from, end, end})
}

// clip returns the ranges of a stretch, cut to it.
func (l Ledger) clip(s stretch) []Range {
	var ranges []Range
	for _, r := range l.of(s.timeline).Ranges {
		if r.From = max(r.From, s.from); r.To > s.to {
			r.To, r.Last = s.to, time.Time{} // of a segment within, nothing is known
		}
		if r.From < r.To {
			ranges = append(ranges, r)
		}
	}
	return ranges
}
