package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A proofShown is what restore tests say about a backup, as list and show print
// it.
type proofShown struct {
	State    proof.State `json:"state"`
	ProvenAt *time.Time  `json:"proven_at"` // when a test passed last
	// Of the newest test that came to an answer.
	Test       repo.ID       `json:"test,omitempty"`
	Host       string        `json:"host,omitempty"`
	FinishedAt *time.Time    `json:"finished_at,omitempty"`
	RTO        float64       `json:"rto_seconds,omitempty"`
	Failure    string        `json:"failure,omitempty"` // what is wrong, if it did not pass
	Report     *proof.Report `json:"report,omitempty"`  // with findings where a key at hand opens them; show only
	// Trouble is what kept a newer test from an answer.
	Trouble string `json:"trouble,omitempty"`

	at time.Time
}

// shownProof reads the proofs of a backup.
func shownProof(ctx context.Context, r *repo.Repo, b repo.Ref, within time.Duration, now time.Time) (*proofShown, proof.Standing, error) {
	all, err := r.Proofs(ctx, b)
	if err != nil {
		return nil, proof.Standing{}, err
	}
	s := proof.Judge(all, now)
	p := &proofShown{State: s.State(within, now), ProvenAt: jsonTime(s.At), Test: s.Last.Test, Host: s.Last.Host, FinishedAt: jsonTime(s.Last.FinishedAt),
		RTO: s.Report.RTO, at: s.At}
	if s.Last.Test != "" {
		p.Failure = message(s.Report.Err())
	}
	if s.Trouble.Test != "" {
		p.Trouble = message(s.Troubled.Err())
	}
	return p, s, nil
}

func message(err error) string {
	if err == nil {
		return ""
	}
	return strings.TrimPrefix(err.Error(), "restore test: ")
}

// prove adds to each backup what restore tests say about it.
func prove(ctx context.Context, r *repo.Repo, shown []backupShown, within time.Duration, now time.Time) error {
	group, asking := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for i := range shown {
		if shown[i].State == complete {
			group.Go(func() (err error) {
				shown[i].Proof, _, err = shownProof(asking, r, shown[i].Ref, within, now)
				return err
			})
		}
	}
	return group.Wait()
}

// word is the cell of a list.
func (p *proofShown) word(now time.Time) string {
	switch {
	case p == nil:
		return ""
	case p.State == proof.Proven:
		return span(now.Sub(p.at)) + " ago"
	case p.State == proof.Refuted:
		return "FAILED"
	}
	return string(p.State)
}

// standing says in words what restore tests have shown.
func (p *proofShown) standing(now time.Time) string {
	if p == nil {
		return ""
	}
	text := map[proof.State]string{proof.Unproven: "unproven", proof.Proven: "proven", proof.Refuted: "the last restore test FAILED: " + p.Failure}[p.State]
	if !p.at.IsZero() {
		text += ", passed " + span(now.Sub(p.at)) + " ago"
	}
	if p.Trouble != "" {
		text += "; a newer test came to no answer: " + p.Trouble
	}
	return text
}

// whole is the report of the newest test with an answer, with findings where a
// key opens them.
func whole(r *repo.Repo, s proof.Standing) (proof.Report, error) {
	var rep proof.Report
	err := r.OpenProofDetails(s.Last, &rep)
	if errors.Is(err, fail.NoKey) || err == nil && len(rep.Checks) == 0 {
		return s.Report, nil
	}
	return rep, err
}

// printProof prints the newest test of a backup: what was found, and how long
// each part took.
func (e *env) printProof(p *proofShown) error {
	if p == nil || p.Test == "" {
		return nil
	}
	rep := p.Report
	lines := [][2]string{
		{"restore test", string(p.Test) + " on " + p.Host + ", " + string(rep.Verdict)},
		{"recovered to", recoveredTo(*rep)},
		{"time to restore", spent(rep.RTO) + phasesOf(*rep)},
		{"behind source", behind(rep.Lag)},
		{"looked at", fmt.Sprintf("%s: %s, %d B-trees (%d compared with their tables), %d rows, %s", count(rep.Databases, "database"), count(rep.Tables, "table"), rep.Indexes, rep.Compared, rep.Rows, size(rep.Bytes))},
		{"isolation", isolationOf(*rep)},
	}
	fmt.Fprintln(e.out)
	if err := pairs(e.out, lines); err != nil {
		return err
	}
	fmt.Fprintln(e.out)
	var rows [][]string
	for _, c := range rep.Checks {
		rows = append(rows, []string{c.Name, string(c.Verdict), fmt.Sprint(c.Items), fmt.Sprint(c.Failed), spent(c.Seconds), oneLine(c.Message)})
	}
	if err := table(e.out, "CHECK VERDICT LOOKED-AT FAILED TIME WHAT", rows); err != nil {
		return err
	}
	for _, c := range rep.Checks {
		for _, f := range c.Findings {
			fmt.Fprintf(e.out, "%s: %s\n", c.Name, strings.ReplaceAll(f, "\n", "\n    "))
		}
	}
	return nil
}

func recoveredTo(r proof.Report) string {
	if r.Reached.LSN == 0 {
		return "-"
	}
	text := fmt.Sprintf("%v on timeline %d, with %s of log", r.Reached.LSN, r.Reached.Timeline, count(r.Segments, "segment"))
	if !r.Reached.LastCommit.IsZero() {
		text += "; last commit " + moment(r.Reached.LastCommit)
	}
	return text
}

func phasesOf(r proof.Report) string {
	var parts []string
	for _, p := range r.Phases {
		text := p.Name + " " + spent(p.Seconds)
		if rate := p.Rate(); rate > 0 {
			text += " at " + size(int64(rate)) + "/s"
		}
		parts = append(parts, text)
	}
	return " (" + strings.Join(parts, ", ") + ")"
}

func behind(l *proof.Lag) string {
	if l == nil {
		return "not known"
	}
	return size(l.Bytes) + " of log, " + spent(l.Seconds)
}

func isolationOf(r proof.Report) string {
	i := r.Isolation
	if i.User == "" {
		return "-"
	}
	text := "as " + i.User
	if i.Network {
		text += ", without a network"
	} else {
		text += ", NOT apart from the network"
	}
	if !i.Processes {
		text += ", among all processes of the host"
	}
	if !i.Files {
		text += ", NOT apart from the files of the host"
	}
	return text
}

// spent writes a time that may be short.
func spent(seconds float64) string {
	if seconds < 10 {
		return fmt.Sprintf("%.2fs", seconds)
	}
	return span(time.Duration(seconds * float64(time.Second)))
}
