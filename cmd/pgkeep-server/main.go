// Command pgkeep-server is a whole Temporal in one process and one file: the
// Temporal server, the Temporal Web UI, and SQLite. It is for trying pgkeep out
// and for small installations on one host. Losing its file loses history and
// schedules, never a backup: those are in the bucket.
//
// It is a module of its own, and imports nothing of pgkeep, so that the many
// modules a Temporal server needs stay out of the go.mod of pgkeep.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"os/signal"
	"syscall"
	"time"
	_ "time/tzdata" // schedules name time zones, and a small image has none

	uiversion "github.com/temporalio/ui-server/v2/server/version"
	"github.com/urfave/cli/v2"
	"go.temporal.io/server/common/headers"
	sqliteschema "go.temporal.io/server/schema/sqlite"
)

// stopWithin bounds a stop. Whoever sent the signal waits about as long before
// it sends SIGKILL: docker 10 s, systemd 90 s.
const stopWithin = 8 * time.Second

// version is set by the linker: -X main.version=v1.2.3.
var version = "unknown"

func main() {
	os.Exit(run(context.Background(), os.Args, os.Stdout, os.Stderr))
}

// run is main without the process. It returns the exit status: 0 after a stop
// that was asked for, 2 for a command line that cannot be obeyed, else 1.
func run(ctx context.Context, args []string, out, errw io.Writer) int {
	err := newApp(out, errw).RunContext(ctx, args)
	if err == nil {
		return 0
	}
	fmt.Fprintf(errw, "pgkeep-server: error: %v\n", err)
	if a, ok := errors.AsType[*advised](err); ok {
		fmt.Fprintf(errw, "pgkeep-server: hint: %s\n", a.hint)
	}
	if errors.Is(err, errUsage) {
		return 2
	}
	return 1
}

func newApp(out, errw io.Writer) *cli.App {
	usage := func(_ *cli.Context, err error, _ bool) error {
		return advise(fmt.Errorf("%w: %w", errUsage, err), "see pgkeep-server --help")
	}
	return &cli.App{
		Name:            "pgkeep-server",
		Usage:           "a Temporal server with its Web UI, for trying pgkeep out and for small installations",
		UsageText:       "pgkeep-server --db FILE [options]\npgkeep-server version",
		HideHelpCommand: true,
		HideVersion:     true,
		Writer:          out,
		ErrWriter:       errw,
		ExitErrHandler:  func(*cli.Context, error) {},
		OnUsageError:    usage,
		Flags: []cli.Flag{
			&cli.PathFlag{Name: "db", Usage: "keep everything in the SQLite database `FILE`, made at the first start"},
			&cli.StringFlag{Name: "ip", Value: "127.0.0.1", Usage: "listen on `ADDRESS`"},
			&cli.IntFlag{Name: "port", Value: 7233, Usage: "`PORT` of Temporal; 0 picks a free one"},
			&cli.IntFlag{Name: "ui-port", Value: 8233, Usage: "`PORT` of the Web UI; 0 picks a free one"},
			&cli.StringFlag{Name: "namespace", Value: "pgkeep", Usage: "`NAME` of the namespace to have"},
			&cli.DurationFlag{Name: "retention", Value: 90 * 24 * time.Hour, Usage: "keep closed workflows for `DURATION`"},
			&cli.BoolFlag{Name: "insecure-bind", Usage: "allow an --ip that others can reach, without TLS and without login"},
			&cli.StringFlag{Name: "log-level", Value: "warn", Usage: "log to stderr from `LEVEL` on: debug, info, warn, error"},
			&cli.BoolFlag{Name: "json", Usage: "say where it listens as one line of JSON"},
		},
		Action: serve,
		Commands: []*cli.Command{{
			Name:         "version",
			Usage:        "print the versions of everything inside",
			OnUsageError: usage,
			Action:       printVersion,
		}},
	}
}

