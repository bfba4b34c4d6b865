package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/client"
	sdklog "go.temporal.io/sdk/log"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
)

// pgkeep runs a command and returns what it printed, and its exit status.
func pgkeep(ctx context.Context, args ...string) (out, errw string, status int) {
	var o, e bytes.Buffer
	status = run(ctx, append([]string{"pgkeep"}, args...), strings.NewReader(""), &o, &e)
	return o.String(), e.String(), status
}

// upload is a workflow whose one activity fails once, tells how far it is, and
// goes on until it is cancelled.
func upload(ctx workflow.Context) error {
	ctx = workflow.WithActivityOptions(ctx, workflow.ActivityOptions{
		StartToCloseTimeout: time.Minute, HeartbeatTimeout: 10 * time.Second, WaitForCancellation: true,
		RetryPolicy: &temporal.RetryPolicy{InitialInterval: time.Millisecond},
	})
	return workflow.ExecuteActivity(ctx, "Upload").Get(ctx, nil)
}

func uploadActivity(ctx context.Context) error {
	if activity.GetInfo(ctx).Attempt == 1 {
		return temporal.NewApplicationError("put packs/01: 503\nand much more", string(fail.StoreDown))
	}
	for ctx.Err() == nil {
		activity.RecordHeartbeat(ctx, activities.Progress{Stage: "upload", Done: 1 << 20, Total: 4 << 20})
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return ctx.Err()
}

func TestPsShowsRunsAndCancelStopsThem(t *testing.T) {
	s := lab.TemporalForTest(t)
	t.Setenv("PGKEEP_TEMPORAL_ADDRESS", s.Address)
	t.Setenv("PGKEEP_TEMPORAL_UI_URL", s.UIURL)
	c, err := client.Dial(client.Options{HostPort: s.Address, Namespace: s.Namespace, Logger: sdklog.NewStructuredLogger(slog.New(slog.DiscardHandler))})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	w := worker.New(c, "test", worker.Options{MaxHeartbeatThrottleInterval: 100 * time.Millisecond, DefaultHeartbeatThrottleInterval: 100 * time.Millisecond})
	w.RegisterWorkflowWithOptions(upload, workflow.RegisterOptions{Name: "pgkeep.LogicalBackup"})
	w.RegisterActivityWithOptions(uploadActivity, activity.RegisterOptions{Name: "Upload"})
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	defer w.Stop()

	if out, errw, status := pgkeep(t.Context(), "ps"); out != "" || errw != "pgkeep: nothing is running\n" || status != 0 {
		t.Errorf("with nothing running: %q, %q, %d", out, errw, status)
	}
	if out, errw, status := pgkeep(t.Context(), "cancel", "main"); out != "" || !strings.HasPrefix(errw, "pgkeep: error: nothing is running for \"main\"\n") || status != 1 {
		t.Errorf("cancel with nothing running: %q, %q, %d", out, errw, status)
	}

	main := start(t, c, "pgkeep/main/logical")
	other := start(t, c, "pgkeep/other/logical")
	link := s.UIURL + "/namespaces/pgkeep/workflows/pgkeep%2Fmain%2Flogical/" + main.GetRunID()
	eventually(t, "ps shows the progress", func() bool {
		out, _, _ := pgkeep(t.Context(), "ps")
		return strings.Contains(out, "pgkeep/main/logical  LogicalBackup, for ") &&
			strings.Count(out, "\n  Upload: upload, 1.0 MiB of 4.0 MiB (25 %), attempt 2\n    failed before: put packs/01: 503\n  "+s.UIURL) == 2 &&
			strings.Contains(out, link+"\n")
	})
	out, errw, status := pgkeep(t.Context(), "ps", "--json")
	var answer struct {
		Schema string     `json:"schema"`
		Runs   []runShown `json:"runs"`
	}
	if err := json.Unmarshal([]byte(out), &answer); err != nil || errw != "" || status != 0 {
		t.Fatalf("ps --json: %v, %q, %d", err, errw, status)
	}
	if answer.Schema != "pgkeep.ps/1" || len(answer.Runs) != 2 || answer.Runs[0].Workflow != "pgkeep/main/logical" ||
		answer.Runs[0].Activities[0].Progress.Total != 4<<20 || answer.Runs[0].Link != link {
		t.Errorf("ps --json printed %s", out)
	}

	out, errw, status = pgkeep(t.Context(), "cancel", "--reason", "wrong night", "main")
	if out != "cancelling pgkeep/main/logical\n"+link+"\n" || errw != "" || status != 0 {
		t.Errorf("cancel: %q, %q, %d", out, errw, status)
	}
	if err := main.Get(t.Context(), nil); !temporal.IsCanceledError(err) {
		t.Errorf("the run ended with %v", err)
	}
	if got := cancelReason(t, c, main); got != "wrong night" {
		t.Errorf("the history gives the reason %q", got)
	}
	eventually(t, "only the other runs", func() bool {
		out, _, _ := pgkeep(t.Context(), "ps")
		return !strings.Contains(out, "main") && strings.Contains(out, "pgkeep/other/logical")
	})
	if _, errw, status := pgkeep(t.Context(), "cancel", "--json", "pgkeep/other/logical"); errw != "" || status != 0 {
		t.Errorf("cancel of a workflow: %q, %d", errw, status)
	}
	if err := other.Get(t.Context(), nil); !temporal.IsCanceledError(err) {
		t.Errorf("the other run ended with %v", err)
	}
}

func cancelReason(t *testing.T, c client.Client, run client.WorkflowRun) string {
	t.Helper()
	history := c.GetWorkflowHistory(t.Context(), run.GetID(), run.GetRunID(), false, enumspb.HISTORY_EVENT_FILTER_TYPE_ALL_EVENT)
	for history.HasNext() {
		event, err := history.Next()
		if err != nil {
			t.Fatal(err)
		}
		if a := event.GetWorkflowExecutionCancelRequestedEventAttributes(); a != nil {
			return a.Cause
		}
	}
	return ""
}

func start(t *testing.T, c client.Client, id string) client.WorkflowRun {
	t.Helper()
	run, err := c.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{ID: id, TaskQueue: "test"}, "pgkeep.LogicalBackup")
	if err != nil {
		t.Fatal(err)
	}
	return run
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for range 200 {
		if ok() {
			return
		}
		<-again.C
	}
	out, errw, _ := pgkeep(t.Context(), "ps")
	t.Fatalf("did not come true: %s; ps prints\n%s%s", what, out, errw)
}

