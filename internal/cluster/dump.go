package cluster

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
)

// DumpOptions say what to dump, and how to see that it moves.
type DumpOptions struct {
	Tools    Tools
	Database string
	Snapshot string // of OpenSnapshot; "": pg_dump takes one of its own
	Dir      string // made by pg_dump, or empty
	Jobs     int    // tables dumped at a time; 0: one

	Lock *os.File     // from TakeLock; nil: whoever comes next cannot tell that this one still runs
	Log  *slog.Logger // what pg_dump says; nil: it is not logged

	LockWait   time.Duration     // how long to wait for a table that somebody holds; 0: 5 minutes
	StallAfter time.Duration     // standing still for so long means hanging; 0: 10 minutes
	Progress   func(bytes int64) // the dump has so many bytes now. A call means that it moves; none, that it stands
}

// Dump writes one database as a directory of uncompressed files, one per table
// (pg_dump --format=directory), synced to disk. Row-level security is an error,
// never a silent omission. When it returns, no process of it is left, whatever
// happened. It fails with fail.Stalled when nothing moves or a table stays
// locked, fail.PGDown, fail.PGDenied, fail.PGVersion, fail.NoSpace, or else
// fail.DumpFailed; and with ctx.Err() when the context ends first.
func (c Cluster) Dump(ctx context.Context, opt DumpOptions) error {
	wait := opt.LockWait
	if wait <= 0 {
		wait = 5 * time.Minute
	}
	args := []string{
		"--format=directory", "--compress=0", "--no-password",
		"--jobs=" + strconv.Itoa(max(1, opt.Jobs)),
		"--lock-wait-timeout=" + strconv.FormatInt(wait.Milliseconds(), 10),
		"--file=" + opt.Dir,
	}
	if opt.Snapshot != "" {
		args = append(args, "--snapshot="+opt.Snapshot)
	}
	tag := newTag()
	ch, err := c.tool(opt.Tools, "pg_dump", opt.Database, tag, args)
	if err != nil {
		return err
	}
	ch.lock, ch.log = opt.Lock, opt.Log
	said, err := ch.run(ctx, watch{
		bytes:    func(int) int64 { return dirBytes(opt.Dir) },
		busy:     c.busy(tag),
		progress: opt.Progress,
		after:    opt.StallAfter,
	})
	return explain(fmt.Sprintf("dump database %q", opt.Database), said, err, fail.DumpFailed)
}

// GlobalsOptions are for DumpGlobals.
type GlobalsOptions struct {
	Tools         Tools
	File          string // replaced when the dump is complete, and only then
	RolePasswords bool   // also the hashes of passwords: the file is then a credential
	Lock          *os.File
	Log           *slog.Logger
	StallAfter    time.Duration
}

// DumpGlobals writes what belongs to no database, roles, tablespaces and their
// settings, as SQL (pg_dumpall --globals-only) into a file that only its owner
// reads, synced to disk. It fails as Dump does.
func (c Cluster) DumpGlobals(ctx context.Context, opt GlobalsOptions) error {
	cfg, err := c.config("")
	if err != nil {
		return err
	}
	tag := newTag()
	args := []string{"--globals-only", "--no-password"}
	if !opt.RolePasswords {
		args = append(args, "--no-role-passwords")
	}
	// pg_dumpall picks the database it connects to by itself, unless told here.
	args = append(args, "--database="+conninfo{{"dbname", cfg.Database}}.String())
	ch, err := c.tool(opt.Tools, "pg_dumpall", cfg.Database, tag, args)
	if err != nil {
		return err
	}
	ch.lock, ch.log = opt.Lock, opt.Log
	// pg_dumpall does not say why it cannot connect.
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return err
	}
	hangUp(conn)
	var said *speech
	var ended error
	err = durable.WriteFile(opt.File, 0o600, func(w io.Writer) error {
		ch.stdout = w
		said, ended = ch.run(ctx, watch{busy: c.busy(tag), after: opt.StallAfter})
		return ended
	})
	if ended != nil {
		err = ended
	}
	return explain("dump roles and tablespaces", said, err, fail.DumpFailed)
}

// tool prepares a program to work on a database. The password goes through its
// environment, which only its own user and root can read, and never through its
// arguments.
func (c Cluster) tool(t Tools, name, database, tag string, args []string) (child, error) {
	info, password, err := parseConninfo(c.Conninfo)
	if err != nil {
		return child{}, err
	}
	if c.Password != "" {
		password = c.Password
	}
	info = info.with("dbname", database).with("application_name", tag)
	env := []string{"LC_ALL=C", "LANG=C"}
	for _, key := range inherited {
		if value, ok := os.LookupEnv(key); ok && (key != "PGPASSWORD" || password == "") {
			env = append(env, key+"="+value)
		}
	}
	if password != "" {
		env = append(env, "PGPASSWORD="+password)
	}
	return child{path: t.path(name), args: append(args, "--dbname="+info.String()), env: env}, nil
}

