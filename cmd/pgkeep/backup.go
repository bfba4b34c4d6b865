package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/temporal"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/schedule"
	"github.com/pgkeep/pgkeep/workflows"
)

func backupCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "backup",
		Usage:     "take a backup now",
		ArgsUsage: "[CLUSTER]",
		Category:  backups,
		Description: "A worker on the cluster's host takes it; this command starts it and, unless told otherwise,\n" +
			"waits. Interrupting the command does not interrupt the backup.\n\n" + examples(
			"pgkeep backup", "of the only cluster in the configuration",
			"pgkeep backup --kind logical main", "with pg_dump",
			"pgkeep backup --database sales main", "of one database",
			"pgkeep backup --detach main", "and do not wait"),
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "kind", Usage: "take a backup of `KIND`, physical or logical; if not given, physical of a cluster on this host"},
			&cli.StringSliceFlag{Name: "database", Usage: "dump only `DATABASE`; may be repeated"},
			boolFlag("wait", "wait until it is done; this is what happens anyway"),
			boolFlag("detach", "do not wait"),
			boolFlag("direct", "take it here and now, without Temporal"),
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			return e.backup(c.Context, backupOptions{Cluster: c.Args().First(), Kind: c.String("kind"), Databases: c.StringSlice("database"),
				Wait: c.Bool("wait"), Detach: c.Bool("detach"), Direct: c.Bool("direct"), JSON: c.Bool("json")})
		},
	}
}

type backupOptions struct {
	Cluster   string // "": the only one
	Kind      string // "": what the cluster allows
	Databases []string
	Wait      bool
	Detach    bool
	Direct    bool
	JSON      bool
}

// runTimeout ends a run that would otherwise stand in the way of the next for ever.
const runTimeout = 28 * 24 * time.Hour

