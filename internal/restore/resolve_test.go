package restore_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

var ctx = context.Background()

const segment = pg.SegmentSize(1 << 20)

// A past is a cluster that was backed up and archived, in memory: the records
// of each timeline from its fork on, backups, and which segments are there.
type past struct {
	records map[pg.Timeline][]pg.WALRecord
	ledger  audit.Ledger
	backups []repo.Listed
}

var noon = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// way is all the records on the way to a timeline.
func (p past) way(t pg.Timeline) (all []pg.WALRecord) {
	forks := []pg.Fork{}
	for _, tl := range p.ledger.Timelines {
		if tl.ID == t {
			forks = tl.Forks
		}
	}
	from := pg.LSN(0)
	for _, f := range append(slices.Clone(forks), pg.Fork{Timeline: t, At: ^pg.LSN(0)}) {
		for _, r := range p.records[f.Timeline] {
			if r.At >= from && r.At < f.At {
				all = append(all, r)
			}
		}
		from = f.At
	}
	return all
}

// scan is the Scan of p; reads counts the segments it would have read.
func (p past) scan(reads *int) restore.Scan {
	return func(_ context.Context, w audit.Window, from, to pg.LSN, every bool) iter.Seq2[pg.WALRecord, error] {
		return func(yield func(pg.WALRecord, error) bool) {
			way := p.way(w.Path[len(w.Path)-1])
			from -= from % pg.LSN(segment)
			to = min(to+pg.LSN(segment)-1, w.To)
			to -= to % pg.LSN(segment)
			last := from - pg.LSN(segment)
			for _, r := range way {
				if r.At < from || r.End > to || r.Kind == 0 && !every {
					continue
				}
				for ; last+pg.LSN(segment) <= r.At; last += pg.LSN(segment) {
					*reads++
				}
				if !yield(r, nil) {
					return
				}
			}
		}
	}
}

// drawPast makes one, the same for the same seed.
func drawPast(seed uint64) past {
	rnd := rand.New(rand.NewPCG(seed, 1))
	p := past{records: map[pg.Timeline][]pg.WALRecord{}, ledger: audit.Ledger{Archive: repo.Archive{Cluster: "main", System: 7, Major: 15}, SegmentSize: segment}}
	at, xid, clock := pg.LSN(segment), uint32(700), noon
	forks := []pg.Fork{}
	for t := pg.Timeline(1); t <= pg.Timeline(1+rnd.IntN(3)); t++ {
		begin, stretch := at, segmentsOf(rnd, 2, 14)
		if t > 1 {
			p.ledger.AddHistory(t, slices.Clone(forks), noon)
		}
		for at < begin+stretch {
			rec := pg.WALRecord{At: at, End: at + pg.LSN(40+8*rnd.IntN(30_000))}
			clock = clock.Add(time.Duration(rnd.IntN(3)) * time.Second) // some at the same time
			switch k := rnd.IntN(10); {
			case k < 4:
				rec.Kind = pg.Commit
			case k < 5:
				rec.Kind = pg.Abort
			case k < 6:
				rec.Kind, rec.Name = pg.RestorePoint, fmt.Sprint("p", rnd.IntN(30))
			}
			if rec.Kind != 0 {
				rec.Time = clock
			}
			if rec.Kind == pg.Commit || rec.Kind == pg.Abort {
				xid++
				rec.XID = xid
			}
			p.records[t] = append(p.records[t], rec)
			at = rec.End
			if rnd.IntN(25) == 0 { // a backup
				stop := at + pg.LSN(8*rnd.IntN(30_000))
				p.records[t] = append(p.records[t], pg.WALRecord{At: at, End: stop})
				id := repo.NewID(clock, fmt.Sprintf("%08x", len(p.backups)))
				m := repo.Manifest{Ref: repo.Ref{Cluster: "main", ID: id}, Kind: "physical", System: 7, Version: 150004, FinishedAt: clock}
				m.Physical = &repo.PhysicalFacts{Start: rec.At, Stop: stop, Timeline: t, StopTimeline: t, StoppedAt: clock.Add(time.Second)}
				clock = clock.Add(time.Second)
				if rnd.IntN(8) == 0 {
					m.Physical.Damaged = 1
				}
				at = stop
				if stop < begin+stretch {
					p.backups = append(p.backups, repo.Listed{Manifest: m})
				}
			}
		}
		silent := t > 1 && rnd.IntN(4) == 0 // nothing but its history is archived
		for s := begin - begin%pg.LSN(segment); !silent && s+pg.LSN(segment) <= at; s += pg.LSN(segment) {
			name, err := pg.SegmentName(t, s, segment)
			if err != nil {
				panic(err)
			}
			n, err := pg.ParseWALName(name)
			if err == nil && rnd.IntN(25) > 0 {
				err = p.ledger.Add(n, noon)
			}
			if err != nil {
				panic(err)
			}
		}
		if rnd.IntN(2) == 0 { // left in the middle of what it wrote
			recs := p.records[t]
			at = recs[len(recs)-1-rnd.IntN(len(recs)/3+1)].End
		}
		forks = append(forks, pg.Fork{Timeline: t, At: at})
	}
	return p
}

