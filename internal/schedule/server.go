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
	"go.temporal.io/api/operatorservice/v1"
	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/temporal"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/workflows"
)

// idPrefix begins the ids of pgkeep's schedules.
const idPrefix = "pgkeep/"

// List returns the schedules of pgkeep on the server, in the order of their
// ids. The server's list lags behind by moments: a schedule among ids is found
// at once.
func List(ctx context.Context, c client.Client, ids ...string) ([]Existing, error) {
	found, err := c.ScheduleClient().List(ctx, client.ScheduleListOptions{Query: "ScheduleId STARTS_WITH '" + idPrefix + "'"})
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
	slices.Sort(ids)
	var have []Existing
	for _, id := range slices.Compact(ids) {
		e, err := describe(ctx, c, id)
		if _, gone := errors.AsType[*serviceerror.NotFound](err); gone {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("describe schedule %s: %w", id, err)
		}
		have = append(have, e)
	}
	return have, nil
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
	if n := len(d.Info.RecentActions); n > 0 {
		e.Last = d.Info.RecentActions[n-1].ActualTime
	}
	if len(d.Info.NextActionTimes) > 0 && !e.Paused {
		e.Next = d.Info.NextActionTimes[0]
		for i, next := range d.Info.NextActionTimes[1:] {
			e.Every = max(e.Every, next.Sub(d.Info.NextActionTimes[i]))
		}
	}
	return e, nil
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
	for _, change := range plan {
		if err := change.apply(ctx, c.ScheduleClient()); err != nil {
			return fmt.Errorf("%s schedule %s: %w", change.Action, change.ID, err)
		}
	}
	return nil
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
			return &client.ScheduleUpdate{Schedule: &s}, nil
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