// inherited is what a program gets to see of our environment: what pgx reads
// there too, so that both reach the same server as the same role.
var inherited = []string{
	"PATH", "HOME", "USER", "TMPDIR",
	"PGHOST", "PGPORT", "PGUSER", "PGPASSWORD", "PGPASSFILE", "PGSERVICE", "PGSERVICEFILE", "PGSYSCONFDIR", "PGOPTIONS",
	"PGCONNECT_TIMEOUT", "PGSSLMODE", "PGSSLKEY", "PGSSLCERT", "PGSSLCERTMODE", "PGSSLSNI", "PGSSLROOTCERT",
	"PGSSLNEGOTIATION", "PGTARGETSESSIONATTRS", "PGCHANNELBINDING", "PGREQUIREAUTH",
	"PGMINPROTOCOLVERSION", "PGMAXPROTOCOLVERSION",
}

// newTag names the sessions of one run of a program in pg_stat_activity.
func newTag() string { return applicationName + " " + rand.Text()[:10] }

// busy asks the server whether it works for the sessions of that name: runs a
// statement that waits neither for a lock nor for the client.
func (c Cluster) busy(tag string) func(context.Context) bool {
	return func(ctx context.Context) bool {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		conn, err := c.Connect(ctx, "")
		if err != nil {
			return false
		}
		defer hangUp(conn)
		var busy bool
		err = conn.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE application_name = $1
			AND state = 'active' AND coalesce(wait_event_type, '') NOT IN ('Lock', 'Client'))`, tag).Scan(&busy)
		return err == nil && busy
	}
}

// dirBytes sums the sizes of the files in a directory, which need not exist yet.
func dirBytes(dir string) (sum int64) {
	entries, _ := os.ReadDir(dir)
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			sum += info.Size()
		}
	}
	return sum
}

// explain turns how a program ended into an error that says what to do. Where
// its words tell no kind, it is failed.
func explain(op string, said *speech, err error, failed fail.Kind) error {
	_, exited := errors.AsType[*exec.ExitError](err)
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errStalled):
		return fmt.Errorf("%s: %w: %w", op, err, fail.Stalled)
	case errors.Is(err, os.ErrNotExist) && !exited:
		return fmt.Errorf("%s: %w: %w", op, err, fail.PGVersion)
	case !exited:
		return fmt.Errorf("%s: %w", op, err)
	}
	kind, hint := said.kind(failed)
	what := said.summary()
	if what == "" {
		what = said.program
	}
	err = fmt.Errorf("%s: %s (%w): %w", op, strings.TrimSuffix(what, "."), err, kind)
	if hint != "" {
		err = fail.Hint(err, hint)
	}
	return err
}

// kind reads what a program complained of. Its own words are English, because
// it runs with LC_ALL=C; the server's are in the server's language, and then
// the kind is failed.
func (s *speech) kind(failed fail.Kind) (kind fail.Kind, hint string) {
	switch {
	case s.says("No space left on device", "Disk quota exceeded"):
		return fail.NoSpace, ""
	case s.says("server version mismatch", "unsupported version"):
		return fail.PGVersion, ""
	case s.says("could not open extension control file", `could not access file "$libdir`, "could not load library"):
		return fail.PGVersion, "install for that PostgreSQL the extensions that the source has"
	case s.says("canceling statement due to lock timeout", "canceling statement due to statement timeout", "could not obtain lock on relation"):
		return fail.Stalled, "another session locks a table; see which: SELECT pid, relation::regclass FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND granted"
	case s.says("row-level security", "permission denied for"), s.says("must be superuser", "must be owner of"):
		return fail.PGDenied, "pgkeep backs up with a role that has pg_read_all_data and BYPASSRLS, or is a superuser"
	case s.says("no pg_hba.conf entry", "authentication failed", "no password supplied", `FATAL:  role "`):
		return fail.PGDenied, ""
	case s.says(`FATAL:  database "`):
		return fail.BadConfig, ""
	case s.says("connection to server", "could not connect to server", "could not connect to database", "server closed the connection", "terminating connection",
		"the database system is", "no connection to the server", "SSL SYSCALL error"):
		return fail.PGDown, ""
	}
	return failed, ""
}
