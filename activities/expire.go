package activities

import (
	"context"
	"fmt"
	"time"

	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
)

// Expiry holds the activities that let go of what nobody needs, on the host whose
// worker may delete. What is said of Host holds for it too.
type Expiry struct {
	Expirers map[string]*expire.Expirer // by the name of the cluster
}

func (e *Expiry) expirer(cluster string) (*expire.Expirer, error) {
	if x, ok := e.Expirers[cluster]; ok {
		return x, nil
	}
	return nil, fail.Hint(fmt.Errorf("nothing of cluster %q expires here: %w", cluster, fail.BadConfig),
		"describe what is kept under clusters."+cluster+".retention in the configuration of this host, and start its worker anew")
}

// PlanExpireRequest says whose backups are meant.
type PlanExpireRequest struct {
	Cluster string `json:"cluster"`
	Confirm int    `json:"confirm,omitempty"` // see retention.Plan
}

// PlanExpireResult is what would go.
type PlanExpireResult struct {
	Plan retention.Plan `json:"plan"`
	// Locked is which objects were locked anew; nil: locks are left alone.
	Locked *retention.Locking `json:"locked,omitempty"`
}

// expiring is how long listing and deleting may take without a word of how far
// it is.
const expiring = time.Hour

// PlanExpire decides what goes. It fails if that is too much, or not certain. First
// of all it locks anew what stands, if that is wanted: whatever becomes of the plan.
func (e *Expiry) PlanExpire(ctx context.Context, req PlanExpireRequest) (res PlanExpireResult, err error) {
	err = watched(ctx, "plan", 0, expiring, func(ctx context.Context, _ moved) error {
		x, err := e.expirer(req.Cluster)
		if err != nil {
			return err
		}
		if res.Locked, err = x.Relock(ctx); err != nil {
			return err
		}
		if res.Plan, err = x.Plan(ctx); err != nil {
			return err
		}
		return res.Plan.Err(req.Confirm)
	})
	return res, err
}

// ApplyExpireRequest says what was decided.
type ApplyExpireRequest struct {
	Cluster string    `json:"cluster"`
	Backups []repo.ID `json:"backups"` // to be let go
	Confirm int       `json:"confirm,omitempty"`
}

// ApplyExpireResult is what was done.
type ApplyExpireResult struct {
	Done expire.Done `json:"done"`
}

// ApplyExpire carries the decision out.
func (e *Expiry) ApplyExpire(ctx context.Context, req ApplyExpireRequest) (res ApplyExpireResult, err error) {
	err = watched(ctx, "expire", 0, expiring, func(ctx context.Context, _ moved) error {
		x, err := e.expirer(req.Cluster)
		if err != nil {
			return err
		}
		res.Done, err = x.Apply(ctx, expire.Order{Backups: req.Backups, Confirm: req.Confirm})
		return err
	})
	return res, err
}
