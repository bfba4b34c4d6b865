// Package worker puts the pieces together on a host: it registers workflows and
// activities, serves their task queues until told to stop, and looks after the
// spool.
package worker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"go.temporal.io/api/enums/v1"
	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/client"
	sdk "go.temporal.io/sdk/worker"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/notify"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/workflows"
)

// Options are what a worker needs. The zero value of each field in the last
// group is right.
type Options struct {
	Client    client.Client
	Namespace string // of Client: what other namespaces' workflows left is not judged
	Host      string
	Logical   []*backup.Logical                                                          // of the clusters of this host
	Physical  []*backup.Physical                                                         // likewise
	Audits    []*audit.Auditor                                                           // likewise
	Expirers  []*expire.Expirer                                                          // of the clusters that this host expires
	Restore   func(context.Context, activities.RestoreRequest) (restore.Physical, error) // prepares a restore on this host; nil: none is served
	Tests     *proof.Tester                                                              // of backups, on this host; nil: none are made
	Notifier  *notify.Notifier                                                           // tells people how runs of this host's clusters end; nil: nobody
	Store     store.Store                                                                // of the repository; nil: leftovers there are not looked for
	Log       *slog.Logger

	Activities int           // at a time on this host; 0: 4
	Grace      time.Duration // for what runs when the worker is told to stop; 0: 15 s
	Tidy       time.Duration // how often the spool is looked after; 0: 15 minutes
}

// Run serves until ctx ends or the connection is beyond hope. Then it lets what
// runs finish or stop in good order, which takes up to Grace and ten seconds.
func Run(ctx context.Context, opt Options) error {
	if opt.Activities == 0 {
		opt.Activities = 4
	}
	if opt.Grace == 0 {
		opt.Grace = 15 * time.Second
	}
	if opt.Tidy == 0 {
		opt.Tidy = 15 * time.Minute
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	fatal := func(err error) { cancel(fmt.Errorf("worker: %w", err)) }

	shared := sdk.New(opt.Client, workflows.Queue, sdk.Options{
		DisableRegistrationAliasing: true,
		WorkerStopTimeout:           5 * time.Second,
		OnFatalError:                fatal,
	})
	workflows.Register(shared)

	h := &activities.Host{Logical: make(map[string]*backup.Logical), Physical: make(map[string]*backup.Physical), Grace: opt.Grace}
	for _, l := range opt.Logical {
		h.Logical[l.Name] = l
	}
	for _, p := range opt.Physical {
		h.Physical[p.Name] = p
	}
	local := sdk.New(opt.Client, workflows.HostQueue(opt.Host), sdk.Options{
		DisableWorkflowWorker:              true, // else it would stop before activities hear of it
		MaxConcurrentActivityExecutionSize: opt.Activities,
		MaxHeartbeatThrottleInterval:       3 * time.Second,
		WorkerStopTimeout:                  opt.Grace + 10*time.Second, // to end programs and send the last heartbeat
		OnFatalError:                       fatal,
	})
	local.RegisterActivityWithOptions(h, activity.RegisterOptions{})
	if opt.Restore != nil {
		local.RegisterActivityWithOptions(&activities.Restorer{Prepare: opt.Restore, Grace: opt.Grace}, activity.RegisterOptions{})
	}
	if opt.Tests != nil {
		local.RegisterActivityWithOptions(&activities.Tester{Tests: opt.Tests, Grace: opt.Grace}, activity.RegisterOptions{})
	}
	archives := &activities.WAL{Auditors: make(map[string]*audit.Auditor)}
	for _, a := range opt.Audits {
		archives.Auditors[a.Name] = a
	}
	local.RegisterActivityWithOptions(archives, activity.RegisterOptions{})
	expiry := &activities.Expiry{Expirers: make(map[string]*expire.Expirer)}
	for _, x := range opt.Expirers {
		expiry.Expirers[x.Name] = x
	}
	local.RegisterActivityWithOptions(expiry, activity.RegisterOptions{})

	teller := &activities.Teller{Notifier: opt.Notifier}
	local.RegisterActivityWithOptions(teller, activity.RegisterOptions{})
	if opt.Notifier != nil { // of other hosts too, when their workers are dead
		shared.RegisterActivityWithOptions(teller, activity.RegisterOptions{})
	}

	workers := []sdk.Worker{shared, local}
	for i, w := range workers {
		if err := w.Start(); err != nil {
			stopAll(workers[:i])
			return fmt.Errorf("start worker: %w", err)
		}
	}
	opt.Log.Info("worker serves", "host", opt.Host, "queues", []string{workflows.Queue, workflows.HostQueue(opt.Host)}, "clusters", len(opt.Logical))
	var wg sync.WaitGroup
	wg.Go(func() { tidy(ctx, opt) })
	<-ctx.Done()
	opt.Log.Info("worker stops", "grace", opt.Grace)
	stopAll(workers)
	wg.Wait()
	if cause := context.Cause(ctx); !errors.Is(cause, context.Canceled) {
		return cause
	}
	return nil
}

// stopAll stops workers side by side: each waits for its own.
func stopAll(workers []sdk.Worker) {
	var wg sync.WaitGroup
	for _, w := range workers {
		wg.Go(w.Stop)
	}
	wg.Wait()
}

// staleUpload is when an upload in parts that nobody completed is taken for
// abandoned. Nothing of pgkeep takes nearly as long for one object.
const staleUpload = 48 * time.Hour

// tidy removes, at once and then now and then, what backups left in the spool and
// restore tests in their directory, whose workflows are gone: a terminated one runs no code that would. And it
// aborts what is left of uploads in the store, where it costs and nobody sees it.
func tidy(ctx context.Context, opt Options) {
	for tick := time.NewTicker(opt.Tidy); ; {
		for _, l := range opt.Logical {
			if err := tidyOne(ctx, opt, l); err != nil && ctx.Err() == nil {
				opt.Log.Warn("spool not looked after", "cluster", l.Name, "error", err)
			}
		}
		if opt.Tests != nil {
			if err := tidyTests(ctx, opt); err != nil && ctx.Err() == nil {
				opt.Log.Warn("restore tests not looked after", "error", err)
			}
		}
		if sweeper, ok := opt.Store.(store.Sweeper); ok {
			if n, err := sweeper.AbortStale(ctx, staleUpload); err != nil && ctx.Err() == nil {
				opt.Log.Warn("abandoned uploads not aborted", "error", err)
			} else if n > 0 {
				opt.Log.Info("abandoned uploads aborted", "uploads", n)
			}
		}
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-tick.C:
		}
	}
}

