package health_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/lab"
)

// both is a cluster of which both kinds of backups are taken.
var both = health.Duty{Physical: true, Logical: true}

// A patient is a real server, well at first.
type patient struct {
	*lab.Postgres
	t  *testing.T
	at cluster.Cluster
}

func (p *patient) exec(sql ...string) {
	p.t.Helper()
	if err := p.Exec(p.t.Context(), "postgres", sql...); err != nil {
		p.t.Fatal(err)
	}
}

func names(found []health.Finding) (names []string) {
	for _, f := range found {
		names = append(names, f.Name)
	}
	return names
}

func find(found []health.Finding, name string) (health.Finding, bool) {
	i := slices.IndexFunc(found, func(f health.Finding) bool { return f.Name == name })
	if i < 0 {
		return health.Finding{}, false
	}
	return found[i], true
}

// eventually asks again until the finding is there, or is gone: PostgreSQL does
// what it is told in its own time.
func eventually(t *testing.T, name string, there bool, ask func() []health.Finding) health.Finding {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	again := time.NewTicker(20 * time.Millisecond)
	defer again.Stop()
	for {
		found := ask()
		if f, ok := find(found, name); ok == there {
			return f
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			t.Fatalf("%s: there should be %v, and found is %q", name, there, names(found))
		}
	}
}

// statements are those of a fix that a superuser runs.
func statements(t *testing.T, fix string) []string {
	t.Helper()
	_, text, ok := strings.Cut(fix, "as a superuser: ")
	end := strings.LastIndex(text, ";")
	if !ok || end < 0 {
		t.Fatalf("the fix %q is no SQL", fix)
	}
	return strings.Split(text[:end], "; ")
}

// newPatient starts a server that archives.
func newPatient(t *testing.T) *patient {
	t.Helper()
	pg := lab.PostgresForTest(t, lab.PostgresOptions{Settings: map[string]string{
		"archive_mode": "on", "max_prepared_transactions": "2", "wal_keep_size": "0", "log_min_messages": "panic"}})
	p := &patient{pg, t, cluster.Cluster{Conninfo: pg.Conninfo()}}
	p.exec("ALTER SYSTEM SET archive_command = 'true pgkeep-wal'", "SELECT pg_reload_conf()", "CREATE TABLE filler (x text)")
	eventually(t, "archive-missing", false, p.ask(both))
	if found := p.ask(both)(); len(found) > 0 {
		t.Fatalf("of a server that is well: %+v", found)
	}
	return p
}

func (p *patient) ask(d health.Duty) func() []health.Finding {
	return func() []health.Finding { return health.AskServer(p.t.Context(), "main", p.at, d).Findings(d) }
}

// sick sees a finding, does what its fix says, and sees it gone.
func (p *patient) sick(name string, severity health.Severity, says string, d health.Duty) {
	p.t.Helper()
	f := eventually(p.t, name, true, p.ask(d))
	if f.Severity != severity || !strings.Contains(f.What, says) || f.Cluster != "main" {
		p.t.Errorf("%s: %+v, want %s with %q", name, f, severity, says)
	}
	p.exec(statements(p.t, f.Fix)...)
	eventually(p.t, name, false, p.ask(d))
}

func TestArchivingFindings(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	p.exec("ALTER SYSTEM RESET archive_command", "SELECT pg_reload_conf()")
	p.sick("archive-missing", health.Critical, "there is no archive_command", both)
	p.exec("ALTER SYSTEM SET archive_command = '/usr/bin/other --token=canary %p'", "SELECT pg_reload_conf()")
	if f := eventually(t, "archive-foreign", true, p.ask(both)); strings.Contains(f.What+f.Fix, "canary") {
		t.Errorf("a secret of the command is shown: %+v", f)
	}
	p.sick("archive-foreign", health.Critical, "by other,", both)

	// What fails is told from what neither fails nor works.
	old := func() {
		t.Helper()
		p.exec("INSERT INTO filler VALUES ('x')", "SELECT pg_switch_wal()")
		ready, err := filepath.Glob(p.DataDir + "/pg_wal/archive_status/*.ready")
		if err != nil || len(ready) == 0 {
			t.Fatalf("nothing waits to be archived: %v", err)
		}
		then := time.Now().Add(-time.Hour)
		for _, file := range ready {
			if err := os.Chtimes(file, then, then); err != nil {
				t.Fatal(err)
			}
		}
	}
	p.exec("SELECT pg_stat_reset_shared('archiver')", "ALTER SYSTEM SET archive_command = 'exit 130 # pgkeep-wal'", "SELECT pg_reload_conf()")
	old()
	eventually(t, "archive-silent", true, p.ask(both))
	p.exec("ALTER SYSTEM SET archive_command = 'false # pgkeep-wal'", "SELECT pg_reload_conf()")
	if f := eventually(t, "archive-failing", true, p.ask(both)); f.Severity != health.Critical || !strings.Contains(f.Fix, "server's log") {
		t.Errorf("%+v", f)
	}
	p.exec("ALTER SYSTEM SET archive_command = 'true pgkeep-wal'", "SELECT pg_reload_conf()")
	eventually(t, "archive-failing", false, p.ask(both))
}

