package cluster

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// child is one run of a PostgreSQL program that may start processes of its own,
// as pg_dump -j does.
//
// None of them outlives us, in three ways. A cancelled context ends the whole
// process group. When this process is killed, the kernel signals the program,
// whose handler passes it on to its workers. And because that is two steps,
// either of which may be lost, they all hold the lock file open: the next
// attempt's TakeLock sees them, and ends them.
type child struct {
	path   string
	args   []string
	env    []string
	stdout io.Writer // nil: thrown away
	lock   *os.File
	log    *slog.Logger // what it says on stderr; nil: nothing is logged
}

// watch says how to see that a child moves.
type watch struct {
	bytes    func(group int) int64          // written or read so far; nil: not asked
	busy     func(ctx context.Context) bool // whether the server works for it; asked only when nothing else moves
	progress func(bytes int64)
	after    time.Duration // how long it may stand still
}

const (
	defaultStall = 10 * time.Minute
	grace        = 5 * time.Second  // between asking a process to end and killing it
	undying      = 30 * time.Second // after which a killed process hangs in the kernel
)

// errStalled is how run says that it gave up waiting.
var errStalled = errors.New("no progress")

// run starts the child, waits for it, and returns when no process of its group
// is left. What it said comes back also with an error, which is nil,
// ctx.Err(), errStalled, an *exec.ExitError, or a failure to start.
func (c child) run(ctx context.Context, w watch) (*speech, error) {
	said := &speech{log: c.log, program: filepath.Base(c.path)}
	if err := ctx.Err(); err != nil {
		return said, err
	}
	r, stderr, err := os.Pipe()
	if err != nil {
		return said, err
	}
	defer r.Close()
	cmd := exec.Command(c.path, c.args...)
	cmd.Env, cmd.Stdout, cmd.Stderr = c.env, c.stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if c.lock != nil {
		cmd.ExtraFiles = []*os.File{c.lock}
	}
	started, exited := make(chan error), make(chan error, 1)
	go func() {
		// The kernel sends the signal when this thread ends, so it must not
		// end before the child.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			exited <- cmd.Wait()
		}
	}()
	err = <-started
	stderr.Close()
	if err != nil {
		return said, err
	}
	group := cmd.Process.Pid
	if c.lock != nil {
		err = record(c.lock, group)
	}
	heard := make(chan struct{})
	go func() { defer close(heard); said.listen(r) }()
	if err == nil {
		err = w.wait(ctx, group, exited)
	}
	end(group)
	<-exited
	<-heard // nobody is left to write
	return said, err
}

// wait returns how the child ended, or why it should be ended.
func (w watch) wait(ctx context.Context, group int, exited chan error) error {
	after := w.after
	if after <= 0 {
		after = defaultStall
	}
	every := min(time.Second, after/4)
	timer := time.NewTimer(every)
	defer timer.Stop()
	var lastBytes int64
	var lastCPU uint64
	lastMove, lastAsked := time.Now(), time.Now()
	for {
		select {
		case err := <-exited:
			exited <- err // run waits for it in any case
			return err
		case <-ctx.Done():
			return ctx.Err()
		case <-timer.C:
		}
		looked := time.Now()
		moved := false
		if w.bytes != nil {
			n := w.bytes(group)
			moved, lastBytes = n != lastBytes, n
		}
		if !moved {
			cpu := cpuTime(group)
			moved, lastCPU = cpu != lastCPU, cpu
		}
		// An index is built, or a table of dead rows read, while the program
		// does nothing but wait: then the server knows.
		if !moved && w.busy != nil && time.Since(lastAsked) > min(30*time.Second, after/2) {
			lastAsked = time.Now()
			moved = w.busy(ctx)
		}
		switch {
		case moved:
			lastMove = time.Now()
			if w.progress != nil {
				w.progress(lastBytes)
			}
		case time.Since(lastMove) >= after:
			return fmt.Errorf("%w for %v", errStalled, after)
		}
		timer.Reset(max(every, 20*time.Since(looked))) // looking costs at most a twentieth
	}
}

