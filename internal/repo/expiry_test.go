package repo_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// marked is a repository with two backups, of which the second shares packs with
// the first; the first is marked, with a day of grace.
func marked(t *testing.T) (st *store.Mem, r *repo.Repo, first repo.Ref) {
	t.Helper()
	st = new(store.Mem)
	b := setup(t, st, true)
	r = b.open(t, b.operator)
	d := disk{"data/a": pages(1, 20), "data/b": pages(2, 300), label: []byte("x")}
	for n := range 2 {
		if _, _, err := take(r, d, n, n-1); err != nil {
			t.Fatal(err)
		}
		d["data/b"] = pages(3, 20)
	}
	first = repo.Ref{Cluster: "main", ID: backupID(0)}
	if err := r.Mark(ctx, first, now, 24*time.Hour, "older"); err != nil {
		t.Fatal(err)
	}
	return st, r, first
}

func ids(t *testing.T, r *repo.Repo) (ids []repo.ID) {
	t.Helper()
	list, err := r.Backups(ctx, "main")
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range list {
		ids = append(ids, b.ID)
	}
	return ids
}

func TestC9UndeleteWithinTheGrace(t *testing.T) {
	st, r, first := marked(t)
	before := len(objects(t, st))
	if got := ids(t, r); len(got) != 1 || got[0] == first.ID {
		t.Errorf("listed: %v", got)
	}
	if s, err := r.Sweep(ctx, "main", now.Add(23*time.Hour)); err != nil || s.Objects > 0 || len(objects(t, st)) != before {
		t.Errorf("within the grace %+v was swept, %v", s, err)
	}
	if err := r.Undelete(ctx, first); err != nil {
		t.Fatal(err)
	}
	if got := ids(t, r); len(got) != 2 {
		t.Errorf("listed: %v", got)
	}
	if err := verify(r, first); err != nil {
		t.Error(err)
	}
	if err := r.Undelete(ctx, first); !errors.Is(err, fail.NoBackup) {
		t.Errorf("undelete once more: %v", err)
	}
	if _, err := r.Delete(ctx, first, now); err != nil { // an old settlement says nothing about a new tombstone
		t.Fatal(err)
	}
	for key := range objects(t, st) {
		if strings.Contains(key, "/backups/"+string(first.ID)) {
			t.Errorf("left: %s", key)
		}
	}
}

// Whoever deletes one backup may have a clock that is a month ahead.
func TestC9DeletingOneLeavesOthersTheirGrace(t *testing.T) {
	_, r, first := marked(t)
	if _, err := r.Delete(ctx, repo.Ref{Cluster: "main", ID: backupID(1)}, now.Add(30*24*time.Hour)); err != nil {
		t.Fatal(err)
	}
	if err := r.Undelete(ctx, first); err != nil {
		t.Error(err)
	}
	if err := verify(r, first); err != nil {
		t.Error(err)
	}
}

func TestC9AfterTheGraceAllGoesThatNobodyNeeds(t *testing.T) {
	st, r, first := marked(t)
	s, err := r.Sweep(ctx, "main", now.Add(24*time.Hour))
	if err != nil || !slices.Equal(s.Backups, []repo.ID{first.ID}) || s.Objects == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	if err := r.Undelete(ctx, first); !errors.Is(err, fail.NoBackup) {
		t.Errorf("undelete: %v", err)
	}
	second := repo.Ref{Cluster: "main", ID: backupID(1)}
	if err := verify(r, second); err != nil { // it uses packs of the first
		t.Error(err)
	}
	if _, err := r.Delete(ctx, second, now); err != nil {
		t.Fatal(err)
	}
	for key := range objects(t, st) {
		if strings.HasPrefix(key, "clusters/main/") {
			t.Errorf("left: %s", key)
		}
	}
}

// Of a removal and an undelete that meet, one succeeds, whatever the moment, and
// a backup that is listed is whole.
func TestC9UndeleteMeetsRemoval(t *testing.T) {
	won := make(map[bool]int)
	for at := 1; ; at++ {
		st, r, first := marked(t)
		calls, back := 0, errors.New("never tried")
		meets := &fault.Store{Store: st, Before: func(op, key string) error {
			if calls++; calls == at {
				back = r.Undelete(ctx, first)
			}
			return nil
		}}
		if _, err := r.Through(meets).Sweep(ctx, "main", now.Add(48*time.Hour)); err != nil {
			t.Fatalf("at call %d: %v", at, err)
		}
		if calls < at {
			break
		}
		listed := slices.Contains(ids(t, r), first.ID)
		if listed != (back == nil) {
			t.Errorf("at call %d: undelete says %v, listed %v", at, back, listed)
		}
		if listed {
			if err := verify(r, first); err != nil {
				t.Errorf("at call %d: %v", at, err)
			}
		}
		won[listed]++
	}
	if won[true] == 0 || won[false] == 0 {
		t.Errorf("who won: %v, want both now and then", won)
	}
}

