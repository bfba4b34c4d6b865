package retention_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
)

var today = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// taken is a logical backup of so many days ago.
func taken(days int, change ...func(*repo.Record)) repo.Record {
	at := today.Add(-time.Duration(days)*day - time.Hour)
	var b repo.Record
	b.Manifest = repo.Manifest{Ref: repo.Ref{Cluster: "main", ID: repo.NewID(at, fmt.Sprintf("%08x", days))}, Kind: repo.Logical, System: 7, StartedAt: at, FinishedAt: at.Add(time.Minute)}
	for _, f := range change {
		f(&b)
	}
	return b
}

// shown is a plan as the names of days, with the reasons.
func shown(p retention.Plan) (lines []string) {
	for _, v := range p.Backups {
		word := "go"
		if v.Keep {
			word = "keep"
		}
		lines = append(lines, fmt.Sprintf("%s %s: %s", v.ID.Time().Format("01-02"), word, strings.Join(v.Reasons, ", ")))
	}
	return lines
}

func TestReasons(t *testing.T) {
	held := func(b *repo.Record) { b.Holds = []repo.Hold{{Reason: "audit"}} }
	tested := func(passed bool) func(*repo.Record) {
		return func(b *repo.Record) { b.Proof = &repo.Proof{Passed: passed} }
	}
	system := func(n int) func(*repo.Record) { return func(b *repo.Record) { b.System = pg.SystemID(n) } }
	begun := func(pins ...repo.ID) func(*repo.Record) {
		return func(b *repo.Record) {
			b.Manifest = repo.Manifest{Ref: b.Ref}
			b.Unfinished, b.Intent = true, repo.Intent{Kind: repo.Logical, Pins: pins}
		}
	}
	for name, c := range map[string]struct {
		policy  retention.Policy
		backups []repo.Record
		want    []string
	}{
		"window, days, weeks": {retention.Policy{Window: 2 * day, Daily: 3, Weekly: 2, Min: 1},
			[]repo.Record{taken(9), taken(8), taken(7), taken(3), taken(2), taken(1), taken(0)},
			[]string{"11-13 go: older than the rules ask for", "11-14 go: older than the rules ask for", "11-15 keep: weekly 2026-W46", "11-19 go: older than the rules ask for",
				"11-20 keep: daily 2026-11-20", "11-21 keep: window, daily 2026-11-21", "11-22 keep: newest, window, daily 2026-11-22, weekly 2026-W47"}},
		"days without a backup do not count": {retention.Policy{Daily: 2},
			[]repo.Record{taken(11), taken(10), taken(5), taken(0)},
			[]string{"11-11 go: older than the rules ask for", "11-12 go: older than the rules ask for", "11-17 keep: daily 2026-11-17", "11-22 keep: newest, daily 2026-11-22"}},
		"what failed its test counts for nothing": {retention.Policy{Daily: 1},
			[]repo.Record{taken(4, tested(true)), taken(3), taken(2, tested(false)), taken(1), taken(0, tested(false))},
			[]string{"11-18 keep: last proven", "11-19 go: older than the rules ask for", "11-20 go: failed its restore test", "11-21 keep: newest, daily 2026-11-21", "11-22 keep: no good one after it"}},
		"where none is good, none goes": {retention.Policy{Daily: 1},
			[]repo.Record{taken(2, tested(false)), taken(1, tested(false)), taken(0, tested(false))},
			[]string{"11-20 keep: no backup of this kind is good", "11-21 keep: no backup of this kind is good", "11-22 keep: no backup of this kind is good"}},
		"holds": {retention.Policy{Daily: 1}, []repo.Record{taken(2, held), taken(1), taken(0)},
			[]string{"11-20 keep: hold: audit", "11-21 go: older than the rules ask for", "11-22 keep: newest, daily 2026-11-22"}},
		"both systems on the day of an upgrade": {retention.Policy{Daily: 1},
			[]repo.Record{taken(1, system(9)), taken(0, system(9)), taken(0, system(3), func(b *repo.Record) { b.ID = repo.NewID(today, "ffffffff") })},
			[]string{"11-21 go: older than the rules ask for", "11-22 keep: daily 2026-11-22", "11-22 keep: newest, daily 2026-11-22"}},
		"in progress, and given up": {retention.Policy{Daily: 1}, []repo.Record{taken(30, begun()), taken(20, begun()), taken(3), taken(2), taken(1, begun(taken(3).ID)), taken(0)},
			[]string{"10-23 go: never finished", "11-02 keep: in progress", "11-19 keep: needed by " + string(taken(1).ID) + ", in progress", "11-20 go: older than the rules ask for", "11-21 keep: in progress", "11-22 keep: newest, daily 2026-11-22"}},
		"nothing configured": {retention.Policy{Min: 2, Grace: day}, []repo.Record{taken(99), taken(0)},
			[]string{"08-15 keep: no retention is configured, min 2", "11-22 keep: no retention is configured, newest"}},
	} {
		p := retention.Decide(c.policy, retention.Facts{Cluster: "main", Backups: c.backups, Now: today})
		if diff := cmp.Diff(c.want, shown(p)); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		if err := p.Err(0); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestRefusals(t *testing.T) {
	month := func(n int) (all []repo.Record) {
		for days := n; days >= 0; days-- {
			all = append(all, taken(days))
		}
		return all
	}
	broken := month(5)
	broken[2] = repo.Record{Listed: repo.Listed{Manifest: repo.Manifest{Ref: broken[2].Ref}, Err: fail.Untrusted}}
	for name, c := range map[string]struct {
		backups []repo.Record
		now     time.Time
		confirm int
		says    string // "": it may be done
	}{
		"three at once are few":            {month(3), today, 0, ""},
		"many want their number":           {month(30), today, 0, "30 of 31 backups would go at once"},
		"another number is none":           {month(30), today, 29, "30 of 31 backups would go at once"},
		"the number":                       {month(30), today, 30, ""},
		"the number, and a run was cut":    {month(22), today, 30, ""},
		"a manifest that cannot be read":   {broken, today, 0, "cannot be read"},
		"a clock behind":                   {month(3), today.Add(-2 * time.Hour), 0, "a clock is wrong"},
		"a clock a little behind":          {month(3), today.Add(-time.Hour), 0, ""},
		"a clock ahead, or no new backups": {month(3), today.Add(4 * day), 0, "not taken any more"},
		"as seldom as ever":                {[]repo.Record{taken(60), taken(30), taken(0)}, today.Add(40 * day), 0, ""},
	} {
		p := retention.Decide(retention.Policy{Daily: 1}, retention.Facts{Cluster: "main", Backups: c.backups, Now: c.now})
		err := p.Err(c.confirm)
		if c.says == "" && err != nil || c.says != "" && (!errors.Is(err, fail.ExpireRefused) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v, want %q", name, err, c.says)
		}
	}
}

// A newer pgkeep may bring back what this one cannot read.
func TestC9LogOfAMarkedBackupThatCannotBeReadStays(t *testing.T) {
	a := repo.Archive{Cluster: "main", System: 7, Major: 15}
	l := audit.Ledger{Archive: a, SegmentSize: size, Timelines: []audit.Timeline{{ID: 1, Ranges: []audit.Range{{From: 1 << 20, To: 99 << 20, Last: today}}}}}
	b := taken(0, func(b *repo.Record) {
		first, _ := pg.SegmentName(1, 50<<20, size)
		b.Kind, b.Version = repo.Physical, 150000
		b.Physical = &repo.PhysicalFacts{Start: 50<<20 + 100, Stop: 51<<20 - 100, Timeline: 1, StopTimeline: 1, StoppedAt: b.FinishedAt, FirstWAL: first, LastWAL: first, SegmentSize: size}
	})
	gone := repo.Record{Listed: repo.Listed{Manifest: repo.Manifest{Ref: taken(5).Ref}, Err: fail.Corrupt}, Deleted: new(repo.Tombstone)}
	for n, backups := range map[int][]repo.Record{49: {b}, 0: {gone, b}} {
		p := retention.Decide(retention.Policy{Daily: 1}, retention.Facts{Cluster: "main", Backups: backups, Archives: []audit.Ledger{l}, Now: today})
		if len(p.WAL) != 1 || p.WAL[0].Segments != n || len(p.Against) > 0 {
			t.Errorf("%d backups: %+v, %v", len(backups), p.WAL, p.Against)
		}
	}
}
