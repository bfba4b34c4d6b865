package worker_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"filippo.io/age"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/log"
	"go.temporal.io/sdk/temporal"
	sdk "go.temporal.io/sdk/worker"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/notify"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/worker"
	"github.com/pgkeep/pgkeep/workflows"
)

// With PGKEEP_TEST_STICKY_CACHE=0 every workflow task replays its workflow from
// the beginning: what is not deterministic then fails.
func TestMain(m *testing.M) {
	if os.Getenv("PGKEEP_TEST_STICKY_CACHE") == "0" {
		sdk.SetStickyWorkflowCacheSize(0)
	}
	os.Exit(m.Run())
}

// A rig is a PostgreSQL with some data, a Temporal, a repository, and a worker
// in this process that serves them.
type rig struct {
	pg       *lab.Postgres
	temporal *lab.Temporal
	client   client.Client
	logical  *backup.Logical
	repo     *repo.Repo
	notifier *notify.Notifier
}

func setup(t *testing.T) *rig {
	t.Helper()
	return setupWith(t, lab.PostgresOptions{})
}

func setupWith(t *testing.T, opt lab.PostgresOptions) *rig {
	t.Helper()
	ctx := t.Context()
	r := &rig{pg: lab.PostgresForTest(t, opt), temporal: lab.TemporalForTest(t)}
	err := r.pg.Exec(ctx, "postgres", "CREATE DATABASE app")
	if err == nil {
		err = r.pg.Exec(ctx, "app", "CREATE TABLE t AS SELECT i, md5(i::text) AS m FROM generate_series(1, 20000) i")
	}
	if err != nil {
		t.Fatal(err)
	}
	quiet := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	r.client, err = client.Dial(client.Options{HostPort: r.temporal.Address, Namespace: r.temporal.Namespace, Identity: "test", Logger: log.NewStructuredLogger(quiet)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.client.Close)

	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	operator, _ := age.GenerateX25519Identity()
	a := repo.Access{Encrypted: true, Signer: signer, Identities: []age.Identity{operator}, Version: "test"}
	a.Metadata, _ = age.GenerateX25519Identity()
	st := aged{new(store.Mem)}
	if r.repo, _, err = repo.Init(ctx, st, a, []string{operator.Recipient().String()}, time.Now()); err != nil {
		t.Fatal(err)
	}
	r.logical = &backup.Logical{Name: "main", Host: "db1", Cluster: cluster.Cluster{Conninfo: r.pg.Conninfo()}, Spool: t.TempDir(), Log: quiet, Jobs: 2,
		Open: func(context.Context) (*repo.Repo, error) { return r.repo, nil }}
	return r
}

// serve runs a worker until the test ends or the returned function is called.
func (r *rig) serve(t *testing.T, grace time.Duration) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan error, 1)
	go func() {
		done <- worker.Run(ctx, worker.Options{Client: r.client, Namespace: r.temporal.Namespace, Host: "db1", Logical: []*backup.Logical{r.logical}, Audits: []*audit.Auditor{{Name: "main", Cluster: r.logical.Cluster, Open: r.logical.Open}}, Notifier: r.notifier, Log: r.logical.Log, Grace: grace})
	}()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("worker: %v", err)
		}
	}
	t.Cleanup(stop)
	return stop
}

func (r *rig) start(t *testing.T) client.WorkflowRun {
	t.Helper()
	run, err := r.client.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{
		ID: workflows.BackupWorkflowID("main", workflows.Logical), TaskQueue: workflows.Queue, WorkflowExecutionErrorWhenAlreadyStarted: true,
		TypedSearchAttributes: temporal.NewSearchAttributes(workflows.PgkeepCluster.ValueSet("main"), workflows.PgkeepKind.ValueSet(workflows.Logical)),
	}, workflows.LogicalBackupName, workflows.LogicalBackupRequest{Cluster: "main", Host: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	return run
}

func (r *rig) backups(t *testing.T) []repo.Listed {
	t.Helper()
	all, err := r.repo.Backups(t.Context(), "main")
	if err != nil {
		t.Fatal(err)
	}
	var finished []repo.Listed
	for _, b := range all {
		if !b.Unfinished {
			finished = append(finished, b)
		}
	}
	return finished
}

func (r *rig) spool(t *testing.T) []string {
	t.Helper()
	left, err := filepath.Glob(filepath.Join(r.logical.Spool, "main", "*"))
	if err != nil {
		t.Fatal(err)
	}
	return left
}

func TestLogicalBackup(t *testing.T) {
	r := setup(t)
	r.serve(t, time.Second)
	run := r.start(t)
	var res workflows.LogicalBackupResult
	if err := run.Get(t.Context(), &res); err != nil {
		t.Fatal(err)
	}
	if got := r.backups(t); len(got) != 1 || string(got[0].ID) != res.ID || got[0].Verified != repo.VerifiedContent {
		t.Errorf("backups = %+v", got)
	}
	if left := r.spool(t); len(left) > 0 {
		t.Errorf("spool still holds %v", left)
	}
	if res.Databases != 2 || res.Bytes == 0 || res.Stored == 0 || res.LSN.LSN.Timeline != 1 || res.LSN.LSN.Before > res.LSN.LSN.After {
		t.Errorf("result = %+v", res)
	}
	record(t, r.client, run, "logical_backup")
}

// hold takes a table away from pg_dump until the returned function is called.
func (r *rig) hold(t *testing.T) (release func()) {
	t.Helper()
	conn, err := r.pg.Connect(t.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Exec(t.Context(), "BEGIN; LOCK TABLE t"); err != nil {
		t.Fatal(err)
	}
	closed := false
	release = func() {
		if !closed {
			closed = true
			conn.Close(context.WithoutCancel(t.Context()))
		}
	}
	t.Cleanup(release)
	return release
}

// until waits for a condition.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute for: %s", what)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		}
	}
}

