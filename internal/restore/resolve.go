package restore

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Scan yields the records of a window, from the beginning of the segment that
// holds from, up to the end of the one before to: those that recovery can be
// told to stop at, or every one. It is an error if the log ends before that,
// but for the last record, which may go on behind the window.
type Scan func(ctx context.Context, w audit.Window, from, to pg.LSN, every bool) iter.Seq2[pg.WALRecord, error]

// A Resolved says from which backup, and along which log, a target is reached.
type Resolved struct {
	Backup   repo.Manifest
	Window   audit.Window // what the backup leads to on that timeline
	Timeline pg.Timeline  // to recover along
	// Until is where the log that is needed ends, as far as is known: it holds
	// the record at which recovery stops. For the latest moment, that is all of it.
	Until pg.LSN
	Stop  pg.WALRecord // at which recovery stops; zero for Latest and Immediate
	Last  pg.WALRecord // the last commit that will be there; zero: not known, or none since the backup
	// By is when that record, and all before it, had been written, by the
	// server's clock. Zero for Latest, or not known.
	By time.Time
	// Passed are backups that were not considered, newest first.
	Passed []Passed
	// Alone: retention let go of the log behind what the backup needs itself.
	Alone bool
	Notes []string // what whoever asks should know
}

// Passed is a backup that cannot be used, and why.
type Passed struct {
	ID  repo.ID `json:"backup"`
	Why string  `json:"why"`
}

// A candidate is a backup that can be used.
type candidate struct {
	repo.Manifest
	reach    audit.Window
	timeline pg.Timeline // to recover along
}

// Resolve chooses the newest backup that ended before the target, on the way to
// the target's timeline, and shows that the log between them is there. It
// decides from what it is given: the backups of a cluster, the ledger of the
// archive they belong to, and what Scan finds in the log. named, if not empty, is
// the only backup to consider; a damaged one is considered only so.
//
// A target that cannot be reached is fail.Unreachable, and the error names the
// nearest moments that can be.
func Resolve(ctx context.Context, t Target, named repo.ID, backups []repo.Listed, l audit.Ledger, scan Scan) (Resolved, error) {
	if err := t.check(); err != nil {
		return Resolved{}, err
	}
	rs := resolver{t: t, l: l, scan: scan}
	if err := rs.candidates(named, backups); err != nil {
		return Resolved{}, err
	}
	var res Resolved
	var err error
	switch t.Kind {
	case Latest:
		res, err = rs.latest(ctx)
	case Immediate:
		c := rs.usable[len(rs.usable)-1]
		res = Resolved{Backup: c.Manifest, Window: c.reach, Until: c.Physical.Stop, By: c.Physical.StoppedAt}
	case ToTime:
		res, err = rs.time(ctx)
	case ToLSN:
		res, err = rs.lsn(ctx)
	case ToXID, ToName:
		res, err = rs.search(ctx)
	}
	res.Passed = rs.passed
	for _, c := range rs.usable {
		if c.ID == res.Backup.ID {
			res.Timeline = c.timeline
			res.Alone = c.reach.To < rs.floor(c)
		}
	}
	if err == nil {
		rs.stayOnTimeline(&res)
	}
	return res, err
}

// stayOnTimeline recovers along the timeline that the target lies on, if its log
// is there, and not along one that left it later. The rows are the same. But
// where a file of the later one holds the end, PostgreSQL looks for prepared
// transactions in that of the older one, and fails for want of it
// (XlogReadTwoPhaseData in access/transam/twophase.c).
func (rs *resolver) stayOnTimeline(res *Resolved) {
	for _, t := range rs.l.Timelines {
		if t.ID != res.Timeline || res.Stop.At == 0 {
			continue
		}
		for _, f := range t.Forks { // oldest first
			if res.Stop.End > f.At {
				continue
			}
			if w, ok := rs.l.Reach(baseOf(res.Backup), f.Timeline); ok && w.To >= res.Stop.End {
				res.Timeline, res.Window = f.Timeline, w
			}
			return
		}
	}
}

type resolver struct {
	t      Target
	l      audit.Ledger
	scan   Scan
	usable []candidate // by the end of the backup, ascending: its position, or its time if each goes its own way
	passed []Passed
	other  string // advice: the cluster has had another life, as before an upgrade
}

