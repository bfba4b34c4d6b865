package main

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// fetcher is the one that this process, and the one it starts, work for.
func (c call) fetcher(cfg *config.Config) wal.Fetcher {
	settings := cfg.WAL(c.cluster)
	r := cfg.Repository
	return wal.Fetcher{
		Cluster: c.cluster, DataDir: c.pgdata,
		Open: func(ctx context.Context) (*repo.Repo, error) {
			return open.Repository(ctx, cfg, cmp.Or(version, "unknown"))
		},
		HoleGrace: settings.HoleGrace, Ahead: settings.Prefetch,
		Place: fmt.Sprintf("%v %v %v %q", r.URL, r.Endpoint, r.Region, cfg.Keys.TrustedSigners),
	}
}

// spawn starts a process for a verb that only this program uses, and does not wait
// for it. It outlives this one and has nothing of PostgreSQL's: no session, no
// pipe, no directory.
func (c call) spawn(environ []string, verb string, options ...string) error {
	program, err := os.Executable()
	if err != nil {
		return err
	}
	pgdata, err := filepath.Abs(c.pgdata)
	if err != nil {
		return err
	}
	args := append([]string{verb, "--cluster", c.cluster, "--pgdata", pgdata}, options...)
	if c.file != "" {
		file, err := filepath.Abs(c.file)
		if err != nil {
			return err
		}
		args = append(args, "--config", file)
	}
	closeOnExec()
	cmd := exec.Command(program, args...)
	cmd.Env, cmd.Dir = environ, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return err
	}
	return cmd.Process.Release()
}

// adopts reports whether the server on the data directory is process 1, as in a
// container. It becomes the parent of all that outlive theirs, and takes the
// violent death of any for the crash of one of its own: it restarts.
func (c call) adopts() bool {
	text, err := os.ReadFile(filepath.Join(c.pgdata, "postmaster.pid"))
	return err == nil && strings.HasPrefix(string(text), "1\n")
}

// closeOnExec keeps the files that PostgreSQL left open here from a process that
// this one starts. Its logging collector waits until nobody can write to it.
func closeOnExec() {
	entries, err := os.ReadDir("/dev/fd")
	if err != nil {
		return // no way to know which there are
	}
	for _, e := range entries {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			syscall.CloseOnExec(fd)
		}
	}
}
