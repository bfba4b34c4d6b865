package sandbox

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// A Target is where replay ends. At most one field is set, beside Exclusive; the
// zero Target is the end of the archive.
type Target struct {
	Time      time.Time `json:"time,omitzero"` // of commits
	Stop      pg.LSN    `json:"stop,omitzero"` // of Time: the record to end before; 0: PostgreSQL looks for it
	LSN       pg.LSN    `json:"lsn,omitzero"`
	XID       uint32    `json:"xid,omitempty"`       // the end of a transaction
	Name      string    `json:"name,omitempty"`      // of a restore point
	Immediate bool      `json:"immediate,omitempty"` // as soon as the data is consistent
	Exclusive bool      `json:"exclusive,omitempty"` // before what is exactly at Time, LSN or XID
}

func (t Target) String() string {
	switch {
	case !t.Time.IsZero():
		return t.Time.UTC().Format("2006-01-02 15:04:05.999999 UTC")
	case t.LSN != 0:
		return t.LSN.String()
	case t.XID != 0:
		return "transaction " + strconv.FormatUint(uint64(t.XID), 10)
	case t.Name != "":
		return "restore point " + strconv.Quote(t.Name)
	case t.Immediate:
		return "the end of the backup"
	}
	return "the end of the archive"
}

func (t Target) settings() map[string]string {
	set := map[string]string{"recovery_target_action": "promote", "recovery_target_inclusive": strconv.FormatBool(!t.Exclusive)}
	switch {
	case t.Stop != 0:
		set["recovery_target_lsn"], set["recovery_target_inclusive"] = t.Stop.String(), "false"
	case !t.Time.IsZero():
		set["recovery_target_time"] = t.Time.UTC().Format("2006-01-02 15:04:05.999999+00")
	case t.LSN != 0:
		set["recovery_target_lsn"] = t.LSN.String()
	case t.XID != 0:
		set["recovery_target_xid"] = strconv.FormatUint(uint64(t.XID), 10)
	case t.Name != "":
		set["recovery_target_name"] = t.Name
	case t.Immediate:
		set["recovery_target"] = "immediate"
	}
	return set
}

// A Recovery says how the data is brought to a moment.
type Recovery struct {
	// Command is the restore_command. It runs with a network, as the server's
	// OS user, in Env.
	Command string
	Env     []string    // beside PATH, HOME, LC_ALL and TZ; "name=value"
	Target  Target      // zero: the end of the archive
	Follow  pg.Timeline // the timeline to end on; 0: the newest in the archive
	// Limit is how long it may take. 0: as long as ctx.
	Limit time.Duration
	// Progress is told now and then what the server does, for example
	// "recovering 000000010000000000000002". May be nil.
	Progress func(doing string)
}

// Recovered is what a recovery did. After Halt, it tells nothing of where that
// is but Control.
type Recovered struct {
	From       pg.LSN      // where replay began
	LSN        pg.LSN      // where it ended, and the new timeline begins
	Timeline   pg.Timeline // that was followed last
	LastCommit time.Time   // the newest transaction that was replayed; zero: there was none
	Segments   int         // fetched from the archive
	Reason     string      // why it ended there, in PostgreSQL's words
	Took       time.Duration
	Control    Control // after it

	names string // of the segments that were fetched, with blanks between
}

// After is what two recoveries did, r after an earlier one that had halted.
func (r Recovered) After(earlier Recovered) Recovered {
	if earlier.From != 0 {
		r.From = earlier.From
	}
	if r.LastCommit.IsZero() {
		r.LastCommit = earlier.LastCommit
	}
	names := strings.Fields(earlier.names + " " + r.names)
	slices.Sort(names)
	names = slices.Compact(names) // some are fetched again
	r.Segments, r.names = len(names), strings.Join(names, " ")
	r.Took += earlier.Took
	return r
}

// Recover replays the log up to the target and ends the server again, so that
// the files are those of a cleanly stopped cluster. Meanwhile nobody can
// connect, and no code of the source runs: the settings are ours, and there are
// neither sessions nor background workers. That is why this part may have a
// network, which the restore command needs.
//
// It runs with fsync until it is done, so that its time is the time a restore
// takes; what the kernel had not written when the host died is then lost. It fails
// with fail.RestoreFailed where PostgreSQL gives up; with fail.NoSpace; with
// fail.Stalled when nothing moves, or the limit is over.
func (s *Sandbox) Recover(ctx context.Context, r Recovery) (Recovered, error) {
	done, err := s.recover(ctx, r)
	if err != nil {
		return done, fmt.Errorf("replay up to %v: %w", r.Target, err)
	}
	return done, nil
}

