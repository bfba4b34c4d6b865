package sandbox

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// An entry is what a process does to itself before it becomes a program of the
// sandbox. It is our own program, started once more: between a process's first
// breath and the program there is much to do that only it can do.
type entry struct {
	Program string   `json:"program"` // "": none; it ends when it is inside
	Args    []string `json:"args"`
	Dir     string   `json:"dir"`

	// Root is where the new root is put together; "": the host's stays.
	Root string   `json:"root,omitempty"`
	Keep []string `json:"keep,omitempty"` // directories that are there, to be written to
	Show []string `json:"show,omitempty"` // and paths that can be read
	Hide []string `json:"hide,omitempty"` // and directories that are empty

	User     string         `json:"user"`
	UID, GID int            `json:",omitempty"` // to become; 0: as it is
	Memory   int64          `json:"memory"`
	Death    syscall.Signal `json:"death"` // when whoever started it dies
}

const (
	entryName = "pgkeep-sandbox" // of the process, until it is the program
	statusFD  = 4                // where it tells how it went; the badge is 3

	// What it tells. A message follows the latter two.
	wentIn   = '.'
	refused  = '!' // by the kernel: it is not inside
	notFound = '?' // it is inside, and cannot become the program
)

// Enter is for the very beginning of a program that makes sandboxes, and of its
// tests: if this process is one that a sandbox has started, it becomes the
// program of it, and Enter does not return.
func Enter() {
	if len(os.Args) != 2 || os.Args[0] != entryName {
		return
	}
	runtime.LockOSThread()
	unix.CloseOnExec(statusFD)
	var e entry
	err := json.Unmarshal([]byte(os.Args[1]), &e)
	said := byte(refused)
	if err == nil {
		said, err = e.enter()
	}
	if err != nil {
		unix.Write(statusFD, append([]byte{said}, err.Error()...))
		os.Exit(1)
	}
	os.Exit(0)
}

func (e entry) enter() (said byte, err error) {
	// When memory is short, what runs here goes before anything else does.
	os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0) // where it may
	if e.Root != "" {
		if err := e.isolate(); err != nil {
			return refused, err
		}
	}
	if err := e.drop(); err != nil {
		return refused, err
	}
	if err := os.Chdir(e.Dir); err != nil {
		return refused, err
	}
	// What it takes from here on, all that it starts takes too. The signal is
	// forgotten when a process changes its user.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(e.Death), 0, 0, 0); err != nil {
		return refused, err
	}
	alive := []unix.PollFd{{Fd: statusFD}}
	if _, err := unix.Poll(alive, 0); err != nil || alive[0].Revents&unix.POLLERR != 0 {
		os.Exit(1) // nobody listens: it died before the signal was asked for
	}
	if err := limit(unix.RLIMIT_CORE, 0); err != nil {
		return refused, err
	}
	if e.Program == "" {
		unix.Write(statusFD, []byte{wentIn})
		return 0, nil
	}
	var has unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_DATA, &has); err != nil {
		return refused, err
	}
	memory := min(uint64(e.Memory), has.Max)
	if err := unix.Access(e.Program, unix.X_OK); err != nil {
		unix.Write(statusFD, []byte{wentIn})
		return notFound, &fs.PathError{Op: "run", Path: e.Program, Err: err}
	}
	unix.Write(statusFD, []byte{wentIn})
	// A shell takes the limit of memory: Go's runtime may need more, at any moment
	// until it is gone, than the program is to have.
	const script = `ulimit -d "$0" && exec "$@"`
	args := append([]string{"sh", "-c", script, strconv.FormatUint(memory>>10, 10), e.Program}, e.Args...)
	return notFound, &fs.PathError{Op: "run", Path: "/bin/sh", Err: syscall.Exec("/bin/sh", args, os.Environ())}
}

// limit lowers a limit: nobody needs rights to lower his own.
func limit(what int, to uint64) error {
	var has unix.Rlimit
	if err := unix.Getrlimit(what, &has); err != nil {
		return err
	}
	to = min(to, has.Max)
	return unix.Setrlimit(what, &unix.Rlimit{Cur: to, Max: to})
}

