package main

import (
	"encoding/json"
	"errors"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/health"
)

// One thing after the other goes wrong with the backups of a cluster, is seen by
// those who look, and is put right.
func TestDoctorCheckAndStatusTellHowItIs(t *testing.T) {
	w := newWorld(t)
	text, err := os.ReadFile(w.config)
	if err != nil {
		t.Fatal(err)
	}
	w.config = w.write("here.yaml", string(text)+"\nhost: db1\n")
	sees := func(status int, line string) {
		t.Helper()
		got, out, said := w.pgkeep("check", "--nagios")
		if got != status || !regexp.MustCompile("^"+line+"\n$").MatchString(out) || said != "" {
			t.Errorf("check --nagios = %d, want %d and %s\n%s%s", got, status, line, out, said)
		}
	}
	sees(2, `PGKEEP CRITICAL - main: there is no backup`)
	w.fails(51, []string{"critical  backup-missing", "fix: pgkeep backup main", "pgkeep: error: 1 critical finding: backup-missing\n"}, "check")

	id := w.backup()
	sees(1, `PGKEEP WARNING - main: no logical backup that there is was ever seen to restore \| 'main_logical_age'=\d+s;691200;1382400 'main_logical_proven_age'=U;604800`)
	w.fails(0, []string{"never-tested", "fix: pgkeep restore-test --cluster main " + string(id)}, "check")
	w.prove(id, time.Now().Add(-time.Hour), true)
	sees(0, `PGKEEP OK - main: newest backup \S+ old, logical proven up to \S+ ago \| 'main_logical_age'=\d+s;691200;1382400 'main_logical_proven_age'=\d+s;604800`)
	w.fails(0, []string{"nothing is wrong"}, "check", "--cluster", "main")

	var all struct{ Findings []health.Finding }
	if err := json.Unmarshal([]byte(w.ok("doctor", "--json")), &all); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range all.Findings {
		names = append(names, f.Name)
	}
	if got := strings.Join(names, " "); got != "key-single temporal-down versioning-off archive-off" {
		t.Errorf("doctor finds %s", got)
	}
	for key := range w.objects() {
		if strings.Contains(key, "probe") {
			t.Errorf("doctor left %s", key)
		}
	}

	if out := w.ok("status"); !strings.Contains(out, "  proven     logical, "+string(id)+", up to ") || !strings.Contains(out, " ago, restored in 3s") {
		t.Errorf("status does not say what was proven:\n%s", out)
	}
	w.prove(id, time.Now(), false)
	sees(2, `PGKEEP CRITICAL - main: the restore test of backup `+string(id)+` failed: read: 1 table of 2 cannot be read \| .*`)
	out := w.ok("status")
	for _, want := range []string{"main\n", "  logical    " + string(id) + ", ", "; 1 in all", "  archiving  off", "  CRITICAL   the restore test"} {
		if !strings.Contains(out, want) {
			t.Errorf("status does not say %q:\n%s", want, out)
		}
	}
	w.fails(0, []string{`"schema": "pgkeep.status/1"`, `"schedules": null`, `"archiver": {`, `"window_until": null`}, "status", "--json")
	w.prove(id, time.Now().Add(time.Second), true)

	manifest := w.objects()["clusters/main/backups/"+string(id)+"/manifest.json"]
	sound, err := os.ReadFile(manifest)
	if err != nil {
		t.Fatal(err)
	}
	overwrite(t, manifest, append([]byte("{"), sound...))
	w.fails(51, []string{"backup-damaged", string(id)}, "check")
	overwrite(t, manifest, sound)
	w.fails(0, []string{"nothing is wrong"}, "check")

	w.s3.Kill()
	w.config = w.write("nowhere.yaml", "repository: {url: 's3://b/p', endpoint: 'ftp://x'}")
	sees(3, `PGKEEP UNKNOWN - .*`)
}

func TestPluginLine(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	sick := examined{Stored: health.Stored{Cluster: "main"}, found: []health.Finding{
		{Name: "x", Severity: health.Warning, Cluster: "main", What: "a | b\nc"}, {Name: "y", Severity: health.Notice, Cluster: "main", What: "by the way"}}}
	for _, c := range []struct {
		all    []examined
		err    error
		want   string
		status int
	}{
		{nil, errors.Join(fail.StoreDown), "PGKEEP UNKNOWN - store-down", 3},
		{nil, nil, "PGKEEP UNKNOWN - the repository is empty, and no cluster is configured", 3},
		{[]examined{sick}, nil, "PGKEEP WARNING - main: a / b c", 1},
	} {
		line, err := nagios(c.all, c.err, now)
		status, _ := errors.AsType[pluginStatus](err)
		if line != c.want || int(status) != c.status {
			t.Errorf("got %d %s\nwant %d %s", status, line, c.status, c.want)
		}
	}
}
