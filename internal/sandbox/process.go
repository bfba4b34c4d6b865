package sandbox

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// process is a program that runs in a sandbox.
//
// Where we may, it is the first of a process namespace: when it ends, the
// kernel kills whatever it started. It gets a signal when we end, however we
// do. PostgreSQL's processes each begin a session of their own, so that a
// process group would not hold them.
type process struct {
	cmd    *exec.Cmd
	inside bool          // of a process namespace
	exited chan struct{} // closed when it has ended
	err    error         // how it ended; not before exited is closed
}

// launch starts a program with neither rights nor environment of ours. Offline,
// that is on behalf of what was restored, it sees neither the network nor the
// files of the host; where that cannot be done it is not started, but for
// Options.BestEffort. Without a path it is only tried.
func (s *Sandbox) launch(offline bool, prepare func() *exec.Cmd) (*process, error) {
	badge, err := os.OpenFile(filepath.Join(s.dir, badgeName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer badge.Close()
	for _, way := range s.ways(offline) {
		p, err := s.start(prepare(), way, badge)
		if _, isRefused := errors.AsType[refusal](err); isRefused && way != bare {
			if offline && !s.opt.BestEffort {
				return nil, fail.Hint(fmt.Errorf("restored data would not be kept apart from this host: %w: %w", err, fail.BadConfig), allowIsolation)
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.processes = append(s.processes, p)
		s.isolation.Processes = p.inside
		if offline {
			s.isolation.Network, s.isolation.Files = way.flags&syscall.CLONE_NEWNET != 0, way.flags&syscall.CLONE_NEWNS != 0
		}
		return p, nil
	}
	return nil, errors.New("unreachable: the last way asks for nothing")
}

const allowIsolation = "allow the user that runs pgkeep namespaces (sysctl user.max_user_namespaces; kernel.apparmor_restrict_unprivileged_userns=0 where there is " +
	"one; in a container, CAP_SYS_ADMIN), or run pgkeep as root, or, if you trust every superuser of the source with this host, set restore_test.isolation: best-effort"

// A way to start a program: in which namespaces.
type way struct{ flags uintptr }

var bare = way{}

// ways are those to try, the best first.
func (s *Sandbox) ways(offline bool) []way {
	// Each process namespace needs an IPC namespace, in which shared memory
	// ends as its processes do.
	const own = syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC
	if offline {
		return []way{{own | syscall.CLONE_NEWNET | syscall.CLONE_NEWNS}, {own | syscall.CLONE_NEWNET}, {syscall.CLONE_NEWNET}, bare}
	}
	return []way{{own}, bare}
}

// A refusal is that of the kernel to isolate a process.
type refusal struct{ error }

func (r refusal) Unwrap() error { return r.error }

// start starts a program in one way. The program inherits the badge.
func (s *Sandbox) start(cmd *exec.Cmd, w way, badge *os.File) (*process, error) {
	if s.refused && w != bare {
		return nil, refusal{errors.New("no namespaces for a test")}
	}
	e := entry{Program: cmd.Path, Dir: cmd.Dir, User: s.isolation.User, Memory: s.opt.Memory, Death: syscall.SIGQUIT}
	if len(cmd.Args) > 1 {
		e.Args = cmd.Args[1:]
	}
	attr := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Cloneflags: w.flags}
	if w.flags&syscall.CLONE_NEWPID != 0 {
		e.Death = syscall.SIGKILL
	}
	if w.flags&syscall.CLONE_NEWNS != 0 {
		if err := s.furnish(&e); err != nil {
			return nil, err
		}
	}
	if s.as != nil {
		e.UID, e.GID = int(s.as.Uid), int(s.as.Gid)
	} else if w != bare { // who is not root needs a user namespace for the others
		attr.Cloneflags |= syscall.CLONE_NEWUSER
		attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
		attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
		attr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN} // in there, until it is the program
	}
	what, err := json.Marshal(e)
	if err != nil {
		return nil, err
	}
	heard, status, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer heard.Close()
	cmd.Path, cmd.Args, cmd.Dir, cmd.SysProcAttr, cmd.ExtraFiles = "/proc/self/exe", []string{entryName, string(what)}, "", attr, []*os.File{badge, status}
	p := &process{cmd: cmd, inside: w.flags&syscall.CLONE_NEWPID != 0}
	err = p.start()
	status.Close()
	if forbidden(err) {
		return nil, refusal{fmt.Errorf("make namespaces: %w", err)}
	}
	if err != nil {
		return nil, err
	}
	if err := p.hear(heard); err != nil {
		cmd.Process.Kill()
		<-p.exited
		return nil, err
	}
	return p, nil
}

// hear waits until the process is the program.
func (p *process) hear(status *os.File) error {
	status.SetReadDeadline(time.Now().Add(time.Minute))
	text, err := io.ReadAll(status)
	switch message := string(bytes.TrimLeft(text, string(wentIn))); {
	case err != nil:
		return fmt.Errorf("it does not begin: %w", err)
	case len(text) == 0:
		return errors.New("it ended before it began")
	case message == "":
		return nil
	case message[0] == refused:
		return refusal{errors.New(message[1:])}
	default:
		return fail.With(fail.BadConfig, errors.New(message[1:]))
	}
}

// furnish says what there is in the root of an isolated process.
func (s *Sandbox) furnish(e *entry) error {
	e.Root = s.rootDir()
	e.Keep = []string{s.Data(), s.Tablespaces(), s.runDir()}
	e.Show = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store", // programs and libraries
		"/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime", "/etc/ssl/openssl.cnf", "/etc/pki/tls/openssl.cnf", "/etc/crypto-policies",
		"/var/cache/postgresql/dicts"} // where Debian keeps what its text search reads
	if e.Program != "" {
		real, err := filepath.EvalSymlinks(e.Program)
		if err != nil {
			return err
		}
		// What belongs to a program stands beside its directory; which that is,
		// PostgreSQL asks the links as well (find_my_exec in common/exec.c).
		for _, bin := range []string{filepath.Dir(e.Program), filepath.Dir(real)} {
			for _, dir := range []string{bin, "../lib", "../lib64", "../share"} {
				if !filepath.IsAbs(dir) {
					dir = filepath.Join(bin, dir)
				}
				if !within(dir, "/usr") && !slices.Contains(e.Show, dir) {
					e.Show = append(e.Show, dir)
				}
			}
		}
	}
	for _, library := range s.opt.Preload {
		if filepath.IsAbs(library) && !within(library, "/usr") {
			e.Show = append(e.Show, library)
		}
	}
	e.Show = append(e.Show, s.confDir())
	for _, dir := range s.neighbours {
		if slices.ContainsFunc(e.Show, func(shown string) bool { return within(dir, shown) }) {
			e.Hide = append(e.Hide, dir)
		}
	}
	return nil
}

func within(path, dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") }

// forbidden reports whether the kernel refused a namespace (clone(2)).
func forbidden(err error) bool {
	return errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EUSERS) || errors.Is(err, unix.EACCES)
}

// start runs it from a thread of its own: the kernel sends the death signal
// when the thread ends; and the thread gives up for ever, for itself and its
// children, to gain rights by running a program.
func (p *process) start() error {
	p.exited = make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this
		err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
		if err == nil {
			err = p.cmd.Start()
		}
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			close(p.exited)
		}
	}()
	return <-started
}

