package activities_test

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"strings"
	"syscall"
	"testing"
	"time"
	"unicode/utf8"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/testsuite"
	"go.temporal.io/sdk/workflow"

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

// A sector of the disk cannot be read. Each attempt read the whole cluster up to it,
// every five minutes for four weeks, and no other backup ran.
func TestLongWorkThatFailsForNoKnownReasonEndsTheBackup(t *testing.T) {
	for _, tt := range []struct {
		err   error
		times int32 // 0: for ever
	}{
		{&fs.PathError{Op: "read", Path: "base/5/16384", Err: syscall.EIO}, 5},
		{fail.With(fail.StoreDown, errors.New("503")), 0},
	} {
		var suite testsuite.WorkflowTestSuite
		env := suite.NewTestWorkflowEnvironment()
		var tries int32
		long := func(ctx context.Context) error {
			return activities.Watched(ctx, time.Hour, func(context.Context) error { tries++; return tt.err })
		}
		env.RegisterActivity(long)
		run := func(ctx workflow.Context) error {
			ctx = workflow.WithActivityOptions(ctx, workflow.ActivityOptions{StartToCloseTimeout: time.Hour,
				RetryPolicy: &temporal.RetryPolicy{InitialInterval: time.Second, MaximumInterval: time.Second, MaximumAttempts: 20}})
			return workflow.ExecuteActivity(ctx, long).Get(ctx, nil)
		}
		env.RegisterWorkflow(run)
		env.ExecuteWorkflow(run)
		if want := cmp.Or(tt.times, 20); env.GetWorkflowError() == nil || tries != want {
			t.Errorf("%v: tried %d times, want %d; %v", tt.err, tries, want, env.GetWorkflowError())
		}
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