func segmentsOf(rnd *rand.Rand, low, top int) pg.LSN {
	return pg.LSN(segment) * pg.LSN(low+rnd.IntN(top-low))
}

// drawTarget makes one that may or may not be reached.
func (p past) drawTarget(rnd *rand.Rand) restore.Target {
	newest := p.ledger.Timelines[len(p.ledger.Timelines)-1].ID
	t := restore.Target{Timeline: restore.TargetTimeline(rnd.IntN(int(newest) + 1)), Exclusive: rnd.IntN(2) == 0}
	if rnd.IntN(4) == 0 {
		t.Timeline = restore.CurrentTimeline
	}
	any := p.records[pg.Timeline(1+rnd.IntN(int(newest)))]
	rec := any[rnd.IntN(len(any))]
	switch t.Kind = []restore.TargetKind{restore.Latest, restore.ToTime, restore.ToLSN, restore.ToXID, restore.ToName, restore.Immediate}[rnd.IntN(6)]; t.Kind {
	case restore.Latest:
		t.Exclusive = false
	case restore.Immediate:
		t.Exclusive, t.Timeline = false, restore.LatestTimeline
	case restore.ToTime:
		t.Time = noon.Add(time.Duration(rnd.IntN(900)) * time.Second)
	case restore.ToLSN:
		t.LSN = rec.At + pg.LSN(rnd.IntN(2)*8)
	case restore.ToXID:
		t.XID = 701 + uint32(rnd.IntN(400))
	case restore.ToName:
		t.Name, t.Exclusive = fmt.Sprint("p", rnd.IntN(30)), false
	}
	return t
}

// An answer is what there is to say of a target; the zero one is that it cannot
// be reached.
type answer struct {
	backup repo.ID
	stop   pg.LSN
}

// served is where the log ends that PostgreSQL gets from the archive on its way from
// a position of timeline from to timeline t: of each segment it takes that of the newest
// timeline that had begun by then, and never goes back to an older one
// (XLogFileReadAnyTLI in access/transam/xlogrecovery.c).
func (p past) served(from pg.Timeline, at pg.LSN, t pg.Timeline) pg.LSN {
	begins := map[pg.Timeline]pg.LSN{}
	for _, tl := range p.ledger.Timelines {
		begin := pg.LSN(0)
		for _, f := range tl.Forks {
			if tl.ID == t {
				begins[f.Timeline] = begin
			}
			begin = f.At - f.At%pg.LSN(segment)
		}
		if tl.ID == t {
			begins[t] = begin
		}
	}
	at -= at % pg.LSN(segment)
	for {
		next := false
		for tl := t; tl >= from && tl > 0 && !next; tl-- {
			if begin, ok := begins[tl]; !ok || at < begin {
				continue
			}
			for _, have := range p.ledger.Timelines {
				next = next || have.ID == tl && slices.ContainsFunc(have.Ranges, func(r audit.Range) bool { return r.From <= at && at < r.To })
			}
			if next {
				from = tl
			}
		}
		if !next {
			return at
		}
		at += pg.LSN(segment)
	}
}