// end asks every process of the group to end, kills after a while what is left,
// and waits until none is. Where the leader ended as it should, there is none.
func end(group int) {
	asked := time.Now()
	for first := true; len(running(group)) > 0; first = false {
		waited := time.Since(asked)
		switch {
		case first:
			syscall.Kill(-group, syscall.SIGTERM)
		case waited > undying: // the kernel keeps it; the lock file still tells
			return
		case waited > grace:
			syscall.Kill(-group, syscall.SIGKILL)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// speech is what a child said on stderr: each line to the log, and enough of it
// kept for an error. Lines that PostgreSQL adds to an error may hold rows of
// tables: those go to the log only.
type speech struct {
	program string
	log     *slog.Logger
	lines   int
	errors  []string // the first few lines that report an error
	first   string   // of all lines
}

const (
	maxLogged   = 200  // lines per run
	maxLine     = 1000 // bytes of a line in the log
	maxReported = 300  // bytes of a line in an error
	maxErrors   = 8
)

func (s *speech) listen(r io.Reader) {
	in := bufio.NewReader(r)
	for {
		line, more, err := in.ReadLine()
		if err != nil {
			return
		}
		text := strings.ToValidUTF8(string(line[:min(len(line), maxLine)]), "?")
		for more && err == nil {
			_, more, err = in.ReadLine()
		}
		s.hear(text)
	}
}

// extra are the parts of an error message in which rows may stand, or queries
// with values in them.
var extra = []string{"DETAIL:", "CONTEXT:", "STATEMENT:", "QUERY:", "LINE ", "Command was:", "Query was:", "query was:", "The command was:"}

func (s *speech) hear(line string) {
	s.lines++
	if s.log != nil && s.lines <= maxLogged {
		s.log.Warn("a program wrote to stderr", "program", s.program, "line", line)
	}
	if s.log != nil && s.lines == maxLogged+1 {
		s.log.Warn("a program writes more to stderr; the rest is dropped", "program", s.program)
	}
	line = strings.TrimSpace(line)
	if line == "" || slices.ContainsFunc(extra, func(e string) bool { return strings.Contains(line, e) }) {
		return
	}
	if s.first == "" && s.own(line) {
		s.first = line
	}
	for _, mark := range []string{"error:", "fatal:", "ERROR:", "FATAL:", "PANIC:", "No space left"} {
		if strings.Contains(line, mark) && len(s.errors) < maxErrors {
			s.errors = append(s.errors, line)
			break
		}
	}
}

// summary is the one line to put into an error, which goes into histories and
// notifications: what the program was doing, in its own words, and of what the
// server said to it that which cannot hold anything of a row.
func (s *speech) summary() string {
	line := s.first
	if len(s.errors) > 0 {
		line = s.errors[0]
	}
	line, _ = fromServer(line)
	if !s.own(line) {
		line = ""
	}
	line, _, _ = strings.Cut(line, `: "`) // here follows a value that could not be read
	for _, e := range s.errors {
		if _, message := fromServer(e); message != "" {
			line += " " + message
			break
		}
	}
	line = strings.Join(strings.Fields(line), " ")
	if len(line) > maxReported {
		line = strings.ToValidUTF8(line[:maxReported], "") + " …"
	}
	return line
}

// fromServer parts a line where the server's words begin, of which it returns
// what may be told.
func fromServer(line string) (before, message string) {
	at := severity.FindStringIndex(line)
	if at == nil {
		return line, ""
	}
	return line[:at[0]], strings.TrimSpace(line[at[0]:at[1]]) + " " + told(line[at[1]:])
}

// severity is how a message of the server begins, in whatever language: libpq puts
// two blanks behind it (pqBuildErrorMessage3 in fe-protocol3.c).
var severity = regexp.MustCompile(`(?:ERROR|FATAL|PANIC|WARNING|NOTICE|INFO):|\p{L}+:  `)

// own reports whether a line is the program's: only of its first is it known whose
// words they are.
func (s *speech) own(line string) bool {
	name, _, ok := strings.Cut(line, ": ")
	return ok && (filepath.Base(name) == s.program || strings.HasPrefix(filepath.Base(name), "pg_"))
}

// says reports whether an error line contains any of the texts.
func (s *speech) says(texts ...string) bool {
	return slices.ContainsFunc(s.errors, func(line string) bool {
		return slices.ContainsFunc(texts, func(t string) bool { return strings.Contains(line, t) })
	})
}

// TakeLock opens and locks the file at path, making it if need be. Give the
// file to Dump and Restore: their processes then hold it too, and the lock is
// free only when the last of them has gone. If it is not free, whatever program
// an earlier attempt left behind is ended first. The lock goes when the file is
// closed. It fails with fail.AlreadyRunning when another pgkeep holds it, not a
// program of PostgreSQL, and keeps it for half a minute.
func TakeLock(ctx context.Context, path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("take lock: %w", err)
	}
	begun := time.Now()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil && atPath(f, path) {
			return f, nil
		}
		if err == nil { // whoever held it has removed the file
			f.Close()
			return TakeLock(ctx, path)
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("take lock %s: %w", path, err)
		}
		waited := time.Since(begun)
		signal := syscall.SIGTERM
		if waited > grace {
			signal = syscall.SIGKILL
		}
		for _, pid := range left(f) {
			syscall.Kill(pid, signal)
		}
		if waited > undying {
			f.Close()
			return nil, fmt.Errorf("take lock %s: held by another process: %w", path, fail.AlreadyRunning)
		}
		select {
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("take lock %s: %w", path, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// atPath reports whether path still is the file that is open.
func atPath(f *os.File, path string) bool {
	open, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(open, there)
}

// record writes into the lock file which process group holds it.
func record(lock *os.File, group int) error {
	text := fmt.Sprintf("%-20d\n", group)
	if _, err := lock.WriteAt([]byte(text), 0); err != nil {
		return fmt.Errorf("record process group: %w", err)
	}
	return nil
}

// left lists the processes of the group recorded in the lock file that hold
// that file open. The number of a group that has gone may be another's by now;
// the open file tells them apart.
func left(lock *os.File) []int {
	buf := make([]byte, 20)
	n, _ := lock.ReadAt(buf, 0)
	group, err := strconv.Atoi(strings.TrimSpace(string(buf[:n])))
	if err != nil || group <= 1 {
		return nil
	}
	want, err := lock.Stat()
	if err != nil {
		return nil
	}
	var pids []int
	for _, p := range running(group) {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", p.pid))
		for _, fd := range fds {
			if got, err := os.Stat(fd); err == nil && os.SameFile(got, want) {
				pids = append(pids, p.pid)
				break
			}
		}
	}
	return pids
}

// process is one that has not ended.
type process struct {
	pid int
	cpu uint64 // clock ticks, with those of children it has waited for
}

// running lists the processes of a group that have not ended, from
// /proc/<pid>/stat (proc(5)).
func running(group int) []process {
	entries, _ := os.ReadDir("/proc")
	var found []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue // it ended meanwhile
		}
		// pid (command) state parent group ..., where the command may hold anything
		text := string(b)
		f := strings.Fields(text[strings.LastIndexByte(text, ')')+1:])
		if len(f) < 15 || f[0] == "Z" || f[0] == "X" || f[2] != strconv.Itoa(group) {
			continue
		}
		p := process{pid: pid}
		for _, ticks := range f[11:15] { // utime, stime, cutime, cstime
			n, _ := strconv.ParseUint(ticks, 10, 64)
			p.cpu += n
		}
		found = append(found, p)
	}
	return found
}

func cpuTime(group int) (ticks uint64) {
	for _, p := range running(group) {
		ticks += p.cpu
	}
	return ticks
}

// bytesRead counts what the processes of a group have read from files, from
// /proc/<pid>/io (proc(5)).
func bytesRead(group int) (sum int64) {
	for _, p := range running(group) {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/io", p.pid))
		for line := range strings.Lines(string(b)) {
			if n, ok := strings.CutPrefix(line, "rchar: "); ok {
				v, _ := strconv.ParseInt(strings.TrimSpace(n), 10, 64)
				sum += v
			}
		}
	}
	return sum
}
