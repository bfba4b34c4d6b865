package lab

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Build makes programs of pgkeep in a directory, as they are shipped: static. The
// race detector's cgo would be another build, and not what users run.
func Build(ctx context.Context, dir string, programs ...string) error {
	args := []string{"build", "-trimpath", "-ldflags=-s -w", "-o", dir + "/"}
	for _, name := range programs {
		args = append(args, "github.com/pgkeep/pgkeep/cmd/"+name)
	}
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build %s: %w: %s", strings.Join(programs, ", "), err, bytes.TrimSpace(out))
	}
	return nil
}

// buildTool returns the path of a program built from package pkg of the module
// in moduleDir, a directory of pgkeep's source tree. The first caller builds it
// and the user's cache directory keeps it, until a source file of the module,
// its go.sum or Go itself changes.
func buildTool(ctx context.Context, name, moduleDir, pkg string) (path string, err error) {
	root, err := moduleRoot()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, moduleDir)
	key, err := sourceHash(dir)
	if err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = os.TempDir()
	}
	cache = filepath.Join(cache, "pgkeep-lab")
	if err := os.MkdirAll(cache, 0o700); err != nil {
		return "", err
	}
	program := filepath.Join(cache, name+"-"+key)

	// Test packages run at once, each a process: one builds, the others wait.
	unlock, err := lockFile(ctx, filepath.Join(cache, name+".lock"))
	if err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	defer unlock()
	now := time.Now()
	if os.Chtimes(program, now, now) == nil { // it is there, and in use
		return program, nil
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-C", dir, "-trimpath", "-ldflags=-s -w", "-o", program+".new", pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build %s: %w: %s", name, err, bytes.TrimSpace(out))
	}
	if err := os.Rename(program+".new", program); err != nil {
		return "", err
	}
	return program, prune(cache, name+"-*", now.AddDate(0, 0, -7))
}

// sourceHash names what a build of the module in dir is made of, as far as it
// stands in this source tree: other modules are in go.sum.
func sourceHash(dir string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), runtime.GOARCH)
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		switch name := d.Name(); {
		case strings.HasSuffix(name, "_test.go"):
			return nil
		case strings.HasSuffix(name, ".go"), name == "go.mod", name == "go.sum":
		default:
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		fmt.Fprintf(h, "%q %x\n", rel, sha256.Sum256(b))
		return err
	})
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), err
}

// lockFile takes an exclusive lock between processes, which ends with unlock or
// with this process.
func lockFile(ctx context.Context, path string) (unlock func() error, err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f.Close, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, ctx.Err()), f.Close())
		}
	}
}

// prune removes what nobody has asked for since then: a program or a cluster is
// large, and every change to what it is made of makes another.
func prune(dir, pattern string, since time.Time) error {
	old, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil {
		return err
	}
	for _, path := range old {
		if info, err := os.Stat(path); err == nil && info.ModTime().Before(since) {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	return nil
}

// moduleRoot finds pgkeep's source tree, from the working directory upwards.
func moduleRoot() (string, error) {
	wd, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := wd; ; dir = filepath.Dir(dir) {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(b), "module github.com/pgkeep/pgkeep\n") {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("%s is not inside pgkeep's source tree", wd)
		}
	}
}
