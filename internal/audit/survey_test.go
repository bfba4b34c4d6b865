package audit_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// An archive is that of one cluster in memory, on a host that opens no data.
type archive struct {
	t  *testing.T
	st *counted
	r  *repo.Repo
	a  repo.Archive
}

// A counted store counts the objects that its lists have shown.
type counted struct {
	store.Store
	listed int
	got    atomic.Int64        // objects of which something was read
	before func(prefix string) // nil: nothing
}

func (c *counted) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		if c.before != nil {
			c.before(prefix)
		}
		for o, err := range c.Store.List(ctx, prefix, after) {
			c.listed++
			if !yield(o, err) {
				return
			}
		}
	}
}

func (c *counted) Get(ctx context.Context, key string, part store.Range) (io.ReadCloser, error) {
	c.got.Add(1)
	return c.Store.Get(ctx, key, part)
}

func newArchive(t *testing.T) *archive {
	t.Helper()
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	operator, _ := age.GenerateX25519Identity()
	access := repo.Access{Encrypted: true, Signer: signer, Version: "test"}
	access.Metadata, _ = age.GenerateX25519Identity()
	b := &archive{t: t, st: &counted{Store: new(store.Mem)}, a: repo.Archive{Cluster: "main", System: 7_300_000_000_000_000_001, Major: 15}}
	if b.r, _, err = repo.Init(t.Context(), b.st, access, []string{operator.Recipient().String()}, epoch); err != nil {
		t.Fatal(err)
	}
	return b
}