// oracle tries every backup with every record.
func (p past) oracle(t restore.Target) (best answer) {
	newest := p.ledger.Timelines[len(p.ledger.Timelines)-1].ID
	own := t.Timeline == restore.CurrentTimeline || t.Kind == restore.Immediate
	type place struct {
		timeline pg.Timeline
		at       pg.LSN
	}
	named := map[place]bool{}
	bestTimeline := newest
	backups := slices.Clone(p.backups) // by where they end, which is not always how they began
	slices.SortFunc(backups, func(a, b repo.Listed) int {
		if own {
			return a.Physical.StoppedAt.Compare(b.Physical.StoppedAt)
		}
		return cmp.Or(cmp.Compare(a.Physical.Stop, b.Physical.Stop), strings.Compare(string(a.ID), string(b.ID)))
	})
	for _, b := range backups {
		timeline := newest
		switch {
		case own:
			timeline = b.Physical.Timeline
		case t.Timeline != 0:
			timeline = pg.Timeline(t.Timeline)
		}
		way := p.way(timeline)
		reach, ok := p.ledger.Reach(audit.Base{Timeline: b.Physical.Timeline, Start: b.Physical.Start, Stop: b.Physical.Stop}, timeline)
		if !ok || b.Physical.Damaged > 0 {
			continue
		}
		for _, r := range way {
			if t.Kind == restore.ToName && r.At >= b.Physical.Stop && r.End <= reach.To && r.Name == t.Name {
				named[place{timeline, r.At}] = true
			}
		}
		switch t.Kind {
		case restore.Immediate:
			best = answer{b.ID, 0}
			continue
		case restore.Latest:
			best = answer{}
			if reach.To == p.ledger.Frontier(timeline) && p.served(b.Physical.Timeline, b.Physical.Start, timeline) == reach.To {
				best = answer{b.ID, 0}
			}
			continue
		}
		ended := t.Kind == restore.ToTime && !b.Physical.StoppedAt.After(t.Time) || t.Kind == restore.ToLSN && b.Physical.Stop <= t.LSN
		if ended {
			best = answer{} // an older one is no way round a hole
		}
		for _, r := range way {
			if r.At < b.Physical.Stop || r.End > reach.To {
				continue
			}
			end := r.Kind == pg.Commit || r.Kind == pg.Abort
			if ended && t.Kind == restore.ToTime && end && (r.Time.After(t.Time) || t.Exclusive && r.Time.Equal(t.Time)) ||
				ended && t.Kind == restore.ToLSN && r.At >= t.LSN ||
				t.Kind == restore.ToXID && end && r.XID == t.XID ||
				t.Kind == restore.ToName && r.Name == t.Name {
				best, bestTimeline = answer{b.ID, r.At}, timeline
				break
			}
		}
	}
	n := 0
	for at := range named {
		if at.timeline == bestTimeline {
			n++
		}
	}
	if n > 1 {
		return answer{}
	}
	return best
}

