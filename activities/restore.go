package activities

import (
	"context"
	"errors"
	"time"

	"go.temporal.io/sdk/activity"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

// Restorer holds the activities that make a data directory of a physical backup.
type Restorer struct {
	// Prepare turns a request into what is to be done on this host.
	Prepare func(context.Context, RestoreRequest) (restore.Physical, error)
	Grace   time.Duration // how long work goes on when the worker is told to stop; 0: 15 s
}

// A RestoreRequest says what is to be restored, and where. Fields are those of
// restore.Physical.
type RestoreRequest struct {
	Cluster     string            `json:"cluster"`
	Backup      repo.ID           `json:"backup,omitempty"`
	Target      restore.Target    `json:"target"`
	Action      restore.Action    `json:"action,omitempty"`
	Standby     bool              `json:"standby,omitempty"`
	Dir         string            `json:"target_dir"`
	ConfigDir   string            `json:"config_dir,omitempty"`
	Tablespaces map[string]string `json:"tablespaces,omitempty"`
	Delta       bool              `json:"delta,omitempty"`
	Owner       string            `json:"owner,omitempty"`
	Takeover    bool              `json:"takeover,omitempty"`
}

// PlanRestoreResult is what a restore will do.
type PlanRestoreResult struct {
	Plan restore.PhysicalPlan `json:"plan"`
}

// planning is how long the plan of a restore may take. It reads lists and log, as
// much as there is of them, and does not tell how far it is.
const planning = 30 * time.Minute

// PlanRestore refuses a restore that cannot be done, before anything is written.
func (r *Restorer) PlanRestore(ctx context.Context, req RestoreRequest) (res PlanRestoreResult, err error) {
	err = watched(ctx, "plan", 0, planning, func(ctx context.Context, moved moved) error {
		p, err := r.Prepare(ctx, req)
		if err == nil {
			res.Plan, err = p.Plan(ctx)
		}
		return err
	})
	return res, err
}

// RestoreFiles makes the data directory. Another try goes on from where the last
// one was cut, and leaves alone what the last one has finished.
func (r *Restorer) RestoreFiles(ctx context.Context, req RestoreRequest) error {
	grace := r.Grace
	if grace == 0 {
		grace = 15 * time.Second
	}
	return watched(ctx, "restore", grace, planning, func(ctx context.Context, moved moved) error {
		p, err := r.Prepare(ctx, req)
		if err != nil {
			return err
		}
		p.Job = activity.GetInfo(ctx).WorkflowExecution.RunID
		if done, err := p.Done(); done || err != nil {
			return err
		}
		plan, err := p.Plan(ctx)
		if err != nil {
			return err
		}
		p.Progress = func(_ string, done, total int64) { moved(Progress{Done: done, Total: total}) }
		_, err = p.Run(ctx, plan)
		if errors.Is(err, fail.AlreadyRunning) { // an attempt that was given up, and does not know yet
			err = fail.With(fail.Stopping, err)
		}
		return err
	})
}
