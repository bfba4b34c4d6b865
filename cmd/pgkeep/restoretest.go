package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/urfave/cli/v2"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/temporal"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/sandbox"
	"github.com/pgkeep/pgkeep/internal/schedule"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/workflows"
)

func restoreTestCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "restore-test",
		Usage:     "restore a backup into a sandbox, and prove that it works",
		ArgsUsage: "[BACKUP]",
		Category:  backups,
		Description: "The worker of a host restores the backup, replays the log, opens the cluster without a\n" +
			"network, and looks at every page, table and index, and at what restore_test of its\n" +
			"configuration asserts. What it found is written beside the backup, signed: see \"pgkeep\n" +
			"show\". BACKUP is an id, the beginning of one, or \"latest\"; if none is named, the policy\n" +
			"chooses. If something is wrong, the exit status is 50.\n\n" + examples(
			"pgkeep restore-test", "of the only cluster, as the policy has it",
			"pgkeep restore-test --cluster main --policy oldest-unproven", "whose turn it is",
			"pgkeep restore-test --to-time '2026-11-22 10:00:00 UTC' --host db2", "of a moment, on another host",
			"pgkeep restore-test --detach latest", "and do not wait"),
		Flags: append(momentFlags(), []cli.Flag{
			clusterFlag(),
			&cli.StringFlag{Name: "policy", Usage: "choose by `POLICY`: newest, random, oldest-unproven or random-moment"},
			&cli.StringFlag{Name: "host", Usage: "let the worker of `HOST` do it; else that of the cluster's host"},
			boolFlag("thorough", "look for every row in every index, not only in small ones and those whose turn it is"),
			boolFlag("wait", "wait until it is done; this is what happens anyway"),
			boolFlag("detach", "do not wait"),
			boolFlag("direct", "do it here and now, without Temporal"),
			jsonFlag(),
		}...),
		Action: func(c *cli.Context) error {
			return e.restoreTest(c.Context, testOptions{dirOptions: dirOptionsOf(c), Policy: c.String("policy"),
				Thorough: c.Bool("thorough"), Wait: c.Bool("wait"), Detach: c.Bool("detach"), Direct: c.Bool("direct")})
		},
	}
}

type testOptions struct {
	dirOptions // the moment, the backup, cluster, host and form of the answer
	Policy     string
	Thorough   bool
	Wait       bool
	Detach     bool
	Direct     bool
}

// request says what is asked for.
func (opt testOptions) request() (q proof.Request, err error) {
	if opt.Wait && opt.Detach || opt.Direct && opt.Detach {
		return q, config.Errorf("--detach excludes --wait and --direct")
	}
	if opt.Direct && opt.Host != "" {
		return q, config.Errorf("--direct and --host exclude each other: run it there")
	}
	q.Thorough = opt.Thorough
	target, err := opt.target()
	if err != nil {
		return q, err
	}
	if target != (restore.Target{Kind: restore.Latest}) {
		q.Target = &target
	}
	if opt.Policy == "" {
		return q, nil
	}
	if opt.Backup != "" || q.Target != nil {
		return q, config.Errorf("--policy chooses what to test: name neither backup nor moment beside it")
	}
	q.Policy, err = proof.ParsePolicy(opt.Policy)
	return q, err
}

func (e *env) restoreTest(ctx context.Context, opt testOptions) error {
	q, err := opt.request()
	if err != nil {
		return err
	}
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return err
	}
	if q.Cluster, err = whichOf(ctx, cfg, r, opt.Cluster); err != nil {
		return err
	}
	if opt.Backup != "" {
		all, err := r.Backups(ctx, q.Cluster)
		if err != nil {
			return err
		}
		b, err := pick(all, opt.Backup)
		if err == nil {
			_, err = finished(b)
		}
		if err != nil {
			return fmt.Errorf("cluster %s: %w", q.Cluster, err)
		}
		q.Backup = b.ID
	}
	if opt.Direct {
		return e.testDirect(ctx, cfg, q, opt)
	}
	host := cmp.Or(opt.Host, string(cfg.Clusters[config.Name(q.Cluster)].Host), string(cfg.Host))
	return e.testOn(ctx, cfg, host, q, opt)
}