func (e *env) backup(ctx context.Context, opt backupOptions) error {
	if opt.Wait && opt.Detach || opt.Direct && opt.Detach {
		return config.Errorf("--detach excludes --wait and --direct")
	}
	cfg, err := e.config()
	if err != nil {
		return err
	}
	name, settings, err := theCluster(cfg, opt.Cluster)
	if err != nil {
		return err
	}
	if opt.Kind, err = kindOf(opt, settings); err != nil {
		return err
	}
	if opt.Direct {
		return e.backupDirect(ctx, cfg, name, settings, opt)
	}
	host := string(cmp.Or(settings.Host, cfg.Host))
	s, err := e.temporal(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	run, err := s.startBackup(ctx, name, host, string(cfg.Host), opt)
	if err != nil {
		return err
	}
	link := s.link(run.GetID(), run.GetRunID())
	e.say("%s backup of %s started", opt.Kind, name)
	if link != "" {
		e.say("%s", link)
	}
	if opt.Detach {
		return e.printStarted("backup", s, run.GetID(), run.GetRunID(), opt.JSON)
	}
	if opt.Kind == workflows.Physical {
		var res workflows.PhysicalBackupResult
		if err := e.await(ctx, s, run, &res); err != nil {
			return err
		}
		return e.printPhysical(name, link, res, opt.JSON)
	}
	var res workflows.LogicalBackupResult
	if err := e.await(ctx, s, run, &res); err != nil {
		return err
	}
	return e.printLogical(name, link, res, opt.JSON)
}

// kindOf decides which kind of backup is meant: of single databases, and of a
// cluster on another host, only a logical one can be taken.
func kindOf(opt backupOptions, c config.Cluster) (string, error) {
	kind := opt.Kind
	if kind == "" {
		kind = workflows.Logical
		if len(opt.Databases) == 0 && c.Conninfo.IsLocal() {
			kind = workflows.Physical
		}
	}
	if kind != workflows.Physical && kind != workflows.Logical {
		return "", config.Errorf("--kind %s: want %q or %q", kind, workflows.Physical, workflows.Logical)
	}
	if kind == workflows.Physical && len(opt.Databases) > 0 {
		return "", fail.Hint(config.Errorf("a physical backup is of all databases"), "--kind logical dumps single ones")
	}
	return kind, nil
}

// startBackup starts the workflow that takes a backup.
func (s *server) startBackup(ctx context.Context, cluster, host, from string, opt backupOptions) (client.WorkflowRun, error) {
	start := client.StartWorkflowOptions{
		ID: workflows.BackupWorkflowID(cluster, opt.Kind), TaskQueue: workflows.Queue,
		WorkflowExecutionErrorWhenAlreadyStarted: true, // else this would be somebody else's backup
		WorkflowRunTimeout:                       runTimeout,
		StaticSummary:                            opt.Kind + " backup of " + cluster,
		Memo:                                     map[string]any{"pgkeep.requestedFrom": from, "pgkeep.version": thisVersion().Version},
	}
	if searchable, err := schedule.Searchable(ctx, s, s.namespace); err != nil {
		return nil, err
	} else if searchable {
		start.TypedSearchAttributes = temporal.NewSearchAttributes(workflows.PgkeepCluster.ValueSet(cluster),
			workflows.PgkeepKind.ValueSet(opt.Kind), workflows.PgkeepHost.ValueSet(host))
	}
	var run client.WorkflowRun
	var err error
	if opt.Kind == workflows.Physical {
		run, err = s.ExecuteWorkflow(ctx, start, workflows.PhysicalBackupName, workflows.PhysicalBackupRequest{Cluster: cluster, Host: host})
	} else {
		run, err = s.ExecuteWorkflow(ctx, start, workflows.LogicalBackupName,
			workflows.LogicalBackupRequest{Cluster: cluster, Host: host, Databases: opt.Databases})
	}
	if temporal.IsWorkflowExecutionAlreadyStartedError(err) {
		return nil, fail.With(fail.AlreadyRunning, fmt.Errorf("a %s backup of %s is running already, as workflow %s", opt.Kind, cluster, start.ID))
	}
	if err != nil {
		return nil, fmt.Errorf("start backup: %w", err)
	}
	return run, nil
}

func (e *env) printLogical(cluster, link string, res workflows.LogicalBackupResult, asJSON bool) error {
	if asJSON {
		return printJSON(e.out, "backup", struct {
			Cluster string `json:"cluster"`
			workflows.LogicalBackupResult
			Link string `json:"link,omitempty"`
		}{cluster, res, link})
	}
	_, err := fmt.Fprintf(e.out, "%s  %s  %s, %s dumped, %s stored in %s, verified: %s\n",
		res.ID, cluster, count(res.Databases, "database"), size(res.Bytes), size(res.Stored), count(res.Packs, "pack"), res.Verified)
	return err
}

func (e *env) printPhysical(cluster, link string, res workflows.PhysicalBackupResult, asJSON bool) error {
	if asJSON {
		return printJSON(e.out, "backup", struct {
			Cluster string `json:"cluster"`
			workflows.PhysicalBackupResult
			Link string `json:"link,omitempty"`
		}{cluster, res, link})
	}
	c := res.Copy
	_, err := fmt.Fprintf(e.out, "%s  %s  %s in %s, %s sent, %s kept, LSN %v to %v, WAL archived, verified: %s\n",
		res.ID, cluster, size(c.Bytes), count(c.Files, "file"), size(c.Sent), size(c.Kept), c.Start, c.Stop, res.Verified)
	if c.Uncounted > 0 {
		e.say("not all rows were counted that count_rows names; pgkeep show %s says why", res.ID)
	}
	return err
}

// await waits for a run and shows meanwhile how far it is.
func (e *env) await(ctx context.Context, s *server, run client.WorkflowRun, res any) error {
	done := make(chan error, 1)
	go func() { done <- run.Get(ctx, res) }()
	var bar *progress
	var shown activityShown
	end := func() {
		if bar != nil {
			bar.End()
		}
		bar = nil
	}
	for tick := time.NewTicker(time.Second); ; {
		select {
		case err := <-done:
			tick.Stop()
			end()
			return e.ended(ctx, run, err)
		case <-tick.C:
		}
		now, ok := s.pending(ctx, run)
		if !ok {
			continue
		}
		if now.Name != shown.Name {
			end()
		}
		if now.Failure != "" && (now.Failure != shown.Failure || now.Name != shown.Name) {
			e.say("%s failed and is tried again: %s", strings.ToLower(now.Name), now.Failure)
		}
		shown = now
		if now.Progress == nil {
			continue
		}
		if bar == nil {
			bar = e.progress(now.Progress.Stage, now.Progress.Total)
		}
		bar.Set(now.Progress.Done, now.Progress.Total)
	}
}

// pending returns what the activity tells that a run is at.
func (s *server) pending(ctx context.Context, run client.WorkflowRun) (activityShown, bool) {
	d, err := s.DescribeWorkflowExecution(ctx, run.GetID(), run.GetRunID())
	if err != nil || len(d.PendingActivities) == 0 {
		return activityShown{}, false // run.Get tells what is wrong, if it lasts
	}
	return pendingActivity(d.PendingActivities[0]), true
}

// ended says how a run came out.
func (e *env) ended(ctx context.Context, run client.WorkflowRun, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		e.say("it goes on: pgkeep ps shows it, pgkeep cancel %s stops it", run.GetID())
		return fail.With(fail.Cancelled, errors.New("interrupted while waiting"))
	}
	if temporal.IsCanceledError(err) {
		return fail.With(fail.Cancelled, fmt.Errorf("it was cancelled"))
	}
	if _, ok := errors.AsType[*temporal.TerminatedError](err); ok {
		return fail.With(fail.Cancelled, fmt.Errorf("it was terminated"))
	}
	kind := fail.KindOf(err)
	var step string
	if act, ok := errors.AsType[*temporal.ActivityError](err); ok {
		step = strings.ToLower(act.ActivityType().GetName()) + ": "
	}
	hint := activities.AdviceOf(err)
	if app, ok := errors.AsType[*temporal.ApplicationError](err); ok {
		err = fail.With(kind, errors.New(step+app.Message()))
	}
	if hint != "" {
		err = fail.Hint(err, hint)
	}
	return err
}

// theCluster returns the settings of a cluster; without a name, of the only one.
func theCluster(cfg *config.Config, name string) (string, config.Cluster, error) {
	if name == "" && len(cfg.Clusters) == 1 {
		for only := range cfg.Clusters {
			name = string(only)
		}
	}
	if name == "" {
		var names []string
		for n := range cfg.Clusters {
			names = append(names, string(n))
		}
		if len(names) == 0 {
			return "", config.Cluster{}, fail.Hint(config.Errorf("no cluster in the configuration"), "describe one under clusters")
		}
		slices.Sort(names)
		return "", config.Cluster{}, fail.Hint(config.Errorf("which cluster?"), "one of: "+strings.Join(names, ", "))
	}
	settings, err := cfg.Cluster(name)
	return name, settings, err
}
