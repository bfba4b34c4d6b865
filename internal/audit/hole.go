package audit

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// Grace is how old, at least, what shows a hole must be. While segments go up
// side by side, a later one may be there for a moment before an earlier.
const Grace = 30 * time.Second

// A Base is a physical backup, as far as the log concerns it.
type Base struct {
	ID       string      `json:"id"`
	Timeline pg.Timeline `json:"timeline"`
	Start    pg.LSN      `json:"start"` // the log is needed from there …
	Stop     pg.LSN      `json:"stop"`  // … and up to there, at least
	Finished time.Time   `json:"finished"`
}

// A Hole is a run of segments that should be in the archive, and are not; or,
// with From and To zero, a history that should.
type Hole struct {
	Timeline pg.Timeline `json:"timeline"`
	From     pg.LSN      `json:"from"`
	To       pg.LSN      `json:"to"`
	First    string      `json:"first"` // name of the first file, …
	Last     string      `json:"last"`  // … and of the last
	Count    int         `json:"count"`
	// Since is when the archive began to hold what shows the hole, by the
	// store's clock.
	Since time.Time `json:"since"`
}

func (h Hole) String() string {
	if h.Count == 1 {
		return h.First
	}
	return fmt.Sprintf("%s to %s (%d)", h.First, h.Last, h.Count)
}

// has reports whether a file is one of those that are missing.
func (h Hole) has(n pg.WALName, size pg.SegmentSize) bool {
	if n.Kind != pg.Segment {
		return n.String() == h.First
	}
	start, err := n.Start(size)
	return err == nil && n.Timeline == h.Timeline && h.From <= start && start < h.To
}

// Holes finds what is missing: on the way along each timeline from its oldest
// ancestor, between the first segment that is there and the last; before a fork
// that a history tells of; between start and stop of each base. What lies before
// every base is needed by nobody and is no hole; without bases, all is needed.
// Nor is one behind the fork of a timeline on which nothing was archived since
// the fork: its server is gone.
func (l Ledger) Holes(bases []Base) []Hole {
	missing := make(map[pg.Timeline]*Timeline) // Range.First is Hole.Since
	for _, t := range l.Timelines {
		for _, s := range l.gaps(t, bases) {
			if missing[s.timeline] == nil {
				missing[s.timeline] = new(Timeline)
			}
			missing[s.timeline].add(s.Range)
		}
	}
	holes := l.lostHistories(bases)
	for t, m := range missing {
		for _, r := range l.missed(t, m.Ranges, bases) {
			if r.From = max(r.From, l.needed(t, bases)); r.From < r.To {
				first, _ := pg.SegmentName(t, r.From, l.SegmentSize) // the size is valid: there are segments
				last, _ := pg.SegmentName(t, r.To-1, l.SegmentSize)
				holes = append(holes, Hole{t, r.From, r.To, first, last, r.Segments(l.SegmentSize), r.First})
			}
		}
	}
	slices.SortFunc(holes, func(a, b Hole) int { return cmp.Compare(a.First, b.First) })
	return holes
}

// missed is what of missing ranges of t counts: what was let go does only where a
// base cannot do without.
func (l Ledger) missed(t pg.Timeline, missing []Range, bases []Base) []Range {
	floor := l.of(t).Floor
	var own Timeline
	for _, r := range missing {
		if r.From >= floor {
			own.add(r)
			continue
		}
		if r.To > floor {
			own.add(Range{From: floor, To: r.To, First: r.First, Last: r.Last})
		}
		for _, b := range bases {
			for _, s := range l.path(b.Timeline) {
				if s.timeline != t {
					continue
				}
				from := max(r.From, s.from, b.Start-b.Start%pg.LSN(l.SegmentSize))
				if to := min(r.To, floor, s.to, b.Stop+(pg.LSN(l.SegmentSize)-b.Stop%pg.LSN(l.SegmentSize))%pg.LSN(l.SegmentSize)); from < to {
					own.add(Range{From: from, To: to, First: r.First, Last: r.Last})
				}
			}
		}
	}
	return own.Ranges
}

