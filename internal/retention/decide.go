package retention

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

const (
	// Skew is how far the clock may be behind what it is compared with.
	Skew = 5 * time.Minute
	// abandoned is when a backup that was never finished counts as given up, if
	// another of its kind was begun later and finished: one at a time is taken, and
	// none of them takes longer.
	abandoned = 29 * 24 * time.Hour
	// few removals are never too many at once, and many are, however many there
	// are; between them three in ten are not.
	few, many = 3, 25
	// silence is how long at least nothing new may have come for time to pass.
	silence = 48 * time.Hour
)

// Decide says what of a cluster stays, and what goes.
//
// Only good backups count: those that can be read, whose pages and restore tests
// were sound, and whose own log is there. Others are kept for as long as the
// window says, or as there is no good one after them. The newest good backup of a
// kind and the newest proven one stay, whatever the policy; so does what somebody
// holds, what is under way, and what that has pinned.
func Decide(p Policy, f Facts) Plan {
	d := decider{policy: p, facts: f, plan: Plan{Cluster: f.Cluster, Now: f.Now}, from: f.Now.Add(-p.Window - Skew)}
	d.collect()
	if !p.IsZero() {
		d.clock()
	}
	d.keep()
	d.log()
	d.conclude()
	return d.plan
}

// A decider goes through a decision once.
type decider struct {
	policy Policy
	facts  Facts
	plan   Plan

	all  []*entry  // oldest first
	from time.Time // where the window begins, and a little before: clocks differ
	// walFrom is from when on the log is needed: from, or the beginning of a backup
	// under way.
	walFrom time.Time
	blind   bool // what is there is not all known: everything stays
}

// An entry is a backup while it is decided about.
type entry struct {
	repo.Record
	kind    repo.Kind
	at      time.Time // what it holds is at least so old
	bad     string    // why it is no good backup; "": it is one
	reasons []string  // to keep it
	because string    // of all that goes: why
}

func (e *entry) keep(format string, args ...any) {
	e.reasons = append(e.reasons, fmt.Sprintf(format, args...))
}

// alive reports whether e is finished and not marked.
func (e *entry) alive() bool { return e.Err == nil && !e.Unfinished && e.Deleted == nil }

// good reports whether e counts.
func (e *entry) good() bool { return e.alive() && e.bad == "" }

// ended is the first moment that e can bring back.
func (e *entry) ended() time.Time {
	if e.Physical != nil {
		return e.Physical.StoppedAt
	}
	return e.FinishedAt
}

func (d *decider) against(format string, args ...any) {
	d.plan.Against = append(d.plan.Against, fmt.Sprintf(format, args...))
}

// collect says of each backup what it is.
func (d *decider) collect() {
	for _, b := range d.facts.Backups {
		e := &entry{Record: b, kind: b.Kind, at: b.ID.Time()}
		switch {
		case b.Err != nil && b.Deleted == nil:
			d.blind = true
			d.against("backup %s cannot be read, so nothing is known to be without use: %v", b.ID, b.Err)
		case b.Unfinished:
			e.kind = b.Intent.Kind
		case b.Err != nil:
		case b.Physical != nil && b.Physical.Damaged > 0:
			e.bad = "has damaged pages"
		case b.Proof != nil && !b.Proof.Passed:
			e.bad = "failed its restore test"
		case b.Physical != nil && !d.complete(b):
			e.bad = "its own log is not all there"
		}
		d.all = append(d.all, e)
	}
	for a, err := range d.facts.Damage {
		d.blind = true
		d.against("the archive of system %v, PostgreSQL %d, cannot be read: %v", a.System, a.Major, err)
	}
	slices.Sort(d.plan.Against) // a map has no order
	slices.SortStableFunc(d.all, func(a, b *entry) int { return a.at.Compare(b.at) })
}

// clock compares the time with what has happened by it. One that runs ahead, or
// behind, or goes on while no backups come, would let everything go.
func (d *decider) clock() {
	var times []time.Time
	newest, what := time.Time{}, ""
	seen := func(t time.Time, of string) {
		if t.After(newest) {
			newest, what = t, of
		}
	}
	for _, e := range d.all {
		if e.alive() {
			times = append(times, e.at)
		}
		seen(e.at, "backup "+string(e.ID))
		seen(e.FinishedAt, "backup "+string(e.ID))
	}
	for _, l := range d.facts.Archives {
		for _, t := range l.Timelines {
			for _, r := range t.Ranges {
				seen(r.Last, "WAL of timeline "+t.ID.String())
			}
		}
	}
	if newest.Sub(d.facts.Now) > Skew {
		d.against("%s is of %s, and it is %s now: a clock is wrong", what, date(newest), date(d.facts.Now))
	}
	if len(times) == 0 {
		return
	}
	patience, last := silence, times[len(times)-1]
	for i := max(1, len(times)-10); i < len(times); i++ {
		patience = max(patience, 3*times[i].Sub(times[i-1]))
	}
	if quiet := d.facts.Now.Sub(last); quiet > patience {
		d.against("the newest backup is of %s, and it is %s now: either the clock is wrong or backups are not taken any more", date(last), date(d.facts.Now))
	}
}

