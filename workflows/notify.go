package workflows

import (
	"errors"
	"strings"
	"time"

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
	n := notify.Notice{Cluster: cluster, Kind: kind, Host: host, Backup: strings.Trim(b.id, " `")}
	_, n.Stage, _ = strings.Cut(b.now, " during ")
	tell(ctx, n, err)
}

func tell(ctx workflow.Context, n notify.Notice, err error) {
	version := workflow.GetVersion(ctx, "notify", workflow.DefaultVersion, 2)
	if version == workflow.DefaultVersion {
		return // it ended before there was this
	}
	run := workflow.GetInfo(ctx).WorkflowExecution
	n.Outcome, n.Run, n.Ended = notify.Done, run.ID+"/"+run.RunID, workflow.Now(ctx).UTC()
	if err == nil {
		n.Stage = ""
	} else {
		n.Outcome = notify.Failed
		if temporal.IsCanceledError(err) || ctx.Err() != nil {
			n.Outcome = notify.Cancelled
		}
		n.Failure, n.Reason = trouble(err)
	}
	away, cancel := workflow.NewDisconnectedContext(ctx)
	defer cancel()
	err = do(away, telling(HostQueue(n.Host), 10*time.Second, "tell how it ended"), teller.Notify, n).Get(away, nil)
	var late *temporal.TimeoutError
	if errors.As(err, &late) && version > 1 { // the worker is dead, and that is the news: any other that has addresses tells it
		err = do(away, telling(Queue, 10*time.Minute, "tell how it ended, in place of host "+n.Host), teller.Notify, n).Get(away, nil)
	}
	if err != nil {
		workflow.GetLogger(ctx).Warn("nobody was told how it ended", "error", err)
	}
}
