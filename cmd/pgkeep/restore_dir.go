package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/temporal"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/workflows"
)

// This file is the half of pgkeep restore that makes a data directory.

// dirFlags say where to, and to which moment.
func dirFlags() []cli.Flag {
	return slices.Concat([]cli.Flag{&cli.StringFlag{Name: "target-dir", Usage: "make the data directory `DIR` of a physical backup"}}, momentFlags(), []cli.Flag{
		&cli.StringFlag{Name: "target-action", Usage: "then `DO` this: pause, promote or shutdown", Value: "pause"},
		boolFlag("standby", "go on following the archive, as a standby"),
		&cli.StringSliceFlag{Name: "tablespace-map", Usage: "put a tablespace elsewhere: `OID=DIR` or OLD=DIR; may be repeated"},
		&cli.StringFlag{Name: "config-dir", Usage: "put configuration from outside of the data directory into `DIR`"},
		boolFlag("delta", "over an old data directory of this cluster: fetch what differs, remove the rest"),
		&cli.StringFlag{Name: "owner", Usage: "give the files to `USER[:GROUP]`; else to the owner of DIR, or of where it is"},
		&cli.StringFlag{Name: "host", Usage: "let the worker of `HOST` do it, there; not with --dry-run"},
		boolFlag("takeover", "it takes the place of its source: keep archiving and replication as they were"),
	})
}

// momentFlags say to which moment.
func momentFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "to-time", Usage: "as of `TIME`, with its zone: '2026-11-22 10:00:00+01', '… Europe/Berlin'"},
		&cli.StringFlag{Name: "to-lsn", Usage: "up to position `LSN` of the log"},
		&cli.StringFlag{Name: "to-xid", Usage: "up to the end of transaction `XID`"},
		&cli.StringFlag{Name: "to-name", Usage: "up to the restore point `NAME`"},
		boolFlag("immediate", "as of the end of the backup"),
		boolFlag("exclusive", "stop just before that time, position or transaction"),
		&cli.StringFlag{Name: "timeline", Usage: "along timeline `TIMELINE`: latest, current or a number", Value: "latest"},
	}
}

type dirOptions struct {
	Cluster, Backup, Host    string
	Dir, Owner               string
	ConfigDir                *string // nil: not given
	Time, LSN, XID, Name     *string // at most one, or Immediate; nil: not given
	Immediate, Exclusive     bool
	Timeline, Action         string
	Standby, Delta, Takeover bool
	Tablespaces              []string
	DryRun, JSON             bool
}

func dirOptionsOf(c *cli.Context) dirOptions {
	return dirOptions{
		Cluster: c.String("cluster"), Backup: c.Args().First(), Host: c.String("host"),
		Dir: c.String("target-dir"), ConfigDir: given(c, "config-dir"), Owner: c.String("owner"),
		Time: given(c, "to-time"), LSN: given(c, "to-lsn"), XID: given(c, "to-xid"), Name: given(c, "to-name"),
		Immediate: c.Bool("immediate"), Exclusive: c.Bool("exclusive"), Timeline: c.String("timeline"), Action: c.String("target-action"),
		Standby: c.Bool("standby"), Delta: c.Bool("delta"), Takeover: c.Bool("takeover"),
		Tablespaces: c.StringSlice("tablespace-map"), DryRun: c.Bool("dry-run"), JSON: c.Bool("json"),
	}
}

// given is the value of a flag, nil if it is not there: an empty one is no
// moment, and not the latest; nor is it a directory.
func given(c *cli.Context, flag string) *string {
	if !c.IsSet(flag) {
		return nil
	}
	s := c.String(flag)
	return &s
}

