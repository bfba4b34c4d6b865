package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
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

// launch starts a program with neither rights nor environment of ours, offline
// where that can be done. Names of programs are those of the server's.
func (s *Sandbox) launch(offline bool, prepare func() *exec.Cmd) (*process, error) {
	badge, err := os.OpenFile(filepath.Join(s.dir, badgeName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	defer badge.Close()
	// Each process namespace needs an IPC namespace, in which shared memory
	// ends as its processes do.
	ways := []uintptr{syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC, 0}
	if offline {
		ways = []uintptr{syscall.CLONE_NEWPID | syscall.CLONE_NEWIPC | syscall.CLONE_NEWNET, syscall.CLONE_NEWNET, 0}
	}
	if s.bare {
		ways = []uintptr{0}
	}
	for _, flags := range ways {
		cmd := prepare()
		limited(cmd, s.opt.Memory)
		cmd.ExtraFiles = []*os.File{badge}
		attr := &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGQUIT, Cloneflags: flags, Credential: s.as}
		if flags&syscall.CLONE_NEWPID != 0 {
			attr.Pdeathsig = syscall.SIGKILL
		}
		if flags != 0 && s.as == nil { // who is not root needs a user namespace for the others
			attr.Cloneflags |= syscall.CLONE_NEWUSER
			attr.UidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getuid(), HostID: os.Getuid(), Size: 1}}
			attr.GidMappings = []syscall.SysProcIDMap{{ContainerID: os.Getgid(), HostID: os.Getgid(), Size: 1}}
		}
		cmd.SysProcAttr = attr
		p := &process{cmd: cmd, inside: flags&syscall.CLONE_NEWPID != 0}
		err := p.start()
		if flags != 0 && forbidden(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		s.mu.Lock()
		s.processes = append(s.processes, p)
		s.mu.Unlock()
		s.isolation.Processes = p.inside
		if offline {
			s.isolation.Network = flags&syscall.CLONE_NEWNET != 0
		}
		return p, nil
	}
	return nil, errors.New("unreachable: the last way asks for nothing")
}

// forbidden reports whether the kernel refused a namespace (clone(2)).
func forbidden(err error) bool {
	return errors.Is(err, unix.EPERM) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EUSERS)
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

// limited runs a program by way of a shell, which bounds what it and all that it
// starts may take: nobody needs rights to lower limits of his own. When memory
// is short, they go before anything else does.
func limited(cmd *exec.Cmd, memory int64) {
	const script = `ulimit -c 0; ulimit -d "$0" && { echo 1000 >/proc/self/oom_score_adj; } 2>/dev/null; exec "$@"`
	cmd.Args = append([]string{"sh", "-c", script, strconv.FormatInt(memory>>10, 10), cmd.Path}, cmd.Args[1:]...)
	cmd.Path = "/bin/sh"
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
