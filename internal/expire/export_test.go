package expire

import (
	"context"
	"time"

	"github.com/pgkeep/pgkeep/internal/retention"
)

// PlanAt is Plan at some time.
func (x *Expirer) PlanAt(ctx context.Context, now time.Time) (retention.Plan, error) {
	r, err := x.Open(ctx)
	if err != nil {
		return retention.Plan{}, err
	}
	return x.plan(ctx, r, now)
}

// ApplyAt is Apply at some time.
func (x *Expirer) ApplyAt(ctx context.Context, o Order, now time.Time) (Done, error) {
	return x.ApplyBy(ctx, o, func() time.Time { return now })
}

// ApplyBy is Apply by some clock.
func (x *Expirer) ApplyBy(ctx context.Context, o Order, now func() time.Time) (Done, error) {
	r, err := x.Open(ctx)
	if err != nil {
		return Done{}, err
	}
	return x.apply(ctx, r, o, now)
}

// RelockAt is Relock at some time.
func (x *Expirer) RelockAt(ctx context.Context, now time.Time) (*retention.Locking, error) {
	r, err := x.Open(ctx)
	if err != nil {
		return nil, err
	}
	return x.relock(ctx, r, func() time.Time { return now })
}
