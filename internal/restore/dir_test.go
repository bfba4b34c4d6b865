package restore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

var latestMoment = restore.Target{Kind: restore.Latest}

// sound fails unless pg_verifybackup finds nothing wrong, and the directory is
// as PostgreSQL wants it.
func (s *site) sound(p restore.Physical) {
	s.t.Helper()
	s.verifyBackup(p.Dir)
	parent, err := os.Stat(filepath.Dir(p.Dir))
	if err != nil {
		s.t.Fatal(err)
	}
	owner := parent.Sys().(*syscall.Stat_t).Uid
	err = filepath.WalkDir(filepath.Dir(p.Dir), func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		want := fs.FileMode(0o600)
		if d.IsDir() {
			want = 0o700
		}
		if st := info.Sys().(*syscall.Stat_t); st.Uid != owner || d.Type()&fs.ModeSymlink == 0 && info.Mode().Perm() != want {
			s.t.Errorf("%s has mode %v and owner %d", name, info.Mode(), st.Uid)
		}
		if strings.Contains(d.Name(), "pgkeep") {
			s.t.Errorf("%s was left behind", name)
		}
		return nil
	})
	if err != nil {
		s.t.Error(err)
	}
}

// tree is all that stands below a directory: names, modes and contents.
func tree(t testing.TB, dir string) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		what := fmt.Sprint(info.Mode())
		if d.Type().IsRegular() {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			what += string(b)
		}
		all[name] = what
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// P25, C10: nothing that is there is touched, without or with --delta.
func TestC10ARestoreRefusesPlacesThatHoldSomething(t *testing.T) {
	s := newSite(t)
	s.take()
	other := lab.PostgresForTest(t, lab.PostgresOptions{Dir: s.mkdir("other")})
	if err := other.Stop(); err != nil {
		t.Fatal(err)
	}
	held := s.mkdir("held")
	s.write("held/keep", "me")
	for what, tt := range map[string]struct {
		change func(*restore.Physical)
		want   fail.Kind
		says   string
	}{
		"a directory that is not empty":      {func(p *restore.Physical) { p.Dir = held }, fail.NotEmpty, "--delta"},
		"the same, with delta":               {func(p *restore.Physical) { p.Dir, p.Delta = held, true }, fail.NotEmpty, "old data directory"},
		"a server that runs":                 {func(p *restore.Physical) { p.Dir = s.pg.DataDir }, fail.NotEmpty, "stop it first"},
		"the same, with delta ":              {func(p *restore.Physical) { p.Dir, p.Delta = s.pg.DataDir, true }, fail.NotEmpty, "stop it first"},
		"another system, with delta":         {func(p *restore.Physical) { p.Dir, p.Delta = other.DataDir, true }, fail.WrongSystem, "right directory"},
		"a tablespace that is not empty":     {func(p *restore.Physical) { p.Tablespaces[s.space] = held }, fail.NotEmpty, "--tablespace-map"},
		"the tablespace of the source":       {func(p *restore.Physical) { p.Tablespaces = nil }, fail.NotEmpty, "--tablespace-map"},
		"a tablespace in the data directory": {func(p *restore.Physical) { p.Tablespaces[s.space] = p.Dir + "/space" }, fail.BadConfig, "--tablespace-map"},
		"a tablespace that there is not":     {func(p *restore.Physical) { p.Tablespaces["4711"] = "/nowhere" }, fail.BadConfig, "it has: " + s.space},
		"a directory in none":                {func(p *restore.Physical) { p.Dir = s.dir + "/no/such" }, fail.BadConfig, "make it first"},
		"a standby of the past":              {func(p *restore.Physical) { p.Standby, p.Target = true, restore.Target{Kind: restore.Immediate} }, fail.BadConfig, ""},
	} {
		p := s.physical("fresh", latestMoment)
		tt.change(&p)
		before := tree(t, s.dir+"/held")
		_, err := p.Plan(t.Context())
		if !errors.Is(err, tt.want) || !strings.Contains(fail.HintOf(err), tt.says) {
			t.Errorf("%s: %v; %s", what, err, fail.HintOf(err))
		}
		if diff := cmp.Diff(before, tree(t, s.dir+"/held")); diff != "" {
			t.Errorf("%s: %s", what, diff)
		}
		if entries, err := os.ReadDir(s.dir + "/fresh"); err != nil || len(entries) > 0 {
			t.Errorf("%s: left %v (%v)", what, entries, err)
		}
	}
	if os.Getuid() == 0 {
		p := s.physical("fresh", latestMoment)
		root := t.TempDir() // of root
		p.Dir, p.Tablespaces[s.space] = filepath.Join(root, "data"), filepath.Join(root, "space")
		if _, err := p.Plan(t.Context()); !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "--owner") {
			t.Errorf("in a directory of root: %v", err)
		}
		p.Owner = "postgres"
		if plan, err := p.Plan(t.Context()); err != nil || plan.Owner != "postgres" {
			t.Errorf("with an owner: %q (%v)", plan.Owner, err)
		}
	}
}