// BaseOf is a physical backup as far as the log concerns it.
func baseOf(m repo.Manifest) audit.Base {
	p := m.Physical
	return audit.Base{ID: string(m.ID), Timeline: p.Timeline, Start: p.Start, Stop: p.Stop, Finished: m.FinishedAt}
}

// candidates finds the backups that can be used at all, for the timeline that
// is asked for.
func (rs *resolver) candidates(named repo.ID, backups []repo.Listed) error {
	pass := func(b repo.Listed, format string, args ...any) {
		rs.passed = append(rs.passed, Passed{b.ID, fmt.Sprintf(format, args...)})
	}
	elsewhere, incomplete := false, false
	var unread audit.Timeline
	for _, b := range slices.Backward(backups) {
		switch {
		case named != "" && b.ID != named, b.Unfinished:
			continue
		case b.Err != nil:
			pass(b, "%v", b.Err)
			continue
		case b.Physical == nil:
			continue
		case b.System != rs.l.System || b.Version.Major() != rs.l.Major:
			pass(b, "of another system: %v, PostgreSQL %d", b.System, b.Version.Major())
			if rs.other == "" {
				rs.other = fmt.Sprintf("; the cluster has been system %v, PostgreSQL %d, too: to look there, name a backup of it: pgkeep restore %s …", b.System, b.Version.Major(), b.ID)
			}
			continue
		case b.Physical.Damaged > 0 && named == "":
			pass(b, "damaged: %d blocks in %d files were broken at the source; it is used only if it is named", b.Physical.Damaged, b.Physical.DamagedFiles)
			continue
		}
		base, timeline := baseOf(b.Manifest), rs.timeline(b.Manifest)
		reach, ok := rs.l.Reach(base, timeline)
		lost, damaged := rs.lost(b.Physical.Timeline, timeline)
		switch {
		case damaged:
			unread = lost
			pass(b, "the history of timeline %d, which is on the way, is damaged", lost.ID)
		case !rs.l.On(base, timeline):
			elsewhere = true
			pass(b, "not on the way to timeline %d", timeline)
		case !ok:
			incomplete = true
			pass(b, "the log from its start to its end, %s to %s, is not all there", b.Physical.FirstWAL, b.Physical.LastWAL)
		default:
			rs.usable = append(rs.usable, candidate{b.Manifest, reach, timeline})
		}
	}
	slices.SortFunc(rs.usable, func(a, b candidate) int {
		if rs.ownTimeline() { // positions on two timelines do not compare
			return cmp.Or(a.Physical.StoppedAt.Compare(b.Physical.StoppedAt), strings.Compare(string(a.ID), string(b.ID)))
		}
		return cmp.Or(cmp.Compare(a.Physical.Stop, b.Physical.Stop), strings.Compare(string(a.ID), string(b.ID)))
	})
	switch {
	case len(rs.usable) > 0:
		return nil
	case unread.ID != 0:
		return rs.unread(unread, rs.ways(named, backups))
	case elsewhere:
		return fail.Hint(rs.unreachable("no backup is on the way to timeline %s", rs.t.Timeline), rs.ways(named, backups))
	case incomplete:
		return fmt.Errorf("restore %s: of no physical backup is the log complete: %s: %w", rs.t, rs.passed[0].Why, fail.WALHole)
	case len(rs.passed) > 0:
		return fmt.Errorf("restore %s: no physical backup can be used: %s: %s: %w", rs.t, rs.passed[0].ID, rs.passed[0].Why, fail.NoBackup)
	}
	return fmt.Errorf("restore %s: there is no physical backup: %w", rs.t, fail.NoBackup)
}

// ownTimeline reports whether each backup is recovered along its own timeline.
func (rs *resolver) ownTimeline() bool {
	return rs.t.Kind == Immediate || rs.t.Timeline == CurrentTimeline
}

// timeline is the one to recover along from m.
func (rs *resolver) timeline(m repo.Manifest) pg.Timeline {
	switch {
	case rs.ownTimeline():
		return cmp.Or(m.Physical.StopTimeline, m.Physical.Timeline)
	case rs.t.Timeline != LatestTimeline:
		return pg.Timeline(rs.t.Timeline)
	}
	newest := pg.Timeline(1)
	for _, t := range rs.l.Timelines {
		newest = max(newest, t.ID)
	}
	return newest
}

