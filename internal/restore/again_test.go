package restore_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"go.temporal.io/sdk/testsuite"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/restore"
)

// Class C10: of two restores into one directory, one is refused. And whoever has
// made the directory something else meanwhile keeps what he made.
func TestC10ADirectoryIsRestoredByOneAtATime(t *testing.T) {
	s := newSite(t)
	s.rows(5)
	s.take()
	s.archived()
	p := s.physical("contended", latestMoment)
	other := p
	met := false
	held := map[string]int{}
	var marker []byte
	meet := func() {
		met = true
		var err error
		if marker, err = os.ReadFile(filepath.Join(p.Dir, "pgkeep.restoring")); err != nil {
			t.Error(err)
		}
		held = openDirs(t)
		plan, err := other.Plan(t.Context())
		if err == nil {
			_, err = other.Run(t.Context(), plan)
		}
		if !errors.Is(err, fail.AlreadyRunning) {
			t.Errorf("a second one at the same time: %v", err)
		}
		if err := attempt(other); !fail.KindOf(err).Retry() {
			t.Errorf("another attempt at the same time: %v", err)
		}
	}
	var once sync.Once
	p.Progress = func(string, int64, int64) { once.Do(meet) }
	s.restored(p)
	if !met {
		t.Error("the test has lost its point")
	}
	for _, dir := range []string{p.Dir, p.Tablespaces[s.space]} { // one to work in, and one that keeps errors of writing
		if held[dir] < 2 {
			t.Errorf("while files were written, %s was open %d times", dir, held[dir])
		}
	}
	s.sound(p)
	s.write("contended/data/pgkeep.restoring", string(marker)) // as if it had been cut off there
	if _, err := p.Plan(t.Context()); !errors.Is(err, fail.NotEmpty) || !strings.Contains(fail.HintOf(err), "remove that file") {
		t.Errorf("whole, but for the marker: %v; %s", err, fail.HintOf(err))
	}

	for what, change := range map[string]func(dir string) error{
		"somebody's pg_control": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "global/pg_control"), []byte("not ours"), 0o600)
		},
		"somebody's marker": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, "pgkeep.restoring"), []byte("{}"), 0o600)
		},
		"another directory": func(dir string) error { return errors.Join(os.Rename(dir, dir+"-aside"), os.Mkdir(dir, 0o700)) },
	} {
		p := s.physical(what, latestMoment)
		var once sync.Once
		p.Progress = func(string, int64, int64) {
			if _, err := os.Lstat(filepath.Join(p.Dir, "global")); err != nil {
				return
			}
			once.Do(func() {
				if err := change(p.Dir); err != nil {
					t.Errorf("%s: %v", what, err)
				}
			})
		}
		plan, err := p.Plan(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := p.Run(t.Context(), plan); !errors.Is(err, fail.NotEmpty) {
			t.Errorf("%s: %v", what, err)
		}
		for _, dir := range []string{p.Dir, p.Dir + "-aside"} {
			if b, err := os.ReadFile(filepath.Join(dir, "global/pg_control")); err == nil && string(b) != "not ours" {
				t.Errorf("%s: a server would start on %s", what, dir)
			}
		}
	}
}

// attempt is what a worker does for a workflow, which is the same each time.
func attempt(p restore.Physical) error {
	var suite testsuite.WorkflowTestSuite
	env := suite.NewTestActivityEnvironment()
	r := &activities.Restorer{Prepare: func(context.Context, activities.RestoreRequest) (restore.Physical, error) { return p, nil }}
	env.RegisterActivity(r)
	_, err := env.ExecuteActivity(r.RestoreFiles, activities.RestoreRequest{})
	return err
}

// openDirs counts how often this process has each directory open.
func openDirs(t *testing.T) map[string]int {
	t.Helper()
	links, err := filepath.Glob("/proc/self/fd/*")
	if err != nil {
		t.Fatal(err)
	}
	open := map[string]int{}
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil {
			open[to]++
		}
	}
	return open
}

// What asks for the same restore again, because it has not heard of the end, gets
// what it has already, whatever has become of that.
func TestAFinishedRestoreIsNotDoneAgain(t *testing.T) {
	s := newSite(t)
	s.rows(5)
	s.take()
	s.archived()
	p := s.physical("finished", latestMoment)
	done := func(job string, want bool) {
		t.Helper()
		q := p
		q.Job = job
		if got, err := q.Done(); got != want || err != nil {
			t.Errorf("done for %q: %v, want %v (%v)", job, got, want, err)
		}
	}
	done("first", false)
	p.Job = "first"
	plan, err := p.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p.Progress = func(string, int64, int64) { done("first", false) }
	if _, err := p.Run(t.Context(), plan); err != nil {
		t.Fatal(err)
	}
	p.Progress = nil
	done("first", true)
	done("second", false)
	done("", false)
	s.verifyBackup(p.Dir)
	server, err := s.start(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	done("first", true)
	server.Kill()
	done("first", true)

	// Of a restore that was cut off over it, nothing is done.
	p.Job, p.Delta = "second", true
	if err := os.Remove(filepath.Join(p.Dir, "postmaster.pid")); err != nil {
		t.Fatal(err)
	}
	if plan, err = p.Plan(t.Context()); err != nil {
		t.Fatal(err)
	}
	disguise := func() { // the marker is another attempt's, which is found out last
		marker := filepath.Join(p.Dir, "pgkeep.restoring")
		b, err := os.ReadFile(marker)
		if err == nil {
			err = os.WriteFile(marker, append(b, '\n'), 0o600)
		}
		if err != nil {
			t.Error(err)
		}
	}
	var once sync.Once
	p.Progress = func(string, int64, int64) {
		done("first", false)
		once.Do(disguise)
	}
	if _, err := p.Run(t.Context(), plan); err == nil {
		t.Fatal("the test has lost its point")
	}
	p.Progress = nil
	done("first", false)
	done("second", false)
	s.restored(p)
	done("second", true)

	// So it is with a workflow, whose worker has died with the answer.
	since := filepath.Join(p.Dir, "since")
	for i := range 2 {
		if err := attempt(p); err != nil {
			t.Fatalf("attempt %d: %v", i, err)
		}
		if _, err := os.Stat(since); (err == nil) != (i > 0) {
			t.Errorf("attempt %d: %v", i, err)
		}
		if err := os.WriteFile(since, nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
