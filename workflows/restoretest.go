package workflows

import (
	"errors"
	"fmt"
	"time"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// tester: only the names of its methods are used.
var tester *activities.Tester

// RestoreTestRequest asks for a test of a backup.
type RestoreTestRequest struct {
	Host string `json:"host"` // whose worker makes it
	proof.Request
}

// RestoreTestResult is what a test that passed found.
type RestoreTestResult struct {
	Subject proof.Subject `json:"subject"`
	Report  proof.Report  `json:"report"`
}

// RestoreTest restores a backup into a sandbox on a host, recovers it, looks at
// all there is in it, and writes into the repository what it found. A test that
// finds something wrong fails, with fail.ProofFailed; one that is kept from an
// answer fails with the kind of what did. Whatever happens, the sandbox is
// removed at the end.
func RestoreTest(ctx workflow.Context, req RestoreTestRequest) (res RestoreTestResult, err error) {
	info := workflow.GetInfo(ctx)
	started := workflow.Now(ctx).UTC().Truncate(time.Millisecond)
	id := repo.ID(activities.BackupID(started, info.OriginalRunID))
	res.Subject.Test = id
	b := newBoard(ctx, "Restore test of "+req.Cluster+" on "+req.Host, "")
	defer func() {
		err = b.end(ctx, err)
		tidy, cancel := workflow.NewDisconnectedContext(ctx)
		defer cancel()
		// Where nobody has taken it up, there is nothing, and nobody to remove it. A
		// worker that had, and died, removes it when it is back.
		begun := fail.KindOf(err) != fail.NoWorker || workflow.GetVersion(ctx, "clean up what was begun", workflow.DefaultVersion, 1) == workflow.DefaultVersion
		if begun {
			if cerr := do(tidy, removing(req.Host, "remove the sandbox"), tester.CleanUpTest, activities.TestRequest{Subject: res.Subject}).Get(tidy, nil); cerr != nil {
				workflow.GetLogger(ctx).Warn("sandbox not removed; the worker will", "error", cerr)
			}
		}
		b.tell(ctx, req.Host, req.Cluster, KindRestoreTest, err)
	}()

	b.stage(ctx, "plan")
	var plan activities.PlanTestResult
	owner := backup.Owner{Namespace: info.Namespace, Workflow: info.WorkflowExecution.ID, Run: info.WorkflowExecution.RunID}
	err = do(ctx, watching(few(req.Host, "which backup, to which moment?")), tester.PlanTest,
		activities.PlanTestRequest{Request: req.Request, Test: id, Started: started, Owner: owner}).Get(ctx, &plan)
	if err != nil {
		return res, noWorker(err, req.Host)
	}
	res.Subject = plan.Subject
	b.id = " `" + string(res.Subject.ID) + "`"
	which := []temporal.SearchAttributeUpdate{PgkeepBackupID.ValueSet(string(res.Subject.ID))}
	if workflow.GetVersion(ctx, "bytes of what is tested", workflow.DefaultVersion, 1) > workflow.DefaultVersion {
		which = append(which, PgkeepBytes.ValueSet(res.Subject.Bytes))
	}
	b.upsert(ctx, which...)
	b.row("Backup", fmt.Sprintf("%s of %s, %s", res.Subject.Kind, res.Subject.ID.Time().Format(time.DateTime), size(res.Subject.Bytes)))
	b.row("To", res.Subject.Target.String())

	report := activities.ReportTestRequest{Subject: res.Subject}
	if err := b.test(ctx, req.Host, res.Subject); err != nil {
		if temporal.IsCanceledError(err) || ctx.Err() != nil {
			return res, err
		}
		report.Trouble, report.Kind = trouble(err)
	}
	report.Finished = workflow.Now(ctx).UTC().Truncate(time.Millisecond)

	b.stage(ctx, "report")
	var found activities.ReportTestResult
	if err := do(ctx, watching(patient(req.Host, "sign and write what was found")), tester.ReportTest, report).Get(ctx, &found); err != nil {
		return res, err
	}
	res.Report = found.Report
	b.row("Verdict", string(found.Report.Verdict))
	b.row("Time to restore", fmt.Sprintf("%.0f s, %d segments of log", found.Report.RTO, found.Report.Segments))
	if lag := found.Report.Lag; lag != nil {
		b.row("Behind the source", fmt.Sprintf("%s of log, %.0f s", size(lag.Bytes), lag.Seconds))
	}
	if found.Failure != "" {
		advice := fail.HintOf(found.Kind)
		if found.Kind == fail.ProofFailed {
			advice = "pgkeep show " + string(res.Subject.ID) + " names what was found; run pgkeep verify, and take a new backup"
		}
		return res, temporal.NewNonRetryableApplicationError(found.Failure, string(found.Kind), nil, activities.Advice{Hint: advice})
	}
	return res, nil
}

// test goes through the steps until one finds something wrong.
func (b *board) test(ctx workflow.Context, host string, s proof.Subject) error {
	for _, step := range []struct {
		name, summary string
		activity      any
	}{
		{"restore", "fetch and check " + size(s.Stored), tester.RestoreTestFiles},
		{"recover", "replay the log to " + s.Target.String(), tester.RecoverTest},
		{"check", "open it, and look at all there is in it", tester.CheckTest},
	} {
		b.stage(ctx, step.name)
		var res activities.TestResult
		if err := do(ctx, testing(host, step.summary), step.activity, activities.TestRequest{Subject: s}).Get(ctx, &res); err != nil {
			return err
		}
		if res.Report.Failed() {
			return nil
		}
	}
	return nil
}

// trouble is what kept a test from its end.
func trouble(err error) (text string, kind fail.Kind) {
	var app *temporal.ApplicationError
	if errors.As(err, &app) {
		return app.Message(), fail.KindOf(err)
	}
	var late *temporal.TimeoutError
	if errors.As(err, &late) {
		return "a step took too long, or its worker is gone", fail.Stalled
	}
	return err.Error(), fail.KindOf(err)
}
