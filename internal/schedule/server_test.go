package schedule_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	commonpb "go.temporal.io/api/common/v1"
	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/converter"
	sdklog "go.temporal.io/sdk/log"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/schedule"
	"github.com/pgkeep/pgkeep/workflows"
)

// A world is a real Temporal server, empty at first.
type world struct {
	client.Client
	t *testing.T
	*lab.Temporal
}

func newWorld(t *testing.T) *world {
	t.Helper()
	s := lab.TemporalForTest(t)
	c, err := client.Dial(client.Options{HostPort: s.Address, Namespace: s.Namespace, Logger: sdklog.NewStructuredLogger(slog.New(slog.DiscardHandler))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return &world{c, t, s}
}

// apply reconciles and returns what was done.
func (w *world) apply(prune bool, want ...schedule.Schedule) []string {
	w.t.Helper()
	var done []string
	have, err := schedule.Compared(w.t.Context(), w, want)
	if err != nil {
		w.t.Fatal(err)
	}
	plan := schedule.Plan(want, have, schedule.Options{Hosts: []string{"db1"}, Prune: prune})
	if err := schedule.Apply(w.t.Context(), w, plan); err != nil {
		w.t.Fatal(err)
	}
	for _, c := range plan {
		done = append(done, string(c.Action)+" "+c.ID)
	}
	return done
}

func (w *world) describe(id string) *client.ScheduleDescription {
	w.t.Helper()
	d, err := w.ScheduleClient().GetHandle(w.t.Context(), id).Describe(w.t.Context())
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

// eventually waits for what the server makes true in its own time.
func (w *world) eventually(what string, ok func() bool) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 5*time.Minute)
	defer cancel()
	for !ok() {
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
			w.t.Fatalf("did not come true: %s", what)
		}
	}
}

// listed waits until the server's list, which lags, shows these.
func (w *world) listed(ids ...string) {
	w.t.Helper()
	w.eventually("the list shows "+strings.Join(ids, ", "), func() bool {
		have, err := schedule.List(w.t.Context(), w)
		if err != nil {
			w.t.Fatal(err)
		}
		var got []string
		for _, h := range have {
			got = append(got, h.ID)
		}
		return slices.Equal(got, ids)
	})
}

func TestServerFollowsTheList(t *testing.T) {
	w := newWorld(t)
	id := nightly.ID()
	step := func(name string, got []string, want ...string) {
		t.Helper()
		if diff := gocmp.Diff(want, got); diff != "" {
			t.Fatalf("%s: differs (-want +got):\n%s", name, diff)
		}
	}

	step("the first time", w.apply(false, nightly), "create "+id)
	created := w.describe(id)
	step("the second time", w.apply(false, nightly), "unchanged "+id)
	if again := w.describe(id); !again.Info.LastUpdateAt.Equal(created.Info.LastUpdateAt) {
		t.Error("a schedule that did not change was updated")
	}

	if err := schedule.Pause(t.Context(), w, id, "storage moves"); err != nil {
		t.Fatal(err)
	}
	later := with(func(s *schedule.Schedule) { s.Cron, s.Jitter = "0 3 * * sun", 0 })
	step("after a change", w.apply(false, later), "update "+id)
	w.eventually("the update takes effect", func() bool { return w.describe(id).Schedule.Spec.Jitter == 0 })
	d := w.describe(id)
	if !d.Schedule.State.Paused || d.Schedule.State.Note != "storage moves" {
		t.Errorf("an update undid the pause: %+v", d.Schedule.State)
	}
	if c := d.Schedule.Spec.Calendars; len(c) != 1 || c[0].Hour[0].Start != 3 {
		t.Errorf("an update left the times as they were: %+v", c)
	}
	if err := schedule.Unpause(t.Context(), w, id, "done"); err != nil {
		t.Fatal(err)
	}
	w.eventually("the schedule goes on", func() bool { return !w.describe(id).Schedule.State.Paused })
	step("after it was unpaused", w.apply(false, later), "unchanged "+id)

	other := with(func(s *schedule.Schedule) { s.Cluster = "other" })
	elsewhere := with(func(s *schedule.Schedule) { s.Cluster, s.Host = "there", "db2" })
	step("two more", w.apply(false, later, other, elsewhere), "unchanged "+id, "create "+other.ID(), "create "+elsewhere.ID())
	w.listed(id, other.ID(), elsewhere.ID())
	step("one that is not wanted", w.apply(false, later), "unchanged "+id, "orphan "+other.ID())
	w.listed(id, other.ID(), elsewhere.ID())
	step("pruned", w.apply(true, later), "unchanged "+id, "delete "+other.ID())
	w.listed(id, elsewhere.ID())
}

