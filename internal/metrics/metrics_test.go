package metrics_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"log/slog"
	"math"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/metrics"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/schedule"
)

var update = flag.Bool("update", false, "write docs/METRICS.md")

const page = "../../docs/METRICS.md"

const intro = "# Metrics\n" + `
<!-- Written by "make update" from internal/metrics. Do not edit. -->

` + "With `metrics.listen` in its configuration, `pgkeep worker` serves `/metrics` to Prometheus, for the clusters of its\n" +
	"host. It has no login and no TLS: keep it on loopback, `127.0.0.1:9788`, or where only Prometheus comes.\n" + `
Every series of every configured cluster is there from the start, and none is ever NaN. What is not known, or is not
there, is

* -1 as a count, a size, or an answer that is otherwise 1 or 0,
* 0 as a moment, in seconds since 1970,
* +Inf as an age.

What is stored is listed every 10 minutes; the server, its newest segment and Temporal are asked every 30 seconds. Where
a look at the repository fails, what it last saw stays, and ages go on; what the server or Temporal say is not known then.
` + "`pgkeep_look_success` and `pgkeep_look_age_seconds` tell.\n" + `
Alert rules are in [deploy/prometheus](../deploy/prometheus/pgkeep.rules.yml), a dashboard for Grafana in
[deploy/grafana](../deploy/grafana/pgkeep.json).

| metric | labels besides cluster | what it says |
| --- | --- | --- |
`

const outro = "\nBesides, there are `go_…` and `process_…` of the worker itself, and `temporal_…` as Temporal's\n" +
	"[SDK metrics reference](https://docs.temporal.io/references/sdk-metrics) describes them: counters end in `_total`, times in\n" +
	"`_seconds` with their buckets. Of these, a series begins with its first event.\n"