// testOn lets the worker of a host do it.
func (e *env) testOn(ctx context.Context, cfg *config.Config, host string, q proof.Request, opt testOptions) error {
	s, err := e.temporal(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	start := client.StartWorkflowOptions{ID: workflows.RestoreTestWorkflowID(q.Cluster), TaskQueue: workflows.Queue,
		WorkflowExecutionErrorWhenAlreadyStarted: true, WorkflowRunTimeout: runTimeout, StaticSummary: "restore test of " + q.Cluster + " on " + host,
		Memo: map[string]any{"pgkeep.requestedFrom": string(cfg.Host), "pgkeep.version": thisVersion().Version}}
	if searchable, err := schedule.Searchable(ctx, s, s.namespace); err != nil {
		return err
	} else if searchable {
		start.TypedSearchAttributes = temporal.NewSearchAttributes(workflows.PgkeepCluster.ValueSet(q.Cluster),
			workflows.PgkeepKind.ValueSet(workflows.KindRestoreTest), workflows.PgkeepHost.ValueSet(host))
	}
	run, err := s.ExecuteWorkflow(ctx, start, workflows.RestoreTestName, workflows.RestoreTestRequest{Host: host, Request: q})
	if temporal.IsWorkflowExecutionAlreadyStartedError(err) {
		return fail.With(fail.AlreadyRunning, fmt.Errorf("a backup of %s is being tested already, by workflow %s", q.Cluster, start.ID))
	}
	if err != nil {
		return fmt.Errorf("start restore test: %w", err)
	}
	link := s.link(run.GetID(), run.GetRunID())
	e.say("restore test of %s on %s started", q.Cluster, host)
	if link != "" {
		e.say("%s", link)
	}
	if opt.Detach {
		return e.printStarted("restore-test", s, run.GetID(), run.GetRunID(), opt.JSON)
	}
	var res workflows.RestoreTestResult
	if err := e.await(ctx, s, run, &res); err != nil {
		return err
	}
	return e.printTest(res, link, opt.JSON)
}

// testDirect makes the test in this process.
func (e *env) testDirect(ctx context.Context, cfg *config.Config, q proof.Request, opt testOptions) (err error) {
	log, err := e.log()
	if err != nil {
		return err
	}
	st, access, err := storeAndKeys(ctx, cfg)
	if err != nil {
		return err
	}
	id, started := newRun()
	t := testerOf(cfg, st, access, log)
	bars := &stages{e: e}
	defer bars.End()
	s, err := t.Plan(ctx, q, id, started, backup.Owner{})
	defer func() {
		tidy, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, t.CleanUp(tidy, s))
	}()
	if err != nil {
		return err
	}
	var trouble error
	for _, step := range []func(context.Context, proof.Subject, proof.Progress) (proof.Report, error){t.Restore, t.Recover, t.Check} {
		rep, err := step(ctx, s, bars.Set)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if trouble = err; err != nil || rep.Failed() {
			break
		}
	}
	rep, err := t.Report(ctx, s, time.Now().UTC().Truncate(time.Millisecond), trouble)
	bars.End()
	if err == nil {
		err = rep.Err()
	}
	if err != nil {
		return err
	}
	return e.printTest(workflows.RestoreTestResult{Subject: s, Report: rep}, "", opt.JSON)
}

func (e *env) printTest(res workflows.RestoreTestResult, link string, asJSON bool) error {
	if asJSON {
		return printJSON(e.out, "restore-test", struct {
			workflows.RestoreTestResult
			Link string `json:"link,omitempty"`
		}{res, link})
	}
	r := res.Report
	lag := ""
	if r.Lag != nil {
		lag = fmt.Sprintf(", %s of log behind the source", size(r.Lag.Bytes))
	}
	_, err := fmt.Fprintf(e.out, "%s  %s  proven: restored in %s, %s of log%s; %s, %d B-trees, %d rows\n", res.Subject.ID, res.Subject.Cluster,
		span(seconds(r.RTO)), count(r.Segments, "segment"), lag, count(r.Tables, "table"), r.Indexes, r.Rows)
	return err
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// testerOf is who tests backups on this host.
func testerOf(c *config.Config, st store.Store, a repo.Access, log *slog.Logger) *proof.Tester {
	s := c.RestoreTest
	return &proof.Tester{Host: string(c.Host), Log: log, Policy: proof.Policy(s.Policy), Limit: s.Limit, Jobs: s.Jobs, Thorough: s.Thorough,
		Open: func(ctx context.Context) (*repo.Repo, error) { return repo.Open(ctx, st, a) },
		Prepare: func(name string) (restore.Physical, error) {
			p, err := serverNeeds(c, name)
			p.Fetch = append(p.Fetch, "--judge")
			return p, err
		},
		Source: func(name string) (cluster.Cluster, bool) {
			_, at, err := clusterOf(c, name)
			return at, err == nil
		},
		Sandbox: sandboxOf(c, log),
		Assertions: func(name string) (all []proof.Assertion) {
			for _, one := range s.Assertions {
				if one.Cluster == "" || string(one.Cluster) == name {
					all = append(all, proof.Assertion{Name: one.Name, Database: one.Database, Query: one.Query, Want: one.Want, Timeout: one.Timeout})
				}
			}
			return all
		}}
}

// sandboxOf says where restored data is opened, without a name.
func sandboxOf(c *config.Config, log *slog.Logger) sandbox.Options {
	s := c.RestoreTest
	return sandbox.Options{Parent: string(s.Directory), BinDir: string(s.BinDir), User: s.User, BestEffort: s.Isolation == config.BestEffort,
		Memory: int64(s.Memory), Preload: s.Preload, Log: log}
}
