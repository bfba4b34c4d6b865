package lab

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
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

	"github.com/jackc/pgx/v5"
)

// PostgresOptions describe a PostgreSQL server. The zero value is a server of
// the newest version installed, in a directory of its own that Stop removes,
// reached through a socket without a password.
type PostgresOptions struct {
	// Dir holds the data directory "data", the socket and the log. It must be
	// reachable for the OS user postgres when we are root, and short: a socket's
	// path has at most 107 bytes. If it already holds a data directory, the
	// server starts from that one and none is made. Empty: a new
	// directory under os.TempDir, removed by Stop.
	Dir string
	// Settings are lines of postgresql.conf, applied at every start. Beside
	// them the server runs with fsync=off, unless they say otherwise: a killed
	// server survives that, a crashed machine does not.
	Settings map[string]string
	// WALSegmentMB is the size of a WAL file in MiB. 0: 16.
	WALSegmentMB int
	// Version is the major version, 14 to 18. What Debian has not installed is
	// fetched with npm, once; it comes without PostgreSQL's client programs. 0: the
	// newest under /usr/lib/postgresql. 170001 is 17.1, which one should not run.
	Version int
	// Env is more of the environment of the server.
	Env []string
	// BinDir holds the server's programs. Empty: those of Version.
	BinDir string
	// Password, if not empty, is the superuser's, and makes the server listen
	// on a loopback port too, with scram-sha-256. The socket stays open to all.
	// A data directory that is there already keeps the passwords it has.
	Password string
	// Patience is how long a server may take to start, which is long for one that
	// recovers. 0: a minute.
	Patience time.Duration
}

// Postgres is a running PostgreSQL server. Its superuser is postgres. It dies
// with this process, also when that is killed. Its methods are not to be called
// from several goroutines at once, but for Conninfo, Connect, Exec and Command.
type Postgres struct {
	DataDir string
	BinDir  string
	Port    int // of the socket, and on loopback if there is a password

	opt    PostgresOptions
	dir    string
	ownDir bool
	cred   *syscall.Credential // nil: the server runs as we do

	postmaster *os.Process
	exited     <-chan struct{} // closed when the postmaster has gone
}

// StartPostgres makes a new cluster, starts it and waits until it answers.
func StartPostgres(ctx context.Context, opt PostgresOptions) (*Postgres, error) {
	p, err := newPostgres(ctx, opt)
	if err != nil {
		return nil, fmt.Errorf("start PostgreSQL: %w", err)
	}
	made, err := p.create(ctx)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start PostgreSQL: %w", err), p.clean())
	}
	if err := p.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start PostgreSQL: %w", err), p.clean())
	}
	if made {
		if err := p.setPassword(ctx); err != nil {
			p.Kill()
			return nil, errors.Join(fmt.Errorf("start PostgreSQL: %w", err), p.clean())
		}
	}
	return p, nil
}

