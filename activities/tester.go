package activities

import (
	"cmp"
	"context"
	"errors"
	"time"

	"go.temporal.io/sdk/activity"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// Tester holds the activities of a restore test, on the host that makes it. What
// is said of Host holds for it too. What a test finds stays on the host until it
// is written into the repository, sealed; histories get numbers.
type Tester struct {
	Tests *proof.Tester
	Grace time.Duration // how long work goes on when the worker is told to stop; 0: 15 s
}

// PlanTestRequest asks for a test.
type PlanTestRequest struct {
	proof.Request
	Test    repo.ID      `json:"test"` // its name
	Started time.Time    `json:"started"`
	Owner   backup.Owner `json:"owner"`
}

// A TestRequest says which test is to go on.
type TestRequest struct {
	Subject proof.Subject `json:"subject"`
}

// A TestResult is what a test has found so far.
type TestResult struct {
	Report proof.Report `json:"report"` // without findings
}

// PlanTestResult is what is tested.
type PlanTestResult struct {
	Subject proof.Subject `json:"subject"`
}

// PlanTest chooses what to test, and makes room for it.
func (t *Tester) PlanTest(ctx context.Context, req PlanTestRequest) (res PlanTestResult, err error) {
	err = watched(ctx, "plan", 0, planning, func(ctx context.Context, _ moved) error {
		res.Subject, err = t.Tests.Plan(ctx, req.Request, req.Test, req.Started, req.Owner)
		return err
	})
	return res, err
}

// RestoreTestFiles restores the backup into the sandbox.
func (t *Tester) RestoreTestFiles(ctx context.Context, req TestRequest) (TestResult, error) {
	return t.step(ctx, "restore", req, t.Tests.Restore)
}

// RecoverTest replays the log.
func (t *Tester) RecoverTest(ctx context.Context, req TestRequest) (TestResult, error) {
	return t.step(ctx, "recover", req, t.Tests.Recover)
}

// CheckTest looks at all there is in what was recovered.
func (t *Tester) CheckTest(ctx context.Context, req TestRequest) (TestResult, error) {
	return t.step(ctx, "check", req, t.Tests.Check)
}

const usualGrace = 15 * time.Second

// stands is how long a step may show no sign of work before it is taken for dead.
// What PostgreSQL itself does is watched more closely, by the sandbox.
const stands = 30 * time.Minute

func (t *Tester) step(ctx context.Context, stage string, req TestRequest, do func(context.Context, proof.Subject, proof.Progress) (proof.Report, error)) (res TestResult, err error) {
	grace := cmp.Or(t.Grace, usualGrace)
	err = watched(ctx, stage, grace, stands, func(ctx context.Context, moved moved) error {
		res.Report, err = do(ctx, req.Subject, func(doing string, done, total int64) {
			moved(Progress{Stage: doing, Done: done, Total: total})
		})
		return err
	})
	return res, err
}

// ReportTestRequest says how a test ended.
type ReportTestRequest struct {
	Subject  proof.Subject `json:"subject"`
	Finished time.Time     `json:"finished"`
	// Trouble ended the test before its checks did: text and kind of an error. "":
	// none did.
	Trouble string    `json:"trouble,omitempty"`
	Kind    fail.Kind `json:"kind,omitempty"`
}

// ReportTestResult is what the test found, without what only those may see who
// may read the backup.
type ReportTestResult struct {
	Report  proof.Report `json:"report"`
	Failure string       `json:"failure,omitempty"` // what is wrong, in a sentence; "": nothing
	Kind    fail.Kind    `json:"kind,omitempty"`    // of it
}

// ReportTest writes the proof into the repository.
func (t *Tester) ReportTest(ctx context.Context, req ReportTestRequest) (res ReportTestResult, err error) {
	var trouble error
	if req.Trouble != "" {
		trouble = fail.With(req.Kind, errors.New(req.Trouble))
	}
	err = watched(ctx, "report", cmp.Or(t.Grace, usualGrace), usual, func(ctx context.Context, _ moved) error {
		res.Report, err = t.Tests.Report(ctx, req.Subject, req.Finished, trouble)
		return err
	})
	if bad := res.Report.Err(); err == nil && bad != nil {
		res.Failure, res.Kind = bad.Error(), fail.KindOf(bad)
	}
	if err == nil {
		activity.GetLogger(ctx).Info("restore test done", "cluster", req.Subject.Cluster, "backup", req.Subject.ID, "verdict", res.Report.Verdict, "rto", res.Report.RTO)
	}
	return res, err
}

// CleanUpTest removes the sandbox.
func (t *Tester) CleanUpTest(ctx context.Context, req TestRequest) error {
	return watched(ctx, "clean up", cmp.Or(t.Grace, usualGrace), stands, func(ctx context.Context, _ moved) error {
		return t.Tests.CleanUp(ctx, req.Subject)
	})
}
