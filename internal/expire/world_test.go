package expire_test

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

const (
	segment = pg.SegmentSize(1 << 20)
	day     = 24 * time.Hour
)

var policy = retention.Policy{Window: 3 * day, Daily: 4, Weekly: 2, Monthly: 1, Min: 1, Grace: day}

// A clocked store dates objects by a clock of its own.
type clocked struct {
	store.Store
	mu    *sync.Mutex
	now   *time.Time
	dates map[string]time.Time
}

func (c clocked) Put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	err := c.Store.Put(ctx, key, r, opt)
	if err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.dates[key] = *c.now
	}
	return err
}

func (c clocked) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		for o, err := range c.Store.List(ctx, prefix, after) {
			c.mu.Lock()
			o.Modified = c.dates[o.Key]
			c.mu.Unlock()
			if !yield(o, err) {
				return
			}
		}
	}
}

// A world is a cluster with a past, in a repository in memory.
type world struct {
	t      *testing.T
	rnd    *rand.Rand
	st     clocked
	access repo.Access
	r      *repo.Repo
	now    time.Time

	archive  repo.Archive
	timeline pg.Timeline
	at       pg.LSN // where the next segment begins
	history  string
	logs     []logged
	disk     map[string][]byte
	last     repo.ID // physical
	whole    map[repo.ID]map[string][]byte
}

// logged is a segment that was archived.
type logged struct {
	archive  repo.Archive
	timeline pg.Timeline
	at       pg.LSN
	when     time.Time
}

func newWorld(t *testing.T, seed uint64) *world {
	t.Helper()
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, rnd: rand.New(rand.NewPCG(seed, 6)), now: time.Date(2026, 11, 1, 1, 0, 0, 0, time.UTC), timeline: 1, at: pg.LSN(segment),
		archive: repo.Archive{Cluster: "main", System: 7_300_000_000_000_000_001, Major: 15}, access: repo.Access{Signer: signer, Version: "test"},
		disk: make(map[string][]byte), whole: make(map[repo.ID]map[string][]byte)}
	w.st = clocked{new(store.Mem), new(sync.Mutex), &w.now, make(map[string]time.Time)}
	w.must(w.init())
	return w
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) init() (err error) {
	w.r, _, err = repo.Init(w.t.Context(), w.st, w.access, nil, w.now)
	return err
}

func (w *world) copyOf() *world {
	c := *w
	c.st = clocked{new(store.Mem), new(sync.Mutex), &c.now, maps.Clone(w.st.dates)}
	for o, err := range w.st.Store.List(w.t.Context(), "", "") {
		w.must(err)
		rc, err := w.st.Get(w.t.Context(), o.Key, store.Range{})
		w.must(err)
		w.must(c.st.Store.Put(w.t.Context(), o.Key, rc, store.PutOptions{}))
		rc.Close()
	}
	w.must(c.init())
	return &c
}

func (w *world) put(name string, content []byte) {
	w.t.Helper()
	n, err := pg.ParseWALName(name)
	w.must(err)
	_, err = w.r.Archiver(w.archive, "").Put(w.t.Context(), repo.WALFile{Name: n, Size: int64(len(content)), Content: bytes.NewReader(content)})
	w.must(err)
}

func (w *world) archiveSegment() {
	name, err := pg.SegmentName(w.timeline, w.at, segment)
	w.must(err)
	w.put(name, make([]byte, segment))
	w.logs = append(w.logs, logged{w.archive, w.timeline, w.at, w.now})
	w.at += pg.LSN(segment)
}

func (w *world) pass(d time.Duration) { w.now = w.now.Add(d) }

// promote goes on along a new timeline, from the middle of the last segment.
func (w *world) promote() {
	fork := w.at - pg.LSN(segment)/2
	w.history += fmt.Sprintf("%d\t%v\tno recovery target specified\n\n", w.timeline, fork)
	w.timeline++
	w.put(pg.HistoryName(w.timeline).String(), []byte(w.history))
	w.at -= pg.LSN(segment) // it is archived once more, as a segment of the new one
}

// upgrade makes a new system of it, as pg_upgrade does.
func (w *world) upgrade() {
	w.archive.System++
	w.archive.Major++
	w.timeline, w.history, w.at = 1, "", pg.LSN(segment)
	w.last = ""
}

type source struct{ *bytes.Reader }

func (source) Close() error { return nil }

// begin writes the intent of a backup.
func (w *world) begin(kind repo.Kind) repo.Ref {
	ref := repo.Ref{Cluster: "main", ID: repo.NewID(w.now, fmt.Sprintf("%08x", w.rnd.Uint32()))}
	in := repo.Intent{Ref: ref, Kind: kind, Host: "db1", StartedAt: w.now}
	if kind == repo.Physical && w.last != "" {
		in.Pins = []repo.ID{w.last}
	}
	_, err := w.r.WriteIntent(w.t.Context(), in, func() time.Time { return w.now })
	w.must(err)
	return ref
}