// What Resolve says is what trying everything says.
func TestResolveFindsWhatThereIs(t *testing.T) {
	reached, refused, known, astray, kinds := 0, 0, 0, 0, map[restore.TargetKind]int{}
	for seed := range uint64(3000) {
		p := drawPast(seed)
		rnd := rand.New(rand.NewPCG(seed, 2))
		target, reads := p.drawTarget(rnd), 0
		want := p.oracle(target)
		got, err := restore.Resolve(ctx, target, "", p.backups, p.ledger, p.scan(&reads))
		if (err == nil) != (want.backup != "") || err == nil && (got.Backup.ID != want.backup || got.Stop.At != want.stop) {
			t.Fatalf("seed %d, %+v: from %s, stop at %v (%v), want from %q at %v", seed, target, got.Backup.ID, got.Stop.At, err, want.backup, want.stop)
		}
		if err != nil {
			refused++
			if strings.Contains(err.Error(), "not archived yet") {
				astray++
			}
			if k := fail.KindOf(err); k != fail.Unreachable && k != fail.WALHole && k != fail.NoBackup {
				t.Fatalf("seed %d: %v", seed, err)
			}
			continue
		}
		reached++
		kinds[target.Kind]++
		if got.Last.At != 0 && (got.Last.Kind != pg.Commit || got.Stop.At != 0 && got.Last.At > got.Stop.At || got.Last.At < got.Backup.Physical.Stop) {
			t.Fatalf("seed %d: the last commit is %+v", seed, got.Last)
		}
		if !got.By.IsZero() {
			known++
			for _, r := range p.way(got.Timeline) {
				if r.At <= got.Stop.At && r.Time.After(got.By) {
					t.Fatalf("seed %d: %+v was not written by %v", seed, r, got.By)
				}
			}
		}
	}
	t.Logf("%d reached %v, %d refused, %d for an older timeline went on; of %d it is known when they had been written", reached, kinds, refused, astray, known)
	if len(kinds) < 6 || astray < 10 || refused < 300 || known < (reached-kinds[restore.Latest]-kinds[restore.Immediate])*9/10 {
		t.Error("the test has lost its point")
	}
}

// world is a past with two backups and nothing odd.
func plainPast() past {
	p := past{records: map[pg.Timeline][]pg.WALRecord{}, ledger: audit.Ledger{Archive: repo.Archive{Cluster: "main", System: 7, Major: 15}, SegmentSize: segment}}
	for i := range 100 {
		at := pg.LSN(segment) + pg.LSN(i)*100_000
		p.records[1] = append(p.records[1], pg.WALRecord{Kind: pg.Commit, At: at, End: at + 100_000, XID: uint32(700 + i), Time: noon.Add(time.Duration(i) * time.Minute)})
	}
	for i, at := range []int{10, 50} {
		r := p.records[1][at]
		m := repo.Manifest{Ref: repo.Ref{Cluster: "main", ID: repo.NewID(r.Time, fmt.Sprintf("%08x", i))}, Kind: "physical", System: 7, Version: 150004}
		m.Physical = &repo.PhysicalFacts{Start: r.At, Stop: r.End, Timeline: 1, StopTimeline: 1, StoppedAt: r.Time.Add(time.Second)}
		p.backups = append(p.backups, repo.Listed{Manifest: m})
	}
	p.archive(1, 10)
	return p
}

func (p *past) archive(from, to int) {
	for i := from; i < to; i++ {
		name, err := pg.SegmentName(1, pg.LSN(segment)*pg.LSN(i), segment)
		if err != nil {
			panic(err)
		}
		n, err := pg.ParseWALName(name)
		if err != nil {
			panic(err)
		}
		if err := p.ledger.Add(n, noon); err != nil {
			panic(err)
		}
	}
}