func TestServerHasWhatWasWanted(t *testing.T) {
	w := newWorld(t)
	searchable, err := schedule.Searchable(t.Context(), w, w.Namespace)
	if err != nil || !searchable {
		t.Fatalf("Searchable = %v, %v", searchable, err)
	}
	s := with(func(s *schedule.Schedule) { s.Searchable = true })
	w.apply(false, s)
	d := w.describe(s.ID())

	spec := d.Schedule.Spec
	if spec.TimeZoneName != "Europe/Berlin" || spec.Jitter != 10*time.Minute {
		t.Errorf("zone is %s, jitter %s", spec.TimeZoneName, spec.Jitter)
	}
	if p := d.Schedule.Policy; p.Overlap != enumspb.SCHEDULE_OVERLAP_POLICY_SKIP || p.CatchupWindow != 6*time.Hour || p.PauseOnFailure {
		t.Errorf("policy is %+v", p)
	}
	berlin, err := time.LoadLocation("Europe/Berlin")
	if err != nil {
		t.Fatal(err)
	}
	for _, next := range d.Info.NextActionTimes {
		local := next.In(berlin)
		if begin := time.Date(local.Year(), local.Month(), local.Day(), 1, 30, 0, 0, berlin); local.Before(begin) || local.Sub(begin) > 10*time.Minute {
			t.Errorf("a start at %s is not within 10m of 01:30", local)
		}
	}
	action := d.Schedule.Action.(*client.ScheduleWorkflowAction)
	if action.ID != "pgkeep/main/logical/scheduled" || action.Workflow != "pgkeep.Scheduled" || action.TaskQueue != "pgkeep" ||
		action.WorkflowRunTimeout != 24*time.Hour || action.StaticSummary != "scheduled logical backup of main" {
		t.Errorf("action is %+v", action)
	}
	if kind, _ := action.TypedSearchAttributes.GetKeyword(workflows.PgkeepKind); kind != "logical" {
		t.Errorf("search attribute kind is %q", kind)
	}
	var req workflows.ScheduledRequest
	if err := converter.GetDefaultDataConverter().FromPayload(action.Args[0].(*commonpb.Payload), &req); err != nil {
		t.Fatal(err)
	}
	if want := (workflows.ScheduledRequest{Cluster: "main", Kind: "logical", Host: "db1"}); req != want {
		t.Errorf("request is %+v, want %+v", req, want)
	}

	have, err := schedule.List(t.Context(), w, s.ID())
	if err != nil {
		t.Fatal(err)
	}
	want := []schedule.Existing{{
		ID: s.ID(), Host: "db1", Cron: s.Cron, Hash: s.Hash(), TimeZone: s.TimeZone,
		Jitter: s.Jitter, CatchupWindow: s.CatchupWindow, RunTimeout: s.RunTimeout, Next: d.Info.NextActionTimes[0], Every: have[0].Every,
	}}
	if diff := gocmp.Diff(want, have, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("list differs (-want +got):\n%s", diff)
	}
	// An overview tells the same, but for what only a description has.
	w.eventually("the list is the same", func() bool {
		seen, err := schedule.Overview(t.Context(), w, w.Namespace)
		if err != nil {
			t.Fatal(err)
		}
		want[0].CatchupWindow, want[0].RunTimeout, want[0].Every = 0, 0, 0
		for i := range seen {
			seen[i].Every = 0 // of fewer starts
		}
		return gocmp.Equal(want, seen, cmpopts.EquateEmpty())
	})

	// With a jitter, and a change of the clock among them.
	if every := have[0].Every; every < 23*time.Hour || every > 25*time.Hour+s.Jitter {
		t.Errorf("it starts every %v, want a day", every)
	}
}

func TestTriggerReturnsTheRunAndRefusesASecond(t *testing.T) {
	w := newWorld(t)
	w.apply(false, nightly)
	run, err := schedule.Trigger(t.Context(), w, nightly.ID())
	if err != nil {
		t.Fatal(err)
	}
	d, err := w.DescribeWorkflowExecution(t.Context(), run.WorkflowID, run.RunID)
	if err != nil {
		t.Fatal(err)
	}
	if got := d.WorkflowExecutionInfo.Type.Name; got != workflows.ScheduledName || !strings.HasPrefix(run.WorkflowID, "pgkeep/main/logical/scheduled-") {
		t.Errorf("started %s %s", got, run.WorkflowID)
	}
	if _, err := schedule.Trigger(t.Context(), w, nightly.ID()); !errors.Is(err, fail.AlreadyRunning) {
		t.Errorf("a second trigger: %v, want already-running", err)
	}
	have, err := schedule.List(t.Context(), w, nightly.ID())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(have[0].Running, []schedule.Run{run}) || have[0].Last.IsZero() || have[0].Skipped != 1 {
		t.Errorf("the list shows %+v", have[0])
	}
}

