package fail_test

import (
	"errors"
	"fmt"
	"testing"

	"go.temporal.io/sdk/temporal"

	"github.com/pgkeep/pgkeep/internal/fail"
)

func TestKindOf(t *testing.T) {
	wrapped := fmt.Errorf("push 000000010000000000000001: %w", fail.WrongSystem)
	remote := temporal.NewNonRetryableApplicationError("no", string(fail.Corrupt), nil)
	for _, tt := range []struct {
		name string
		err  error
		want fail.Kind
	}{
		{"nil", nil, fail.Unknown},
		{"plain", errors.New("disk on fire"), fail.Unknown},
		{"wrapped", wrapped, fail.WrongSystem},
		{"hinted", fail.Hint(wrapped, "compare the two files"), fail.WrongSystem},
		{"with", fmt.Errorf("dial: %w", fail.With(fail.TemporalDown, errors.New("no"))), fail.TemporalDown},
		{"with, over another", fail.With(fail.Cancelled, wrapped), fail.Cancelled},
		{"remote", fmt.Errorf("backup: %w", remote), fail.Corrupt},
		{"remote of a foreign type", temporal.NewApplicationError("no", "panic"), fail.Unknown},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := fail.KindOf(tt.err); got != tt.want {
				t.Errorf("KindOf = %q, want %q", got, tt.want)
			}
		})
	}
	cause := errors.New("connection refused")
	if err := fail.With(fail.StoreDown, cause); err.Error() != cause.Error() || !errors.Is(err, cause) {
		t.Errorf("With hides the cause, or adds to its text: %v", err)
	}
	if err := fail.With(fail.StoreDown, nil); err != nil {
		t.Errorf("With makes an error of nil: %v", err)
	}
	if !errors.Is(wrapped, fail.WrongSystem) {
		t.Error("errors.Is does not see the kind")
	}
}