// ofOneKind refuses flags of the one kind of restore that stand with the other's.
func ofOneKind(c *cli.Context) error {
	logical := []string{"database", "to", "target-cluster", "target", "target-password-file", "jobs", "no-owner", "no-privileges", "no-tablespaces", "into-existing", "scratch", "globals"}
	if c.IsSet("target-dir") {
		for _, name := range logical {
			if c.IsSet(name) {
				return fail.Hint(config.Errorf("--%s is for logical backups, --target-dir for physical ones", name), "see pgkeep restore --help")
			}
		}
		return nil
	}
	for _, f := range dirFlags()[1:] {
		if name := f.Names()[0]; c.IsSet(name) {
			return fail.Hint(config.Errorf("--%s wants --target-dir", name), "a moment is reached from a physical backup, which is a data directory; a logical one has one moment, its own")
		}
	}
	return nil
}

// target parses which moment is meant.
func (opt dirOptions) target() (t restore.Target, err error) {
	t = restore.Target{Kind: restore.Latest, Exclusive: opt.Exclusive}
	var given []string
	for _, one := range []struct {
		flag  string
		text  *string
		parse func(string) error
	}{
		{"--to-time", opt.Time, func(s string) (err error) { t.Kind = restore.ToTime; t.Time, err = restore.ParseTime(s); return err }},
		{"--to-lsn", opt.LSN, func(s string) (err error) { t.Kind = restore.ToLSN; t.LSN, err = restore.ParseLSN(s); return err }},
		{"--to-xid", opt.XID, func(s string) (err error) { t.Kind = restore.ToXID; t.XID, err = restore.ParseXID(s); return err }},
		{"--to-name", opt.Name, func(s string) error { t.Kind, t.Name = restore.ToName, s; return nil }},
	} {
		if one.text == nil {
			continue
		}
		given = append(given, one.flag)
		if err := one.parse(*one.text); err != nil {
			return t, err
		}
	}
	if opt.Immediate {
		given = append(given, "--immediate")
		t.Kind = restore.Immediate
	}
	if len(given) > 1 {
		return t, config.Errorf("%s exclude each other", strings.Join(given, " and "))
	}
	t.Timeline, err = restore.ParseTimeline(opt.Timeline)
	return t, err
}

// request turns options into what is asked for.
func (opt dirOptions) request() (q activities.RestoreRequest, err error) {
	for _, d := range []struct {
		flag string
		dir  *string
	}{{"--target-dir", &opt.Dir}, {"--config-dir", opt.ConfigDir}} {
		switch {
		case d.dir == nil:
		case *d.dir == "":
			return q, fail.Hint(config.Errorf("%s is empty", d.flag), "name a directory; is a variable of the shell not set?")
		case opt.Host != "" && !filepath.IsAbs(*d.dir):
			return q, config.Errorf("%s %s: on another host, want an absolute path", d.flag, *d.dir)
		}
	}
	q = activities.RestoreRequest{Owner: opt.Owner,
		Standby: opt.Standby, Delta: opt.Delta, Takeover: opt.Takeover, Tablespaces: make(map[string]string)}
	if q.Target, err = opt.target(); err != nil {
		return q, err
	}
	if q.Action, err = restore.ParseAction(opt.Action); err != nil {
		return q, err
	}
	if q.Dir, err = filepath.Abs(opt.Dir); err == nil && opt.ConfigDir != nil {
		q.ConfigDir, err = filepath.Abs(*opt.ConfigDir)
	}
	if err != nil {
		return q, err
	}
	for _, m := range opt.Tablespaces {
		i := strings.LastIndex(m, "=")
		if i < 1 || !filepath.IsAbs(m[i+1:]) {
			return q, config.Errorf("--tablespace-map %s: want OID=DIR or OLD=DIR, with absolute paths", m)
		}
		q.Tablespaces[m[:i]] = m[i+1:]
	}
	return q, nil
}

// which finds the cluster and the backup that are meant.
func (e *env) which(ctx context.Context, opt dirOptions) (cfg *config.Config, r *repo.Repo, cluster string, id repo.ID, err error) {
	if cfg, r, err = e.repository(ctx); err != nil {
		return nil, nil, "", "", err
	}
	if cluster, err = whichOf(ctx, cfg, r, opt.Cluster); err != nil || opt.Backup == "" || opt.Backup == latest {
		return cfg, r, cluster, "", err
	}
	all, err := r.Backups(ctx, cluster)
	if err != nil {
		return nil, nil, "", "", err
	}
	b, err := pick(all, opt.Backup)
	if err != nil {
		return nil, nil, "", "", err
	}
	m, err := finished(b)
	if err == nil && m.Kind != repo.Physical {
		err = fail.Hint(config.Errorf("backup %s is %s: no data directory comes of it", m.ID, m.Kind), "restore it into a database, without --target-dir")
	}
	return cfg, r, cluster, m.ID, err
}