func tidyOne(ctx context.Context, opt Options, l *backup.Logical) error {
	spooled, err := l.Spooled()
	if err != nil {
		return err
	}
	for id, by := range spooled {
		open, err := isOpen(ctx, opt, by)
		if err != nil {
			return err
		}
		if open {
			continue
		}
		if err := l.CleanUp(ctx, id); err != nil {
			return err
		}
		opt.Log.Info("spool of a backup that is gone removed", "cluster", l.Name, "id", id)
	}
	return nil
}

// tidyTests removes what is left of tests whose workflows are gone.
func tidyTests(ctx context.Context, opt Options) error {
	var failed error
	removed, err := opt.Tests.Collect(ctx, func(s proof.Subject) bool {
		open, err := isOpen(ctx, opt, s.Owner)
		failed = errors.Join(failed, err)
		return !open
	})
	for _, test := range removed {
		opt.Log.Info("sandbox of a restore test that is gone removed", "test", test)
	}
	return errors.Join(failed, err)
}

// isOpen reports whether a workflow run is still running, or the run that it was
// reset to. Only the server's own word that it is not makes it false.
func isOpen(ctx context.Context, opt Options, by backup.Owner) (bool, error) {
	if by.Run == "" || by.Namespace != opt.Namespace { // not ours to judge
		return true, nil
	}
	for run := by.Run; ; {
		d, err := opt.Client.DescribeWorkflowExecution(ctx, by.Workflow, run)
		if _, gone := errors.AsType[*serviceerror.NotFound](err); gone {
			return false, nil
		}
		if err != nil {
			return true, err
		}
		if d.GetWorkflowExecutionInfo().GetStatus() == enums.WORKFLOW_EXECUTION_STATUS_RUNNING {
			return true, nil
		}
		if run = d.GetWorkflowExtendedInfo().GetResetRunId(); run == "" {
			return false, nil
		}
	}
}
