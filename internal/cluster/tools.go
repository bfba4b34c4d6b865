package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// Tools are PostgreSQL's own programs, three of one version from one directory.
type Tools struct {
	Dir     string
	Version pg.Version
}

func (t Tools) path(name string) string { return filepath.Join(t.Dir, name) }

var toolNames = []string{"pg_dump", "pg_dumpall", "pg_restore"}

// Tools finds programs able to dump a server of that version: of its major
// version or a newer one, for pg_dump refuses servers newer than itself. It
// looks into BinDir alone if there is one; else where Debian's and the PGDG's
// packages install them, the server's own version before newer ones, and last
// into PATH. Finding none is fail.PGVersion.
func (c Cluster) Tools(ctx context.Context, server pg.Version) (Tools, error) {
	if c.BinDir != "" {
		t, err := inspect(ctx, c.BinDir)
		if err == nil {
			err = t.fit(server)
		}
		return t, toolsError(err, server)
	}
	var refused error
	for _, dir := range candidates(server.Major(), "pg_dump") {
		t, err := inspect(ctx, dir)
		if err == nil {
			err = t.fit(server)
		}
		if err == nil {
			return t, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			refused = errors.Join(refused, err)
		}
	}
	if refused == nil {
		refused = errors.New("not found")
	}
	return Tools{}, toolsError(refused, server)
}

// ServerDirs lists the directories on this host that may hold the programs of a
// server: the one that is configured, if it is not "", those of Debian's and the
// PGDG's packages, and where PATH leads to. It is never nil.
func ServerDirs(configured string) []string {
	dirs := []string{}
	if configured != "" {
		dirs = append(dirs, configured)
	}
	return append(dirs, candidates(0, "postgres")...)
}

// ServerVersion asks the server in a directory for its version. Where there is
// none, the error is fs.ErrNotExist.
func ServerVersion(ctx context.Context, dir string) (pg.Version, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	program := filepath.Join(dir, "postgres")
	out, err := exec.CommandContext(ctx, program, "--version").Output()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", program, err)
	}
	v, err := parseToolVersion(string(out))
	if err != nil {
		return 0, fmt.Errorf("%s: %w", program, err)
	}
	return v, nil
}

func toolsError(err error, server pg.Version) error {
	if err == nil {
		return nil
	}
	return fail.Hint(fmt.Errorf("find pg_dump for PostgreSQL %v: %w: %w", server, err, fail.PGVersion),
		fmt.Sprintf("apt-get install postgresql-client-%d, or name the directory of its programs as bin_dir", server.Major()))
}

// candidates lists the directories to look into for a program, best first: those
// of that major version and newer ones, then the one in PATH.
func candidates(major int, program string) []string {
	type place struct {
		major int
		dir   string
	}
	var places []place
	for _, pattern := range []string{"/usr/lib/postgresql/*/bin", "/usr/pgsql-*/bin"} {
		dirs, _ := filepath.Glob(pattern) // the pattern is well-formed
		for _, dir := range dirs {
			name := filepath.Base(filepath.Dir(dir))
			if m, err := strconv.Atoi(strings.TrimPrefix(name, "pgsql-")); err == nil && m >= major {
				places = append(places, place{m, dir})
			}
		}
	}
	slices.SortStableFunc(places, func(a, b place) int { return a.major - b.major })
	var dirs []string
	for _, p := range places {
		dirs = append(dirs, p.dir)
	}
	if path, err := exec.LookPath(program); err == nil {
		dirs = append(dirs, filepath.Dir(path))
	}
	return dirs
}

// inspect asks the programs in a directory for their version.
func inspect(ctx context.Context, dir string) (Tools, error) {
	t := Tools{Dir: dir}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for _, name := range toolNames {
		out, err := exec.CommandContext(ctx, t.path(name), "--version").Output()
		if err != nil {
			return Tools{}, fmt.Errorf("%s: %w", t.path(name), err)
		}
		v, err := parseToolVersion(string(out))
		if err != nil {
			return Tools{}, fmt.Errorf("%s: %w", t.path(name), err)
		}
		if t.Version != 0 && t.Version != v {
			return Tools{}, fmt.Errorf("%s is of version %v, pg_dump of %v", t.path(name), v, t.Version)
		}
		t.Version = v
	}
	return t, nil
}

func (t Tools) fit(server pg.Version) error {
	if t.Version.Major() < server.Major() {
		return fmt.Errorf("%s is of version %v, too old for a server of %v", t.path("pg_dump"), t.Version, server)
	}
	return nil
}

// parseToolVersion reads "pg_dump (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)".
func parseToolVersion(out string) (pg.Version, error) {
	_, rest, ok := strings.Cut(out, "(PostgreSQL) ")
	fields := strings.Fields(rest)
	if !ok || len(fields) == 0 {
		return 0, fmt.Errorf("no version in %.100q", out)
	}
	return parseVersion(fields[0])
}

// parseVersion reads "15.18". What is not released yet, "19beta1" or "19devel",
// counts as the zeroth of its major version.
func parseVersion(s string) (pg.Version, error) {
	major, minor, dotted := strings.Cut(s, ".")
	if !dotted {
		if i := strings.IndexFunc(s, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
			major = s[:i]
		}
		minor = "0"
	}
	m, err := strconv.ParseUint(major, 10, 16)
	if err != nil || m < 10 {
		return 0, fmt.Errorf("parse PostgreSQL version %.50q", s)
	}
	n, err := strconv.ParseUint(minor, 10, 13)
	if err != nil {
		return 0, fmt.Errorf("parse PostgreSQL version %.50q", s)
	}
	return pg.Version(m*10000 + n), nil
}
