package activities

import (
	"context"
	"errors"

	"go.temporal.io/sdk/activity"

	"github.com/pgkeep/pgkeep/internal/notify"
)

// A Teller tells people how runs end.
type Teller struct {
	Notifier *notify.Notifier // nil: there is nobody to tell
}

// Notify tells of a run. Whom it has told it does not tell again when it is tried
// again.
func (t *Teller) Notify(ctx context.Context, n notify.Notice) error {
	var told bool
	_ = activity.GetHeartbeatDetails(ctx, &told) // else nobody was
	var err error
	if !told {
		if err = t.Notifier.Call(ctx, n); err == nil {
			activity.RecordHeartbeat(ctx, true)
		}
	}
	return border(ctx, errors.Join(err, t.Notifier.Ping(ctx, n))) // to ping twice is to ping
}
