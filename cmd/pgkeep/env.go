package main

import (
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/config"
)

// An env is the world as a command sees it. Answers go to out, everything else
// to errw.
type env struct {
	in        io.Reader
	out, errw io.Writer
	environ   []string // as os.Environ

	file  string // --config
	level string // --log-level

	loaded *config.Config
}

// globalFlags are those of every command. They may stand before the command and
// after it; the last one counts.
func (e *env) globalFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{
			Name: "config", Usage: "configuration `FILE` in place of " + config.DefaultFile,
			Action: func(_ *cli.Context, file string) error { e.file = file; return nil },
		},
		&cli.StringFlag{
			Name: "log-level", Usage: "log from `LEVEL` on: debug, info, warn, error",
			Action: func(_ *cli.Context, level string) error {
				e.level = level
				if err := new(config.LogLevel).UnmarshalText([]byte(level)); err != nil {
					return config.Errorf("--log-level %s: %w", level, err)
				}
				return nil
			},
		},
	}
}

// config reads the configuration, the first time it is asked for.
func (e *env) config() (*config.Config, error) {
	if e.loaded != nil {
		return e.loaded, nil
	}
	hostname, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("name of this host: %w", err)
	}
	e.loaded, err = config.Load(config.Options{File: e.file, Environ: e.environ, Hostname: hostname})
	return e.loaded, err
}

// log returns the logger that the configuration and --log-level describe.
func (e *env) log() (*slog.Logger, error) {
	c, err := e.config()
	if err != nil {
		return nil, err
	}
	opt := &slog.HandlerOptions{Level: cmp.Or(config.LogLevel(e.level), c.Log.Level).Level()}
	if c.Log.Format == config.LogJSON {
		return slog.New(slog.NewJSONHandler(e.errw, opt)), nil
	}
	return slog.New(slog.NewTextHandler(e.errw, opt)), nil
}

// say tells the operator something that is not the answer.
func (e *env) say(format string, args ...any) {
	fmt.Fprintf(e.errw, "pgkeep: "+format+"\n", args...)
}
