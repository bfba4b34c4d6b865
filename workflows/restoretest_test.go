package workflows_test

import (
	"context"
	"testing"

	"go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/interceptor"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/testsuite"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/notify"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/workflows"
)

// A test for a host that has no worker waited for it twice, the second time for an
// hour, to remove what nobody had made. One that was begun is cleaned up.
func TestRestoreTestThatNobodyTookUpLeavesNothingToRemove(t *testing.T) {
	for name, tt := range map[string]struct {
		plan   error
		kind   fail.Kind
		cleans int
	}{
		"nobody": {temporal.NewTimeoutError(enums.TIMEOUT_TYPE_SCHEDULE_TO_START, nil), fail.NoWorker, 0},
		"begun":  {temporal.NewNonRetryableApplicationError("full", string(fail.NoSpace), nil), fail.NoSpace, 1},
	} {
		t.Run(name, func(t *testing.T) {
			var suite testsuite.WorkflowTestSuite
			env := suite.NewTestWorkflowEnvironment()
			env.SetWorkerOptions(worker.Options{Interceptors: []interceptor.WorkerInterceptor{&runs{}}})
			cleans, told := 0, 0
			env.RegisterActivityWithOptions(func(context.Context, activities.PlanTestRequest) (activities.PlanTestResult, error) {
				return activities.PlanTestResult{}, tt.plan
			}, activity.RegisterOptions{Name: "PlanTest"})
			env.RegisterActivityWithOptions(func(context.Context, activities.TestRequest) error { cleans++; return nil }, activity.RegisterOptions{Name: "CleanUpTest"})
			env.RegisterActivityWithOptions(func(context.Context, notify.Notice) error { told++; return nil }, activity.RegisterOptions{Name: "Notify"})
			env.ExecuteWorkflow(workflows.RestoreTest, workflows.RestoreTestRequest{Host: "gone", Request: proof.Request{Cluster: "main"}})
			if err := env.GetWorkflowError(); fail.KindOf(err) != tt.kind {
				t.Errorf("the run ended with %v, want %s", err, tt.kind)
			}
			if cleans != tt.cleans || told != 1 {
				t.Errorf("cleaned up %d times, want %d; told %d times", cleans, tt.cleans, told)
			}
		})
	}
}

// runs gives a workflow of the test suite the id of its first run, which every
// server does.
type runs struct {
	interceptor.WorkerInterceptorBase
}

func (r *runs) InterceptWorkflow(_ workflow.Context, next interceptor.WorkflowInboundInterceptor) interceptor.WorkflowInboundInterceptor {
	in := &runsIn{}
	in.Next = next
	return in
}

type runsIn struct {
	interceptor.WorkflowInboundInterceptorBase
}

func (in *runsIn) Init(out interceptor.WorkflowOutboundInterceptor) error {
	first := &runsOut{}
	first.Next = out
	return in.Next.Init(first)
}

type runsOut struct {
	interceptor.WorkflowOutboundInterceptorBase
}

func (out *runsOut) GetInfo(ctx workflow.Context) *workflow.Info {
	info := *out.Next.GetInfo(ctx)
	info.OriginalRunID = "01a2059d-b760-725f-8f55-5266c7827e37"
	return &info
}
