package retention_test

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
)

var (
	histories   = flag.Int("histories", 2000, "random histories to play")
	historyFrom = flag.Uint64("history", 1, "seed of the first")
)

const (
	size = pg.SegmentSize(1 << 20)
	day  = 24 * time.Hour
)

// A model is a cluster with all that ever happened to it. It finds out by itself
// what can be reached, going segment by segment.
type model struct {
	rnd     *rand.Rand
	now     time.Time
	policy  retention.Policy
	systems []*system
	backups []*backup // by their beginning
	talks   bool
	slipped bool // the window changed
	log     []string
	kept    tally
}

// A tally shows that things happened at all.
type tally struct{ runs, refused, marked, purged, undeleted, segments, promised int }

type system struct {
	archive   repo.Archive
	timelines []*timeline // all that there ever were
	expiries  []repo.Expiry
	current   *timeline
}

type timeline struct {
	id       pg.Timeline
	parent   *timeline
	fork     pg.LSN
	born     time.Time
	noted    bool // its history is archived
	segments []*piece
	first    int // number of the first
	floor    pg.LSN
}

// A piece is a segment. The zero time: it was never archived.
type piece struct {
	when   time.Time
	there  bool
	needed time.Time // by the last plan that was carried out and whose floor is not above it
}

type backup struct {
	repo.Record
	sys         *system
	tl          *timeline
	first, last int // segments that it needs; last 0: not finished
	stop        pg.LSN
	purged      bool
}

func (m *model) note(format string, args ...any) {
	if !m.talks {
		return
	}
	m.log = append(m.log, m.now.Format("01-02 15:04 ")+fmt.Sprintf(format, args...))
}

func newModel(seed uint64, talks bool) *model {
	m := &model{talks: talks, rnd: rand.New(rand.NewPCG(seed, 8)), now: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)}
	pick := func(n ...int) int { return n[m.rnd.IntN(len(n))] }
	m.policy = retention.Policy{Window: time.Duration(pick(0, 1, 2, 3, 7)) * day, Daily: pick(0, 0, 2, 5), Weekly: pick(0, 1, 3), Monthly: pick(0, 0, 2), Min: pick(0, 1, 2),
		Grace: time.Duration(pick(0, 1, 3)) * day}
	m.upgrade()
	return m
}

func (m *model) sys() *system { return m.systems[len(m.systems)-1] }

func (m *model) upgrade() {
	s := &system{archive: repo.Archive{Cluster: "main", System: pg.SystemID(9_000_000_000 - len(m.systems)), Major: 15 + len(m.systems)}}
	s.current = &timeline{id: 1, first: 1 + m.rnd.IntN(3)}
	s.timelines = []*timeline{s.current}
	m.systems = append(m.systems, s)
	m.note("system %v", s.archive.System)
}

func (t *timeline) next() int { return t.first + len(t.segments) }

// write archives the next segment of a timeline, or loses it.
func (m *model) write(t *timeline) {
	p := &piece{when: m.now, there: m.rnd.IntN(60) > 0}
	t.segments = append(t.segments, p)
	if !p.there {
		p.when = time.Time{}
		m.note("segment %d of timeline %d is lost", t.next()-1, t.id)
	}
}

func (m *model) promote() {
	s := m.sys()
	if s.current.next() < s.current.first+2 {
		return
	}
	n := s.current.next() - 1
	t := &timeline{id: s.timelines[len(s.timelines)-1].id + 1, parent: s.current, fork: pg.LSN(n)*pg.LSN(size) + 5000, born: m.now, noted: m.rnd.IntN(40) > 0, first: n}
	m.note("timeline %d leaves %d in segment %d, noted %v", t.id, t.parent.id, n, t.noted)
	s.timelines = append(s.timelines, t)
	s.current = t
}

func (m *model) begin(kind repo.Kind) *backup {
	s := m.sys()
	b := &backup{sys: s, tl: s.current, first: s.current.next()}
	b.Ref = repo.Ref{Cluster: "main", ID: repo.NewID(m.now, fmt.Sprintf("%08x", m.rnd.Uint32()))}
	b.Unfinished, b.Intent = true, repo.Intent{Ref: b.Ref, Kind: kind, StartedAt: m.now}
	for _, o := range slices.Backward(m.backups) {
		if o.alive() && o.Kind == kind && kind == repo.Physical && m.rnd.IntN(2) == 0 {
			b.Intent.Pins = append(b.Intent.Pins, o.ID)
			break
		}
	}
	m.backups = append(m.backups, b)
	m.note("%s %s begins on timeline %d at segment %d", kind, b.ID, b.tl.id, b.first)
	return b
}

