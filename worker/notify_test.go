package worker_test

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/client"

	"github.com/pgkeep/pgkeep/internal/notify"
	"github.com/pgkeep/pgkeep/workflows"
)

// A listener is a server of somebody else's, which does not always answer well.
type listener struct {
	mu     sync.Mutex
	asked  []string // method, path and body
	answer []int    // to the first requests; 0 hangs up, 200 comes after
}

func (l *listener) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, _ := io.ReadAll(r.Body)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.asked = append(l.asked, r.Method+" "+r.URL.Path+" "+string(body))
	status := http.StatusOK
	if len(l.answer) > 0 {
		status, l.answer = l.answer[0], l.answer[1:]
	}
	if status == 0 {
		panic(http.ErrAbortHandler)
	}
	w.WriteHeader(status)
}

// heard returns what was asked since the last call.
func (l *listener) heard() (all []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	all, l.asked = l.asked, nil
	return all
}

// Who is to hear of a run hears of it, though not at the first try; the run comes
// out as it does without; and nobody reads the addresses.
func TestPeopleAreToldHowRunsEnd(t *testing.T) {
	const secret = "T0pS3cr3t"
	r := setup(t)
	hook, watch := &listener{answer: []int{0, http.StatusBadGateway}}, &listener{answer: []int{http.StatusServiceUnavailable, 0}}
	hooks, watches := httptest.NewServer(hook), httptest.NewServer(watch)
	defer hooks.Close()
	defer watches.Close()
	var err error
	if r.notifier, err = notify.New(hooks.URL+"/"+secret, watches.URL+"/"+secret+"/{cluster}-{kind}", false); err != nil {
		t.Fatal(err)
	}
	r.serve(t, time.Second)
	run := r.start(t)
	if err := run.Get(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if got := watch.heard(); len(got) != 3 || got[2] != "GET /"+secret+"/main-logical " {
		t.Errorf("the watch was asked %q, want three times", got)
	}
	if got := hook.heard(); len(got) > 0 {
		t.Errorf("the webhook heard of a success: %q", got)
	}
	r.unsaid(t, run, secret, hooks.Listener.Addr().String(), watches.Listener.Addr().String())

	run, err = r.client.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{ID: "of-nobody", TaskQueue: workflows.Queue},
		workflows.LogicalBackupName, workflows.LogicalBackupRequest{Cluster: "nobody", Host: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := run.Get(t.Context(), nil); err == nil {
		t.Fatal("a backup of a cluster that nobody knows was taken")
	}
	got := hook.heard()
	if len(got) != 3 {
		t.Fatalf("the webhook was called %q, want three times", got)
	}
	var n struct {
		Text, Schema string
		notify.Notice
	}
	_, body, _ := strings.Cut(got[2], secret+" ")
	if err := json.Unmarshal([]byte(body), &n); err != nil {
		t.Fatalf("%v in %s", err, got[2])
	}
	if n.Outcome != notify.Failed || n.Stage != "preflight" || n.Reason != "bad-config" || n.Schema != "pgkeep.notice/1" || n.Run != run.GetID()+"/"+run.GetRunID() ||
		!strings.HasPrefix(n.Text, "pgkeep: logical backup of nobody on db1 failed during preflight: ") || strings.Contains(n.Text, "\n") {
		t.Errorf("told was %+v", n)
	}
	if got := watch.heard(); len(got) > 0 {
		t.Errorf("the watch was asked after a failure: %q", got)
	}
	r.unsaid(t, run, secret, hooks.Listener.Addr().String(), watches.Listener.Addr().String())

	// An address that answers no to all is given up, and the backup stands.
	watch.mu.Lock()
	watch.answer = []int{http.StatusGone}
	watch.mu.Unlock()
	if err := r.start(t).Get(t.Context(), nil); err != nil {
		t.Errorf("a backup of which nobody can be told: %v", err)
	}
	if got := watch.heard(); len(got) != 1 {
		t.Errorf("the watch was asked %q after it said that it is gone", got)
	}
}

// unsaid looks for secrets in the history of a run.
func (r *rig) unsaid(t *testing.T, run client.WorkflowRun, secrets ...string) {
	t.Helper()
	events := r.client.GetWorkflowHistory(t.Context(), run.GetID(), run.GetRunID(), false, enumspb.HISTORY_EVENT_FILTER_TYPE_ALL_EVENT)
	told := false
	for events.HasNext() {
		e, err := events.Next()
		if err != nil {
			t.Fatal(err)
		}
		b, err := e.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		told = told || e.GetActivityTaskScheduledEventAttributes().GetActivityType().GetName() == "Notify"
		for _, s := range secrets {
			if strings.Contains(string(b), s) {
				t.Errorf("%s stands in the history: %v", s, e)
			}
		}
	}
	if !told {
		t.Error("the history has no Notify")
	}
}

// A cluster whose worker is dead is told of by another; a start that finds a run
// going on is told of too; and who was told is not told again because another
// address does not answer.
func TestPeopleAreToldOfTheDead(t *testing.T) {
	r := setup(t)
	hook, watch := &listener{}, &listener{answer: []int{http.StatusBadGateway, http.StatusBadGateway}}
	hooks, watches := httptest.NewServer(hook), httptest.NewServer(watch)
	defer hooks.Close()
	defer watches.Close()
	var err error
	if r.notifier, err = notify.New(hooks.URL, watches.URL, true); err != nil {
		t.Fatal(err)
	}
	r.serve(t, time.Second)
	ctx := t.Context()
	run, err := r.client.ExecuteWorkflow(ctx, client.StartWorkflowOptions{ID: "of-the-dead", TaskQueue: workflows.Queue},
		workflows.WALAuditName, workflows.WALAuditRequest{Cluster: "main", Host: "dead"})
	if err == nil {
		err = r.client.CancelWorkflow(ctx, run.GetID(), run.GetRunID())
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := run.Get(ctx, nil); err == nil {
		t.Fatal("a dead host audited its archive")
	}
	if got := hook.heard(); len(got) != 1 || !strings.Contains(got[0], "audit of the archive of main on dead cancelled") {
		t.Errorf("of a dead host, the webhook heard %q", got)
	}

	release := r.hold(t)
	first := r.start(t)
	until(t, "it dumps", func() bool { return r.waiting(t) })
	second, err := r.client.ExecuteWorkflow(ctx, client.StartWorkflowOptions{ID: "second", TaskQueue: workflows.Queue},
		workflows.ScheduledName, workflows.ScheduledRequest{Cluster: "main", Kind: workflows.Logical, Host: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Get(ctx, nil); err == nil {
		t.Fatal("two ran at once")
	}
	if got := hook.heard(); len(got) != 1 || !strings.Contains(got[0], `"reason":"already-running"`) || !strings.Contains(got[0], `"run":"second/`) {
		t.Errorf("of a start that found a run going on, the webhook heard %q", got)
	}
	record(t, r.client, second, "scheduled-refused")
	release()
	if err := first.Get(ctx, nil); err != nil {
		t.Fatal(err)
	}
	if got := hook.heard(); len(got) != 1 {
		t.Errorf("because the watch did not answer, the webhook heard %q", got)
	}
	if got := watch.heard(); len(got) != 3 {
		t.Errorf("the watch was asked %q, want three times", got)
	}
	record(t, r.client, run, "told-by-another")
}

// An address that is none is not shown.
func TestAddressesAreInNoError(t *testing.T) {
	if _, err := notify.New("T0pS3cr3t", "", true); err == nil || strings.Contains(err.Error(), "T0pS3cr3t") {
		t.Errorf("got %v", err)
	}
	var nobody *notify.Notifier
	if err := errors.Join(nobody.Call(t.Context(), notify.Notice{}), nobody.Ping(t.Context(), notify.Notice{})); err != nil {
		t.Error(err)
	}
}