// C4, C13: a refusal says what can be reached.
func TestARefusalNamesTheNearestMoments(t *testing.T) {
	p := plainPast()
	holed := plainPast()
	holed.ledger.Timelines = nil
	holed.archive(1, 4)
	holed.archive(5, 10)
	damaged := plainPast()
	damaged.backups[0].Physical.Damaged = 3
	double := plainPast()
	for _, i := range []int{20, 70} {
		double.records[1][i].Kind, double.records[1][i].Name = pg.RestorePoint, "twice"
	}
	for what, tt := range map[string]struct {
		past   past
		target restore.Target
		kind   fail.Kind
		hint   string
	}{
		"before the first backup": {p, restore.Target{Kind: restore.ToTime, Time: noon.Add(10 * time.Minute)}, fail.Unreachable,
			"the first moment that can be reached: 2026-11-22 12:10:01+00 (0/20C8E0), the end of backup 20261122T121000Z-00000000"},
		"before the first one that is sound": {damaged, restore.Target{Kind: restore.ToLSN, LSN: 0x300000}, fail.Unreachable,
			"the first moment that can be reached: 2026-11-22 12:50:01+00 (0/5DD1E0), the end of backup 20261122T125000Z-00000001; 1 backups were passed by, such as 20261122T121000Z-00000000: damaged: 3 blocks in 0 files were broken at the source; it is used only if it is named"},
		"behind the archive": {p, restore.Target{Kind: restore.ToTime, Time: noon.Add(24 * time.Hour)}, fail.Unreachable,
			"the last transaction before that was 793, committed at 2026-11-22 13:33:00+00 (0/9DE820); --to-xid 793 reaches it"},
		"in a hole": {holed, restore.Target{Kind: restore.ToTime, Time: noon.Add(40 * time.Minute)}, fail.WALHole,
			"the last transaction before that was 730, committed at 2026-11-22 12:30:00+00 (0/3DC6C0); --to-xid 730 reaches it, and after it 2026-11-22 12:50:01+00 (0/5DD1E0), the end of backup 20261122T125000Z-00000001"},
		"an unknown transaction": {p, restore.Target{Kind: restore.ToXID, XID: 4711}, fail.Unreachable,
			"searched from 2026-11-22 12:10:01+00 (0/20C8E0), the end of backup 20261122T121000Z-00000000, to 0/A00000; a transaction that wrote nothing, or a subtransaction, has no end in the log"},
		"a name that was given twice": {double, restore.Target{Kind: restore.ToName, Name: "twice"}, fail.Unreachable,
			"say which: --to-lsn 0/2E8480 (2026-11-22 12:20:00+00), --to-lsn 0/7ACFC0 (2026-11-22 13:10:00+00)"},
		"no such timeline": {p, restore.Target{Kind: restore.Latest, Timeline: 9}, fail.Unreachable,
			"with --timeline, these can be reached: 1"},
	} {
		reads := 0
		_, err := restore.Resolve(ctx, tt.target, "", tt.past.backups, tt.past.ledger, tt.past.scan(&reads))
		if !errors.Is(err, tt.kind) || fail.HintOf(err) != tt.hint {
			t.Errorf("%s: %v\nhint %s\nwant %s", what, err, fail.HintOf(err), tt.hint)
		}
	}
}

// A damaged backup is used when it is named, and a named one alone.
func TestANamedBackupIsTheOneThatIsUsed(t *testing.T) {
	p := plainPast()
	p.backups[0].Physical.Damaged = 3
	target, reads := restore.Target{Kind: restore.ToXID, XID: 790}, 0
	got, err := restore.Resolve(ctx, target, p.backups[0].ID, p.backups, p.ledger, p.scan(&reads))
	if err != nil || got.Backup.ID != p.backups[0].ID || got.Stop.XID != 790 || got.Timeline != 1 {
		t.Errorf("from %s (%v)", got.Backup.ID, err)
	}
	target = restore.Target{Kind: restore.ToXID, XID: 720}
	if _, err := restore.Resolve(ctx, target, p.backups[1].ID, p.backups, p.ledger, p.scan(&reads)); !errors.Is(err, fail.Unreachable) {
		t.Errorf("got %v", err)
	}
}

