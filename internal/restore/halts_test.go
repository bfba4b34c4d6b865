package restore_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

// A counting is a source that wrote while rows were counted: a backup that ended at
// stop, records since, and which transactions a snapshot saw, that was taken in the
// middle.
type counting struct {
	past
	res     restore.Resolved
	counted cluster.Counted
	seen    map[uint32]bool
}

// drawCounting makes one. A transaction's commit record is written first, and
// others see what it did some records later.
func drawCounting(seed uint64) counting {
	rnd := rand.New(rand.NewPCG(seed, 2))
	c := counting{past: past{records: map[pg.Timeline][]pg.WALRecord{}, ledger: audit.Ledger{Archive: repo.Archive{Cluster: "main", System: 7, Major: 15}, SegmentSize: segment}}, seen: map[uint32]bool{}}
	at, stop := pg.LSN(segment), pg.LSN(0)
	xid := uint32(1<<32 - 20) // it comes around
	epoch := uint64(5) << 32
	full := func(x uint32) uint64 {
		if x < 1<<31 {
			return epoch + 1<<32 + uint64(x)
		}
		return epoch + uint64(x)
	}
	type committing struct {
		xid uint32
		ago int // records until it is seen
	}
	var running []uint32
	var waiting []committing
	taken := 20 + rnd.IntN(100)
	calm := rnd.IntN(3) > 0
	for i := range 120 {
		rec := pg.WALRecord{At: at, End: at + pg.LSN(40+8*rnd.IntN(12_000))}
		switch k := rnd.IntN(10); {
		case k < 4:
			running = append(running, xid)
			xid = max(xid+1, 3) // the first three are no transactions
		case k < 8 && len(running) > 0:
			j := rnd.IntN(len(running))
			rec.Kind, rec.XID, rec.Time = pg.Commit, running[j], noon
			if rnd.IntN(5) == 0 {
				rec.Kind = pg.Abort
			}
			running = slices.Delete(running, j, j+1)
			late := 0
			if !calm {
				late = rnd.IntN(4)
			}
			if !calm && rnd.IntN(200) == 0 {
				late = 1000 // a synchronous standby is gone
			}
			waiting = append(waiting, committing{rec.XID, late})
		}
		if i == 10 {
			rec.Kind, rec.XID, stop = 0, 0, rec.End
		}
		c.records[1] = append(c.records[1], rec)
		at = rec.End
		waiting = slices.DeleteFunc(waiting, func(w committing) bool { return w.ago == 0 })
		for j := range waiting {
			waiting[j].ago--
		}
		if i == taken {
			open := slices.Clone(running)
			for _, w := range waiting {
				open = append(open, w.xid)
			}
			xmin, xip := full(xid), []string{}
			for _, x := range open {
				xmin = min(xmin, full(x))
				xip = append(xip, fmt.Sprint(full(x)))
			}
			c.counted = cluster.Counted{Database: "app", After: at, Snapshot: fmt.Sprintf("%d:%d:%s", xmin, full(xid), strings.Join(xip, ","))}
			for _, r := range c.records[1] {
				if r.Kind == pg.Commit && !slices.Contains(open, r.XID) {
					c.seen[r.XID] = true
				}
			}
		}
	}
	for s := pg.LSN(segment); s+pg.LSN(segment) <= at; s += pg.LSN(segment) {
		name, err := pg.SegmentName(1, s, segment)
		if err != nil {
			panic(err)
		}
		n, err := pg.ParseWALName(name)
		if err == nil {
			err = c.ledger.Add(n, noon)
		}
		if err != nil {
			panic(err)
		}
	}
	m := repo.Manifest{Ref: repo.Ref{Cluster: "main", ID: "b"}, Kind: repo.Physical, System: 7, Version: 150004,
		Content: repo.Content{Physical: &repo.PhysicalFacts{Start: pg.LSN(segment), Stop: stop, Timeline: 1, StopTimeline: 1, SegmentSize: segment}}}
	w, _ := c.ledger.Reach(audit.Base{ID: "b", Timeline: 1, Start: m.Physical.Start, Stop: stop}, 1)
	c.res = restore.Resolved{Backup: m, Window: w, Timeline: 1, Until: w.To}
	return c
}

// at reports whether a recovery that halts before the first record from a
// position on has what the snapshot saw.
func (c counting) at(x pg.LSN) bool {
	for _, r := range c.records[1] {
		if r.Kind == pg.Commit && (r.At < x) != c.seen[r.XID] {
			return false
		}
	}
	return true
}

