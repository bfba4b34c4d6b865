package audit_test

import (
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/pg"
)

const (
	segment = pg.SegmentSize(1 << 20)
	top     = 14 // segments of a timeline, at most
)

var epoch = time.Date(2026, 11, 22, 1, 0, 0, 0, time.UTC)

// A spot is a segment of a timeline, by its number.
type spot struct {
	t pg.Timeline
	n int
}

// A model is an archive without any cleverness: all it has is looked at one by
// one.
type model struct {
	segments map[spot]time.Time
	forks    map[pg.Timeline][]pg.Fork
	born     map[pg.Timeline]time.Time
	bases    []audit.Base
}

// drawModel makes an archive with forks and holes; the same for the same seed.
func drawModel(seed uint64) model {
	rnd := rand.New(rand.NewPCG(seed, 0))
	between := func(low, top int) int { return low + rnd.IntN(top-low+1) }
	m := model{map[spot]time.Time{}, map[pg.Timeline][]pg.Fork{}, map[pg.Timeline]time.Time{}, nil}
	at := func() time.Time { return epoch.Add(time.Duration(between(0, 60)) * time.Minute) }
	count := between(1, 4)
	for tl := pg.Timeline(1); int(tl) <= count; tl++ {
		if tl > 1 {
			parent := pg.Timeline(between(1, int(tl)-1))
			low := 1 * int(segment)
			if f := m.forks[parent]; len(f) > 0 {
				low = int(f[len(f)-1].At)
			}
			f := pg.Fork{Timeline: parent, At: pg.LSN(between(low, top*int(segment)))}
			if between(0, 1) == 0 {
				f.At += (pg.LSN(segment) - f.At%pg.LSN(segment)) % pg.LSN(segment)
			}
			m.forks[tl], m.born[tl] = append(slices.Clone(m.forks[parent]), f), at()
		}
		for n := range top {
			if between(0, 9) > 0 {
				m.segments[spot{tl, n}] = at()
			}
		}
		for range between(0, 2) {
			start := between(0, top*int(segment))
			stop := start + between(1, 2*int(segment))
			m.bases = append(m.bases, audit.Base{ID: fmt.Sprint(len(m.bases)), Timeline: tl, Start: pg.LSN(start), Stop: pg.LSN(stop), Finished: at()})
		}
	}
	return m
}

// owner says on which timeline a server on its way to t reads segment n.
func (m model) owner(t pg.Timeline, n int) pg.Timeline {
	for _, f := range m.forks[t] {
		if n < int(f.At/pg.LSN(segment)) {
			return f.Timeline
		}
	}
	return t
}

// on reports whether the way to t goes through a base.
func (m model) on(t pg.Timeline, b audit.Base) bool {
	if b.Timeline == t {
		return true
	}
	return slices.ContainsFunc(m.forks[t], func(f pg.Fork) bool { return f.Timeline == b.Timeline && b.Stop <= f.At })
}

func (m model) ledger() audit.Ledger {
	l := audit.Ledger{SegmentSize: segment}
	for s, at := range m.segments { // in any order
		l.Add(s.name(), at)
	}
	for t, forks := range m.forks {
		l.AddHistory(t, forks, m.born[t])
	}
	return l
}

func (s spot) name() pg.WALName {
	text, err := pg.SegmentName(s.t, pg.LSN(s.n)*pg.LSN(segment), segment)
	if err != nil {
		panic(err)
	}
	n, err := pg.ParseWALName(text)
	if err != nil {
		panic(err)
	}
	return n
}

func (m model) timelines() []pg.Timeline {
	all := slices.Collect(maps.Keys(m.forks))
	for s := range m.segments {
		all = append(all, s.t)
	}
	slices.Sort(all)
	return slices.Compact(all)
}

// reached are the segments to whose end one can go from b, and how.
func (m model) reached(b audit.Base) map[spot]bool {
	all := map[spot]bool{}
	for _, t := range m.timelines() {
		if !m.on(t, b) {
			continue
		}
		way := []spot{}
		for n := int(b.Start / pg.LSN(segment)); ; n++ {
			s := spot{m.owner(t, n), n}
			if _, ok := m.segments[s]; !ok {
				break
			}
			way = append(way, s)
		}
		if len(way) > 0 && pg.LSN(way[len(way)-1].n+1)*pg.LSN(segment) >= b.Stop {
			for _, s := range way {
				all[s] = true
			}
		}
	}
	return all
}

// check tries many archives. A failure names its own: -run Name/seed.
func check(t *testing.T, try func(*testing.T, model)) {
	for seed := range uint64(5000) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { try(t, drawModel(seed)) })
		if t.Failed() {
			return
		}
	}
}

