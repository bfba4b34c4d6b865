package activities_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/testsuite"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A failure that is not UTF-8 cannot be sent: the server would never hear of it.
func TestFailuresAreText(t *testing.T) {
	for name, text := range map[string]string{
		"cut within a letter":                  "x" + strings.Repeat("é", 2000),
		"said by a server of another encoding": "FATAL: r\xf4le inconnu",
	} {
		t.Run(name, func(t *testing.T) {
			broken := func(context.Context) (*repo.Repo, error) {
				return nil, fail.Hint(errors.New(text), text)
			}
			h := &activities.Host{Logical: map[string]*backup.Logical{"main": {Name: "main", Open: broken}}}
			var suite testsuite.WorkflowTestSuite
			env := suite.NewTestActivityEnvironment()
			env.RegisterActivity(h)
			_, err := env.ExecuteActivity(h.Preflight, activities.Job{Cluster: "main", ID: "20261122T013000Z-4f2a9c01"})
			var app *temporal.ApplicationError
			if !errors.As(err, &app) || !utf8.ValidString(app.Message()) {
				t.Errorf("err = %.60q, want an application error in UTF-8", err)
			}
			if !utf8.ValidString(activities.AdviceOf(err)) {
				t.Errorf("advice is not UTF-8")
			}
		})
	}
}

// An attempt that stands still is ended, not only left for dead: it holds the
// lock of the spool, and a place among what a worker does at a time.
func TestHangingAttemptEnds(t *testing.T) {
	var suite testsuite.WorkflowTestSuite
	env := suite.NewTestActivityEnvironment()
	hang := func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
		defer cancel()
		return activities.Watched(ctx, time.Millisecond, func(wctx context.Context) error {
			<-wctx.Done()
			return wctx.Err()
		})
	}
	env.RegisterActivity(hang)
	began := time.Now()
	_, err := env.ExecuteActivity(hang)
	if kind := fail.KindOf(err); kind != fail.Stalled || time.Since(began) > 15*time.Second {
		t.Errorf("after %v: %v, kind %q, want stalled", time.Since(began), err, kind)
	}
}
