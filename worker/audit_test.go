package worker_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/temporal"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/schedule"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/workflows"
)

// aged is a store in which all WAL is an hour old.
type aged struct{ store.Store }

func (a aged) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		for o, err := range a.Store.List(ctx, prefix, after) {
			if strings.Contains(o.Key, "/wal/") {
				o.Modified = o.Modified.Add(-time.Hour)
			}
			if !yield(o, err) {
				return
			}
		}
	}
}

// An archived rig has a server with ten segments, of which all are archived but
// those left out.
func archived(t *testing.T, command string) (r *rig, segments []string, archive func(names ...string)) {
	t.Helper()
	r = setupWith(t, lab.PostgresOptions{WALSegmentMB: 1, Settings: map[string]string{"archive_mode": "on", "archive_command": command, "wal_keep_size": "500MB"}})
	for i := range 10 {
		if err := r.pg.Exec(t.Context(), "postgres", fmt.Sprintf("CREATE TABLE t%d AS SELECT %d", i, i), "SELECT pg_switch_wal()"); err != nil {
			t.Fatal(err)
		}
	}
	found, err := filepath.Glob(filepath.Join(r.pg.DataDir, "pg_wal/00000001*"))
	if err != nil || len(found) < 10 {
		t.Fatalf("%d segments, %v", len(found), err)
	}
	for _, f := range found[:10] {
		segments = append(segments, filepath.Base(f))
	}
	facts, err := r.logical.Cluster.Facts(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	archiver := r.repo.Archiver(repo.Archive{Cluster: "main", System: facts.System, Major: facts.Version.Major()}, "test")
	return r, segments, func(names ...string) {
		t.Helper()
		for _, name := range names {
			b, err := os.ReadFile(filepath.Join(r.pg.DataDir, "pg_wal", name))
			if err != nil {
				t.Fatal(err)
			}
			n, err := pg.ParseWALName(name)
			if err == nil {
				_, err = archiver.Put(t.Context(), repo.WALFile{Name: n, Size: int64(len(b)), Content: bytes.NewReader(b)})
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
}

func (r *rig) audit(t *testing.T) (run client.WorkflowRun, res workflows.WALAuditResult, err error) {
	t.Helper()
	run, err = r.client.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{ID: "audit", TaskQueue: workflows.Queue,
		TypedSearchAttributes: temporal.NewSearchAttributes(workflows.PgkeepCluster.ValueSet("main")),
	}, workflows.WALAuditName, workflows.WALAuditRequest{Cluster: "main", Host: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	return run, res, run.Get(t.Context(), &res)
}

// failed wants a failure of a kind that says something, with advice.
func failed(t *testing.T, err error, kind fail.Kind, says string) {
	t.Helper()
	var app *temporal.ApplicationError
	if !errors.As(err, &app) || app.Type() != string(kind) || !strings.Contains(app.Message(), says) || !app.NonRetryable() || activities.AdviceOf(err) == "" {
		t.Errorf("%v (advice %q), want %s with %q", err, activities.AdviceOf(err), kind, says)
	}
}

// The next audit of a schedule begins where the last good one ended.
func TestWALAuditOnSchedule(t *testing.T) {
	r, segments, archive := archived(t, "true")
	r.serve(t, time.Second)
	archive(segments[:5]...)
	s := schedule.Schedule{Cluster: "main", Kind: workflows.KindWALAudit, Host: "db1", Cron: "0 0 1 1 *", TimeZone: "UTC", CatchupWindow: time.Minute}
	if err := schedule.Apply(t.Context(), r.client, []schedule.Change{{Action: schedule.Create, ID: s.ID(), Want: s}}); err != nil {
		t.Fatal(err)
	}
	for round, want := range []struct {
		add      []string
		segments int
		kind     fail.Kind
		since    int
	}{
		{nil, 5, "", 0},
		{segments[5:6], 6, "", 1},
		{segments[7:8], 0, fail.WALHole, 0},
		{segments[6:7], 8, "", 2},
	} {
		archive(want.add...)
		started, err := schedule.Trigger(t.Context(), r.client, s.ID())
		if err != nil {
			t.Fatal(err)
		}
		run := r.client.GetWorkflow(t.Context(), started.WorkflowID, started.RunID)
		var res workflows.WALAuditResult
		err = run.Get(t.Context(), &res)
		if want.kind != "" {
			failed(t, err, want.kind, "1 WAL file is missing from the archive: "+segments[6])
			record(t, r.client, run, "wal_audit_hole")
			until(t, "the schedule knows", func() bool {
				have, err := schedule.List(t.Context(), r.client, s.ID())
				return err == nil && len(have) == 1 && len(have[0].Running) == 0
			})
			continue
		}
		if err != nil || len(res.Archives) != 1 || len(res.Archives[0].Timelines) != 1 {
			t.Fatalf("round %d: %+v, %v", round, res, err)
		}
		ranges := res.Archives[0].Timelines[0].Ranges
		if len(ranges) != 1 || ranges[0].Segments(res.Archives[0].SegmentSize) != want.segments || res.SinceAll != want.since || !res.Archiver.Archiving {
			t.Errorf("round %d: %+v", round, res)
		}
		if round == 1 {
			record(t, r.client, run, "wal_audit")
		}
		until(t, "the schedule knows", func() bool {
			have, err := schedule.List(t.Context(), r.client, s.ID())
			return err == nil && len(have) == 1 && len(have[0].Running) == 0
		})
	}
}

// What is missing before a fork and stands in pg_wal comes into the archive.
func TestWALAuditFills(t *testing.T) {
	r, segments, archive := archived(t, "true")
	r.serve(t, time.Second)
	last, err := pg.ParseWALName(segments[8])
	if err != nil {
		t.Fatal(err)
	}
	at, err := last.Start(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	history := ""
	for i, name := range []string{"00000002.history", "00000003.history"} {
		history += fmt.Sprintf("%d\t%v\tas if\n", i+1, at+0x100)
		if err := os.WriteFile(filepath.Join(r.pg.DataDir, "pg_wal", name), []byte(history), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	archive(segments[:3]...)
	archive(segments[4], "00000003.history")
	run, res, err := r.audit(t)
	want := append(append([]string{segments[3]}, segments[5:8]...), "00000002.history")
	if err != nil || !slices.Equal(res.Filled, want) || len(res.Archives[0].Holes) > 0 {
		t.Errorf("%+v, %v; want %v filled", res, err, want)
	}
	record(t, r.client, run, "wal_audit_filled")
}

// A command that ends with a status above 125 is counted nowhere.
func TestWALAuditSeesASilentArchiver(t *testing.T) {
	r, segments, archive := archived(t, "exit 126")
	r.serve(t, time.Second)
	archive(segments...)
	if _, _, err := r.audit(t); err != nil {
		t.Errorf("while nothing waits for long: %v", err)
	}
	waiting, err := filepath.Glob(filepath.Join(r.pg.DataDir, "pg_wal/archive_status/*.ready"))
	if err != nil || len(waiting) == 0 {
		t.Fatalf("%d files wait, %v", len(waiting), err)
	}
	ago := time.Now().Add(-time.Hour)
	for _, f := range waiting {
		if err := os.Chtimes(f, ago, ago); err != nil {
			t.Fatal(err)
		}
	}
	run, _, err := r.audit(t)
	failed(t, err, fail.NotArchiving, "PostgreSQL counts neither success nor failure")
	record(t, r.client, run, "wal_audit_not_archiving")
}

// That PostgreSQL is down says nothing of what is archived, and hides nothing.
func TestWALAuditTellsOfAHoleWhilePostgreSQLIsDown(t *testing.T) {
	r, segments, archive := archived(t, "true")
	r.serve(t, time.Second)
	archive(segments[:3]...)
	r.pg.Kill()
	_, _, err := r.audit(t)
	if app, ok := errors.AsType[*temporal.ApplicationError](err); !ok || app.Type() != string(fail.PGDown) {
		t.Errorf("%v, want %v", err, fail.PGDown)
	}
	archive(segments[4])
	_, _, err = r.audit(t)
	failed(t, err, fail.WALHole, segments[3])
}