// prepareRestore says what a request means on this host.
func prepareRestore(cfg *config.Config, r *repo.Repo, q activities.RestoreRequest) (restore.Physical, error) {
	p, err := serverNeeds(cfg, q.Cluster)
	p.Repo, p.Cluster, p.Backup, p.Target, p.Action, p.Standby, p.Dir = r, q.Cluster, q.Backup, q.Target, q.Action, q.Standby, q.Dir
	p.Tablespaces, p.ConfigDir, p.Delta, p.Owner, p.Takeover = q.Tablespaces, q.ConfigDir, q.Delta, q.Owner, q.Takeover
	p.Servers = cluster.ServerDirs(string(cfg.Clusters[config.Name(q.Cluster)].BinDir))
	return p, err
}

// serverNeeds says with what a server on this host gets the log of a cluster.
func serverNeeds(cfg *config.Config, cluster string) (p restore.Physical, err error) {
	for _, file := range []string{cfg.File(), string(cfg.Keys.SigningKey), string(cfg.Keys.MetadataIdentity), string(cfg.Keys.Identity),
		string(cfg.Repository.CAFile), string(cfg.Repository.SecretAccessKeyFile)} {
		if abs, err := filepath.Abs(file); err == nil && file != "" {
			if _, err := os.Stat(abs); err == nil {
				p.Needs = append(p.Needs, abs)
			}
		}
	}
	p.Fetch, err = fetchCommand(cfg, cluster)
	return p, err
}

// prepareAllowed is prepareRestore for a request that came over Temporal: it may
// write only where the configuration of this host says. Where the tablespaces go
// that the request does not name, only the backup tells.
func prepareAllowed(cfg *config.Config, r *repo.Repo, q activities.RestoreRequest) (restore.Physical, error) {
	allowed := func(place string) error {
		if slices.ContainsFunc(cfg.RestoreDirs, func(dir config.Path) bool { return below(string(dir), place) }) {
			return nil
		}
		return fail.Hint(config.Errorf("host %s restores nothing into %s on request", cfg.Host, place),
			"name a directory above it as one of restore_dirs in the configuration there, and start the worker again; or map a tablespace elsewhere; or run pgkeep restore there, without --host")
	}
	places := append(slices.Collect(maps.Values(q.Tablespaces)), q.Dir)
	if q.ConfigDir != "" {
		places = append(places, q.ConfigDir)
	}
	for _, place := range places {
		if err := allowed(place); err != nil {
			return restore.Physical{}, err
		}
	}
	p, err := prepareRestore(cfg, r, q)
	p.Allowed = allowed
	return p, err
}

// below reports whether a path lies below a directory, links followed as far as
// the path exists.
func below(dir, path string) bool {
	dir, path = resolved(dir), resolved(path)
	return strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

func resolved(path string) string {
	if real, err := filepath.EvalSymlinks(path); err == nil || path == "/" {
		return cmp.Or(real, path)
	}
	return filepath.Join(resolved(filepath.Dir(path)), filepath.Base(path))
}

// fetchCommand is what PostgreSQL will get its log with: the program that came
// with this one.
func fetchCommand(cfg *config.Config, cluster string) ([]string, error) {
	const name = "pgkeep-wal"
	program := ""
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), name)
		if _, err := os.Stat(beside); err == nil {
			program = beside
		}
	}
	if program == "" {
		found, err := exec.LookPath(name)
		if err == nil {
			found, err = filepath.Abs(found)
		}
		if err != nil {
			return nil, fail.Hint(config.Errorf("no %s is there, beside this program or on the PATH", name), "PostgreSQL gets its log with it during recovery; it comes with pgkeep")
		}
		program = found
	}
	words := []string{program, "fetch"}
	if file := cfg.File(); file != "" {
		abs, err := filepath.Abs(file)
		if err != nil {
			return nil, err
		}
		words = append(words, "--config", abs)
	}
	return append(words, "--cluster", cluster), nil
}

