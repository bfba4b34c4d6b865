// Package sandbox runs PostgreSQL on a restored data directory where it can do
// no harm, and leaves nothing behind.
//
// A sandbox is a directory: the data, the socket, the settings and the log of
// one server. The server replays its log with a network and without
// connections, and answers queries with connections and without a network: see
// Recover and Open. It never outlives this process, and what a killed process
// leaves is ended and removed by the next one that looks: see Make and Collect.
package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
)

// Options say where a sandbox stands and what its server may use.
type Options struct {
	// Parent is the directory that sandboxes stand in, on a file system with
	// room for the data. It is made if need be, and must be reachable for User.
	Parent string
	// Name tells this sandbox from others in Parent: letters, digits, dots,
	// dashes and underscores. Making one of the same name again takes over what
	// is there.
	Name string
	// BinDir holds the server's programs. Empty: where Debian's and the PGDG's
	// packages install those of the major version that is needed.
	BinDir string
	// User is the OS user that the server runs as, if we are root; one who owns
	// nothing else is best. Empty: postgres. If we are not root, the server runs
	// as we do.
	User string
	// BestEffort starts what was restored also where the kernel, or our rights,
	// allow less than all there is to keep it apart: see Isolation. Else that is
	// fail.BadConfig.
	BestEffort bool
	// Memory in bytes: a quarter is shared buffers, and no process may have more
	// of its own than all of it. 0: 1 GiB.
	Memory int64
	// Preload are libraries loaded into the server though they are no part of
	// PostgreSQL, because data cannot be replayed or read without them. Nothing
	// else is ever preloaded, whatever the restored settings say.
	Preload []string
	// Sessions is how many connections there can be. 0: 20.
	Sessions int

	// StallAfter is how long the server may take to replay, start or stop
	// without any sign of work. 0: 10 minutes.
	StallAfter time.Duration
	Log        *slog.Logger // what the server and its programs say; nil: nothing is logged
}

// A Sandbox is an isolated place for one server. Its methods are not to be
// called from several goroutines at once, but for Connect, Conninfo, Run and Work.
type Sandbox struct {
	opt  Options
	dir  string
	lock *os.File
	as   *syscall.Credential // nil: as we are

	mu        sync.Mutex
	processes []*process // that run, and some that did
	server    *process   // nil: none runs
	isolation Isolation  // of what was started last
	// neighbours are the data directories of other servers of the same OS user.
	neighbours []string
	refused    bool // as if the kernel refused namespaces: for tests
}

// Isolation says what keeps the server apart, beside its settings: how much the
// kernel and our rights allow differs.
type Isolation struct {
	Network   bool   `json:"network"`   // no network while there are connections
	Processes bool   `json:"processes"` // sees and signals none but its own, and all end with it
	Files     bool   `json:"files"`     // no files but its own and programs', no socket of another server, while there are connections
	User      string `json:"user"`      // the OS user it runs as
	Own       bool   `json:"own_user"`  // nobody else on this host ran as that one when the sandbox was made
}

const (
	namePrefix    = "pgkeep-sandbox-"
	noteName      = "note"
	defaultMemory = 1 << 30
	defaultStall  = 10 * time.Minute
	socketName    = ".s.PGSQL.5432"
	maxSocketPath = 107 // bytes of sun_path before its final zero, unix(7)
)

var nameForm = regexp.MustCompile(`^[A-Za-z0-9._-]{1,100}$`)

// Make makes a sandbox, or takes over the one of that name that another attempt
// left: what still runs there is ended first, and its files stay. It fails with
// fail.AlreadyRunning when that attempt lives, and stays for half a minute, and
// with fail.BadConfig where we may make none.
func Make(ctx context.Context, opt Options) (*Sandbox, error) {
	s, err := create(ctx, opt)
	if err != nil {
		return nil, fmt.Errorf("make sandbox: %w", unfit(opt.Parent, err))
	}
	return s, nil
}

// unfit gives its kind to the error of a directory that we may not use, or that is
// none: no other try makes it ours.
func unfit(parent string, err error) error {
	no := func(target error) bool { return errors.Is(err, target) }
	if fail.KindOf(err) != fail.Unknown || !slices.ContainsFunc([]error{fs.ErrPermission, fs.ErrExist, syscall.EROFS, syscall.ENOTDIR}, no) {
		return err
	}
	return fail.Hint(fail.With(fail.BadConfig, err), "restore_test.directory must be a directory that is there for the user of pgkeep, and holds nothing of another's: install -d -m 0711 -o USER "+parent+
		", and ReadWritePaths="+parent+" where systemd starts the worker; or name another one in the configuration")
}

