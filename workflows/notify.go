package workflows

import (
	"strings"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/notify"
)

// teller: only the names of its methods are used.
var teller *activities.Teller

// tell tells people how a run ended, if the host's configuration names any. That
// nobody could be told changes nothing of the run.
func (b *board) tell(ctx workflow.Context, host, cluster, kind string, err error) {
	if workflow.GetVersion(ctx, "notify", workflow.DefaultVersion, 1) == workflow.DefaultVersion {
		return // it ended before there was this
	}
	run := workflow.GetInfo(ctx).WorkflowExecution
	n := notify.Notice{Cluster: cluster, Kind: kind, Host: host, Backup: strings.Trim(b.id, " `"), Outcome: notify.Done, Run: run.ID + "/" + run.RunID, Ended: workflow.Now(ctx).UTC()}
	if err != nil {
		n.Outcome = notify.Failed
		if temporal.IsCanceledError(err) || ctx.Err() != nil {
			n.Outcome = notify.Cancelled
		}
		n.Failure, n.Reason = trouble(err)
		_, n.Stage, _ = strings.Cut(b.now, " during ")
	}
	away, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	if err := do(away, telling(host, "tell how it ended"), teller.Notify, n).Get(away, nil); err != nil {
		workflow.GetLogger(ctx).Warn("nobody was told how it ended", "error", err)
	}
}
