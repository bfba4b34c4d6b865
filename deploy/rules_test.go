package deploy

import (
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"
)

const rules = "prometheus/pgkeep.rules.yml"

// A scrape is the value of each series, in Prometheus' words.
type scrape map[string]string

// recorded is what a worker told once, of what the rules ask for: see
// TestMetricsOfAWorker.
func recorded(t *testing.T, name string) scrape {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("prometheus/testdata", name+".prom"))
	if err != nil {
		t.Fatal(err)
	}
	asked, err := os.ReadFile(rules)
	if err != nil {
		t.Fatal(err)
	}
	names := regexp.MustCompile(`\b(pgkeep|temporal)_[a-z0-9_]+`).FindAllString(string(asked), -1)
	s := scrape{"up{}": "1"}
	for line := range strings.Lines(string(text)) {
		name, _, _ := strings.Cut(line, "{")
		if series, value, ok := strings.Cut(strings.TrimSpace(line), "} "); ok && slices.Contains(names, name) {
			s[series+"}"] = value
		}
	}
	if len(s) < 30 {
		t.Fatalf("%s holds %d series", name, len(s))
	}
	return s
}

// with is s with other values. "a b" is a for the first half of a day, and then
// b; "a x b" has one x between them. A series that is not recorded is an error: no rule would wait for it.
func (s scrape) with(t *testing.T, other scrape) scrape {
	t.Helper()
	s = maps.Clone(s)
	for series, value := range other {
		if _, ok := s[series]; !ok {
			t.Errorf("no worker tells %s", series)
		}
		s[series] = value
	}
	return s
}

// input is s as promtool takes it: for 26 hours, every quarter of one.
func (s scrape) input() (all []map[string]string) {
	const samples = 26 * 4
	for series, value := range s {
		turns := strings.Fields(strings.ReplaceAll(value, "+", ""))
		first, last, between := turns[0], turns[len(turns)-1], ""
		if len(turns) == 3 {
			between = turns[1] + " "
		}
		name, labels, _ := strings.Cut(strings.TrimSuffix(series, "}"), "{")
		if labels != "" {
			labels += ","
		}
		values := strings.Repeat(first+" ", samples/2) + between + strings.Repeat(last+" ", samples/2)
		all = append(all, map[string]string{"series": fmt.Sprintf("%s{%sjob=\"pgkeep\",instance=\"db1:9788\"}", name, labels), "values": values})
	}
	return all
}