// Where a recovery halts, it has exactly what the snapshot saw; and if it is said
// that there is no such place, there is none. A transaction whose record was in the
// log before the backup's end, and that was not seen, is found out by asking.
func TestARecoveryHaltsWhereRowsWereCounted(t *testing.T) {
	var exact, none, beyond, asked int
	for seed := range uint64(3000) {
		c := drawCounting(seed)
		reads := 0
		from, to, why, err := restore.Place(ctx, c.res, restore.Target{Kind: restore.Latest}, c.counted, c.scan(&reads))
		if err != nil {
			t.Fatal(err)
		}
		hidden := false
		for _, r := range c.records[1] {
			hidden = hidden || r.Kind == pg.Commit && r.At < c.res.Backup.Physical.Stop && !c.seen[r.XID]
		}
		switch {
		case strings.Contains(why, "the archive ends"):
			beyond++
			for _, r := range c.records[1] {
				if r.At >= c.counted.After && r.End <= c.res.Window.To {
					t.Errorf("seed %d: the archive goes on to %v, and rows were counted before %v", seed, c.res.Window.To, c.counted.After)
				}
			}
		case hidden: // the restored cluster is asked about what runs
			asked++
		case why != "":
			none++
			for _, r := range c.records[1] {
				if r.At >= c.res.Backup.Physical.Stop && r.At < c.counted.After && (c.at(r.At) || c.at(r.End)) {
					t.Errorf("seed %d: %s, and yet at %v it is as it was", seed, why, r.At)
				}
			}
		default:
			exact++
			if !c.at(from) || !c.at(to) || from > to || from < c.res.Backup.Physical.Stop {
				t.Errorf("seed %d: from %v to %v it is not as it was", seed, from, to)
			}
		}
	}
	t.Logf("%d exact, %d without a place, %d behind the archive, %d to be asked", exact, none, beyond, asked)
	if exact < 1000 || none < 30 || beyond == 0 || asked == 0 {
		t.Error("too little of it was drawn")
	}
}

// A target before the place is not gone beyond, and what cannot be compared says
// why.
func TestATargetBeforeRowsWereCounted(t *testing.T) {
	for seed := range uint64(300) {
		c := drawCounting(seed)
		reads := 0
		from, _, why, err := restore.Place(ctx, c.res, restore.Target{Kind: restore.Latest}, c.counted, c.scan(&reads))
		if why != "" || err != nil {
			continue
		}
		for _, r := range c.records[1] {
			if r.At < c.res.Backup.Physical.Stop {
				continue
			}
			res := c.res
			res.Stop = r
			_, _, why, err := restore.Place(ctx, res, restore.Target{Kind: restore.ToLSN, LSN: r.At}, c.counted, c.scan(&reads))
			if err != nil || (why == "") != (from <= r.At) {
				t.Errorf("seed %d: to %v, and rows were counted at %v: %q, %v", seed, r.At, from, why, err)
			}
		}
		if _, _, why, _ := restore.Place(ctx, c.res, restore.Target{Kind: restore.Immediate}, c.counted, c.scan(&reads)); why == "" {
			t.Errorf("seed %d: the end of the backup", seed)
		}
		res := c.res
		res.Backup.Physical = &repo.PhysicalFacts{Stop: c.res.Backup.Physical.Stop, StopTimeline: 2, SegmentSize: segment}
		if _, _, why, _ := restore.Place(ctx, res, restore.Target{Kind: restore.Latest}, c.counted, c.scan(&reads)); !strings.Contains(why, "timeline") {
			t.Errorf("seed %d: on another timeline: %q", seed, why)
		}
	}
}

// An idle server has begun the next segment, and written nothing into it: the
// archive that ends before has it all.
func TestAnIdleServerIsCountedAtTheEndOfTheArchive(t *testing.T) {
	c := drawCounting(1)
	c.records[1] = slices.DeleteFunc(c.records[1], func(r pg.WALRecord) bool { return r.At >= c.res.Backup.Physical.Stop })
	stop := c.res.Backup.Physical.Stop
	c.records[1] = append(c.records[1], pg.WALRecord{At: stop, End: stop + 24}) // the switch
	c.res.Window.To = stop + pg.LSN(segment) - (stop % pg.LSN(segment))
	c.counted.After, c.counted.Snapshot = c.res.Window.To+pg.PageHeaderSize, "90000000000:90000000000:"
	reads := 0
	if from, to, why, err := restore.Place(ctx, c.res, restore.Target{Kind: restore.Latest}, c.counted, c.scan(&reads)); from != stop || to < from || why != "" || err != nil {
		t.Errorf("from %v to %v: %q, %v", from, to, why, err)
	}
}

func TestPlacesThatOverlapAreOneHalt(t *testing.T) {
	var counted []cluster.Counted
	for _, name := range []string{"a", "b", "c", "d", "e"} {
		counted = append(counted, cluster.Counted{Database: name})
	}
	halts := restore.Together(counted, []pg.LSN{50, 10, 30, 20, 41}, []pg.LSN{60, 40, 35, 45, 49})
	var got []string
	for _, h := range halts {
		names := ""
		for _, c := range h.Counted {
			names += c.Database
		}
		got = append(got, fmt.Sprintf("%d %s", h.At, names))
	}
	if want := []string{"30 bdc", "41 e", "50 a"}; !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
