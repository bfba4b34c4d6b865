// Package report makes a page for people of what is known about backups: one
// HTML file that needs nothing else.
package report

import (
	"cmp"
	_ "embed"
	"fmt"
	"html/template"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/human"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// Facts are what a page tells.
type Facts struct {
	Made       time.Time
	Version    string // of pgkeep
	Repository string // its address
	// Unscheduled says why nothing is known of schedules; "": it is.
	Unscheduled string
	Clusters    []Cluster
}

// A Cluster is what is known of one cluster.
type Cluster struct {
	health.Stored
	Findings  []health.Finding
	Schedules []health.Schedule
}

//go:embed page.tmpl
var text string

// Write writes the page: HTML in UTF-8, without scripts, that loads nothing. The
// same facts make the same page. Names and texts among them may hold anything.
func Write(w io.Writer, f Facts) error {
	t, err := template.New("page").Parse(text)
	if err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	if err := t.Execute(w, pageOf(f)); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

// What follows is the page as the template takes it: texts, and places in
// drawings.

type page struct {
	Made, Version, Repository, Unscheduled string

	Clusters []section
}

type section struct {
	Name      string
	ID        string // of the section in the page
	State     string // "sound", or the worst severity
	About     string
	Findings  []health.Finding
	Newest    string // age of the newest backup
	Until     string // to which moment it can be brought back
	Proven    string
	Chart     *chart // nil: there is nothing to draw
	Plots     []plot
	Backups   []backupRow
	Tests     []testRow
	Schedules []scheduleRow
}

type backupRow struct {
	ID, Kind, Started, Took, Size, Stored, At, Verified, Proof string
	Bad                                                        bool   // Proof is a failure
	Err                                                        string // why nothing else is known
}

type testRow struct {
	Backup, Started, Verdict, Reached, RTO, Lost, Log, Tables, Rows, Why string
	Bad                                                                  bool
}

type scheduleRow struct{ Kind, Cron, State, Last, Next, Lost string }

func pageOf(f Facts) page {
	p := page{Made: human.Moment(f.Made), Version: f.Version, Repository: f.Repository, Unscheduled: f.Unscheduled}
	for i, c := range f.Clusters {
		p.Clusters = append(p.Clusters, c.section(i, f.Made))
	}
	return p
}

func (c Cluster) section(i int, now time.Time) section {
	s := section{Name: c.Cluster, ID: "c" + strconv.Itoa(i), State: "sound", Findings: c.Findings, Chart: c.chart(now), Plots: c.plots()}
	for _, f := range c.Findings {
		if s.State == "sound" || f.Severity == health.Critical || s.State == string(health.Notice) {
			s.State = string(f.Severity)
		}
	}
	if b, ok := c.Newest(now); ok {
		s.Newest = ago(b.FinishedAt, now)
		s.About = fmt.Sprintf("PostgreSQL %v, system %v", b.Version, b.System)
	}
	if at, ok := c.Until(); ok {
		s.Until = fmt.Sprintf("%s (%s)", human.Moment(at), ago(at, now))
	}
	var proven []string
	for _, kind := range kinds {
		if p, ok := c.Proven(now, kind); ok {
			proven = append(proven, string(kind)+" "+ago(p.Moment, now))
		} else if c.Has(kind) {
			proven = append(proven, string(kind)+" never")
		}
	}
	s.Proven = strings.Join(proven, ", ")
	for _, b := range slices.Backward(c.Backups) {
		s.Backups = append(s.Backups, backupOf(b, now))
		for _, t := range b.Tests {
			s.Tests = append(s.Tests, testOf(t))
		}
	}
	slices.SortStableFunc(s.Tests, func(a, b testRow) int { return cmp.Compare(b.Started, a.Started) })
	for _, sch := range c.Schedules {
		s.Schedules = append(s.Schedules, scheduleOf(sch))
	}
	return s
}

func ago(t, now time.Time) string { return human.Span(now.Sub(t)) + " ago" }

// minute shows a time in UTC without its seconds.
func minute(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04")
}

func seconds(s float64) string {
	if s > 0 && s < 10 {
		return strconv.FormatFloat(s, 'f', 1, 64) + "s"
	}
	return human.Span(time.Duration(s * float64(time.Second)))
}

// thousands shows a number in groups of three digits, held together by thin
// spaces.
func thousands(n int64) string {
	s := strconv.FormatInt(n, 10)
	for i := len(s) - 3; i > 0; i -= 3 {
		s = s[:i] + "\u202f" + s[i:]
	}
	return s
}

func backupOf(b health.Backup, now time.Time) backupRow {
	row := backupRow{ID: string(b.ID), Kind: string(b.Kind), Started: minute(b.ID.Time())}
	switch {
	case b.Err != nil:
		row.Err = b.Err.Error()
		return row
	case b.Unfinished:
		row.Err = "not finished"
		return row
	}
	row.Took, row.Size, row.Stored = human.Span(b.FinishedAt.Sub(b.StartedAt)), human.Size(b.Bytes), human.Size(b.Stored)
	row.At, row.Verified, row.Proof = b.LSN.After.String(), string(b.Verified), "unproven"
	if b.Physical != nil && b.Physical.Damaged > 0 {
		row.Verified, row.Bad = human.Count(b.Physical.Damaged, "damaged page"), true
	}
	if t, ok := b.Tested(now); ok && t.Passed {
		row.Proof = "proven " + ago(t.FinishedAt, now)
	} else if ok {
		row.Proof, row.Bad = "failed "+ago(t.FinishedAt, now), true
	}
	return row
}

func testOf(t health.Test) testRow {
	row := testRow{Backup: string(t.ID), Started: minute(t.Test.Time()), Verdict: string(proof.Passed)}
	if t.Err != nil {
		row.Verdict, row.Bad, row.Why = "not to be believed", true, t.Err.Error()
		return row
	}
	r := t.Report.Public()
	row.RTO, row.Log, row.Tables, row.Rows = seconds(r.RTO), strconv.Itoa(r.Segments), thousands(int64(r.Tables)), thousands(r.Rows)
	if r.Reached.LSN != 0 {
		row.Reached = r.Reached.LSN.String()
	}
	if r.Lag != nil {
		row.Lost = fmt.Sprintf("%s, %s", seconds(r.Lag.Seconds), human.Size(r.Lag.Bytes))
	}
	if !t.Passed {
		row.Verdict, row.Bad, row.Why = string(proof.Failed), true, r.Summary()
	}
	if !t.Answered() {
		row.Verdict = "no answer"
	}
	return row
}

func scheduleOf(s health.Schedule) scheduleRow {
	row := scheduleRow{Kind: s.Kind, Cron: strings.TrimSpace(s.Cron + " " + s.TimeZone), State: "waiting", Last: minute(s.Last), Next: minute(s.Next)}
	switch {
	case s.Paused:
		row.State = strings.TrimSuffix("paused: "+s.Note, ": ")
	case s.Running:
		row.State = "running"
	case !s.Failed.IsZero():
		row.State = "failed " + minute(s.Failed)
	}
	row.Lost = fmt.Sprintf("%d missed, %d skipped", s.Missed, s.Skipped)
	return row
}

// kinds of backups, in the order in which they are drawn.
var kinds = []repo.Kind{repo.Physical, repo.Logical}
