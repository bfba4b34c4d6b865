package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/schedule"
)

func scheduleCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "schedule",
		Usage:       "have Temporal start backups at certain times",
		Category:    runs,
		Description: "The schedules stand in the configuration; \"schedule apply\" makes the Temporal\nserver follow it.",
		Subcommands: []*cli.Command{
			scheduleApplyCommand(e),
			scheduleListCommand(e),
			schedulePauseCommand(e),
			scheduleUnpauseCommand(e),
			scheduleTriggerCommand(e),
			scheduleDeleteCommand(e),
		},
	}
}

func scheduleApplyCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "apply",
		Usage: "make the server's schedules those of the configuration",
		Description: "A schedule that an operator has paused stays paused. One of this configuration's\nhosts that is no longer in the configuration is an orphan: it is told, and goes\nwith --prune.\n\n" + examples(
			"pgkeep schedule apply --dry-run", "what would change",
			"pgkeep schedule apply --prune", "and delete the orphans"),
		Flags: []cli.Flag{
			boolFlag("dry-run", "say what would change, and change nothing"),
			boolFlag("prune", "delete orphans"),
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			return e.scheduleApply(c.Context, applyOptions{DryRun: c.Bool("dry-run"), Prune: c.Bool("prune"), JSON: c.Bool("json")})
		},
	}
}

type applyOptions struct{ DryRun, Prune, JSON bool }