func create(ctx context.Context, opt Options) (*Sandbox, error) {
	if !nameForm.MatchString(opt.Name) {
		return nil, fmt.Errorf("name %.120q: %w", opt.Name, fail.BadConfig)
	}
	if opt.Memory <= 0 {
		opt.Memory = defaultMemory
	}
	if opt.StallAfter <= 0 {
		opt.StallAfter = defaultStall
	}
	if opt.Sessions <= 0 {
		opt.Sessions = 20
	}
	s := &Sandbox{opt: opt}
	if err := s.chooseUser(); err != nil {
		return nil, err
	}
	parent, err := filepath.Abs(opt.Parent)
	if err != nil {
		return nil, err
	}
	s.dir = filepath.Join(parent, namePrefix+opt.Name)
	if n := len(filepath.Join(s.runDir(), socketName)); n > maxSocketPath {
		return nil, fail.Hint(fmt.Errorf("the socket would be at a path of %d bytes, %d too many: %w", n, n-maxSocketPath, fail.BadConfig),
			"name a scratch directory with a shorter path")
	}
	if err := os.MkdirAll(parent, 0o711); err != nil { // another user goes through it
		return nil, err
	}
	if parent, err = filepath.EvalSymlinks(parent); err != nil {
		return nil, err
	}
	s.dir = filepath.Join(parent, namePrefix+opt.Name)
	for {
		if err := os.Mkdir(s.dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		s.lock, err = take(ctx, s.dir, undying)
		if !errors.Is(err, fs.ErrNotExist) { // else it was collected as left over, just now
			break
		}
	}
	if err != nil {
		return nil, err
	}
	s.meet()
	for _, dir := range []string{s.dir, s.runDir(), s.confDir(), s.rootDir(), s.Data(), s.Tablespaces()} {
		if err = os.MkdirAll(dir, 0o700); err == nil {
			err = s.own(dir)
		}
		if err != nil {
			s.lock.Close()
			return nil, err
		}
	}
	return s, nil
}

// chooseUser finds whom the server runs as.
func (s *Sandbox) chooseUser() error {
	if os.Getuid() != 0 {
		u, err := user.Current()
		if err == nil {
			s.isolation.User = u.Username
		} else {
			s.isolation.User = strconv.Itoa(os.Getuid()) // one without a name, as in containers
		}
		return nil
	}
	name := s.opt.User
	if name == "" {
		name = "postgres"
	}
	u, err := user.Lookup(name)
	if err != nil {
		return fail.Hint(fmt.Errorf("OS user for the server: %w: %w", err, fail.BadConfig), "PostgreSQL does not run as root: name another OS user")
	}
	uid, uerr := strconv.ParseUint(u.Uid, 10, 32)
	gid, gerr := strconv.ParseUint(u.Gid, 10, 32)
	if err := errors.Join(uerr, gerr); err != nil {
		return err
	}
	if uid == 0 {
		return fmt.Errorf("OS user for the server: PostgreSQL does not run as root: %w", fail.BadConfig)
	}
	s.as = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	s.isolation.User = name
	return nil
}

// meet looks at who else runs as the server's OS user: what is left of an earlier
// attempt has been ended.
func (s *Sandbox) meet() {
	uid := uint32(os.Getuid())
	if s.as != nil {
		uid = s.as.Uid
	}
	s.isolation.Own = true
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		info, err := os.Stat(dir)
		if err != nil || info.Sys().(*syscall.Stat_t).Uid != uid {
			continue
		}
		s.isolation.Own = false
		cwd, err := os.Readlink(filepath.Join(dir, "cwd"))
		if err != nil || slices.Contains(s.neighbours, cwd) {
			continue
		}
		if _, err := os.Stat(filepath.Join(cwd, "PG_VERSION")); err == nil {
			s.neighbours = append(s.neighbours, cwd)
		}
	}
}

// Try isolates a process as Open would the server, and tells how far that went.
func (s *Sandbox) Try() (Isolation, error) {
	p, err := s.launch(true, func() *exec.Cmd { return &exec.Cmd{Dir: s.dir, Env: s.environ(nil)} })
	if err != nil {
		return s.isolation, err
	}
	<-p.exited
	return s.isolation, p.err
}

// own gives a file to the server's OS user.
func (s *Sandbox) own(path string) error {
	if s.as == nil {
		return nil
	}
	return os.Lchown(path, int(s.as.Uid), int(s.as.Gid))
}

