package lab_test

import (
	"context"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.temporal.io/sdk/client"
	sdklog "go.temporal.io/sdk/log"

	"github.com/pgkeep/pgkeep/internal/lab"
)

func dialTemporal(t *testing.T, s *lab.Temporal) client.Client {
	t.Helper()
	c, err := client.Dial(client.Options{HostPort: s.Address, Namespace: s.Namespace, Logger: sdklog.NewStructuredLogger(slog.New(slog.DiscardHandler))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestTemporalKeepsWorkflowsAndPlaceOverACrash(t *testing.T) {
	s := lab.TemporalForTest(t)
	c := dialTemporal(t, s)
	if _, err := c.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{ID: "w", TaskQueue: "nobody"}, "Nothing"); err != nil {
		t.Fatal(err)
	}
	resp, err := http.Get(s.UIURL + "/namespaces/" + s.Namespace + "/workflows")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Errorf("the web ui answers %s", resp.Status)
	}
	address, ui := s.Address, s.UIURL
	for _, end := range []struct {
		name string
		do   func()
	}{{"killed", s.Kill}, {"running", func() {}}} {
		end.do()
		if err := s.Restart(t.Context()); err != nil {
			t.Fatalf("%s: %v", end.name, err)
		}
		if s.Address != address || s.UIURL != ui {
			t.Errorf("%s: now at %s and %s, before at %s and %s", end.name, s.Address, s.UIURL, address, ui)
		}
		if _, err := dialTemporal(t, s).DescribeWorkflowExecution(t.Context(), "w", ""); err != nil {
			t.Errorf("%s: %v", end.name, err)
		}
	}
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(s.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory is left: %v", err)
	}
}

func TestTemporalThatCannotStartSaysWhy(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "temporal.db"), []byte(strings.Repeat("no database ", 1000)), 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := lab.StartTemporal(t.Context(), lab.TemporalOptions{Dir: dir})
	if err == nil || !strings.Contains(err.Error(), "file is not a database") {
		t.Errorf("err = %v, want what the server said", err)
	}
}

// The test runs itself as the parent, which starts a server and is killed.
func TestTemporalDiesWithItsParent(t *testing.T) {
	const beParent = "PGKEEP_LAB_TEST_BE_PARENT"
	if dir := os.Getenv(beParent); dir != "" {
		s, err := lab.StartTemporal(t.Context(), lab.TemporalOptions{Dir: dir})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "address"), []byte(s.Address), 0o600); err != nil {
			t.Fatal(err)
		}
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
	}
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestTemporalDiesWithItsParent$")
	cmd.Env = append(os.Environ(), beParent+"="+dir)
	if out, err := cmd.CombinedOutput(); err == nil {
		t.Fatalf("the parent was not killed: %s", out)
	}
	if _, err := os.Stat(filepath.Join(dir, "address")); err != nil {
		t.Fatal(err)
	}
	// A server that still lives holds the lock of its database.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	for {
		s, err := lab.StartTemporal(ctx, lab.TemporalOptions{Dir: dir})
		if err == nil {
			if err := s.Stop(); err != nil {
				t.Error(err)
			}
			return
		}
		if ctx.Err() != nil {
			t.Fatal(err)
		}
	}
}
