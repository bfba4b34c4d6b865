package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

// This file is the half of pgkeep restore that makes a data directory.

// dirFlags say where to, and to which moment.
func dirFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "target-dir", Usage: "make the data directory `DIR` of a physical backup"},
		&cli.StringFlag{Name: "to-time", Usage: "as of `TIME`, with its zone: '2026-11-22 10:00:00+01', '… Europe/Berlin'"},
		&cli.StringFlag{Name: "to-lsn", Usage: "up to position `LSN` of the log"},
		&cli.StringFlag{Name: "to-xid", Usage: "up to the end of transaction `XID`"},
		&cli.StringFlag{Name: "to-name", Usage: "up to the restore point `NAME`"},
		boolFlag("immediate", "as of the end of the backup"),
		boolFlag("exclusive", "stop just before that time, position or transaction"),
		&cli.StringFlag{Name: "timeline", Usage: "along timeline `TIMELINE`: latest, current or a number", Value: "latest"},
		&cli.StringFlag{Name: "target-action", Usage: "then `DO` this: pause, promote or shutdown", Value: "pause"},
		boolFlag("standby", "go on following the archive, as a standby"),
		&cli.StringSliceFlag{Name: "tablespace-map", Usage: "put a tablespace elsewhere: `OID=DIR` or OLD=DIR; may be repeated"},
		&cli.StringFlag{Name: "config-dir", Usage: "put configuration from outside of the data directory into `DIR`"},
		boolFlag("delta", "over an old data directory of this cluster: fetch what differs, remove the rest"),
		&cli.StringFlag{Name: "owner", Usage: "give the files to `USER[:GROUP]`; else to the owner of DIR, or of where it is"},
		boolFlag("takeover", "it takes the place of its source: keep archiving and replication as they were"),
	}
}

type dirOptions struct {
	Cluster, Backup          string
	Dir, ConfigDir, Owner    string
	Time, LSN, XID, Name     *string // at most one, or Immediate; nil: not given
	Immediate, Exclusive     bool
	Timeline, Action         string
	Standby, Delta, Takeover bool
	Tablespaces              []string
	DryRun, JSON             bool
}

func dirOptionsOf(c *cli.Context) dirOptions {
	return dirOptions{
		Cluster: c.String("cluster"), Backup: c.Args().First(),
		Dir: c.String("target-dir"), ConfigDir: c.String("config-dir"), Owner: c.String("owner"),
		Time: given(c, "to-time"), LSN: given(c, "to-lsn"), XID: given(c, "to-xid"), Name: given(c, "to-name"),
		Immediate: c.Bool("immediate"), Exclusive: c.Bool("exclusive"), Timeline: c.String("timeline"), Action: c.String("target-action"),
		Standby: c.Bool("standby"), Delta: c.Bool("delta"), Takeover: c.Bool("takeover"),
		Tablespaces: c.StringSlice("tablespace-map"), DryRun: c.Bool("dry-run"), JSON: c.Bool("json"),
	}
}

// given is the value of a flag, nil if it is not there: an empty one is no
// moment, and not the latest.
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

// physical turns options into what is to be restored.
func (e *env) physical(ctx context.Context, opt dirOptions) (p restore.Physical, err error) {
	if p.Target, err = opt.target(); err != nil {
		return p, err
	}
	if p.Action, err = restore.ParseAction(opt.Action); err != nil {
		return p, err
	}
	if p.Dir, err = filepath.Abs(opt.Dir); err == nil && opt.ConfigDir != "" {
		p.ConfigDir, err = filepath.Abs(opt.ConfigDir)
	}
	if err != nil {
		return p, err
	}
	p.Tablespaces = make(map[string]string)
	for _, m := range opt.Tablespaces {
		i := strings.LastIndex(m, "=")
		if i < 1 || !filepath.IsAbs(m[i+1:]) {
			return p, config.Errorf("--tablespace-map %s: want OID=DIR or OLD=DIR, with absolute paths", m)
		}
		p.Tablespaces[m[:i]] = m[i+1:]
	}
	p.Standby, p.Delta, p.Takeover, p.Owner = opt.Standby, opt.Delta, opt.Takeover, opt.Owner
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return p, err
	}
	p.Repo = r
	if p.Cluster, err = whichOf(ctx, cfg, r, opt.Cluster); err != nil {
		return p, err
	}
	if opt.Backup != "" && opt.Backup != latest {
		all, err := r.Backups(ctx, p.Cluster)
		if err != nil {
			return p, err
		}
		b, err := pick(all, opt.Backup)
		if err != nil {
			return p, err
		}
		m, err := finished(b)
		if err == nil && m.Kind != repo.Physical {
			err = fail.Hint(config.Errorf("backup %s is %s: no data directory comes of it", m.ID, m.Kind), "restore it into a database, without --target-dir")
		}
		if err != nil {
			return p, err
		}
		p.Backup = m.ID
	}
	p.Fetch, err = fetchCommand(cfg, p.Cluster)
	return p, err
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
	p, err := e.physical(ctx, opt)
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
		return fail.Hint(err, fmt.Sprintf("%s is unfinished, and no server starts on it; the same command again goes on from there", p.Dir))
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
