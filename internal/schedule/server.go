package schedule

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	commonpb "go.temporal.io/api/common/v1"
	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/operatorservice/v1"
	"go.temporal.io/api/serviceerror"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/temporal"
	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/workflows"
)

// atOnce is how many requests are on their way to the server at a time: each waits
// for a workflow of the server's own.
const atOnce = 16

// idPrefix begins the ids of pgkeep's schedules.
const idPrefix = "pgkeep/"

// ours is the query for them.
const ours = "ScheduleId STARTS_WITH '" + idPrefix + "'"

// List returns the schedules of pgkeep on the server, in the order of their
// ids. The server's list lags behind by moments: a schedule among ids is found
// at once.
func List(ctx context.Context, c client.Client, ids ...string) ([]Existing, error) {
	found, err := c.ScheduleClient().List(ctx, client.ScheduleListOptions{Query: ours, PageSize: 1000})
	if err != nil {
		return nil, fmt.Errorf("list schedules: %w", err)
	}
	for found.HasNext() {
		entry, err := found.Next()
		if err != nil {
			return nil, fmt.Errorf("list schedules: %w", err)
		}
		ids = append(ids, entry.ID)
	}
	return describeAll(ctx, c, ids)
}

// describeAll describes those of ids that are there.
func describeAll(ctx context.Context, c client.Client, ids []string) ([]Existing, error) {
	slices.Sort(ids)
	ids = slices.Compact(ids)
	all := make([]Existing, len(ids))
	group, asking := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for i, id := range ids {
		group.Go(func() (err error) {
			all[i], _, err = Describe(asking, c, id)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(all, func(e Existing) bool { return e.ID == "" }), nil
}

// Overview is List for people who look at many schedules: of most, the server's
// list alone is asked, which lags behind by moments, knows fewer of the next
// starts, and neither CatchupWindow, RunTimeout, Missed nor Skipped.
func Overview(ctx context.Context, c client.Client, namespace string, ids ...string) ([]Existing, error) {
	all, err := overview(ctx, c, ids, func(e Existing) bool { return e.Host != "" && e.Cron != "" })
	if err == nil {
		err = addRunning(ctx, c, namespace, all)
	}
	return all, err
}

// Compared is what a Plan takes of the server: what its list says is as wanted is
// not looked at again.
func Compared(ctx context.Context, c client.Client, want []Schedule) ([]Existing, error) {
	hashes := make(map[string]string)
	var ids []string
	for _, w := range want {
		hashes[w.ID()], ids = w.Hash(), append(ids, w.ID())
	}
	return overview(ctx, c, ids, func(e Existing) bool {
		wanted, ok := hashes[e.ID]
		return ok && e.Hash == wanted || !ok && e.Host != ""
	})
}

// overview lists the schedules of pgkeep, in the order of their ids, and describes
// those of which the server's list does not tell enough, or nothing yet.
func overview(ctx context.Context, c client.Client, ids []string, enough func(Existing) bool) ([]Existing, error) {
	found, err := c.ScheduleClient().List(ctx, client.ScheduleListOptions{Query: ours, PageSize: 1000})
	if err != nil {
		return nil, fmt.Errorf("list schedules: %w", err)
	}
	var all []Existing
	told := make(map[string]bool)
	for found.HasNext() {
		entry, err := found.Next()
		if err != nil {
			return nil, fmt.Errorf("list schedules: %w", err)
		}
		if e := existing(entry); enough(e) {
			all, told[e.ID] = append(all, e), true
		} else {
			ids = append(ids, e.ID)
		}
	}
	others, err := describeAll(ctx, c, slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return told[id] }))
	all = append(all, others...)
	slices.SortFunc(all, func(a, b Existing) int { return cmp.Compare(a.ID, b.ID) })
	return all, err
}

// existing is what an entry of the server's list tells.
func existing(entry *client.ScheduleListEntry) Existing {
	e := Existing{ID: entry.ID, Paused: entry.Paused, Note: entry.Note}
	told := entry.SearchAttributes.GetIndexedFields()
	decode(told[workflows.PgkeepHost.GetName()], &e.Host)
	decode(told[hashAttribute.GetName()], &e.Hash)
	if s := entry.Spec; s != nil {
		e.TimeZone, e.Jitter = s.TimeZoneName, s.Jitter
		switch {
		case len(s.Calendars) == 1 && len(s.Intervals) == 0:
			e.Cron = s.Calendars[0].Comment
		case len(s.Calendars) == 0 && len(s.Intervals) == 1:
			e.Cron = "@every " + strings.TrimSuffix(strings.TrimSuffix(s.Intervals[0].Every.String(), "0s"), "0m")
		}
	}
	if n := len(entry.RecentActions); n > 0 {
		e.Last = entry.RecentActions[n-1].ActualTime
	}
	e.plan(entry.NextActionTimes)
	return e
}

// plan notes when it starts next.
func (e *Existing) plan(next []time.Time) {
	if len(next) == 0 || e.Paused {
		return
	}
	e.Next = next[0]
	for i, t := range next[1:] {
		e.Every = max(e.Every, t.Sub(next[i]))
	}
}

// addRunning notes which runs go on, of those that schedules started.
func addRunning(ctx context.Context, c client.Client, namespace string, all []Existing) error {
	running := make(map[string][]Run)
	var page []byte
	for first := true; first || len(page) > 0; first = false {
		list, err := c.ListWorkflow(ctx, &workflowservice.ListWorkflowExecutionsRequest{Namespace: namespace, PageSize: 1000, NextPageToken: page,
			Query: "WorkflowId STARTS_WITH '" + idPrefix + "' AND ExecutionStatus = 'Running'"})
		if err != nil {
			return fmt.Errorf("list workflows: %w", err)
		}
		for _, w := range list.Executions {
			if id, _, ok := strings.Cut(w.Execution.WorkflowId, scheduledSuffix); ok {
				running[id] = append(running[id], Run{w.Execution.WorkflowId, w.Execution.RunId})
			}
		}
		page = list.NextPageToken
	}
	for i := range all {
		if len(all[i].Running) == 0 { // else it was described
			all[i].Running = running[all[i].ID]
		}
	}
	return nil
}

// Describe returns the schedule with that id; false if the server has none.
func Describe(ctx context.Context, c client.Client, id string) (Existing, bool, error) {
	e, err := describe(ctx, c, id)
	if _, gone := errors.AsType[*serviceerror.NotFound](err); gone {
		return Existing{}, false, nil
	}
	if err != nil {
		return Existing{}, false, fmt.Errorf("describe schedule %s: %w", id, err)
	}
	return e, true, nil
}

func describe(ctx context.Context, c client.Client, id string) (Existing, error) {
	d, err := c.ScheduleClient().GetHandle(ctx, id).Describe(ctx)
	if err != nil {
		return Existing{}, err
	}
	e := Existing{
		ID:            id,
		TimeZone:      d.Schedule.Spec.TimeZoneName,
		Jitter:        d.Schedule.Spec.Jitter,
		CatchupWindow: d.Schedule.Policy.CatchupWindow,
		Paused:        d.Schedule.State.Paused,
		Note:          d.Schedule.State.Note,
		Missed:        d.Info.NumActionsMissedCatchupWindow,
		Skipped:       d.Info.NumActionsSkippedOverlap,
	}
	if action, ok := d.Schedule.Action.(*client.ScheduleWorkflowAction); ok {
		e.RunTimeout = action.WorkflowRunTimeout
		decode(action.Memo[memoHash], &e.Hash)
		decode(action.Memo[memoCron], &e.Cron)
		var req workflows.ScheduledRequest
		if len(action.Args) == 1 {
			decode(action.Args[0], &req)
		}
		e.Host = req.Host
	}
	for _, r := range d.Info.RunningWorkflows {
		e.Running = append(e.Running, Run{r.WorkflowID, r.FirstExecutionRunID})
	}
	for _, r := range d.Info.RecentActions {
		if w := r.StartWorkflowResult; w != nil {
			e.Recent = append(e.Recent, Run{w.WorkflowID, w.FirstExecutionRunID})
		}
	}
	if n := len(d.Info.RecentActions); n > 0 {
		e.Last = d.Info.RecentActions[n-1].ActualTime
	}
	e.plan(d.Info.NextActionTimes)
	return e, nil
}

// LastEnded asks how the newest run of a schedule came out that is over.
func LastEnded(ctx context.Context, c client.Client, e Existing) (Ended, error) {
	for _, run := range slices.Backward(e.Recent) {
		d, err := c.DescribeWorkflowExecution(ctx, run.WorkflowID, "") // each start has an id of its own
		if _, gone := errors.AsType[*serviceerror.NotFound](err); gone {
			return Ended{}, nil // nor those before
		}
		if err != nil {
			return Ended{}, fmt.Errorf("describe workflow %s: %w", run.WorkflowID, err)
		}
		info := d.GetWorkflowExecutionInfo()
		if info.GetStatus() != enumspb.WORKFLOW_EXECUTION_STATUS_RUNNING {
			return Ended{run, info.GetCloseTime().AsTime(), info.GetStatus() == enumspb.WORKFLOW_EXECUTION_STATUS_COMPLETED, info.GetStatus().String()}, nil
		}
	}
	return Ended{}, nil
}

// decode leaves to as it is where payload is not what pgkeep writes: a schedule
// made by somebody else is nobody's orphan, and one edited beyond recognition
// differs from what is wanted.
func decode(payload, to any) {
	if p, ok := payload.(*commonpb.Payload); ok {
		_ = converter.GetDefaultDataConverter().FromPayload(p, to)
	}
}

// Apply carries out a plan. An update keeps what an operator did: whether the
// schedule is paused, and the note. It stops at the first failure; applying a
// new plan goes on from there.
func Apply(ctx context.Context, c client.Client, plan []Change) error {
	group, doing := errgroup.WithContext(ctx)
	group.SetLimit(atOnce)
	for _, change := range plan {
		group.Go(func() error {
			if err := change.apply(doing, c.ScheduleClient()); err != nil {
				return fmt.Errorf("%s schedule %s: %w", change.Action, change.ID, err)
			}
			return nil
		})
	}
	return group.Wait()
}

func (c Change) apply(ctx context.Context, server client.ScheduleClient) error {
	switch c.Action {
	case Create:
		_, err := server.Create(ctx, c.Want.options())
		if errors.Is(err, temporal.ErrScheduleAlreadyRunning) { // a moment ago it was not there
			return c.update(ctx, server)
		}
		return err
	case Update:
		return c.update(ctx, server)
	case Delete:
		err := server.GetHandle(ctx, c.ID).Delete(ctx)
		if _, gone := errors.AsType[*serviceerror.NotFound](err); gone {
			return nil
		}
		return err
	}
	return nil
}

func (c Change) update(ctx context.Context, server client.ScheduleClient) error {
	want := c.Want.options()
	return server.GetHandle(ctx, c.ID).Update(ctx, client.ScheduleUpdateOptions{
		DoUpdate: func(in client.ScheduleUpdateInput) (*client.ScheduleUpdate, error) {
			s := in.Description.Schedule // with the operator's State
			var hash string
			if action, ok := s.Action.(*client.ScheduleWorkflowAction); ok {
				decode(action.Memo[memoHash], &hash)
			}
			if hash == c.Want.Hash() {
				return nil, temporal.ErrSkipScheduleUpdate
			}
			s.Spec, s.Action = &want.Spec, want.Action
			s.Policy = &client.SchedulePolicies{Overlap: want.Overlap, CatchupWindow: want.CatchupWindow}
			update := &client.ScheduleUpdate{Schedule: &s}
			if c.Want.Searchable {
				update.TypedSearchAttributes = &want.TypedSearchAttributes
			}
			return update, nil
		},
	})
}

// Pause keeps a schedule from starting anything until Unpause. The note tells
// others why.
func Pause(ctx context.Context, c client.Client, id, note string) error {
	return found("pause", id, c.ScheduleClient().GetHandle(ctx, id).Pause(ctx, client.SchedulePauseOptions{Note: note}))
}

// Unpause ends a Pause.
func Unpause(ctx context.Context, c client.Client, id, note string) error {
	return found("unpause", id, c.ScheduleClient().GetHandle(ctx, id).Unpause(ctx, client.ScheduleUnpauseOptions{Note: note}))
}

// Remove deletes a schedule. What it has started goes on.
func Remove(ctx context.Context, c client.Client, id string) error {
	return found("delete", id, c.ScheduleClient().GetHandle(ctx, id).Delete(ctx))
}

// Trigger starts what a schedule starts, now, whether it is paused or not, and
// returns the run. It fails with fail.AlreadyRunning if a run of the schedule is
// going on.
func Trigger(ctx context.Context, c client.Client, id string) (Run, error) {
	handle := c.ScheduleClient().GetHandle(ctx, id)
	before, err := handle.Describe(ctx)
	if err != nil {
		return Run{}, found("trigger", id, err)
	}
	known := started(before)
	if err := handle.Trigger(ctx, client.ScheduleTriggerOptions{}); err != nil {
		return Run{}, found("trigger", id, err)
	}
	waiting, cancel := context.WithTimeout(ctx, startWithin)
	defer cancel()
	again := time.NewTicker(200 * time.Millisecond)
	defer again.Stop()
	for {
		now, err := handle.Describe(ctx)
		if err != nil {
			return Run{}, found("trigger", id, err)
		}
		for _, run := range started(now) {
			if !slices.Contains(known, run) {
				return run, nil
			}
		}
		if now.Info.NumActionsSkippedOverlap > before.Info.NumActionsSkippedOverlap {
			return Run{}, fmt.Errorf("trigger schedule %s: %w", id, fail.AlreadyRunning)
		}
		select {
		case <-again.C:
		case <-waiting.Done():
			return Run{}, cmp.Or(ctx.Err(), fmt.Errorf("trigger schedule %s: the server started nothing in %s", id, startWithin))
		}
	}
}

// startWithin is how long the server may take to start what was triggered.
const startWithin = 30 * time.Second

func started(d *client.ScheduleDescription) []Run {
	var runs []Run
	for _, a := range d.Info.RecentActions {
		if r := a.StartWorkflowResult; r != nil {
			runs = append(runs, Run{r.WorkflowID, r.FirstExecutionRunID})
		}
	}
	return runs
}

// found adds the operation to err, and says plainly that there is no such
// schedule.
func found(op, id string, err error) error {
	if _, gone := errors.AsType[*serviceerror.NotFound](err); gone && strings.HasPrefix(id, idPrefix) {
		return fail.Hint(fail.With(fail.BadConfig, fmt.Errorf("%s schedule %s: there is none", op, id)), "pgkeep schedule list shows what there is, and pgkeep schedule apply makes what the configuration says")
	}
	if err != nil {
		return fmt.Errorf("%s schedule %s: %w", op, id, err)
	}
	return nil
}

// Searchable reports whether the server knows the search attributes that runs
// are to carry. One that does not tell counts as not knowing them.
func Searchable(ctx context.Context, c client.Client, namespace string) (bool, error) {
	known, err := c.OperatorService().ListSearchAttributes(ctx, &operatorservice.ListSearchAttributesRequest{Namespace: namespace})
	if err != nil {
		_, denied := errors.AsType[*serviceerror.PermissionDenied](err)
		_, missing := errors.AsType[*serviceerror.Unimplemented](err)
		if denied || missing { // Temporal Cloud
			return false, nil
		}
		return false, fmt.Errorf("list search attributes: %w", err)
	}
	custom := known.GetCustomAttributes()
	_, cluster := custom[workflows.PgkeepCluster.GetName()]
	_, kind := custom[workflows.PgkeepKind.GetName()]
	return cluster && kind, nil
}