// waiting reports whether a pg_dump waits for the table.
func (r *rig) waiting(t *testing.T) bool {
	t.Helper()
	conn, err := r.pg.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var n int
	err = conn.QueryRow(t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE datname = 'app' AND wait_event_type = 'Lock'").Scan(&n)
	if err != nil {
		t.Fatal(err)
	}
	return n > 0
}

func TestCancelLeavesNothing(t *testing.T) {
	r := setup(t)
	r.serve(t, time.Second)
	r.hold(t)
	run := r.start(t)
	until(t, "pg_dump waits", func() bool { return r.waiting(t) })
	if err := r.client.CancelWorkflow(t.Context(), run.GetID(), run.GetRunID()); err != nil {
		t.Fatal(err)
	}
	if err := run.Get(t.Context(), nil); !temporal.IsCanceledError(err) {
		t.Errorf("err = %v, want a cancellation", err)
	}
	if r.waiting(t) {
		t.Error("pg_dump is still there")
	}
	if got := r.backups(t); len(got) != 0 {
		t.Errorf("backups = %+v", got)
	}
	if left := r.spool(t); len(left) > 0 {
		t.Errorf("spool still holds %v", left)
	}
	record(t, r.client, run, "logical_backup_cancelled")
}

// A terminated workflow runs no code. The program it had running ends, and the
// next worker clears the spool.
func TestTerminateLeavesNothingForLong(t *testing.T) {
	r := setup(t)
	stop := r.serve(t, time.Second)
	r.hold(t)
	run := r.start(t)
	until(t, "pg_dump waits", func() bool { return r.waiting(t) })
	if err := r.client.TerminateWorkflow(t.Context(), run.GetID(), run.GetRunID(), "test"); err != nil {
		t.Fatal(err)
	}
	until(t, "pg_dump ends", func() bool { return !r.waiting(t) })
	stop()
	r.serve(t, time.Second)
	until(t, "the spool is cleared", func() bool { return len(r.spool(t)) == 0 })
	if got := r.backups(t); len(got) != 0 {
		t.Errorf("backups = %+v", got)
	}
}

// A worker that is told to stop gives the dump up when its grace is over, and
// the next one takes it up at once, not after a heartbeat timeout.
func TestRestartOfTheWorker(t *testing.T) {
	r := setup(t)
	stop := r.serve(t, 100*time.Millisecond)
	release := r.hold(t)
	run := r.start(t)
	until(t, "pg_dump waits", func() bool { return r.waiting(t) })
	stop()
	if r.waiting(t) {
		t.Error("pg_dump outlived the worker")
	}
	release()
	began := time.Now()
	r.serve(t, time.Second)
	if err := run.Get(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("took %v: the next worker waited for a timeout", took)
	}
	record(t, r.client, run, "logical_backup_worker_restarted")
}

func TestTwoStartsForOneCluster(t *testing.T) {
	r := setup(t)
	r.serve(t, time.Second)
	release := r.hold(t)
	run := r.start(t)
	until(t, "pg_dump waits", func() bool { return r.waiting(t) })
	scheduled := func() client.WorkflowRun {
		run, err := r.client.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{ID: "pgkeep/main/logical/scheduled", TaskQueue: workflows.Queue},
			workflows.ScheduledName, workflows.ScheduledRequest{Cluster: "main", Kind: workflows.Logical, Host: "db1"})
		if err != nil {
			t.Fatal(err)
		}
		return run
	}
	second := scheduled()
	if err := second.Get(t.Context(), nil); fail.KindOf(err) != fail.AlreadyRunning || activities.AdviceOf(err) == "" {
		t.Errorf("second start: err = %v, want already-running with advice", err)
	}
	record(t, r.client, second, "scheduled_already_running")
	_, err := r.client.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{ID: run.GetID(), TaskQueue: workflows.Queue, WorkflowExecutionErrorWhenAlreadyStarted: true},
		workflows.LogicalBackupName, workflows.LogicalBackupRequest{Cluster: "main", Host: "db1"})
	if !temporal.IsWorkflowExecutionAlreadyStartedError(err) {
		t.Errorf("third start: err = %v, want already started", err)
	}
	release()
	if err := run.Get(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	third := scheduled()
	if err := third.Get(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	record(t, r.client, third, "scheduled")
	if got := r.backups(t); len(got) != 2 {
		t.Errorf("backups = %+v", got)
	}
}

// A refusal fails the run in seconds, with its kind and what to do.
func TestRefusalInPreflight(t *testing.T) {
	r := setup(t)
	r.logical.Databases = []string{"nope"}
	r.serve(t, time.Second)
	run := r.start(t)
	err := run.Get(t.Context(), nil)
	if fail.KindOf(err) != fail.BadConfig || activities.AdviceOf(err) == "" {
		t.Errorf("err = %v (kind %q, advice %q)", err, fail.KindOf(err), activities.AdviceOf(err))
	}
	var act *temporal.ActivityError
	if !errors.As(err, &act) || act.ActivityType().GetName() != "Preflight" {
		t.Errorf("err = %v, want one of Preflight", err)
	}
	record(t, r.client, run, "logical_backup_refused")
}