func (e *env) scheduleApply(ctx context.Context, opt applyOptions) error {
	cfg, err := e.config()
	if err != nil {
		return err
	}
	s, err := e.temporal(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	searchable, err := schedule.Searchable(ctx, s, s.namespace)
	if err != nil {
		return err
	}
	want := wanted(cfg, searchable)
	have, err := schedule.Compared(ctx, s, want)
	if err != nil {
		return err
	}
	plan := schedule.Plan(want, have, schedule.Options{Hosts: hosts(cfg), Prune: opt.Prune})
	if !opt.DryRun {
		if err := schedule.Apply(ctx, s, plan); err != nil {
			return err
		}
	}
	return e.printPlan(plan, opt)
}

// many is from how many schedules on only what is to be seen is shown one by one.
const many = 20

// wanted are the schedules of a configuration.
func wanted(cfg *config.Config, searchable bool) []schedule.Schedule {
	var want []schedule.Schedule
	for _, s := range cfg.Schedules {
		host := cfg.Clusters[s.Cluster].Host
		if s.Kind == config.KindExpire {
			host = cfg.Clusters[s.Cluster].Expirer()
		}
		want = append(want, schedule.Schedule{
			Cluster: string(s.Cluster), Kind: string(s.Kind), Host: string(host),
			Cron: string(s.Cron), TimeZone: string(s.TimeZone),
			Jitter: s.Jitter, CatchupWindow: s.CatchupWindow, RunTimeout: s.RunTimeout, Searchable: searchable,
		})
	}
	return want
}

func ids(schedules []schedule.Schedule) []string {
	var ids []string
	for _, s := range schedules {
		ids = append(ids, s.ID())
	}
	return ids
}

// hosts are those a configuration speaks for.
func hosts(cfg *config.Config) []string {
	all := []string{string(cfg.Host)}
	for _, c := range cfg.Clusters {
		all = append(all, string(c.Host), string(c.Expirer()))
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func (e *env) printPlan(plan []schedule.Change, opt applyOptions) error {
	type change struct {
		Action schedule.Action `json:"action"`
		ID     string          `json:"id"`
	}
	answer := struct {
		DryRun  bool     `json:"dry_run"`
		Changes []change `json:"changes"`
	}{opt.DryRun, []change{}}
	var rows [][]string
	orphans, same := false, 0
	for _, c := range plan {
		answer.Changes = append(answer.Changes, change{c.Action, c.ID})
		if c.Action == schedule.Unchanged && len(plan) > many {
			same++
			continue
		}
		rows = append(rows, []string{string(c.Action), c.ID, c.Want.Cron, c.Want.TimeZone})
		orphans = orphans || c.Action == schedule.Orphan
	}
	if orphans {
		e.say("an orphan is not in the configuration, and still starts backups; --prune deletes it")
	}
	if opt.DryRun {
		e.say("dry run: nothing was changed")
	}
	if opt.JSON {
		return printJSON(e.out, "schedule apply", answer)
	}
	if len(plan) == 0 {
		e.say("there are no schedules in the configuration")
	}
	if same > 0 {
		e.say("%s as wanted already", count(same, "schedule"))
	}
	if len(rows) == 0 {
		return nil
	}
	return table(e.out, "ACTION SCHEDULE CRON TIME-ZONE", rows)
}

func scheduleListCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:   "list",
		Usage:  "list the schedules on the server",
		Flags:  []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error { return e.scheduleList(c.Context, c.Bool("json")) },
	}
}

func (e *env) scheduleList(ctx context.Context, asJSON bool) error {
	cfg, err := e.config()
	if err != nil {
		return err
	}
	s, err := e.temporal(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	wanted := ids(wanted(cfg, false))
	var have []schedule.Existing
	if asJSON {
		have, err = schedule.List(ctx, s, wanted...)
	} else { // it need not have all, and is read by somebody who waits
		have, err = schedule.Overview(ctx, s, s.namespace, wanted...)
	}
	if err != nil {
		return err
	}
	return e.printSchedules(have, asJSON)
}

type scheduleShown struct {
	ID            string     `json:"id"`
	Host          string     `json:"host,omitempty"`
	Cron          string     `json:"cron,omitempty"`
	TimeZone      string     `json:"time_zone"`
	Jitter        float64    `json:"jitter_seconds"`
	CatchupWindow float64    `json:"catchup_window_seconds"`
	RunTimeout    float64    `json:"run_timeout_seconds"`
	Paused        bool       `json:"paused"`
	Note          string     `json:"note,omitempty"`
	Next          *time.Time `json:"next"`
	Last          *time.Time `json:"last"`
	Running       []string   `json:"running"` // workflow ids
	Missed        int        `json:"missed"`
	Skipped       int        `json:"skipped"`
}

func (e *env) printSchedules(have []schedule.Existing, asJSON bool) error {
	answer := struct {
		Schedules []scheduleShown `json:"schedules"`
	}{[]scheduleShown{}}
	var rows [][]string
	paused, runs := 0, 0
	for _, h := range have {
		if h.Paused {
			paused++
		}
		if len(h.Running) > 0 {
			runs++
		}
		running := []string{}
		for _, r := range h.Running {
			running = append(running, r.WorkflowID)
		}
		answer.Schedules = append(answer.Schedules, scheduleShown{
			ID: h.ID, Host: h.Host, Cron: h.Cron, TimeZone: h.TimeZone,
			Jitter: h.Jitter.Seconds(), CatchupWindow: h.CatchupWindow.Seconds(), RunTimeout: h.RunTimeout.Seconds(),
			Paused: h.Paused, Note: h.Note, Next: jsonTime(h.Next), Last: jsonTime(h.Last), Running: running,
			Missed: h.Missed, Skipped: h.Skipped,
		})
		rows = append(rows, []string{h.ID, h.Host, h.Cron, h.TimeZone, state(h), moment(h.Last), moment(h.Next)})
	}
	if asJSON {
		return printJSON(e.out, "schedule list", answer)
	}
	if len(rows) == 0 {
		e.say("the server has no schedules of pgkeep; pgkeep schedule apply makes them")
		return nil
	}
	if len(rows) > many {
		e.say("%s: %d paused, %d running", count(len(rows), "schedule"), paused, runs)
	}
	return table(e.out, "SCHEDULE HOST CRON TIME-ZONE STATE LAST NEXT", rows)
}

func state(h schedule.Existing) string {
	switch {
	case h.Paused && h.Note != "":
		return "paused: " + oneLine(h.Note)
	case h.Paused:
		return "paused"
	case len(h.Running) > 0:
		return "running"
	}
	return "waiting"
}

const scheduleArg = "SCHEDULE is CLUSTER/KIND, as main/logical; \"schedule list\" shows all."

func noteFlag(text string) cli.Flag {
	return &cli.StringFlag{Name: "note", Usage: "tell others why, in `TEXT`", Value: text}
}

func schedulePauseCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "pause",
		Usage:       "keep a schedule from starting backups",
		ArgsUsage:   "SCHEDULE",
		Description: scheduleArg + "\n\n" + examples("pgkeep schedule pause --note \"storage moves\" main/logical", ""),
		Flags:       []cli.Flag{noteFlag("paused with pgkeep")},
		Action: func(c *cli.Context) error {
			return e.onSchedule(c, func(s *server, id string) error { return schedule.Pause(c.Context, s, id, c.String("note")) })
		},
	}
}

func scheduleUnpauseCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "unpause",
		Usage:       "let a paused schedule start backups again",
		ArgsUsage:   "SCHEDULE",
		Description: scheduleArg,
		Flags:       []cli.Flag{noteFlag("unpaused with pgkeep")},
		Action: func(c *cli.Context) error {
			return e.onSchedule(c, func(s *server, id string) error { return schedule.Unpause(c.Context, s, id, c.String("note")) })
		},
	}
}

func scheduleDeleteCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "delete",
		Usage:       "delete a schedule from the server",
		ArgsUsage:   "SCHEDULE",
		Description: scheduleArg + "\nWhat it has started goes on. While it stands in the configuration,\n\"schedule apply\" makes it again.",
		Action: func(c *cli.Context) error {
			return e.onSchedule(c, func(s *server, id string) error { return schedule.Remove(c.Context, s, id) })
		},
	}
}

func scheduleTriggerCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "trigger",
		Usage:       "start what a schedule starts, now",
		ArgsUsage:   "SCHEDULE",
		Description: scheduleArg + "\nA paused schedule is triggered too. If its last run still goes on, the exit\nstatus is 19.",
		Flags:       []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			return e.onSchedule(c, func(s *server, id string) error {
				run, err := schedule.Trigger(c.Context, s, id)
				if err != nil {
					return err
				}
				return e.printStarted("schedule trigger", s, run.WorkflowID, run.RunID, c.Bool("json"))
			})
		},
	}
}

// onSchedule does something to the schedule that the first argument names.
func (e *env) onSchedule(c *cli.Context, do func(s *server, id string) error) error {
	id, err := scheduleID(c.Args().First())
	if err != nil {
		return err
	}
	s, err := e.temporal(c.Context)
	if err != nil {
		return err
	}
	defer s.Close()
	return do(s, id)
}

// scheduleID takes CLUSTER/KIND, and the whole id.
func scheduleID(arg string) (string, error) {
	cluster, kind, ok := strings.Cut(strings.TrimPrefix(arg, "pgkeep/"), "/")
	if !ok || cluster == "" || kind == "" {
		return "", config.Errorf("%q is not the name of a schedule: want CLUSTER/KIND, as main/logical", arg)
	}
	return schedule.Schedule{Cluster: cluster, Kind: kind}.ID(), nil
}

// printStarted is the answer of every command that starts a workflow.
func (e *env) printStarted(command string, s *server, workflowID, runID string, asJSON bool) error {
	link := s.link(workflowID, runID)
	if asJSON {
		return printJSON(e.out, command, startedRun{workflowID, runID, link})
	}
	fmt.Fprintf(e.out, "started %s\n", workflowID)
	if link != "" {
		fmt.Fprintln(e.out, link)
	}
	return nil
}

type startedRun struct {
	Workflow string `json:"workflow"`
	Run      string `json:"run"`
	Link     string `json:"link,omitempty"` // in the Web UI
}