func serve(c *cli.Context) error {
	opts, err := options(c)
	if err != nil {
		return err
	}
	var level slog.LevelVar
	if err := level.UnmarshalText([]byte(c.String("log-level"))); err != nil {
		return fmt.Errorf("%w: --log-level: %w", errUsage, err)
	}
	ctx, release := signal.NotifyContext(c.Context, os.Interrupt, syscall.SIGTERM)
	defer release()

	srv, err := start(ctx, opts, slog.New(slog.NewTextHandler(c.App.ErrWriter, &slog.HandlerOptions{Level: &level})))
	if err != nil {
		return err
	}
	announce(c.App.Writer, srv, c.Bool("json"))

	var broken error
	select {
	case <-ctx.Done():
	case broken = <-srv.broken:
	}
	release() // a second signal ends the process at once
	level.Set(silent)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
	defer cancel()
	return errors.Join(broken, srv.stop(ctx))
}

// silent is above every level: a Temporal server that stops logs an error for
// each of its own polls that it ends.
const silent = slog.LevelError + 100

// options parses the command line. Everything it returns is fit for use.
func options(c *cli.Context) (Options, error) {
	bad := func(hint, format string, args ...any) (Options, error) {
		return Options{}, advise(fmt.Errorf("%w: "+format, append([]any{errUsage}, args...)...), hint)
	}
	if c.Args().Present() {
		return bad("flags come before arguments, and the only argument is: version", "unexpected %q", c.Args().First())
	}
	if c.Path("db") == "" {
		return bad("for example --db /var/lib/pgkeep/temporal.db", "no --db")
	}
	ip, err := netip.ParseAddr(c.String("ip"))
	if err != nil {
		return bad("give an IP address, not a name", "--ip: %w", err)
	}
	if !ip.IsLoopback() && !c.Bool("insecure-bind") {
		return bad("for several hosts run a Temporal with TLS; in a network you trust entirely, as that of a compose file, add --insecure-bind",
			"--ip %s: others could reach a server that has no TLS and no login", ip)
	}
	for _, name := range []string{"port", "ui-port"} {
		if p := c.Int(name); p < 0 || p > 65535 {
			return bad("", "--%s %d: not a port", name, p)
		}
	}
	if c.String("namespace") == "" {
		return bad("", "--namespace is empty")
	}
	if r := c.Duration("retention"); r < time.Hour {
		return bad("Temporal keeps closed workflows for one hour at least", "--retention %s: too short", r)
	}
	return Options{
		DB:        c.Path("db"),
		IP:        ip,
		Port:      c.Int("port"),
		UIPort:    c.Int("ui-port"),
		Namespace: c.String("namespace"),
		Retention: c.Duration("retention"),
	}, nil
}

// announce says on w, once, that srv is ready and where.
func announce(w io.Writer, srv *server, asJSON bool) {
	if asJSON {
		_ = json.NewEncoder(w).Encode(map[string]string{"address": srv.address, "namespace": srv.namespace, "ui": srv.uiURL})
		return
	}
	fmt.Fprintf(w, "temporal %s namespace %s\nweb ui %s/namespaces/%s\n", srv.address, srv.namespace, srv.uiURL, srv.namespace)
}

func printVersion(c *cli.Context) error {
	_, err := fmt.Fprintf(c.App.Writer, "pgkeep-server %s\ntemporal server %s\ntemporal web ui %s\nsqlite schema %s\n",
		version, headers.ServerVersion, uiversion.UIVersion, sqliteschema.Version)
	return err
}

// errUsage is the kind of error that another command line cures.
var errUsage = errors.New("bad usage")

// advise attaches advice for the operator to err. It is printed on its own
// line, and an empty one is not printed.
func advise(err error, hint string) error {
	if hint == "" {
		return err
	}
	return &advised{err, hint}
}

type advised struct {
	error
	hint string
}

func (a *advised) Unwrap() error { return a.error }
