package sandbox

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// Superuser is the role that Connect uses. The sandbox makes it, so that
// nothing depends on who is superuser in the restored cluster, nor on what
// settings that role has.
const Superuser = "pgkeep_sandbox"

// major reads which major version the data is of.
func (s *Sandbox) major() (int, error) {
	b, err := os.ReadFile(filepath.Join(s.Data(), "PG_VERSION"))
	if err != nil {
		return 0, fmt.Errorf("which PostgreSQL is the data of: %w: %w", err, fail.Corrupt)
	}
	major, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		return 0, fmt.Errorf("which PostgreSQL is the data of: PG_VERSION says %.20q: %w", b, fail.Corrupt)
	}
	return major, nil
}

// program finds one of the server's programs. Data can be opened by no other
// major version than its own.
func (s *Sandbox) program(name string) (string, error) {
	if s.opt.BinDir != "" {
		path := filepath.Join(s.opt.BinDir, name)
		if _, err := os.Stat(path); err != nil {
			return "", fail.Hint(fmt.Errorf("%w: %w", err, fail.PGVersion), "bin_dir is to be the directory of the server's programs")
		}
		return path, nil
	}
	major, err := s.major()
	if err != nil {
		return "", err
	}
	return find(major, name)
}

func find(major int, name string) (string, error) {
	for _, pattern := range []string{"/usr/lib/postgresql/%d/bin", "/usr/pgsql-%d/bin"} {
		path := filepath.Join(fmt.Sprintf(pattern, major), name)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
	}
	return "", fail.Hint(fmt.Errorf("no %s of PostgreSQL %d on this host: %w", name, major, fail.PGVersion),
		fmt.Sprintf("apt-get install postgresql-%d, or name the directory of its programs as bin_dir", major))
}

// Version asks the server's program for its version.
func (s *Sandbox) Version(ctx context.Context) (pg.Version, error) {
	out, err := s.run(ctx, "", "postgres", "--version")
	if err != nil {
		return 0, err
	}
	// postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)
	_, rest, _ := strings.Cut(out, "(PostgreSQL) ")
	number, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
	major, minor, _ := strings.Cut(number, ".")
	m, err := strconv.Atoi(major)
	if err != nil {
		return 0, fmt.Errorf("no version in %.100q", out)
	}
	n, _ := strconv.Atoi(minor) // of a beta, none
	return pg.Version(m*10000 + n), nil
}

// Create makes an empty cluster in the data directory, for a logical backup to
// be restored into; then call Open.
func (s *Sandbox) Create(ctx context.Context, major int) error {
	if s.opt.BinDir == "" { // the data does not tell yet
		initdb, err := find(major, "initdb")
		if err != nil {
			return err
		}
		s.opt.BinDir = filepath.Dir(initdb)
	}
	out, err := s.run(ctx, "", "initdb", "--pgdata="+s.Data(), "--username="+Superuser, "--encoding=UTF8", "--locale=C",
		"--auth=reject", "--data-checksums", "--no-sync", "--no-instructions")
	if err != nil {
		return fmt.Errorf("create an empty cluster: %w: %s", err, lastLine(out))
	}
	return nil
}

// Control is what pg_controldata prints of the data directory.
type Control struct {
	System      pg.SystemID
	State       string // as the program says, for example "shut down"
	Checkpoint  pg.LSN
	Redo        pg.LSN // where replay of the last checkpoint begins
	Timeline    pg.Timeline
	SegmentSize pg.SegmentSize
	Checksums   bool

	prepared, locks int    // settings that must not be smaller than the source's
	standby         [3]int // likewise, where there are connections during recovery: see standbySettings
}

var standbySettings = [...]string{"max_connections", "max_worker_processes", "max_wal_senders"}

// Control reads the control file.
func (s *Sandbox) Control(ctx context.Context) (Control, error) {
	out, err := s.run(ctx, "", "pg_controldata", "--pgdata="+s.Data())
	if err != nil {
		return Control{}, fmt.Errorf("%w: %s", err, lastLine(out))
	}
	c, err := parseControl(out)
	if err != nil {
		return c, fmt.Errorf("pg_controldata: %w", err)
	}
	return c, nil
}

