package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

func restoreCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "restore",
		Usage:     "restore a cluster to any moment, or a database of a logical backup",
		ArgsUsage: "[BACKUP]",
		Category:  backups,
		Description: "With --target-dir, a data directory is made of a physical backup and the archived\n" +
			"log: the newest backup that leads to the moment, if none is named. What cannot be\n" +
			"reached is refused before anything is written. The server recovers when it is\n" +
			"started.\n\n" +
			"Else BACKUP is a logical one: an id, the beginning of one, or \"latest\". The\n" +
			"database is made, if it is not there; one that holds something is refused. It goes\n" +
			"to the backup's own cluster, another one of the configuration, or any server.\n\n" +
			"Repository, key and this program are all it takes.\n\n" + examples(
			"pgkeep restore --target-dir /srv/pg/restored --dry-run", "what it does",
			"pgkeep restore --target-dir /srv/pg/restored", "all there is",
			"pgkeep restore --target-dir /srv/pg/restored --to-time '2026-11-22 10:00:00 Europe/Berlin'", "as of then",
			"pgkeep restore --database shop --to shop2 latest", "one database",
			"pgkeep restore --target 'host=db2 user=me' 20261122", "elsewhere",
			"pgkeep restore --globals latest > roles.sql", "for psql"),
		Flags: append(dirFlags(), []cli.Flag{
			clusterFlag(),
			&cli.StringFlag{Name: "database", Usage: "database `NAME` of the backup, if it holds several"},
			&cli.StringFlag{Name: "to", Usage: "into database `NAME`; else under its own name"},
			&cli.StringFlag{Name: "target-cluster", Usage: "in cluster `NAME` of the configuration"},
			&cli.StringFlag{Name: "target", Usage: "in the server that `CONNINFO` reaches"},
			&cli.StringFlag{Name: "target-password-file", Usage: "with the password in `FILE`, for --target"},
			&cli.IntFlag{Name: "jobs", Usage: "`N` tables or indexes at a time", Value: 2},
			boolFlag("no-owner", "everything belongs to the role that restores"),
			boolFlag("no-privileges", "grant nobody anything"),
			boolFlag("no-tablespaces", "use the tablespace of the database"),
			boolFlag("into-existing", "also into a database that holds something"),
			&cli.StringFlag{Name: "scratch", Usage: "unpack the dump in `DIR`, not in the spool"},
			boolFlag("dry-run", "say what would be done, and do nothing"),
			boolFlag("globals", "print the SQL of roles and tablespaces, only"),
			jsonFlag(),
		}...),
		Action: func(c *cli.Context) error {
			if err := ofOneKind(c); err != nil {
				return err
			}
			if c.IsSet("target-dir") {
				return e.restoreDir(c.Context, dirOptionsOf(c))
			}
			if c.NArg() == 0 {
				return fail.Hint(config.Errorf("BACKUP is missing"), "name a logical backup, or give --target-dir for a whole cluster, and --to-time or another moment")
			}
			return e.restore(c.Context, restoreOptions{
				Cluster: c.String("cluster"), Backup: c.Args().First(), Database: c.String("database"), To: c.String("to"),
				TargetCluster: c.String("target-cluster"), Target: c.String("target"), PasswordFile: c.String("target-password-file"),
				Jobs: c.Int("jobs"), NoOwner: c.Bool("no-owner"), NoPrivileges: c.Bool("no-privileges"), NoTablespaces: c.Bool("no-tablespaces"),
				Into: c.Bool("into-existing"), Scratch: c.String("scratch"),
				DryRun: c.Bool("dry-run"), Globals: c.Bool("globals"), JSON: c.Bool("json"),
			})
		},
	}
}

type restoreOptions struct {
	Cluster, Backup string
	Database, To    string

	TargetCluster string // at most one of the two
	Target        string
	PasswordFile  string // of Target

	Jobs                                       int
	NoOwner, NoPrivileges, NoTablespaces, Into bool
	Scratch                                    string

	DryRun, Globals, JSON bool
}

func (opt restoreOptions) check() error {
	switch {
	case opt.TargetCluster != "" && opt.Target != "":
		return config.Errorf("--target and --target-cluster exclude each other")
	case opt.PasswordFile != "" && opt.Target == "":
		return fail.Hint(config.Errorf("--target-password-file belongs to --target"), "a cluster in the configuration has its password_file there")
	case opt.Jobs < 1:
		return config.Errorf("--jobs %d: want 1 at least", opt.Jobs)
	case opt.Globals && opt.DryRun:
		return config.Errorf("--globals and --dry-run exclude each other: neither does anything")
	}
	return nil
}