// lost finds a history that is damaged in the archive, and that PostgreSQL reads on
// its way from one timeline to another: those between, and both of these
// (restoreTimeLineHistoryFiles in access/transam/timeline.c).
func (rs *resolver) lost(from, to pg.Timeline) (audit.Timeline, bool) {
	i := slices.IndexFunc(rs.l.Timelines, func(t audit.Timeline) bool {
		return !t.Lost.IsZero() && (from <= t.ID && t.ID < to || t.ID == to)
	})
	if i < 0 {
		return audit.Timeline{}, false
	}
	return rs.l.Timelines[i], true
}

// unread is the error for a damaged history.
func (rs *resolver) unread(t audit.Timeline, ways string) error {
	return fail.Hint(fmt.Errorf("restore %s: the history of timeline %d is damaged in the archive: %w", rs.t, t.ID, fail.Corrupt),
		fmt.Sprintf("remove the object %s, and let a server that has %v in its pg_wal bring it back: pgkeep wal audit --fill; until then, %s", t.LostKey, pg.HistoryName(t.ID), ways))
}

// ways says which timelines backups lead to.
func (rs *resolver) ways(named repo.ID, backups []repo.Listed) string {
	var ways []string
	for _, t := range rs.l.Timelines {
		for _, b := range backups {
			if b.Physical == nil || b.Err != nil || named != "" && b.ID != named {
				continue
			}
			if _, damaged := rs.lost(b.Physical.Timeline, t.ID); !damaged && rs.l.On(baseOf(b.Manifest), t.ID) {
				ways = append(ways, fmt.Sprint(uint32(t.ID)))
				break
			}
		}
	}
	if len(ways) == 0 {
		return "no timeline of the archive comes from one that a backup was taken on; are history files missing?"
	}
	return "with --timeline, these can be reached: " + strings.Join(ways, ", ")
}

func (rs *resolver) unreachable(format string, args ...any) error {
	return fmt.Errorf("restore %s: %s: %w", rs.t, fmt.Sprintf(format, args...), fail.Unreachable)
}

func moment(m repo.Manifest) string {
	return fmt.Sprintf("%s (%v), the end of backup %s", instant(m.Physical.StoppedAt), m.Physical.Stop, m.ID)
}

// latest wants the newest backup from which the log goes on to its very end.
func (rs *resolver) latest(ctx context.Context) (Resolved, error) {
	c := rs.usable[len(rs.usable)-1]
	if c.reach.To < rs.l.Frontier(c.timeline) {
		last, err := rs.lastCommit(ctx, c, c.reach.To)
		if err != nil {
			return Resolved{}, err
		}
		return Resolved{}, rs.hole(c, last)
	}
	if left, found := rs.l.Astray(c.reach, c.timeline); found {
		return Resolved{}, rs.notYet(c, left)
	}
	last, err := rs.lastCommit(ctx, c, c.reach.To)
	for _, t := range rs.l.Timelines { // pgkeep-wal tells no server that the log ends, if a later history may tell that it went on
		if t.ID > c.timeline && !t.Lost.IsZero() && err == nil {
			return Resolved{}, rs.unread(t, rs.beforeEnd(c, last))
		}
	}
	return Resolved{Backup: c.Manifest, Window: c.reach, Until: c.reach.To, Last: last}, err
}

// notYet is the error for the latest moment of a timeline that nothing is
// archived of but where it left another, which went on: the server would go on
// with that one, and bring back what the newer one does not have.
func (rs *resolver) notYet(c candidate, left pg.Fork) error {
	err := rs.unreachable("timeline %d left timeline %d at %v, and its log from there on is not archived yet; that of timeline %[2]d is, and goes on with what is no longer true", c.timeline, left.Timeline, left.At)
	return fail.Hint(err, fmt.Sprintf("on the server that runs on timeline %d, SELECT pg_switch_wal(), and try again when its log is archived; or restore the moment at which it began: --timeline %d --to-lsn %v --exclusive", c.timeline, left.Timeline, left.At))
}

