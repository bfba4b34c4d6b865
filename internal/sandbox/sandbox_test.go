package sandbox_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// TestMain lets this program be the runner that tests kill, too.
func TestMain(m *testing.M) {
	sandbox.Enter()
	if len(os.Args) == 4 && os.Args[1] == "runner" {
		if err := runner(os.Args[2], os.Args[3]); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runner holds a sandbox and a server in some state, says so, and waits to be
// killed.
func runner(parent, state string) error {
	ctx := context.Background()
	if state == "place" {
		place := filepath.Join(parent, "place")
		_, cerr := sandbox.Collect(ctx, place, nil)
		_, err := sandbox.Make(ctx, sandbox.Options{Parent: place, Name: "x"})
		fmt.Printf("Collect: %v, %s; Make: %v, %s, hint: %s\n", cerr, fail.KindOf(cerr), err, fail.KindOf(err), fail.HintOf(err))
		_, err = io.Copy(io.Discard, os.Stdin)
		return err
	}
	bare := strings.HasPrefix(state, "bare ")
	s, err := sandbox.Make(ctx, sandbox.Options{Parent: parent, Name: "killed", BestEffort: bare})
	if err != nil {
		return err
	}
	if bare {
		sandbox.Refuse(s)
	}
	if err := s.Create(ctx, major()); err != nil {
		return err
	}
	switch strings.TrimPrefix(state, "bare ") {
	case "replaying":
		_, err := s.Recover(ctx, sandbox.Recovery{Command: "sleep 1000; true", Progress: func(doing string) {
			if doing != "" {
				fmt.Println(doing)
			}
		}})
		return err
	case "open":
		if err := s.Open(ctx); err != nil {
			return err
		}
		conn, err := s.Connect(ctx, "postgres")
		if err != nil {
			return err
		}
		go conn.Exec(ctx, "SELECT sum(i) FROM generate_series(1, 1000000000000) i") // a session that is busy
		fmt.Printf("open %+v\n", s.Isolation())
	}
	_, err = io.Copy(io.Discard, os.Stdin) // until the test is over
	return err
}

// major is the newest PostgreSQL there is.
func major() (newest int) {
	dirs, _ := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	for _, d := range dirs {
		n, _ := strconv.Atoi(strings.Split(d, "/")[4])
		newest = max(newest, n)
	}
	return newest
}

func scratch(t *testing.T) string {
	t.Helper()
	return lab.DirForTest(t)
}

func create(t *testing.T, opt sandbox.Options) *sandbox.Sandbox {
	t.Helper()
	if opt.Parent == "" {
		opt.Parent = scratch(t)
	}
	if opt.Name == "" {
		opt.Name = "test"
	}
	s, err := sandbox.Make(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Remove(); err != nil {
			t.Error(err)
		}
	})
	if err := s.Create(t.Context(), major()); err != nil {
		t.Fatal(err)
	}
	return s
}

func connect(t *testing.T, s *sandbox.Sandbox) *pgx.Conn {
	t.Helper()
	conn, err := s.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// program runs a program through the server and returns what it prints.
func program(t *testing.T, conn *pgx.Conn, command string) string {
	t.Helper()
	sql := "CREATE TEMP TABLE IF NOT EXISTS o (line text); TRUNCATE o; COPY o FROM PROGRAM '" + command + "' (DELIMITER E'\\x01')"
	if _, err := conn.Exec(t.Context(), sql, pgx.QueryExecModeSimpleProtocol); err != nil {
		t.Fatal(err)
	}
	rows, err := conn.Query(t.Context(), "SELECT line FROM o")
	if err != nil {
		t.Fatal(err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

func TestServerHasNothing(t *testing.T) {
	t.Setenv("PGKEEP_SECRET", "canary")
	s := create(t, sandbox.Options{Memory: 256 << 20, User: "daemon"}) // who has nothing else
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn := connect(t, s)
	if env := program(t, conn, "env"); strings.Contains(env, "canary") || strings.Contains(env, "HOME=/root") {
		t.Errorf("environment of the server:\n%s", env)
	}
	status := program(t, conn, "cat /proc/self/status")
	if !strings.Contains(status, "NoNewPrivs:\t1") {
		t.Errorf("the server may gain rights:\n%s", status)
	}
	is := s.Isolation()
	if dev := program(t, conn, "cat /proc/net/dev"); is.Network && strings.Count(dev, ":") != 1 { // only lo, which is down
		t.Errorf("the server has a network:\n%s", dev)
	}
	if !is.Network || !is.Processes || !is.Files || os.Getuid() == 0 && !is.Own {
		t.Errorf("isolation: %+v", is)
	}
	for _, f := range []struct{ shows, want string }{
		{"cat /proc/[0-9]*/comm | grep -vxE \"postgres|sh|cat|grep\"; :", ""},
		{"ls -A /etc | grep -vxE \"passwd|group|nsswitch.conf|hosts|ld.so.cache|alternatives|localtime|ssl|pki|crypto-policies\"; :", ""},
		{"ls -A /etc/ssl", "openssl.cnf"},
		{"ls -A / | grep -vxE \"bin|sbin|lib|lib32|lib64|libx32|usr|dev|etc|proc|nix|opt|var\"; ls -d /var/lib /var/run 2>/dev/null; :", strings.TrimPrefix(first(s.Data()), "dev")}, // which is there, in memory
		{"ls -A /dev | tr \"\\\\n\" \" \"", "fd full null random shm stderr stdin stdout urandom zero "},
		{"ls -A " + filepath.Dir(s.Data()) + " | tr \"\\\\n\" \" \"", "conf data run tablespaces "},
		{"grep -c . /etc/passwd", "2"},
		{"touch /x /etc/x /usr/x " + filepath.Dir(s.Data()) + "/conf/x 2>/dev/null; :", ""},
		{"ls /x /etc/x /usr/x " + filepath.Dir(s.Data()) + "/conf/x 2>/dev/null; :", ""},
	} {
		if got := program(t, conn, f.shows); got != f.want {
			t.Errorf("%s: %q, want %q", f.shows, got, f.want)
		}
	}
	if id := program(t, conn, "id -un"); id != is.User || id == "root" {
		t.Errorf("the server runs as %s, and should as %s", id, is.User)
	}
	var listens, workers string
	if err := conn.QueryRow(t.Context(), "SELECT current_setting('listen_addresses'), (SELECT string_agg(backend_type, ' ' ORDER BY 1) FROM pg_stat_activity WHERE backend_type NOT IN ('client backend'))").
		Scan(&listens, &workers); err != nil || listens != "" || workers != "background writer checkpointer walwriter" {
		t.Errorf("listens at %q; runs %q; %v", listens, workers, err)
	}
	var n int
	err := conn.QueryRow(t.Context(), "SELECT length(repeat('x', 900000000))").Scan(&n)
	if err == nil || !strings.Contains(err.Error(), "out of memory") {
		t.Errorf("with 256 MiB, a value of 900 MB: %d, %v", n, err)
	}
}

// first is the first part of a path.
func first(path string) string { return strings.Split(path, "/")[1] }

// One who is somebody's already is not the server's own.
func TestUserOfOthersIsNotItsOwn(t *testing.T) {
	if os.Getuid() != 0 {
		return // nor is the one who runs this
	}
	s := create(t, sandbox.Options{User: "daemon"})
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	other := create(t, sandbox.Options{User: "daemon"})
	if is := other.Isolation(); is.Own {
		t.Errorf("beside a server of the same user: %+v", is)
	}
}

// Where the kernel refuses to isolate, nothing restored is opened, unless somebody
// has said that it may be.
func TestWithoutIsolationNothingOpens(t *testing.T) {
	s := create(t, sandbox.Options{})
	sandbox.Refuse(s)
	_, tried := s.Try()
	for what, err := range map[string]error{"Try": tried, "Open": s.Open(t.Context())} {
		if !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "restore_test.isolation: best-effort") {
			t.Errorf("%s = %v, hint %q", what, err, fail.HintOf(err))
		}
	}
	easy, err := sandbox.Make(t.Context(), sandbox.Options{Parent: scratch(t), Name: "easy", BestEffort: true})
	if err != nil {
		t.Fatal(err)
	}
	defer easy.Remove()
	sandbox.Refuse(easy)
	if is, err := easy.Try(); err != nil || is.Files || is.Network || is.Processes {
		t.Errorf("with the best effort: %+v, %v", is, err)
	}
}

// What the source's superuser prepared for whoever opens the data.
func TestHostileDataDoesNothing(t *testing.T) {
	s := create(t, sandbox.Options{})
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn := connect(t, s)
	for _, sql := range []string{
		"CREATE FUNCTION spy() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'spied'; END $$",
		"CREATE EVENT TRIGGER spy ON ddl_command_start EXECUTE FUNCTION spy()",
		"ALTER DATABASE postgres SET session_preload_libraries = 'evil'",
		"ALTER ROLE " + sandbox.Superuser + " SET statement_timeout = 1",
		"ALTER ROLE " + sandbox.Superuser + " CONNECTION LIMIT 0",
	} {
		if _, err := conn.Exec(t.Context(), sql); err != nil {
			t.Fatal(err)
		}
	}
	conn.Close(t.Context())
	if err := s.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	trace := filepath.Join(s.Tablespaces(), "trace")
	evil := fmt.Sprintf(`
shared_preload_libraries = 'evil'
listen_addresses = '*'
archive_mode = on
archive_command = 'touch %[1]s'
restore_command = 'touch %[1]s; false'
recovery_end_command = 'touch %[1]s'
archive_cleanup_command = 'touch %[1]s'
ssl = on
ssl_passphrase_command = 'touch %[1]s'
external_pid_file = '%[1]s'
logging_collector = on
log_directory = '%[1]s'
primary_conninfo = 'host=source'
recovery_target_action = 'pause'
no_such_setting = 1
`, trace)
	for _, name := range []string{"postgresql.conf", "postgresql.auto.conf"} {
		if err := os.WriteFile(filepath.Join(s.Data(), name), []byte(evil), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	os.WriteFile(filepath.Join(s.Data(), "standby.signal"), nil, 0o600)
	if err := s.Confine(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recover(t.Context(), sandbox.Recovery{Command: "false"}); err != nil {
		t.Fatal(err)
	}
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	conn = connect(t, s)
	if _, err := conn.Exec(t.Context(), "CREATE TABLE public.t ()"); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(trace); err == nil {
		t.Error("something of the source's was run")
	}
}

func TestLinksOutOfTheSandboxAreRefused(t *testing.T) {
	s := create(t, sandbox.Options{})
	for name, to := range map[string]string{
		"a directory of the host":  "/etc",
		"a file of the host":       "/etc/passwd",
		"a way around":             s.Data() + "/../../../../etc",
		"a neighbour by its name":  filepath.Dir(s.Data()) + "-other",
		"something that is nobody": "/nonexistent",
	} {
		link := filepath.Join(s.Data(), "pg_tblspc", "1")
		if name == "a neighbour by its name" {
			if err := os.Mkdir(to, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink(to, link); err != nil {
			t.Fatal(err)
		}
		if err := s.Confine(); err == nil {
			t.Errorf("%s is not refused", name)
		}
		os.Remove(link)
	}
	fifo := filepath.Join(s.Data(), "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := s.Confine(); !errors.Is(err, fail.BadConfig) {
		t.Errorf("a pipe: %v", err)
	}
	os.Remove(fifo)
	if err := s.Confine(); err != nil {
		t.Error(err)
	}
}

// A link that is no tablespace's leads nowhere in the sandbox, and is no obstacle.
func TestOtherLinksOutOfTheSandboxAreRemoved(t *testing.T) {
	s := create(t, sandbox.Options{})
	outside := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(outside, []byte("secret"), 0o640); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(s.Data(), "certs"), 0o700); err != nil {
		t.Fatal(err)
	}
	links := map[string]string{"server.key": outside, "certs/deep": filepath.Dir(outside), "dangling": "/nonexistent", "inside": "PG_VERSION"}
	for name, to := range links {
		if err := os.Symlink(to, filepath.Join(s.Data(), name)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Confine(); err != nil {
		t.Fatal(err)
	}
	for name := range links {
		if _, err := os.Lstat(filepath.Join(s.Data(), name)); (err == nil) != (name == "inside") {
			t.Errorf("%s: %v", name, err)
		}
	}
	info, err := os.Stat(outside)
	if err != nil || info.Mode() != 0o640 || int(info.Sys().(*syscall.Stat_t).Uid) != os.Getuid() {
		t.Errorf("what one led to is %+v (%v)", info, err)
	}
	if err := s.Open(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestServerThatStandsStillIsEnded(t *testing.T) {
	s := create(t, sandbox.Options{StallAfter: 2 * time.Second})
	_, err := s.Recover(t.Context(), sandbox.Recovery{Command: "sleep 1000; true"})
	if !errors.Is(err, fail.Stalled) || !strings.Contains(err.Error(), "in the restore command") {
		t.Errorf("Recover = %v", err)
	}
	if left := processes(filepath.Dir(s.Data())); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
}

// processes lists those that work below a directory.
func processes(dir string) (pids []string) {
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		if cwd, err := os.Readlink(p + "/cwd"); err == nil && strings.HasPrefix(cwd, dir) {
			pids = append(pids, filepath.Base(p))
		}
	}
	return pids
}

func eventually(t *testing.T, so func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !so() {
		select {
		case <-ctx.Done():
			t.Fatal("waited in vain")
		case <-tick.C:
		}
	}
}

// kill starts a runner, by way of a command if there is one, waits until it says that it is where it should be, and
// kills it.
func kill(t *testing.T, parent, state string, as *syscall.Credential, by ...string) (said string) {
	t.Helper()
	self := filepath.Join(parent, "runner")
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("cp", exe, self).CombinedOutput(); err != nil { // where another user reaches it
		t.Fatalf("%v: %s", err, out)
	}
	argv := append(by, self, "runner", parent, state)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: as, Pdeathsig: syscall.SIGKILL}
	cmd.Stderr, cmd.Env, cmd.Dir = os.Stderr, []string{"PATH=/usr/bin:/bin"}, "/"
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	said, err = bufio.NewReader(out).ReadString('\n')
	cmd.Process.Kill()
	cmd.Wait()
	if err != nil {
		t.Fatalf("%s: runner said %q: %v", state, said, err)
	}
	return said
}

func TestKilledRunnerLeavesNothing(t *testing.T) {
	for _, state := range []string{"replaying", "open", "bare replaying", "bare open"} {
		t.Run(state, func(t *testing.T) {
			parent := scratch(t)
			kill(t, parent, state, nil)
			dir := filepath.Join(parent, "pgkeep-sandbox-killed")
			eventually(t, func() bool { return len(processes(dir)) == 0 })
			if _, err := os.Stat(dir); err != nil {
				t.Fatalf("the runner had no sandbox: %v", err)
			}
			removed, err := sandbox.Collect(t.Context(), parent, nil)
			if err != nil || !slices.Equal(removed, []string{"killed"}) {
				t.Errorf("Collect = %v, %v", removed, err)
			}
			if _, err := os.Stat(dir); err == nil {
				t.Error("the sandbox is still there")
			}
		})
	}
}

func TestNextRunTakesOver(t *testing.T) {
	parent := scratch(t)
	kill(t, parent, "open", nil)
	s, err := sandbox.Make(t.Context(), sandbox.Options{Parent: parent, Name: "killed"})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Remove()
	if err := s.Open(t.Context()); err != nil {
		t.Fatal(err)
	}
	var one int
	if err := connect(t, s).QueryRow(t.Context(), "SELECT 1").Scan(&one); err != nil {
		t.Fatal(err)
	}
}

// Where pgkeep is not root, its server is alone in a user namespace, as the kernel
// allows that to everybody.
func TestWithoutRoot(t *testing.T) {
	parent := scratch(t)
	var as *syscall.Credential
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			t.Fatal(err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		as = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	if as == nil {
		t.Log(strings.TrimSpace(kill(t, parent, "open", nil)))
		return
	}
	for name, by := range map[string][]string{
		"alone": nil,
		// A part of /proc is covered: then there is no other for who is not root. And
		// there are no rights to be had.
		"as our unit of systemd has it": {"unshare", "--mount", "sh", "-c", `set -e
			mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys
			exec setpriv --reuid=` + fmt.Sprint(as.Uid) + ` --regid=` + fmt.Sprint(as.Gid) + ` --clear-groups --bounding-set=-all --no-new-privs "$@"`, "sh"},
	} {
		t.Run(name, func(t *testing.T) {
			who := as
			if by != nil {
				who = nil // setpriv does it
			}
			said := kill(t, parent, "open", who, by...)
			if !strings.Contains(said, "{Network:true Processes:true Files:true User:postgres Own:false}") {
				t.Errorf("isolation: %s", said)
			}
			eventually(t, func() bool { return len(processes(parent)) == 0 })
			if _, err := sandbox.Collect(t.Context(), parent, nil); err != nil {
				t.Fatal(err)
			}
		})
	}
}

func TestCollectLeavesWhatIsInUse(t *testing.T) {
	parent := scratch(t)
	used := create(t, sandbox.Options{Parent: parent, Name: "used"})
	for _, name := range []string{"kept", "left"} {
		s, err := sandbox.Make(t.Context(), sandbox.Options{Parent: parent, Name: name})
		if err != nil {
			t.Fatal(err)
		}
		if name == "kept" {
			if err := s.WriteNote([]byte("mine")); err != nil {
				t.Fatal(err)
			}
		}
		s.Release()
	}
	for _, other := range []string{"pgkeep-other", "data"} {
		if err := os.Mkdir(filepath.Join(parent, other), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	removed, err := sandbox.Collect(t.Context(), parent, func(name string, note []byte) bool { return name == "kept" && string(note) == "mine" })
	if err != nil || !slices.Equal(removed, []string{"left"}) {
		t.Errorf("Collect = %v, %v", removed, err)
	}
	entries, _ := os.ReadDir(parent)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if d := cmp.Diff([]string{"data", "pgkeep-other", "pgkeep-sandbox-kept", "pgkeep-sandbox-used"}, names); d != "" {
		t.Errorf("left (-want +got):\n%s", d)
	}
	if err := used.Open(t.Context()); err != nil {
		t.Error(err)
	}
	if removed, err := sandbox.Collect(t.Context(), filepath.Join(parent, "nowhere"), nil); err != nil || removed != nil {
		t.Errorf("Collect of no directory = %v, %v", removed, err)
	}
}

func TestMakeRefuses(t *testing.T) {
	parent := scratch(t)
	for name, opt := range map[string]sandbox.Options{
		"a name with a slash":   {Parent: parent, Name: "../x"},
		"no name":               {Parent: parent},
		"too long a path":       {Parent: filepath.Join(parent, strings.Repeat("x", 80)), Name: "x"},
		"a user who is nobody":  {Parent: parent, Name: "x", User: "no-such-user"},
		"the user root himself": {Parent: parent, Name: "x", User: "root"},
	} {
		if os.Getuid() != 0 && opt.User != "" {
			continue // there, it is not asked for
		}
		if s, err := sandbox.Make(t.Context(), opt); !errors.Is(err, fail.BadConfig) {
			t.Errorf("%s: %v, %v", name, s, err)
		}
	}
	if entries, _ := os.ReadDir(parent); len(entries) > 0 {
		t.Errorf("left: %v", entries)
	}
	used := create(t, sandbox.Options{Parent: parent, Name: "used"})
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := sandbox.Make(ctx, sandbox.Options{Parent: parent, Name: "used"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Make of one in use = %v", err)
	}
	used.Release()
}

// A host whose restore_test.directory was not the worker's had its restore tests
// tried for an hour, as what nobody knows is: no try makes it another's.
func TestADirectoryThatIsNotOursIsToldOf(t *testing.T) {
	root := os.Getuid() == 0
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, tt := range map[string]struct {
		make    func(place string)
		collect bool     // it cannot be looked into either
		as      string   // who runs it, of root's
		by      []string // how
	}{
		"a file in its place": {make: func(place string) { must(os.WriteFile(place, nil, 0o600)) }, collect: true},
		"a file above":        {make: func(place string) { must(os.Symlink("runner/x", place)) }, collect: true},
		"a link to nowhere":   {make: func(place string) { must(os.Symlink("nowhere", place)) }},
		"not to be written":   {make: func(place string) { must(os.Mkdir(place, 0o555)) }, as: "postgres"},
		"not to be read":      {make: func(place string) { must(os.Mkdir(place, 0o100)) }, collect: true, as: "postgres"},
		"another's sandbox": {make: func(place string) {
			must(os.MkdirAll(filepath.Join(place, "pgkeep-sandbox-x"), 0o700))
			must(os.Chmod(place, 0o777))
			must(os.Chmod(filepath.Join(place, "pgkeep-sandbox-x"), 0))
		}, collect: true, as: "postgres"},
		"a file system that is read-only": {make: func(place string) { must(os.Mkdir(place, 0o700)) },
			by: []string{"unshare", "--mount", "sh", "-c", `set -e; place=$(dirname "$1")/place; mount --bind "$place" "$place"; mount -o remount,bind,ro "$place"; exec "$@"`, "sh"}},
	} {
		t.Run(name, func(t *testing.T) {
			if !root && tt.by != nil {
				return // there, nobody may mount
			}
			parent := scratch(t)
			tt.make(filepath.Join(parent, "place"))
			var as *syscall.Credential
			if root && tt.as != "" {
				u, err := user.Lookup(tt.as)
				must(err)
				uid, err := strconv.Atoi(u.Uid)
				must(err)
				as = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
			}
			said := kill(t, parent, "place", as, tt.by...)
			collect, made, _ := strings.Cut(said, "; Make: ")
			if strings.HasSuffix(collect, ", bad-config") != tt.collect {
				t.Errorf("it was seen: %v, want %v: %s", !tt.collect, tt.collect, collect)
			}
			if !strings.Contains(made, ", bad-config, hint: ") || !strings.Contains(made, "restore_test.directory") {
				t.Errorf("Make: %s", made)
			}
		})
	}
}

func TestParseReplay(t *testing.T) {
	got, err := sandbox.ParseReplay(`LOG:  starting point-in-time recovery to 2026-11-22 22:00:00+00
LOG:  restored log file "00000002.history" from archive
LOG:  restored log file "000000010000000000000009" from archive
LOG:  redo starts at 0/900028
LOG:  consistent recovery state reached at 0/900100
LOG:  restored log file "00000001000000000000000A" from archive
LOG:  recovery stopping before commit of transaction 735, time 2026-11-22 22:00:00.25+00
LOG:  redo done at 0/B000D8 system usage: CPU: user: 0.00 s, system: 0.00 s, elapsed: 0.10 s
LOG:  last completed transaction was at log time 2026-11-22 21:59:59.75+00
`)
	want := sandbox.Recovered{From: 0x900028, Segments: 2, LastCommit: time.Date(2026, 11, 22, 21, 59, 59, 750e6, time.UTC),
		Reason: "recovery stopping before commit of transaction 735, time 2026-11-22 22:00:00.25+00"}
	if err != nil || got != want {
		t.Errorf("ParseReplay = %+v, %v", got, err)
	}
	for _, bad := range []string{"LOG:  redo starts at nowhere\n", "LOG:  last completed transaction was at log time never\n"} {
		if got, err := sandbox.ParseReplay(bad); err == nil {
			t.Errorf("ParseReplay(%q) = %+v", bad, got)
		}
	}
}

func TestParseControl(t *testing.T) {
	s := create(t, sandbox.Options{})
	c, err := s.Control(t.Context())
	if err != nil || c.System == 0 || c.State != "shut down" || c.Timeline != 1 || c.SegmentSize != 16<<20 || !c.Checksums || c.Redo == 0 || c.Checkpoint < c.Redo {
		t.Errorf("Control = %+v, %v", c, err)
	}
	if c, err := sandbox.ParseControl("Database system identifier: 7\n"); err == nil {
		t.Errorf("a part of it: %+v", c)
	}
	if v, err := s.Version(t.Context()); err != nil || v.Major() != major() || v < pg.Version(130000) {
		t.Errorf("Version = %v, %v", v, err)
	}
}