// To find a time, little of the log is read.
func TestATimeIsFoundByHalving(t *testing.T) {
	p := past{records: map[pg.Timeline][]pg.WALRecord{}, ledger: audit.Ledger{Archive: repo.Archive{Cluster: "main", System: 7, Major: 15}, SegmentSize: segment}}
	for i := range 20_000 {
		at := pg.LSN(segment) + pg.LSN(i)*100_000
		p.records[1] = append(p.records[1], pg.WALRecord{Kind: pg.Commit, At: at, End: at + 100_000, XID: uint32(700 + i), Time: noon.Add(time.Duration(i) * time.Second)})
	}
	p.backups = plainPast().backups[:1]
	p.archive(1, 1900)
	reads := 0
	got, err := restore.Resolve(ctx, restore.Target{Kind: restore.ToTime, Time: noon.Add(12345 * time.Second)}, "", p.backups, p.ledger, p.scan(&reads))
	if err != nil || got.Stop.XID != 700+12346 || got.Last.XID != 700+12345 || reads > 40 {
		t.Errorf("stops at %+v after %+v, %d segments read (%v)", got.Stop, got.Last, reads, err)
	}
}

// PostgreSQL compares each transaction with the time as it comes to it, and stops at
// the first that is later (recoveryStopsBefore in access/transam/xlogrecovery.c),
// whatever clock it was written by. So do we, as long as what is read on the way
// shows that the clock was set, which a leap of minutes does.
func TestATimeAfterTheClockWasSet(t *testing.T) {
	reached, same := 0, 0
	for seed := range uint64(3000) {
		p, rnd := drawPast(seed), rand.New(rand.NewPCG(seed, 4))
		for range 1 + rnd.IntN(2) {
			some := p.records[1]
			at := some[rnd.IntN(len(some))].At
			p.set(at, time.Duration(rnd.IntN(1200)-800)*time.Second)
		}
		target, reads := restore.Target{Kind: restore.ToTime, Exclusive: rnd.IntN(2) == 0}, 0
		for some := p.way(p.ledger.Timelines[len(p.ledger.Timelines)-1].ID); target.Time.IsZero(); {
			target.Time = some[rnd.IntN(len(some))].Time
		}
		want := p.oracle(target)
		got, err := restore.Resolve(ctx, target, "", p.backups, p.ledger, p.scan(&reads))
		if err != nil {
			continue
		}
		reached++
		if got.Backup.ID == want.backup && got.Stop.At == want.stop {
			same++
		}
		if !got.Stop.Time.After(target.Time) && !(target.Exclusive && got.Stop.Time.Equal(target.Time)) || got.Last.At != 0 && (got.Last.Time.After(target.Time) || got.Last.At > got.Stop.At) {
			t.Fatalf("seed %d, %+v: stops at %+v, after %+v", seed, target, got.Stop, got.Last)
		}
	}
	t.Logf("%d reached, %d where PostgreSQL would stop by the time", reached, same)
	if reached < 1000 || same < reached*99/100 {
		t.Error("too few")
	}

	p := past{records: map[pg.Timeline][]pg.WALRecord{}, ledger: audit.Ledger{Archive: repo.Archive{Cluster: "main", System: 7, Major: 15}, SegmentSize: segment}}
	for i := range 20_000 { // a second each, of which an hour comes twice
		at, clock := pg.LSN(segment)+pg.LSN(i)*100_000, noon.Add(time.Duration(i)*time.Second)
		if i >= 10_000 {
			clock = clock.Add(-time.Hour)
		}
		p.records[1] = append(p.records[1], pg.WALRecord{Kind: pg.Commit, At: at, End: at + 100_000, XID: uint32(700 + i), Time: clock})
	}
	p.backups = plainPast().backups[:1]
	p.archive(1, 1900)
	for _, second := range []int{6300, 6400, 6401, 8000, 9998, 9999, 10_500} {
		reads := 0
		got, err := restore.Resolve(ctx, restore.Target{Kind: restore.ToTime, Time: noon.Add(time.Duration(second) * time.Second)}, "", p.backups, p.ledger, p.scan(&reads))
		want := uint32(second) + 701
		if second >= 9999 {
			want += 3600
		}
		if err != nil || got.Stop.XID != want {
			t.Errorf("second %d: stops at %+v, want %d (%v)", second, got.Stop, want, err)
		}
	}
}

