package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/config"
)

var killEverywhere = flag.Bool("kill-everywhere", false, "kill at every system call, not at some of the frequent ones")

// A syscall is the n-th call of that name, from 1, in some thread.
type syscallAt struct {
	name string
	n    int
}

// strace runs the program under strace until it ends or holds says enough, and
// then ends both. It reports whether the program was killed before that.
func (w *world) strace(enough func() bool, dir string, options, args []string) (killed bool) {
	w.t.Helper()
	cmd := exec.Command("strace", append(append([]string{"-f"}, options...), append([]string{w.program}, args...)...)...)
	cmd.Dir, cmd.Env = dir, []string{"PATH=/usr/bin:/bin", "HOME=" + w.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: w.cred, Setpgid: true}
	if err := cmd.Start(); err != nil {
		w.t.Fatal(err)
	}
	ended := make(chan bool)
	go func() { defer close(ended); cmd.Wait() }()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for over := false; !over; {
		select {
		case <-ended: // strace ends as the program did
			return cmd.ProcessState.ExitCode() == -1
		case <-deadline:
			over = true
		case <-tick.C:
			over = enough != nil && enough()
		}
	}
	syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	<-ended
	return false
}

// traced returns how often each system call occurred, in the thread where it
// occurred most: strace counts by thread.
func (w *world) traced(enough func() bool, dir string, args ...string) map[string]int {
	w.t.Helper()
	trace := filepath.Join(w.dir, "trace")
	os.Remove(trace)
	w.strace(enough, dir, []string{"-o", trace}, args)
	counts := make(map[string]map[string]int)
	call := regexp.MustCompile(`^([0-9]+) +([a-z0-9_]+)\(`)
	for line := range strings.Lines(string(read(w.t, trace))) {
		if m := call.FindStringSubmatch(line); m != nil {
			if counts[m[2]] == nil {
				counts[m[2]] = make(map[string]int)
			}
			counts[m[2]][m[1]]++
		}
	}
	most := make(map[string]int)
	for name, threads := range counts {
		most[name] = slices.Max(slices.Collect(maps.Values(threads)))
	}
	if most["openat"] == 0 {
		w.t.Fatalf("strace saw nothing: %v", most)
	}
	return most
}

// points chooses where to kill. Every call that changes a file is one; of those
// that occur often and change none, some are.
func points(counts map[string]int) (all []syscallAt) {
	effects := []string{"renameat", "renameat2", "unlinkat", "mkdirat", "fsync", "fchmod", "fchmodat", "flock", "linkat", "pwrite64"}
	some := []string{"openat", "write", "read", "futex", "close"}
	for _, name := range slices.Sorted(maps.Keys(counts)) {
		count := counts[name]
		for n := 1; n <= count; n++ {
			if *killEverywhere || slices.Contains(effects, name) && n <= 12 || slices.Contains(some, name) && n%(count/6+1) == 0 || n == count {
				all = append(all, syscallAt{name, n})
			}
		}
	}
	return all
}

// killed runs the program and has it killed there. It reports whether it came
// there: no two runs are the same.
func (w *world) killed(at syscallAt, enough func() bool, dir string, args ...string) bool {
	w.t.Helper()
	return w.strace(enough, dir, []string{"-o", "/dev/null", "-e", "trace=" + at.name,
		"-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", at.name, at.n)}, args)
}

