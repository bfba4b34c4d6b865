// Package schedule makes the schedules of a Temporal server follow a list: Plan
// decides what is to change, Apply changes it.
package schedule

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/temporal"

	"github.com/pgkeep/pgkeep/workflows"
)

// A Schedule is a backup, an audit or a restore test that Temporal starts at
// certain times.
type Schedule struct {
	Cluster string
	Kind    string
	Host    string // whose worker takes the backup

	Cron          string        // as Temporal reads it, without a time zone
	TimeZone      string        // IANA name
	Jitter        time.Duration // the most that a start is delayed; 0 is none
	CatchupWindow time.Duration // how old a missed start may be to be made up for
	RunTimeout    time.Duration // after which a run is ended; 0 is never

	// Searchable lets the runs carry search attributes. A server that does not
	// know them refuses to start such a run.
	Searchable bool
}

// ID is the id of s on the server: there is one schedule for each cluster and
// kind.
func (s Schedule) ID() string { return workflows.BackupWorkflowID(s.Cluster, s.Kind) }

// Existing is a schedule that a server has.
type Existing struct {
	ID   string
	Host string // whose worker takes the backups
	Cron string // as it was when pgkeep wrote it
	Hash string // Schedule.Hash of what pgkeep wrote

	TimeZone      string
	Jitter        time.Duration
	CatchupWindow time.Duration
	RunTimeout    time.Duration

	Paused bool
	Note   string // an operator's

	Next    time.Time     // zero if there is none, as for a paused one
	Every   time.Duration // the longest time between any two of the next starts; 0 if there are none
	Last    time.Time     // of the last start; zero if there was none
	Running []Run
	Recent  []Run // the newest that were started, oldest first
	Missed  int   // starts that were too old to be made up for
	Skipped int   // starts given up because a run was still going on
}

// A Run is one execution of a workflow.
type Run struct{ WorkflowID, RunID string }

// Ended is how the newest run of a schedule came out that is over. The zero Ended:
// there is none, or the server does not remember it.
type Ended struct {
	Run  Run
	At   time.Time
	Done bool   // else it failed, or was ended
	How  string // in the server's word: "Completed", "Failed", "TimedOut", …
}

// An Action is what is to be done about a schedule.
type Action string

const (
	Create    Action = "create"
	Update    Action = "update"
	Unchanged Action = "unchanged"
	Orphan    Action = "orphan" // nobody wants it, and it stays
	Delete    Action = "delete" // nobody wants it, and it goes
)

// A Change is what is to be done about one schedule.
type Change struct {
	Action Action
	ID     string
	Want   Schedule // zero for Orphan and Delete
	Have   Existing // zero for Create
}

// Options tune a Plan. The zero value reports no orphans.
type Options struct {
	// Hosts are the hosts for which the wanted list speaks: a schedule of one
	// of them that is not wanted is an orphan. Those of other hosts are not
	// looked at.
	Hosts []string
	// Prune deletes the orphans.
	Prune bool
}

// Plan returns what turns have into want, in the order of ids. A schedule that
// is as it should be is Unchanged, and must not be touched: an update may lose
// a start that is being delayed.
func Plan(want []Schedule, have []Existing, opt Options) []Change {
	byID := make(map[string]Existing)
	for _, h := range have {
		byID[h.ID] = h
	}
	var plan []Change
	for _, w := range want {
		h, ok := byID[w.ID()]
		delete(byID, w.ID())
		c := Change{Action: Create, ID: w.ID(), Want: w, Have: h}
		if ok {
			c.Action = Update
			if h.Hash == w.Hash() {
				c.Action = Unchanged
			}
		}
		plan = append(plan, c)
	}
	for _, h := range byID {
		if slices.Contains(opt.Hosts, h.Host) {
			c := Change{Action: Orphan, ID: h.ID, Have: h}
			if opt.Prune {
				c.Action = Delete
			}
			plan = append(plan, c)
		}
	}
	slices.SortFunc(plan, func(a, b Change) int { return cmp.Compare(a.ID, b.ID) })
	return plan
}

// shape is part of every hash. Raise it when options changes, so that schedules
// written before are updated.
const shape = 2

// Hash names everything about s that a server is told.
func (s Schedule) Hash() string {
	b, _ := json.Marshal(struct { // strings and numbers: it cannot fail
		Shape int
		Schedule
	}{shape, s})
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// scheduledSuffix ends the id of the schedule in those of its runs.
const scheduledSuffix = "/scheduled"

// Keys of the memo that every run carries. They are how pgkeep knows again what
// it wrote: the server keeps neither the text of a cron expression nor a memo
// of the schedule's own that could be changed.
const (
	memoHash = "pgkeep.specHash"
	memoCron = "pgkeep.cron"
)

// hashAttribute holds Hash in the search attributes of a schedule itself, which has
// no stage; those of its runs are others. One more attribute would have to be
// registered on every server.
var hashAttribute = workflows.PgkeepStage

// options is s in Temporal's words.
func (s Schedule) options() client.ScheduleOptions {
	action := &client.ScheduleWorkflowAction{
		ID:                 s.ID() + scheduledSuffix, // the server appends the time
		Workflow:           workflows.ScheduledName,
		TaskQueue:          workflows.Queue,
		Args:               []any{workflows.ScheduledRequest{Cluster: s.Cluster, Kind: s.Kind, Host: s.Host}},
		WorkflowRunTimeout: s.RunTimeout,
		Memo:               map[string]any{memoHash: s.Hash(), memoCron: s.Cron},
		StaticSummary:      fmt.Sprintf("scheduled %s backup of %s", s.Kind, s.Cluster),
	}
	if s.Kind == workflows.KindWALAudit { // it changes nothing that two could change at once
		action.Workflow, action.Args = workflows.WALAuditName, []any{workflows.WALAuditRequest{Cluster: s.Cluster, Host: s.Host}}
		action.StaticSummary = "scheduled audit of the WAL archive of " + s.Cluster
	}
	if s.Kind == workflows.KindRestoreTest {
		action.StaticSummary = "scheduled restore test of " + s.Cluster
	}
	if s.Kind == workflows.KindExpire { // of two at once, each may do what the other began
		action.Workflow, action.Args = workflows.ExpireName, []any{workflows.ExpireRequest{Cluster: s.Cluster, Host: s.Host}}
		action.StaticSummary = "scheduled expiry of " + s.Cluster
	}
	var own temporal.SearchAttributes
	if s.Searchable {
		action.TypedSearchAttributes = temporal.NewSearchAttributes(
			workflows.PgkeepCluster.ValueSet(s.Cluster), workflows.PgkeepKind.ValueSet(s.Kind))
		own = temporal.NewSearchAttributes(
			workflows.PgkeepCluster.ValueSet(s.Cluster), workflows.PgkeepKind.ValueSet(s.Kind), workflows.PgkeepHost.ValueSet(s.Host),
			hashAttribute.ValueSet(s.Hash()))
	}
	// The server's list has the comment of an expression, and not its text.
	return client.ScheduleOptions{
		ID:     s.ID(),
		Spec:   client.ScheduleSpec{CronExpressions: []string{s.Cron + " # " + s.Cron}, TimeZoneName: s.TimeZone, Jitter: s.Jitter},
		Action: action,

		TypedSearchAttributes: own,
		Overlap:               enumspb.SCHEDULE_OVERLAP_POLICY_SKIP,
		CatchupWindow:         s.CatchupWindow,
	}
}