// P26, P31: a restore that was cut off anywhere leaves nothing that starts, and
// goes on when it is run again.
func TestC10ARestoreThatWasCutOffGoesOn(t *testing.T) {
	s := newSite(t)
	s.rows(40)
	first := s.take()
	s.rows(5)
	s.take()
	cut := 0
	for at := 1; ; at += 1 + at/2 {
		p := s.physical(fmt.Sprint("cut", at), latestMoment)
		plan, err := p.Plan(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		whole := p.Repo
		f := &fault.Store{Store: s.store, At: at}
		if p.Repo, err = repo.Open(t.Context(), f, s.access); err == nil {
			_, err = p.Run(t.Context(), plan)
		}
		if !f.Hit() {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if err == nil {
			t.Fatalf("call %d failed, and nobody noticed", at)
		}
		if _, err := os.Lstat(filepath.Join(p.Dir, "global/pg_control")); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("cut off at call %d, there is a pg_control (%v)", at, err)
		}
		p.Repo = whole
		if _, err := os.Lstat(p.Dir); err == nil {
			cut++
			other := p
			other.Backup = first
			if _, err := other.Plan(t.Context()); !errors.Is(err, fail.NotEmpty) || !strings.Contains(fail.HintOf(err), "name that backup to go on") {
				t.Errorf("cut off at call %d, another backup goes into the same directory: %v", at, err)
			}
			if plan, err := p.Plan(t.Context()); err != nil || plan.State != restore.Unfinished {
				t.Fatalf("cut off at call %d, it is %q (%v)", at, plan.State, err)
			}
		}
		s.restored(p)
		s.sound(p)
		if again, err := p.Plan(t.Context()); !errors.Is(err, fail.NotEmpty) {
			t.Errorf("once more over a finished one: %+v (%v)", again.State, err)
		}
	}
	if cut < 5 {
		t.Errorf("cut off %d times: the test has lost its point", cut)
	}
}

// A restore that is interrupted stops.
func TestARestoreStopsWhenItIsTold(t *testing.T) {
	s := newSite(t)
	s.take()
	p := s.physical("stopped", latestMoment)
	plan, err := p.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	p.Progress = func(string, int64, int64) { cancel() }
	if _, err := p.Run(ctx, plan); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	p.Progress = nil
	s.restored(p)
	s.sound(p)
}

// P25: delta makes an old data directory what the backup was, and touches
// nothing that it links to.
func TestDeltaMakesAnOldDirectoryWhatTheBackupWas(t *testing.T) {
	s := newSite(t)
	s.rows(40)
	s.take()
	s.archived()
	p := s.physical("old", latestMoment)
	s.restored(p)
	want := tree(t, p.Dir)
	outside := s.mkdir("outside")
	s.write("outside/keep", "me")
	at := func(name string) string { return filepath.Join(p.Dir, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(at("global/1260"))
	must(err)
	b[100] ^= 1
	must(os.WriteFile(at("global/1260"), b, 0o600))
	must(os.Truncate(at("global/1262"), 100))
	must(os.WriteFile(at("base/1/longer"), bytes.Repeat([]byte("x"), 10_000), 0o644))
	must(os.MkdirAll(at("base/99999/deep"), 0o755))
	must(os.Remove(at("PG_VERSION")))
	must(os.Symlink(outside, at("PG_VERSION"))) // a file that is a link
	must(os.RemoveAll(at("pg_xact")))
	must(os.Symlink(outside, at("pg_xact"))) // a directory that is a link
	must(os.RemoveAll(at("pg_wal")))
	must(os.Symlink(outside, at("pg_wal")))
	must(os.Symlink(outside, at("base/link")))
	must(os.WriteFile(at("pg_stat/pgstat.stat"), []byte("old"), 0o600))
	must(os.WriteFile(at("standby.signal"), nil, 0o600))
	must(os.WriteFile(at("postmaster.pid"), []byte("999999999\n"), 0o600)) // of a server that died
	other := filepath.Join(filepath.Dir(p.Dir), "space/other")
	must(os.Mkdir(other, 0o755))
	must(os.WriteFile(filepath.Join(other, "file"), []byte("not ours"), 0o644)) // of root, if we are
	owners := func() (all [2]string) {
		t.Helper()
		for i, name := range []string{other, filepath.Join(other, "file")} {
			info, err := os.Stat(name)
			must(err)
			all[i] = fmt.Sprint(info.Mode(), info.Sys().(*syscall.Stat_t).Uid)
		}
		return all
	}
	foreign := owners()

	p.Delta = true
	plan := s.restored(p)
	if plan.State != restore.Existing || len(plan.Notes) != 1 {
		t.Errorf("the plan is %+v", plan)
	}
	have := tree(t, p.Dir)
	if diff := cmp.Diff(want, have); diff != "" {
		t.Error(diff)
	}
	if got := tree(t, outside); len(got) != 2 || !strings.HasSuffix(got[filepath.Join(outside, "keep")], "me") {
		t.Errorf("outside is now %q", got)
	}
	if b, err := os.ReadFile(filepath.Join(other, "file")); err != nil || string(b) != "not ours" {
		t.Errorf("what stood beside ours in the tablespace: %q (%v)", b, err)
	}
	if diff := cmp.Diff(foreign, owners()); diff != "" {
		t.Errorf("what stood beside ours in the tablespace: %s", diff)
	}
	must(os.RemoveAll(other))
	s.sound(p)
}

// P30: what an earlier life, or the source, had set does not lead the server
// astray, nor to the source.
func TestOldSettingsAreOutOfForce(t *testing.T) {
	s := newSite(t)
	s.exec("ALTER SYSTEM SET recovery_target_name = 'elsewhere'", "ALTER SYSTEM SET recovery_target_timeline = 'current'",
		"ALTER SYSTEM SET archive_command = 'touch /tmp/never'", "ALTER SYSTEM SET primary_conninfo = 'host=source'",
		"ALTER SYSTEM SET work_mem = '5MB'", "SELECT pg_create_restore_point('here it''s')")
	s.take()
	s.exec("SELECT pg_create_restore_point('there it''s')")
	s.archived()
	p := s.physical("old settings", restore.Target{Kind: restore.ToName, Name: "there it's"})
	p.Action = ""
	s.restored(p)
	server, err := s.start(p, map[string]string{"hot_standby": "on"})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Kill()
	s.until("recovery has come to the target", func() bool { return query[string](t, server, "SELECT pg_get_wal_replay_pause_state()") == "paused" })
	for name, want := range map[string]string{
		"recovery_target_name": "there it's", "recovery_target_timeline": "1", "recovery_target_time": "", "archive_mode": "off", "archive_command": "(disabled)",
		"primary_conninfo": "", "work_mem": "5MB", "max_logical_replication_workers": "0",
	} {
		if have := query[string](t, server, "SHOW "+name); have != want {
			t.Errorf("%s is %q, want %q", name, have, want)
		}
	}
	conf, err := os.ReadFile(filepath.Join(p.Dir, "postgresql.auto.conf"))
	if err != nil || !strings.Contains(string(conf), "# pgkeep restore took out: recovery_target_name = 'elsewhere'") {
		t.Errorf("postgresql.auto.conf says (%v)\n%s", err, conf)
	}
}

// P29, C4: when the end of the log has been lost since the plan was made,
// recovery fails. It does not end early.
func TestC4RecoveryFailsWhereTheLogWasLost(t *testing.T) {
	s := newSite(t)
	s.rows(5)
	s.take()
	s.rows(30)
	last := s.archived()
	p := s.physical("lost", latestMoment)
	if plan := s.restored(p); plan.LastWAL != last {
		t.Errorf("the last segment is %s, want %s", plan.LastWAL, last)
	}
	found, err := filepath.Glob(filepath.Join(s.dir, "repository/clusters/main/wal/*/*", last+".zst"))
	if err != nil || len(found) != 1 {
		t.Fatal(found, err)
	}
	if err := os.Rename(found[0], filepath.Join(s.dir, "aside")); err != nil {
		t.Fatal(err)
	}
	if server, err := s.start(p, nil); err == nil {
		server.Kill()
		t.Fatal("it opened")
	} else if !strings.Contains(err.Error(), "it is missing, and when the restore was planned the archive held the log up to "+last) {
		t.Error(err)
	}
	if err := os.Rename(filepath.Join(s.dir, "aside"), found[0]); err != nil {
		t.Fatal(err)
	}
	server, err := s.start(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Kill()
	if diff := cmp.Diff(seqs(t, s.pg), seqs(t, server)); diff != "" {
		t.Error(diff)
	}
}

// A standby follows the archive.
func TestAStandbyFollowsTheArchive(t *testing.T) {
	s := newSite(t)
	s.take()
	p := s.physical("standby", latestMoment)
	p.Standby = true
	s.restored(p)
	server, err := s.start(p, map[string]string{"hot_standby": "on", "wal_retrieve_retry_interval": "100ms"})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Kill()
	s.rows(20)
	s.archived()
	s.until("the standby has the rows", func() bool { return slices.Equal(seqs(t, s.pg), seqs(t, server)) })
}

// The configuration from outside of the data directory comes back beside it, if
// it is wanted; and the plan says what the server's user may not read.
func TestConfigurationFromOutsideComesBackBesideTheDirectory(t *testing.T) {
	s := newSite(t)
	hba := s.write("pg_hba.conf", "local all all trust # of ours\n")
	if err := s.pg.Restart(t.Context(), map[string]string{"hba_file": hba}); err != nil {
		t.Fatal(err)
	}
	s.take()
	p := s.physical("config", latestMoment)
	if plan, err := p.Plan(t.Context()); err != nil || len(plan.Config) != 1 || len(plan.Notes) != 1 || !strings.Contains(plan.Notes[0], "--config-dir") {
		t.Errorf("the plan is %+v (%v)", plan, err)
	}
	p.ConfigDir = filepath.Join(filepath.Dir(p.Dir), "etc")
	closed := filepath.Join(t.TempDir(), "closed.yaml")
	if err := os.WriteFile(closed, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for what, dir := range map[string]string{"in the data directory": p.Dir + "/etc", "above a tablespace": filepath.Dir(p.Dir), "a tablespace": p.Tablespaces[s.space]} {
		q := p
		q.ConfigDir = dir
		if _, err := q.Plan(t.Context()); !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "--config-dir") {
			t.Errorf("%s: %v; %s", what, err, fail.HintOf(err))
		}
	}
	// One that was cut off goes on, if it puts the configuration where it did before.
	plan, err := p.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	p.Progress = func(string, int64, int64) { // the signal file, which comes late, cannot be made
		if err := os.MkdirAll(filepath.Join(p.Dir, "recovery.signal/x"), 0o700); err != nil {
			t.Error(err)
		}
	}
	if _, err := p.Run(t.Context(), plan); err == nil {
		t.Fatal("the test has lost its point")
	}
	p.Progress = nil
	if names, err := os.ReadDir(p.ConfigDir); err != nil || len(names) == 0 {
		t.Fatalf("the configuration is not there yet (%v): the test has lost its point", err)
	}
	q := p
	q.ConfigDir = s.mkdir("held")
	s.write("held/keep", "me")
	if _, err := q.Plan(t.Context()); !errors.Is(err, fail.NotEmpty) {
		t.Errorf("elsewhere: %v", err)
	}
	p.Needs = []string{s.config, closed}
	plan = s.restored(p)
	if closedTo := os.Getuid() == 0; closedTo != (len(plan.Notes) == 1 && strings.Contains(plan.Notes[0], "closed.yaml, and may not read it")) {
		t.Errorf("notes are %q", plan.Notes)
	}
	s.sound(p)
	found, err := filepath.Glob(filepath.Join(p.ConfigDir, "*", "pg_hba.conf"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%v (%v) in %v", found, err, tree(t, filepath.Dir(p.Dir)))
	}
	if b, err := os.ReadFile(found[0]); err != nil || !strings.Contains(string(b), "of ours") {
		t.Errorf("it says %q (%v)", b, err)
	}
}

// A link of the administrator's in the data directory, to a certificate for
// instance, comes back as the link that it was. Where it leads to a file of the
// configuration, that is in the backup.
func TestALinkInTheDataDirectoryComesBack(t *testing.T) {
	s := newSite(t)
	key := s.write("server.key", "secret")
	more := s.write("more.conf", "work_mem = '5MB'\n")
	conf, err := os.OpenFile(filepath.Join(s.pg.DataDir, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = conf.WriteString("include 'included.conf'\n")
	if err := errors.Join(err, conf.Close(), os.Symlink(key, filepath.Join(s.pg.DataDir, "server.key")), os.Symlink(more, filepath.Join(s.pg.DataDir, "included.conf"))); err != nil {
		t.Fatal(err)
	}
	s.rows(5)
	s.take()
	s.archived()
	p := s.physical("linked", latestMoment)
	for _, state := range []restore.DirState{restore.New, restore.Existing} {
		p.Delta = state == restore.Existing
		plan := s.restored(p)
		if plan.State != state || len(plan.Notes) != 2 || !strings.Contains(plan.Notes[0], "server.key is a link to "+key) ||
			!strings.HasPrefix(plan.Notes[1], "1 files of the configuration") || !slices.Equal(plan.Config, []string{"included.conf"}) {
			t.Errorf("the plan is %+v", plan)
		}
		if to, err := os.Readlink(filepath.Join(p.Dir, "server.key")); err != nil || to != key {
			t.Errorf("%s: the link leads to %q (%v)", state, to, err)
		}
	}
	if b, err := os.ReadFile(key); err != nil || string(b) != "secret" {
		t.Errorf("what it leads to is %q (%v)", b, err)
	}
	server, err := s.start(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Kill()
	if diff := cmp.Diff(seqs(t, s.pg), seqs(t, server)); diff != "" {
		t.Error(diff)
	}
}

// Class C10: no place is written to that is not allowed, a tablespace's that only
// the backup names neither.
func TestC10EveryPlaceMustBeAllowed(t *testing.T) {
	s := newSite(t)
	s.take()
	source, space := s.pg.DataDir, filepath.Join(s.dir, "space")
	for _, dir := range []string{source, space} { // as on another host, where all is free
		if err := os.Rename(dir, dir+"-aside"); err != nil {
			t.Fatal(err)
		}
		defer os.Rename(dir+"-aside", dir)
	}
	p := s.physical("allowed", latestMoment)
	p.ConfigDir = filepath.Join(filepath.Dir(p.Dir), "etc")
	var asked []string
	forbidden := ""
	no := errors.New("not there")
	p.Allowed = func(dir string) error {
		asked = append(asked, dir)
		if dir == forbidden {
			return no
		}
		return nil
	}
	mapped := p.Tablespaces
	p.Tablespaces = nil
	plan, err := p.Plan(t.Context())
	if want := []string{p.Dir, p.ConfigDir, space}; err != nil || !slices.Equal(asked, want) {
		t.Errorf("asked about %q, want %q (%v)", asked, want, err)
	}
	for _, forbidden = range asked[:len(asked):len(asked)] {
		if _, err := p.Plan(t.Context()); !errors.Is(err, no) {
			t.Errorf("plan, without %s: %v", forbidden, err)
		}
		if _, err := p.Run(t.Context(), plan); !errors.Is(err, no) {
			t.Errorf("run, without %s: %v", forbidden, err)
		}
		for _, dir := range []string{p.Dir, p.ConfigDir, space} {
			if _, err := os.Lstat(dir); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("without %s, %s is there (%v)", forbidden, dir, err)
			}
		}
	}
	p.Tablespaces, forbidden = mapped, space
	if _, err := p.Plan(t.Context()); err != nil {
		t.Errorf("mapped elsewhere: %v", err)
	}
}

// A server in another container has a process number that means nothing here, and
// its data directory was written over.
func TestC10AServerInAnotherContainerIsNoticed(t *testing.T) {
	s := newSite(t)
	s.take()
	s.archived()
	text, err := os.ReadFile(filepath.Join(s.pg.DataDir, "postmaster.pid"))
	if err != nil {
		t.Fatal(err)
	}
	memory := strings.Split(string(text), "\n")[6]
	listener := func(network, address string) net.Listener {
		l, err := net.Listen(network, address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		return l
	}
	port := fmt.Sprint(listener("tcp", "127.0.0.1:0").Addr().(*net.TCPAddr).Port)
	sockets := t.TempDir()
	listener("unix", sockets+"/.s.PGSQL.5433")
	const gone = "2000000000\n/data\n1790000000\n" // no number of a process is so high
	if err := os.WriteFile(sockets+"/.s.PGSQL.5433.lock", []byte(gone+"5433\n"+sockets+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := s.physical("there", latestMoment)
	p.Delta = true
	if out, err := exec.Command("cp", "-a", s.pg.DataDir, p.Dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for what, tt := range map[string]struct {
		lines string
		runs  bool
	}{
		"its memory is in use":            {gone + "5432\n\n\n" + memory + "\nready   \n", true},
		"another's memory":                {gone + "5432\n\n\n1 " + strings.Fields(memory)[1] + "\nready   \n", false},
		"its socket answers":              {gone + "5433\n" + sockets + "\n\n0 0\n", true},
		"another's socket answers":        {"2000000001\n/data\n1790000000\n5433\n" + sockets + "\n127.0.0.1\n0 0\n", false},
		"its port answers":                {gone + port + "\n/nowhere\n127.0.0.1\n0 0\n", true},
		"its port answers, as all do":     {gone + port + "\n/nowhere\n*\n0 0\n", true},
		"nothing answers":                 {gone + "5433\n/nowhere\n\n0 0\n", false},
		"it was left by a session of one": {"-2000000000\n/data\n1790000000\n", false},
		"it was cut off":                  {"2000000000", false},
	} {
		if err := os.WriteFile(filepath.Join(p.Dir, "postmaster.pid"), []byte(tt.lines), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := p.Plan(t.Context())
		if refused := errors.Is(err, fail.NotEmpty) && strings.Contains(fail.HintOf(err), "stop it first"); refused != tt.runs || err != nil && !refused {
			t.Errorf("%s: %v; %s", what, err, fail.HintOf(err))
		}
	}
}
