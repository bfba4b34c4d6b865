package proof

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
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// A Test says what to expect of a backup that was restored into a sandbox.
type Test struct {
	Sandbox *sandbox.Sandbox

	// Recovery of a physical backup. Nil: the sandbox is open already and holds
	// what a logical backup was restored into.
	Recovery *sandbox.Recovery
	// System that the data must be of. 0: not compared.
	System pg.SystemID
	// AtLeast is the position that replay must reach: of a target that is the
	// end of the archive, where the archive ends. 0: not compared. Beyond that,
	// PostgreSQL itself refuses to end before a target.
	AtLeast pg.LSN
	// Timeline that replay must end on. 0: not compared.
	Timeline pg.Timeline

	Source  Position      // at the test's start; zero: not known
	Fetched time.Duration // how long it took to restore the files
	Bytes   int64         // of those files

	// Rows that tables must have where replay ends, by database and table, as
	// cluster.TableRows names it.
	Rows map[string]map[string]int64
	// Halts are places on the way of replay at which tables must have the rows that
	// were counted at the source, in order.
	Halts []restore.Halt
	// Unknown says why there are no Rows and no Halts, or not all there might be.
	Unknown    string
	Assertions []Assertion

	Skip []string // names of checks not to be made
	Jobs int      // tables and indexes checked at a time; 0: 2
	// Thorough compares every index with its table. Otherwise the large ones take
	// turns, from day to day: see inTurn.
	Thorough bool
	Day      time.Time // whose turn it is
	// Limit is how long all of it may take. 0: as long as ctx.
	Limit    time.Duration
	Progress func(doing string) // may be nil, and called from several goroutines
}

// Names of checks.
const (
	CheckFiles       = "files"       // they came out of the repository; there only if they did not
	CheckTablespaces = "tablespaces" // they are there, and within the sandbox
	CheckManifest    = "manifest"    // files are those of backup_manifest
	CheckReplay      = "replay"      // the log was replayed, and PostgreSQL opened it
	CheckTarget      = "target"      // where replay ended is what was asked for
	CheckSystem      = "system"      // it is the cluster that was meant
	CheckChecksums   = "checksums"   // of every page
	CheckOpen        = "open"        // it takes connections
	CheckCollations  = "collations"  // sort order here is that of the source
	CheckHeap        = "heap"        // amcheck of tables
	CheckBTree       = "btree"       // amcheck of indexes, and of some against their tables
	CheckRead        = "read"        // every row can be read
	CheckRows        = "rows"        // as many as were counted
	CheckAssertions  = "assertions"  // of the user
	CheckTime        = "time"        // there only if it took too long
)

// Run makes the test and reports. The error is that of ctx, and the only one:
// whatever else goes wrong is a failed check. The server is closed at the end,
// not removed.
func (t Test) Run(ctx context.Context) (Report, error) {
	r := Report{Started: time.Now().UTC(), Source: t.Source}
	limited := ctx
	if t.Limit > 0 {
		var cancel context.CancelFunc
		limited, cancel = context.WithTimeout(ctx, t.Limit)
		defer cancel()
	}
	t.run(limited, &r)
	if limited.Err() != nil && ctx.Err() == nil {
		r.Checks = append(r.Checks, failed(CheckTime, fail.With(fail.Stalled, fmt.Errorf("not done within %v", t.Limit))))
	}
	r.Finished = time.Now().UTC()
	r.judge()
	return r, ctx.Err()
}

func (t Test) run(ctx context.Context, r *Report) {
	t.begin(r)
	open := t.Recovery == nil || t.replay(ctx, r) && t.open(ctx, r)
	t.look(ctx, r, open)
}

// begin notes how the files came, and what is asked for.
func (t Test) begin(r *Report) {
	if t.Recovery != nil {
		r.Target = t.Recovery.Target
	}
	if t.Fetched > 0 {
		r.Phases = append(r.Phases, Phase{Name: Fetch, Seconds: t.Fetched.Seconds(), Bytes: t.Bytes})
	}
}

// look checks what is in the cluster, if it is open, and closes it.
func (t Test) look(ctx context.Context, r *Report, open bool) {
	if v, err := t.Sandbox.Version(ctx); err == nil {
		r.Version = v
	}
	if open {
		begun := time.Now()
		t.inspect(ctx, r)
		r.phase(Checks, begun, r.Bytes)
	}
	if err := t.Sandbox.Close(ctx); err != nil && open && ctx.Err() == nil {
		r.Checks = append(r.Checks, failed(CheckOpen, err))
	}
	r.Isolation = t.Sandbox.Isolation()
}

func (t Test) wants(check string) bool { return !slices.Contains(t.Skip, check) }