func (b *backup) alive() bool { return !b.purged && !b.Unfinished && b.Deleted == nil }

// finish publishes a backup, unless it was marked or its server is gone.
func (m *model) finish(b *backup) {
	if b.purged || b.Deleted != nil || b.sys != m.sys() || b.tl != b.sys.current {
		return
	}
	m.write(b.tl)
	b.last, b.stop = b.tl.next()-1, pg.LSN(b.tl.next())*pg.LSN(size)-100
	b.Unfinished = false
	b.Manifest = repo.Manifest{Ref: b.Ref, Kind: b.Intent.Kind, System: b.sys.archive.System, Version: pg.Version(b.sys.archive.Major * 10000), StartedAt: b.ID.Time(), FinishedAt: m.now}
	if b.Kind == repo.Physical {
		first, _ := pg.SegmentName(b.tl.id, pg.LSN(b.first)*pg.LSN(size), size)
		last, _ := pg.SegmentName(b.tl.id, pg.LSN(b.last)*pg.LSN(size), size)
		b.Physical = &repo.PhysicalFacts{Start: pg.LSN(b.first)*pg.LSN(size) + 100, Stop: b.stop, Timeline: b.tl.id, StopTimeline: b.tl.id, StartedAt: b.StartedAt, StoppedAt: m.now, FirstWAL: first, LastWAL: last, SegmentSize: size}
		if m.rnd.IntN(10) == 0 {
			b.Physical.Damaged = 1
		}
	}
	if m.rnd.IntN(5) == 0 {
		b.Proof = &repo.Proof{Ref: b.Ref, Passed: m.rnd.IntN(4) > 0}
	}
	if m.rnd.IntN(12) == 0 {
		b.Holds = []repo.Hold{{Ref: b.Ref, Reason: "test"}}
	}
	m.note("%s %s ends in segment %d, damaged %v, proof %v, holds %d", b.Kind, b.ID, b.last, b.Physical != nil && b.Physical.Damaged > 0, b.Proof != nil && b.Proof.Passed, len(b.Holds))
}

// play lets forty things happen, and says at which something went wrong.
func (m *model) play() (step int, err error) {
	for step = range 40 {
		if err = m.step(); err != nil {
			break
		}
	}
	return step, err
}

func (m *model) step() error {
	m.now = m.now.Add(time.Duration(1+m.rnd.IntN(10)) * time.Hour)
	s := m.sys()
	switch n := m.rnd.IntN(40); {
	case n < 12:
		m.write(s.current)
	case n < 20:
		b := m.begin(repo.Physical)
		if m.rnd.IntN(4) > 0 {
			m.now = m.now.Add(time.Hour)
			m.finish(b)
		}
	case n < 24:
		b := m.begin(repo.Logical)
		if m.rnd.IntN(6) > 0 {
			m.finish(b)
		}
	case n < 28:
		for _, b := range m.backups {
			if b.Unfinished && m.rnd.IntN(2) == 0 && m.now.Sub(b.ID.Time()) < 3*day {
				m.finish(b)
			}
		}
	case n == 28:
		m.promote()
	case n == 29 && m.rnd.IntN(3) == 0:
		m.upgrade()
	case n == 30: // a lost primary goes on, or a server that was replaced
		if t := m.systems[m.rnd.IntN(len(m.systems))]; true {
			m.write(t.timelines[m.rnd.IntN(len(t.timelines))])
		}
	case n == 31: // nobody is there
		m.now = m.now.Add(time.Duration(m.rnd.IntN(4)) * day)
	case n == 32:
		for _, b := range m.backups {
			if b.Deleted != nil && !b.purged && b.Deleted.PurgeAfter.After(m.now) && m.rnd.IntN(3) == 0 {
				b.Deleted = nil
				m.kept.undeleted++
				m.note("%s is brought back", b.ID)
			}
		}
	case n == 33 && m.rnd.IntN(4) == 0: // by a slip, or for good
		m.policy.Window = time.Duration(m.rnd.IntN(8)) * day
		m.slipped = true
		m.note("window %v", m.policy.Window)
	case n < 36:
		return m.expire()
	default:
		m.write(s.current)
	}
	return nil
}

