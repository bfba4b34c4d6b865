package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/repo"
)

func checkCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "check",
		Usage:    "find out whether backups are as they should be",
		Category: backups,
		Description: "Only the repository is asked. How old a backup may be follows from the schedules of\n" +
			"the configuration: one and a half times the time between two. Without a schedule it\n" +
			"is 8 days. Twice that, a hole in the log, a restore test that failed: these are\n" +
			"critical, and the exit status is 51. pgkeep doctor looks at everything else.\n\n" + examples(
			"pgkeep check", "", "pgkeep check --nagios --cluster main", "one line, perfdata, exit status 0 to 3"),
		Flags: []cli.Flag{clusterFlag(), boolFlag("nagios", "answer as a plug-in of Nagios and its like"), timeoutFlag("2m, or 8s with --nagios, which NRPE gives 10s"), jsonFlag()},
		Action: func(c *cli.Context) error {
			limit := 2 * time.Minute
			if c.Bool("nagios") {
				limit = 8 * time.Second
			}
			limit = timeout(c, limit)
			ctx, cancel := context.WithTimeout(c.Context, limit)
			defer cancel()
			all, err := e.look(ctx, c.String("cluster"))
			if err != nil && ctx.Err() != nil && c.Context.Err() == nil {
				err = late(limit, err)
			}
			if !c.Bool("nagios") {
				return e.check(all, err, c.Bool("json"))
			}
			line, status := nagios(all, err, time.Now())
			fmt.Fprintln(e.out, line)
			return status
		},
	}
}

func timeoutFlag(otherwise string) cli.Flag {
	return &cli.DurationFlag{Name: "timeout", Usage: "give up after `TIME`; if none is given, " + otherwise}
}

func timeout(c *cli.Context, otherwise time.Duration) time.Duration {
	return cmp.Or(c.Duration("timeout"), otherwise)
}

// late says what it means that time is up.
func late(limit time.Duration, err error) error {
	return fail.Hint(fail.With(fail.StoreDown, fmt.Errorf("the repository did not answer all within %v: %w", limit, err)),
		"is the store up? An archive of years may take longer: --timeout")
}

func (e *env) check(all []examined, err error, asJSON bool) error {
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return fail.Hint(config.Errorf(noCluster), "describe a cluster under clusters in the configuration")
	}
	var found []health.Finding
	for _, c := range all {
		found = append(found, c.found...)
	}
	return e.printFindings("check", found, asJSON)
}

// An examined cluster is what is known of one, what is expected, and what is wrong.
type examined struct {
	health.Stored
	policy health.Policy
	found  []health.Finding
}

// look looks at one cluster, or at all.
func (e *env) look(ctx context.Context, cluster string) ([]examined, error) {
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return nil, err
	}
	names, err := e.clusters(ctx, cfg, r, cluster)
	if err != nil {
		return nil, err
	}
	var all []examined
	for _, name := range names {
		now := time.Now()
		s, err := health.Look(ctx, r, name, audit.Memory(cfg.Spool), now)
		if err != nil {
			return nil, err
		}
		p := expected(cfg, name)
		all = append(all, examined{s, p, s.Findings(p, now)})
	}
	return all, nil
}

const noCluster = "the repository is empty, and no cluster is configured"

// A plugin's status is how Nagios knows what it found. It is an error, and has
// been told.
type pluginStatus int

func (s pluginStatus) Error() string { return fmt.Sprintf("plug-in status %d", int(s)) }

// nagios is the answer of a plug-in: one line with perfdata, and the status.
// See "Monitoring Plugins Development Guidelines". err is why nothing is known.
func nagios(all []examined, err error, now time.Time) (string, error) {
	if err != nil {
		return "PGKEEP UNKNOWN - " + plain(err.Error()), pluginStatus(3)
	}
	words, status := "OK", pluginStatus(0)
	var wrong, good, data []string
	for _, c := range all {
		for _, f := range c.found {
			switch {
			case f.Severity == health.Critical:
				words, status = "CRITICAL", 2
			case f.Severity == health.Warning && status == 0:
				words, status = "WARNING", 1
			case f.Severity == health.Notice:
				continue
			}
			wrong = append(wrong, f.Cluster+": "+f.What)
		}
		good = append(good, c.sound(now))
		data = append(data, c.perfdata(now)...)
	}
	text := wrong
	switch {
	case len(all) == 0:
		return "PGKEEP UNKNOWN - " + noCluster, pluginStatus(3)
	case status == 0:
		text = good
	}
	line := "PGKEEP " + words + " - " + plain(strings.Join(text, "; "))
	if len(data) > 0 {
		line += " | " + strings.Join(data, " ")
	}
	if status == 0 {
		return line, nil
	}
	return line, status
}

// plain is a text that a plug-in may print.
func plain(s string) string {
	return strings.NewReplacer("|", "/", "\n", " ", "\r", " ").Replace(s)
}

// kinds of backups, in the order in which they are told.
var kinds = []repo.Kind{repo.Physical, repo.Logical}

// sound says what is good about a cluster.
func (c examined) sound(now time.Time) string {
	parts := []string{}
	if b, ok := c.Newest(now); ok {
		parts = append(parts, "newest backup "+span(now.Sub(b.FinishedAt))+" old")
	}
	if at, ok := c.Until(); ok {
		parts = append(parts, "every moment up to "+span(now.Sub(at))+" ago")
	}
	for _, kind := range kinds {
		if p, ok := c.Proven(now, kind); ok {
			parts = append(parts, string(kind)+" proven up to "+span(now.Sub(p.Moment))+" ago")
		}
	}
	return c.Cluster + ": " + strings.Join(parts, ", ")
}

// perfdata are the numbers of a cluster: 'label'=value;warning;critical. What is
// not known is U.
func (c examined) perfdata(now time.Time) (data []string) {
	add := func(label, value, limits string) {
		data = append(data, fmt.Sprintf("'%s_%s'=%s%s", c.Cluster, label, value, limits))
	}
	age := func(at time.Time, ok bool) string {
		if !ok {
			return "U"
		}
		return fmt.Sprintf("%ds", max(0, int64(now.Sub(at).Seconds())))
	}
	for _, kind := range kinds {
		limit := c.Limit(c.policy, kind, now)
		if limit == 0 && !c.Has(kind) {
			continue
		}
		within := ""
		if limit > 0 {
			within = fmt.Sprintf(";%d;%d", int64(limit.Seconds()), int64(2*limit.Seconds()))
		}
		b, ok := c.Newest(now, kind)
		add(string(kind)+"_age", age(b.FinishedAt, ok), within)
		within = ""
		if limit := c.policy.ProofLimit(kind); limit > 0 {
			within = fmt.Sprintf(";%d", int64(limit.Seconds()))
		}
		p, ok := c.Proven(now, kind)
		add(string(kind)+"_proven_age", age(p.Moment, ok), within)
	}
	if len(c.Archives) > 0 {
		at, ok := c.Until()
		add("window_age", age(at, ok), "")
		add("holes", fmt.Sprint(len(c.Holes())), ";;0")
	}
	return data
}
