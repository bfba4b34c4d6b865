package activities

import (
	"context"
	"time"
)

// Watched is watched, for work that never moves.
func Watched(ctx context.Context, quiet time.Duration, work func(context.Context) error) error {
	return watched(ctx, "test", time.Second, quiet, func(ctx context.Context, _ moved) error { return work(ctx) })
}