// hole is the error for a target behind the end of what c reaches.
func (rs *resolver) hole(c candidate, last pg.WALRecord) error {
	kind, what, next := fail.Unreachable, fmt.Sprintf("the archive ends at %v", c.reach.To), ""
	if c.reach.To < rs.l.Frontier(c.timeline) {
		kind, what = fail.WALHole, fmt.Sprintf("segments are missing in the archive from %v on", c.reach.To)
	}
	if floor := rs.floor(c); c.reach.To < floor {
		kind, what = fail.Unreachable, fmt.Sprintf("retention let the log go from %v on", c.reach.To)
	}
	for _, later := range rs.usable {
		if later.timeline == c.timeline && later.Physical.Stop > c.reach.To {
			next = ", and after it " + moment(later.Manifest)
			break
		}
	}
	before := rs.beforeEnd(c, last)
	if left, found := rs.l.Astray(c.reach, c.timeline); found {
		next += fmt.Sprintf("; what was written before %v, where timeline %d was left, can be reached with --timeline %[2]d", left.At, left.Timeline)
	}
	return fail.Hint(fmt.Errorf("restore %s: %s: %w", rs.t, what, kind), before+next)
}

// beforeEnd names the last moment that c reaches, last being the last commit.
func (rs *resolver) beforeEnd(c candidate, last pg.WALRecord) string {
	if last.At == 0 {
		return "the nearest moment before it that can be reached: " + moment(c.Manifest)
	}
	return fmt.Sprintf("the last transaction before that was %d, committed at %s (%v); --to-xid %d reaches it", last.XID, instant(last.Time), last.At, last.XID)
}

// floor is from where on the log that c leads to is kept, on the last timeline that
// it comes to.
func (rs *resolver) floor(c candidate) pg.LSN {
	path := c.reach.Path
	i := slices.IndexFunc(rs.l.Timelines, func(t audit.Timeline) bool { return t.ID == path[len(path)-1] })
	return rs.l.Timelines[i].Floor // without an entry there would be no way
}

// tooEarly is the error for a target before the end of every backup.
func (rs *resolver) tooEarly() error {
	err := rs.unreachable("no backup that can be used ended before that")
	hint := "the first moment that can be reached: " + moment(rs.usable[0].Manifest)
	if n := len(rs.passed); n > 0 {
		hint += fmt.Sprintf("; %d backups were passed by, such as %s: %s", n, rs.passed[n-1].ID, rs.passed[n-1].Why)
	}
	return fail.Hint(err, hint+rs.other)
}

// before is the newest candidate that ended before the target.
func (rs *resolver) before(ended func(candidate) bool) (candidate, bool) {
	for _, c := range slices.Backward(rs.usable) {
		if ended(c) {
			return c, true
		}
	}
	return candidate{}, false
}

func (rs *resolver) lsn(ctx context.Context) (Resolved, error) {
	c, ok := rs.before(func(c candidate) bool { return c.Physical.Stop <= rs.t.LSN })
	if !ok {
		return Resolved{}, rs.tooEarly()
	}
	// Recovery stops at the first record that begins there or later.
	for rec, err := range rs.scan(ctx, c.reach, rs.t.LSN, c.reach.To, true) {
		if err != nil {
			return Resolved{}, err
		}
		if rec.At >= rs.t.LSN {
			return rs.stop(ctx, c, rec)
		}
	}
	last, err := rs.lastCommit(ctx, c, c.reach.To)
	if err != nil {
		return Resolved{}, err
	}
	return Resolved{}, rs.hole(c, last)
}

// stop is the answer when recovery stops at rec: behind it, or before it.
func (rs *resolver) stop(ctx context.Context, c candidate, rec pg.WALRecord) (res Resolved, err error) {
	res = Resolved{Backup: c.Manifest, Window: c.reach, Until: rec.End, Stop: rec}
	if res.By, err = rs.written(ctx, c, rec); err != nil {
		return res, err
	}
	if rec.Kind == pg.Commit && !rs.t.Exclusive {
		res.Last = rec
		return res, nil
	}
	res.Last, err = rs.lastCommit(ctx, c, rec.At)
	return res, err
}

// written is when rec had been written: not every record says when it was, so
// one that comes after it may have to tell, if there is one not far from it.
func (rs *resolver) written(ctx context.Context, c candidate, rec pg.WALRecord) (by time.Time, err error) {
	stamped := func(r pg.WALRecord) bool {
		return r.Kind == pg.Commit || r.Kind == pg.Abort || r.Kind == pg.RestorePoint
	}
	if stamped(rec) {
		return rec.Time, nil
	}
	for r, err := range rs.scan(ctx, c.reach, rec.At, min(c.reach.To, rec.End+far*pg.LSN(rs.l.SegmentSize)), false) {
		if err != nil {
			return by, err
		}
		if r.At > rec.At && stamped(r) {
			return r.Time, nil
		}
	}
	return by, nil
}

