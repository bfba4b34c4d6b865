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

// sick sees a finding, lets its fix be done, and sees it gone. Every finding has
// one: see TestEveryFindingIsMadeAndMended.
func sick(t *testing.T, name string, severity health.Severity, ask func() []health.Finding, mend func(fix string)) health.Finding {
	t.Helper()
	f := eventually(t, name, true, ask)
	if f.Severity != severity {
		t.Errorf("%+v, want it %s", f, severity)
	}
	mend(f.Fix)
	eventually(t, name, false, ask)
	return f
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
	f := sick(p.t, name, severity, p.ask(d), func(fix string) { p.exec(statements(p.t, fix)...) })
	if !strings.Contains(f.What, says) || f.Cluster != "main" {
		p.t.Errorf("%s: %+v, want it with %q", name, f, says)
	}
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
	// late makes files wait, since an hour, until the archiver does as it was told.
	late := func() []health.Finding {
		t.Helper()
		p.exec("INSERT INTO filler VALUES ('x')", "SELECT pg_switch_wal()")
		ready, err := filepath.Glob(p.DataDir + "/pg_wal/archive_status/*.ready")
		if err != nil {
			t.Fatal(err)
		}
		then := time.Now().Add(-time.Hour)
		for _, file := range ready {
			if err := os.Chtimes(file, then, then); err != nil && !os.IsNotExist(err) {
				t.Fatal(err)
			}
		}
		return p.ask(both)()
	}
	p.exec("SELECT pg_stat_reset_shared('archiver')", "ALTER SYSTEM SET archive_command = 'exit 130 # pgkeep-wal'", "SELECT pg_reload_conf()")
	eventually(t, "archive-silent", true, late)
	archiver := func(command string) func(string) {
		return func(string) {
			t.Helper()
			p.exec("ALTER SYSTEM SET archive_command = '"+command+"'", "SELECT pg_reload_conf()")
		}
	}
	sick(t, "archive-silent", health.Critical, p.ask(both), archiver("true pgkeep-wal")) // what it ran was at fault
	archiver("false # pgkeep-wal")("")
	p.exec("SELECT pg_stat_reset_shared('archiver')") // it did archive, just now
	eventually(t, "archive-failing", true, late)
	if f := sick(t, "archive-failing", health.Critical, p.ask(both), archiver("true pgkeep-wal")); !strings.Contains(f.Fix, "server's log") {
		t.Errorf("%+v", f)
	}
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
	p.exec("SELECT pg_create_physical_replication_slot('gone', true)", "ALTER SYSTEM SET max_slot_wal_keep_size = '1MB'", "SELECT pg_reload_conf()")
	for range 5 {
		p.exec("INSERT INTO filler VALUES ('z')", "SELECT pg_switch_wal()")
	}
	p.exec("CHECKPOINT") // which removes what the slot may not hold
	p.sick("slot-lost", health.Warning, "slot gone has lost", both)

	for range 12 {
		p.exec("CHECKPOINT")
	}
	p.sick("max-wal-size", health.Warning, "max_wal_size is 1.0 GiB", both)

	p.at.Conninfo = strings.Replace(p.Conninfo(), "user=postgres", "user=clerk", 1)
	p.sick("rights", health.Critical, `role "clerk" lacks pg_read_all_data`, both)
	p.exec("REVOKE pg_monitor FROM clerk")
	sick(t, "pg-denied", health.Critical, p.ask(both), func(fix string) {
		if !strings.Contains(fix, "pg_monitor") {
			t.Errorf("fix: %s", fix)
		}
		p.exec("GRANT pg_monitor TO clerk")
	})

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
	sick(t, "pg-dump", health.Critical, p.ask(both), func(string) { p.at.BinDir = "" }) // which has what is installed
	p.Kill()
	sick(t, "pg-down", health.Critical, p.ask(both), func(string) {
		if err := p.Restart(t.Context(), nil); err != nil {
			t.Fatal(err)
		}
	})
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
	if got := names(ask(both)); !slices.Equal(got, []string{"wal-level", "checksums-off"}) {
		t.Fatalf("found %q", got)
	}
	asked := func() []health.Finding { return ask(both) }
	restarted := func(fix string) {
		t.Helper()
		p.exec(statements(t, fix)...)
		stop()
		p = start(nil)
	}
	sick(t, "wal-level", health.Critical, asked, restarted)
	sick(t, "checksums-off", health.Warning, asked, func(fix string) {
		_, line, _ := strings.Cut(fix, "pg_checksums ")
		stop()
		checksums(strings.Fields(line)...)
		p = start(nil)
	})
	if f, ok := find(ask(health.Duty{Logical: true}), "archive-off"); !ok || f.Severity != health.Notice {
		t.Errorf("of a cluster of dumps: %+v", f)
	}
	sick(t, "archive-off", health.Critical, asked, restarted)
	if found := ask(both); len(found) > 0 {
		t.Errorf("found %+v", found)
	}
}

