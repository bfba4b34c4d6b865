package workflows

import (
	"fmt"

	"go.temporal.io/sdk/workflow"

	"github.com/pgkeep/pgkeep/activities"
)

// expiry: only the names of its methods are used.
var expiry *activities.Expiry

// ExpireRequest asks to let go of what the retention of a cluster does not keep.
type ExpireRequest struct {
	Cluster string `json:"cluster"`
	Host    string `json:"host"`              // whose worker does it
	Confirm int    `json:"confirm,omitempty"` // how many backups may go, where that is many
}

// ExpireResult is what was decided and done.
type ExpireResult struct {
	activities.PlanExpireResult
	activities.ApplyExpireResult
}

// Expire removes what nobody needs any more: it marks backups, and removes what
// those held whose grace has passed, and the log that nothing leads through. It
// fails with fail.ExpireRefused rather than remove too much at once.
func Expire(ctx workflow.Context, req ExpireRequest) (res ExpireResult, err error) {
	b := newBoard(ctx, "Expiry of "+req.Cluster, "")
	defer func() {
		err = b.end(ctx, err)
		b.tell(ctx, req.Host, req.Cluster, KindExpire, err)
	}()

	b.stage(ctx, "plan")
	if err := do(ctx, expiring(req.Host, "what does nobody need?"), expiry.PlanExpire, activities.PlanExpireRequest{Cluster: req.Cluster, Confirm: req.Confirm}).Get(ctx, &res.PlanExpireResult); err != nil {
		return res, noWorker(err, req.Host)
	}
	if l := res.Locked; l != nil {
		b.row("Locked anew", fmt.Sprintf("%d of %d objects, until %s", l.Due, l.Objects, l.Until.Format("2006-01-02 15:04:05Z")))
	}
	going := res.Plan.Removals()
	b.row("Backups", fmt.Sprintf("%d, of which %d go", len(res.Plan.Backups), len(going)))
	for _, w := range res.Plan.WAL {
		b.row(fmt.Sprintf("Log of system %v", w.System), fmt.Sprintf("%d segments go: %s", w.Segments, w.Why))
	}

	b.stage(ctx, "apply")
	err = do(ctx, expiring(req.Host, "let it go"), expiry.ApplyExpire,
		activities.ApplyExpireRequest{Cluster: req.Cluster, Backups: going, Confirm: req.Confirm}).Get(ctx, &res.ApplyExpireResult)
	if err != nil {
		return res, err
	}
	b.row("Removed", fmt.Sprintf("%d objects of backups", res.Done.Swept.Objects))
	for _, w := range res.Done.WAL {
		b.row(fmt.Sprintf("Removed of system %v", w.System), fmt.Sprintf("%d files of the log, %s", w.Objects, size(w.Bytes)))
	}
	if refused := res.Done.Refused(); len(refused) > 0 {
		b.row("Refused by the store", fmt.Sprintf("%d deletions, such as %s; the next run tries again", len(refused), refused[0]))
	}
	return res, nil
}
