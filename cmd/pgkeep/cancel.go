package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
	"go.temporal.io/sdk/client"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
)

func cancelCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "cancel",
		Usage:     "stop what is running for a cluster, or one kind of it, or one workflow",
		ArgsUsage: "CLUSTER|CLUSTER/KIND|WORKFLOW-ID",
		Category:  runs,
		Description: "The run ends its child processes, clears its spool and leaves no backup. That\ntakes a moment; \"pgkeep ps\" shows when it is over.\n\n" + examples(
			"pgkeep cancel --reason \"wrong night\" main", "all that runs for the cluster main",
			"pgkeep cancel main/logical", "one kind, by hand or by its schedule"),
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "reason", Usage: "tell others why, in `TEXT`", Value: "cancelled with pgkeep"},
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			return e.cancel(c.Context, cancelOptions{What: c.Args().First(), Reason: c.String("reason"), JSON: c.Bool("json")})
		},
	}
}

type cancelOptions struct {
	What   string // a cluster, CLUSTER/KIND, or a workflow id
	Reason string
	JSON   bool
}

func (e *env) cancel(ctx context.Context, opt cancelOptions) error {
	query, err := runsOf(opt.What)
	if err != nil {
		return err
	}
	s, err := e.temporal(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	running, err := s.running(ctx, query)
	if err != nil {
		return err
	}
	if len(running) == 0 {
		return fail.Hint(fmt.Errorf("nothing is running for %q", opt.What), "pgkeep ps shows what is running")
	}
	var cancelled []startedRun
	for _, r := range running {
		if err := s.CancelWorkflowWithOptions(ctx, client.CancelWorkflowOptions{WorkflowID: r.Workflow, RunID: r.Run, Reason: opt.Reason}); err != nil {
			return fmt.Errorf("cancel workflow %s: %w", r.Workflow, err)
		}
		cancelled = append(cancelled, startedRun{r.Workflow, r.Run, r.Link})
	}
	return e.printCancelled(cancelled, opt.JSON)
}

// runsOf is the query for the runs of a cluster, of a CLUSTER/KIND, or for one
// workflow.
func runsOf(what string) (string, error) {
	if strings.ContainsAny(what, `'"\`) {
		return "", config.Errorf("%q is neither a cluster nor the id of a workflow", what)
	}
	if id, err := scheduleID(what); err == nil && strings.Count(id, "/") == 2 { // also what its schedule started
		return "(WorkflowId = '" + id + "' OR WorkflowId STARTS_WITH '" + id + "/scheduled')", nil
	}
	if strings.Contains(what, "/") {
		return "WorkflowId = '" + what + "'", nil
	}
	if err := new(config.Name).UnmarshalText([]byte(what)); err != nil {
		return "", config.Errorf("%q is neither a cluster nor the id of a workflow", what)
	}
	return "WorkflowId STARTS_WITH 'pgkeep/" + what + "/'", nil
}

func (e *env) printCancelled(cancelled []startedRun, asJSON bool) error {
	if asJSON {
		return printJSON(e.out, "cancel", struct {
			Cancelled []startedRun `json:"cancelled"`
		}{cancelled})
	}
	for _, r := range cancelled {
		fmt.Fprintf(e.out, "cancelling %s\n", r.Workflow)
		if r.Link != "" {
			fmt.Fprintln(e.out, r.Link)
		}
	}
	return nil
}