// facts are what somebody would find who reads the repository.
func (m *model) facts() retention.Facts {
	f := retention.Facts{Cluster: "main", Now: m.now}
	for _, b := range m.backups {
		if !b.purged {
			f.Backups = append(f.Backups, b.Record)
		}
	}
	for _, s := range m.systems {
		l := audit.Ledger{Archive: s.archive}
		for _, t := range s.timelines {
			e := audit.Timeline{ID: t.id, Floor: t.floor}
			if t.parent != nil && t.noted {
				e.Born = t.born
				for a := t; a.parent != nil; a = a.parent {
					e.Forks = append(e.Forks, pg.Fork{Timeline: a.parent.id, At: a.fork})
				}
				slices.Reverse(e.Forks)
			}
			for i, p := range t.segments {
				if !p.there {
					continue
				}
				l.SegmentSize = size
				from := pg.LSN(t.first+i) * pg.LSN(size)
				if n := len(e.Ranges); n > 0 && e.Ranges[n-1].To == from {
					e.Ranges[n-1].To, e.Ranges[n-1].Last = from+pg.LSN(size), p.when
				} else {
					e.Ranges = append(e.Ranges, audit.Range{From: from, To: from + pg.LSN(size), First: p.when, Last: p.when})
				}
			}
			if len(e.Ranges) > 0 || !e.Born.IsZero() || t.floor > 0 {
				l.Timelines = append(l.Timelines, e)
			}
		}
		if len(l.Timelines) > 0 {
			f.Archives = append(f.Archives, l)
		}
	}
	return f
}

// whole reports whether all segments that b needs itself are there.
func (b *backup) whole() bool {
	for n := b.first; n <= b.last; n++ {
		if !b.tl.segments[n-b.tl.first].there {
			return false
		}
	}
	return true
}

func (b *backup) good() bool { return b.alive() && b.sound() }

func (b *backup) sound() bool {
	return !b.Unfinished && (b.Physical == nil || b.Physical.Damaged == 0 && b.whole()) && (b.Proof == nil || b.Proof.Passed)
}

// reached are the segments that good backups lead to; those that may be brought
// back, too, if it says so.
func (m *model) reached(deleted bool) map[*piece]bool {
	all := make(map[*piece]bool)
	for _, b := range m.backups {
		if b.Physical != nil && !b.purged && b.sound() && (deleted || b.Deleted == nil) {
			b.walk(b.tl, b.first, all)
		}
	}
	return all
}

// walk goes along a timeline, and along those that leave it behind b.
func (b *backup) walk(t *timeline, n int, all map[*piece]bool) {
	for ; ; n++ {
		for _, c := range b.sys.timelines {
			if c.parent == t && c.noted && c.first == n && b.stop <= c.fork {
				b.walk(c, n, all)
			}
		}
		if n-t.first >= len(t.segments) || !t.segments[n-t.first].there {
			return
		}
		if t != b.tl || n >= b.last {
			all[t.segments[n-t.first]] = true
		}
	}
}