// put archives a file as it should be, of segments of 1 MiB.
func (b *archive) put(name string, content []byte) {
	b.t.Helper()
	n, err := pg.ParseWALName(name)
	if err == nil {
		_, err = b.r.Archiver(b.a, "").Put(b.t.Context(), repo.WALFile{Name: n, Size: int64(len(content)), Content: bytes.NewReader(content)})
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// fake puts something under the key of a file: a list shows no difference.
func (b *archive) fake(names ...string) {
	b.t.Helper()
	for _, name := range names {
		err := b.st.Put(b.t.Context(), b.key(name), strings.NewReader("x"), store.PutOptions{IfAbsent: true})
		if err != nil && !errors.Is(err, store.ErrExist) {
			b.t.Fatal(err)
		}
	}
}

func (b *archive) key(name string) string {
	return "clusters/main/wal/7300000000000000001-15/" + name[:8] + "/" + name + ".zst"
}

func (b *archive) survey(known audit.Ledger) (audit.Ledger, []audit.Odd) {
	b.t.Helper()
	l, odd, err := audit.Survey(b.t.Context(), b.r, b.a, known)
	if err := errors.Join(err, odd.Bad); err != nil {
		b.t.Fatal(err)
	}
	return l, odd.Told
}

// What a survey that knows an earlier one finds is what one finds that lists
// everything.
func TestSurveyOfWhatIsNew(t *testing.T) {
	b := newArchive(t)
	for n := range 8 {
		b.put(spot{1, n}.name().String(), make([]byte, segment))
	}
	b.put("00000002.history", []byte("1\t0/4A0B0C0\tno recovery target specified\n"))
	rnd := rand.New(rand.NewPCG(1, 0))
	var known audit.Ledger
	for round := range 8 {
		for range 700 { // in long ranges with holes, which later rounds may fill
			tl, n := rnd.IntN(3)+1, rnd.IntN(3000)
			if n >= 8 && n%1500 != round+8 {
				b.fake(spot{pg.Timeline(tl), n}.name().String())
			}
		}
		if known.SegmentSize > 0 { // the oldest are deleted
			if err := b.st.Delete(t.Context(), b.key(spot{1, round - 1}.name().String())); err != nil {
				t.Fatal(err)
			}
		}
		for n := range 1400 {
			b.fake(spot{1, round*1400 + n + round}.name().String())
		}
		b.st.listed = 0
		all, _ := b.survey(audit.Ledger{})
		whole := b.st.listed
		b.st.listed = 0
		some, _ := b.survey(known)
		if round > 0 && b.st.listed > whole/2+2000 {
			t.Errorf("round %d: %d objects were listed, where %d are all", round, b.st.listed, whole)
		}
		for _, l := range []audit.Ledger{all, some} { // the first of a range may be one that is deleted, and then its bytes are an estimate
			for _, tl := range l.Timelines {
				for i := range tl.Ranges {
					tl.Ranges[i].First, tl.Ranges[i].Bytes = tl.Ranges[i].Last, 0
				}
			}
		}
		if d := cmp.Diff(all, some); d != "" {
			t.Fatalf("round %d (-all +new):\n%s", round, d)
		}
		text, err := json.Marshal(all) // as Temporal hands it from one run to the next
		if err != nil {
			t.Fatal(err)
		}
		known = audit.Ledger{}
		if err := json.Unmarshal(text, &known); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(all, known); d != "" {
			t.Fatalf("through JSON:\n%s", d)
		}
	}
}

func TestOddObjectsAreTold(t *testing.T) {
	b := newArchive(t)
	b.put("000000010000000000000001", make([]byte, segment))
	for key, content := range map[string]string{
		b.key("000000010000000000000002"):                                                "",
		b.key("000000010000000000000003") + ".bak":                                       "x",
		b.key("00000001FFFFFFFF00000FFF"):                                                "x",
		b.key("000000010000000000001000"):                                                "x",
		"clusters/main/wal/7300000000000000001-15/00000002/000000010000000000000004.zst": "x",
	} {
		if err := b.st.Put(t.Context(), key, strings.NewReader(content), store.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	l, odd := b.survey(audit.Ledger{})
	if len(odd) != 5 || len(l.Timelines) != 1 || len(l.Timelines[0].Ranges) != 1 || l.Timelines[0].Ranges[0].To != 0x200000 {
		t.Errorf("%+v, odd: %+v", l, odd)
	}
}

// A damaged object is missing, and nothing but that: the rest is audited.
func TestC3ADamagedObjectEndsNoAudit(t *testing.T) {
	b := newArchive(t)
	b.fake("000000010000000000000001", "000000010000000000000002") // x: no header
	b.put("000000010000000000000003", make([]byte, segment))
	b.fake("000000010000000000000005", "00000002.history", "00000003.history", "000000030000000000000006")
	var known audit.Ledger
	for range 2 { // another survey finds the same
		l, odd, err := audit.Survey(t.Context(), b.r, b.a, known)
		if err != nil || !errors.Is(odd.Bad, fail.Corrupt) {
			t.Fatalf("who plans by it does not hear of it: %v, %v", odd.Bad, err)
		}
		if r := l.Timelines[0].Ranges; odd.Count != 4 || l.SegmentSize != segment || len(r) != 2 || r[0].From != 0x300000 {
			t.Fatalf("%+v, odd: %+v", l, odd)
		}
		var got []string
		for _, h := range l.Holes([]audit.Base{{Timeline: 1, Start: 0x200000, Stop: 0x300010}}) {
			got = append(got, h.First)
		}
		if want := "000000010000000000000002 000000010000000000000004 00000002.history 00000003.history"; strings.Join(got, " ") != want {
			t.Errorf("missing: %q, want %q", got, want)
		}
		all, err := audit.Take(t.Context(), b.r, "main", []audit.Report{{Ledger: known}}, time.Now().Add(time.Hour))
		if err != nil || len(all) != 1 || len(all[0].Odd) != 4 || !errors.Is(audit.Err("main", all), fail.WALHole) {
			t.Errorf("%+v, %v", all, err)
		}
		known = l
	}
}

// However many are damaged, what is behind them is there, and not all are read.
func TestC3ManyDamagedObjectsEndNoAudit(t *testing.T) {
	b := newArchive(t)
	for n := range 2000 {
		b.fake(spot{1, n}.name().String())
	}
	for n := range 150 {
		b.fake(pg.HistoryName(pg.Timeline(n + 2)).String())
	}
	b.st.got.Store(0)
	l, odd, err := audit.Survey(t.Context(), b.r, b.a, audit.Ledger{})
	if !errors.Is(err, fail.Corrupt) || !errors.Is(odd.Bad, fail.Corrupt) || len(l.Timelines) > 0 && len(l.Timelines[0].Ranges) > 0 || !strings.Contains(err.Error(), "of no archived segment") {
		t.Errorf("where nothing can be read: %d odd, %v", odd.Count, err)
	}
	if _, err := audit.Take(t.Context(), b.r, "main", nil, time.Now()); !errors.Is(err, fail.Corrupt) {
		t.Errorf("an audit of it: %v", err)
	}
	b.st.got.Store(0)
	b.put(spot{1, 2047}.name().String(), make([]byte, segment)) // 1999 is the last before it that is damaged
	l, odd, err = audit.Survey(t.Context(), b.r, b.a, audit.Ledger{})
	if err != nil || !errors.Is(odd.Bad, fail.Corrupt) || len(odd.Told) != 100 || odd.Count < 250 || l.SegmentSize != segment {
		t.Fatalf("segments of %d, %d odd, %d told, %v, %v", l.SegmentSize, odd.Count, len(odd.Told), odd.Bad, err)
	}
	if n := b.st.got.Load(); n > 300 {
		t.Errorf("%d objects were read", n)
	}
	r := l.Timelines[0].Ranges
	if last := r[len(r)-1]; last.From != 2047<<20 || last.To != 2048<<20 {
		t.Errorf("the last range is %+v", last)
	}
	if lost := l.Timelines[100]; lost.Lost.IsZero() || lost.LostKey == "" {
		t.Errorf("timeline %d is not said to be lost", lost.ID)
	}
}

func TestTake(t *testing.T) {
	b := newArchive(t)
	ctx := context.Background()
	if all, err := audit.Take(ctx, b.r, "main", nil, time.Now()); err != nil || len(all) != 0 || audit.Err("main", all) != nil {
		t.Errorf("of nothing: %+v, %v", all, err)
	}
	b.put("000000010000000000000001", make([]byte, segment))
	b.a.Major = 16 // upgraded
	b.put("000000010000000000000007", make([]byte, segment))
	b.a.Major = 15
	b.fake("000000010000000000000003", "000000010000000000000003.00000028.backup", "000000010000000000000004.partial")
	for _, tt := range []struct {
		after time.Duration
		holes int
	}{{0, 0}, {audit.Grace - time.Second, 0}, {audit.Grace + 10*time.Second, 1}} {
		all, err := audit.Take(ctx, b.r, "main", nil, time.Now().Add(tt.after))
		if err != nil || len(all) != 2 || len(all[0].Holes) != tt.holes || len(all[1].Holes) != 0 {
			t.Errorf("%v later: %+v, %v", tt.after, all, err)
		}
		err = audit.Err("main", all)
		if errors.Is(err, fail.WALHole) != (tt.holes > 0) {
			t.Errorf("%v later: %v", tt.after, err)
		}
		if err != nil && err.Error() != "cluster main: 1 WAL file is missing from the archive: 000000010000000000000002: wal-hole" {
			t.Errorf("it says %q", err)
		}
	}
}

// A history that nobody archived is missing once a later one names its timeline.
func TestC3AHistoryThatALaterOneNamesIsMissing(t *testing.T) {
	forks := []pg.Fork{{Timeline: 1, At: 0x300000}, {Timeline: 2, At: 0x500000}}
	base := func(t pg.Timeline, start pg.LSN) audit.Base {
		return audit.Base{Timeline: t, Start: start, Stop: start + 1}
	}
	for what, tt := range map[string]struct {
		oldest, latest spot
		second         bool // its history is there
		bases          []audit.Base
		want           string
	}{
		"missing":                          {spot{1, 2}, spot{3, 5}, false, nil, "00000002.history"},
		"needed by a base":                 {spot{1, 2}, spot{3, 5}, false, []audit.Base{base(1, 0x200000)}, "00000002.history"},
		"needed by none":                   {spot{3, 4}, spot{3, 5}, false, []audit.Base{base(3, 0x500000)}, ""},
		"there":                            {spot{1, 2}, spot{3, 5}, true, nil, ""},
		"older than the archive":           {spot{2, 4}, spot{3, 5}, false, nil, ""},
		"nothing archived on its timeline": {spot{1, 2}, spot{1, 2}, false, nil, "00000002.history"},
	} {
		l := audit.Ledger{SegmentSize: segment}
		for _, s := range []spot{tt.oldest, tt.latest} {
			if err := l.Add(s.name(), epoch); err != nil {
				t.Fatal(err)
			}
		}
		if tt.second {
			l.AddHistory(2, forks[:1], epoch)
		}
		l.AddHistory(3, forks, epoch.Add(time.Hour))
		got := ""
		for _, h := range l.Holes(tt.bases) {
			if strings.HasSuffix(h.First, ".history") {
				got += h.First
				if h.Count != 1 || h.Timeline != 2 || !h.Since.Equal(epoch.Add(time.Hour)) {
					t.Errorf("%s: %+v", what, h)
				}
			}
		}
		if got != tt.want {
			t.Errorf("%s: %q is missing, want %q", what, got, tt.want)
		}
	}
	l := audit.Ledger{} // no segment, so their size is not known
	l.AddHistory(2, forks[:1], epoch)
	l.AddHistory(4, append(forks[:2:2], pg.Fork{Timeline: 3, At: 0x600000}), epoch)
	if holes := l.Holes([]audit.Base{base(1, 0x200000)}); len(holes) != 1 || holes[0].First != "00000003.history" {
		t.Errorf("of histories alone: %+v", holes)
	}
}

// Where nothing but histories was archived, or all else was let go, nothing can
// be reached; asking so was a division by zero.
func TestHistoriesAlone(t *testing.T) {
	b := newArchive(t)
	b.put("00000002.history", []byte("1\t0/1800000\tno recovery target specified\n"))
	l, odd := b.survey(audit.Ledger{})
	base := audit.Base{Timeline: 1, Start: 0x1000100, Stop: 0x1100000}
	if _, ok := l.Reach(base, 2); ok || len(odd) > 0 || !l.On(base, 2) || l.Frontier(2) != 0 {
		t.Errorf("reach %v, odd %v, on the way %v, frontier %v", ok, odd, l.On(base, 2), l.Frontier(2))
	}
}

// What was let go is no hole, unless a backup needs it itself; and no earlier
// ledger makes it there.
func TestC9WhatWasLetGoIsNoHole(t *testing.T) {
	b := newArchive(t)
	var names []string
	for n := range pg.LSN(2000) {
		name, err := pg.SegmentName(1, (n+1)<<20, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	b.put(names[0], make([]byte, 1<<20)) // of the first that is there the size is read
	b.put(names[4], make([]byte, 1<<20))
	b.fake(append(slices.Clone(names[1:4]), names[5:]...)...)
	before, _ := b.survey(audit.Ledger{})
	old := audit.Base{ID: "old", Timeline: 1, Start: 5<<20 + 100, Stop: 8<<20 - 100, Finished: epoch}
	newer := audit.Base{ID: "newer", Timeline: 1, Start: 1001<<20 + 100, Stop: 1003<<20 - 100, Finished: epoch}
	if _, err := b.r.RaiseFloors(t.Context(), b.a, []repo.Floor{{Timeline: 1, From: 1000 << 20}}, epoch, 0); err != nil {
		t.Fatal(err)
	}
	needed := func(n pg.WALName) bool {
		at, err := n.Start(1 << 20)
		return err != nil || at>>20 == 5 || at>>20 == 6 // 7 is lost
	}
	if done, err := b.r.RemoveWAL(t.Context(), b.a, 1<<20, epoch, needed); err != nil || done.Objects != 997 {
		t.Fatalf("%+v, %v", done, err)
	}
	l, _ := b.survey(before)
	if rs := l.Timelines[0].Ranges; len(rs) != 2 || rs[0].From != 5<<20 || rs[0].To != 7<<20 || rs[1].From != 1000<<20 {
		t.Errorf("ranges are %+v", rs)
	}
	holes := l.Holes([]audit.Base{old, newer})
	if len(holes) != 1 || holes[0].String() != names[6] {
		t.Errorf("holes are %v, want %s alone", holes, names[6])
	}
	if w, stuck := l.Windows([]audit.Base{newer}); len(w) != 1 || len(stuck) > 0 {
		t.Errorf("windows %v, stuck %v", w, stuck)
	}
}

// What is let go while an archive is listed is no hole of it.
func TestSurveyMeetsAnExpiry(t *testing.T) {
	b := newArchive(t)
	for n := range 6 {
		b.put(spot{1, n}.name().String(), make([]byte, segment))
	}
	floor := pg.LSN(4 * segment)
	once := false
	b.st.before = func(prefix string) {
		if once || strings.Contains(prefix, "/expired/") {
			return
		}
		once = true
		if _, err := b.r.RaiseFloors(t.Context(), b.a, []repo.Floor{{Timeline: 1, From: floor}}, epoch, 0); err != nil {
			t.Fatal(err)
		}
	}
	if l, _ := b.survey(audit.Ledger{}); !once || l.Timelines[0].Floor != floor {
		t.Errorf("%+v", l)
	}
}