// far is how many segments are searched for what need not be there.
const far = 8

// lastCommit looks for the last commit before a position, not far back.
func (rs *resolver) lastCommit(ctx context.Context, c candidate, before pg.LSN) (last pg.WALRecord, err error) {
	size := pg.LSN(rs.l.SegmentSize)
	for to, n := before, 0; to > c.Physical.Stop && n < far && last.At == 0; n++ {
		from := (to - 1) - (to-1)%size
		for rec, err := range rs.scan(ctx, c.reach, from, from+2*size, false) { // a record may end in the next segment
			if err != nil {
				return last, err
			}
			if rec.At >= to {
				break
			}
			if rec.Kind == pg.Commit && rec.At >= c.Physical.Stop {
				last = rec
			}
		}
		to = from
	}
	return last, nil
}

// time finds the first transaction that ended after the target, before which
// recovery stops. Nothing in the log says when it was written but the ends of
// transactions; so where to look is found by halving, and what is found there
// is read through, with some of the log before it. Where it shows that the clock of
// the source was set back, halving proves nothing, and all is read: PostgreSQL stops
// at the first in the order of the log.
func (rs *resolver) time(ctx context.Context) (Resolved, error) {
	c, ok := rs.before(func(c candidate) bool { return !c.Physical.StoppedAt.After(rs.t.Time) })
	if !ok {
		return Resolved{}, rs.tooEarly()
	}
	size := pg.LSN(rs.l.SegmentSize)
	first := c.Physical.Stop - c.Physical.Stop%size
	count := int((c.reach.To - first + size - 1) / size)
	var clock []reading
	for _, b := range rs.usable { // positions on other timelines do not compare
		if b.timeline == c.timeline && b.Physical.Stop >= c.Physical.Stop && b.Physical.Stop < c.reach.To {
			clock = append(clock, reading{b.Physical.Stop, b.Physical.StoppedAt})
		}
	}
	lo, hi := 0, count // the first segment behind whose beginning a transaction ended too late is among these
	for lo < hi {
		n := lo + (hi-lo)/2
		rec, found, err := rs.firstEnd(ctx, c, first+pg.LSN(n)*size)
		if err != nil {
			return Resolved{}, err
		}
		if found {
			clock = append(clock, reading{rec.At, rec.Time})
		}
		if found && !rs.late(rec.Time) {
			lo = n + 1
		} else {
			hi = n
		}
	}
	from, back := first+pg.LSN(max(0, lo-far))*size, setBack(clock)
	if back {
		from = first
	}
	rec, last, fell, err := rs.firstLate(ctx, c, from)
	if err == nil && !back && fell {
		back = true
		if from > first {
			rec, last, _, err = rs.firstLate(ctx, c, first)
		}
	}
	if err != nil {
		return Resolved{}, err
	}
	if last.At == 0 && rec.At == 0 {
		if last, err = rs.lastCommit(ctx, c, c.reach.To); err != nil {
			return Resolved{}, err
		}
	}
	if rec.At == 0 {
		return Resolved{}, rs.hole(c, last)
	}
	res := Resolved{Backup: c.Manifest, Window: c.reach, Until: rec.End, Stop: rec, Last: last}
	if !back {
		res.By = rec.Time
	} else {
		res.Notes = append(res.Notes, fmt.Sprintf("the clock of the source was set back, so that times come more than once in the log; recovery stops before the first transaction that is too late (%v), as PostgreSQL does by a time. Others behind it may be earlier: --to-xid or --to-lsn reaches them", rec.At))
	}
	return res, nil
}

// firstLate reads the log from a position for the first transaction that ended after
// the target; the zero one: there is none. last is the last commit before it that
// was read, and fell says whether the clock was set back meanwhile.
func (rs *resolver) firstLate(ctx context.Context, c candidate, from pg.LSN) (rec, last pg.WALRecord, fell bool, err error) {
	var most time.Time
	for rec, err := range rs.scan(ctx, c.reach, from, c.reach.To, false) {
		if err != nil {
			return rec, last, fell, err
		}
		if rec.At < c.Physical.Stop || rec.Kind != pg.Commit && rec.Kind != pg.Abort {
			continue
		}
		fell = fell || rec.Time.Before(most.Add(-unordered))
		if rec.Time.After(most) {
			most = rec.Time
		}
		if rs.late(rec.Time) {
			return rec, last, fell, nil
		}
		if rec.Kind == pg.Commit {
			last = rec
		}
	}
	return pg.WALRecord{}, last, fell, nil
}