// Many schedules: each is asked for and made once, and a look at all of them is a
// few requests. PGKEEP_TEST_SCHEDULES says how many; then times are told.
func TestManySchedules(t *testing.T) {
	n := 50
	if text := os.Getenv("PGKEEP_TEST_SCHEDULES"); text != "" {
		var err error
		if n, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	w := newWorld(t)
	counted := &tally{of: make(map[string]int64)}
	c, err := client.Dial(client.Options{HostPort: w.Address, Namespace: w.Namespace, Logger: sdklog.NewStructuredLogger(slog.New(slog.DiscardHandler)), MetricsHandler: requests{client.MetricsNopHandler, counted, ""}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	w.Client = c
	var want []schedule.Schedule
	for i := range n {
		want = append(want, with(func(s *schedule.Schedule) {
			s.Cluster, s.Host, s.Searchable = fmt.Sprintf("c%04d", i), fmt.Sprintf("db%d", i%10), true
			if i%2 == 0 {
				s.Cron = "@every 6h"
			}
		}))
	}
	step := func(what string, do func()) map[string]int64 {
		t.Helper()
		before, began := counted.all(), time.Now()
		do()
		took, made := time.Since(began), counted.all()
		for name := range made {
			made[name] -= before[name]
		}
		t.Logf("%s of %d: %v", what, n, took.Round(time.Millisecond))
		return made
	}
	apply := func(action string) func() {
		return func() {
			for _, did := range w.apply(false, want...) {
				if !strings.HasPrefix(did, action) {
					t.Errorf("did %s, want %s", did, action)
				}
			}
		}
	}
	if made := step("first apply", apply("create ")); made["CreateSchedule"] != int64(n) || made["DescribeSchedule"] != int64(n) || made["UpdateSchedule"] != 0 {
		t.Errorf("requests: %v", made)
	}
	w.eventually("all are listed", func() bool {
		all, err := schedule.Overview(t.Context(), w, w.Namespace)
		return err == nil && len(all) == n
	})
	if made := step("second apply", apply("unchanged ")); made["CreateSchedule"]+made["UpdateSchedule"]+made["DescribeSchedule"] != 0 {
		t.Errorf("requests: %v", made)
	}
	made := step("list", func() {
		all, err := schedule.Overview(t.Context(), w, w.Namespace)
		if err != nil {
			t.Fatal(err)
		}
		for i, e := range all {
			if s := want[i]; e.ID != s.ID() || e.Host != s.Host || e.Cron != s.Cron || e.Next.IsZero() {
				t.Errorf("listed %+v, want %+v", e, s)
			}
		}
	})
	if made["DescribeSchedule"] != 0 || made["ListSchedules"]+made["ListWorkflowExecutions"] > 3+int64(n)/1000 {
		t.Errorf("requests of a list: %v", made)
	}
}

// tally is how often each operation was asked for.
type tally struct {
	mu sync.Mutex
	of map[string]int64
}

func (t *tally) all() map[string]int64 {
	t.mu.Lock()
	defer t.mu.Unlock()
	return maps.Clone(t.of)
}

// requests counts, for a client, what it asks of the server.
type requests struct {
	client.MetricsHandler
	*tally
	operation string
}

func (r requests) WithTags(tags map[string]string) client.MetricsHandler {
	r.operation = cmp.Or(tags["operation"], r.operation)
	return r
}

func (r requests) Counter(name string) client.MetricsCounter {
	if name != "temporal_request" {
		return r.MetricsHandler.Counter(name)
	}
	return counter(func(n int64) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.of[r.operation] += n
	})
}

type counter func(int64)

func (c counter) Inc(n int64) { c(n) }

func TestScheduleThatIsNotThere(t *testing.T) {
	w := newWorld(t)
	for op, do := range map[string]func() error{
		"pause":   func() error { return schedule.Pause(t.Context(), w, nightly.ID(), "") },
		"unpause": func() error { return schedule.Unpause(t.Context(), w, nightly.ID(), "") },
		"delete":  func() error { return schedule.Remove(t.Context(), w, nightly.ID()) },
		"trigger": func() error { _, err := schedule.Trigger(t.Context(), w, nightly.ID()); return err },
	} {
		err := do()
		if want := op + " schedule pgkeep/main/logical: there is none"; err == nil || err.Error() != want || !errors.Is(err, fail.BadConfig) {
			t.Errorf("%s: %v, want %s", op, err, want)
		}
	}
}
