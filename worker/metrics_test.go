package worker_test

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/log"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/metrics"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/schedule"
	"github.com/pgkeep/pgkeep/workflows"
)

var scrapes = flag.String("scrapes", "", "write what a worker tells Prometheus into `DIR`: ../deploy/prometheus/testdata")

// told waits until a worker tells Prometheus all of these lines, and compares the
// series with those of a recording, which the alert rules are tested with.
func told(t *testing.T, url, recording string, lines ...string) (text string) {
	t.Helper()
	until(t, fmt.Sprintf("a scrape has %q", lines), func() bool {
		rsp, err := http.Get(url + "/metrics")
		if err != nil {
			t.Fatal(err)
		}
		defer rsp.Body.Close()
		b, err := io.ReadAll(rsp.Body)
		if err != nil || rsp.StatusCode != http.StatusOK {
			t.Fatalf("%s, %v: %s", rsp.Status, err, b)
		}
		text = string(b)
		return !slices.ContainsFunc(lines, func(l string) bool { return !strings.Contains(text, "\n"+l+"\n") })
	})
	if *scrapes != "" {
		short := regexp.MustCompile(`(?m)^.*_bucket\{.*\n`).ReplaceAllString(text, "")
		if err := os.WriteFile(filepath.Join(*scrapes, recording+".prom"), []byte(short), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	recorded, err := os.ReadFile(filepath.Join("../deploy/prometheus/testdata", recording+".prom"))
	if err != nil {
		t.Fatal(err)
	}
	ours := regexp.MustCompile(`(?m)^pgkeep_.* `)
	if got, want := ours.FindAllString(text, -1), ours.FindAllString(string(recorded), -1); !slices.Equal(got, want) {
		t.Errorf("%s was recorded by another pgkeep: go test ./worker -run Metrics -args -scrapes ../deploy/prometheus/testdata\ngot  %q\nwant %q", recording, got, want)
	}
	return text
}

// A worker is scraped before it has seen anything, when all is well, and with a
// hole, a failed test, a paused schedule, and PostgreSQL gone.
func TestMetricsOfAWorker(t *testing.T) {
	ctx := t.Context()
	r, segments, archive := archived(t, "true")
	m, err := metrics.New(metrics.Options{Clusters: []*audit.Auditor{{Name: "main", Cluster: r.logical.Cluster, Open: r.logical.Open}},
		Promises: map[string]metrics.Promise{"main": {Backups: health.Policy{Age: map[repo.Kind]time.Duration{repo.Logical: 36 * time.Hour}, Proof: 7 * 24 * time.Hour},
			Schedules: []string{workflows.Logical, workflows.KindWALAudit}}},
		Log: r.logical.Log, Rarely: 500 * time.Millisecond, Often: 200 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	early := httptest.NewServer(m.Handler())
	told(t, early.URL, "first", `pgkeep_backup_age_seconds{cluster="main",kind="logical"} +Inf`, `pgkeep_wal_holes{cluster="main"} -1`)
	early.Close()

	r.client.Close()
	r.client, err = client.Dial(client.Options{HostPort: r.temporal.Address, Namespace: r.temporal.Namespace, Identity: "test",
		Logger: log.NewStructuredLogger(r.logical.Log), MetricsHandler: m.Temporal()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.client.Close)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serving, stop := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- m.Serve(serving, l) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	url := "http://" + l.Addr().String()
	r.serve(t, time.Second)
	m.Connected(r.client)

	var plan []schedule.Change
	for _, kind := range []string{workflows.Logical, workflows.KindWALAudit} {
		s := schedule.Schedule{Cluster: "main", Kind: kind, Host: "db1", Cron: "0 0 1 1 *", TimeZone: "UTC", CatchupWindow: time.Minute}
		plan = append(plan, schedule.Change{Action: schedule.Create, ID: s.ID(), Want: s})
	}
	if err := schedule.Apply(ctx, r.client, plan); err != nil {
		t.Fatal(err)
	}
	archive(segments[:3]...)
	if err := r.start(t).Get(ctx, nil); err != nil {
		t.Fatal(err)
	}
	backup := r.backups(t)[0]
	test := func(id repo.ID, passed bool) {
		t.Helper()
		report, err := json.Marshal(proof.Report{RTO: 12.5, Lag: &proof.Lag{Bytes: 4096, Seconds: 1.5}})
		if err == nil {
			err = r.repo.WriteProof(ctx, repo.Proof{Ref: backup.Ref, Test: id, FinishedAt: time.Now(), Passed: passed, Report: report})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	test("20261123T010000Z-00000001", true)
	text := told(t, url, "sound",
		`pgkeep_backups{cluster="main",kind="logical"} 1`,
		`pgkeep_restore_test_passed{cluster="main",kind="logical"} 1`,
		`pgkeep_restore_test_rto_seconds{cluster="main",kind="logical"} 12.5`,
		`pgkeep_restore_test_rpo_seconds{cluster="main",kind="logical"} 1.5`,
		`pgkeep_restore_test_rpo_bytes{cluster="main",kind="logical"} 4096`,
		`pgkeep_wal_holes{cluster="main"} 0`,
		`pgkeep_wal_archiving{cluster="main"} 1`,
		`pgkeep_wal_ready_files{cluster="main"} 0`,
		`pgkeep_schedule_present{cluster="main",kind="logical"} 1`,
		`pgkeep_schedule_present{cluster="main",kind="physical"} 0`,
		`pgkeep_schedule_paused{cluster="main",kind="logical"} 0`,
		`pgkeep_look_success{cluster="main",source="repository"} 1`)
	lint := exec.CommandContext(ctx, "promtool", "check", "metrics")
	lint.Stdin = strings.NewReader(text)
	if out, err := lint.CombinedOutput(); err != nil || len(out) > 0 {
		t.Errorf("promtool check metrics: %v: %s", err, out)
	}
	lag := regexp.MustCompile(`(?m)^pgkeep_wal_lag_bytes.* (.*)$`).FindStringSubmatch(text)
	if len(lag) != 2 || lag[1] == "0" || strings.HasPrefix(lag[1], "-") { // seven segments
		t.Errorf("the log is behind by %q", lag)
	}
	for _, file := range []string{"prometheus/pgkeep.rules.yml", "grafana/pgkeep.json"} {
		b, err := os.ReadFile(filepath.Join("../deploy", file))
		if err != nil {
			t.Fatal(err)
		}
		names := regexp.MustCompile(`\b(pgkeep|temporal|go|process)_[a-z0-9_]+`).FindAllString(string(b), -1)
		for _, name := range names {
			if !regexp.MustCompile(`(?m)^` + name + `[{ ]`).MatchString(text) {
				t.Errorf("%s names %s, which is not in a scrape", file, name)
			}
		}
		if len(names) < 10 {
			t.Errorf("%s names %q", file, names)
		}
	}

	archive(segments[3]) // the next look at the server sees it
	newest := regexp.MustCompile(`(?m)^pgkeep_wal_lag_bytes.* (.*)$`)
	until(t, "the archive has come nearer", func() bool {
		return newest.FindString(told(t, url, "sound")) != newest.FindString(text)
	})
	archive(segments[5])
	test("20261123T020000Z-00000002", false)
	if err := schedule.Pause(ctx, r.client, plan[0].ID, "a test"); err != nil {
		t.Fatal(err)
	}
	if _, err := schedule.Trigger(ctx, r.client, plan[1].ID); err != nil {
		t.Fatal(err)
	}
	told(t, url, "faulty", `pgkeep_schedule_last_run_passed{cluster="main",kind="wal-audit"} 0`)
	r.pg.Kill()
	told(t, url, "faulty",
		`pgkeep_schedule_last_run_passed{cluster="main",kind="wal-audit"} 0`,
		`pgkeep_schedule_last_run_passed{cluster="main",kind="logical"} -1`,
		`pgkeep_wal_holes{cluster="main"} 1`,
		`pgkeep_wal_missing_files{cluster="main"} 1`,
		`pgkeep_restore_test_passed{cluster="main",kind="logical"} 0`,
		`pgkeep_schedule_paused{cluster="main",kind="logical"} 1`,
		`pgkeep_look_success{cluster="main",source="server"} 0`,
		`pgkeep_wal_lag_bytes{cluster="main"} -1`)
}