func parseControl(text string) (c Control, err error) {
	has := make(map[string]string)
	for line := range strings.Lines(text) {
		key, value, _ := strings.Cut(line, ":")
		has[key] = strings.TrimSpace(value)
	}
	number := func(key string) int64 {
		n, nerr := strconv.ParseInt(has[key], 10, 64)
		if nerr != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", key, nerr))
		}
		return n
	}
	position := func(key string) pg.LSN {
		lsn, lerr := pg.ParseLSN(has[key])
		if lerr != nil {
			err = errors.Join(err, fmt.Errorf("%s: %w", key, lerr))
		}
		return lsn
	}
	var serr error
	c.System, serr = pg.ParseSystemID(has["Database system identifier"])
	c.State = has["Database cluster state"]
	c.Checkpoint = position("Latest checkpoint location")
	c.Redo = position("Latest checkpoint's REDO location")
	c.Timeline = pg.Timeline(number("Latest checkpoint's TimeLineID"))
	c.SegmentSize = pg.SegmentSize(number("Bytes per WAL segment"))
	c.Checksums = number("Data page checksum version") > 0
	c.prepared = int(number("max_prepared_xacts setting"))
	c.locks = int(number("max_locks_per_xact setting"))
	for i, name := range standbySettings {
		c.standby[i] = int(number(name + " setting"))
	}
	return c, errors.Join(err, serr)
}

// settings are all that the server is told: neither postgresql.conf nor
// postgresql.auto.conf of the source counts. So nothing there can run a
// command, load a library, or reach out.
func (s *Sandbox) settings(major int, c Control) map[string]string {
	mb := func(n int64) string { return strconv.FormatInt(max(1, n>>20), 10) + "MB" }
	set := map[string]string{
		"data_directory":             s.Data(),
		"hba_file":                   filepath.Join(s.confDir(), "pg_hba.conf"),
		"ident_file":                 filepath.Join(s.confDir(), "pg_ident.conf"),
		"unix_socket_directories":    s.runDir(),
		"unix_socket_permissions":    "0700",
		"listen_addresses":           "",
		"max_connections":            strconv.Itoa(s.opt.Sessions + 10),
		"shared_preload_libraries":   strings.Join(s.opt.Preload, ","),
		"max_wal_senders":            "0",
		"archive_mode":               "off",
		"hot_standby":                "off",
		"autovacuum":                 "off",
		"autovacuum_freeze_max_age":  "2000000000", // beyond it, vacuum runs though it is off
		"max_worker_processes":       "0",          // neither parallel queries, nor jobs of extensions, nor subscriptions
		"max_replication_slots":      "1000",       // positions of subscriptions are counted with slots, and are replayed
		"max_prepared_transactions":  strconv.Itoa(c.prepared),
		"max_locks_per_transaction":  strconv.Itoa(max(64, c.locks)),
		"session_replication_role":   "replica", // triggers, event triggers among them, keep still
		"jit":                        "off",
		"huge_pages":                 "off",
		"shared_buffers":             mb(s.opt.Memory / 4),
		"maintenance_work_mem":       mb(s.opt.Memory / 16),
		"temp_file_limit":            "10GB",
		"dynamic_shared_memory_type": "mmap", // files of the data directory; others would outlive a killed server
		"fsync":                      "off",  // as long as it serves a test: see Recover
		"synchronous_commit":         "off",
		"max_wal_size":               "1GB",
		"min_wal_size":               strconv.FormatInt(max(2, int64(c.SegmentSize)>>19), 10) + "MB",
		"checkpoint_timeout":         "1h",
		"logging_collector":          "off",
		"log_destination":            "stderr",
		"log_line_prefix":            "",
		"log_min_error_statement":    "panic", // queries hold values
		"log_checkpoints":            "off",
		"log_timezone":               "UTC",
		"timezone":                   "UTC",
		"lc_messages":                "C",
	}
	if major >= 15 {
		set["allow_in_place_tablespaces"] = "on" // where the source had any, replay makes them again
	}
	if major >= 17 {
		set["event_triggers"] = "off"
	}
	if major >= 18 {
		set["max_active_replication_origins"] = "1000"
	}
	return set
}