// Data is the data directory, empty at first: restore into it.
func (s *Sandbox) Data() string { return filepath.Join(s.dir, "data") }

// Tablespaces is an empty directory for what stands outside of Data. A server
// is only started on data whose links all stay within the sandbox.
func (s *Sandbox) Tablespaces() string { return filepath.Join(s.dir, "tablespaces") }

// Note returns what WriteNote wrote last, by whoever used the sandbox; nil if
// nobody has.
func (s *Sandbox) Note() ([]byte, error) { return readNote(s.dir) }

func readNote(dir string) ([]byte, error) {
	b, err := os.ReadFile(filepath.Join(dir, noteName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return b, err
}

// WriteNote keeps a text of the caller's in the sandbox, for the next Make and
// for Collect. Nobody else can read it.
func (s *Sandbox) WriteNote(text []byte) error {
	return durable.WriteFile(filepath.Join(s.dir, noteName), 0o600, func(w io.Writer) error {
		_, err := w.Write(text)
		return err
	})
}

// Empty removes the data and the tablespaces, for a new start. The server must be
// closed.
func (s *Sandbox) Empty() error {
	for _, dir := range []string{s.Data(), s.Tablespaces()} {
		err := os.RemoveAll(dir)
		if err == nil {
			err = os.Mkdir(dir, 0o700)
		}
		if err == nil {
			err = s.own(dir)
		}
		if err != nil {
			return fmt.Errorf("empty sandbox: %w", err)
		}
	}
	return nil
}

func (s *Sandbox) runDir() string  { return filepath.Join(s.dir, "run") }
func (s *Sandbox) confDir() string { return filepath.Join(s.dir, "conf") }
func (s *Sandbox) rootDir() string { return filepath.Join(s.dir, "root") }
func (s *Sandbox) logPath() string { return filepath.Join(s.dir, "log") }

// Isolation says how the server that was started last is kept apart.
func (s *Sandbox) Isolation() Isolation { return s.isolation }

// Release ends the server, if one runs, and leaves the files for the next Make.
func (s *Sandbox) Release() {
	if s.lock != nil {
		s.kill()
		s.lock.Close()
		s.lock = nil
	}
}

// Remove ends the server, if one runs, and removes the sandbox with all that is
// in it. The sandbox is not to be used any more, also if that fails; then
// Collect will remove what is left. Once removed or released, nothing happens.
func (s *Sandbox) Remove() error {
	if s.lock == nil {
		return nil
	}
	s.kill()
	err := errors.Join(wipe(s.dir), s.lock.Close())
	s.lock = nil
	return err
}

// wipe removes a sandbox whose lock is held: the lock last, so that whoever
// else finds a part of it can tell what it is.
func wipe(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("remove sandbox: %w", err)
	}
	for _, e := range entries {
		if e.Name() != lockName {
			if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
				return fmt.Errorf("remove sandbox: %w", err)
			}
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("remove sandbox: %w", err)
	}
	return nil
}

// Collect removes the sandboxes in parent that nobody uses, and ends what still
// runs in them. keep, if it is not nil, is asked whether one stays, and gets its
// name and its note, nil if it has none. It returns the names of those it
// removed. A parent that does not exist has none.
func Collect(ctx context.Context, parent string, keep func(name string, note []byte) bool) (removed []string, err error) {
	entries, err := os.ReadDir(parent)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("collect sandboxes: %w", unfit(parent, err))
	}
	var failed error
	for _, e := range entries {
		name, ok := strings.CutPrefix(e.Name(), namePrefix)
		if !ok || !e.IsDir() {
			continue
		}
		gone, err := collect(ctx, filepath.Join(parent, e.Name()), func(note []byte) bool { return keep != nil && keep(name, note) })
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("collect sandbox %s: %w", name, unfit(parent, err)))
		} else if gone {
			removed = append(removed, name)
		}
	}
	return removed, failed
}

func collect(ctx context.Context, dir string, keep func(note []byte) bool) (gone bool, err error) {
	lock, err := take(ctx, dir, 0)
	if errors.Is(err, fail.AlreadyRunning) || errors.Is(err, fs.ErrNotExist) {
		return false, nil // somebody uses it, or has just removed it
	}
	if err != nil {
		return false, err
	}
	defer lock.Close()
	note, err := readNote(dir)
	if err != nil || keep(note) {
		return false, err
	}
	return true, wipe(dir)
}
