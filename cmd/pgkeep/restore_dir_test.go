package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/fail"
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
	p.damagedPack(dir)
	good := []string{"restore", "--target-dir", dir, "--to-name", "good", "--target-action", "promote", "--cluster", "main"}
	for _, kill := range []string{"pwrite64:signal=KILL:when=3", "syncfs:signal=KILL:when=1", "fsync:signal=KILL:when=4"} {
		out, err := p.traced([]string{"-o", "/dev/null", "-e", "inject=" + kill}, good...)
		if exit, ok := errors.AsType[*exec.ExitError](err); !ok || exit.Success() || strings.Contains(out, "restored ") {
			t.Errorf("killed at %s: %v\n%s", kill, err, out)
		}
		_, cerr := os.Lstat(filepath.Join(dir, "global/pg_control"))
		_, merr := os.Lstat(filepath.Join(dir, "pgkeep.restoring"))
		if !errors.Is(cerr, fs.ErrNotExist) || merr != nil {
			t.Errorf("killed at %s: a server could start on it (%v, %v)", kill, cerr, merr)
		}
	}
	if out := p.ok(good...); !strings.Contains(out, "restored ") {
		t.Fatalf("after it was killed: %s", out)
	}
	another, trace := filepath.Join(p.shared, "traced", "data"), filepath.Join(p.dir, "trace")
	if err := os.Mkdir(filepath.Dir(another), 0o700); err != nil {
		t.Fatal(err)
	}
	p.own()
	good[2] = another
	if out, err := p.traced([]string{"-o", trace}, good...); err != nil || !strings.Contains(out, "restored ") || !strings.Contains(out, "it recovers to restore point \"good\", and opens") {
		t.Fatalf("%v\n%s", err, out)
	}
	onDisk(t, trace, another)
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
		"--to-time 2026-11-22T10:00:00Z latest":           "--to-time wants --target-dir",
		"--delta latest":                                  "--delta wants --target-dir",
		"--target-dir /d --database shop":                 "--database is for logical backups",
		"--target-dir /d --globals":                       "--globals is for logical backups",
		"--target-dir /d --to-lsn 0/1 --to-xid 740":       "--to-lsn and --to-xid exclude each other",
		"--target-dir /d --immediate --to-name x":         "--to-name and --immediate exclude each other",
		"--target-dir /d --to-lsn 16":                     "positions look like 16/B374D848",
		"--target-dir /d --to-xid 0x10":                   "a decimal number",
		"--target-dir /d --timeline newest":               "latest, current, a number",
		"--target-dir /d --target-action wait":            "pause, promote or shutdown",
		"--target-dir /d --tablespace-map x":              "want OID=DIR",
		"--target-dir /d --to-time 2026-11-22T10:00:00":   "which zone?",
		"--target-dir /d --host db2 --dry-run":            "log in to db2 and leave out --host",
		"":                                                "BACKUP is missing",
		"--target-dir /d --to-time ''":                    "not of a form that is known",
		"--target-dir /d --to-time yesterday --immediate": "",
		"--target-dir /d --tablespace-map 16=relative":    "absolute paths",
		"--target-dir ''":                                 "--target-dir is empty",
		"--target-dir /d --config-dir ''":                 "--config-dir is empty",
	} {
		args := []string{"restore"}
		for word := range strings.FieldsSeq(line) {
			args = append(args, strings.Trim(word, "'"))
		}
		w.fails(2, []string{says}, args...)
	}
}

// traced runs the program itself, under strace.
func (p *pair) traced(options []string, args ...string) (out string, err error) {
	p.t.Helper()
	program, err := exec.LookPath("pgkeep")
	if err != nil {
		p.t.Fatal(err)
	}
	calls := "trace=openat,write,pwrite64,ftruncate,fallocate,mkdirat,symlinkat,unlinkat,renameat,renameat2,fchmodat,fchownat,fsync,fdatasync,sync_file_range,syncfs"
	cmd := exec.CommandContext(p.t.Context(), "strace", slices.Concat([]string{"-f", "-qq", "-y", "-s", "200", "-e", calls}, options, []string{program, "--config", p.config}, args)...)
	b, err := cmd.CombinedOutput()
	return string(b), err
}

// onDisk reads in a trace that all of a restore was on disk before pg_control
// appeared, and that itself before the end.
func onDisk(t *testing.T, trace, dir string) {
	t.Helper()
	text, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(text), "\n")
	find := func(after int, parts ...string) int {
		for i := after + 1; i < len(lines); i++ {
			if !slices.ContainsFunc(parts, func(part string) bool { return !strings.Contains(lines[i], part) }) {
				return i
			}
		}
		t.Fatalf("no call %q after %q", parts, lines[max(after, 0)])
		return 0
	}
	synced := find(-1, "syncfs(", "<"+dir+">")
	there := find(synced, "renameat", `"pg_control.pgkeep"`, `"pg_control"`)
	gone := find(find(there, "fsync(", "<"+dir+"/global>"), "unlinkat(", "pgkeep.restoring")
	find(gone, "fsync(", "<"+dir+">")
	if n := strings.Count(string(text), "pwrite64("); n < 100 {
		t.Errorf("%d writes were seen", n)
	}
	for i, line := range lines {
		changes := strings.Contains(line, "write") || strings.Contains(line, "O_CREAT") || strings.Contains(line, "truncate(") || strings.Contains(line, "mkdirat(") || strings.Contains(line, "symlinkat(") || strings.Contains(line, "fchownat(")
		if i > synced && changes && strings.Contains(line, "<"+dir) {
			t.Errorf("after all was synced: %s", line)
		}
	}
	for _, at := range []int{synced, there} {
		if !strings.Contains(lines[at], ") = 0") && !strings.Contains(lines[at+1], "resumed>) = 0") && !strings.Contains(lines[at], "unfinished") {
			t.Errorf("it failed: %s", lines[at])
		}
	}
}

// damagedPack restores from a damaged pack. What went wrong comes with its own
// advice, which the one about the unfinished directory hid.
func (p *pair) damagedPack(dir string) {
	p.t.Helper()
	largest, size := "", int64(0)
	for key, path := range p.objects() {
		if info, err := os.Stat(path); err == nil && strings.Contains(key, "/packs/") && info.Size() > size {
			largest, size = path, info.Size()
		}
	}
	b, err := os.ReadFile(largest)
	if err != nil {
		p.t.Fatal(err)
	}
	b[len(b)/3] ^= 1
	overwrite(p.t, largest, b)
	p.fails(14, []string{fail.HintOf(fail.Corrupt) + "; " + dir + " is unfinished"}, "restore", "--target-dir", dir, "--to-name", "good", "--cluster", "main")
	b[len(b)/3] ^= 1
	overwrite(p.t, largest, b)
}
