// Command pgkeep-wal is PostgreSQL's archive_command and restore_command. It
// needs its configuration and the repository, and nothing else that runs.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// version is set by the linker: -X main.version=v1.2.3.
var version string

const usage = `pgkeep-wal keeps PostgreSQL's write-ahead log in the repository of pgkeep.

  archive_command = 'pgkeep-wal push %p'
  restore_command = 'pgkeep-wal fetch %f %p'

  pgkeep-wal claim      from now on this copy of the data directory archives its
                        timeline: after a move, when the other copy is gone

Options, after push, fetch or claim:
  --config FILE     configuration, in place of ` + config.DefaultFile + `
  --cluster NAME    one of the clusters in it, if there are several
  --pgdata DIR      data directory; PostgreSQL runs the commands there
  --timeout TIME    give up after that long (60s); a standby that asks for a
                    history waits for the store, however long it is down
  --expect SEGMENT  of fetch: the archive held the log up to there, so that no
                    segment up to there is absent; pgkeep restore sets it
  --judge           of fetch: what is found damaged or missing twice in a row is
                    not tried again; restore tests set it, no recovery should
  --timeline N      of fetch: the server recovers along that timeline; what was
                    written to older ones after it left them is not its log;
                    pgkeep restore sets it

Exit statuses: https://github.com/pgkeep/pgkeep/blob/main/docs/ERRORS.md
`

func main() {
	switch verbOf(os.Args) {
	case push:
		debug.SetGCPercent(800) // one segment is sent before there is anything to collect
	case claim, ahead, pushAhead:
	default:
		// A crash must not end with status 2, which says "end of the log": it
		// dies by a signal, and PostgreSQL stops.
		debug.SetTraceback("crash")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGHUP)
	defer stop()
	os.Exit(run(ctx, os.Args, os.Environ(), os.Stdout, os.Stderr))
}

// The verbs.
const (
	push  = "push"
	fetch = "fetch"
	claim = "claim"
	// Of no use to people: see ahead.go.
	ahead     = "ahead" // fetches
	pushAhead = "push-ahead"
)

func verbOf(args []string) string {
	if len(args) < 2 {
		return ""
	}
	return args[1]
}

// run is main with the process taken out: what it returns is the exit status.
// It returns soon after ctx has ended, whatever still hangs.
func run(ctx context.Context, args, environ []string, out, errw io.Writer) int {
	c, err := parse(args, out)
	switch {
	case errors.Is(err, flag.ErrHelp):
		return 0
	case err == nil:
		err = c.bounded(ctx, environ, out, errw)
		for errors.Is(err, wal.ErrWait) && ctx.Err() == nil {
			say(errw, err)
			err = c.bounded(ctx, environ, out, errw)
		}
	}
	if err == nil {
		return 0
	}
	if c.alone() {
		return 0 // where PostgreSQL is process 1, it takes all else for the crash of one of its own
	}
	if !errors.Is(err, wal.ErrAbsent) {
		say(errw, err)
	}
	if verbOf(args) == push {
		return fail.KindOf(err).ExitStatus()
	}
	return fetchStatus(err)
}

// say writes an error as one line of PostgreSQL's log.
func say(errw io.Writer, err error) {
	line := "pgkeep-wal: " + strings.ReplaceAll(err.Error(), "\n", "; ")
	if hint := fail.HintOf(err); hint != "" {
		line += " (hint: " + hint + ")"
	}
	fmt.Fprintln(errw, line)
}

// fetchStatus is never one that PostgreSQL takes for the end of the log, unless
// that is what is proved: restore_command in PostgreSQL's documentation, and
// RestoreArchivedFile in access/transam/xlogarchive.c.
func fetchStatus(err error) int {
	if errors.Is(err, wal.ErrAbsent) || errors.Is(err, wal.ErrLater) {
		return 1
	}
	return min(200+fail.KindOf(err).ExitStatus(), 239)
}

// A call is a command line taken apart.
type call struct {
	verb                  string
	name, path            string // name only of fetch
	file, cluster, pgdata string
	timeout               time.Duration
	expect                pg.WALName // only of fetch; zero: nothing
	judge                 bool       // only of fetch
	timeline              uint       // only of fetch; zero: not known
	after                 pg.WALName // only of push-ahead
}

// alone reports whether nobody waits for the call, and it ends by itself.
func (c call) alone() bool { return c.verb == ahead || c.verb == pushAhead }

