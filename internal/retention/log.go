package retention

import (
	"cmp"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// base is a physical backup as far as the log concerns it.
func base(b repo.Record) audit.Base {
	p := b.Physical
	return audit.Base{ID: string(b.ID), Timeline: p.StopTimeline, Start: p.Start, Stop: p.Stop, Finished: b.FinishedAt}
}

func archiveOf(b repo.Record) repo.Archive {
	return repo.Archive{Cluster: b.Cluster, System: b.System, Major: b.Version.Major()}
}

func (d *decider) ledger(a repo.Archive) (audit.Ledger, bool) {
	i := slices.IndexFunc(d.facts.Archives, func(l audit.Ledger) bool { return l.Archive == a })
	if i < 0 {
		return audit.Ledger{}, false
	}
	return d.facts.Archives[i], true
}

// complete reports whether the log that a physical backup itself needs is there.
func (d *decider) complete(b repo.Record) bool {
	l, ok := d.ledger(archiveOf(b))
	if !ok {
		return false
	}
	_, ok = l.Reach(base(b), b.Physical.StopTimeline)
	return ok
}

// log decides about the log, archive by archive. It runs after keep, and keeps
// the backups that lead into the window.
func (d *decider) log() {
	for _, l := range d.facts.Archives {
		d.plan.WAL = append(d.plan.WAL, d.archive(l))
	}
}

func (d *decider) archive(l audit.Ledger) WAL {
	w := WAL{Archive: l.Archive, SegmentSize: l.SegmentSize, own: make(map[string]bool), from: make(map[pg.Timeline]pg.LSN)}
	nothing := func(format string, args ...any) {
		w.Why = cmp.Or(w.Why, "nothing goes: "+fmt.Sprintf(format, args...))
	}
	switch {
	case l.SegmentSize == 0:
		nothing("there is no segment")
		return w
	case d.policy.IsZero():
		nothing("no retention is configured")
	case d.blind:
		nothing("not all that is there can be read")
	}
	var bases, back []*entry // back: and those that may be brought back
	for _, e := range d.all {
		if e.Err != nil && e.Deleted != nil && !e.Unfinished { // it may be brought back, to whom can read it
			nothing("which log %s needs is not known: %v", e.ID, e.Err)
		}
		if e.Physical == nil || e.Err != nil || archiveOf(e.Record) != l.Archive {
			continue
		}
		names, err := e.Physical.Segments() // for as long as there is a manifest: it may be brought back
		if err != nil {
			nothing("which log %s needs is not known: %v", e.ID, err)
		}
		for _, n := range names {
			w.own[n.String()] = true
		}
		if e.good() {
			bases = append(bases, e)
		}
		if e.bad == "" && !e.Unfinished {
			back = append(back, e)
		}
	}
	floors, grace := make(map[pg.Timeline]pg.LSN), make(map[pg.Timeline]pg.LSN)
	live := d.live(l)
	for i, t := range l.Timelines {
		if !t.Lost.IsZero() || i > 0 && t.Born.IsZero() && len(t.Ranges) > 0 {
			nothing("where timeline %d comes from is not known", t.ID)
		}
		if !live || !d.inUse(t, bases) {
			continue
		}
		if into := d.leadsIn(l, t.ID, bases, d.from); into != nil {
			if d.policy.Window > 0 {
				into.keep("window: timeline %d from %s on", t.ID, date(d.facts.Now.Add(-d.policy.Window)))
			} else {
				into.keep("the log of timeline %d from here on", t.ID)
			}
		}
		first := d.leadsIn(l, t.ID, bases, d.walFrom)
		if first == nil {
			nothing("on the way to timeline %d no good backup is as old as %s", t.ID, date(d.walFrom))
			continue
		}
		lower(floors, l.From(base(first.Record), t.ID))
		// What led to a moment that left the window a grace ago at most stays, too,
		// also where no plan has said so: a timeline may have begun before the end of
		// the backup that led into the window.
		if late := d.leadsIn(l, t.ID, back, d.walFrom.Add(-d.policy.Grace)); late != nil {
			lower(grace, l.From(base(late.Record), t.ID))
		}
	}
	if w.Why != "" {
		return w
	}
	w.Why = "all moments since " + date(d.walFrom) + ", and what backups need themselves"
	if !live {
		w.Why = "the cluster has another system now; only what backups need themselves"
	}
	for _, t := range l.Timelines {
		from, used := floors[t.ID]
		if !used {
			for _, r := range t.Ranges {
				from = max(from, r.To)
			}
			for _, at := range t.Partials {
				from = max(from, at+pg.LSN(l.SegmentSize))
			}
		}
		w.from[t.ID] = from // what is there may lead on from below the floor
		if at, ok := grace[t.ID]; ok {
			w.from[t.ID] = min(from, at)
		}
		w.Segments += w.going(t, w.from[t.ID])
		if from > 0 {
			w.Floors = append(w.Floors, repo.Floor{Timeline: t.ID, From: from})
		}
	}
	return w
}

// lower brings floors down to others.
func lower(floors map[pg.Timeline]pg.LSN, to iter.Seq2[pg.Timeline, pg.LSN]) {
	for on, from := range to {
		if at, ok := floors[on]; !ok || from < at {
			floors[on] = from
		}
	}
}

// live reports whether moments of an archive may be promised: not if a backup of
// another system shows, before what is kept begins, that the cluster went on there
// since the last that happened here.
func (d *decider) live(l audit.Ledger) bool {
	last := d.evidence(l)
	for _, e := range d.all {
		if e.Physical != nil && e.good() && archiveOf(e.Record) != l.Archive && e.ended().Before(d.walFrom) && e.ended().After(last) {
			return false
		}
	}
	return true
}

// evidence is when something happened last in an archive.
func (d *decider) evidence(l audit.Ledger) (last time.Time) {
	seen := func(t time.Time) {
		if t.After(last) {
			last = t
		}
	}
	for _, t := range l.Timelines {
		seen(t.Born)
		for _, r := range t.Ranges {
			seen(r.Last)
		}
	}
	for _, e := range d.all {
		if e.Physical != nil && e.alive() && archiveOf(e.Record) == l.Archive {
			seen(e.ended())
			seen(e.FinishedAt)
		}
	}
	return last
}

// inUse is live for a timeline of an archive.
func (d *decider) inUse(t audit.Timeline, bases []*entry) bool {
	last := t.Born
	seen := func(at time.Time) {
		if at.After(last) {
			last = at
		}
	}
	for _, r := range t.Ranges {
		seen(r.Last)
	}
	for _, e := range bases {
		if e.Physical.StopTimeline == t.ID {
			seen(e.FinishedAt)
		}
	}
	return !slices.ContainsFunc(bases, func(e *entry) bool {
		return e.Physical.StopTimeline != t.ID && e.ended().After(last) && e.ended().Before(d.walFrom)
	})
}

// leadsIn is the newest good backup, on the way to a timeline, that ended before
// some time.
func (d *decider) leadsIn(l audit.Ledger, t pg.Timeline, bases []*entry, from time.Time) (first *entry) {
	for _, e := range bases {
		if e.ended().After(from) || !l.On(base(e.Record), t) {
			continue
		}
		if _, ok := l.Reach(base(e.Record), t); !ok {
			continue
		}
		if first == nil || e.Physical.Stop > first.Physical.Stop {
			first = e
		}
	}
	return first
}

// going counts the segments of a timeline below a floor that no backup needs
// itself.
func (w WAL) going(t audit.Timeline, floor pg.LSN) (n int) {
	for _, r := range t.Ranges {
		if to := min(r.To, floor); r.From < to {
			n += audit.Range{From: r.From, To: to}.Segments(w.SegmentSize)
		}
	}
	for name := range w.own {
		_, at, err := pg.ParseSegmentName(name, w.SegmentSize)
		if err != nil || name[:8] != t.ID.String() || at >= floor {
			continue
		}
		if slices.ContainsFunc(t.Ranges, func(r audit.Range) bool { return r.From <= at && at < r.To }) {
			n--
		}
	}
	return n
}
