package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	commonpb "go.temporal.io/api/common/v1"
	workflowpb "go.temporal.io/api/workflow/v1"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/converter"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/workflows"
)

func psCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "ps",
		Usage:    "show what is going on: runs, how far they are, what went wrong last",
		Category: runs,
		Flags:    []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			s, err := e.temporal(c.Context)
			if err != nil {
				return err
			}
			defer s.Close()
			running, err := s.running(c.Context, "")
			if err != nil {
				return err
			}
			return e.printRuns(running, c.Bool("json"), time.Now())
		},
	}
}

// A runShown is a workflow that is going on.
type runShown struct {
	Workflow   string          `json:"workflow"`
	Run        string          `json:"run"`
	Type       string          `json:"type"`
	Started    time.Time       `json:"started"`
	Cancelling bool            `json:"cancelling"` // somebody has asked it to stop
	WaitsFor   []string        `json:"waits_for"`  // workflow ids
	Activities []activityShown `json:"activities"` // under way, or waiting for a worker or another attempt
	Link       string          `json:"link,omitempty"`
}

type activityShown struct {
	Name     string               `json:"name"`
	State    string               `json:"state"` // "scheduled", "started" …
	Attempt  int32                `json:"attempt"`
	Progress *activities.Progress `json:"progress"` // null if it has told nothing yet
	Failure  string               `json:"failure,omitempty"`
}

// running returns the workflows of pgkeep that are going on and match the
// query, oldest first.
func (s *server) running(ctx context.Context, and string) ([]runShown, error) {
	query := "WorkflowType STARTS_WITH '" + workflows.TypePrefix + "' AND ExecutionStatus = 'Running'"
	if and != "" {
		query += " AND " + and
	}
	var all []runShown
	var page []byte
	for first := true; first || len(page) > 0; first = false {
		list, err := s.ListWorkflow(ctx, &workflowservice.ListWorkflowExecutionsRequest{Namespace: s.namespace, Query: query, NextPageToken: page})
		if err != nil {
			return nil, fmt.Errorf("list workflows: %w", err)
		}
		for _, w := range list.Executions {
			r, err := s.describe(ctx, w.Execution)
			if err != nil {
				return nil, err
			}
			all = append(all, r)
		}
		page = list.NextPageToken
	}
	slices.SortFunc(all, func(a, b runShown) int {
		return cmp.Or(a.Started.Compare(b.Started), cmp.Compare(a.Workflow, b.Workflow))
	})
	return all, nil
}

func (s *server) describe(ctx context.Context, w *commonpb.WorkflowExecution) (runShown, error) {
	d, err := s.DescribeWorkflowExecution(ctx, w.WorkflowId, w.RunId)
	if err != nil {
		return runShown{}, fmt.Errorf("describe workflow %s: %w", w.WorkflowId, err)
	}
	r := runShown{
		Workflow: w.WorkflowId, Run: w.RunId, Type: d.WorkflowExecutionInfo.Type.GetName(),
		Started:    d.WorkflowExecutionInfo.StartTime.AsTime(),
		Cancelling: d.WorkflowExtendedInfo.GetCancelRequested(),
		WaitsFor:   []string{}, Activities: []activityShown{},
		Link: s.link(w.WorkflowId, w.RunId),
	}
	for _, child := range d.PendingChildren {
		r.WaitsFor = append(r.WaitsFor, child.WorkflowId)
	}
	for _, a := range d.PendingActivities {
		r.Activities = append(r.Activities, pendingActivity(a))
	}
	return r, nil
}

func pendingActivity(a *workflowpb.PendingActivityInfo) activityShown {
	shown := activityShown{
		Name:    a.ActivityType.GetName(),
		State:   strings.ToLower(strings.ReplaceAll(a.State.String(), "_", " ")),
		Attempt: a.Attempt,
		Failure: oneLine(a.LastFailure.GetMessage()),
	}
	if len(a.HeartbeatDetails.GetPayloads()) > 0 {
		var step activities.Progress
		// An activity of another version may tell something else: then nothing is shown.
		if err := converter.GetDefaultDataConverter().FromPayloads(a.HeartbeatDetails, &step); err == nil {
			shown.Progress = &step
		}
	}
	return shown
}

func (e *env) printRuns(running []runShown, asJSON bool, now time.Time) error {
	if asJSON {
		return printJSON(e.out, "ps", struct {
			Runs []runShown `json:"runs"`
		}{append([]runShown{}, running...)})
	}
	if len(running) == 0 {
		e.say("nothing is running")
		return nil
	}
	for _, r := range running {
		r.print(e.out, now)
	}
	return nil
}

// print shows a run as a few lines:
//
//	pgkeep/main/logical  LogicalBackup, for 3m12s
//	  Upload: 1.2 GiB of 4.0 GiB (30 %), attempt 2
//	    failed before: put packs/01: store-down
//	  http://localhost:8233/namespaces/pgkeep/workflows/…
func (r runShown) print(w io.Writer, now time.Time) {
	cancelling := ""
	if r.Cancelling {
		cancelling = ", being cancelled"
	}
	fmt.Fprintf(w, "%s  %s, for %s%s\n", r.Workflow, strings.TrimPrefix(r.Type, workflows.TypePrefix), span(now.Sub(r.Started)), cancelling)
	for _, child := range r.WaitsFor {
		fmt.Fprintf(w, "  waits for %s\n", child)
	}
	for _, a := range r.Activities {
		fmt.Fprintf(w, "  %s: %s\n", a.Name, a.doing())
		if a.Failure != "" {
			fmt.Fprintf(w, "    failed before: %s\n", a.Failure)
		}
	}
	if r.Link != "" {
		fmt.Fprintf(w, "  %s\n", r.Link)
	}
}

func (a activityShown) doing() string {
	var parts []string
	if p := a.Progress; p != nil && p.Stage != "" {
		parts = append(parts, p.Stage)
	}
	if p := a.Progress; p != nil && p.Done+p.Total > 0 {
		parts = append(parts, share(p.Done, p.Total))
	}
	if len(parts) == 0 || a.State != "started" {
		parts = append(parts, a.State)
	}
	if a.Attempt > 1 {
		parts = append(parts, fmt.Sprintf("attempt %d", a.Attempt))
	}
	return strings.Join(parts, ", ")
}