func TestAHeldBackupStays(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	r := b.open(t, b.operator)
	root, _ := tree(t)
	backUp(t, r, root)
	h, err := r.AddHold(ctx, ref, "for the auditors", "db1", now)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Delete(ctx, ref, now); !errors.Is(err, fail.Held) || !strings.Contains(err.Error(), "for the auditors") {
		t.Errorf("delete: %v", err)
	}
	put(t, b.st, "clusters/main/backups/"+string(ref.ID)+"/hold-00000000.json", []byte("broken")) // holds too
	if n, err := r.LiftHolds(ctx, ref, h.Name); n != 1 || err != nil {
		t.Errorf("lift: %d, %v", n, err)
	}
	if err := r.Mark(ctx, ref, now, time.Hour); !errors.Is(err, fail.Held) {
		t.Errorf("with a hold that cannot be read: %v", err)
	}
	if n, err := r.LiftHolds(ctx, ref, ""); n != 1 || err != nil {
		t.Errorf("lift: %d, %v", n, err)
	}
	if _, err := r.LiftHolds(ctx, ref, ""); !errors.Is(err, fail.NoBackup) {
		t.Errorf("lift none: %v", err)
	}
	if _, err := r.Delete(ctx, ref, now); err != nil {
		t.Error(err)
	}
	st, other, first := marked(t) // however it came there
	put(t, st, "clusters/main/backups/"+string(first.ID)+"/hold-00000000.json", []byte("broken"))
	if s, err := other.Sweep(ctx, "main", now.Add(48*time.Hour)); err != nil || s.Objects > 0 {
		t.Errorf("sweep of what is held: %+v, %v", s, err)
	}
	if _, err := r.AddHold(ctx, ref, "too late", "db1", now); !errors.Is(err, fail.NoBackup) {
		t.Errorf("hold what is gone: %v", err)
	}
}

// Of a hold and a deletion that meet, not both succeed.
func TestC9AHoldMeetsADeletion(t *testing.T) {
	for at := 1; ; at++ {
		st, r, first := marked(t)
		if err := r.Undelete(ctx, first); err != nil {
			t.Fatal(err)
		}
		calls, held := 0, errors.New("never tried")
		meets := &fault.Store{Store: st, Before: func(op, key string) error {
			if calls++; calls == at {
				_, held = r.AddHold(ctx, first, "meets it", "db1", now)
			}
			return nil
		}}
		err := r.Through(meets).Mark(ctx, first, now, time.Hour)
		if calls < at {
			break
		}
		listed := slices.Contains(ids(t, r), first.ID)
		if held == nil && !listed || err == nil && listed || held == nil && err == nil {
			t.Errorf("at call %d: mark %v, hold %v, listed %v", at, err, held, listed)
		}
	}
}

// A store that refuses deletions for now, as Object Lock does, is asked again by
// the next sweep; what is left meanwhile is hidden.
func TestALockedObjectIsTriedNextTime(t *testing.T) {
	for _, locked := range []string{"/packs/", "manifest.json", "/tree-", "deleted.json"} {
		st, r, first := marked(t)
		lock := &fault.Store{Store: st, Before: func(op, key string) error {
			if op == "delete" && strings.Contains(key, locked) {
				return fmt.Errorf("delete %s: AccessDenied: the object is locked: %w", key, fail.StoreDenied)
			}
			return nil
		}}
		s, err := r.Through(lock).Sweep(ctx, "main", now.Add(48*time.Hour))
		if err != nil || len(s.Refused) != 1 || s.Refused[0].ID != first.ID || !strings.Contains(s.Refused[0].Why, "locked") || len(s.Backups) > 0 {
			t.Errorf("%s locked: %+v, %v", locked, s, err)
		}
		if got := ids(t, r); len(got) != 1 {
			t.Errorf("%s locked: listed %v", locked, got)
		}
		if err := verify(r, repo.Ref{Cluster: "main", ID: backupID(1)}); err != nil {
			t.Error(err)
		}
		if s, err := r.Sweep(ctx, "main", now.Add(48*time.Hour)); err != nil || !slices.Equal(s.Backups, []repo.ID{first.ID}) {
			t.Errorf("%s not locked any more: %+v, %v", locked, s, err)
		}
	}
	st, r, first := marked(t)
	if err := r.Undelete(ctx, first); err != nil {
		t.Fatal(err)
	}
	lock := &fault.Store{Store: st, Before: func(op, key string) error {
		if op == "delete" && strings.Contains(key, "manifest") {
			return fail.StoreDenied
		}
		return nil
	}}
	if _, err := r.Through(lock).Delete(ctx, first, now); !errors.Is(err, fail.StoreDenied) {
		t.Errorf("delete of a locked backup: %v", err)
	}
}