func (s *Sandbox) recover(ctx context.Context, r Recovery) (done Recovered, err error) {
	set, done, err := s.replay(ctx, r, "promote")
	if err != nil {
		return done, err
	}
	if err := s.unsync(set); err != nil {
		return done, err
	}
	if err := s.Close(ctx); err != nil {
		return done, err
	}
	if done.Control, err = s.Control(ctx); err != nil {
		return done, err
	}
	return done, s.readFork(&done)
}

// replay starts the server, and returns when it has replayed what it is told to:
// then it is open to nobody, or, with the action "shutdown", has ended.
func (s *Sandbox) replay(ctx context.Context, r Recovery, action string) (set map[string]string, done Recovered, err error) {
	if r.Command == "" {
		return nil, done, fmt.Errorf("there is no restore_command: %w", fail.BadConfig)
	}
	major, err := s.major()
	if err != nil {
		return nil, done, err
	}
	before, err := s.Control(ctx)
	if err != nil {
		return nil, done, err
	}
	set = s.settings(major, before)
	set["fsync"] = "on"
	set["restore_command"] = r.Command
	for name, value := range r.settings() {
		set[name] = value
	}
	if r.Target.Immediate && major >= 15 { // it would look ahead, into log that may be let go
		set["recovery_prefetch"] = "off"
	}
	set["recovery_target_action"] = action
	if err := s.configure(set, "local all all reject\n"); err != nil {
		return nil, done, err
	}
	os.Remove(filepath.Join(s.Data(), "standby.signal"))
	if err := s.write(filepath.Join(s.Data(), "recovery.signal"), ""); err != nil {
		return nil, done, err
	}

	limited := ctx
	if r.Limit > 0 {
		var cancel context.CancelFunc
		limited, cancel = context.WithTimeout(ctx, r.Limit)
		defer cancel()
	}
	begun := time.Now()
	log, err := s.startServer(limited, false, r.Env, r.Progress, s.ready)
	done, perr := parseReplay(log)
	done.Took = time.Since(begun)
	for _, m := range restored.FindAllStringSubmatch(log, -1) {
		done.names += " " + m[1]
	}
	switch {
	case action == "shutdown" && errors.Is(err, errEnded) && strings.Contains(log, "shutdown at recovery target"):
	case err == nil:
	case ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded):
		return set, done, fail.With(fail.Stalled, fmt.Errorf("not done within %v%s", r.Limit, strings.TrimPrefix(err.Error(), context.DeadlineExceeded.Error())))
	case errors.Is(err, errEnded) && fail.KindOf(err) == fail.Unknown:
		return set, done, fail.With(fail.RestoreFailed, err)
	default:
		return set, done, err
	}
	return set, done, perr
}

// settings are those of the target and of the way there.
func (r Recovery) settings() map[string]string {
	set := r.Target.settings()
	set["recovery_target_timeline"] = "latest"
	if r.Follow != 0 {
		set["recovery_target_timeline"] = strconv.FormatUint(uint64(r.Follow), 10)
	}
	return set
}

// Halt replays the log as Recover does, but does not open: another Halt, or
// Recover, goes on from there. The target is a position, exclusive: all records that
// begin before it are replayed.
func (s *Sandbox) Halt(ctx context.Context, r Recovery) (Recovered, error) {
	_, done, err := s.replay(ctx, r, "shutdown")
	if err == nil && s.server != nil { // it has not come by the target, and would open
		s.kill()
		err = fmt.Errorf("the server did not halt: %w", fail.RestoreFailed)
	}
	if err == nil {
		done.Control, err = s.Control(ctx)
	}
	if err != nil {
		return done, fmt.Errorf("replay up to %v: %w", r.Target, err)
	}
	return done, nil
}

// Peek opens, for questions and offline, what Halt with the same target and
// timeline has left: ConnectAs works until Close. Nothing can be changed, and so
// no role can be made. The server never gets any further: to open it would take a
// new timeline, and whether a number for that is free it is refused to know.
func (s *Sandbox) Peek(ctx context.Context, r Recovery) error {
	if err := s.peek(ctx, r); err != nil {
		return fmt.Errorf("open the cluster as of %v: %w", r.Target, err)
	}
	return nil
}