// TestC5FetchKilledAnywhere kills fetch, and what fetches ahead, with SIGKILL at
// its system calls. What it was to deliver is not there or whole, and the next
// run delivers it.
func TestC5FetchKilledAnywhere(t *testing.T) {
	w := newWorld(t, 1)
	_, segments := w.fill()
	segments = segments[2:6]
	var contents [][]byte
	for _, s := range segments {
		contents = append(contents, read(t, filepath.Join(w.pg.DataDir, "pg_wal", s)))
	}
	text := string(read(t, w.restore))
	alone := w.write("alone.yaml", strings.Replace(text, `main: {`, `main: {wal: {prefetch: 0}, `, 1))
	if _, err := config.Load(config.Options{File: alone, Hostname: "x"}); err != nil {
		t.Fatal(err)
	}

	// fresh makes what fetch looks at of a data directory. Somebody seems to
	// fetch ahead already, until the lock is released.
	n := 0
	fresh := func() (dir string, unlock func()) {
		n++
		dir = filepath.Join(w.dir, fmt.Sprint("data", n))
		for _, d := range []string{".", "global", "pg_wal", "pg_wal/pgkeep", "pg_wal/pgkeep/prefetch"} {
			if err := os.Mkdir(filepath.Join(dir, d), 0o700); err != nil {
				t.Fatal(err)
			}
			w.own(filepath.Join(dir, d))
		}
		for _, name := range []string{"PG_VERSION", "global/pg_control"} {
			w.write(strings.TrimPrefix(filepath.Join(dir, name), w.dir+"/"), string(read(t, filepath.Join(w.pg.DataDir, name))))
		}
		lock := w.write(strings.TrimPrefix(filepath.Join(dir, "pg_wal/pgkeep/prefetch/lock"), w.dir+"/"), "")
		f, err := os.Open(lock)
		if err != nil {
			t.Fatal(err)
		}
		if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		return dir, func() { f.Close() }
	}
	fetch := func(config string, i int) []string {
		return []string{"fetch", "--timeout", "10s", "--config", config, segments[i], "pg_wal/RECOVERYXLOG"}
	}
	// delivered wants a segment, or nothing, or that it comes at the next call.
	delivered := func(what any, dir, config string, i int) {
		t.Helper()
		target := filepath.Join(dir, "pg_wal/RECOVERYXLOG")
		if b, err := os.ReadFile(target); err == nil && !bytes.Equal(b, contents[i]) {
			t.Errorf("%v: killed, and something else stands there, %d bytes", what, len(b))
		}
		os.Remove(target) // as PostgreSQL does
		w.wal(0, "", dir, fetch(config, i)...)
		if b, err := os.ReadFile(target); err != nil || !bytes.Equal(b, contents[i]) {
			t.Errorf("%v: the next run delivers %d bytes, %v", what, len(b), err)
		}
		os.Remove(target)
	}
	// enough wants that kills hit.
	enough := func(points, hit int) {
		t.Helper()
		t.Logf("killed at %d of %d points", hit, points)
		if hit < points/2 || points < 40 {
			t.Errorf("killed at %d of %d points", hit, points)
		}
	}
	// asked is a directory in which the first was asked for.
	asked := func() string {
		dir, unlock := fresh()
		w.wal(0, "", dir, fetch(w.restore, 0)...)
		os.Remove(filepath.Join(dir, "pg_wal/RECOVERYXLOG"))
		unlock()
		return dir
	}
	// ready has the segments behind the first fetched ahead, into a new directory.
	ready := func() (dir string, done func()) {
		dir = asked()
		ctx, cancel := context.WithCancel(t.Context())
		cmd := exec.CommandContext(ctx, w.program, "ahead", "--config", w.restore, "--cluster", "main", "--pgdata", dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: w.cred}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		until(t, "the next segment is ready", func() bool {
			found, err := filepath.Glob(filepath.Join(dir, "pg_wal/pgkeep/prefetch", segments[1]+"-*"))
			return err == nil && len(found) == 1
		})
		return dir, func() { cancel(); cmd.Wait() }
	}

	t.Run("fetch from the archive", func(t *testing.T) {
		dir, unlock := fresh()
		counts := w.traced(nil, dir, fetch(alone, 0)...)
		unlock()
		all := points(counts)
		hit := 0
		for _, at := range all {
			dir, unlock := fresh()
			if w.killed(at, nil, dir, fetch(alone, 0)...) {
				hit++
			}
			delivered(at, dir, alone, 0)
			unlock()
			os.RemoveAll(dir)
		}
		enough(len(all), hit)
	})
	t.Run("fetch of what is ready", func(t *testing.T) {
		dir, done := ready()
		counts := w.traced(nil, dir, fetch(w.restore, 1)...)
		done()
		all := points(counts)
		hit := 0
		dir, done = ready()
		defer func() { done() }()
		for _, at := range all {
			found, _ := filepath.Glob(filepath.Join(dir, "pg_wal/pgkeep/prefetch", segments[1]+"-*"))
			if len(found) != 1 { // used by now
				done()
				os.RemoveAll(dir)
				dir, done = ready()
			}
			if w.killed(at, nil, dir, fetch(w.restore, 1)...) {
				hit++
			}
			delivered(at, dir, w.restore, 1)
		}
		enough(len(all), hit)
	})
	t.Run("what fetches ahead", func(t *testing.T) {
		ahead := func(dir string) []string {
			return []string{"ahead", "--config", w.restore, "--cluster", "main", "--pgdata", dir}
		}
		full := func(dir string) func() bool {
			return func() bool {
				found, err := filepath.Glob(filepath.Join(dir, "pg_wal/pgkeep/prefetch/*-*"))
				return err == nil && len(found) == 8
			}
		}
		dir := asked()
		all := points(w.traced(full(dir), "/", ahead(dir)...))
		hit := 0
		for _, at := range all {
			dir := asked()
			if w.killed(at, full(dir), "/", ahead(dir)...) {
				hit++
			}
			os.Remove(filepath.Join(dir, "pg_wal/RECOVERYXLOG"))
			delivered(at, dir, w.restore, 1) // with another one that fetches ahead
			delivered(at, dir, alone, 2)
			os.RemoveAll(dir)
		}
		enough(len(all), hit)
	})
}