// A server whose clock is wrong: the library that it runs with shifts it by as
// many seconds as a file has bytes, until the file is empty.
func TestAServerWithAWrongClockIsFound(t *testing.T) {
	t.Parallel()
	dir := lab.DirForTest(t)
	ahead, library := filepath.Join(dir, "ahead"), filepath.Join(dir, "clock.so")
	write := func(name string, content []byte) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	write("ahead", nil)
	write("clock.c", []byte(`
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/stat.h>
#include <sys/time.h>
int gettimeofday(struct timeval *restrict tv, void *restrict tz) {
	int (*real)(struct timeval *, void *) = dlsym(RTLD_NEXT, "gettimeofday");
	struct stat s;
	int r = real(tv, tz);
	if (stat(AHEAD, &s) == 0) tv->tv_sec += s.st_size;
	return r;
}`))
	if out, err := exec.CommandContext(t.Context(), "cc", "-shared", "-fPIC", "-O1", `-DAHEAD="`+ahead+`"`, "-o", library, filepath.Join(dir, "clock.c"), "-ldl").CombinedOutput(); err != nil {
		t.Fatalf("compile: %v\n%s", err, out)
	}
	pg := lab.PostgresForTest(t, lab.PostgresOptions{Env: []string{"LD_PRELOAD=" + library}})
	at := cluster.Cluster{Conninfo: pg.Conninfo()}
	ask := func() []health.Finding { return health.AskServer(t.Context(), "main", at, both).Findings(both) }
	if s := health.AskServer(t.Context(), "main", at, both); s.Skew != 0 {
		t.Errorf("the clock of a server on this host is ahead by %v", s.Skew)
	}
	for _, c := range []struct {
		seconds  int
		severity health.Severity
	}{{60, health.Warning}, {360, health.Critical}} {
		write("ahead", make([]byte, c.seconds))
		f := sick(t, "clock-skew", c.severity, ask, func(fix string) { write("ahead", nil) }) // as chrony does
		if !strings.Contains(f.What, "the clock of PostgreSQL is") || !strings.Contains(f.Fix, "chrony") {
			t.Errorf("%+v", f)
		}
	}
}

// A minor version that its release notes warn of, and a newer one on the same
// data.
func TestABadMinorIsFound(t *testing.T) {
	t.Parallel()
	dir := lab.DirForTest(t)
	var pg *lab.Postgres
	start := func(version int) {
		t.Helper()
		var err error
		if pg, err = lab.StartPostgres(t.Context(), lab.PostgresOptions{Dir: dir, Version: version}); err != nil {
			t.Fatal(err)
		}
	}
	start(170001)
	defer func() { pg.Stop() }()
	duty := health.Duty{Physical: true}
	ask := func() []health.Finding {
		return health.AskServer(t.Context(), "main", cluster.Cluster{Conninfo: pg.Conninfo()}, duty).Findings(duty)
	}
	f := sick(t, "bad-minor", health.Warning, ask, func(string) {
		if err := pg.Stop(); err != nil {
			t.Fatal(err)
		}
		start(17)
	})
	if !strings.Contains(f.What, "PostgreSQL 17.1 is known to be bad") || !strings.Contains(f.Fix, "install PostgreSQL 17.2 or a newer one") {
		t.Errorf("%+v", f)
	}
}

func TestDiskFindings(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "spool")
	ask := func() []health.Finding { return health.AskDisk("dumps", dir, true).Findings("main") }
	sick(t, "directory", health.Critical, ask, func(fix string) {
		_, command, _ := strings.Cut(fix, ": ")
		words := strings.Fields(command)
		if out, err := exec.CommandContext(t.Context(), words[0], words[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%s: %v\n%s", command, err, out)
		}
	})
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
		f := sick(t, "disk-space", c.want, ask, func(string) {
			if err := os.Remove(fill); err != nil {
				t.Fatal(err)
			}
		})
		if f.Cluster != "main" || !strings.Contains(f.Fix, dir) {
			t.Errorf("with %d bytes taken: %+v", c.bytes, f)
		}
	}
	d = health.AskDisk("dumps", dir, true)
	d.Needs = 2 << 20 // for what is to come
	if f, ok := find(d.Findings("main"), "disk-space"); !ok || f.Severity != health.Warning {
		t.Errorf("of a disk that is too small: %+v", f)
	}
}
