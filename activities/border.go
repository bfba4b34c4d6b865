// Package activities is the border between Temporal and the work. An activity
// unpacks a request, calls one internal package, reports progress, and
// translates the error. It holds no decision of its own.
package activities

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/temporal"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// Progress is the detail of a heartbeat: what a person wants to know. It is a
// hint only; what is done stands in the spool and in the repository.
type Progress struct {
	Stage string `json:"stage"`
	Done  int64  `json:"done"`  // bytes
	Total int64  `json:"total"` // bytes; 0: not known
}

// A moved function says that the work moved on.
type moved func(Progress)

// watched runs work with a context that ends when the workflow is cancelled, and
// some time after the worker is told to stop: what is nearly done gets done.
// Heartbeats go out while work moves; after quiet without a call of moved they
// cease, so that the server takes a hanging attempt for dead, and the context
// ends, so that what it holds is free for the next.
//
// A server that is away has not cancelled anything. The SDK ends ctx all the same
// when it has not come through with a heartbeat for some seconds; from then on
// watched asks by itself, and work goes on unless it hears that nobody wants it.
func watched(ctx context.Context, stage string, grace, quiet time.Duration, work func(context.Context, moved) error) error {
	free := context.WithoutCancel(ctx)
	if deadline, ok := ctx.Deadline(); ok {
		var stop context.CancelFunc
		free, stop = context.WithDeadline(free, deadline)
		defer stop()
	}
	wctx, cancel := context.WithCancelCause(free)
	defer cancel(nil)
	var last atomic.Pointer[Progress]
	var at atomic.Int64 // of the last move, as Unix time in nanoseconds
	note := func(p Progress) {
		p.Stage = cmp.Or(p.Stage, stage)
		last.Store(&p)
		at.Store(time.Now().UnixNano())
	}
	note(Progress{})
	activity.RecordHeartbeat(ctx, *last.Load())

	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(2 * time.Second)
		defer tick.Stop()
		stopping := activity.GetWorkerStopChannel(ctx)
		var enough <-chan time.Time
		ended, alone := ctx.Done(), false
		asked, asking := make(chan error, 1), false
		actx, stop := context.WithCancel(free)
		defer stop()
		for {
			select {
			case <-done:
				return
			case <-ended:
				ended = nil
				cause := context.Cause(ctx)
				if alone = stopping != nil && ctx.Err() == context.Canceled && cause != context.Canceled && !unwanted(cause); !alone {
					cancel(cause)
				}
			case <-tick.C:
				switch {
				case time.Since(time.Unix(0, at.Load())) >= quiet:
					cancel(errQuiet)
				case !alone:
					activity.RecordHeartbeat(ctx, *last.Load())
				case !asking:
					asking = true
					wg.Go(func() { asked <- ask(actx, *last.Load()) })
				}
			case err := <-asked:
				if asking = false; unwanted(err) {
					cancel(err)
				}
			case <-stopping:
				stopping, enough = nil, time.After(grace)
			case <-enough:
				enough = nil
				cancel(errStopping)
			}
		}
	})
	err := work(wctx, note)
	close(done)
	wg.Wait()
	if err != nil && errors.Is(context.Cause(wctx), errStopping) {
		// The worker sends what it has of heartbeats while this returns; give
		// it the newest, and time to send it.
		activity.RecordHeartbeat(ctx, *last.Load())
		select {
		case <-time.After(250 * time.Millisecond):
		case <-ctx.Done():
		}
		return temporal.NewApplicationErrorWithOptions("the worker was told to stop", string(fail.Stopping), temporal.ApplicationErrorOptions{
			NextRetryDelay: time.Second, Category: temporal.ApplicationErrorCategoryBenign})
	}
	if err != nil && errors.Is(context.Cause(wctx), errQuiet) {
		err = fail.With(fail.Stalled, fmt.Errorf("%s: %w for %v: %w", stage, errQuiet, quiet, err))
	}
	return translate(wctx, err, fail.DumpFailed, fail.Stalled, fail.Unknown)
}

// ask sends a heartbeat and returns what the server says to it.
func ask(ctx context.Context, p Progress) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	return activity.GetClient(ctx).RecordActivityHeartbeat(ctx, activity.GetInfo(ctx).TaskToken, p)
}

// unwanted reports whether the server has said that the attempt is to end, or that
// it knows of none.
func unwanted(err error) bool {
	if _, unknown := errors.AsType[*serviceerror.NotFound](err); unknown {
		return true
	}
	if _, unknown := errors.AsType[*serviceerror.NamespaceNotFound](err); unknown {
		return true
	}
	if _, passive := errors.AsType[*serviceerror.NamespaceNotActive](err); passive {
		return true
	}
	return temporal.IsCanceledError(err) || errors.Is(err, activity.ErrActivityPaused) || errors.Is(err, activity.ErrActivityReset)
}

var (
	errStopping = errors.New("the worker was told to stop")
	errQuiet    = errors.New("nothing moved")
)

// maxFailures is how often long work may fail by itself before the backup does:
// PostgreSQL's programs, and what nobody knows, as a sector of the disk that cannot
// be read. To try that for weeks would read all of a cluster each time, keep the
// next backup waiting, and tell nobody. Attempts that end because a worker does
// count, too.
const maxFailures = 5

// border translates err for Temporal: its kind decides whether to retry, and
// travels as the type of the application error, its hint as the details. The
// causes stay here: they would stand in the history once more, each.
func border(ctx context.Context, err error) error {
	return translate(ctx, err, fail.DumpFailed, fail.Stalled)
}

// translate is border; the kinds it is given may fail maxFailures times.
func translate(ctx context.Context, err error, bounded ...fail.Kind) error {
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil && ctx.Err() != nil {
		if temporal.IsCanceledError(cause) || errors.Is(cause, activity.ErrActivityPaused) || errors.Is(cause, activity.ErrActivityReset) {
			return cause
		}
	}
	kind := fail.KindOf(err)
	final := !kind.Retry() || slices.Contains(bounded, kind) && activity.GetInfo(ctx).Attempt >= maxFailures
	text := err.Error()
	if len(text) > 2000 { // the server cuts failures off at 4 KiB
		text = text[:2000] + "…"
	}
	text = strings.ToValidUTF8(text, "?") // what is not UTF-8 would never be sent
	opt := temporal.ApplicationErrorOptions{NonRetryable: final}
	if hint := fail.HintOf(err); hint != "" {
		opt.Details = []any{Advice{hint}}
	}
	return temporal.NewApplicationErrorWithOptions(text, string(kind), opt)
}

// Advice is the detail of a failure: what to do about it.
type Advice struct {
	Hint string `json:"hint"`
}

// AdviceOf returns the advice that travelled with a failure, or "".
func AdviceOf(err error) string {
	var app *temporal.ApplicationError
	var a Advice
	if errors.As(err, &app) && app.HasDetails() && app.Details(&a) == nil {
		return a.Hint
	}
	return ""
}