// backUp takes a backup that goes on for an hour.
func (w *world) backUp(kind repo.Kind, damaged bool) repo.Ref {
	w.t.Helper()
	for range 3 {
		b := make([]byte, 3*8192)
		for i := range b {
			b[i] = byte(w.rnd.Uint32())
		}
		w.disk[fmt.Sprintf("data/%d", w.rnd.IntN(6))] = b
	}
	ref, start := w.begin(kind), w.now
	first := w.at
	tli := w.timeline
	w.archiveSegment()
	w.pass(time.Hour)
	w.archiveSegment()
	disk := maps.Clone(w.disk)
	wr, err := w.r.Begin(w.t.Context(), repo.Writing{Ref: ref, PackSize: 30_000, Readers: 1, Senders: 1, Open: func(f *repo.File) (repo.Source, error) {
		return source{bytes.NewReader(disk[f.Path])}, nil
	}})
	w.must(err)
	defer wr.Close()
	w.must(wr.Add(w.t.Context(), func(yield func(repo.File, error) bool) {
		for _, p := range slices.Sorted(maps.Keys(disk)) {
			if !yield(repo.File{Path: p, Mode: 0o600, Size: int64(len(disk[p])), Modified: start}, nil) {
				return
			}
		}
	}))
	m := repo.Manifest{Ref: ref, Kind: kind, Host: "db1", System: w.archive.System, Version: pg.Version(w.archive.Major * 10000), StartedAt: start, FinishedAt: w.now}
	var facts *repo.PhysicalFacts
	if kind == repo.Physical {
		f, err := pg.SegmentName(tli, first, segment)
		w.must(err)
		l, err := pg.SegmentName(tli, w.at-1, segment)
		w.must(err)
		facts = &repo.PhysicalFacts{System: w.archive.System, Version: m.Version, Start: first + 100, Stop: w.at - 100, Timeline: tli, StopTimeline: tli, StartedAt: start, StoppedAt: w.now,
			FirstWAL: f, LastWAL: l, SegmentSize: segment, BlockSize: 8192}
		if damaged {
			facts.Damaged, facts.DamagedFiles = 1, 1
		}
	}
	_, err = wr.Finish(w.t.Context(), facts, nil)
	w.must(err)
	_, err = w.r.Publish(w.t.Context(), m)
	w.must(err)
	w.whole[ref.ID] = disk
	if kind == repo.Physical {
		w.last = ref.ID
	}
	return ref
}

// live lets so many days go by.
func (w *world) live(days int) {
	for range days {
		if w.rnd.IntN(3) > 0 {
			ref := w.backUp(repo.Physical, w.rnd.IntN(8) == 0)
			switch w.rnd.IntN(6) {
			case 0:
				w.must(w.r.WriteProof(w.t.Context(), repo.Proof{Ref: ref, Test: repo.NewID(w.now, fmt.Sprintf("%08x", w.rnd.Uint32())), FinishedAt: w.now, Passed: w.rnd.IntN(4) > 0, Report: []byte("{}")}))
			case 1:
				_, err := w.r.AddHold(w.t.Context(), ref, "for a test", "db1", w.now)
				w.must(err)
			}
		}
		if w.rnd.IntN(2) == 0 {
			w.backUp(repo.Logical, false)
		}
		w.archiveSegment()
		w.pass(8 * time.Hour)
		w.archiveSegment()
		switch w.rnd.IntN(25) {
		case 0, 1:
			w.promote()
		case 2:
			w.begin(repo.Physical) // and never finished
		case 3:
			w.upgrade()
			w.archiveSegment()
			w.backUp(repo.Physical, false)
		}
		w.pass(14 * time.Hour)
	}
	w.pass(-13 * time.Hour)
}

func (w *world) expirer(st store.Store) *expire.Expirer {
	return &expire.Expirer{Name: "main", Policy: policy, Open: func(ctx context.Context) (*repo.Repo, error) { return repo.Open(ctx, st, w.access) }}
}

// expire runs once, now.
func (w *world) expire(st store.Store) (expire.Done, error) {
	x := w.expirer(st)
	plan, err := x.PlanAt(w.t.Context(), w.now)
	if err != nil {
		return expire.Done{}, err
	}
	return x.ApplyAt(w.t.Context(), expire.Order{Backups: plan.Removals(), Confirm: plan.Confirm}, w.now)
}

// A spot is a segment of an archive.
type spot struct {
	archive  repo.Archive
	timeline pg.Timeline
	at       pg.LSN
}

func (s spot) key() string {
	name, _ := pg.SegmentName(s.timeline, s.at, segment)
	return fmt.Sprintf("clusters/main/wal/%v-%d/%v/%s.zst", s.archive.System, s.archive.Major, s.timeline, name)
}

