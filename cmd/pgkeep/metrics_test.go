package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What a worker knows is told also while it waits for Temporal: that is when
// somebody looks.
func TestMetricsAreServedBeforeTemporalIsThere(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	dir := t.TempDir()
	file := filepath.Join(dir, "pgkeep.yaml")
	if err := os.Mkdir(filepath.Join(dir, "repository"), 0o700); err != nil {
		t.Fatal(err)
	}
	err = os.WriteFile(file, fmt.Appendf(nil, `
repository: {url: 'file://%[1]s/repository', encryption: none}
keys: {signing_key: %[1]s/signing.key}
spool: %[1]s/spool
temporal: {address: "127.0.0.1:9"} # nobody is there
metrics: {listen: "%[2]s"}
clusters:
  main: {conninfo: "host=%[1]s", retention: {window: 14d}}
`, dir, address), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	command := func(ctx context.Context, said io.Writer, args ...string) int {
		return run(ctx, append([]string{"pgkeep", "--config", file}, args...), strings.NewReader(""), io.Discard, said)
	}
	var said bytes.Buffer
	if status := command(t.Context(), &said, "key", "init"); status != 0 {
		t.Fatalf("%d: %s", status, &said)
	}
	if status := command(t.Context(), &said, "worker"); status != 2 || !strings.Contains(said.String(), "metrics.listen") {
		t.Errorf("with a port that is taken: %d: %s", status, &said)
	}

	l.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan int)
	go func() { done <- command(ctx, io.Discard, "worker") }()
	text := ""
	eventually(t, "it has looked at the repository, and failed to at the server", func() bool {
		rsp, err := http.Get("http://" + address + "/metrics")
		if err != nil {
			return false
		}
		defer rsp.Body.Close()
		b, err := io.ReadAll(rsp.Body)
		text = string(b)
		return err == nil && strings.Contains(text, `pgkeep_look_success{cluster="main",source="repository"} 1`)
	})
	for _, line := range []string{
		`pgkeep_backups{cluster="main",kind="logical"} 0`,
		`pgkeep_wal_ready_files{cluster="main"} -1`,
		`pgkeep_window_promised_seconds{cluster="main"} 1.2096e+06`,
		`pgkeep_schedule_present{cluster="main",kind="logical"} -1`,
	} {
		if !strings.Contains(text, "\n"+line+"\n") {
			t.Errorf("not told: %s", line)
		}
	}
	cancel()
	<-done
	if _, err := http.Get("http://" + address + "/metrics"); err == nil {
		t.Error("it answers when it is gone")
	}
}