func (t Test) tell(format string, args ...any) {
	if t.Progress != nil {
		t.Progress(fmt.Sprintf(format, args...))
	}
}

// failed makes the check of one step that went wrong before there were sessions,
// so that its error holds nothing of the data.
func failed(name string, err error) Check {
	return Check{Name: name, Verdict: Failed, Kind: troubles(err), Items: 1, Failed: 1, Message: err.Error()}
}

// troubles returns the kind of an error that says nothing about the backup.
func troubles(err error) fail.Kind {
	switch k := fail.KindOf(err); k {
	case fail.Unknown:
		if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
			return fail.Stalled
		}
		return k
	case fail.Corrupt, fail.Untrusted, fail.Unsupported, fail.Unreachable, fail.WALHole, fail.NoBackup, fail.WrongSystem,
		fail.RestoreFailed, fail.ProofFailed, fail.PageDamage:
		return fail.Unknown
	default:
		return k
	}
}

// replay brings the files to the target. It reports whether that is where they
// are.
func (t Test) replay(ctx context.Context, r *Report) bool {
	begun := time.Now()
	check := Check{Name: CheckTablespaces, Verdict: Passed, Items: 1}
	if err := t.Sandbox.Confine(); err != nil {
		check = failed(CheckTablespaces, err)
	}
	check.Seconds = time.Since(begun).Seconds()
	r.Checks = append(r.Checks, check)
	if check.Verdict != Passed {
		return false
	}

	if t.wants(CheckManifest) {
		begun = time.Now()
		t.tell("checking files against backup_manifest")
		r.Checks = append(r.Checks, t.checkManifest(ctx))
		r.phase(Manifest, begun, t.Bytes)
	}

	recovery := *t.Recovery
	if recovery.Progress == nil {
		recovery.Progress = func(doing string) { t.tell("%s", doing) }
	}
	halted, rows, err := t.halt(ctx, r, recovery)
	if err != nil {
		return false
	}
	done, err := t.Sandbox.Recover(ctx, recovery)
	done = done.After(halted)
	log := int64(0)
	if done.LSN > done.From && done.From > 0 {
		log = int64(done.LSN - done.From)
	}
	r.Phases = append(r.Phases, Phase{Name: Replay, Seconds: done.Took.Seconds(), Bytes: log})
	if rows.Seconds > 0 {
		r.Phases = append(r.Phases, Phase{Name: Rows, Seconds: rows.Seconds})
	}
	r.RTO = (t.Fetched + done.Took).Seconds()
	r.Segments, r.Reason = done.Segments, done.Reason
	if err != nil {
		c := failed(CheckReplay, fetchFailed(err))
		c.Seconds = done.Took.Seconds()
		r.Checks = append(r.Checks, c)
		return false
	}
	r.System = done.Control.System
	r.Reached = Position{done.Timeline, done.LSN, done.LastCommit}
	r.Lag = lag(t.Source, r.Reached)
	r.Checks = append(r.Checks,
		Check{Name: CheckReplay, Verdict: Passed, Items: int64(done.Segments), Seconds: done.Took.Seconds()},
		t.checkTarget(done), t.checkSystem(done.Control))
	if t.Rows == nil {
		r.Checks = append(r.Checks, rows)
	}
	return true
}

// open opens what replay brought to the target, every page of it compared. It
// reports whether it is open.
func (t Test) open(ctx context.Context, r *Report) bool {
	if t.wants(CheckChecksums) {
		begun := time.Now()
		t.tell("checking the checksum of every page")
		r.Checks = append(r.Checks, t.checkChecksums(ctx))
		r.phase(Checksums, begun, t.Bytes)
	}

	begun := time.Now()
	t.tell("opening")
	err := t.Sandbox.Open(ctx)
	r.phase(Open, begun, 0)
	if err != nil {
		r.Checks = append(r.Checks, failed(CheckOpen, err))
		return false
	}
	r.Checks = append(r.Checks, Check{Name: CheckOpen, Verdict: Passed, Items: 1, Seconds: time.Since(begun).Seconds()})
	return true
}

var exitCode = regexp.MustCompile(`exit code 2(\d\d)\b`)

// fetchFailed says what pgkeep-wal fetch has told by its exit status, of which
// PostgreSQL only gives the number: 200 and that of the kind.
func fetchFailed(err error) error {
	m := exitCode.FindStringSubmatch(err.Error())
	if m == nil {
		return err
	}
	for _, k := range fail.Kinds() {
		if n, _ := strconv.Atoi(m[1]); n == k.ExitStatus() && k != fail.Unknown {
			return fail.With(k, fmt.Errorf("%w: %s", err, k.Meaning()))
		}
	}
	return err
}