func (e *env) restoreDir(ctx context.Context, opt dirOptions) error {
	if opt.DryRun && opt.Host != "" {
		return fail.Hint(config.Errorf("--dry-run and --host exclude each other: a plan is about the directories and servers of the host where it is made"),
			"log in to "+opt.Host+" and leave out --host; a restore with --host makes the same plan there first, and writes nothing if it is refused")
	}
	q, err := opt.request()
	if err != nil {
		return err
	}
	cfg, r, cluster, id, err := e.which(ctx, opt)
	if err != nil {
		return err
	}
	q.Cluster, q.Backup = cluster, id
	if opt.Host != "" {
		return e.restoreOn(ctx, cfg, q, opt)
	}
	p, err := prepareRestore(cfg, r, q)
	if err != nil {
		return err
	}
	plan, err := p.Plan(ctx)
	if err != nil {
		return err
	}
	shown := dirShown{PhysicalPlan: plan, DryRun: opt.DryRun}
	if opt.DryRun {
		e.say("dry run: nothing is done")
		if opt.JSON {
			return printJSON(e.out, "restore dir", shown)
		}
		for _, line := range shown.lines() {
			fmt.Fprintln(e.out, line)
		}
		return nil
	}
	for _, line := range shown.lines() {
		e.say("%s", line)
	}
	began := time.Now()
	bars := &stages{e: e}
	p.Progress = bars.Set
	_, err = p.Run(ctx, plan)
	bars.End()
	if err != nil {
		if ctx.Err() != nil {
			err = fail.With(fail.Cancelled, errors.New("interrupted"))
		}
		if !p.Begun() { // it says itself what to do
			return err
		}
		hint := fmt.Sprintf("%s is unfinished, and no server starts on it; the same command again goes on from there", p.Dir)
		if why := fail.HintOf(err); why != "" {
			hint = why + "; " + hint
		}
		return fail.Hint(err, hint)
	}
	shown.Seconds = time.Since(began).Seconds()
	if opt.JSON {
		return printJSON(e.out, "restore dir", shown)
	}
	_, err = fmt.Fprintf(e.out, "restored %s to %s: %s, %s in %s\n", plan.Backup.ID, p.Dir, count(plan.Files, "file"), size(plan.Bytes), span(time.Since(began)))
	if err == nil {
		e.say("now start PostgreSQL %s on it: %s", plan.Version, then(p))
	}
	return err
}