// set sets the clock of the cluster from a position on.
func (p past) set(at pg.LSN, by time.Duration) {
	for t := range p.records {
		for i := range p.records[t] {
			if r := &p.records[t][i]; r.At >= at && !r.Time.IsZero() {
				r.Time = r.Time.Add(by)
			}
		}
	}
	for i := range p.backups {
		if f := p.backups[i].Physical; f.Stop > at {
			f.StoppedAt = f.StoppedAt.Add(by)
		}
	}
}

// What retention let go is told as that, and not as a hole that somebody could
// fill.
func TestAMomentThatRetentionLetGo(t *testing.T) {
	at := func(n int) pg.LSN { return pg.LSN(n) * pg.LSN(segment) }
	l := audit.Ledger{Archive: repo.Archive{Cluster: "main", System: 7, Major: 15}, SegmentSize: segment, Timelines: []audit.Timeline{{ID: 1, Floor: at(10),
		Ranges: []audit.Range{{From: at(1), To: at(3), First: noon, Last: noon}, {From: at(10), To: at(20), First: noon, Last: noon}}}}}
	var backups []repo.Listed
	for i, first := range []int{1, 10} {
		when := noon.Add(time.Duration(i) * time.Hour)
		m := repo.Manifest{Ref: repo.Ref{Cluster: "main", ID: repo.NewID(when, fmt.Sprintf("%08x", i))}, Kind: repo.Physical, System: 7, Version: 150000, FinishedAt: when,
			Content: repo.Content{Physical: &repo.PhysicalFacts{Start: at(first) + 100, Stop: at(first+2) - 100, Timeline: 1, StopTimeline: 1, StoppedAt: when, SegmentSize: segment}}}
		backups = append(backups, repo.Listed{Manifest: m})
	}
	nothing := func(context.Context, audit.Window, pg.LSN, pg.LSN, bool) iter.Seq2[pg.WALRecord, error] {
		return func(func(pg.WALRecord, error) bool) {}
	}
	_, err := restore.Resolve(ctx, restore.Target{Kind: restore.ToLSN, LSN: at(5)}, "", backups, l, nothing)
	if !errors.Is(err, fail.Unreachable) || !strings.Contains(err.Error(), "retention let the log go from 0/300000 on") || !strings.Contains(fail.HintOf(err), string(backups[1].ID)) {
		t.Errorf("%v (hint %q)", err, fail.HintOf(err))
	}
	l.Timelines[0].Floor = 0
	if _, err := restore.Resolve(ctx, restore.Target{Kind: restore.ToLSN, LSN: at(5)}, "", backups, l, nothing); !errors.Is(err, fail.WALHole) {
		t.Errorf("without a floor: %v", err)
	}
}