func TestC3WindowsAreWhatCanBeReached(t *testing.T) {
	check(t, func(t *testing.T, m model) {
		l := m.ledger()
		windows, stuck := l.Windows(m.bases)
		for _, b := range m.bases {
			want, got := m.reached(b), map[spot]bool{}
			var own []map[spot]bool
			for _, w := range windows {
				if w.Base != b {
					continue
				}
				if w.From != b.Stop || w.To < w.From {
					t.Fatalf("window %+v", w)
				}
				last := w.Path[len(w.Path)-1]
				one := map[spot]bool{}
				for n := int(b.Start / pg.LSN(segment)); pg.LSN(n)*pg.LSN(segment) < w.To; n++ {
					s := spot{m.owner(last, n), n}
					if !slices.Contains(w.Path, s.t) {
						t.Fatalf("segment %v is on none of the timelines of %+v", s, w)
					}
					got[s], one[s] = true, true
				}
				if at := m.segments[spot{last, int(w.To/pg.LSN(segment)) - 1}]; !w.Archived.IsZero() && !w.Archived.Equal(at) {
					t.Fatalf("%+v: the last segment was archived at %v", w, at)
				}
				own = append(own, one)
			}
			if d := cmp.Diff(want, got); d != "" {
				t.Fatalf("base %+v (-want +got):\n%s\nwindows %+v", b, d, windows)
			}
			if (len(want) == 0) != slices.Contains(stuck, b) {
				t.Fatalf("base %+v reaches %d segments, stuck: %+v", b, len(want), stuck)
			}
			for i, one := range own {
				for j, other := range own {
					if i != j && subset(one, other) {
						t.Fatalf("base %+v: a window says no more than another: %+v", b, windows)
					}
				}
			}
		}
	})
}

func subset(a, b map[spot]bool) bool {
	for s := range a {
		if !b[s] {
			return false
		}
	}
	return true
}

// missing are the segments that Holes promises to find, with the earliest
// evidence.
func (m model) missing() map[spot]time.Time {
	all := map[spot]time.Time{}
	for _, t := range m.timelines() {
		limit := 1 << 30 // beyond: the server that wrote t is gone
		var bornOfChild time.Time
		for _, child := range m.timelines() {
			for _, f := range m.forks[child] {
				if n := int(f.At / pg.LSN(segment)); f.Timeline == t && (limit == 1<<30 || n > limit) {
					limit, bornOfChild = n, m.born[child]
				}
			}
		}
		// The last segment behind the fork tells; look at each run's last.
		for n := range top {
			_, here := m.segments[spot{t, n}]
			_, next := m.segments[spot{t, n + 1}]
			if here && !next && limit < 1<<30 && n >= limit && m.segments[spot{t, n}].After(bornOfChild) {
				limit = 1 << 30
			}
		}
		floor := 0
		if f := m.forks[t]; len(f) > 0 {
			floor = int(f[len(f)-1].At / pg.LSN(segment))
		}
		limit = max(limit, floor)
		type evidence struct {
			n    int // segments before n were written
			when time.Time
		}
		var shown []evidence
		first, any := 1<<30, false
		for n := range min(limit, top+3) {
			if _, ok := m.segments[spot{m.owner(t, n), n}]; ok {
				first, any = min(first, n), true
				shown = append(shown, evidence{n, m.runs(spot{m.owner(t, n), n})})
			}
		}
		if !any {
			continue
		}
		for i, f := range m.forks[t] {
			when := m.born[t]
			begins := t
			if i+1 < len(m.forks[t]) {
				begins = m.forks[t][i+1].Timeline
			}
			if b, ok := m.born[begins]; ok && b.Before(when) {
				when = b
			}
			shown = append(shown, evidence{int(f.At / pg.LSN(segment)), when})
		}
		for _, b := range m.bases {
			if m.on(t, b) {
				first = min(first, int(b.Start/pg.LSN(segment)))
				shown = append(shown, evidence{int((b.Stop + pg.LSN(segment) - 1) / pg.LSN(segment)), b.Finished})
			}
		}
		for n := first; n < min(limit, top+3); n++ {
			s := spot{m.owner(t, n), n}
			if _, ok := m.segments[s]; ok {
				continue
			}
			for _, e := range shown {
				if old, ok := all[s]; e.n > n && (!ok || e.when.Before(old)) {
					all[s] = e.when
				}
			}
		}
	}
	for s := range all {
		needed := len(m.bases) == 0
		for _, b := range m.bases {
			needed = needed || m.on(s.t, b) && int(b.Start/pg.LSN(segment)) <= s.n
		}
		if !needed {
			delete(all, s)
		}
	}
	return all
}

// runs is when the earliest of the run of segments around s was archived.
func (m model) runs(s spot) time.Time {
	at := m.segments[s]
	for _, step := range []int{-1, 1} {
		for n := s.n + step; ; n += step {
			when, ok := m.segments[spot{s.t, n}]
			if !ok {
				break
			}
			if when.Before(at) {
				at = when
			}
		}
	}
	return at
}

func TestC3HolesAreWhatIsMissing(t *testing.T) {
	check(t, func(t *testing.T, m model) {
		want := m.missing()
		got := map[spot]time.Time{}
		for _, h := range m.ledger().Holes(m.bases) {
			for n := int(h.From / pg.LSN(segment)); pg.LSN(n)*pg.LSN(segment) < h.To; n++ {
				got[spot{h.Timeline, n}] = h.Since
			}
			if h.Count != int((h.To-h.From)/pg.LSN(segment)) || h.First != (spot{h.Timeline, int(h.From / pg.LSN(segment))}).name().String() ||
				h.Last != (spot{h.Timeline, int(h.To/pg.LSN(segment)) - 1}).name().String() {
				t.Fatalf("hole %+v", h)
			}
		}
		for s, since := range got {
			if earliest, ok := want[s]; ok && since.After(earliest) {
				t.Fatalf("hole at %v since %v, and it shows since %v", s, since, earliest)
			}
			delete(got, s)
			got[s] = time.Time{}
		}
		for s := range want {
			want[s] = time.Time{}
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Fatalf("(-want +got):\n%s\n%+v", d, m.ledger())
		}
	})
}
