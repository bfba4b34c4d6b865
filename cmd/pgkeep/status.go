package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/workflows"
)

func statusCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "status",
		Usage:    "show how each cluster is backed up: what there is, what runs, what is wrong",
		Category: backups,
		Description: "The repository is asked, the servers of this host, and Temporal. What does not answer\n" +
			"is said to be unknown; only the repository must answer.\n\n" + examples("pgkeep status", "", "pgkeep status --cluster main --json", ""),
		Flags:  []cli.Flag{clusterFlag(), jsonFlag()},
		Action: func(c *cli.Context) error { return e.status(c.Context, c.String("cluster"), c.Bool("json")) },
	}
}

// A statusShown is how a cluster is backed up. What is null is not known, or not
// there.
type statusShown struct {
	Cluster   string            `json:"cluster"`
	Backups   []newestShown     `json:"newest_backups"` // of each kind that there is
	From      *time.Time        `json:"window_from"`    // the first moment of the newest run of moments without a gap
	Until     *time.Time        `json:"window_until"`
	Proven    []provenShown     `json:"proven"` // of each kind of which a restore test passed
	Archiver  *cluster.Archiver `json:"archiver"`
	Unasked   string            `json:"archiver_unknown,omitempty"` // why Archiver is null
	Schedules []runsShown       `json:"schedules"`                  // null: Temporal does not answer
	Running   []runShown        `json:"running"`                    // likewise
	Findings  []health.Finding  `json:"findings"`                   // as check has them
}

// A newestShown is the newest backup of a kind that counts.
type newestShown struct {
	Kind     repo.Kind `json:"kind"`
	ID       repo.ID   `json:"id"`
	Finished time.Time `json:"finished_at"`
	Bytes    int64     `json:"bytes"`
	Stored   int64     `json:"stored"`
	Count    int       `json:"count"` // how many there are of the kind
}

// A provenShown is the newest moment that came back in a restore test.
type provenShown struct {
	Kind   repo.Kind `json:"kind"`
	Moment time.Time `json:"moment"`
	Backup repo.ID   `json:"backup"`
	Tested time.Time `json:"tested_at"`
	RTO    float64   `json:"rto_seconds"` // how long it took
}

type runsShown struct {
	Kind   string     `json:"kind"`
	Next   *time.Time `json:"next"`
	Last   *time.Time `json:"last"`
	Paused bool       `json:"paused"`
}

func (e *env) status(ctx context.Context, only string, asJSON bool) error {
	all, err := e.look(ctx, only)
	if err != nil {
		return err
	}
	cfg, err := e.config()
	if err != nil {
		return err
	}
	schedules, running, noTemporal := e.inTemporal(ctx)
	now := time.Now()
	var shown []statusShown
	for _, c := range all {
		s := c.status(now)
		e.askArchiver(ctx, cfg, &s)
		if noTemporal == nil {
			s.Schedules, s.Running = []runsShown{}, []runShown{}
			for _, one := range schedules[c.Cluster] {
				s.Schedules = append(s.Schedules, runsShown{one.Kind, jsonTime(one.Next), jsonTime(one.Last), one.Paused})
			}
			for _, run := range running {
				if strings.HasPrefix(run.Workflow, "pgkeep/"+c.Cluster+"/") {
					s.Running = append(s.Running, run)
				}
			}
		}
		shown = append(shown, s)
	}
	if asJSON {
		return printJSON(e.out, "status", struct {
			Clusters []statusShown `json:"clusters"`
		}{append([]statusShown{}, shown...)})
	}
	if noTemporal != nil {
		e.say("schedules and runs are not known: %s", oneLine(noTemporal.Error()))
	}
	if len(shown) == 0 {
		e.say("there is no cluster, neither in the repository nor in the configuration")
	}
	for i, s := range shown {
		if i > 0 {
			fmt.Fprintln(e.out)
		}
		if err := s.print(e, now); err != nil {
			return err
		}
	}
	return nil
}

// inTemporal asks Temporal for schedules, by cluster, and for what runs.
func (e *env) inTemporal(ctx context.Context) (map[string][]health.Schedule, []runShown, error) {
	s, err := e.temporal(ctx)
	if err != nil {
		return nil, nil, err
	}
	defer s.Close()
	schedules, err := e.schedulesOn(ctx, s)
	if err != nil {
		return nil, nil, err
	}
	running, err := s.running(ctx, "")
	return schedules, running, err
}