func (s *Sandbox) peek(ctx context.Context, r Recovery) error {
	major, err := s.major()
	if err != nil {
		return err
	}
	c, err := s.Control(ctx)
	if err != nil {
		return err
	}
	set := s.settings(major, c)
	for name, value := range r.settings() {
		set[name] = value
	}
	if r.Follow == 0 { // the newest is looked for by asking for the history of the one after it
		set["recovery_target_timeline"] = "current"
	}
	set["hot_standby"] = "on"
	for i, name := range standbySettings { // else it takes no connections
		have, _ := strconv.Atoi(set[name])
		set[name] = strconv.Itoa(max(have, c.standby[i]))
	}
	set["recovery_target_action"] = "pause"
	// All it needs is in pg_wal by now. Exit status 1 means that the archive has
	// nothing, above 125 that nobody knows.
	set["restore_command"] = `case %f in *.history) test -e pg_wal/%f || exit 200;; esac; exit 1`
	if err := s.configure(set, "local all all trust\n"); err != nil {
		return err
	}
	log, err := s.startServer(ctx, true, nil, nil, func() bool {
		return s.paused() || strings.Contains(s.serverLog(), "insufficient parameter settings") // which it waits for, too
	})
	if err == nil && !s.paused() {
		s.kill()
		err = fmt.Errorf("it takes no connections: %s: %w", lastLine(log), fail.RestoreFailed)
	}
	return err
}

// paused reports whether the server waits at the target, and takes connections.
func (s *Sandbox) paused() bool {
	return s.ready() && strings.Contains(s.serverLog(), "pausing at the end of recovery")
}

// unsync lets the server end without waiting for the disk: who restores opens it
// before that, and the sandbox does not outlive the host.
func (s *Sandbox) unsync(set map[string]string) error {
	set["fsync"] = "off"
	if err := s.configure(set, "local all all reject\n"); err != nil {
		return err
	}
	return s.server.cmd.Process.Signal(syscall.SIGHUP)
}

var restored = regexp.MustCompile(`restored log file "([0-9A-F]{24})"`)

// parseReplay reads what a server logged of its recovery (StartupXLOG in
// PostgreSQL's access/transam/xlog.c and xlogrecovery.c).
func parseReplay(log string) (r Recovered, err error) {
	for line := range strings.Lines(log) {
		text, ok := strings.CutPrefix(strings.TrimSpace(line), "LOG:")
		if !ok {
			continue
		}
		text = strings.TrimSpace(text)
		if at, ok := strings.CutPrefix(text, "redo starts at "); ok {
			r.From, err = pg.ParseLSN(at)
		} else if strings.HasPrefix(text, `restored log file "`) && !strings.Contains(text, ".history") {
			r.Segments++
		} else if at, ok := strings.CutPrefix(text, "last completed transaction was at log time "); ok {
			r.LastCommit, err = time.Parse("2006-01-02 15:04:05.999999-07", at)
			r.LastCommit = r.LastCommit.UTC()
		} else if strings.HasPrefix(text, "recovery stopping ") {
			r.Reason = text
		}
		if err != nil {
			return r, fmt.Errorf("server log %.200q: %w", line, err)
		}
	}
	return r, nil
}

// readFork reads where the recovered cluster left its old timeline, from the
// history file that it wrote.
func (s *Sandbox) readFork(r *Recovered) error {
	now := r.Control.Timeline
	b, err := os.ReadFile(filepath.Join(s.Data(), "pg_wal", pg.HistoryName(now).String()))
	if err != nil {
		return fmt.Errorf("where did recovery end: %w", err)
	}
	forks, err := pg.ParseHistory(now, string(b))
	if err != nil {
		return fmt.Errorf("where did recovery end: %w", err)
	}
	last := forks[len(forks)-1]
	r.Timeline, r.LSN = last.Timeline, last.At
	return nil
}

// Open starts the server for questions, without a network where that can be
// done, and returns when it takes connections. The data must be at rest: after
// Recover, or Create.
func (s *Sandbox) Open(ctx context.Context) error {
	if err := s.open(ctx); err != nil {
		return fmt.Errorf("open the restored cluster: %w", err)
	}
	return nil
}

func (s *Sandbox) open(ctx context.Context) error {
	if err := s.Close(ctx); err != nil {
		return err
	}
	major, err := s.major()
	if err != nil {
		return err
	}
	c, err := s.Control(ctx)
	if err != nil {
		return err
	}
	if err := s.configure(s.settings(major, c), "local all all trust\n"); err != nil {
		return err
	}
	// A server of one user knows no roles, and so needs none to let us in.
	roles := "CREATE ROLE " + Superuser + "\n" +
		"ALTER ROLE " + Superuser + " SUPERUSER LOGIN CONNECTION LIMIT -1 VALID UNTIL 'infinity'\n" +
		"ALTER ROLE " + Superuser + " RESET ALL\n"
	if out, err := s.run(ctx, roles, "postgres", "--single", "-D", s.Data(), "-c", "config_file="+s.confFile(), "template1"); err != nil {
		return explain(out, err)
	}
	_, err = s.startServer(ctx, true, nil, nil, s.ready)
	return err
}
