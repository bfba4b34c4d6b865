// Command pgkeep takes PostgreSQL backups that finish, and proves that they
// restore.
package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

func main() {
	sandbox.Enter()
	// Most of what it holds is buffers without pointers: to collect often costs
	// little, and keeps the peak near to what is in use.
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(30)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop) // a second signal ends the process
	os.Exit(run(ctx, os.Args, os.Stdin, os.Stdout, os.Stderr))
}

// run is main with the process taken out: what it returns is the exit status.
func run(ctx context.Context, args []string, in io.Reader, out, errw io.Writer) int {
	err := newApp(in, out, errw).RunContext(ctx, args)
	if err == nil {
		return 0
	}
	if s, ok := errors.AsType[pluginStatus](err); ok {
		return int(s)
	}
	err = classify(ctx, err)
	complain(errw, err)
	return fail.KindOf(err).ExitStatus()
}

// classify gives a kind to errors that come from outside without one.
func classify(ctx context.Context, err error) error {
	switch {
	case fail.KindOf(err) != fail.Unknown:
		return err
	case ctx.Err() != nil:
		return fail.With(fail.Cancelled, errors.New("interrupted"))
	}
	if _, ok := errors.AsType[cli.ExitCoder](err); ok { // the library's own: no help about that
		return fail.With(fail.BadConfig, err)
	}
	return temporalError(err)
}

// complain is the only place that prints an error: each of its lines, then the
// advice.
func complain(w io.Writer, err error) {
	for line := range strings.Lines(err.Error()) {
		fmt.Fprintf(w, "pgkeep: error: %s\n", strings.TrimRight(line, "\n"))
	}
	if hint := cmp.Or(activities.AdviceOf(err), fail.HintOf(err)); hint != "" {
		fmt.Fprintf(w, "pgkeep: hint: %s\n", hint)
	}
}

func newApp(in io.Reader, out, errw io.Writer) *cli.App {
	e := &env{in: in, out: out, errw: errw, environ: os.Environ()}
	app := &cli.App{
		Name:                 "pgkeep",
		Usage:                "PostgreSQL backups that finish, and prove that they restore",
		Description:          "Temporal workflows take the backups; an object store keeps them.\n\nExamples:\n  pgkeep init             make keys and repository\n  pgkeep backup           take a backup now\n  pgkeep verify latest    read it back and compare\n  pgkeep restore --database shop --to shop2 latest\n\nExit statuses: https://github.com/pgkeep/pgkeep/blob/main/docs/ERRORS.md",
		Reader:               in,
		Writer:               out,
		ErrWriter:            errw,
		HideHelpCommand:      true,
		Version:              thisVersion().Version,
		EnableBashCompletion: true,
		Flags:                e.globalFlags(),
		// Errors go up to run: no command prints one, or exits by itself.
		ExitErrHandler:        func(*cli.Context, error) {},
		OnUsageError:          usageError,
		Action:                unknownCommand,
		CustomAppHelpTemplate: appHelp,
		Commands: []*cli.Command{
			workerCommand(e),
			backupCommand(e),
			initCommand(e),
			doctorCommand(e),
			keyCommand(e),
			bucketCommand(e),
			listCommand(e),
			showCommand(e),
			verifyCommand(e),
			restoreCommand(e),
			restoreTestCommand(e),
			walCommand(e),
			windowsCommand(e),
			reportCommand(e),
			checkCommand(e),
			statusCommand(e),
			deleteCommand(e),
			undeleteCommand(e),
			expireCommand(e),
			holdCommand(e),
			psCommand(e),
			cancelCommand(e),
			scheduleCommand(e),
			configCommand(e),
			versionCommand(e),
			completionCommand(e),
		},
	}
	for _, c := range app.Commands {
		prepare(e, c, "pgkeep")
	}
	return app
}
