package report

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/human"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// An axis is time from left to right, in per cent of the width.
type axis struct{ from, to time.Time }

func (a axis) at(t time.Time) float64 {
	if a.to.Equal(a.from) {
		return 50
	}
	x := 100 * float64(t.Sub(a.from)) / float64(a.to.Sub(a.from))
	return max(0, min(100, x))
}

func percent(x float64) string { return strconv.FormatFloat(x, 'f', 2, 64) + "%" }

// A tick is a labelled moment of an axis.
type tick struct{ X, Label string }

// ticks are at most six round moments within a, none of them near to its ends.
func (a axis) ticks() (all []tick) {
	const day = 24 * time.Hour
	for _, step := range []struct {
		every  time.Duration
		layout string
	}{
		{time.Minute, "15:04"}, {10 * time.Minute, "15:04"}, {time.Hour, "15:04"}, {6 * time.Hour, "15:04"},
		{day, "01-02"}, {2 * day, "01-02"}, {7 * day, "01-02"}, {14 * day, "01-02"}, {28 * day, "01-02"},
		{91 * day, "2006-01"}, {364 * day, "2006-01"}, {5 * 364 * day, "2006-01"},
	} {
		if a.to.Sub(a.from) > 6*step.every {
			continue
		}
		for t := a.from.UTC().Truncate(step.every); !t.After(a.to); t = t.Add(step.every) {
			if x := a.at(t); x > 4 && x < 96 {
				all = append(all, tick{percent(x), t.Format(step.layout)})
			}
		}
		return all
	}
	return nil
}

// A chart is the life of a cluster's backups as rows over one axis of time.
type chart struct {
	From, To string
	Ticks    []tick
	Bands    []band // one for each archive
	Rows     []dots
	Missing  []string // the moments that cannot be reached, in words
}

// A band shows to which moments an archive leads.
type band struct {
	Label       string
	Good, Holes []bar
}

type bar struct{ X, Width, Title string }

// dots are things that happened at one moment each.
type dots struct {
	Label string
	Marks []mark
}

type mark struct {
	X, Y, Title string
	Bad         bool
}

// chart draws what there is up to now; nil if there is nothing.
func (c Cluster) chart(now time.Time) *chart {
	a := axis{now, now}
	for _, b := range c.Backups {
		if t := b.ID.Time(); t.Before(a.from) {
			a.from = t
		}
	}
	for _, archive := range c.Archives {
		if t := begin(archive); !t.IsZero() && t.Before(a.from) {
			a.from = t
		}
	}
	if !a.from.Before(now) {
		return nil
	}
	ch := &chart{From: minute(a.from), To: minute(now), Ticks: a.ticks()}
	for _, archive := range c.Archives {
		b := band{Label: "window"}
		if len(c.Archives) > 1 {
			b.Label = "PG " + strconv.Itoa(archive.Major)
		}
		reached := c.Window(archive)
		for _, m := range reached {
			b.Good = append(b.Good, a.bar(m, "Every moment from "+human.Moment(m.From)+" to "+human.Moment(m.To)))
		}
		for _, m := range between(reached, archive) {
			text := "No moment between " + human.Moment(m.From) + " and " + human.Moment(m.To)
			if !m.To.After(m.From) {
				text = "No moment after " + human.Moment(m.From)
			}
			b.Holes = append(b.Holes, a.bar(m, text))
			ch.Missing = append(ch.Missing, text)
		}
		ch.Bands = append(ch.Bands, b)
	}
	for _, kind := range kinds {
		row := dots{Label: string(kind)}
		for _, b := range c.Backups {
			if b.Usable() && b.Kind == kind {
				bad := b.Physical != nil && b.Physical.Damaged > 0
				row.Marks = append(row.Marks, mark{X: percent(a.at(b.FinishedAt)), Bad: bad, Title: fmt.Sprintf("%s backup %s", kind, b.ID)})
			}
		}
		if len(row.Marks) > 0 {
			ch.Rows = append(ch.Rows, row)
		}
	}
	tests := dots{Label: "tests"}
	for _, b := range c.Backups {
		for _, t := range b.Tests {
			bad, verdict := t.Err != nil || !t.Passed, "passed"
			if bad {
				verdict = "failed"
			}
			if !t.Answered() {
				verdict = "came to no answer"
			}
			tests.Marks = append(tests.Marks, mark{X: percent(a.at(t.Test.Time())), Bad: bad, Title: fmt.Sprintf("restore test of %s %s", t.ID, verdict)})
		}
	}
	if len(tests.Marks) > 0 {
		ch.Rows = append(ch.Rows, tests)
	}
	return ch
}

// bar is never too narrow to be seen.
func (a axis) bar(m health.Moments, title string) bar {
	from, to := a.at(m.From), a.at(m.To)
	width := max(to-from, 0.4)
	return bar{percent(min(from, 100-width)), percent(width), title}
}

// between are the moments between those that can be reached, and from the last
// of them to where the archive ends; of an archive that leads nowhere, all.
func between(reached []health.Moments, a audit.Report) (missing []health.Moments) {
	newest, _, _ := a.Newest()
	switch {
	case newest.IsZero():
		return nil
	case len(reached) == 0:
		return []health.Moments{{From: begin(a), To: newest}}
	}
	for i, m := range reached[1:] {
		missing = append(missing, health.Moments{From: reached[i].To, To: m.From})
	}
	last := reached[len(reached)-1].To
	if newest.After(last) || len(missing) == 0 && len(a.Holes) > 0 { // clocks may differ: a hole is never hidden
		missing = append(missing, health.Moments{From: last, To: newest})
	}
	return missing
}

