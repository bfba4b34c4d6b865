package lab

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TemporalOptions describe a Temporal server. The zero value is an empty one in
// a directory of its own, which Stop removes.
type TemporalOptions struct {
	// Dir holds the database and the log. A database that is there already is
	// kept. Empty: a new directory under os.TempDir, removed by Stop.
	Dir string
	// Port is that of Temporal, UIPort that of the Web UI. 0: any free one.
	Port, UIPort int
}

// Temporal is a running pgkeep-server: Temporal and its Web UI on loopback
// ports, with a namespace that has pgkeep's search attributes. It dies with this
// process, also when that is killed. Its methods are not to be called from
// several goroutines at once.
type Temporal struct {
	Address   string // host:port of Temporal
	Namespace string
	UIURL     string // of the Web UI, without a path
	Dir       string

	program string
	ownDir  bool

	process *os.Process // nil: it does not run
	exited  <-chan struct{}
}

// StartTemporal builds the server, if need be, starts it and waits until it
// answers. The first build on a machine takes minutes.
func StartTemporal(ctx context.Context, opt TemporalOptions) (*Temporal, error) {
	program, err := buildTool(ctx, "pgkeep-server", "cmd/pgkeep-server", ".")
	if err != nil {
		return nil, fmt.Errorf("start Temporal: %w", err)
	}
	s := &Temporal{Dir: opt.Dir, program: program}
	if s.Dir == "" {
		if s.Dir, err = os.MkdirTemp("", "pgkeep-temporal-"); err != nil {
			return nil, fmt.Errorf("start Temporal: %w", err)
		}
		s.ownDir = true
	}
	if err := s.start(ctx, fmt.Sprint(opt.Port), fmt.Sprint(opt.UIPort)); err != nil {
		return nil, errors.Join(fmt.Errorf("start Temporal: %w", err), s.clean())
	}
	return s, nil
}

// TemporalForTest starts a server for the time of the test.
func TemporalForTest(t testing.TB) *Temporal {
	t.Helper()
	s, err := StartTemporal(t.Context(), TemporalOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// start runs the server and waits until it says where it listens.
func (s *Temporal) start(ctx context.Context, port, uiPort string) error {
	if err := os.MkdirAll(s.Dir, 0o700); err != nil {
		return err
	}
	log, err := os.OpenFile(s.logPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	said, out, err := os.Pipe()
	if err != nil {
		return err
	}
	defer said.Close()
	cmd := exec.Command(s.program, "--db", filepath.Join(s.Dir, "temporal.db"), "--port", port, "--ui-port", uiPort, "--json") // without ctx: it lives until Stop
	cmd.Stdout, cmd.Stderr = out, log
	s.exited, err = startChild(cmd, syscall.SIGKILL)
	out.Close()
	if err != nil {
		return err
	}
	s.process = cmd.Process

	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	defer context.AfterFunc(ctx, func() { said.SetReadDeadline(time.Now()) })()
	var ready struct{ Address, Namespace, UI string }
	if err := json.NewDecoder(said).Decode(&ready); err != nil {
		s.Kill()
		return errors.Join(fmt.Errorf("not ready: %w; its log says: %s", err, s.logTail()), ctx.Err())
	}
	s.Address, s.Namespace, s.UIURL = ready.Address, ready.Namespace, ready.UI
	return nil
}

func (s *Temporal) logPath() string { return filepath.Join(s.Dir, "temporal.log") }

func (s *Temporal) logTail() string {
	b, err := os.ReadFile(s.logPath())
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(b[max(0, len(b)-2000):]))
}

// Stop ends the server and removes its directory, unless it was given one. A
// server whose directory goes is killed, which takes a second or two less. A
// stopped server can be stopped again.
func (s *Temporal) Stop() error {
	if s.ownDir {
		s.Kill()
	}
	return errors.Join(s.shutDown(), s.clean())
}

func (s *Temporal) shutDown() error {
	if s.process == nil {
		return nil
	}
	s.process.Signal(syscall.SIGTERM) // an error means that it has gone
	select {
	case <-s.exited:
		s.process = nil
		return nil
	case <-time.After(15 * time.Second):
		s.Kill()
		return fmt.Errorf("stop Temporal: still there after 15 s; its log says: %s", s.logTail())
	}
}

// Kill ends the server at once, as a crash does. Restart brings it back.
func (s *Temporal) Kill() {
	if s.process == nil {
		return
	}
	s.process.Kill() // an error means that it has gone
	<-s.exited
	s.process = nil
}

// Restart starts the server again on its database and its ports. One that runs
// is stopped first.
func (s *Temporal) Restart(ctx context.Context) error {
	if err := s.shutDown(); err != nil {
		return err
	}
	_, port, err := net.SplitHostPort(s.Address)
	if err != nil {
		return err
	}
	_, uiPort, err := net.SplitHostPort(strings.TrimPrefix(s.UIURL, "http://"))
	if err != nil {
		return err
	}
	if err := s.start(ctx, port, uiPort); err != nil {
		return fmt.Errorf("restart Temporal: %w", err)
	}
	return nil
}

func (s *Temporal) clean() error {
	if !s.ownDir {
		return nil
	}
	return os.RemoveAll(s.Dir)
}