// configure writes the settings, and takes those of the source out of the way.
func (s *Sandbox) configure(set map[string]string, hba string) error {
	var conf strings.Builder
	for _, name := range slices.Sorted(maps.Keys(set)) {
		fmt.Fprintf(&conf, "%s = '%s'\n", name, strings.ReplaceAll(strings.ReplaceAll(set[name], `\`, `\\`), "'", "''"))
	}
	for path, content := range map[string]string{
		s.confFile(): conf.String(),
		filepath.Join(s.confDir(), "pg_hba.conf"):       hba,
		filepath.Join(s.confDir(), "pg_ident.conf"):     "",
		filepath.Join(s.Data(), "postgresql.auto.conf"): "# pgkeep: what the source had set counts for nothing here\n",
	} {
		if err := s.write(path, content); err != nil {
			return err
		}
	}
	return nil
}

func (s *Sandbox) confFile() string { return filepath.Join(s.confDir(), "postgresql.conf") }

func (s *Sandbox) write(path, content string) error {
	err := durable.WriteFile(path, 0o600, func(w io.Writer) error {
		_, err := io.WriteString(w, content)
		return err
	})
	if err != nil {
		return err
	}
	return s.own(path)
}

// startServer runs the postmaster and waits until it is up: has replayed what there
// is, say, and takes connections, or would. It returns what the log says.
func (s *Sandbox) startServer(ctx context.Context, offline bool, env []string, progress func(string), up func() bool) (log string, err error) {
	bin, err := s.program("postgres")
	if err != nil {
		return "", err
	}
	os.Remove(filepath.Join(s.Data(), "postmaster.pid")) // of an attempt that was killed, or of the source
	out, err := os.OpenFile(s.logPath(), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return "", err
	}
	defer out.Close()
	s.server, err = s.launch(offline, func() *exec.Cmd {
		cmd := exec.Command(bin, "-D", s.Data(), "-c", "config_file="+s.confFile())
		cmd.Dir, cmd.Env, cmd.Stdout, cmd.Stderr = s.dir, s.environ(env), out, out
		return cmd
	})
	if err != nil {
		return "", err
	}
	err = s.await(ctx, progress, up)
	log = s.serverLog()
	s.tell("postgres", log)
	if err != nil {
		s.kill()
	}
	if errors.Is(err, errEnded) {
		err = explain(log, err)
	}
	return log, err
}

// ready reports whether the server says so, in the file that pg_ctl reads too
// (LOCK_FILE_LINE_PM_STATUS in PostgreSQL's miscadmin.h).
func (s *Sandbox) ready() bool {
	b, _ := os.ReadFile(filepath.Join(s.Data(), "postmaster.pid"))
	lines := strings.Split(string(b), "\n")
	return len(lines) >= 8 && strings.TrimSpace(lines[7]) == "ready"
}

var (
	errEnded   = errors.New("the server ended")
	errStalled = errors.New("the server stood still")
)

// await waits until done, and gives up when the server has ended or shows no
// sign of work for too long.
func (s *Sandbox) await(ctx context.Context, progress func(string), done func() bool) error {
	var last uint64
	var title string
	moved, looked := time.Now(), time.Time{}
	for {
		ended := !s.server.running()
		if done() {
			return nil
		}
		if ended {
			return errEnded
		}
		if now := time.Now(); now.Sub(looked) >= min(time.Second, s.opt.StallAfter/10) {
			looked = now
			pids, ticks := family(s.server.cmd.Process.Pid)
			if info, err := os.Stat(s.logPath()); err == nil {
				ticks += uint64(info.Size())
			}
			title = replaying(pids)
			if progress != nil {
				progress(title)
			}
			if ticks != last {
				last, moved = ticks, now
			} else if now.Sub(moved) >= s.opt.StallAfter {
				return fail.With(fail.Stalled, fmt.Errorf("%w for %v%s", errStalled, s.opt.StallAfter, during(title)))
			}
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("%w%s", err, during(title))
		}
	}
}

// replaying is what the process that replays says it is doing, for example
// "recovering 000000010000000000000002"; "" if there is none.
func replaying(pids []int) string {
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if err != nil {
			continue
		}
		title, _, _ := bytes.Cut(b, []byte{0})
		doing, ok := strings.CutPrefix(string(title), "postgres: startup ")
		if !ok {
			continue
		}
		doing = strings.TrimSpace(doing)
		if own, _ := family(pid); len(own) > 1 { // the only program that it ever runs
			doing = strings.TrimPrefix(doing+", in the restore command", ", ")
		}
		return doing
	}
	return ""
}

func during(title string) string {
	if title == "" {
		return ""
	}
	return ", " + title
}

// Connect opens a session in a database as a superuser without triggers, after
// Open. Unqualified names are those of pg_catalog. Nothing that ALTER DATABASE or
// ALTER ROLE ALL had set at the source is in force.
func (s *Sandbox) Connect(ctx context.Context, database string) (*pgx.Conn, error) {
	major, err := s.major()
	if err != nil {
		return nil, err
	}
	set := Honest(major)
	set["search_path"], set["session_replication_role"] = "pg_catalog", "replica"
	conn, err := s.ConnectAs(ctx, database, Superuser, set)
	if err != nil {
		return nil, err
	}
	_, err = conn.Exec(ctx, "SELECT set_config(name, coalesce(boot_val, ''), false) FROM pg_settings "+
		"WHERE source IN ('global', 'database', 'user', 'database user') AND context IN ('user', 'superuser')")
	if err != nil {
		conn.Close(context.WithoutCancel(ctx))
		return nil, fmt.Errorf("put away settings of the source: %w", err)
	}
	return conn, nil
}

// Honest are the settings of a session that sees what there is, and does so until
// it is done: with others, that databases and roles may bring from the source, a
// server of a major version hides damage, loads a library, or ends.
func Honest(major int) map[string]string {
	set := map[string]string{
		"zero_damaged_pages": "off", "ignore_checksum_failure": "off", "role": "none",
		"session_preload_libraries": "", "local_preload_libraries": "",
		"statement_timeout": "0", "lock_timeout": "0", "idle_in_transaction_session_timeout": "0", "default_transaction_read_only": "off",
	}
	if major >= 14 {
		set["idle_session_timeout"] = "0"
	}
	if major >= 17 {
		set["transaction_timeout"] = "0"
	}
	return set
}

// ConnectAs opens a session as any role, without its password.
func (s *Sandbox) ConnectAs(ctx context.Context, database, role string, set map[string]string) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig("sslmode=disable")
	if err != nil {
		return nil, err
	}
	cfg.Host, cfg.Port, cfg.Database, cfg.User, cfg.Password = s.runDir(), 5432, database, role, ""
	cfg.ConnectTimeout = time.Minute
	cfg.RuntimeParams = map[string]string{"application_name": "pgkeep", "client_encoding": "UTF8"}
	maps.Copy(cfg.RuntimeParams, set)
	return pgx.ConnectConfig(ctx, cfg)
}

// Conninfo reaches the server as a superuser, for programs that take a libpq
// connection string, after Open.
func (s *Sandbox) Conninfo() string {
	return fmt.Sprintf("host='%s' port=5432 user=%s dbname=template1 sslmode=disable", s.runDir(), Superuser)
}

// Close ends the server as "pg_ctl stop -m fast" does. One that does not end so
// is killed, and that is an error. Without a server nothing happens.
func (s *Sandbox) Close(ctx context.Context) error {
	if s.server == nil {
		return nil
	}
	s.server.cmd.Process.Signal(syscall.SIGINT)
	err := s.await(ctx, nil, func() bool { return !s.server.running() })
	s.kill()
	if err != nil {
		return fmt.Errorf("stop the server: %w", err)
	}
	return nil
}

// kill ends the server and all its processes at once, and waits for them.
func (s *Sandbox) kill() {
	if s.server == nil {
		return
	}
	if !s.server.inside && s.server.running() {
		s.server.cmd.Process.Signal(syscall.SIGQUIT) // it tells its processes
		select {
		case <-s.server.exited:
		case <-time.After(6 * time.Second): // one more than it gives them
		}
	}
	s.server.cmd.Process.Kill()
	<-s.server.exited
	if !s.server.inside {
		endHolders(context.Background(), filepath.Join(s.dir, badgeName)) // bounded by itself
	}
	s.server = nil
}

// Killed reports whether a process of the server that runs was killed from the
// outside, as by a kernel that is short of memory: it ends them all.
func (s *Sandbox) Killed() bool { return strings.Contains(s.serverLog(), "was terminated by signal 9") }

// serverLog returns the beginning and the end of the server's log.
func (s *Sandbox) serverLog() string {
	const most = 4 << 20
	b, err := os.ReadFile(s.logPath())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err.Error()
	}
	if len(b) > most {
		b = slices.Concat(b[:most/2], []byte("\n"), b[len(b)-most/2:])
	}
	return strings.ToValidUTF8(string(b), "?")
}

// explain adds to an error what the server's log gives as the cause.
func explain(log string, err error) error {
	var cause string
	for line := range strings.Lines(log) {
		line = strings.TrimSpace(line)
		for _, level := range []string{"PANIC:", "FATAL:", "ERROR:"} {
			if strings.HasPrefix(line, level) && (cause == "" || level == "PANIC:") {
				cause = strings.TrimSpace(strings.TrimPrefix(line, level))
			}
		}
	}
	full := false
	for line := range strings.Lines(log) {
		if full = strings.Contains(line, "No space left on device"); full {
			cause = strings.TrimSpace(line)
			break
		}
	}
	if cause == "" {
		cause = lastLine(log)
	}
	if cause != "" {
		err = fmt.Errorf("%w: %s", err, shorten(cause))
	}
	if full {
		err = fail.With(fail.NoSpace, err)
	}
	return err
}

func lastLine(text string) string {
	text = strings.TrimSpace(text)
	return shorten(strings.TrimSpace(text[strings.LastIndexByte(text, '\n')+1:]))
}

func shorten(s string) string {
	const most = 400
	if len(s) > most {
		return strings.ToValidUTF8(s[:most], "") + " …"
	}
	return s
}