// moments are the segments that a good backup leads to, all on the way being
// there, of those that were archived since: it goes the way one by one, unlike
// the code under test.
func (w *world) moments(since time.Time) (map[spot]bool, error) {
	all, err := w.r.Records(w.t.Context(), "main")
	if err != nil {
		return nil, err
	}
	there := make(map[string]bool)
	forks := make(map[spot][]pg.Timeline) // the segment in which a timeline was left: for which
	for o, err := range w.st.List(w.t.Context(), "clusters/main/wal/", "") {
		if err != nil {
			return nil, err
		}
		there[o.Key] = true
	}
	archives, err := w.r.Archives(w.t.Context(), "main")
	if err != nil {
		return nil, err
	}
	for _, a := range archives {
		l, _, err := audit.Survey(w.t.Context(), w.r, a, audit.Ledger{})
		if err != nil {
			return nil, err
		}
		for _, t := range l.Timelines {
			if n := len(t.Forks); n > 0 {
				f := t.Forks[n-1]
				s := spot{a, f.Timeline, f.At - f.At%pg.LSN(segment)}
				forks[s] = append(forks[s], t.ID)
			}
		}
	}
	reached := make(map[spot]bool)
	for _, b := range all {
		if b.Physical == nil || b.Deleted != nil || b.Physical.Damaged > 0 || b.Proof != nil && !b.Proof.Passed {
			continue
		}
		at := b.Physical.Start - b.Physical.Start%pg.LSN(segment)
		var walk func(s spot)
		walk = func(s spot) {
			for ; ; s.at += pg.LSN(segment) {
				for _, t := range forks[s] {
					if s.at+pg.LSN(segment) >= b.Physical.Stop {
						walk(spot{s.archive, t, s.at})
					}
				}
				if !there[s.key()] {
					return
				}
				if s.at+pg.LSN(segment) >= b.Physical.Stop && !w.st.dates[s.key()].Before(since) {
					reached[s] = true
				}
			}
		}
		walk(spot{repo.Archive{Cluster: "main", System: b.System, Major: b.Version.Major()}, b.Physical.Timeline, at})
	}
	return reached, nil
}

// check looks whether all that is listed is whole, that what was kept is listed,
// and that all moments can be reached.
func (w *world) check(keep []repo.ID, promised map[spot]bool) error {
	ctx := w.t.Context()
	list, err := w.r.Backups(ctx, "main")
	if err != nil {
		return err
	}
	listed := make(map[repo.ID]bool)
	for _, b := range list {
		if b.Err != nil {
			return b.Err
		}
		listed[b.ID] = true
		if b.Unfinished {
			continue
		}
		rep, err := w.r.Read(ctx, b.ID, b.Content, repo.Reading{Readers: 1})
		if err = cmp.Or(err, rep.Err()); err != nil {
			return fmt.Errorf("restore %s: %w", b.ID, err)
		}
		if b.Physical == nil {
			continue
		}
		names, err := b.Physical.Segments()
		if err != nil {
			return err
		}
		for _, n := range names {
			if err := w.r.CheckWAL(ctx, repo.Archive{Cluster: "main", System: b.System, Major: b.Version.Major()}, n); err != nil {
				return fmt.Errorf("backup %s cannot be consistent: %w", b.ID, err)
			}
		}
	}
	for _, id := range keep {
		if !listed[id] {
			return fmt.Errorf("backup %s was to be kept, and is gone", id)
		}
	}
	now, err := w.moments(w.now.Add(-policy.Window))
	if err != nil {
		return err
	}
	for s := range promised {
		if !now[s] {
			return fmt.Errorf("%s cannot be reached any more", s.key())
		}
	}
	reports, err := audit.Take(ctx, w.r, "main", nil, w.now)
	if err != nil {
		return err
	}
	return audit.Err("main", reports)
}

var errCrash = errors.New("crash")

// A mortal store dies with the n-th change of a kind: that one is done not at
// all, half, or whole, and nothing is done after it.
type mortal struct {
	store.Store
	n, part int  // part: how many eighths of the keys a last deletion still takes
	deletes bool // only these count
	mu      sync.Mutex
	seen    int
	dead    bool
}

func (m *mortal) die(count bool) (last bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dead {
		return false, errCrash
	}
	if count {
		m.seen++
		m.dead = m.seen == m.n
	}
	return count && m.dead, nil
}

func (m *mortal) Get(ctx context.Context, key string, part store.Range) (io.ReadCloser, error) {
	if _, err := m.die(false); err != nil {
		return nil, err
	}
	return m.Store.Get(ctx, key, part)
}

func (m *mortal) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	if _, err := m.die(false); err != nil {
		return func(yield func(store.Object, error) bool) { yield(store.Object{}, err) }
	}
	return m.Store.List(ctx, prefix, after)
}

func (m *mortal) Put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	last, err := m.die(!m.deletes)
	if err != nil || last && m.part < 4 {
		return cmp.Or(err, errCrash)
	}
	if err := m.Store.Put(ctx, key, r, opt); err != nil || !last {
		return err
	}
	return errCrash
}

func (m *mortal) Delete(ctx context.Context, keys ...string) error {
	last, err := m.die(true)
	if err != nil {
		return err
	}
	if last {
		keys = keys[:(len(keys)*m.part+4)/8]
	}
	if err := m.Store.Delete(ctx, keys...); err != nil || !last {
		return err
	}
	return errCrash
}