func TestServerFindings(t *testing.T) {
	t.Parallel()
	p := newPatient(t)
	p.exec("CREATE ROLE clerk LOGIN", "GRANT pg_monitor TO clerk")
	patient := health.Duty{Physical: true, Transaction: 50 * time.Millisecond, Idle: time.Hour}
	p.exec("BEGIN; INSERT INTO filler VALUES ('y'); PREPARE TRANSACTION 'it''s mine'")
	p.sick("prepared-transaction", health.Warning, "of postgres is", patient)
	hold := func(sql string) {
		t.Helper()
		conn, err := p.Connect(t.Context(), "postgres")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close(context.Background()) })
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	hold("BEGIN")
	p.sick("long-transaction", health.Warning, "in database postgres", patient)
	hold("BEGIN")
	p.sick("idle-in-transaction", health.Warning, "does nothing since", health.Duty{Physical: true, Idle: 50 * time.Millisecond})

	p.exec("SELECT pg_create_physical_replication_slot('nobody', true)")
	for range 3 {
		p.exec("INSERT INTO filler VALUES ('z')", "SELECT pg_switch_wal()")
	}
	p.sick("slot-holds-wal", health.Warning, "nobody holds", health.Duty{Physical: true, Slot: 20 << 20})

	for range 12 {
		p.exec("CHECKPOINT")
	}
	p.sick("max-wal-size", health.Warning, "max_wal_size is 1.0 GiB", both)

	p.at.Conninfo = strings.Replace(p.Conninfo(), "user=postgres", "user=clerk", 1)
	p.sick("rights", health.Critical, `role "clerk" lacks pg_read_all_data`, both)
	p.exec("REVOKE pg_monitor FROM clerk")
	if f := eventually(t, "pg-denied", true, p.ask(both)); !strings.Contains(f.Fix, "pg_monitor") {
		t.Errorf("%+v", f)
	}
	p.exec("GRANT pg_monitor TO clerk")
	eventually(t, "pg-denied", false, p.ask(both))

	// The rights that backups take are enough to ask.
	for role, d := range map[string]cluster.Duties{"copies": {Physical: true}, "dumps": {Logical: true}, "all": {Physical: true, Logical: true}} {
		p.exec(cluster.RoleSQL(role, d))
		p.at.Conninfo = strings.Replace(p.Conninfo(), "user=postgres", "user="+role, 1)
		if found := p.ask(health.Duty{Physical: d.Physical, Logical: d.Logical})(); len(found) > 0 {
			t.Errorf("as %s: %+v", role, found)
		}
	}

	p.at = cluster.Cluster{Conninfo: p.Conninfo(), BinDir: t.TempDir()}
	if f := eventually(t, "pg-dump", true, p.ask(both)); f.Severity != health.Critical || !strings.Contains(f.Fix, "postgresql-client-") {
		t.Errorf("%+v", f)
	}
	for _, name := range []string{"pg_dump", "pg_dumpall", "pg_restore"} { // of another time
		if err := os.WriteFile(filepath.Join(p.at.BinDir, name), []byte("#!/bin/sh\necho '"+name+" (PostgreSQL) 14.10'\n"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if f := eventually(t, "pg-dump", true, p.ask(both)); !strings.Contains(f.What, "too old") {
		t.Errorf("%+v", f)
	}
	p.at.BinDir = ""
	eventually(t, "pg-dump", false, p.ask(both))
	p.at.Conninfo = strings.Replace(p.Conninfo(), "port=5432", "port=5433", 1)
	eventually(t, "pg-down", true, p.ask(both))

	// What cannot be made here is said of the real server's facts, changed.
	p.at = cluster.Cluster{Conninfo: p.Conninfo()}
	s := health.AskServer(t.Context(), "main", p.at, both)
	if s.Skew != 0 {
		t.Errorf("the clock of a server on this host is ahead by %v", s.Skew)
	}
	s.Skew, s.Version, s.Slots = -6*time.Minute, 140002, []cluster.Slot{{Name: "gone", State: "lost"}}
	found := s.Findings(both)
	if got := names(found); !slices.Equal(got, []string{"slot-lost", "clock-skew", "bad-minor"}) || found[1].Severity != health.Critical || !strings.Contains(found[2].Fix, "14.4") {
		t.Errorf("found %+v", found)
	}
}

// What takes a start of the server, or a stop.
func TestFindingsOfServersThatMustRestart(t *testing.T) {
	t.Parallel()
	dir := lab.DirForTest(t)
	start := func(settings map[string]string) *patient {
		t.Helper()
		pg, err := lab.StartPostgres(t.Context(), lab.PostgresOptions{Dir: dir, Settings: settings})
		if err != nil {
			t.Fatal(err)
		}
		return &patient{pg, t, cluster.Cluster{Conninfo: pg.Conninfo()}}
	}
	p := start(nil)
	stop := func() {
		t.Helper()
		if err := p.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	checksums := func(args ...string) {
		t.Helper()
		if out, err := p.Command(t.Context(), "pg_checksums", args...).CombinedOutput(); err != nil {
			t.Fatalf("pg_checksums %q: %v\n%s", args, err, out)
		}
	}
	ask := func(d health.Duty) []health.Finding {
		return health.AskServer(t.Context(), "main", p.at, d).Findings(d)
	}
	p.exec("ALTER SYSTEM SET wal_level = 'minimal'", "ALTER SYSTEM SET max_wal_senders = 0")
	stop()
	checksums("--disable", "-D", p.DataDir)
	p = start(nil)
	defer func() { stop() }()
	found := ask(both)
	if got := names(found); !slices.Equal(got, []string{"wal-level", "checksums-off"}) {
		t.Fatalf("found %q", got)
	}
	p.exec(statements(t, found[0].Fix)...)
	_, line, _ := strings.Cut(found[1].Fix, "pg_checksums ")
	stop()
	checksums(strings.Fields(line)...)
	p = start(nil)
	found = ask(both)
	if got := names(found); !slices.Equal(got, []string{"archive-off"}) || found[0].Severity != health.Critical {
		t.Fatalf("found %+v", found)
	}
	if f, ok := find(ask(health.Duty{Logical: true}), "archive-off"); !ok || f.Severity != health.Notice {
		t.Errorf("of a cluster of dumps: %+v", f)
	}
	p.exec(statements(t, found[0].Fix)...)
	stop()
	p = start(nil)
	if found := ask(both); len(found) > 0 {
		t.Errorf("found %+v", found)
	}
}

func TestDiskFindings(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "spool")
	found := health.AskDisk("dumps", dir, true).Findings("")
	f, ok := find(found, "directory")
	_, command, _ := strings.Cut(f.Fix, ": ")
	if !ok || f.Severity != health.Critical {
		t.Fatalf("of a directory that is not there: %+v", found)
	}
	words := strings.Fields(command)
	if out, err := exec.CommandContext(t.Context(), words[0], words[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	d := health.AskDisk("dumps", dir, true)
	if found := d.Findings(""); len(found) > 0 || d.Free <= 0 || d.Total < d.Free {
		t.Errorf("of a directory that was made: %+v, %+v", found, d)
	}
	if left, _ := os.ReadDir(dir); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	// A real disk that fills up.
	if err := syscall.Mount("none", dir, "tmpfs", 0, "size=1m,mode=0700"); err != nil {
		t.Fatalf("mount a small file system (it takes root): %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	ask := func() []health.Finding { return health.AskDisk("dumps", dir, true).Findings("main") }
	if found := ask(); len(found) > 0 {
		t.Errorf("of an empty disk: %+v", found)
	}
	fill := filepath.Join(dir, "fill")
	for _, c := range []struct {
		bytes int
		want  health.Severity
	}{{1<<20 - 40<<10, health.Warning}, {1<<20 - 8<<10, health.Critical}} {
		if err := os.WriteFile(fill, make([]byte, c.bytes), 0o600); err != nil {
			t.Fatal(err)
		}
		if f, ok := find(ask(), "disk-space"); !ok || f.Severity != c.want || f.Cluster != "main" || !strings.Contains(f.Fix, dir) {
			t.Errorf("with %d bytes taken: %+v", c.bytes, f)
		}
	}
	if err := os.Remove(fill); err != nil {
		t.Fatal(err)
	}
	if found := ask(); len(found) > 0 {
		t.Errorf("after space was freed: %+v", found)
	}
	d = health.AskDisk("dumps", dir, true)
	d.Needs = 2 << 20 // for what is to come
	if f, ok := find(d.Findings("main"), "disk-space"); !ok || f.Severity != health.Warning {
		t.Errorf("of a disk that is too small: %+v", f)
	}
}
