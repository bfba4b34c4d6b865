package workflows

import (
	"errors"
	"fmt"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/notify"
	"github.com/pgkeep/pgkeep/internal/proof"
)

// Scheduled runs one backup, or one restore test, as a child of a fixed id, the same under which
// pgkeep backup starts one by hand: so at most one runs for a cluster and kind,
// wherever it was started. A schedule gives each of its runs an id of its own,
// which would keep nothing apart.
// Its result is that of the backup.
func Scheduled(ctx workflow.Context, req ScheduledRequest) (res converter.RawValue, err error) {
	var name string
	var request any
	switch req.Kind {
	case Logical:
		name, request = LogicalBackupName, LogicalBackupRequest{Cluster: req.Cluster, Host: req.Host}
	case Physical:
		name, request = PhysicalBackupName, PhysicalBackupRequest{Cluster: req.Cluster, Host: req.Host}
	case KindRestoreTest:
		name, request = RestoreTestName, RestoreTestRequest{Host: req.Host, Request: proof.Request{Cluster: req.Cluster}}
	default:
		return res, temporal.NewNonRetryableApplicationError(fmt.Sprintf("this pgkeep knows no backup of kind %q", req.Kind), string(fail.BadConfig), nil)
	}
	// What Temporal set for the schedule is its own, and stays with this run.
	opt := workflow.ChildWorkflowOptions{
		WorkflowID:            BackupWorkflowID(req.Cluster, req.Kind),
		TaskQueue:             Queue,
		WaitForCancellation:   true,
		ParentClosePolicy:     enumspb.PARENT_CLOSE_POLICY_REQUEST_CANCEL,
		WorkflowIDReusePolicy: enumspb.WORKFLOW_ID_REUSE_POLICY_ALLOW_DUPLICATE,
		TypedSearchAttributes: inherited(workflow.GetTypedSearchAttributes(ctx)),
		StaticSummary:         what(req.Kind) + " of " + req.Cluster + ", scheduled",
	}
	err = workflow.ExecuteChildWorkflow(workflow.WithChildOptions(ctx, opt), name, request).Get(ctx, &res)
	var running *temporal.ChildWorkflowExecutionAlreadyStartedError
	if errors.As(err, &running) {
		err = temporal.NewNonRetryableApplicationError(
			fmt.Sprintf("a %s of %s is running already, as workflow %s: this one was not started", what(req.Kind), req.Cluster, opt.WorkflowID),
			string(fail.AlreadyRunning), nil, activities.Advice{Hint: fail.HintOf(fail.AlreadyRunning)})
		tell(ctx, notify.Notice{Cluster: req.Cluster, Kind: req.Kind, Host: req.Host}, err) // else the run that was started does
	}
	return res, err
}

// what is the name of a run of a kind.
func what(kind string) string {
	if kind == KindRestoreTest {
		return "restore test"
	}
	return kind + " backup"
}

// inherited are the search attributes that a run passes on to its child.
func inherited(all temporal.SearchAttributes) temporal.SearchAttributes {
	var set []temporal.SearchAttributeUpdate
	for _, key := range []temporal.SearchAttributeKeyKeyword{PgkeepCluster, PgkeepHost, PgkeepKind} {
		if value, ok := all.GetKeyword(key); ok {
			set = append(set, key.ValueSet(value))
		}
	}
	return temporal.NewSearchAttributes(set...)
}