func TestFloorsOnlyRise(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	r := b.open(t, b.operator)
	for i, step := range []struct {
		floors []repo.Floor
		number int
		want   []repo.Floor
	}{
		{[]repo.Floor{{1, 5 << 20}}, 1, []repo.Floor{{1, 5 << 20}}},
		{[]repo.Floor{{1, 5 << 20}}, 1, []repo.Floor{{1, 5 << 20}}},
		{[]repo.Floor{{1, 4 << 20}}, 2, []repo.Floor{{1, 5 << 20}}},
		{[]repo.Floor{{3, 1 << 20}, {1, 4 << 20}}, 3, []repo.Floor{{1, 5 << 20}, {3, 1 << 20}}},
		{[]repo.Floor{{1, 9 << 20}}, 4, []repo.Floor{{1, 9 << 20}, {3, 1 << 20}}},
	} {
		if _, err := r.RaiseFloors(ctx, archive, step.floors, now, 0); err != nil {
			t.Fatal(err)
		}
		e, err := r.Expiry(ctx, archive)
		if err != nil || e.Number != step.number || !slices.Equal(e.Floors, step.want) {
			t.Errorf("step %d: number %d, floors %v, %v; want %d, %v", i, e.Number, e.Floors, err, step.number, step.want)
		}
	}
	if n := len(objects(t, b.st)); n != 3 { // marker, and the last two
		t.Errorf("%d objects", n)
	}
}

// What goes was let go by each plan of a grace: neither a slip of the window that
// was put right, nor a second one, removes anything before.
func TestC9OnlyWhatEachPlanOfAGraceLetGoIsFree(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	r := b.open(t, b.operator)
	for n := pg.LSN(1); n <= 9; n++ {
		text, err := pg.SegmentName(1, n<<20, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		name, err := pg.ParseWALName(text)
		if err != nil {
			t.Fatal(err)
		}
		if err := putWAL(r, name, make([]byte, 1<<20)); err != nil {
			t.Fatal(err)
		}
	}
	const day, grace = 24 * time.Hour, 7 * 24 * time.Hour
	for _, step := range []struct {
		day, floor pg.LSN
		left       int
	}{
		{0, 3, 9}, {1, 8, 9}, {2, 4, 9}, // the slip of day 1 was put right
		{6, 4, 9}, {7, 4, 7}, {8, 4, 6}, {9, 9, 6}, // and another on day 9
		{10, 5, 6}, {15, 5, 6}, {16, 5, 5}, {17, 5, 5}, {30, 5, 5},
	} {
		at := now.Add(time.Duration(step.day) * day)
		if _, err := r.RaiseFloors(ctx, archive, []repo.Floor{{1, step.floor << 20}}, at, grace); err != nil {
			t.Fatal(err)
		}
		if _, err := r.RemoveWAL(ctx, archive, 1<<20, at.Add(-grace), func(n pg.WALName) bool { return false }); err != nil {
			t.Fatal(err)
		}
		left := 0
		for _, err := range r.ListWAL(ctx, archive, 1, pg.WALName{}) {
			if err != nil {
				t.Fatal(err)
			}
			left++
		}
		if left != step.left {
			t.Errorf("on day %d %d segments are left, want %d", step.day, left, step.left)
		}
	}
	if n := len(objects(t, b.st)); n != 1+5+3 { // marker, segments, what counts of the expiries
		t.Errorf("%d objects", n)
	}
}

// An attempt that was marked can be brought back, and goes on with what it pinned.
func TestC9WhatAMarkedAttemptPinsStaysForItsGrace(t *testing.T) {
	_, r, first := marked(t)
	attempt := repo.Ref{Cluster: "main", ID: backupID(2)}
	if err := r.Undelete(ctx, first); err != nil {
		t.Fatal(err)
	}
	if _, err := r.WriteIntent(ctx, repo.Intent{Ref: attempt, Kind: repo.Physical, Pins: []repo.ID{first.ID}}, func() time.Time { return now }); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(r.Mark(ctx, attempt, now, 24*time.Hour), r.Mark(ctx, first, now, 0)); err != nil {
		t.Fatal(err)
	}
	if s, err := r.Sweep(ctx, "main", now.Add(23*time.Hour)); err != nil || s.Objects > 0 {
		t.Errorf("within the grace: %+v, %v", s, err)
	}
	if s, err := r.Sweep(ctx, "main", now.Add(24*time.Hour)); err != nil || len(s.Backups) != 2 {
		t.Errorf("after it: %+v, %v", s, err)
	}
}