// begin is when the first segment was archived; zero if there is none.
func begin(a audit.Report) (first time.Time) {
	for _, t := range a.Timelines {
		for _, r := range t.Ranges {
			if first.IsZero() || r.First.Before(first) {
				first = r.First
			}
		}
	}
	return first
}

// A plot shows how a number went.
type plot struct {
	Title        string
	Newest       string
	Top          string // the highest number
	From, To     string
	Lines        []line
	Points, More []mark // More: of the second series
	Desc         string
}

type line struct {
	X1, Y1, X2, Y2 string
	More           bool
}

// A point of a plot.
type point struct {
	at    time.Time
	value float64
	bad   bool // there is no number
	more  bool // it is of the second series
	title string
}

// Of the area of a plot, in pixels.
const plotTop, plotBottom = 16.0, 92.0

// draw makes a plot; false if there is too little to show.
func draw(title string, points []point, show func(float64) string) (p plot, ok bool) {
	if len(points) < 2 {
		return p, false
	}
	slices.SortStableFunc(points, func(a, b point) int { return a.at.Compare(b.at) })
	a, top := axis{points[0].at, points[len(points)-1].at}, 0.0
	for _, q := range points {
		top = max(top, q.value)
	}
	p = plot{Title: title, Top: show(top), From: a.from.UTC().Format("01-02"), To: a.to.UTC().Format("01-02")}
	place := func(q point) (x, y string) {
		up := 0.0
		if top > 0 {
			up = q.value / top
		}
		return percent(2 + 0.96*a.at(q.at)), strconv.FormatFloat(plotBottom-up*(plotBottom-plotTop), 'f', 1, 64)
	}
	var last [2]*mark
	bad := 0
	for _, q := range points {
		m := mark{Title: q.title, Bad: q.bad}
		m.X, m.Y = place(q)
		series := 0
		if q.more {
			series = 1
			p.More = append(p.More, m)
		} else {
			p.Points = append(p.Points, m)
		}
		if q.bad {
			bad++
			continue
		}
		if l := last[series]; l != nil {
			p.Lines = append(p.Lines, line{l.X, l.Y, m.X, m.Y, q.more})
		}
		last[series] = &m
		if !q.more {
			p.Newest = show(q.value)
		}
	}
	p.Desc = fmt.Sprintf("%s between %s and %s: the highest is %s, the newest %s.", title, minute(a.from), minute(a.to), p.Top, p.Newest)
	if bad > 0 {
		p.Desc += fmt.Sprintf(" %d failed.", bad)
	}
	return p, true
}

// plots of a cluster: what restores took and lost, how large backups are, how
// fast the log grows.
func (c Cluster) plots() (all []plot) {
	var rto, rpo, sizes []point
	both := c.Has(repo.Physical)
	for _, b := range c.Backups {
		for _, t := range b.Tests {
			at, r := t.Test.Time(), t.Report
			switch {
			case t.Err != nil:
				continue
			case !t.Passed:
				rto = append(rto, point{at: at, bad: true, title: minute(at) + ": failed"})
				continue
			}
			rto = append(rto, point{at: at, value: r.RTO, title: minute(at) + ": " + seconds(r.RTO)})
			if r.Lag != nil {
				rpo = append(rpo, point{at: at, value: r.Lag.Seconds, title: minute(at) + ": " + seconds(r.Lag.Seconds)})
			}
		}
		if b.Usable() {
			sizes = append(sizes, point{at: b.StartedAt, value: float64(b.Stored), more: both && b.Kind == repo.Logical,
				title: fmt.Sprintf("%s: %s, %s", minute(b.StartedAt), b.Kind, human.Size(b.Stored))})
		}
	}
	bytes := func(n float64) string { return human.Size(int64(n)) }
	for _, of := range []struct {
		title  string
		points []point
		show   func(float64) string
	}{
		{"Restore took (RTO)", rto, seconds},
		{"Restore lost (RPO)", rpo, seconds},
		{"Stored size", sizes, bytes},
		{"Log per day", c.rates(), bytes},
	} {
		if p, ok := draw(of.title, of.points, of.show); ok {
			all = append(all, p)
		}
	}
	return all
}

// rates are how much log a day was written up to each backup, and up to now.
func (c Cluster) rates() (all []point) {
	type position struct {
		at time.Time
		pg.LSN
	}
	of := make(map[pg.SystemID][]position)
	for _, b := range c.Backups {
		if b.Usable() {
			of[b.System] = append(of[b.System], position{b.StartedAt, b.LSN.Before})
		}
	}
	for _, a := range c.Archives {
		if at, _, to := a.Newest(); !at.IsZero() {
			of[a.System] = append(of[a.System], position{at, to})
		}
	}
	for _, system := range slices.Sorted(maps.Keys(of)) {
		positions := of[system]
		slices.SortFunc(positions, func(a, b position) int { return a.at.Compare(b.at) })
		var last position
		for _, p := range positions {
			passed := p.at.Sub(last.at)
			if !last.at.IsZero() && passed < time.Hour { // too short to tell
				continue
			}
			if !last.at.IsZero() && p.LSN >= last.LSN {
				rate := float64(p.LSN-last.LSN) * float64(24*time.Hour) / float64(passed)
				all = append(all, point{at: p.at, value: rate, title: minute(p.at) + ": " + human.Size(int64(rate)) + " a day"})
			}
			last = p
		}
	}
	return all
}
