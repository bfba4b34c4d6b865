package restore_test

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

var targets = flag.Int("targets", 6, "restore to `NUMBER` random targets")

// A line is a record of the log as pg_waldump shows it.
type line struct {
	at   pg.LSN
	kind string // "COMMIT", "ABORT", "RESTORE_POINT" or another
	xid  uint32 // that ended
	time time.Time
	name string
}

var (
	dumped   = regexp.MustCompile(`^rmgr: (\S+) .*, tx: +(\d+), lsn: (\S+), prev \S+, desc: (\S+) ?(.*)$`)
	dumpedAt = regexp.MustCompile(`(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+) UTC`)
)

// dump reads the log of a timeline, from segment first to last, with PostgreSQL's
// own program, from a server's pg_wal.
func dump(t testing.TB, p *lab.Postgres, first, last string) (lines []line) {
	t.Helper()
	cmd := p.Command(t.Context(), "pg_waldump", "-p", filepath.Join(p.DataDir, "pg_wal"), first, last)
	cmd.Env = append(cmd.Env, "TZ=UTC")
	out, _ := cmd.Output() // the log may end within the last segment, which it takes for an error
	for text := range strings.Lines(string(out)) {
		m := dumped.FindStringSubmatch(strings.TrimSpace(text))
		if m == nil {
			t.Fatalf("pg_waldump says %q", text)
		}
		xid, xerr := strconv.ParseUint(m[2], 10, 32)
		at, err := pg.ParseLSN(m[3])
		if err := errors.Join(xerr, err); err != nil {
			t.Fatal(err)
		}
		l := line{at: at, kind: m[4], xid: uint32(xid)}
		if kind, ok := strings.CutSuffix(m[4], "_PREPARED"); ok && m[1] == "Transaction" {
			number, _, _ := strings.Cut(m[5], ":")
			xid, err := strconv.ParseUint(number, 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			l.kind, l.xid = kind, uint32(xid)
		}
		if m[1] == "XLOG" && l.kind == "RESTORE_POINT" {
			l.name = m[5]
		}
		if l.kind == "COMMIT" || l.kind == "ABORT" {
			if l.time, err = time.Parse("2006-01-02 15:04:05", dumpedAt.FindStringSubmatch(m[5])[1]); err != nil {
				t.Fatal(err)
			}
		}
		lines = append(lines, l)
	}
	if len(lines) == 0 {
		t.Fatal("pg_waldump shows nothing")
	}
	return lines
}

// A story is a site with a history: rows and backups on timeline 1, a server
// that was restored to a moment in the past, took over and wrote timeline 2, and
// one that went on with timeline 1 all the same.
type story struct {
	*site
	ways map[pg.Timeline][]line           // the whole log on the way to each timeline
	row  map[pg.Timeline]map[uint32]int32 // which row a transaction wrote there: numbers are given twice
	from pg.LSN                           // the end of the first backup
}

func tell(t testing.TB) *story {
	s := &story{site: newSite(t), ways: map[pg.Timeline][]line{}, row: map[pg.Timeline]map[uint32]int32{}}
	first := query[string](t, s.pg, "SELECT pg_walfile_name(pg_current_wal_lsn())")
	for range 3 {
		s.rows(25)
		s.take()
		s.rows(25)
	}
	fork := query[string](t, s.pg, "SELECT pg_create_restore_point('fork')::text")
	s.rows(20)
	s.row[1] = s.written()
	lastOfOne := s.archived()
	s.ways[1] = dump(t, s.pg, first, lastOfOne)

	old := s.pg
	p := s.physical("successor", restore.Target{Kind: restore.ToName, Name: "fork"})
	p.Takeover = true
	s.restored(p)
	more := s.archiving()
	more["hot_standby"] = "on"
	successor, err := s.start(p, more)
	if err != nil {
		t.Fatal(err)
	}
	s.pg = successor
	t.Cleanup(func() { s.pg.Stop() })
	s.until("the successor opens", func() bool { return !query[bool](t, s.pg, "SELECT pg_is_in_recovery()") })
	s.exec("SELECT pg_create_restore_point('after the fork')")
	s.seq += 1000
	s.rows(25)
	s.take()
	s.rows(25)
	s.row[2] = s.written()
	forkedAt, err := pg.ParseLSN(fork)
	if err != nil {
		t.Fatal(err)
	}
	lastOfTwo := s.archived()
	begun, err := pg.SegmentName(2, forkedAt, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	two := dump(t, s.pg, begun, lastOfTwo)
	for _, l := range s.ways[1] {
		if l.at < two[0].at {
			s.ways[2] = append(s.ways[2], l)
		}
	}
	s.ways[2] = append(s.ways[2], two...)
	if err := old.Exec(t.Context(), "postgres", "SELECT 1"); err != nil {
		t.Fatal(err)
	}
	backups, err := s.repo.Backups(t.Context(), "main")
	if err != nil || len(backups) != 4 {
		t.Fatal(len(backups), err)
	}
	s.from = backups[0].Physical.Stop
	return s
}

func (s *site) until(what string, ok func() bool) {
	s.t.Helper()
	for deadline := time.Now().Add(time.Minute); !ok(); <-time.After(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			s.t.Fatalf("waited a minute for: %s", what)
		}
	}
}

// written is which transaction wrote which row. Rows written in subtransactions
// end with their parent, whose number is the one before.
func (s *site) written() map[uint32]int32 {
	s.t.Helper()
	conn, err := s.pg.Connect(s.t.Context(), "postgres")
	if err != nil {
		s.t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(s.t.Context()))
	rows, err := conn.Query(s.t.Context(), "SELECT xmin::text::bigint, seq FROM ledger")
	if err != nil {
		s.t.Fatal(err)
	}
	defer rows.Close()
	all := map[uint32]int32{}
	for rows.Next() {
		var xid int64
		var seq int32
		if err := rows.Scan(&xid, &seq); err != nil {
			s.t.Fatal(err)
		}
		if seq%10 == 3 {
			xid-- // see rows
		}
		all[uint32(xid)] = seq
	}
	if err := rows.Err(); err != nil {
		s.t.Fatal(err)
	}
	return all
}

// expect is what a target implies by PostgreSQL's documentation of
// recovery_target_*: the rows whose transactions committed before the log was
// left. It is false if nothing in the log makes recovery stop there.
func (s *story) expect(t restore.Target, timeline pg.Timeline) (rows []int32, ok bool) {
	rows = []int32{}
	for _, l := range s.ways[timeline] {
		end := l.kind == "COMMIT" || l.kind == "ABORT"
		before, after := false, false
		switch t.Kind {
		case restore.ToTime:
			before = end && (l.time.After(t.Time) || t.Exclusive && l.time.Equal(t.Time))
		case restore.ToLSN:
			before, after = t.Exclusive && l.at >= t.LSN, l.at >= t.LSN
		case restore.ToXID:
			before, after = t.Exclusive && end && l.xid == t.XID, end && l.xid == t.XID
		case restore.ToName:
			after = l.kind == "RESTORE_POINT" && l.name == t.Name
		}
		if before {
			ok = true
			break
		}
		if seq, wrote := s.row[timeline][l.xid]; wrote && l.kind == "COMMIT" {
			rows = append(rows, seq)
		}
		if after {
			ok = true
			break
		}
	}
	slices.Sort(rows)
	return rows, ok || t.Kind == restore.Latest
}

// draw makes a target that can be reached.
func (s *story) draw(rnd *rand.Rand) (restore.Target, pg.Timeline) {
	for {
		timeline := pg.Timeline(1 + rnd.IntN(2))
		t := restore.Target{Timeline: restore.TargetTimeline(timeline), Exclusive: rnd.IntN(2) == 0}
		if timeline == 2 && rnd.IntN(2) == 0 {
			t.Timeline = restore.LatestTimeline
		}
		way := s.ways[timeline]
		l := way[rnd.IntN(len(way))]
		kind := rnd.IntN(10)
		for i := rnd.IntN(len(way)); kind >= 2 && kind <= 5 && l.time.IsZero(); i = (i + 1) % len(way) {
			l = way[i]
		}
		switch kind {
		case 0, 1:
			t.Kind, t.LSN = restore.ToLSN, l.at+pg.LSN(rnd.IntN(3)*8)
		case 2, 3:
			t.Kind, t.XID = restore.ToXID, l.xid
		case 4, 5:
			t.Kind, t.Time = restore.ToTime, l.time.Add(time.Duration(rnd.IntN(3)-1)*time.Microsecond)
		case 6, 7:
			t.Kind, t.Name, t.Exclusive = restore.ToName, l.name, false
			for i := rnd.IntN(len(way)); t.Name == ""; i = (i + 1) % len(way) {
				t.Name = way[i].name
			}
			for _, x := range way {
				if x.name == t.Name {
					l = x
				}
			}
		case 8:
			t.Kind, t.Exclusive, t.Timeline = restore.Immediate, false, restore.CurrentTimeline
			return t, 2 // of the newest backup
		default:
			t.Kind, t.Exclusive = restore.Latest, false
			return t, timeline
		}
		if _, ok := s.expect(t, timeline); !ok || l.at < s.from+0x200 {
			continue
		}
		return t, timeline
	}
}

// P28, P31: whatever the target, the restored rows are those that it implies.
func TestEveryTargetIsExact(t *testing.T) {
	s := tell(t)
	rnd := rand.New(rand.NewPCG(uint64(*targets), 7))
	kinds := map[restore.TargetKind]int{}
	began := time.Now()
	for i := range *targets {
		target, timeline := s.draw(rnd)
		want, _ := s.expect(target, timeline)
		kinds[target.Kind]++
		s.exact(fmt.Sprintf("t%d", i), target, timeline, want)
		if t.Failed() {
			break
		}
	}
	t.Logf("%d targets in %v: %v", *targets, time.Since(began), kinds)
}

// exact restores to a target, and compares the rows.
func (s *story) exact(name string, target restore.Target, timeline pg.Timeline, want []int32) {
	s.t.Helper()
	p := s.physical(name, target)
	defer os.RemoveAll(filepath.Dir(p.Dir))
	plan, err := p.Plan(s.t.Context())
	if err != nil {
		s.t.Errorf("%+v: %v; %s", target, err, fail.HintOf(err))
		return
	}
	if _, err := p.Run(s.t.Context(), plan); err != nil {
		s.t.Errorf("%+v: %v", target, err)
		return
	}
	server, err := s.start(p, nil)
	if err != nil {
		s.t.Errorf("%+v: %v", target, err)
		return
	}
	defer server.Kill()
	if target.Kind == restore.Immediate {
		want = s.atEndOf(plan.Backup, timeline)
	}
	if diff := cmp.Diff(want, seqs(s.t, server)); diff != "" {
		s.t.Errorf("%+v along %v from %s:\n%s", target, timeline, plan.Backup.ID, diff)
	}
	if plan.Last != nil { // what the plan says of it
		i := slices.IndexFunc(s.ways[timeline], func(l line) bool { return l.at == plan.Last.LSN })
		if i < 0 || s.ways[timeline][i].kind != "COMMIT" || s.ways[timeline][i].xid != plan.Last.XID || !s.ways[timeline][i].time.Equal(plan.Last.Time) {
			s.t.Errorf("%+v: the plan says that the last commit is %+v", target, plan.Last)
		} else if seq, ok := s.row[timeline][plan.Last.XID]; ok && !slices.Contains(want, seq) {
			s.t.Errorf("%+v: the plan says that the last commit is that of row %d", target, seq)
		}
	}
}

// atEndOf are the rows that were committed when a backup ended.
func (s *story) atEndOf(b repo.Ref, timeline pg.Timeline) []int32 {
	s.t.Helper()
	m, err := s.repo.Backup(s.t.Context(), b)
	if err != nil {
		s.t.Fatal(err)
	}
	rows := []int32{}
	for _, l := range s.ways[timeline] {
		if seq, wrote := s.row[timeline][l.xid]; wrote && l.kind == "COMMIT" && l.at < m.Physical.Stop {
			rows = append(rows, seq)
		}
	}
	slices.Sort(rows)
	return rows
}

// P28: what cannot be reached is refused before anything is written.
func TestWhatCannotBeReachedIsRefusedBeforeAnythingIsWritten(t *testing.T) {
	s := tell(t)
	way := s.ways[1]
	var first, last time.Time
	for _, l := range way {
		if l.kind == "COMMIT" && l.at > s.from && first.IsZero() {
			first = l.time
		}
		if !l.time.IsZero() {
			last = l.time
		}
	}
	for what, tt := range map[string]struct {
		target restore.Target
		want   fail.Kind
	}{
		"a time before the first backup":     {restore.Target{Kind: restore.ToTime, Time: first.Add(-time.Hour)}, fail.Unreachable},
		"a time after the end":               {restore.Target{Kind: restore.ToTime, Time: last.Add(time.Hour)}, fail.Unreachable},
		"the time of the last transaction":   {restore.Target{Kind: restore.ToTime, Time: last, Timeline: 1}, fail.Unreachable},
		"a position before the first backup": {restore.Target{Kind: restore.ToLSN, LSN: s.from - 1}, fail.Unreachable},
		"a position behind the end":          {restore.Target{Kind: restore.ToLSN, LSN: way[len(way)-1].at + 1<<30}, fail.Unreachable},
		"a transaction before the backup":    {restore.Target{Kind: restore.ToXID, XID: 700}, fail.Unreachable},
		"a transaction to come":              {restore.Target{Kind: restore.ToXID, XID: 1 << 30}, fail.Unreachable},
		"a name that nobody gave":            {restore.Target{Kind: restore.ToName, Name: "nobody"}, fail.Unreachable},
		"a name on the other timeline":       {restore.Target{Kind: restore.ToName, Name: "after the fork", Timeline: 1}, fail.Unreachable},
		"a timeline that is not there":       {restore.Target{Kind: restore.Latest, Timeline: 7}, fail.Unreachable},
	} {
		p := s.physical("refused", tt.target)
		_, err := p.Plan(t.Context())
		if !errors.Is(err, tt.want) || fail.HintOf(err) == "" {
			t.Errorf("%s: %v", what, err)
		}
		if _, err := os.Lstat(p.Dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %s is there (%v)", what, p.Dir, err)
		}
	}
}
