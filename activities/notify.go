package activities

import (
	"context"

	"github.com/pgkeep/pgkeep/internal/notify"
)

// A Teller tells people how runs end.
type Teller struct {
	Notifier *notify.Notifier // nil: there is nobody to tell
}

// Notify tells of a run.
func (t *Teller) Notify(ctx context.Context, n notify.Notice) error {
	return border(ctx, t.Notifier.Tell(ctx, n))
}