// PostgresForTest starts a server for the time of the test.
func PostgresForTest(t testing.TB, opt PostgresOptions) *Postgres {
	t.Helper()
	p, err := StartPostgres(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Stop(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func newPostgres(ctx context.Context, opt PostgresOptions) (*Postgres, error) {
	p := &Postgres{opt: opt, BinDir: opt.BinDir, Port: 5432, dir: opt.Dir}
	var err error
	if p.BinDir == "" {
		if p.BinDir, err = binDir(ctx, opt.Version); err != nil {
			return nil, err
		}
	}
	if p.cred, err = serverUser(); err != nil {
		return nil, err
	}
	if p.dir == "" {
		dir, err := os.MkdirTemp("", "pgkeep-pg-")
		if err != nil {
			return nil, err
		}
		p.dir, p.ownDir = dir, true
	}
	p.DataDir = filepath.Join(p.dir, "data")
	if opt.Password != "" {
		port, err := freePort()
		if err != nil {
			return nil, errors.Join(err, p.clean())
		}
		p.Port = port
	}
	return p, nil
}

// serverUser is the OS user that servers run as; nil: the one we are.
func serverUser() (*syscall.Credential, error) {
	if os.Getuid() != 0 { // PostgreSQL refuses to run as root
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		return nil, err
	}
	uid, uerr := strconv.ParseUint(u.Uid, 10, 32)
	gid, gerr := strconv.ParseUint(u.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, errors.Join(uerr, gerr)
}

// DirForTest makes an empty directory that servers may use, for the time of the
// test; testing's own directories are closed to other OS users.
func DirForTest(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgkeep-pg-")
	if err == nil {
		t.Cleanup(func() {
			err := os.RemoveAll(dir)
			for end := time.Now().Add(10 * time.Second); errors.Is(err, syscall.ENOTEMPTY) && time.Now().Before(end); {
				time.Sleep(50 * time.Millisecond) // who fetches ahead has yet to see that it is gone
				err = os.RemoveAll(dir)
			}
			if err != nil {
				t.Error(err)
			}
		})
		err = Own(dir)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// Own gives a file, or a directory and all that is in it, to the OS user that
// servers run as.
func Own(path string) error {
	cred, err := serverUser()
	if cred == nil || err != nil {
		return err
	}
	return filepath.WalkDir(path, func(path string, _ fs.DirEntry, err error) error {
		return errors.Join(err, os.Lchown(path, int(cred.Uid), int(cred.Gid)))
	})
}

// AsServer lets a program run as the OS user that servers run as.
func AsServer(cmd *exec.Cmd) error {
	cred, err := serverUser()
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = new(syscall.SysProcAttr)
	}
	cmd.SysProcAttr.Credential = cred
	return err
}

// newestBinDir finds the programs of the newest major version as Debian
// installs them.
func newestBinDir() (string, error) {
	const root = "/usr/lib/postgresql"
	entries, err := os.ReadDir(root)
	if err != nil {
		return "", fmt.Errorf("no PostgreSQL server is installed (apt-get install postgresql): %w", err)
	}
	newest := 0
	for _, e := range entries {
		major, err := strconv.Atoi(e.Name())
		if _, missing := os.Stat(filepath.Join(root, e.Name(), "bin", "postgres")); err == nil && missing == nil {
			newest = max(newest, major)
		}
	}
	if newest == 0 {
		return "", fmt.Errorf("no PostgreSQL server under %s (apt-get install postgresql)", root)
	}
	return filepath.Join(root, strconv.Itoa(newest), "bin"), nil
}

// freePort returns a port of loopback that is free, and not one of those that the
// kernel gives to outgoing connections: a server needs it later, and again when it
// is restarted.
func freePort() (int, error) {
	for tries := 1; ; tries++ {
		port := 10_000 + rand.IntN(20_000)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err == nil {
			return port, l.Close()
		}
		if tries == 100 {
			return 0, err
		}
	}
}

// create makes a cluster, unless there is one already.
func (p *Postgres) create(ctx context.Context) (made bool, err error) {
	run := filepath.Join(p.dir, "run")
	if err := os.MkdirAll(run, 0o700); err != nil {
		return false, err
	}
	if err := errors.Join(p.own(p.dir), p.own(run)); err != nil {
		return false, err
	}
	if _, err := os.Stat(filepath.Join(p.DataDir, "PG_VERSION")); err == nil {
		return false, nil
	}
	args := []string{"--username=postgres", "--encoding=UTF8", "--locale=C.UTF-8",
		"--data-checksums", "--auth-local=trust", "--auth-host=scram-sha-256", "--no-sync", "--no-instructions"}
	if p.opt.WALSegmentMB != 0 {
		args = append(args, "--wal-segsize="+strconv.Itoa(p.opt.WALSegmentMB))
	}
	return true, p.newCluster(ctx, args)
}

// setPassword gives the superuser the password of the options, if there is one.
func (p *Postgres) setPassword(ctx context.Context) error {
	if p.opt.Password == "" {
		return nil
	}
	verifier, err := scram(p.opt.Password)
	if err != nil {
		return err
	}
	return p.Exec(ctx, "postgres", "ALTER ROLE postgres PASSWORD '"+verifier+"'")
}

// own gives path to the server's OS user.
func (p *Postgres) own(path string) error {
	if p.cred == nil {
		return nil
	}
	return os.Chown(path, int(p.cred.Uid), int(p.cred.Gid))
}

// start runs the postmaster and waits until it takes connections.
func (p *Postgres) start(ctx context.Context) error {
	settings := map[string]string{
		"fsync":                   "off",
		"shared_buffers":          "32MB",
		"listen_addresses":        "",
		"logging_collector":       "off",
		"log_min_messages":        "warning",
		"timezone":                "UTC",
		"unix_socket_directories": filepath.Join(p.dir, "run"),
		"port":                    strconv.Itoa(p.Port),
	}
	if p.opt.Password != "" {
		settings["listen_addresses"] = "127.0.0.1"
	}
	maps.Copy(settings, p.opt.Settings)
	args := []string{"-D", p.DataDir}
	for _, name := range slices.Sorted(maps.Keys(settings)) {
		args = append(args, "-c", name+"="+settings[name])
	}
	log, err := os.OpenFile(p.logPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := p.Command(context.WithoutCancel(ctx), "postgres", args...) // it outlives ctx
	cmd.Stdout, cmd.Stderr, cmd.Env = log, log, append(cmd.Env, p.opt.Env...)
	exited, err := startChild(cmd, syscall.SIGQUIT)
	if err != nil {
		return err
	}
	p.postmaster, p.exited = cmd.Process, exited
	if err := p.waitReady(ctx); err != nil {
		p.Kill()
		return err
	}
	return nil
}

func (p *Postgres) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(p.opt.Patience, time.Minute))
	defer cancel()
	for {
		conn, err := p.Connect(ctx, "postgres")
		if err == nil {
			return conn.Close(ctx)
		}
		select {
		case <-p.exited:
			return fmt.Errorf("postgres ended; its log says: %s", p.logTail())
		case <-ctx.Done():
			return fmt.Errorf("%w; postgres's log says: %s", err, p.logTail())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (p *Postgres) logPath() string { return filepath.Join(p.dir, "log") }

func (p *Postgres) logTail() string {
	b, err := os.ReadFile(p.logPath())
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(b[max(0, len(b)-2000):]))
}

// Conninfo reaches the server through its socket, as the superuser, without a
// password. It names no database: a caller may add one, or another user.
func (p *Postgres) Conninfo() string {
	return fmt.Sprintf("host='%s' port=%d user=postgres", filepath.Join(p.dir, "run"), p.Port)
}

// TCPConninfo reaches the server on loopback; it takes the password of the
// options, which it does not contain.
func (p *Postgres) TCPConninfo() string {
	return fmt.Sprintf("host=127.0.0.1 port=%d user=postgres sslmode=disable", p.Port)
}

// Connect opens a session as the superuser.
func (p *Postgres) Connect(ctx context.Context, database string) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(p.Conninfo())
	if err != nil {
		return nil, err
	}
	cfg.Database = database
	return pgx.ConnectConfig(ctx, cfg)
}

// Exec runs each statement by itself, as the superuser, in one session.
func (p *Postgres) Exec(ctx context.Context, database string, sql ...string) error {
	conn, err := p.Connect(ctx, database)
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for _, s := range sql {
		if _, err := conn.PgConn().Exec(ctx, s).ReadAll(); err != nil {
			return fmt.Errorf("%.200s: %w", s, err)
		}
	}
	return nil
}

// Bin is the path of one of the server's programs. A server that was fetched
// has no client programs: then it is that of the newest version installed.
func (p *Postgres) Bin(name string) string {
	own := filepath.Join(p.BinDir, name)
	if _, err := os.Stat(own); err == nil {
		return own
	}
	if other, err := newestBinDir(); err == nil {
		return filepath.Join(other, name)
	}
	return own
}

// Command prepares one of PostgreSQL's programs, such as pgbench or
// pg_basebackup, to run as the server's OS user.
func (p *Postgres) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, p.Bin(name), args...)
	cmd.Dir = p.dir
	cmd.Env = []string{"PATH=" + p.BinDir + ":/usr/bin:/bin", "LC_ALL=C.UTF-8", "HOME=" + p.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: p.cred}
	return cmd
}

// Stop ends the server as "pg_ctl stop -m fast" does. If its directory is its own
// then that is removed, so the server does not write to it first what it knows, nor
// archive its log: that is "-m immediate".
func (p *Postgres) Stop() error {
	how := syscall.SIGINT
	if p.ownDir {
		how = syscall.SIGQUIT
	}
	return errors.Join(p.shutDown(how), p.clean())
}

func (p *Postgres) shutDown(how syscall.Signal) error {
	p.postmaster.Signal(how) // an error means that it has gone already
	select {
	case <-p.exited:
		return nil
	case <-time.After(time.Minute):
		p.Kill()
		return fmt.Errorf("stop PostgreSQL: still there after a minute; its log says: %s", p.logTail())
	}
}

// Kill ends the server and all its processes at once, without a checkpoint, and
// waits until they have gone. Its directory stays; Restart recovers.
func (p *Postgres) Kill() {
	children := childrenOf(p.postmaster.Pid)
	p.postmaster.Kill() // an error means that it has gone already
	<-p.exited
	for _, pid := range children { // else they keep the shared memory for a moment
		syscall.Kill(pid, syscall.SIGKILL)
	}
	for _, pid := range children {
		for alive(pid) {
			time.Sleep(5 * time.Millisecond)
		}
	}
}

// Restart stops the server, if it runs, and starts it again with settings added
// to those it had. Conninfo stays the same.
func (p *Postgres) Restart(ctx context.Context, settings map[string]string) error {
	if err := p.shutDown(syscall.SIGINT); err != nil {
		return err
	}
	p.opt.Settings = maps.Clone(p.opt.Settings)
	if p.opt.Settings == nil {
		p.opt.Settings = make(map[string]string)
	}
	maps.Copy(p.opt.Settings, settings)
	return p.start(ctx)
}

func (p *Postgres) clean() error {
	if !p.ownDir {
		return nil
	}
	return os.RemoveAll(p.dir)
}

// childrenOf lists the processes whose parent is pid.
func childrenOf(pid int) []int {
	var children []int
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		child, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		if _, parent := status(child); parent == pid {
			children = append(children, child)
		}
	}
	return children
}

// alive reports whether pid still runs. One that nobody has waited for does not.
func alive(pid int) bool {
	state, _ := status(pid)
	return state != "" && state != "Z" && state != "X"
}

// status reads the state and the parent of a process; both are zero when there
// is no such process.
func status(pid int) (state string, parent int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", 0
	}
	// pid (command) state parent ..., where the command may hold anything
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 2 {
		return "", 0
	}
	parent, _ = strconv.Atoi(fields[1])
	return fields[0], parent
}
