package audit

import (
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// A Window is an interval of the log in which every moment can be reached from
// one base: all segments on the way are there.
type Window struct {
	Base     Base          `json:"base"`
	Path     []pg.Timeline `json:"timelines"` // in the order in which recovery goes through them
	From     pg.LSN        `json:"from"`
	To       pg.LSN        `json:"to"`                // the end of the last segment
	Archived time.Time     `json:"archived,omitzero"` // when the last segment was, by the store's clock; zero: not known
	stop     []stretch
}

// Windows returns what each base leads to: the longest way along each timeline.
// A base whose own log is not all there leads nowhere, and is among the stuck.
func (l Ledger) Windows(bases []Base) (windows []Window, stuck []Base) {
	for _, b := range bases {
		var ways []Window
		for _, t := range l.Timelines {
			if w, ok := l.walk(b, l.path(t.ID)); ok {
				ways = append(ways, w)
			}
		}
		if len(ways) == 0 {
			stuck = append(stuck, b)
		}
		for i, w := range ways {
			covered := func(o Window) bool { return w.within(o) }
			// Of two that are equal, the first stays.
			if !slices.ContainsFunc(ways[:i], covered) && !slices.ContainsFunc(ways[i+1:], func(o Window) bool { return w.within(o) && !o.within(w) }) {
				windows = append(windows, w)
			}
		}
	}
	return windows, stuck
}

// walk goes along a path from the start of b, as far as segments are there.
func (l Ledger) walk(b Base, path []stretch) (w Window, ok bool) {
	if l.SegmentSize == 0 || !on(path, b) {
		return w, false
	}
	at := b.Start - b.Start%pg.LSN(l.SegmentSize)
	w = Window{Base: b, From: b.Stop}
	for _, s := range path {
		if at >= s.to {
			continue
		}
		i := slices.IndexFunc(l.clip(s), func(r Range) bool { return r.From <= at && at < r.To })
		if i < 0 {
			break
		}
		r := l.clip(s)[i]
		at, w.Archived = r.To, r.Last
		w.Path, w.stop = append(w.Path, s.timeline), append(w.stop, s)
	}
	w.To = at
	return w, len(w.Path) > 0 && w.To >= b.Stop
}

// within reports whether o reaches every moment that w does.
func (w Window) within(o Window) bool {
	n := len(w.Path)
	if len(o.Path) < n || !slices.Equal(w.Path, o.Path[:n]) {
		return false
	}
	if len(o.Path) > n {
		return w.To <= o.stop[n-1].left
	}
	return w.To <= o.To
}