func parse(args []string, out io.Writer) (c call, err error) {
	c.verb = verbOf(args)
	if !slices.Contains([]string{push, fetch, claim, ahead, pushAhead}, c.verb) {
		if len(args) == 2 && slices.Contains([]string{"help", "--help", "-h"}, args[1]) {
			io.WriteString(out, usage)
			return c, flag.ErrHelp
		}
		return c, config.Errorf("want push %%p, fetch %%f %%p or claim; see pgkeep-wal --help")
	}
	f := flag.NewFlagSet(c.verb, flag.ContinueOnError)
	f.SetOutput(io.Discard)
	f.StringVar(&c.file, "config", "", "")
	f.StringVar(&c.cluster, "cluster", "", "")
	f.StringVar(&c.pgdata, "pgdata", ".", "")
	f.DurationVar(&c.timeout, "timeout", time.Minute, "")
	segment := func(n *pg.WALName) func(string) error {
		return func(s string) (err error) {
			*n, err = pg.ParseWALName(s)
			return err
		}
	}
	switch c.verb {
	case fetch:
		f.Func("expect", "", segment(&c.expect))
		f.BoolVar(&c.judge, "judge", false, "")
		f.UintVar(&c.timeline, "timeline", 0, "")
	case pushAhead:
		f.Func("after", "", segment(&c.after))
	}
	if err := f.Parse(args[2:]); errors.Is(err, flag.ErrHelp) {
		io.WriteString(out, usage)
		return c, err
	} else if err != nil {
		return c, config.Errorf("%s: %w", c.verb, err)
	}
	switch {
	case c.verb == push && f.NArg() == 1:
		c.path = f.Arg(0)
	case c.verb == fetch && f.NArg() == 2:
		c.name, c.path = f.Arg(0), f.Arg(1)
	case (c.verb == claim || c.alone()) && f.NArg() == 0:
	default:
		return c, config.Errorf("%s: %d arguments; want push %%p, fetch %%f %%p or claim", c.verb, f.NArg())
	}
	if !filepath.IsAbs(c.path) {
		c.path = filepath.Join(c.pgdata, c.path)
	}
	if c.timeline > math.MaxUint32 {
		return c, config.Errorf("--timeline %d: there is none", c.timeline)
	}
	if c.timeout <= 0 {
		return c, config.Errorf("--timeout %v: must be more than nothing", c.timeout)
	}
	return c, nil
}

// grace is how long the work may take to notice that its context has ended. Only
// a disk that hangs takes longer, and then the process ends all the same.
const grace = time.Second

// bounded does the work under one deadline.
func (c call) bounded(ctx context.Context, environ []string, out, errw io.Writer) error {
	stopped := ctx
	if !c.alone() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.timeout)
		defer cancel()
	}
	done := make(chan error, 1)
	go func() { done <- c.do(ctx, environ, out, errw) }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		select {
		case err = <-done:
		case <-time.After(grace):
			err = fmt.Errorf("a file here does not answer: %w", ctx.Err())
		}
	}
	switch {
	case err == nil || errors.Is(err, wal.ErrAbsent):
		return err
	case stopped.Err() != nil:
		return fail.With(fail.Cancelled, errors.New("stopped by a signal"))
	case ctx.Err() != nil:
		return fmt.Errorf("not done within %v: %w", c.timeout, err)
	}
	return err
}

func (c call) do(ctx context.Context, environ []string, out, errw io.Writer) error {
	hostname, err := os.Hostname()
	if err != nil {
		return fmt.Errorf("name of this host: %w", err)
	}
	cfg, err := config.Load(config.Options{File: c.file, Environ: environ, Hostname: hostname})
	if err != nil {
		return err
	}
	c.file = cfg.File()
	// A restore knows the cluster's name, and may have nothing else of it.
	if c.verb == push || c.verb == claim || c.verb == pushAhead || c.cluster == "" {
		if c.cluster, err = clusterOf(cfg, c.cluster); err != nil {
			return err
		}
	}
	switch c.verb {
	case push:
		return c.pusher(cfg, environ).Push(ctx, c.path)
	case pushAhead:
		return c.pusher(cfg, nil).PushAhead(ctx, c.after)
	case claim:
		return c.claim(ctx, cfg, out)
	case ahead:
		return c.fetcher(cfg).Prefetch(ctx)
	}
	f := c.fetcher(cfg)
	f.Expect, f.Judge, f.Timeline = c.expect, c.judge, pg.Timeline(c.timeline)
	f.Spawn = func() {
		if err := c.spawn(environ, ahead); err != nil { // which is no failure of this fetch
			fmt.Fprintf(errw, "pgkeep-wal: fetch ahead: %v\n", err)
		}
	}
	return f.Fetch(ctx, c.name, c.path)
}

// clusterOf returns the cluster that is meant: the one named, or the only one.
func clusterOf(cfg *config.Config, name string) (string, error) {
	if name != "" {
		_, err := cfg.Cluster(name)
		return name, err
	}
	names := slices.Sorted(maps.Keys(cfg.Clusters))
	if len(names) != 1 {
		return "", config.Errorf("%d clusters in the configuration: name one with --cluster", len(names))
	}
	return string(names[0]), nil
}
