package workflows

import (
	"fmt"

	"go.temporal.io/sdk/workflow"

	"github.com/pgkeep/pgkeep/activities"
)

// restorer: only the names of its methods are used.
var restorer *activities.Restorer

// RestoreRequest asks for a data directory on a host.
type RestoreRequest struct {
	Host string `json:"host"` // whose worker makes it
	activities.RestoreRequest
}

// Restore makes a data directory of a physical backup on a host. The plan fixes
// which backup it is.
func Restore(ctx workflow.Context, req RestoreRequest) (res activities.PlanRestoreResult, err error) {
	b := newBoard(ctx, "Restore of "+req.Cluster+" on "+req.Host, string(req.Backup))
	defer func() { err = b.end(ctx, err) }()

	b.stage(ctx, "plan")
	if err := do(ctx, few(req.Host, "can it be done?"), restorer.PlanRestore, req.RestoreRequest).Get(ctx, &res); err != nil {
		return res, noWorker(err, req.Host)
	}
	req.Backup = res.Plan.Backup.ID
	b.row("Backup", string(req.Backup))
	b.row("To", fmt.Sprintf("%v, along timeline %d", req.Target, res.Plan.Timeline))
	b.row("Into", fmt.Sprintf("%s: %d files, %s", req.Dir, res.Plan.Files, size(res.Plan.Bytes)))

	b.stage(ctx, "restore")
	return res, do(ctx, long(req.Host, "fetch and check "+size(res.Plan.Stored)), restorer.RestoreFiles, req.RestoreRequest).Get(ctx, nil)
}
