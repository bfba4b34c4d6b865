package main

import (
	"bytes"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// A straced is a world whose program runs under strace.
type straced struct {
	*world
	segments []string // that wait to be archived, in order
	repo     *repo.Repo
	archive  repo.Archive
}

// newStraced makes a server with a backlog that nobody works off.
func newStraced(t *testing.T, backlog int) *straced {
	t.Helper()
	w := newWorld(t, 1)
	if err := w.pg.Restart(t.Context(), map[string]string{"archive_command": "false"}); err != nil {
		t.Fatal(err)
	}
	s := &straced{world: w}
	for i := range backlog {
		sql := fmt.Sprintf("SELECT pg_logical_emit_message(false, 'noise', repeat(md5('%d'), 8000))::text", i)
		w.query(w.pg, sql)
		s.segments = append(s.segments, w.query(w.pg, "SELECT pg_walfile_name(pg_switch_wal())"))
	}
	last := filepath.Join(w.pg.DataDir, "pg_wal/archive_status", s.segments[backlog-1]+".ready")
	for deadline := time.Now().Add(time.Minute); ; <-time.After(5 * time.Millisecond) {
		if _, err := os.Stat(last); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	cfg, err := config.Load(config.Options{File: w.restore, Hostname: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	if s.repo, err = open.Repository(t.Context(), cfg, "test"); err != nil {
		t.Fatal(err)
	}
	server, err := wal.ReadServer(w.pg.DataDir)
	if err != nil {
		t.Fatal(err)
	}
	s.archive = repo.Archive{Cluster: "main", System: server.System, Major: server.Major}
	return s
}

// strace runs pgkeep-wal push of the first segment under strace with options.
func (s *straced) strace(trace string, options ...string) (status int, said string) {
	s.t.Helper()
	args := append([]string{"-f", "-qq", "-o", trace}, options...)
	return s.as(s.t.Context(), s.pg.DataDir, "strace", append(args, s.program, "push", "--config", s.host, "pg_wal/"+s.segments[0])...)
}

// alone ends what works on in the background, and waits for that.
func (s *straced) alone() {
	s.t.Helper()
	until(s.t, "nothing works in the background", func() bool {
		pids := s.background()
		for _, pid := range pids {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		return len(pids) == 0
	})
}

// background are the processes of the program that still run, and are no zombies.
func (w *world) background() (pids []int) {
	found, _ := filepath.Glob("/proc/[0-9]*/exe")
	for _, path := range found {
		program, err := os.Readlink(path)
		if pid, perr := strconv.Atoi(filepath.Base(filepath.Dir(path))); err == nil && perr == nil && program == w.program {
			pids = append(pids, pid)
		}
	}
	return pids
}

// forget makes the archive and the data directory as they were before any push.
func (s *straced) forget() {
	s.t.Helper()
	s.alone()
	for _, dir := range []string{filepath.Join(s.s3.Data, "prod/clusters"), filepath.Join(s.pg.DataDir, "pg_wal/pgkeep")} {
		if err := os.RemoveAll(dir); err != nil {
			s.t.Fatal(err)
		}
	}
}

// verify wants segments in the archive, equal to the source.
func (s *straced) verify(when string, names ...string) {
	s.t.Helper()
	for _, name := range names {
		n, err := pg.ParseWALName(name)
		if err != nil {
			s.t.Fatal(err)
		}
		var got bytes.Buffer
		if err := s.repo.ReadWAL(s.t.Context(), s.archive, n, &got); err != nil {
			s.t.Errorf("%s: %s does not come back: %v", when, name, err)
		} else if !bytes.Equal(read(s.t, filepath.Join(s.pg.DataDir, "pg_wal", name)), got.Bytes()) {
			s.t.Errorf("%s: %s is not what it was", when, name)
		}
	}
}

var syscallLine = regexp.MustCompile(`^\d+ +([a-z_0-9]+)\(`)

// calls are the different system calls of a run.
func calls(t *testing.T, trace string) []string {
	t.Helper()
	seen := make(map[string]bool)
	for line := range strings.Lines(string(read(t, trace))) {
		if m := syscallLine.FindStringSubmatch(line); m != nil {
			seen[m[1]] = true
		}
	}
	return slices.Sorted(maps.Keys(seen))
}

// TestPushOutlivesKillAtEverySystemCall kills pgkeep-wal push, as it is shipped,
// at its system calls, one run for each (promise P10). What the bucket shows then
// is whole, the next push succeeds, there is one claim, and the segment reads back
// equal.
//
// Which calls there are is seen in a run that nobody kills. strace counts them
// thread by thread, and threads differ from run to run: so of each call the first
// is taken, the second, the fourth and so on, until a run gets through.
// PGKEEP_TEST_KILLS=all takes every one, until three runs in a row get through.
func TestPushOutlivesKillAtEverySystemCall(t *testing.T) {
	next, patience := func(n int) int { return 2 * n }, 1
	if os.Getenv("PGKEEP_TEST_KILLS") == "all" {
		next, patience = func(n int) int { return n + 1 }, 3
	}
	s := newStraced(t, 3)
	trace := s.write("trace", "")
	s.forget()
	if status, said := s.strace(trace); status != 0 || said != "" {
		t.Fatalf("undisturbed: %d, %s", status, said)
	}
	s.verify("undisturbed", s.segments...) // the others went up ahead
	killed := make(map[string]int)
	runs := 0
	for _, call := range calls(t, trace) {
		for n, through := 1, 0; through < patience; n = next(n) {
			s.forget()
			when := fmt.Sprintf("killed at %s %d", call, n)
			status, said := s.strace("/dev/null", "-e", "trace="+call, "-e", fmt.Sprintf("inject=%s:signal=SIGKILL:when=%d", call, n))
			runs++
			switch status {
			case -1, 128 + int(syscall.SIGKILL): // strace dies as its child did
				killed[call]++
				through = 0
			case 0:
				through++
			default:
				t.Errorf("%s: %d, %s", when, status, said)
				through++
			}
			s.verify(when+", before the next push", s.archived()...)
			s.push(when)
		}
	}
	t.Logf("%d runs, killed at %v", runs, killed)
	for _, call := range []string{"openat", "mkdirat", "read", "write", "fsync", "renameat", "unlinkat", "flock", "connect", "close", "exit_group"} {
		if killed[call] == 0 {
			t.Errorf("never killed at %s", call)
		}
	}
}

// TestPushOutlivesKillOfItsHelper kills what sends files ahead, under strace, with
// SIGKILL at its system calls: at some of them, with PGKEEP_TEST_KILLS=all at
// each that points names. What the bucket shows then is whole, and every push
// succeeds.
func TestPushOutlivesKillOfItsHelper(t *testing.T) {
	s := newStraced(t, 4)
	args := []string{pushAhead, "--config", s.host, "--cluster", "main", "--pgdata", s.pg.DataDir, "--after", s.segments[0]}
	s.forget()
	all := points(s.traced(nil, "/", args...))
	s.verify("undisturbed", s.segments[1:]...)
	step := 1
	if os.Getenv("PGKEEP_TEST_KILLS") != "all" {
		step = len(all)/20 + 1
	}
	hit, runs := 0, 0
	for i := 0; i < len(all); i += step {
		s.forget()
		runs++
		if s.killed(all[i], nil, "/", args...) {
			hit++
		}
		when := fmt.Sprint("killed at ", all[i])
		s.verify(when+", before the next push", s.archived()...)
		s.push(when)
	}
	t.Logf("killed at %d of %d points", hit, runs)
	if hit < runs/2 || runs < 10 {
		t.Errorf("killed at %d of %d points", hit, runs)
	}
}

// What sends files ahead is in nobody's way: not in that of whoever reads what
// archive_command says, and not in that of a server that stops.
func TestWhatLooksAheadHasNothingOfPostgres(t *testing.T) {
	s := newStraced(t, 20)
	s.forget()
	status, said := s.as(t.Context(), s.pg.DataDir, s.program, "push", "--config", s.host, "pg_wal/"+s.segments[0]) // returns when nobody holds its output
	if status != 0 || said != "" {
		t.Fatalf("push = %d, %s", status, said)
	}
	var pid int
	until(t, "it is as far ahead as it may be", func() bool {
		pids := s.background()
		if len(pids) != 1 {
			t.Fatalf("%d processes in the background", len(pids))
		}
		pid = pids[0]
		return len(s.archived()) == 17
	})
	proc := fmt.Sprint("/proc/", pid)
	if dir, err := os.Readlink(proc + "/cwd"); err != nil || dir != "/" {
		t.Errorf("it is in %s, %v", dir, err)
	}
	stat := strings.Fields(string(read(t, proc+"/stat")))
	if session := stat[5]; session != fmt.Sprint(pid) {
		t.Errorf("it is in session %s", session)
	}
	for _, fd := range []string{"0", "1", "2"} {
		if to, err := os.Readlink(proc + "/fd/" + fd); err != nil || to != "/dev/null" {
			t.Errorf("file %s is %s, %v", fd, to, err)
		}
	}
	if err := s.pg.Stop(); err != nil {
		t.Error(err)
	}
	until(t, "it ends with the server", func() bool { return len(s.background()) == 0 })
}

// push does what PostgreSQL does after a crash: it asks for all that waits.
func (s *straced) push(when string) {
	s.t.Helper()
	for _, name := range s.segments[:2] { // the second may be there by now, or recorded
		if status, said := s.as(s.t.Context(), s.pg.DataDir, s.program, "push", "--config", s.host, "pg_wal/"+name); status != 0 || said != "" {
			s.t.Errorf("%s: then push of %s = %d, %s", when, name, status, said)
		}
	}
	s.verify(when, s.segments[:2]...)
	claims, _ := filepath.Glob(filepath.Join(s.s3.Data, "prod/clusters/main/wal/*/claims/*"))
	if len(claims) != 1 {
		s.t.Errorf("%s: claims %q", when, claims)
	}
	left, _ := filepath.Glob(filepath.Join(s.pg.DataDir, "pg_wal/pgkeep/.pgkeep-tmp-*"))
	if len(left) > 1 {
		s.t.Errorf("%s: left over: %q", when, left)
	}
}

// archived are the segments that the bucket shows.
func (s *straced) archived() (names []string) {
	found, err := filepath.Glob(filepath.Join(s.s3.Data, "prod/clusters/main/wal/*/0*/0*.zst"))
	if err != nil {
		s.t.Fatal(err)
	}
	for _, path := range found {
		names = append(names, strings.TrimSuffix(filepath.Base(path), ".zst"))
	}
	return names
}

// A hundred thousand files may wait there.
func TestPushListsNothingOfPostgres(t *testing.T) {
	s := newStraced(t, 2)
	status := filepath.Join(s.pg.DataDir, "pg_wal/archive_status")
	for i := range 2000 { // far ahead, so that they are not next
		if err := os.WriteFile(filepath.Join(status, fmt.Sprintf("0000000100000077%08X.ready", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.forget()
	trace := s.write("trace", "")
	if got, said := s.strace(trace, "-y", "-e", "trace=%file,getdents64"); got != 0 {
		t.Fatalf("push = %d, %s", got, said)
	}
	touched := 0
	for line := range strings.Lines(string(read(t, trace))) {
		if strings.Contains(line, "getdents64") && !strings.Contains(line, "/pg_wal/pgkeep") {
			t.Errorf("it lists a directory: %s", line)
		}
		if strings.Contains(line, "archive_status") {
			touched++
		}
	}
	if touched == 0 || touched > 32 {
		t.Errorf("it looked %d times into archive_status", touched)
	}
}