// restoreOn lets the worker of another host do it.
func (e *env) restoreOn(ctx context.Context, cfg *config.Config, q activities.RestoreRequest, opt dirOptions) error {
	s, err := e.temporal(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	start := client.StartWorkflowOptions{ID: workflows.RestoreWorkflowID(opt.Host, q.Dir), TaskQueue: workflows.Queue,
		WorkflowExecutionErrorWhenAlreadyStarted: true, WorkflowRunTimeout: runTimeout, StaticSummary: "restore of " + q.Cluster + " on " + opt.Host}
	run, err := s.ExecuteWorkflow(ctx, start, workflows.RestoreName, workflows.RestoreRequest{Host: opt.Host, RestoreRequest: q})
	if temporal.IsWorkflowExecutionAlreadyStartedError(err) {
		return fail.With(fail.AlreadyRunning, fmt.Errorf("%s on %s is being restored already, by workflow %s", q.Dir, opt.Host, start.ID))
	}
	if err != nil {
		return fmt.Errorf("start restore: %w", err)
	}
	e.say("restore of %s on %s started", q.Cluster, opt.Host)
	if link := s.link(run.GetID(), run.GetRunID()); link != "" {
		e.say("%s", link)
	}
	began := time.Now()
	var res activities.PlanRestoreResult
	if err := e.await(ctx, s, run, &res); err != nil {
		return err
	}
	if opt.JSON {
		return printJSON(e.out, "restore dir", dirShown{PhysicalPlan: res.Plan, Seconds: time.Since(began).Seconds()})
	}
	_, err = fmt.Fprintf(e.out, "restored %s to %s on %s: %s, %s in %s\n", res.Plan.Backup.ID, q.Dir, opt.Host, count(res.Plan.Files, "file"), size(res.Plan.Bytes), span(time.Since(began)))
	return err
}

// then says what the server will do.
func then(p restore.Physical) string {
	switch {
	case p.Standby:
		return "it follows the archive, as a standby"
	case p.Target.Kind == restore.Latest:
		return "it recovers to the end of the log, and opens"
	case p.Action == restore.Promote:
		return fmt.Sprintf("it recovers to %v, and opens", p.Target)
	case p.Action == restore.ShutDown:
		return fmt.Sprintf("it recovers to %v, and shuts down", p.Target)
	}
	return fmt.Sprintf("it recovers to %v, and waits for you to look, and to SELECT pg_wal_replay_resume()", p.Target)
}

// A dirShown is what a restore will do, or has done.
type dirShown struct {
	restore.PhysicalPlan
	DryRun  bool    `json:"dry_run"`
	Seconds float64 `json:"seconds"`
}

// forecast says how long it will take, and why that is thought.
func (p dirShown) forecast() string {
	f := p.Time
	seconds := func(s float64) string { return span(time.Duration(s * float64(time.Second))) }
	from := "assumed: no restore test of this cluster has measured it"
	if f.Measured != "" {
		from = "as restore test " + string(f.Measured) + " measured"
	}
	about := "about"
	if p.State != restore.New { // what is there already need not be brought
		about = "at most"
	}
	return fmt.Sprintf("%s %s to bring the files, at %s/s, and then %s until PostgreSQL has replayed %s of log, at %s/s (%s)",
		about, seconds(f.Fetch), size(int64(f.FetchRate)), seconds(f.Replay), count(p.Segments, "segment"), size(int64(f.ReplayRate)), from)
}

func (p dirShown) lines() []string {
	lines := []string{
		fmt.Sprintf("restore backup %s of cluster %s, PostgreSQL %s, consistent at %s", p.Backup.ID, p.Backup.Cluster, p.Version, moment(p.TakenAt)),
		fmt.Sprintf("to %v, along timeline %d", p.Target, p.Timeline),
	}
	if len(p.Path) > 1 {
		lines[1] += fmt.Sprintf(", by way of %s", strings.Trim(fmt.Sprint(p.Path), "[]"))
	}
	if l := p.Last; l != nil {
		lines = append(lines, fmt.Sprintf("the last commit in it: transaction %d, at %s (%v)", l.XID, l.Time.UTC().Format("2006-01-02 15:04:05.999999Z"), l.LSN))
	}
	lines = append(lines, fmt.Sprintf("with %s of log, %s to %s", count(p.Segments, "segment"), p.FirstWAL, p.LastWAL),
		fmt.Sprintf("into %s (%s), owned by %s: %s, %s", p.Dir, p.State, cmp.Or(p.Owner, "this user"), count(p.Files, "file"), size(p.Bytes)))
	for _, t := range p.Tablespaces {
		lines = append(lines, fmt.Sprintf("tablespace %s, from %s, into %s", t.OID, t.From, t.To))
	}
	for _, s := range p.Space {
		lines = append(lines, fmt.Sprintf("%s needs %s, and %s are free", s.Dir, size(s.Need), size(s.Free)))
	}
	lines = append(lines, p.forecast())
	if p.Server != "" {
		lines = append(lines, "the server in "+p.Server+" can run it")
	}
	for _, n := range p.Notes {
		lines = append(lines, "note: "+n)
	}
	if p.Damaged > 0 {
		lines = append(lines, fmt.Sprintf("warning: %s were damaged at the source", count(p.Damaged, "block")))
	}
	for _, b := range p.Passed {
		lines = append(lines, fmt.Sprintf("passed by: %s: %s", b.ID, b.Why))
	}
	return lines
}