func (p *process) running() bool {
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

// Work is a number that changes as long as what runs in the sandbox works: the
// processor time that it has used.
func (s *Sandbox) Work() (ticks uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.processes = slices.DeleteFunc(s.processes, func(p *process) bool { return !p.running() })
	for _, p := range s.processes {
		_, t := family(p.cmd.Process.Pid)
		ticks += t
	}
	return ticks
}

// Run runs one of PostgreSQL's programs in the sandbox, offline, and returns
// what it wrote to either output. It ends with ctx.
func (s *Sandbox) Run(ctx context.Context, program string, args ...string) (string, error) {
	return s.run(ctx, "", program, args...)
}

func (s *Sandbox) run(ctx context.Context, input, program string, args ...string) (string, error) {
	bin, err := s.program(program)
	if err != nil {
		return "", err
	}
	out := &head{}
	p, err := s.launch(true, func() *exec.Cmd {
		cmd := exec.Command(bin, args...)
		cmd.Dir, cmd.Env, cmd.Stdin, cmd.Stdout, cmd.Stderr = s.dir, s.environ(nil), strings.NewReader(input), out, out
		cmd.WaitDelay = time.Second
		return cmd
	})
	if err != nil {
		return "", fmt.Errorf("run %s: %w", program, err)
	}
	select {
	case <-p.exited:
	case <-ctx.Done():
		p.cmd.Process.Kill()
		<-p.exited
	}
	err = p.err
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	s.tell(program, out.String())
	if err != nil {
		return out.String(), fmt.Errorf("run %s: %w", program, err)
	}
	return out.String(), nil
}

// head keeps the beginning of what is written to it.
type head struct{ bytes.Buffer }

const maxOutput = 1 << 20

func (h *head) Write(p []byte) (int, error) {
	if room := maxOutput - h.Len(); room > 0 {
		h.Buffer.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

// environ is all that a program learns of us.
func (s *Sandbox) environ(more []string) []string {
	return append([]string{"PATH=/usr/local/bin:/usr/bin:/bin", "LC_ALL=C", "HOME=" + s.runDir(), "TZ=UTC"}, more...)
}

// tell hands lines to the log.
func (s *Sandbox) tell(program, text string) {
	const most = 200
	if s.opt.Log == nil {
		return
	}
	n := 0
	for line := range strings.Lines(text) {
		if n++; n > most {
			s.opt.Log.Debug("a program of the sandbox says more; the rest is dropped", "program", program)
			return
		}
		s.opt.Log.Debug("a program of the sandbox says", slog.String("program", program), slog.String("line", strings.ToValidUTF8(strings.TrimSpace(line), "?")))
	}
}

// family lists a process and its descendants with their processor time, from
// /proc/<pid>/stat (proc(5)).
func family(root int) (pids []int, ticks uint64) {
	children := make(map[int][]int)
	cpu := make(map[int]uint64)
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		b, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue // it ended meanwhile
		}
		// pid (command) state parent ..., where the command may hold anything
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) < 15 {
			continue
		}
		parent, _ := strconv.Atoi(f[1])
		children[parent] = append(children[parent], pid)
		for _, t := range f[11:15] { // utime, stime, cutime, cstime
			n, _ := strconv.ParseUint(t, 10, 64)
			cpu[pid] += n
		}
	}
	pids = []int{root}
	for i := 0; i < len(pids); i++ {
		pids = append(pids, children[pids[i]]...)
		ticks += cpu[pids[i]]
	}
	return pids, ticks
}
