package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/lab"
)

// On the worst day there is a bucket, a key, and a configuration that names the
// two. The cluster comes back, as of the moment that was asked for.
func TestAClusterComesBackFromBucketAndKey(t *testing.T) {
	p := newPair(t)
	t.Setenv("PATH", p.shared+":"+os.Getenv("PATH")) // of pgkeep-wal
	p.exec("postgres", "INSERT INTO t SELECT i FROM generate_series(1, 100) i", "SELECT pg_create_restore_point('good')",
		"DELETE FROM t", "SELECT pg_switch_wal()", "CREATE TABLE later ()")
	last := p.query(p.pg, "SELECT pg_walfile_name(pg_switch_wal())")
	text, err := os.ReadFile(p.config)
	if err != nil {
		t.Fatal(err)
	}
	var bare []string
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "clusters:") && !strings.HasPrefix(line, "spool:") {
			bare = append(bare, line)
		}
	}
	p.config = p.write("bare.yaml", strings.Join(bare, ""))
	dir := filepath.Join(p.shared, "restored", "data")
	if err := os.Mkdir(filepath.Dir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	p.own()

	p.until(p.pg, "SELECT coalesce(last_archived_wal >= '"+last+"', false) FROM pg_stat_archiver")
	p.fails(2, []string{"which zone?"}, "restore", "--target-dir", dir, "--to-time", "2026-11-22 10:00:00")
	p.fails(26, []string{"the first moment that can be reached: "}, "restore", "--target-dir", dir, "--to-time", "2020-01-01 00:00:00Z")
	p.fails(0, []string{"dry run: nothing is done", "to restore point \"good\", along timeline 1", "owned by postgres", dir + " (new)", "to bring the files, at 50.0 MiB/s", "at 16.0 MiB/s (assumed: ", "can run it"},
		"restore", "--target-dir", dir, "--to-name", "good", "--dry-run", "latest")
	if _, err := os.Lstat(dir); err == nil {
		t.Fatal("the dry run did something")
	}
	var plan struct {
		Schema   string
		State    string
		Segments int
		DryRun   bool `json:"dry_run"`
		Target   struct{ Kind, Name string }
		Server   string
		Time     struct {
			Fetch  float64 `json:"fetch_seconds"`
			Replay float64 `json:"replay_seconds"`
		}
	}
	out := p.ok("restore", "--target-dir", dir, "--to-name", "good", "--dry-run", "--json")
	if err := json.Unmarshal([]byte(out), &plan); err != nil || plan.Schema != "pgkeep.restore.dir/1" || plan.State != "new" || plan.Segments < 1 || !plan.DryRun || plan.Target.Name != "good" || plan.Server == "" || plan.Time.Fetch <= 0 || plan.Time.Replay <= 0 {
		t.Errorf("the plan is %s (%v)", out, err)
	}
	p.fails(0, []string{"restored ", " to " + dir, "it recovers to restore point \"good\", and opens"},
		"restore", "--target-dir", dir, "--to-name", "good", "--target-action", "promote", "--cluster", "main")
	p.fails(18, []string{"is not empty"}, "restore", "--target-dir", dir)
	server := lab.PostgresForTest(t, lab.PostgresOptions{Dir: filepath.Dir(dir), Settings: map[string]string{"hot_standby": "off"}})
	for sql, want := range map[string]string{"SELECT count(*)::text FROM t": "100", "SELECT coalesce(to_regclass('later')::text, 'none')": "none", "SHOW archive_mode": "off"} {
		if got := p.query(server, sql); got != want {
			t.Errorf("%s is %s, want %s", sql, got, want)
		}
	}
}

// Flags of one kind of restore do nothing in the other: they are refused.
func TestRestoreRefusesWhatIsMeantForTheOtherKind(t *testing.T) {
	w := &world{t: t, dir: t.TempDir()}
	w.config = w.write("pgkeep.yaml", "repository: {url: 'file:///nonexistent', encryption: none}\n")
	for line, says := range map[string]string{
		"--to-time 2026-11-22T10:00:00Z latest":         "--to-time wants --target-dir",
		"--delta latest":                                "--delta wants --target-dir",
		"--target-dir /d --database shop":               "--database is for logical backups",
		"--target-dir /d --globals":                     "--globals is for logical backups",
		"--target-dir /d --to-lsn 0/1 --to-xid 740":     "--to-lsn and --to-xid exclude each other",
		"--target-dir /d --immediate --to-name x":       "--to-name and --immediate exclude each other",
		"--target-dir /d --to-lsn 16":                   "positions look like 16/B374D848",
		"--target-dir /d --to-xid 0x10":                 "a decimal number",
		"--target-dir /d --timeline newest":             "latest, current, a number",
		"--target-dir /d --target-action wait":          "pause, promote or shutdown",
		"--target-dir /d --tablespace-map x":            "want OID=DIR",
		"--target-dir /d --to-time 2026-11-22T10:00:00": "which zone?",
		"":                             "BACKUP is missing",
		"--target-dir /d --to-time ''": "not of a form that is known",
		"--target-dir /d --to-time yesterday --immediate": "",
		"--target-dir /d --tablespace-map 16=relative":    "absolute paths",
		"--target-dir ''":                 "--target-dir is empty",
		"--target-dir /d --config-dir ''": "--config-dir is empty",
	} {
		args := []string{"restore"}
		for word := range strings.FieldsSeq(line) {
			args = append(args, strings.Trim(word, "'"))
		}
		w.fails(2, []string{says}, args...)
	}
}