// A reading is what a clock showed at a position of the log.
type reading struct {
	at   pg.LSN
	time time.Time
}

// unordered is by how much the ends of transactions may stand in another order than
// their times, with no clock set: a time is taken a little before its record is
// written, and that of a backup's end a little after.
const unordered = 10 * time.Second

// setBack reports whether a clock shows less at a later position.
func setBack(clock []reading) bool {
	slices.SortFunc(clock, func(a, b reading) int { return cmp.Compare(a.at, b.at) })
	var most time.Time
	for _, r := range clock {
		if r.time.Before(most.Add(-unordered)) {
			return true
		}
		if r.time.After(most) {
			most = r.time
		}
	}
	return false
}

// late reports whether a transaction that ended at that time ends recovery
// before it (recoveryStopsBefore in access/transam/xlogrecovery.c).
func (rs *resolver) late(at time.Time) bool {
	return at.After(rs.t.Time) || rs.t.Exclusive && at.Equal(rs.t.Time)
}

// firstEnd is the first end of a transaction from a position on.
func (rs *resolver) firstEnd(ctx context.Context, c candidate, from pg.LSN) (pg.WALRecord, bool, error) {
	for rec, err := range rs.scan(ctx, c.reach, from, c.reach.To, false) {
		if err != nil {
			return rec, false, err
		}
		if (rec.Kind == pg.Commit || rec.Kind == pg.Abort) && rec.At >= max(from, c.Physical.Stop) {
			return rec, true, nil
		}
	}
	return pg.WALRecord{}, false, nil
}

// search reads the log for a transaction or a restore point, from the newest
// backup to the oldest. Transactions have one end, so the first that is found
// will do; names may be given twice, so all of the log is read. If each backup is
// recovered along its own timeline, that of the newest that has it is meant.
func (rs *resolver) search(ctx context.Context) (Resolved, error) {
	type find struct {
		candidate
		rec pg.WALRecord
	}
	var found []find
	to, timeline := ^pg.LSN(0), pg.Timeline(0)
	for _, c := range slices.Backward(rs.usable) {
		if c.timeline != timeline {
			if len(found) > 0 {
				break
			}
			to, timeline = ^pg.LSN(0), c.timeline
		}
		for rec, err := range rs.scan(ctx, c.reach, c.Physical.Stop, min(to, c.reach.To), false) {
			if err != nil {
				return Resolved{}, err
			}
			if rec.At < c.Physical.Stop || rec.At >= to {
				continue
			}
			if rs.t.Kind == ToXID && rec.XID == rs.t.XID && (rec.Kind == pg.Commit || rec.Kind == pg.Abort) {
				return rs.stop(ctx, c, rec)
			}
			if rs.t.Kind == ToName && rec.Kind == pg.RestorePoint && rec.Name == rs.t.Name {
				found = append(found, find{c, rec})
			}
		}
		to = c.Physical.Stop // at the end of a record
	}
	switch len(found) {
	case 1:
		return rs.stop(ctx, found[0].candidate, found[0].rec)
	case 0:
		oldest, newest := rs.usable[0], rs.usable[len(rs.usable)-1]
		hint := fmt.Sprintf("searched from %s, to %v", moment(oldest.Manifest), newest.reach.To)
		if rs.t.Kind == ToXID {
			hint += "; a transaction that wrote nothing, or a subtransaction, has no end in the log"
		}
		return Resolved{}, fail.Hint(rs.unreachable("it is not in the log that can be reached"), hint+rs.other)
	}
	var where []string
	slices.SortFunc(found, func(a, b find) int { return cmp.Compare(a.rec.At, b.rec.At) })
	for _, f := range found {
		where = append(where, fmt.Sprintf("--to-lsn %v (%s)", f.rec.At, instant(f.rec.Time)))
	}
	return Resolved{}, fail.Hint(rs.unreachable("there are %d of that name", len(found)), "say which: "+strings.Join(where, ", "))
}