// drop gives up all rights for ever.
func (e entry) drop() error {
	if e.UID != 0 {
		if err := syscall.Setgroups(nil); err != nil {
			return fmt.Errorf("give up groups: %w", err)
		}
		if err := syscall.Setresgid(e.GID, e.GID, e.GID); err != nil {
			return fmt.Errorf("become group %d: %w", e.GID, err)
		}
		if err := syscall.Setresuid(e.UID, e.UID, e.UID); err != nil {
			return fmt.Errorf("become user %d: %w", e.UID, err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("give up capabilities: %w", err)
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

// isolate changes the root to one that has nothing in it but what the programs
// need. A network namespace does not keep anybody from a Unix socket that has a
// path, nor from the files of the user that he runs as: what has no path, does.
func (e entry) isolate() error {
	if err := mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return err // else the host would see what is mounted here
	}
	if err := mount("tmpfs", e.Root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=1m"); err != nil {
		return err
	}
	for _, step := range []func() error{e.devices, e.files, e.processes} {
		if err := step(); err != nil {
			return err
		}
	}
	for _, path := range e.Show {
		if err := e.show(path); err != nil {
			return err
		}
	}
	for _, dir := range e.Hide {
		if _, err := os.Stat(e.at(dir)); err != nil {
			continue
		}
		if err := mount("tmpfs", e.at(dir), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_RDONLY, "mode=0755,size=4k"); err != nil {
			return err
		}
	}
	for _, dir := range e.Keep {
		if err := os.MkdirAll(e.at(dir), 0o755); err != nil {
			return err
		}
		if err := bind(dir, e.at(dir), unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC); err != nil {
			return err
		}
	}
	// The old root, below the new one for a moment (pivot_root(2)).
	if err := unix.Chdir(e.Root); err != nil {
		return &fs.PathError{Op: "enter", Path: e.Root, Err: err}
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("leave the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	return mount("", "/", "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV, "")
}

func (e entry) at(path string) string { return filepath.Join(e.Root, path) }

// devices are those that programs count on, and shared memory.
func (e entry) devices() error {
	if err := os.MkdirAll(e.at("/dev/shm"), 0o755); err != nil {
		return err
	}
	if err := mount("tmpfs", e.at("/dev/shm"), "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=1777,size="+strconv.FormatInt(e.Memory, 10)); err != nil {
		return err
	}
	for _, name := range []string{"null", "zero", "full", "random", "urandom"} {
		path := filepath.Join("/dev", name)
		if err := os.WriteFile(e.at(path), nil, 0o644); err != nil {
			return err
		}
		if err := bind(path, e.at(path), unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC); err != nil {
			return err
		}
	}
	for name, to := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2"} {
		if err := os.Symlink(to, e.at(filepath.Join("/dev", name))); err != nil {
			return err
		}
	}
	return nil
}

// files are what is needed to find names by; the host's tell more.
func (e entry) files() error {
	if err := os.MkdirAll(e.at("/etc"), 0o755); err != nil {
		return err
	}
	uid, gid := os.Getuid(), os.Getgid()
	if e.UID != 0 {
		uid, gid = e.UID, e.GID
	}
	for name, text := range map[string]string{
		"passwd":        fmt.Sprintf("root:x:0:0::/:/bin/sh\n%s:x:%d:%d::/:/bin/sh\n", e.User, uid, gid),
		"group":         fmt.Sprintf("root:x:0:\n%s:x:%d:\n", e.User, gid),
		"nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
		"hosts":         "127.0.0.1 localhost\n::1 localhost\n",
	} {
		if err := os.WriteFile(e.at(filepath.Join("/etc", name)), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// processes mounts /proc, of the processes here. Who is not root may not, where
// a part of the host's is covered, as by systemd's ProtectKernelTunables: then
// there is none, and PostgreSQL does without.
func (e entry) processes() error {
	if err := os.Mkdir(e.at("/proc"), 0o755); err != nil {
		return err
	}
	err := mount("proc", e.at("/proc"), "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	if errors.Is(err, unix.EPERM) {
		return nil
	}
	return err
}

// show makes a path of the host's readable, if there is one. Links stay links.
func (e entry) show(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	to := e.at(path)
	if _, err := os.Lstat(to); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		return nil // shown already, with what it is in
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	switch info.Mode().Type() {
	case fs.ModeSymlink:
		target, err := os.Readlink(path)
		if err != nil {
			return err
		}
		return os.Symlink(target, to)
	case fs.ModeDir:
		err = os.MkdirAll(to, 0o755)
	case 0:
		if _, serr := os.Lstat(to); serr != nil {
			err = os.WriteFile(to, nil, 0o644)
		}
	default:
		return nil
	}
	if err != nil {
		return err
	}
	return bind(path, to, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV)
}

func mount(what, where, kind string, flags uintptr, data string) error {
	if err := unix.Mount(what, where, kind, flags, data); err != nil {
		return &fs.PathError{Op: strings.TrimSpace("mount " + kind), Path: where, Err: err}
	}
	return nil
}

// bind has a path of the host appear once more, with less allowed.
func bind(from, to string, attr uint64) error {
	if err := mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return err
	}
	err := unix.MountSetattr(unix.AT_FDCWD, to, unix.AT_RECURSIVE, &unix.MountAttr{Attr_set: attr})
	if !errors.Is(err, unix.ENOSYS) {
		if err != nil {
			return &fs.PathError{Op: "restrict", Path: to, Err: err}
		}
		return nil
	}
	// Linux before 5.12, where what is mounted below keeps what it allows. The
	// flags that are there may not be taken away.
	var has unix.Statfs_t
	if err := unix.Statfs(to, &has); err != nil {
		return &fs.PathError{Op: "statfs", Path: to, Err: err}
	}
	const kept = unix.MS_RDONLY | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME | unix.MS_NODIRATIME // the same bits in both
	const relatime = 1 << 12                                                                                             // ST_RELATIME, which is another
	flags := unix.MS_REMOUNT | unix.MS_BIND | uintptr(attr) | uintptr(has.Flags)&kept
	if has.Flags&relatime != 0 {
		flags |= unix.MS_RELATIME
	}
	return mount("", to, "", flags, "")
}