func date(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05Z") }

// keep gives each backup its reasons.
func (d *decider) keep() {
	d.walFrom = d.from
	pinnedBy := make(map[repo.ID]repo.ID)
	for _, e := range d.all {
		for _, h := range e.Holds {
			e.keep("hold: %s", h.Reason)
		}
		switch {
		case d.policy.IsZero():
			e.keep("no retention is configured")
		case d.blind:
			e.keep("not all that is there can be read")
		}
		if !e.Unfinished || e.Deleted != nil {
			continue
		}
		if !d.givenUp(e) {
			e.keep("in progress")
		}
		if t := e.at.Add(-time.Hour); t.Before(d.walFrom) {
			d.walFrom = t
		}
		for _, id := range e.Intent.Pins {
			pinnedBy[id] = e.ID
		}
	}
	for _, kind := range []repo.Kind{repo.Logical, repo.Physical} {
		d.keepKind(kind)
	}
	for _, e := range d.all {
		if by, ok := pinnedBy[e.ID]; ok {
			e.keep("needed by %s, in progress", by)
		}
		if e.alive() && e.kind != repo.Logical && e.kind != repo.Physical {
			e.keep("of a kind this pgkeep does not know")
		}
	}
}

// UnderWay is the physical backup that goes on yet, as far as that can be known:
// one at a time is taken, and none that was begun later is finished. "": there is
// none. It may need log of before it began, however old: a copy of a standby begins
// at the last restartpoint there.
func UnderWay(all []repo.Record) (id repo.ID) {
	for _, b := range all {
		switch {
		case b.Unfinished && b.Deleted == nil && b.Intent.Kind != repo.Logical:
			id = b.ID
		case b.Physical != nil:
			id = ""
		}
	}
	return id
}

// givenUp reports whether an unfinished backup is taken for abandoned. Were it
// not, its publication would fail, and harm nothing.
func (d *decider) givenUp(e *entry) bool {
	if d.facts.Now.Sub(e.at) < abandoned {
		return false
	}
	return slices.ContainsFunc(d.all, func(o *entry) bool { return o.alive() && o.at.After(e.at) && (e.kind == "" || o.kind == e.kind) })
}

func (d *decider) keepKind(kind repo.Kind) {
	var all, good []*entry
	for _, e := range d.all {
		if e.alive() && e.kind == kind {
			all = append(all, e)
			if e.good() {
				good = append(good, e)
			}
		}
	}
	if len(good) == 0 {
		for _, e := range all {
			e.keep("no backup of this kind is good")
		}
		return
	}
	newest := good[len(good)-1]
	newest.keep("newest")
	for _, e := range slices.Backward(good) {
		if e.Proof != nil {
			e.keep("last proven")
			break
		}
	}
	for i, e := range slices.Backward(good) {
		if len(good)-i <= max(1, d.policy.Min) && e != newest {
			e.keep("min %d", d.policy.Min)
		}
	}
	for _, e := range all {
		switch {
		case d.policy.Window > 0 && !e.ended().Before(d.from):
			e.keep("window")
		case !e.good() && e.at.After(newest.at):
			e.keep("no good one after it")
		case !e.good():
			e.because = e.bad
		}
	}
	periods(good, "daily", d.policy.Daily, func(t time.Time) string { return t.Format(time.DateOnly) })
	periods(good, "weekly", d.policy.Weekly, func(t time.Time) string {
		year, week := t.ISOWeek()
		return fmt.Sprintf("%d-W%02d", year, week)
	})
	periods(good, "monthly", d.policy.Monthly, func(t time.Time) string { return t.Format("2006-01") })
}

// periods keeps the newest of each of the n newest periods. Around an upgrade
// both systems may be backed up: then it keeps the newest of each.
func periods(good []*entry, rule string, n int, period func(time.Time) string) {
	type slot struct {
		period string
		system pg.SystemID
	}
	var seen []string
	taken := make(map[slot]bool)
	for _, e := range slices.Backward(good) {
		at := period(e.at.UTC())
		if !slices.Contains(seen, at) {
			if len(seen) == n {
				return
			}
			seen = append(seen, at)
		}
		if s := (slot{at, e.System}); !taken[s] {
			taken[s] = true
			e.keep("%s %s", rule, at)
		}
	}
}

// conclude turns reasons into verdicts, and counts what goes.
func (d *decider) conclude() {
	going := 0
	for _, e := range d.all {
		v := Verdict{ID: e.ID, Kind: e.Kind, Stored: e.Stored, Keep: len(e.reasons) > 0, Reasons: e.reasons, Deleted: e.Deleted != nil}
		switch {
		case v.Deleted:
			v.Keep, v.Reasons = false, []string{"deleted " + date(e.Deleted.DeletedAt)}
			if !e.Deleted.PurgeAfter.IsZero() {
				v.Reasons = append(v.Reasons, "can be brought back until "+date(e.Deleted.PurgeAfter))
			}
		case v.Keep:
		case e.Unfinished:
			v.Reasons = []string{"never finished"}
		default:
			v.Reasons = []string{cmp.Or(e.because, "older than the rules ask for")}
			going++
		}
		d.plan.Backups = append(d.plan.Backups, v)
	}
	if standing := d.plan.standing(); going > max(few, min(many, standing*3/10)) {
		d.plan.Confirm = going
	}
}