// Of what was recorded, and of everything that can go wrong beside it, exactly
// the right alerts are raised.
func TestAlertRules(t *testing.T) {
	const main = `{cluster="main"}`
	kind := func(k string) string { return `{cluster="main",kind="` + k + `"}` }
	first, sound, faulty := recorded(t, "first"), recorded(t, "sound"), recorded(t, "faulty")
	down := sound.with(t, scrape{"up{}": "0"})
	deaf := maps.Clone(sound)
	for series := range sound {
		if strings.HasPrefix(series, "temporal_num_pollers") {
			deaf[series] = "0"
		}
	}
	aged := func(age string) scrape {
		return scrape{"pgkeep_backup_age_limit_seconds" + kind("logical"): "129600", "pgkeep_backup_age_seconds" + kind("logical"): age}
	}
	noSchedules, noTemporal := scrape{}, scrape{}
	for series := range sound {
		if strings.HasPrefix(series, "pgkeep_schedule_present") {
			noSchedules[series], noTemporal[series] = "0", "-1"
		}
	}
	promised := scrape{"pgkeep_window_promised_seconds" + main: "1209600", "pgkeep_window_age_seconds" + main: "86400", "pgkeep_backup_oldest_age_seconds" + kind("physical"): "86400"}
	cases := []struct {
		what string
		told scrape
		want []string // alerts, with what tells them apart
	}{
		{"all is well", sound, nil},
		{"before anything was seen", first, []string{"PgkeepBlind main repository", "PgkeepBlind main schedules", "PgkeepBlind main server", "PgkeepNoRecentBackup main logical"}},
		{"a hole, a failed test, a paused schedule, PostgreSQL gone", faulty, []string{"PgkeepRestoreTestFailed main logical", "PgkeepScheduleFailing main wal-audit", "PgkeepSchedulePaused main logical", "PgkeepUnproven main logical", "PgkeepWALHole main"}},
		{"nobody is there", scrape{"up{}": "0"}, []string{"PgkeepAbsent", "PgkeepWorkerDown"}},
		{"a worker is down", down, []string{"PgkeepWorkerDown"}},
		{"a source is silent", sound.with(t, scrape{`pgkeep_look_age_seconds{cluster="main",source="repository"}`: "1801"}), []string{"PgkeepBlind main repository"}},
		{"a backup is old", sound.with(t, aged("129601")), []string{"PgkeepNoRecentBackup main logical"}},
		{"a backup takes its time", sound.with(t, aged("129599")), nil},
		{"a backup is old, and none is expected", sound.with(t, aged("5184000")).with(t, scrape{"pgkeep_backup_age_limit_seconds" + kind("logical"): "0"}), nil},
		{"a backup is old, and all schedules are gone", sound.with(t, aged("5184000")).with(t, noSchedules), []string{"PgkeepNoRecentBackup main logical", "PgkeepScheduleMissing main logical", "PgkeepScheduleMissing main wal-audit", "PgkeepUnscheduled main"}},
		{"a backup is old, and Temporal is gone", sound.with(t, aged("5184000")).with(t, noTemporal), []string{"PgkeepNoRecentBackup main logical"}},
		{"a backup is old, and its schedule paused", sound.with(t, aged("5184000")).with(t, scrape{"pgkeep_schedule_paused" + kind("logical"): "1"}), []string{"PgkeepNoRecentBackup main logical", "PgkeepSchedulePaused main logical"}},
		{"a schedule is gone", sound.with(t, scrape{"pgkeep_schedule_wanted" + kind("expire"): "1"}), []string{"PgkeepScheduleMissing main expire"}},
		{"a schedule is not known", sound.with(t, scrape{"pgkeep_schedule_wanted" + kind("expire"): "1"}).with(t, noTemporal), nil},
		{"a schedule fails", sound.with(t, scrape{"pgkeep_schedule_last_run_passed" + kind("expire"): "0"}), []string{"PgkeepScheduleFailing main expire"}},
		{"a kind that is scheduled was never taken", sound.with(t, scrape{"pgkeep_backup_age_limit_seconds" + kind("physical"): "129600"}), []string{"PgkeepNoRecentBackup main physical"}},
		{"a clock is wrong", sound.with(t, scrape{"pgkeep_dated_ahead_seconds" + main: "301"}), []string{"PgkeepClockSkew main"}},
		{"pages are damaged", sound.with(t, scrape{"pgkeep_backups_page_damage" + main: "1"}), []string{"PgkeepPageDamage main"}},
		{"there is no backup", sound.with(t, scrape{"pgkeep_backups" + kind("logical"): "0"}), []string{"PgkeepNoBackup main"}},
		{"a backup is damaged", sound.with(t, scrape{"pgkeep_backups_damaged" + main: "1"}), []string{"PgkeepBackupDamaged main"}},
		{"a backup leads nowhere", sound.with(t, scrape{"pgkeep_backups_unusable" + main: "1"}), []string{"PgkeepBackupUnusable main"}},
		{"a hole", sound.with(t, scrape{"pgkeep_wal_holes" + main: "1"}), []string{"PgkeepWALHole main"}},
		{"the window is shorter than promised", sound.with(t, promised).with(t, scrape{"pgkeep_backup_oldest_age_seconds" + kind("physical"): "1300000"}), []string{"PgkeepWindowShort main"}},
		{"there is no window", sound.with(t, promised).with(t, scrape{"pgkeep_window_age_seconds" + main: "+Inf"}), []string{"PgkeepWindowShort main"}},
		{"there is no window, and none is promised", sound.with(t, promised).with(t, scrape{"pgkeep_window_age_seconds" + main: "+Inf", "pgkeep_window_promised_seconds" + main: "0"}), nil},
		{"there is no window, and nothing to begin one", sound.with(t, promised).with(t, scrape{"pgkeep_window_age_seconds" + main: "+Inf", "pgkeep_backup_oldest_age_seconds" + kind("physical"): "+Inf"}), nil},
		{"the window is shorter, and so is its history", sound.with(t, promised), nil},
		{"files wait", sound.with(t, scrape{"pgkeep_wal_ready_age_seconds" + main: "601"}), []string{"PgkeepWALNotArchived main"}},
		{"the archive is behind", sound.with(t, scrape{"pgkeep_wal_lag_bytes" + main: "2e9"}), []string{"PgkeepWALBehind main"}},
		{"nothing is archived", sound.with(t, scrape{"pgkeep_wal_archiving" + main: "0"}), []string{"PgkeepArchivingOff main"}},
		{"nothing is archived, as is wanted", sound.with(t, scrape{"pgkeep_wal_archiving" + main: "0", "pgkeep_schedule_present" + kind("wal-audit"): "0", "pgkeep_schedule_wanted" + kind("wal-audit"): "0"}), nil},
		{"a restore test failed", sound.with(t, scrape{"pgkeep_restore_test_passed" + kind("logical"): "0"}), []string{"PgkeepRestoreTestFailed main logical"}},
		{"nothing was ever proved", sound.with(t, scrape{"pgkeep_proven_age_seconds" + kind("logical"): "+Inf"}), []string{"PgkeepUnproven main logical"}},
		{"a schedule is paused", sound.with(t, scrape{"pgkeep_schedule_paused" + kind("wal-audit"): "1"}), []string{"PgkeepSchedulePaused main wal-audit"}},
		{"a schedule was paused for some hours", sound.with(t, scrape{"pgkeep_schedule_paused" + kind("wal-audit"): "0 1"}), nil},
		{"a proof is old", sound.with(t, scrape{"pgkeep_proven_age_seconds" + kind("logical"): "604801", "pgkeep_proven_age_limit_seconds" + kind("logical"): "604800"}), []string{"PgkeepUnproven main logical"}},
		{"a proof is old, and that will do", sound.with(t, scrape{"pgkeep_proven_age_seconds" + kind("logical"): "60480100", "pgkeep_proven_age_limit_seconds" + kind("logical"): "0"}), nil},
		{"starts were missed", sound.with(t, scrape{"pgkeep_schedule_missed" + kind("logical"): "0 2"}), []string{"PgkeepScheduleMissed main logical"}},
		{"starts were skipped", sound.with(t, scrape{"pgkeep_schedule_skipped" + kind("logical"): "3 4"}), []string{"PgkeepScheduleSkipped main logical"}},
		{"a worker is restarted", sound.with(t, scrape{"pgkeep_schedule_missed" + kind("logical"): "3 -1 3", "pgkeep_schedule_skipped" + kind("logical"): "7 -1 7"}), nil},
		{"nobody polls", deaf, []string{"PgkeepNoPollers db1:9788 pgkeep", "PgkeepNoPollers db1:9788 pgkeep-host-db1"}},
	}

	type sample struct {
		Labels string  `yaml:"labels"`
		Value  float64 `yaml:"value"`
	}
	var tests []map[string]any
	seen := make(map[string]bool)
	for _, c := range cases {
		var want []sample
		for _, alert := range c.want {
			fields := strings.Fields(alert)
			seen[fields[0]] = true
			labels := fmt.Sprintf("{alertname=%q", fields[0])
			names := []string{"cluster", "kind"}
			switch fields[0] {
			case "PgkeepBlind":
				names[1] = "source"
			case "PgkeepNoPollers":
				names = []string{"instance", "task_queue"}
			}
			for i, v := range fields[1:] {
				labels += fmt.Sprintf(",%s=%q", names[i], v)
			}
			if fields[0] == "PgkeepWorkerDown" {
				labels += `,instance="db1:9788"`
			}
			want = append(want, sample{labels + "}", 1})
		}
		// What tells nothing of the matter is left out.
		firing := `group by (alertname, cluster, kind, source, task_queue) (ALERTS{alertstate="firing", alertname!~"PgkeepNoPollers|PgkeepWorkerDown"})` +
			` or group by (alertname, instance, task_queue) (ALERTS{alertstate="firing", alertname=~"PgkeepNoPollers|PgkeepWorkerDown"})`
		tests = append(tests, map[string]any{"name": c.what, "interval": "15m", "input_series": c.told.input(),
			"promql_expr_test": []map[string]any{{"expr": firing, "eval_time": "25h30m", "exp_samples": want}}})
	}

	var all struct {
		Groups []struct {
			Rules []struct {
				Alert, Expr string
				Labels      map[string]string
				Annotations map[string]string
			}
		}
	}
	text, err := os.ReadFile(rules)
	if err == nil {
		err = yaml.Unmarshal(text, &all)
	}
	if err != nil {
		t.Fatal(err)
	}
	runbooks, err := os.ReadFile("../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range all.Groups[0].Rules {
		if !strings.Contains(string(runbooks), "`"+r.Alert+"`") {
			t.Errorf("docs/OPERATIONS.md does not say what to do about %s", r.Alert)
		}
		if !seen[r.Alert] {
			t.Errorf("%s is never raised in a test", r.Alert)
		}
		if !slices.Contains([]string{"critical", "warning"}, r.Labels["severity"]) || r.Annotations["summary"] == "" || r.Annotations["description"] == "" {
			t.Errorf("%s: %v, %v", r.Alert, r.Labels, r.Annotations)
		}
	}

	abs, err := filepath.Abs(rules)
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "pgkeep_test.yml")
	b, err := yaml.Marshal(map[string]any{"rule_files": []string{abs}, "evaluation_interval": "30m", "tests": tests})
	if err == nil {
		err = os.WriteFile(file, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"check", "rules", abs}, {"test", "rules", file}} {
		if out, err := exec.CommandContext(t.Context(), "promtool", args...).CombinedOutput(); err != nil {
			t.Errorf("promtool %s %s (Debian's package prometheus): %v\n%s", args[0], args[1], err, out)
		}
	}
}