func lag(source, reached Position) *Lag {
	if source.LSN == 0 && source.LastCommit.IsZero() {
		return nil
	}
	var l Lag
	if source.LSN > reached.LSN {
		l.Bytes = int64(source.LSN - reached.LSN)
	}
	if source.LSN != 0 && l.Bytes == 0 { // nothing was left out
		return &l
	}
	if !source.LastCommit.IsZero() && !reached.LastCommit.IsZero() && source.LastCommit.After(reached.LastCommit) {
		l.Seconds = source.LastCommit.Sub(reached.LastCommit).Seconds()
	}
	return &l
}

// checkTarget compares where replay ended with what was asked for. PostgreSQL
// refuses by itself to end before a target that it was told; of the end of the
// archive only we know where that is.
func (t Test) checkTarget(done sandbox.Recovered) Check {
	c := Check{Name: CheckTarget, Verdict: Passed, Items: 1}
	target := t.Recovery.Target
	switch {
	case done.LSN < t.AtLeast:
		c.find("replay ended at %v, %d bytes before %v, where the archive should end: log is missing", done.LSN, t.AtLeast-done.LSN, t.AtLeast)
	case t.Timeline != 0 && done.Timeline != t.Timeline:
		c.find("replay ended on timeline %d, not on %d", done.Timeline, t.Timeline)
	case target.LSN != 0 && !target.Exclusive && done.LSN < target.LSN:
		c.find("replay ended at %v, before %v", done.LSN, target.LSN)
	case !target.Time.IsZero() && done.LastCommit.After(target.Time):
		c.find("a transaction of %v was replayed, after %v", done.LastCommit.Format(time.RFC3339Nano), target)
	case target != (sandbox.Target{Exclusive: target.Exclusive}) && !target.Immediate && done.Reason == "":
		c.find("PostgreSQL did not say that it stopped at %v", target)
	}
	if c.Verdict == Failed {
		c.Message = c.Findings[0]
	}
	return c
}

func (t Test) checkSystem(have sandbox.Control) Check {
	c := Check{Name: CheckSystem, Verdict: Passed, Items: 1}
	if t.System == 0 {
		return Check{Name: CheckSystem, Verdict: Skipped, Message: "no system identifier was asked for"}
	}
	if have.System != t.System {
		c.find("the data is of system %v, not of %v", have.System, t.System)
		c.Message = c.Findings[0]
	}
	return c
}

// checkManifest has pg_verifybackup compare the files, before PostgreSQL changes
// any. The log is left out: it is not in the data directory.
func (t Test) checkManifest(ctx context.Context) Check {
	begun := time.Now()
	c := Check{Name: CheckManifest, Verdict: Passed, Items: 1}
	if _, err := os.Stat(filepath.Join(t.Sandbox.Data(), "backup_manifest")); errors.Is(err, os.ErrNotExist) {
		return Check{Name: CheckManifest, Verdict: Skipped, Message: "there is no backup_manifest"}
	}
	out, err := t.Sandbox.Run(ctx, "pg_verifybackup", "--no-parse-wal", "--", t.Sandbox.Data())
	c.judge(out, err, "files are not those of backup_manifest")
	c.Seconds = time.Since(begun).Seconds()
	return c
}

// checkChecksums has pg_checksums read every page of the stopped cluster.
func (t Test) checkChecksums(ctx context.Context) Check {
	control, err := t.Sandbox.Control(ctx)
	if err != nil {
		return failed(CheckChecksums, err)
	}
	if !control.Checksums {
		return Check{Name: CheckChecksums, Verdict: Skipped, Message: "the cluster has no data checksums"}
	}
	begun := time.Now()
	c := Check{Name: CheckChecksums, Verdict: Passed}
	out, err := t.Sandbox.Run(ctx, "pg_checksums", "--check", "--pgdata="+t.Sandbox.Data())
	c.judge(out, err, "pages are damaged: their checksums are wrong")
	for line := range strings.Lines(out) {
		fmt.Sscanf(line, "Blocks scanned: %d", &c.Items)
	}
	c.Seconds = time.Since(begun).Seconds()
	return c
}

// judge reads the errors that a program of PostgreSQL printed.
func (c *Check) judge(out string, err error, message string) {
	for line := range strings.Lines(out) {
		if _, what, ok := strings.Cut(strings.TrimSpace(line), ": error: "); ok {
			c.find("%s", what)
		}
	}
	said := c.Verdict == Failed
	if err != nil && !said {
		c.find("%v", err)
	}
	if c.Verdict == Failed {
		c.Message = message
		if t := troubleOf(err); !said && t != (trouble{}) {
			c.Kind, c.Message = t.kind, t.why
		}
	}
	c.Items = max(c.Items, c.Failed)
}
