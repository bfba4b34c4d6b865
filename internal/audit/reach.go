package audit

import (
	"iter"
	"slices"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// Reach follows the log from b along the way to timeline t, as far as all
// segments are there. It is false if b is not on that way, or if what b itself
// needs is not there.
func (l Ledger) Reach(b Base, t pg.Timeline) (Window, bool) { return l.walk(b, l.path(t)) }

// On reports whether timeline t, or one that it comes from, goes through the
// whole of b.
func (l Ledger) On(b Base, t pg.Timeline) bool { return on(l.path(t), b) }

// Frontier is where the last segment on the way to timeline t ends, whether or
// not all before it are there; zero if there is none.
func (l Ledger) Frontier(t pg.Timeline) (to pg.LSN) {
	for _, s := range l.path(t) {
		for _, r := range l.clip(s) {
			to = max(to, r.To)
		}
	}
	return to
}

// Astray finds what a server that recovers along timeline t takes for the log where
// w ends, and is not: the segment there of a timeline that t comes from and had
// left by then. It looks at where timelines begin, not at where they were left,
// if the segment of the newer one is not there (XLogFileReadAnyTLI in
// access/transam/xlogrecovery.c).
func (l Ledger) Astray(w Window, t pg.Timeline) (left pg.Fork, found bool) {
	last := w.Path[len(w.Path)-1] // it does not go back behind that
	for _, f := range slices.Backward(l.of(t).Forks) {
		if f.Timeline < last {
			break
		}
		if w.To >= f.At-f.At%pg.LSN(l.SegmentSize) && slices.ContainsFunc(l.of(f.Timeline).Ranges, func(r Range) bool { return r.From <= w.To && w.To < r.To }) {
			return f, true
		}
	}
	return left, false
}

// Segments yields the files of w that hold its log from one position up to,
// and without, another; both are kept within the window and what its base needs.
func (w Window) Segments(size pg.SegmentSize, from, to pg.LSN) iter.Seq[pg.WALName] {
	return func(yield func(pg.WALName) bool) {
		at := max(from, w.Base.Start)
		at -= at % pg.LSN(size)
		for ; at < min(to, w.To); at += pg.LSN(size) {
			i := slices.IndexFunc(w.stop, func(s stretch) bool { return at < s.to })
			text, err := pg.SegmentName(w.stop[i].timeline, at, size)
			if err != nil {
				return // the size is valid: there are segments
			}
			name, err := pg.ParseWALName(text)
			if err != nil || !yield(name) {
				return
			}
		}
	}
}

// Leaves is where the way leaves a timeline; 0 if no segment of it is read.
func (w Window) Leaves(t pg.Timeline) pg.LSN {
	for _, s := range w.stop {
		if s.timeline == t {
			return s.left
		}
	}
	return 0
}

// From yields, for each timeline on the way from b to timeline t, the position
// from which on its segments are on that way.
func (l Ledger) From(b Base, t pg.Timeline) iter.Seq2[pg.Timeline, pg.LSN] {
	return func(yield func(pg.Timeline, pg.LSN) bool) {
		at := b.Start - b.Start%pg.LSN(max(l.SegmentSize, 1))
		for _, s := range l.path(t) {
			if at < s.to && !yield(s.timeline, max(at, s.from)) {
				return
			}
		}
	}
}