// mute listens and never answers.
func mute(t *testing.T) (addr string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr().String()
}

func TestServerThatDoesNotAnswerIsDown(t *testing.T) {
	t.Setenv("PGKEEP_TEMPORAL_ADDRESS", mute(t))
	began := time.Now()
	out, errw, status := pgkeep(t.Context(), "ps")
	if out != "" || status != fail.TemporalDown.ExitStatus() || !strings.Contains(errw, "hint: is the Temporal server up?") {
		t.Errorf("printed %q, %q, %d", out, errw, status)
	}
	if took := time.Since(began); took > 3*dialTimeout {
		t.Errorf("it took %s to find out", took)
	}
}

func TestInterruptedCommandExitsAsCancelled(t *testing.T) {
	t.Setenv("PGKEEP_TEMPORAL_ADDRESS", mute(t))
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(200*time.Millisecond, cancel)
	out, errw, status := pgkeep(ctx, "ps")
	if out != "" || errw != "pgkeep: error: interrupted\n" || status != fail.Cancelled.ExitStatus() {
		t.Errorf("printed %q, %q, %d", out, errw, status)
	}
}

func TestLinkEscapesTheWorkflowID(t *testing.T) {
	for ui, want := range map[string]string{
		"https://ui": "https://ui/namespaces/a%20b/workflows/pgkeep%2Fmain%2Flogical/r",
		"":           "",
	} {
		s := &server{namespace: "a b", ui: ui}
		if got := s.link("pgkeep/main/logical", "r"); got != want {
			t.Errorf("link = %q, want %q", got, want)
		}
	}
}

func TestWebUIIsGuessed(t *testing.T) {
	for addr, want := range map[string]string{
		"localhost:7233": "http://localhost:8233", "127.0.0.1:7233": "http://127.0.0.1:8233", "[::1]:7233": "http://[::1]:8233",
		"ns.acc.tmprl.cloud:7233": "https://cloud.temporal.io", "us-east-1.aws.api.temporal.io:7233": "https://cloud.temporal.io",
		"temporal.example:7233": "", "nonsense": "",
	} {
		if got := uiOf(addr); got != want {
			t.Errorf("uiOf(%s) = %q, want %q", addr, got, want)
		}
	}
}
