package worker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"slices"
	"testing"
	"time"

	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/log"

	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
	"github.com/pgkeep/pgkeep/internal/schedule"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/worker"
	"github.com/pgkeep/pgkeep/workflows"
)

// A schedule lets go of what retention does not keep, and fails rather than let
// much go at once, or anything where something cannot be read.
func TestExpireOnSchedule(t *testing.T) {
	ctx := t.Context()
	temporal := lab.TemporalForTest(t)
	quiet := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	c, err := client.Dial(client.Options{HostPort: temporal.Address, Namespace: temporal.Namespace, Identity: "test", Logger: log.NewStructuredLogger(quiet)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	st := new(store.Mem)
	now := time.Now()
	r, _, err := repo.Init(ctx, st, repo.Access{Signer: signer, Version: "test"}, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	take := func(n int) repo.ID {
		t.Helper()
		at := now.Add(time.Duration(n-8)*24*time.Hour - time.Hour)
		ref := repo.Ref{Cluster: "main", ID: repo.NewID(at, fmt.Sprintf("%08x", n))}
		_, err := r.WriteIntent(ctx, repo.Intent{Ref: ref, Kind: repo.Logical, StartedAt: at}, time.Now)
		if err == nil {
			_, err = r.Write(ctx, repo.Writing{Ref: ref, Root: root}, nil)
		}
		if err == nil {
			_, err = r.Publish(ctx, repo.Manifest{Ref: ref, Kind: repo.Logical, StartedAt: at, FinishedAt: at.Add(time.Minute)})
		}
		if err != nil {
			t.Fatal(err)
		}
		return ref.ID
	}
	var ids []repo.ID
	for n := range 4 {
		ids = append(ids, take(n+5))
	}
	served, stop := context.WithCancel(context.WithoutCancel(ctx))
	done := make(chan error, 1)
	x := &expire.Expirer{Name: "main", Policy: retention.Policy{Daily: 2, Min: 1, Grace: time.Hour}, Open: func(context.Context) (*repo.Repo, error) { return r, nil }}
	go func() {
		done <- worker.Run(served, worker.Options{Client: c, Namespace: temporal.Namespace, Host: "store1", Expirers: []*expire.Expirer{x}, Log: quiet, Grace: time.Second})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	s := schedule.Schedule{Cluster: "main", Kind: workflows.KindExpire, Host: "store1", Cron: "0 0 1 1 *", TimeZone: "UTC", CatchupWindow: time.Minute}
	if err := schedule.Apply(ctx, c, []schedule.Change{{Action: schedule.Create, ID: s.ID(), Want: s}}); err != nil {
		t.Fatal(err)
	}
	trigger := func() (run client.WorkflowRun, res workflows.ExpireResult, err error) {
		t.Helper()
		started, err := schedule.Trigger(ctx, c, s.ID())
		if err != nil {
			t.Fatal(err)
		}
		run = c.GetWorkflow(ctx, started.WorkflowID, started.RunID)
		err = run.Get(ctx, &res)
		until(t, "the schedule knows", func() bool {
			have, err := schedule.List(ctx, c, s.ID())
			return err == nil && len(have) == 1 && len(have[0].Running) == 0
		})
		return run, res, err
	}

	run, res, err := trigger()
	if err != nil || !slices.Equal(res.Done.Marked, ids[:2]) || len(res.Plan.Backups) != 4 {
		t.Fatalf("%+v, %v; want %v let go", res, err, ids[:2])
	}
	record(t, c, run, "expire")
	if err := r.Undelete(ctx, repo.Ref{Cluster: "main", ID: ids[0]}); err != nil {
		t.Error(err)
	}

	for n := range 4 { // five would go now, of seven
		ids = append(ids, take(n))
	}
	run, _, err = trigger()
	failed(t, err, fail.ExpireRefused, "5 of 7 backups would go at once")
	record(t, c, run, "expire_refused")
	if list, err := r.Backups(ctx, "main"); err != nil || len(list) != 7 {
		t.Errorf("%d backups are listed, %v, want all", len(list), err)
	}

	rc, err := st.Get(ctx, "clusters/main/backups/"+string(ids[3])+"/manifest.json", store.Range{})
	if err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(rc)
	if err = errors.Join(err, rc.Close()); err != nil {
		t.Fatal(err)
	}
	b[10] ^= 1
	if err := st.Put(ctx, "clusters/main/backups/"+string(ids[3])+"/manifest.json", bytes.NewReader(b), store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	_, _, err = trigger()
	failed(t, err, fail.ExpireRefused, "cannot be read")
}
