package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/report"
	"github.com/pgkeep/pgkeep/internal/schedule"
)

func reportCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "report",
		Usage:    "make a page for people: what can be recovered, what was proven",
		Category: backups,
		Description: "One HTML file that needs nothing else: the moments that can be recovered, backups,\n" +
			"restore tests with how long they took and what they lost. Next runs are shown where\n" +
			"Temporal answers; the rest needs only the repository.\n\n" + examples(
			"pgkeep report > backups.html", "of all clusters",
			"pgkeep report --cluster main --output main.html", "of one, replacing the file"),
		Flags: []cli.Flag{
			clusterFlag(),
			&cli.StringFlag{Name: "output", Usage: "write to `FILE` in place of standard output"},
		},
		Action: func(c *cli.Context) error { return e.report(c.Context, c.String("cluster"), c.String("output")) },
	}
}

func (e *env) report(ctx context.Context, cluster, output string) error {
	now := time.Now()
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return err
	}
	names, err := e.clusters(ctx, cfg, r, cluster)
	if err != nil {
		return err
	}
	facts := report.Facts{Made: now, Version: thisVersion().Version, Repository: cfg.Repository.URL.String()}
	schedules, err := e.schedules(ctx)
	if err != nil {
		facts.Unscheduled = "Next runs are not known: " + oneLine(err.Error())
	}
	for _, name := range names {
		s, err := health.Look(ctx, r, name, audit.Memory(cfg.Spool), now)
		if err != nil {
			return err
		}
		facts.Clusters = append(facts.Clusters, report.Cluster{Stored: s, Findings: s.Findings(expected(cfg, name), now), Schedules: schedules[name]})
	}
	write := func(w io.Writer) error { return report.Write(w, facts) }
	if output == "" {
		return write(e.out)
	}
	if err := durable.WriteFile(output, 0o644, write); err != nil {
		return fmt.Errorf("write report: %w", err)
	}
	return nil
}

// clusters are the one that is named, or all that are known, in order.
func (e *env) clusters(ctx context.Context, cfg *config.Config, r *repo.Repo, name string) ([]string, error) {
	if name != "" {
		name, err := whichOf(ctx, cfg, r, name)
		return []string{name}, err
	}
	names, err := r.Clusters(ctx)
	for n := range cfg.Clusters {
		names = append(names, string(n))
	}
	slices.Sort(names)
	return slices.Compact(names), err
}

// schedules are those of the Temporal server, by cluster.
func (e *env) schedules(ctx context.Context) (map[string][]health.Schedule, error) {
	s, err := e.temporal(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	return e.schedulesOn(ctx, s)
}

func (e *env) schedulesOn(ctx context.Context, s *server) (map[string][]health.Schedule, error) {
	cfg, err := e.config()
	if err != nil {
		return nil, err
	}
	have, err := schedule.List(ctx, s, ids(wanted(cfg, false))...)
	if err != nil {
		return nil, err
	}
	of := make(map[string][]health.Schedule)
	for _, h := range have {
		cluster, kind, _ := strings.Cut(strings.TrimPrefix(h.ID, "pgkeep/"), "/")
		one := health.Schedule{Kind: kind, Cron: h.Cron, TimeZone: h.TimeZone, Paused: h.Paused, Note: h.Note,
			Next: h.Next, Every: h.Every, Last: h.Last, Running: len(h.Running) > 0, Missed: h.Missed, Skipped: h.Skipped}
		if _, ours := cfg.Clusters[config.Name(cluster)]; ours {
			last, err := schedule.LastEnded(ctx, s, h)
			if err != nil {
				return nil, err
			}
			if !last.Done {
				one.Failed, one.Run = last.At, last.Run.WorkflowID
			}
		}
		of[cluster] = append(of[cluster], one)
	}
	return of, nil
}