func TestMetricsPage(t *testing.T) {
	var b strings.Builder
	b.WriteString(intro)
	for _, m := range metrics.Catalogue() {
		label := ""
		if m.Label != "" {
			label = fmt.Sprintf("%s: %s", m.Label, strings.Join(m.Values, ", "))
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", m.Name, label, m.Help)
	}
	b.WriteString(outro)
	if *update {
		if err := os.WriteFile(page, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(b.String(), string(got)); d != "" {
		t.Errorf("docs/METRICS.md is behind the code; run make update (-want +got):\n%s", d)
	}
}

func start(t *testing.T, names ...string) *metrics.Metrics {
	t.Helper()
	var all []*audit.Auditor
	for _, n := range names {
		all = append(all, &audit.Auditor{Name: n})
	}
	m, err := metrics.New(metrics.Options{Clusters: all, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// scrape returns the value of every series, by its name with labels.
func scrape(t *testing.T, m *metrics.Metrics) map[string]float64 {
	t.Helper()
	rec := httptest.NewRecorder()
	m.Handler().ServeHTTP(rec, httptest.NewRequest("GET", "/metrics", nil))
	if rec.Code != 200 {
		t.Fatalf("status %d: %s", rec.Code, rec.Body)
	}
	all := make(map[string]float64)
	for line := range strings.Lines(rec.Body.String()) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		i := strings.LastIndex(line, " ")
		v, err := strconv.ParseFloat(strings.TrimSpace(line[i:]), 64)
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		all[line[:i]] = v
	}
	return all
}

func TestEverySeriesIsThereFromTheStart(t *testing.T) {
	got := scrape(t, start(t, "main", "other"))
	count := 0
	for _, c := range []string{"main", "other"} {
		for _, m := range metrics.Catalogue() {
			series := []string{fmt.Sprintf("%s{cluster=%q}", m.Name, c)}
			if m.Label != "" {
				series = nil
				for _, v := range m.Values {
					series = append(series, fmt.Sprintf("%s{cluster=%q,%s=%q}", m.Name, c, m.Label, v))
				}
			}
			for _, s := range series {
				count++
				want := -1.0
				switch {
				case strings.HasSuffix(m.Name, "_ready_age_seconds"):
				case strings.HasSuffix(m.Name, "_age_seconds"):
					want = math.Inf(1)
				case strings.HasSuffix(m.Name, "_timestamp_seconds"), strings.HasSuffix(m.Name, "_limit_seconds"), m.Name == "pgkeep_schedule_wanted", m.Name == "pgkeep_window_promised_seconds", m.Name == "pgkeep_look_success":
					want = 0
				}
				if v, ok := got[s]; !ok || v != want {
					t.Errorf("%s = %v, %v; want %v", s, v, ok, want)
				}
			}
		}
	}
	for s, v := range got {
		if strings.HasPrefix(s, "pgkeep_") {
			count--
		}
		if math.IsNaN(v) {
			t.Errorf("%s is NaN", s)
		}
	}
	if count != 0 {
		t.Errorf("%d series more in the catalogue than in the scrape", count)
	}
}

// A known state in numbers.
func TestWhatIsKnown(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d).Truncate(time.Millisecond) }
	backup := func(id string, kind repo.Kind, finished time.Time, tests ...health.Test) health.Backup {
		b := health.Backup{Listed: repo.Listed{Manifest: repo.Manifest{Ref: repo.Ref{Cluster: "main", ID: repo.ID(id)}, Kind: kind, FinishedAt: finished}}, Tests: tests}
		if kind == repo.Physical {
			b.Physical = &repo.PhysicalFacts{StoppedAt: finished}
		}
		return b
	}
	test := func(at time.Time, passed bool, rto float64, lag *proof.Lag) health.Test {
		t.Helper()
		report := proof.Report{RTO: rto, Lag: lag}
		text, err := json.Marshal(report)
		if err != nil {
			t.Fatal(err)
		}
		return health.Test{ListedProof: repo.ListedProof{Proof: repo.Proof{Test: "t", FinishedAt: at, Passed: passed, Report: text}}, Report: report}
	}
	damaged := backup("d", "", time.Time{})
	damaged.Err = fail.Corrupt
	unfinished := backup("u", "", time.Time{})
	unfinished.Unfinished = true
	pages := backup("p4", repo.Physical, ago(95*time.Minute), test(ago(92*time.Minute), true, 1, nil))
	pages.Physical.Damaged = 2
	tomorrow := backup("l1", repo.Logical, ago(-24*time.Hour))
	replayed := test(ago(95*time.Minute), true, 1, nil)
	replayed.Report.Reached.LastCommit = ago(100 * time.Minute)
	archive := repo.Archive{Cluster: "main", System: 7, Major: 15}
	s := metrics.State{
		Seen: map[metrics.Source]time.Time{metrics.Repository: ago(5 * time.Minute), metrics.Server: ago(time.Second), metrics.Schedules: ago(time.Hour)},
		Good: map[metrics.Source]bool{metrics.Server: true, metrics.Schedules: true},
		Promise: metrics.Promise{Window: 14 * 24 * time.Hour, Schedules: []string{"physical", "expire"},
			Backups: health.Policy{Age: map[repo.Kind]time.Duration{repo.Physical: 36 * time.Hour}, Proof: 24 * time.Hour}},
		Stored: health.Stored{Cluster: "main",
			Backups: []health.Backup{
				backup("p1", repo.Physical, ago(50*time.Hour), test(ago(49*time.Hour), true, 300, &proof.Lag{Bytes: 4096, Seconds: 2})),
				backup("p2", repo.Physical, ago(30*time.Hour), test(ago(29*time.Hour), true, 400, nil), test(ago(90*time.Minute), false, 500, nil)),
				damaged, unfinished,
				backup("p3", repo.Physical, ago(2*time.Hour), replayed),
				pages, tomorrow,
			},
			Archives: []audit.Report{{
				Ledger:  audit.Ledger{Timelines: []audit.Timeline{{ID: 1, Ranges: []audit.Range{{Bytes: 40}, {Bytes: 2}}}}},
				Holes:   []audit.Hole{{Count: 3}, {Count: 1}},
				Stuck:   []audit.Base{{ID: "p1"}},
				Windows: []audit.Window{{Base: audit.Base{ID: "p1"}, Archived: ago(45 * time.Hour)}, {Base: audit.Base{ID: "p2"}, Archived: ago(time.Minute)}, {Base: audit.Base{ID: "p3"}, Archived: ago(time.Minute)}},
			}},
		},
		Usage:    map[repo.ID]int64{"p1": 100, "p2": 10, "p3": 1, "gone": 5000, "u": 7},
		Newest:   metrics.Segment{Archive: archive, End: 0x3000000, Archived: ago(time.Minute)},
		Archiver: cluster.Archiver{System: 7, Major: 15, LSN: 0x3000500, Now: now, Archiving: true, Waiting: 2, Oldest: now.Add(-90 * time.Second)},
		Schedules: map[string]schedule.Existing{"physical": {Paused: true, Missed: 2, Skipped: 3, Last: ago(2 * time.Hour), Running: make([]schedule.Run, 1)},
			"wal-audit": {Every: time.Hour, Next: now.Truncate(time.Millisecond)}},
		Ended: map[string]schedule.Ended{"physical": {At: ago(3 * time.Hour)}, "wal-audit": {At: ago(time.Hour), Done: true}},
	}
	m := start(t, "main")
	m.Set("main", s)
	got := scrape(t, m)
	seconds := func(t time.Time) float64 { return float64(t.UnixMilli()) / 1e3 }
	const physical = `{cluster="main",kind="physical"}`
	const logical = `{cluster="main",kind="logical"}`
	const main = `{cluster="main"}`
	for series, want := range map[string]float64{
		"pgkeep_backup_last_success_timestamp_seconds" + physical:                 seconds(ago(2 * time.Hour)),
		"pgkeep_backup_age_seconds" + physical:                                    2 * 3600,
		"pgkeep_backup_last_success_timestamp_seconds" + logical:                  0,
		"pgkeep_backup_age_seconds" + logical:                                     math.Inf(1),
		"pgkeep_backups" + physical:                                               2,
		"pgkeep_backups" + logical:                                                0,
		"pgkeep_backups_damaged" + main:                                           1,
		"pgkeep_backups_unusable" + main:                                          1,
		"pgkeep_stored_bytes" + physical:                                          111,
		"pgkeep_stored_bytes" + logical:                                           0,
		`pgkeep_stored_bytes{cluster="main",kind="wal"}`:                          42,
		`pgkeep_stored_bytes{cluster="main",kind="other"}`:                        5007,
		"pgkeep_proven_timestamp_seconds" + physical:                              seconds(ago(100 * time.Minute)),
		"pgkeep_proven_age_seconds" + physical:                                    100 * 60,
		"pgkeep_restore_test_timestamp_seconds" + physical:                        seconds(ago(90 * time.Minute)),
		"pgkeep_restore_test_age_seconds" + physical:                              90 * 60,
		"pgkeep_restore_test_passed" + physical:                                   0,
		"pgkeep_restore_test_passed" + logical:                                    -1,
		"pgkeep_restore_test_rto_seconds" + physical:                              500,
		"pgkeep_restore_test_rpo_seconds" + physical:                              -1,
		"pgkeep_restore_test_rpo_bytes" + physical:                                -1,
		"pgkeep_window_start_timestamp_seconds" + main:                            seconds(ago(30 * time.Hour)),
		"pgkeep_window_end_timestamp_seconds" + main:                              seconds(ago(time.Minute)),
		"pgkeep_window_age_seconds" + main:                                        30 * 3600,
		"pgkeep_window_promised_seconds" + main:                                   14 * 86400,
		"pgkeep_backup_oldest_age_seconds" + physical:                             50 * 3600,
		"pgkeep_wal_holes" + main:                                                 2,
		"pgkeep_wal_missing_files" + main:                                         4,
		"pgkeep_wal_newest_timestamp_seconds" + main:                              seconds(ago(time.Minute)),
		"pgkeep_wal_lag_bytes" + main:                                             0x500,
		"pgkeep_wal_lag_seconds" + main:                                           60,
		"pgkeep_wal_archiving" + main:                                             1,
		"pgkeep_wal_ready_files" + main:                                           2,
		"pgkeep_wal_ready_age_seconds" + main:                                     90,
		"pgkeep_schedule_present" + physical:                                      1,
		"pgkeep_schedule_present" + logical:                                       0,
		"pgkeep_schedule_paused" + physical:                                       1,
		"pgkeep_schedule_paused" + logical:                                        -1,
		"pgkeep_schedule_period_seconds" + physical:                               -1,
		`pgkeep_schedule_period_seconds{cluster="main",kind="wal-audit"}`:         3600,
		"pgkeep_schedule_running" + physical:                                      1,
		"pgkeep_schedule_next_timestamp_seconds" + physical:                       0,
		`pgkeep_schedule_next_timestamp_seconds{cluster="main",kind="wal-audit"}`: seconds(now.Truncate(time.Millisecond)),
		"pgkeep_schedule_last_timestamp_seconds" + physical:                       seconds(ago(2 * time.Hour)),
		"pgkeep_schedule_missed" + physical:                                       2,
		"pgkeep_schedule_skipped" + physical:                                      3,
		"pgkeep_backup_age_limit_seconds" + physical:                              36 * 3600,
		"pgkeep_backup_age_limit_seconds" + logical:                               0,
		"pgkeep_proven_age_limit_seconds" + physical:                              36 * 3600,
		"pgkeep_proven_age_limit_seconds" + logical:                               24 * 3600,
		"pgkeep_backups_page_damage" + main:                                       1,
		"pgkeep_dated_ahead_seconds" + main:                                       24*3600 - 30,
		"pgkeep_schedule_wanted" + physical:                                       1,
		"pgkeep_schedule_wanted" + logical:                                        0,
		"pgkeep_schedule_last_run_passed" + physical:                              0,
		"pgkeep_schedule_last_run_passed" + logical:                               -1,
		`pgkeep_schedule_last_run_passed{cluster="main",kind="wal-audit"}`:        1,
		"pgkeep_schedule_last_run_timestamp_seconds" + physical:                   seconds(ago(3 * time.Hour)),
		`pgkeep_look_success{cluster="main",source="repository"}`:                 0,
		`pgkeep_look_success{cluster="main",source="server"}`:                     1,
		`pgkeep_look_age_seconds{cluster="main",source="repository"}`:             300,
	} {
		if v, ok := got[series]; !ok || v != want && !(v >= want && v < want+30 && strings.Contains(series, "_seconds")) {
			t.Errorf("%s = %v (there: %v), want %v", series, v, ok, want)
		}
	}

	s.Good = nil // nobody answers any more
	m.Set("main", s)
	got = scrape(t, m)
	for series, want := range map[string]float64{
		"pgkeep_backups" + physical:                  2, // as it was seen
		"pgkeep_wal_holes" + main:                    2,
		"pgkeep_wal_ready_files" + main:              -1,
		"pgkeep_wal_lag_bytes" + main:                -1,
		"pgkeep_wal_lag_seconds" + main:              -1,
		"pgkeep_wal_archiving" + main:                -1,
		"pgkeep_schedule_present" + physical:         -1,
		"pgkeep_schedule_paused" + physical:          -1,
		"pgkeep_schedule_missed" + physical:          -1,
		"pgkeep_schedule_last_run_passed" + physical: -1,
	} {
		if v := got[series]; v != want {
			t.Errorf("when nobody answers: %s = %v, want %v", series, v, want)
		}
	}

	s.Good = map[metrics.Source]bool{metrics.Server: true}
	for what, tt := range map[string]struct {
		system     pg.SystemID
		at         pg.LSN
		bytes, sec float64
	}{
		"nothing behind the newest": {7, 0x3000000, 0, 0},
		"an older position":         {7, 0x2000000, 0, 0},
		"another system":            {8, 0x500, 0x500, 60},
	} {
		s.Archiver.System, s.Archiver.LSN = tt.system, tt.at
		m.Set("main", s)
		got = scrape(t, m)
		if b, sec := got["pgkeep_wal_lag_bytes"+main], got["pgkeep_wal_lag_seconds"+main]; b != tt.bytes || sec < tt.sec || sec > tt.sec+30 {
			t.Errorf("%s: %v bytes, %v s", what, b, sec)
		}
	}
}

// The SDK gives a metric different labels at different places.
func TestWhatTemporalMeasures(t *testing.T) {
	m := start(t)
	h := m.Temporal()
	a := h.WithTags(map[string]string{"namespace": "x", "task-queue": "q"})
	a.WithTags(map[string]string{"namespace": "y"}).Counter("temporal_request").Inc(2)
	a.Counter("temporal_request").Inc(1)
	a.Counter("temporal_request").Inc(1)
	h.Counter("temporal_request").Inc(5)
	a.Gauge("temporal_num_pollers").Update(7)
	a.Gauge("temporal_num_pollers").Update(3)
	h.Gauge("temporal_odd").Update(math.NaN())
	for _, d := range []time.Duration{time.Millisecond, 2 * time.Second, 48 * time.Hour} {
		h.Timer("temporal_activity_execution_latency").Record(d)
	}
	got := scrape(t, m)
	const latency = "temporal_activity_execution_latency_seconds"
	for series, want := range map[string]float64{
		`temporal_request_total{namespace="y",task_queue="q"}`: 2,
		`temporal_request_total{namespace="x",task_queue="q"}`: 2,
		"temporal_request_total":                               5,
		`temporal_num_pollers{namespace="x",task_queue="q"}`:   3,
		"temporal_odd":                  -1,
		latency + `_bucket{le="0.005"}`: 1,
		latency + `_bucket{le="5"}`:     2,
		latency + `_bucket{le="86400"}`: 2,
		latency + `_bucket{le="+Inf"}`:  3,
		latency + "_count":              3,
		latency + "_sum":                172802.001,
	} {
		if v, ok := got[series]; !ok || v != want {
			t.Errorf("%s = %v (there: %v), want %v", series, v, ok, want)
		}
	}
}

// What can be scheduled is watched.
func TestEveryKindOfScheduleIsThere(t *testing.T) {
	want := new(config.Kind).UnmarshalText([]byte("?")).Error()
	for _, m := range metrics.Catalogue() {
		if !strings.HasPrefix(m.Name, "pgkeep_schedule_") {
			continue
		}
		if list := strings.Join(m.Values, ", "); !strings.HasSuffix(strings.ReplaceAll(want, " or ", ", "), list) {
			t.Errorf("%s has %s; of a schedule, config says %q", m.Name, list, want)
		}
	}
}

func TestNamesAreGoodNames(t *testing.T) {
	var names []string
	for _, m := range metrics.Catalogue() {
		names = append(names, m.Name)
		if m.Help == "" || !strings.HasSuffix(m.Help, ".") || !strings.HasPrefix(m.Name, "pgkeep_") || strings.HasSuffix(m.Name, "_total") || (m.Label == "") != (len(m.Values) == 0) {
			b, _ := json.Marshal(m)
			t.Errorf("%s", b)
		}
	}
	slices.Sort(names)
	if len(slices.Compact(slices.Clone(names))) != len(names) {
		t.Errorf("one twice: %v", names)
	}
}