// expire does what one run of it does, and looks whether it may.
func (m *model) expire() error {
	m.kept.runs++
	f := m.facts()
	refuse := ""
	switch n := m.rnd.IntN(30); {
	case n == 0:
		f.Now, refuse = f.Now.AddDate(10, 0, 0), "a clock that is ten years ahead"
	case n == 1:
		f.Now, refuse = f.Now.AddDate(-1, 0, 0), "a clock that is a year behind"
	case n == 2 && len(f.Backups) > 0:
		i := m.rnd.IntN(len(f.Backups))
		if f.Backups[i].Deleted == nil {
			f.Backups[i] = repo.Record{Listed: repo.Listed{Manifest: repo.Manifest{Ref: f.Backups[i].Ref}, Err: fail.Corrupt}}
			refuse = "a manifest that cannot be read"
		}
	}
	finished := slices.ContainsFunc(m.backups, (*backup).alive)
	p := retention.Decide(m.policy, f)
	if refuse != "" {
		if !m.policy.IsZero() && finished && p.Err(p.Confirm) == nil {
			return fmt.Errorf("%s is not refused", refuse)
		}
		return nil
	}
	if err := m.verdicts(p); err != nil {
		return err
	}
	if err := p.Err(p.Confirm); err != nil {
		m.kept.refused++
		if !errors.Is(err, fail.ExpireRefused) || len(p.Against) == 0 {
			return err
		}
		return nil
	}
	since := m.now.Add(-m.policy.Window)
	before := m.reached(false)
	whole := make(map[*backup]bool)
	for _, b := range m.backups {
		whole[b] = !b.purged && b.Physical != nil && b.whole()
	}
	cut := m.rnd.IntN(5) == 0 // somewhere in between
	for _, id := range p.Removals() {
		if cut && m.rnd.IntN(2) == 0 {
			continue
		}
		i := slices.IndexFunc(m.backups, func(b *backup) bool { return b.ID == id })
		m.backups[i].Deleted = &repo.Tombstone{Ref: m.backups[i].Ref, DeletedAt: m.now, PurgeAfter: m.now.Add(m.policy.Grace)}
		m.kept.marked++
		m.note("%s is let go", id)
	}
	for _, b := range m.backups {
		if b.Deleted != nil && !b.purged && !b.Deleted.PurgeAfter.After(m.now) {
			b.purged = true
			m.kept.purged++
		}
	}
	back := m.reached(true) // of what was not removed
	p = retention.Decide(m.policy, m.facts())
	for _, w := range p.WAL {
		if err := m.removeWAL(w, cut); err != nil {
			return err
		}
	}
	after := m.reached(true)
	for piece := range back {
		if !m.slipped && !piece.needed.IsZero() && piece.when.After(since.Add(-m.policy.Grace)) && !after[piece] {
			return fmt.Errorf("a moment of %v is lost within the grace; window from %v", piece.when, since)
		}
	}
	after = m.reached(false)
	for piece := range before {
		if piece.when.After(since) { // what was archived before holds no moment after it
			m.kept.promised++
			if !after[piece] {
				return fmt.Errorf("a moment of %v cannot be reached any more; window from %v", piece.when, since)
			}
		}
	}
	for _, b := range m.backups {
		if whole[b] && !b.purged && !b.whole() {
			return fmt.Errorf("backup %s has lost log that it needs", b.ID)
		}
		if b.Unfinished && b.Deleted == nil && !b.purged && m.now.Sub(b.ID.Time()) < 29*day {
			for i, piece := range b.tl.segments {
				if b.tl.first+i >= b.first && !piece.there && !piece.when.IsZero() {
					return fmt.Errorf("backup %s, in progress, has lost segment %d", b.ID, b.tl.first+i)
				}
			}
		}
	}
	if !cut { // once more lets nothing more go
		again := retention.Decide(m.policy, m.facts())
		if ids := again.Removals(); len(ids) > 0 {
			return fmt.Errorf("a second run lets %v go", ids)
		}
		for _, w := range again.WAL {
			if more, _, err := m.free(w); err != nil || len(more) > 0 {
				return fmt.Errorf("a second run removes %d segments more, %v", len(more), err)
			}
		}
	}
	return nil
}

// removeWAL records a plan, and removes what may go.
func (m *model) removeWAL(w retention.WAL, cut bool) error {
	s := m.systems[slices.IndexFunc(m.systems, func(s *system) bool { return s.archive == w.Archive })]
	s.expiries = append(s.expiries, repo.Expiry{Plan: w.Floors, ExpiredAt: m.now})
	for _, f := range w.Floors {
		for _, t := range s.timelines {
			if t.id == f.Timeline && f.From > t.floor {
				t.floor = f.From
				m.note("floor of timeline %d of %v: segment %d", t.id, w.System, f.From/pg.LSN(size))
			}
		}
	}
	going, planned, err := m.free(w)
	if err != nil {
		return err
	}
	if m.kept.segments += len(going); planned != w.Segments {
		return fmt.Errorf("%d segments can go, the plan said %d", planned, w.Segments)
	}
	for _, piece := range going {
		if !piece.needed.IsZero() && m.now.Sub(piece.needed) < m.policy.Grace {
			return fmt.Errorf("a segment of %v goes, and was needed until %v", piece.when, piece.needed)
		}
		if !cut || m.rnd.IntN(2) == 0 {
			piece.there = false
		}
	}
	return nil
}

// free are the segments that may go now, and how many of them and of others the
// plan needs no more. Those from its floor on are noted.
func (m *model) free(w retention.WAL) (going []*piece, planned int, err error) {
	s := m.systems[slices.IndexFunc(m.systems, func(s *system) bool { return s.archive == w.Archive })]
	for _, t := range s.timelines {
		for k, piece := range t.segments {
			at := pg.LSN(t.first+k) * pg.LSN(size)
			name, _ := pg.SegmentName(t.id, at, size)
			n, err := pg.ParseWALName(name)
			if err != nil {
				return nil, 0, err
			}
			if above := (repo.Expiry{Floors: w.Floors}).Floor(t.id) <= at; above && w.Needed(n) {
				piece.needed = m.now
			}
			switch {
			case !piece.there, w.Needed(n):
			case at < repo.Free(s.expiries, m.now.Add(-m.policy.Grace), t.id):
				planned++
				going = append(going, piece)
			default:
				planned++
			}
		}
	}
	return going, planned, nil
}