// A moment before pg_upgrade was unreachable, for the cluster's newest life alone was
// looked at.
func TestAMomentBeforeAnUpgradeIsInTheLifeBefore(t *testing.T) {
	var backups []repo.Listed
	for i, system := range []pg.SystemID{5, 6, 6, 7} {
		at := noon.Add(time.Duration(i) * 24 * time.Hour)
		m := repo.Manifest{Ref: repo.Ref{Cluster: "main", ID: repo.NewID(at, fmt.Sprintf("%08x", i))}, Kind: repo.Physical, System: system, Version: pg.Version(150000 + 10000*(system-5)), FinishedAt: at}
		m.Physical = &repo.PhysicalFacts{Start: pg.LSN(segment), Stop: pg.LSN(segment) + 4000, Timeline: 1, StopTimeline: 1, StoppedAt: at}
		backups = append(backups, repo.Listed{Manifest: m})
	}
	moment := func(days float64) restore.Target {
		return restore.Target{Kind: restore.ToTime, Time: noon.Add(time.Duration(days * float64(24*time.Hour)))}
	}
	for what, tt := range map[string]struct {
		p    restore.Physical
		want pg.SystemID
	}{
		"the latest moment":         {restore.Physical{Target: restore.Target{Kind: restore.Latest}}, 7},
		"a time now":                {restore.Physical{Target: moment(3.5)}, 7},
		"the end of the backup":     {restore.Physical{Target: moment(3)}, 7},
		"a time before the upgrade": {restore.Physical{Target: moment(2.5)}, 6},
		"before the one before":     {restore.Physical{Target: moment(0.5)}, 5},
		"before all":                {restore.Physical{Target: moment(-1)}, 5},
		"a backup that is named":    {restore.Physical{Target: moment(3.5), Backup: backups[1].ID}, 6},
		"a transaction":             {restore.Physical{Target: restore.Target{Kind: restore.ToXID, XID: 800}}, 7},
	} {
		tt.p.Cluster = "main"
		if got := tt.p.Life(backups); got.System != tt.want || got.Cluster != "main" || got.Major != 15+int(tt.want-5) {
			t.Errorf("%s: in %+v, want system %v", what, got, tt.want)
		}
	}
	p := plainPast()
	p.backups = append(p.backups, backups[1])
	reads := 0
	for _, target := range []restore.Target{{Kind: restore.ToXID, XID: 4711}, {Kind: restore.ToLSN, LSN: 0x100000}} {
		_, err := restore.Resolve(ctx, target, "", p.backups, p.ledger, p.scan(&reads))
		if hint := fail.HintOf(err); !strings.Contains(hint, "pgkeep restore "+string(backups[1].ID)) {
			t.Errorf("%v: %v; %s", target, err, hint)
		}
	}
}

// Of two timelines, the positions do not compare: the newest backup is the one that
// was taken last.
func TestTheNewestBackupIsNotTheOneThatEndsHighest(t *testing.T) {
	p := plainPast()
	p.ledger.AddHistory(2, []pg.Fork{{Timeline: 1, At: pg.LSN(segment)*3 + 800}}, noon)
	for i := range 3 {
		n, _ := pg.ParseWALName(fmt.Sprintf("00000002000000000000000%d", 3+i))
		if err := p.ledger.Add(n, noon); err != nil {
			t.Fatal(err)
		}
	}
	m := p.backups[1].Manifest // ends at 0/5DD1E0 of timeline 1
	m.ID = repo.NewID(noon.Add(10*time.Hour), "00000002")
	m.Physical = &repo.PhysicalFacts{Start: pg.LSN(segment)*4 + 40, Stop: pg.LSN(segment)*4 + 400, Timeline: 2, StopTimeline: 2, StoppedAt: noon.Add(10 * time.Hour)}
	p.backups = append(p.backups, repo.Listed{Manifest: m})
	p.records[2] = []pg.WALRecord{{Kind: pg.Commit, At: pg.LSN(segment)*4 + 800, End: pg.LSN(segment)*4 + 900, XID: 720, Time: noon.Add(11 * time.Hour)}}
	reads := 0
	for _, target := range []restore.Target{{Kind: restore.Immediate}, {Kind: restore.Latest, Timeline: restore.CurrentTimeline},
		{Kind: restore.ToTime, Time: noon.Add(10*time.Hour + time.Minute), Timeline: restore.CurrentTimeline}, {Kind: restore.ToXID, XID: 720, Timeline: restore.CurrentTimeline}} {
		got, err := restore.Resolve(ctx, target, "", p.backups, p.ledger, p.scan(&reads))
		if err != nil || got.Backup.ID != m.ID || got.Timeline != 2 {
			t.Errorf("%v: from %s, along timeline %d (%v)", target, got.Backup.ID, got.Timeline, err)
		}
	}
}