// askArchiver asks the server of a cluster of this host.
func (e *env) askArchiver(ctx context.Context, cfg *config.Config, s *statusShown) {
	settings, ok := cfg.Clusters[config.Name(s.Cluster)]
	switch {
	case !ok:
		s.Unasked = "the cluster is not in the configuration here"
		return
	case settings.Host != "" && settings.Host != cfg.Host:
		s.Unasked = "the cluster is of host " + string(settings.Host)
		return
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	at, err := reach(settings)
	if err == nil {
		var a cluster.Archiver
		if a, err = at.Archiver(ctx); err == nil {
			s.Archiver = &a
			return
		}
	}
	s.Unasked = oneLine(err.Error())
}

// status is what the repository says.
func (c examined) status(now time.Time) statusShown {
	s := statusShown{Cluster: c.Cluster, Backups: []newestShown{}, Proven: []provenShown{}, Findings: append([]health.Finding{}, c.found...)}
	for _, kind := range kinds {
		if p, ok := c.Proven(now, kind); ok {
			s.Proven = append(s.Proven, provenShown{kind, p.Moment, p.ID, p.Test.FinishedAt, p.Test.Report.RTO})
		}
		b, ok := c.Newest(now, kind)
		if !ok {
			continue
		}
		one := newestShown{kind, b.ID, b.FinishedAt, b.Bytes, b.Stored, 0}
		for _, b := range c.Backups {
			if b.Usable() && b.Kind == kind {
				one.Count++
			}
		}
		s.Backups = append(s.Backups, one)
	}
	if m, ok := c.Recoverable(); ok {
		s.From, s.Until = jsonTime(m.From), jsonTime(m.To)
	}
	return s
}

// print shows a cluster:
//
//	main
//	  physical   20261122T013000Z-4f2a9c01, 3h12m ago, 42.5 MiB stored; 14 in all
//	  window     2026-11-08 01:52:00Z to 2026-11-22 14:06:01Z, 1m30s ago
//	  proven     physical, 20261121T013000Z-28aa91c0, up to 1d2h ago, restored in 4m10s
//	  archiving  nothing waits; the last file 1m30s ago
//	  next       physical 2026-11-23 01:30:00Z, logical paused
//	  running    PhysicalBackup for 3m12s: CopyCluster 1.2 GiB of 4.0 GiB (30 %)
//	  WARNING    the newest logical backup is 9d2h old, and should be 8d0h at most
func (s statusShown) print(e *env, now time.Time) error {
	var lines [][2]string
	add := func(what, format string, args ...any) {
		lines = append(lines, [2]string{"  " + what, fmt.Sprintf(format, args...)})
	}
	for _, b := range s.Backups {
		add(string(b.Kind), "%s, %s ago, %s stored; %d in all", b.ID, span(now.Sub(b.Finished)), size(b.Stored), b.Count)
	}
	if s.Until != nil {
		add("window", "%s to %s, %s ago", moment(*s.From), moment(*s.Until), span(now.Sub(*s.Until)))
	}
	for _, p := range s.Proven {
		add("proven", "%s, %s, up to %s ago, restored in %s", p.Kind, p.Backup, span(now.Sub(p.Moment)), span(time.Duration(p.RTO*float64(time.Second))))
	}
	add("archiving", "%s", s.archiving())
	if s.Schedules != nil {
		var next []string
		for _, one := range s.Schedules {
			switch {
			case one.Paused:
				next = append(next, one.Kind+" paused")
			case one.Next != nil:
				next = append(next, one.Kind+" "+moment(*one.Next))
			}
		}
		if len(next) == 0 {
			next = []string{"nothing is scheduled"}
		}
		add("next", "%s", strings.Join(next, ", "))
	}
	for _, r := range s.Running {
		doing := ""
		if n := len(r.Activities); n > 0 {
			doing = ": " + r.Activities[n-1].Name + " " + r.Activities[n-1].doing()
		}
		add("running", "%s for %s%s", strings.TrimPrefix(r.Type, workflows.TypePrefix), span(now.Sub(r.Started)), doing)
	}
	for _, f := range s.Findings {
		add(strings.ToUpper(string(f.Severity)), "%s", oneLine(f.What))
	}
	fmt.Fprintln(e.out, s.Cluster)
	return pairs(e.out, lines)
}

func (s statusShown) archiving() string {
	a := s.Archiver
	switch {
	case a == nil:
		return "not known: " + s.Unasked
	case !a.Archiving && a.Standby:
		return "a standby: the primary archives"
	case !a.Archiving:
		return "off"
	}
	text := "nothing waits"
	if a.Waiting > 0 {
		text = fmt.Sprintf("%s, for %s", count(a.Waiting, "file")+" waiting", span(a.Now.Sub(a.Oldest)))
	}
	if !a.LastArchived.IsZero() {
		text += "; the last file " + span(a.Now.Sub(a.LastArchived)) + " ago"
	}
	if a.LastFailed.After(a.LastArchived) {
		text += "; FAILED " + span(a.Now.Sub(a.LastFailed)) + " ago"
	}
	return text
}