// verdicts checks what must be kept by rules that need no log, in the plainest
// words there are for them.
func (m *model) verdicts(p retention.Plan) error {
	keep := make(map[repo.ID]bool)
	for _, v := range p.Backups {
		if len(v.Reasons) == 0 {
			return fmt.Errorf("%s: no reason is given", v.ID)
		}
		keep[v.ID] = v.Keep
	}
	must := func(b *backup, why string) error {
		if b != nil && !keep[b.ID] {
			return fmt.Errorf("%s goes: it is %s", b.ID, why)
		}
		return nil
	}
	var errs []error
	for _, kind := range []repo.Kind{repo.Logical, repo.Physical} {
		var good []*backup // newest first
		for _, b := range slices.Backward(m.backups) {
			if b.good() && b.Kind == kind {
				good = append(good, b)
			}
		}
		slices.SortStableFunc(good, func(a, b *backup) int { return b.ID.Time().Compare(a.ID.Time()) })
		var proven *backup
		days, weeks, months := make(map[string]bool), make(map[string]bool), make(map[string]bool)
		for i, b := range good {
			at := b.ID.Time()
			year, week := at.ISOWeek()
			for _, rule := range []struct {
				seen map[string]bool
				slot string
				n    int
			}{{days, at.Format("0102"), m.policy.Daily}, {weeks, fmt.Sprint(year, week), m.policy.Weekly}, {months, at.Format("01"), m.policy.Monthly}} {
				if !rule.seen[rule.slot] && len(rule.seen) < rule.n {
					errs = append(errs, must(b, "the newest of "+rule.slot))
				}
				rule.seen[rule.slot] = true
			}
			if i < max(1, m.policy.Min) {
				errs = append(errs, must(b, "one of the newest"))
			}
			if b.Proof != nil && proven == nil {
				proven = b
				errs = append(errs, must(b, "the last proven"))
			}
		}
		for _, b := range m.backups {
			if b.alive() && b.Kind == kind && len(good) == 0 {
				errs = append(errs, must(b, "of a kind of which none is good"))
			}
		}
	}
	for _, b := range m.backups {
		switch {
		case b.purged || b.Deleted != nil:
		case len(b.Holds) > 0:
			errs = append(errs, must(b, "held"))
		case b.Unfinished && m.now.Sub(b.ID.Time()) < 29*day:
			errs = append(errs, must(b, "in progress"))
			for _, pin := range b.Intent.Pins {
				for _, o := range m.backups {
					if o.ID == pin && o.alive() {
						errs = append(errs, must(o, "pinned"))
					}
				}
			}
		case b.alive() && m.policy.Window > 0 && !b.FinishedAt.Before(m.now.Add(-m.policy.Window)):
			errs = append(errs, must(b, "within the window"))
		}
	}
	return errors.Join(errs...)
}

// In this one a standby is promoted that had not received the end of the backup
// that leads into the window: its timeline comes from an older one, along log that
// the plan before needed no more. No plan was made for three days.
func TestATimelineThatBeganBeforeTheBackupEndedKeepsItsWay(t *testing.T) {
	m := newModel(671549, true)
	if step, err := m.play(); err != nil || m.kept.runs == 0 {
		t.Errorf("step %d: %v\n%s", step, err, strings.Join(m.log, "\n"))
	}
}

// Whatever happens to a cluster, its backups and its log, and whenever something
// is let go: no backup that is kept loses log that it needs, and no moment of the
// window is lost. -histories 1000000 is the long form; at about 2,000 a second
// and processor.
func TestC5NoHistoryLosesWhatWasPromised(t *testing.T) {
	var all tally
	var mu sync.Mutex
	var g sync.WaitGroup
	begun := time.Now()
	const workers = 2
	for k := range uint64(workers) {
		g.Go(func() {
			for seed := *historyFrom + k; seed < *historyFrom+uint64(*histories) && !t.Failed(); seed += workers {
				m := newModel(seed, false)
				if _, err := m.play(); err != nil {
					m = newModel(seed, true)
					step, err := m.play()
					t.Errorf("history %d, step %d: policy %+v: %v\n%s", seed, step, m.policy, err, strings.Join(m.log, "\n"))
					return
				}
				mu.Lock()
				k := m.kept
				all = tally{all.runs + k.runs, all.refused + k.refused, all.marked + k.marked, all.purged + k.purged, all.undeleted + k.undeleted, all.segments + k.segments, all.promised + k.promised}
				mu.Unlock()
			}
		})
	}
	g.Wait()
	t.Logf("%d histories in %v: %+v", *histories, time.Since(begun).Round(time.Millisecond), all)
	if all.marked == 0 || all.purged == 0 || all.segments == 0 || all.promised == 0 {
		t.Error("nothing ever happened")
	}
}