// lostHistories are the histories that are missing, or cannot be read: of
// timelines that the archive has segments of, and of those that a later history
// names. The oldest timeline
// has none, or began before the archive did.
func (l Ledger) lostHistories(bases []Base) (holes []Hole) {
	since := make(map[pg.Timeline]time.Time)
	lost := func(t pg.Timeline, shown time.Time) {
		if at, ok := since[t]; !ok || shown.Before(at) {
			since[t] = shown
		}
	}
	for i, t := range l.Timelines {
		if i > 0 && len(t.Ranges) > 0 && t.Born.IsZero() && l.needed(t.ID, bases) < end {
			lost(t.ID, t.Ranges[0].First)
		}
		if !t.Lost.IsZero() {
			lost(t.ID, t.Lost)
		}
		for k, f := range t.Forks[min(1, len(t.Forks)):] {
			used := func(b Base) bool { // on the way to the timeline that f left, or on that
				return slices.ContainsFunc(t.Forks[:k+2], func(f pg.Fork) bool { return f.Timeline == b.Timeline && b.Stop <= f.At })
			}
			if f.Timeline > l.Timelines[0].ID && l.of(f.Timeline).Born.IsZero() && (len(bases) == 0 || slices.ContainsFunc(bases, used)) {
				lost(f.Timeline, t.Born)
			}
		}
	}
	for t, at := range since {
		name := pg.HistoryName(t).String()
		holes = append(holes, Hole{Timeline: t, First: name, Last: name, Count: 1, Since: at})
	}
	return holes
}

// A gap is a part of a stretch that is missing; First is since when.
type gap struct {
	timeline pg.Timeline
	Range
}

// gaps finds what is missing on the way to the end of t.
func (l Ledger) gaps(t Timeline, bases []Base) (missing []gap) {
	if l.SegmentSize == 0 {
		return nil
	}
	path := l.path(t.ID)
	if at, left := l.abandoned(t); left {
		path[len(path)-1].to = max(at, path[len(path)-1].from)
	}
	var have []Range // along the path
	var shows []Range
	for i, s := range path {
		have = append(have, l.clip(s)...)
		if i > 0 && !t.Born.IsZero() { // a server was there
			shows = append(shows, Range{From: s.from, To: s.from, First: l.born(t, s.timeline)})
		}
	}
	if len(have) == 0 {
		return nil
	}
	first := have[0].From
	for _, b := range bases {
		if on(path, b) {
			first = min(first, b.Start-b.Start%pg.LSN(l.SegmentSize))
			shows = append(shows, Range{From: b.Stop, To: b.Stop, First: b.Finished})
		}
	}
	shows = append(shows, have...)
	next := first
	for _, r := range append(have, Range{From: end}) {
		limit := r.From
		if limit == end { // what must be there, though nothing behind it is
			limit = next
			for _, s := range shows {
				limit = max(limit, s.From)
			}
			limit += (pg.LSN(l.SegmentSize) - limit%pg.LSN(l.SegmentSize)) % pg.LSN(l.SegmentSize)
		}
		if next < limit {
			since := earliest(shows, next)
			for _, s := range path {
				if from, to := max(next, s.from), min(limit, s.to); from < to {
					missing = append(missing, gap{s.timeline, Range{From: from, To: to, First: since}})
				}
			}
		}
		next = max(next, r.To)
	}
	return missing
}

// earliest is since when anything shows that the log goes on behind a position.
func earliest(shows []Range, behind pg.LSN) (since time.Time) {
	for _, s := range shows {
		if s.From > behind && (since.IsZero() || s.First.Before(since)) {
			since = s.First
		}
	}
	return since
}

// born is when the archive learnt that the ancestor a of t began: from its own
// history, or from that of t.
func (l Ledger) born(t Timeline, a pg.Timeline) time.Time {
	if b := l.of(a).Born; !b.IsZero() && b.Before(t.Born) {
		return b
	}
	return t.Born
}

// abandoned reports whether t was left, and nothing archived on it since. Then
// at is the segment in which it was left, the last of them.
func (l Ledger) abandoned(t Timeline) (at pg.LSN, left bool) {
	var since time.Time
	for _, child := range l.Timelines {
		for _, f := range child.Forks {
			if to := f.At - f.At%pg.LSN(l.SegmentSize); f.Timeline == t.ID && (!left || to > at) {
				at, since, left = to, child.Born, true
			}
		}
	}
	for _, r := range t.Ranges {
		if left && r.To > at && r.Last.After(since) {
			return 0, false
		}
	}
	return at, left
}

// needed is from where on bases need segments of t; end if none does.
func (l Ledger) needed(t pg.Timeline, bases []Base) pg.LSN {
	path := l.path(t)
	if l.SegmentSize == 0 || len(bases) == 0 || len(path) == 1 && t > 1 { // where it comes from is not known
		return 0
	}
	from := end
	for _, b := range bases {
		if on(path, b) {
			from = min(from, b.Start-b.Start%pg.LSN(l.SegmentSize))
		}
	}
	return from
}

// on reports whether a base was taken on a path, before the path left its
// timeline.
func on(path []stretch, b Base) bool {
	for _, s := range path {
		if s.timeline == b.Timeline {
			return b.Stop <= s.left
		}
	}
	return false
}