func (e *env) restore(ctx context.Context, opt restoreOptions) error {
	if err := opt.check(); err != nil {
		return err
	}
	r, b, err := e.theBackup(ctx, opt.Cluster, opt.Backup, repo.Logical)
	if err != nil {
		return err
	}
	m, err := finished(b)
	if err != nil {
		return fmt.Errorf("restore %s: %w", b.ID, err)
	}
	log, err := e.log()
	if err != nil {
		return err
	}
	l := restore.Logical{Repo: r, Manifest: m, Database: opt.Database, To: opt.To, Into: opt.Into, NoOwner: opt.NoOwner,
		NoPrivileges: opt.NoPrivileges, NoTablespaces: opt.NoTablespaces, Jobs: opt.Jobs, Scratch: e.scratch(opt.Scratch), Log: log}
	if opt.Globals {
		return e.printGlobals(ctx, l, opt.JSON)
	}
	if l.Target, err = e.target(opt, m.Cluster); err != nil {
		return err
	}
	plan, err := l.Plan(ctx)
	if err != nil {
		return err
	}
	p := planShown{Plan: plan, Source: plan.Database.Name, TakenAt: plan.Database.TakenAt, Bytes: plan.Database.Bytes, Target: l.Target.String(), DryRun: opt.DryRun}
	if opt.DryRun {
		return e.printDry(p, opt.JSON)
	}
	for _, line := range p.lines() {
		e.say("%s", line)
	}
	began := time.Now()
	if err := e.runRestore(ctx, l, plan); err != nil {
		return e.left(ctx, l, plan, err)
	}
	p.Seconds = time.Since(began).Seconds()
	return e.printRestored(p, opt.JSON)
}

// target is where to restore to.
func (e *env) target(opt restoreOptions, own string) (cluster.Cluster, error) {
	if opt.Target != "" {
		var conninfo config.Conninfo
		if err := conninfo.UnmarshalText([]byte(opt.Target)); err != nil {
			return cluster.Cluster{}, fail.Hint(config.Errorf("--target: %w", err), "a password goes into a file, for --target-password-file")
		}
		return reach(config.Cluster{Conninfo: conninfo, PasswordFile: config.Path(opt.PasswordFile)})
	}
	cfg, err := e.config()
	if err != nil {
		return cluster.Cluster{}, err
	}
	settings, err := cfg.Cluster(cmp.Or(opt.TargetCluster, own))
	if err != nil && opt.TargetCluster == "" {
		return cluster.Cluster{}, fail.Hint(config.Errorf("restore to where? Cluster %s, of which the backup is, is not in the configuration", own),
			"give --target 'host=… user=…', or --target-cluster")
	}
	if err != nil {
		return cluster.Cluster{}, err
	}
	return reach(settings)
}

func (e *env) runRestore(ctx context.Context, l restore.Logical, plan restore.Plan) error {
	bars := &stages{e: e}
	l.Progress = bars.Set
	defer bars.End()
	return l.Run(ctx, plan)
}

// left says what a restore that ended with err has left in the target, and how
// to go on.
func (e *env) left(ctx context.Context, l restore.Logical, plan restore.Plan, err error) error {
	if ctx.Err() != nil {
		err = fail.With(fail.Cancelled, errors.New("interrupted"))
	}
	err = fmt.Errorf("restore into database %q: %w", plan.To, err)
	if !plan.Create {
		return fail.Hint(err, fmt.Sprintf("database %q was there before and may hold a part of the backup now; look at it before the next try", plan.To))
	}
	asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	facts, ferr := l.Target.Facts(asking)
	if ferr == nil && !slices.ContainsFunc(facts.Databases, func(d cluster.Database) bool { return d.Name == plan.To }) {
		return err // it was not made
	}
	return fail.Hint(err, fmt.Sprintf("database %q is left behind and holds a part at most: drop it, then run the same command again", plan.To))
}

func (e *env) printGlobals(ctx context.Context, l restore.Logical, asJSON bool) error {
	sql, err := l.Globals(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(e.out, "restore globals", struct {
			Backup repo.Ref `json:"backup"`
			SQL    string   `json:"sql"`
		}{l.Manifest.Ref, string(sql)})
	}
	_, err = e.out.Write(sql)
	return err
}

// A planShown is what a restore will do, or has done.
type planShown struct {
	restore.Plan
	Source  string    `json:"database"` // in place of all that is known of it
	TakenAt time.Time `json:"taken_at"`
	Bytes   int64     `json:"bytes"` // of the dump
	Target  string    `json:"target"`
	DryRun  bool      `json:"dry_run"`
	Seconds float64   `json:"seconds"`
}

func (p planShown) lines() []string {
	how := "which is made"
	if !p.Create {
		how = "which is there"
	}
	return []string{
		fmt.Sprintf("restore backup %s of cluster %s, as of %s", p.Backup.ID, p.Backup.Cluster, moment(p.TakenAt)),
		fmt.Sprintf("from database %q: %s, %d entries in all, %s dumped", p.Source, count(p.Tables, "table"), p.Entries, size(p.Bytes)),
		fmt.Sprintf("into database %q, %s, at %s", p.To, how, p.Target),
	}
}

func (e *env) printDry(p planShown, asJSON bool) error {
	e.say("dry run: nothing is done")
	if asJSON {
		return printJSON(e.out, "restore", p)
	}
	for _, line := range p.lines() {
		fmt.Fprintln(e.out, line)
	}
	return nil
}

func (e *env) printRestored(p planShown, asJSON bool) error {
	if asJSON {
		return printJSON(e.out, "restore", p)
	}
	_, err := fmt.Fprintf(e.out, "restored %q as %q: %s, %s in %s\n", p.Source, p.To, count(p.Tables, "table"), size(p.Bytes),
		span(time.Duration(p.Seconds*float64(time.Second))))
	return err
}
