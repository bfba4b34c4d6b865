package wal_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// An archive is a repository with some files, and how often it was opened.
type archive struct {
	store.Store
	opened int
	fails  func(attempt int) error // instead of opening
}

func archived(t *testing.T, names ...string) *archive {
	t.Helper()
	a := &archive{Store: new(store.Mem)}
	r := archiveIn(t, a.Store)
	for _, name := range names {
		if err := push(t, r, name, content(t, name)); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// fetcher is one for a data directory. It tries for a minute.
func (a *archive) fetcher(t *testing.T, dir string) wal.Fetcher {
	return wal.Fetcher{Cluster: "main", DataDir: dir, HoleGrace: 30 * time.Second, Place: "here",
		Open: func(ctx context.Context) (*repo.Repo, error) {
			a.opened++
			if a.fails != nil {
				if err := a.fails(a.opened); err != nil {
					return nil, err
				}
			}
			return repo.Open(ctx, a.Store, access(t))
		}}
}

// fetch is what PostgreSQL does. It returns how long it took.
func fetch(t *testing.T, f wal.Fetcher, name string) (time.Duration, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	start := time.Now()
	path := filepath.Join(f.DataDir, "pg_wal", "RECOVERYXLOG")
	os.Remove(path)
	err := f.Fetch(ctx, name, path)
	got, rerr := os.ReadFile(path)
	switch {
	case err == nil && !bytes.Equal(got, content(t, name)):
		t.Errorf("%s: wrong content delivered (%v)", name, rerr)
	case err != nil && rerr == nil:
		t.Errorf("%s: %v, and something was delivered", name, err)
	}
	return time.Since(start), err
}

func TestWhatMayPassIsTriedUntilTimeIsUp(t *testing.T) {
	for _, k := range append(fail.Kinds(), "broken") {
		synctest.Test(t, func(t *testing.T) {
			a := archived(t, seg+"42")
			a.fails = func(int) error { return fmt.Errorf("open: %w", k) }
			if k == fail.Unknown {
				a.fails = func(int) error { return errors.New("something") }
			}
			took, err := fetch(t, a.fetcher(t, serverDir(t)), seg+"42")
			if k == fail.BadConfig {
				if a.opened != 1 || took > 0 || !errors.Is(err, k) {
					t.Errorf("%q: %v after %d attempts", k, err, a.opened)
				}
				return
			}
			if a.opened < 15 || a.opened > 40 || took < 50*time.Second || took > time.Minute || errors.Is(err, wal.ErrAbsent) || k != "" && !errors.Is(err, k) {
				t.Errorf("%q: %v after %d attempts in %v", k, err, a.opened, took)
			}
		})
	}
}

func TestWhatPassesIsForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := archived(t, seg+"42")
		a.fails = func(attempt int) error {
			return map[int]error{1: fail.StoreDown, 2: fail.StoreDenied, 3: fail.NoKey, 4: fail.Corrupt}[attempt]
		}
		if took, err := fetch(t, a.fetcher(t, serverDir(t)), seg+"42"); err != nil || took > 2*time.Second {
			t.Errorf("after %v: %v", took, err)
		}
		a.opened = 0
		if took, err := fetch(t, a.fetcher(t, serverDir(t)), seg+"43"); !errors.Is(err, wal.ErrAbsent) || took > 2*time.Second {
			t.Errorf("after %v: %v, want absence", took, err)
		}
	})
}

func TestAbsenceIsNotTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := archived(t, seg+"42")
		for _, name := range []string{seg + "43", "00000002.history"} {
			a.opened = 0
			if took, err := fetch(t, a.fetcher(t, serverDir(t)), name); !errors.Is(err, wal.ErrAbsent) || a.opened != 1 || took > 0 {
				t.Errorf("%s: %v after %d attempts", name, err, a.opened)
			}
		}
	})
}

// The deadline cuts the last attempt off: what came before tells more.
func TestTheErrorIsTheTellingOne(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := archived(t, seg+"42")
		f := a.fetcher(t, serverDir(t))
		open := f.Open
		a.fails = func(int) error { return fail.NoKey }
		f.Open = func(ctx context.Context) (*repo.Repo, error) {
			if a.opened < 3 {
				return open(ctx)
			}
			<-ctx.Done()
			return nil, fmt.Errorf("%w: %w", fail.StoreDown, ctx.Err())
		}
		if _, err := fetch(t, f, seg+"42"); !errors.Is(err, fail.NoKey) {
			t.Error(err)
		}
	})
}

func TestAHoleIsWaitedFor(t *testing.T) {
	for _, tt := range []struct {
		filled, grace time.Duration // when it is filled; 0: never
		least, most   time.Duration
	}{
		{0, 0, 0, 0},
		{0, 30 * time.Second, 30 * time.Second, 35 * time.Second},
		{0, time.Hour, 50 * time.Second, time.Minute},
		{12 * time.Second, 30 * time.Second, 12 * time.Second, 17 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			a := archived(t, seg+"41", seg+"43", seg+"44", seg+"45")
			f := a.fetcher(t, serverDir(t))
			f.HoleGrace = tt.grace
			start := time.Now()
			if tt.filled > 0 {
				filled := false
				a.fails = func(int) error {
					if time.Since(start) > tt.filled && !filled {
						filled = true
						return push(t, archiveIn(t, a.Store), seg+"42", content(t, seg+"42"))
					}
					return nil
				}
			}
			took, err := fetch(t, f, seg+"42")
			if took < tt.least || took > tt.most {
				t.Errorf("%+v: took %v", tt, took)
			}
			if tt.filled > 0 {
				if err != nil {
					t.Errorf("%+v: %v", tt, err)
				}
				return
			}
			if !errors.Is(err, fail.Corrupt) || errors.Is(err, wal.ErrAbsent) {
				t.Errorf("%+v: %v", tt, err)
			}
			for _, name := range []string{seg + "42", seg + "43", seg + "45"} { // missing, next, newest
				if !strings.Contains(err.Error(), name) {
					t.Errorf("%v: does not name %s", err, name)
				}
			}
		})
	}
}

// A standby asks again and opens for nobody. Only of the store's silence may it
// hear "not there": whatever somebody must see to stops it.
func TestAStandbyIsToldToAskAgainOnlyWhenTheStoreIsSilent(t *testing.T) {
	for _, signal := range []string{"standby.signal", "recovery.signal"} {
		for _, k := range append(fail.Kinds(), "silence") {
			synctest.Test(t, func(t *testing.T) {
				dir := serverDir(t)
				if err := os.WriteFile(filepath.Join(dir, signal), nil, 0o600); err != nil {
					t.Fatal(err)
				}
				a := archived(t, seg+"42")
				f := a.fetcher(t, dir)
				a.fails = func(int) error { return k }
				if k == "silence" {
					f.Open = func(ctx context.Context) (*repo.Repo, error) { <-ctx.Done(); return nil, ctx.Err() }
				}
				for name, answer := range map[string]error{
					seg + "42":                 wal.ErrLater,
					"00000002.history":         wal.ErrWait, // else a promotion would take its number
					seg + "42.00000028.backup": nil,
				} {
					_, err := fetch(t, f, name)
					silent := signal == "standby.signal" && slices.Contains([]fail.Kind{fail.StoreDown, "silence"}, k)
					for _, e := range []error{wal.ErrLater, wal.ErrWait} {
						if got := errors.Is(err, e); got != (silent && e == answer) || err == nil || errors.Is(err, wal.ErrAbsent) {
							t.Errorf("%s, %q: %s: %v", signal, k, name, err)
						}
					}
				}
			})
		}
	}
}

// A hole that was proved is told of, whatever becomes of the store while it is
// waited for: nothing that may pass for the end of the log.
func TestC4AHoleIsNotForgottenInAnOutage(t *testing.T) {
	for _, k := range []error{fail.StoreDown, context.DeadlineExceeded, fmt.Errorf("%w: %w", fail.StoreDown, context.DeadlineExceeded)} {
		synctest.Test(t, func(t *testing.T) {
			dir := serverDir(t)
			if err := os.WriteFile(filepath.Join(dir, "standby.signal"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
			a := archived(t, seg+"41", seg+"43")
			a.fails = func(attempt int) error {
				if attempt < 3 {
					return nil
				}
				return k
			}
			if took, err := fetch(t, a.fetcher(t, dir), seg+"42"); !errors.Is(err, fail.Corrupt) || errors.Is(err, wal.ErrLater) {
				t.Errorf("%v, after %v: %v", k, took, err)
			}
			a.opened, a.fails = 0, func(attempt int) error {
				if attempt != 1 {
					return nil
				}
				return k
			}
			if _, err := fetch(t, a.fetcher(t, dir), seg+"42"); !errors.Is(err, fail.Corrupt) || errors.Is(err, wal.ErrLater) {
				t.Errorf("%v, and then the hole: %v", k, err)
			}
		})
	}
}

func TestWhatACrashLeftInPgWalIsRemoved(t *testing.T) {
	dir := serverDir(t)
	stale, fresh, other := filepath.Join(dir, "pg_wal", ".pgkeep-tmp-A"), filepath.Join(dir, "pg_wal", ".pgkeep-tmp-B"), filepath.Join(dir, "pg_wal", "xlogtemp.1")
	for _, name := range []string{stale, fresh, other} {
		if err := os.WriteFile(name, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	long := time.Now().Add(-time.Hour)
	for _, name := range []string{stale, other} {
		if err := os.Chtimes(name, long, long); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := fetch(t, archived(t, seg+"42").fetcher(t, dir), seg+"42"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]bool{stale: false, fresh: true, other: true} {
		if _, err := os.Stat(name); (err == nil) != want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A segment that retention let go was written, and is missing for good: that is
// neither the end of the log nor a hole to wait for.
func TestC9WhatWasLetGoIsNotTheEndOfTheLog(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := archived(t, seg+"41", seg+"42", seg+"45")
		r, err := repo.Open(ctx, a.Store, access(t))
		if err != nil {
			t.Fatal(err)
		}
		archives, err := r.Archives(ctx, "main")
		if err != nil || len(archives) != 1 {
			t.Fatal(archives, err)
		}
		if _, err := r.RaiseFloors(ctx, archives[0], []repo.Floor{{Timeline: 1, From: 0x45 << 20}}, time.Now(), 0); err != nil {
			t.Fatal(err)
		}
		for name, want := range map[string]error{"42": nil, "43": fail.Unreachable, "45": nil, "46": wal.ErrAbsent} {
			took, err := fetch(t, a.fetcher(t, serverDir(t)), seg+name)
			if !errors.Is(err, want) || took > 5*time.Second {
				t.Errorf("%s: %v after %v, want %v at once", name, err, took, want)
			}
		}
	})
}

// Who judges an archive need not hear a minute long that a file is damaged, or
// gone. All that may pass, or be filled in, is waited for all the same.
func TestWhoJudgesHearsOfDamageAtOnce(t *testing.T) {
	for name, c := range map[string]struct {
		fails func(int) error
		ask   string
		soon  bool
	}{
		"damaged":                 {func(int) error { return fail.With(fail.Corrupt, errors.New("flipped")) }, "41", true},
		"of somebody else":        {func(int) error { return fail.With(fail.Untrusted, errors.New("who?")) }, "41", true},
		"gone since":              {nil, "42", true},
		"a hole behind the end":   {nil, "44", false},
		"the store is down":       {func(int) error { return fmt.Errorf("%w", fail.StoreDown) }, "41", false},
		"access is denied":        {func(int) error { return fmt.Errorf("%w", fail.StoreDenied) }, "41", false},
		"damaged, now and then":   {func(n int) error { return fmt.Errorf("%w", []fail.Kind{fail.Corrupt, fail.StoreDown}[n%2]) }, "41", false},
		"damaged in one reading":  {func(n int) error { return map[bool]error{true: fmt.Errorf("%w", fail.Corrupt)}[n == 1] }, "41", true},
		"not whole when archived": {func(int) error { return fmt.Errorf("%w", fail.Unsupported) }, "41", true},
	} {
		synctest.Test(t, func(t *testing.T) {
			a := archived(t, seg+"41", seg+"43", seg+"45")
			a.fails = c.fails
			f := a.fetcher(t, serverDir(t))
			f.Judge, f.Expect = true, mustName(t, seg+"43")
			took, err := fetch(t, f, seg+c.ask)
			if (took < time.Second) != c.soon || (err == nil) != (name == "damaged in one reading") {
				t.Errorf("%s: %v after %v", name, err, took)
			}
			f.Judge = false
			if took, err := fetch(t, f, seg+c.ask); err != nil && took < 29*time.Second {
				t.Errorf("%s: a recovery gave up after %v: %v", name, took, err)
			}
		})
	}
}

func mustName(t *testing.T, s string) pg.WALName {
	t.Helper()
	n, err := pg.ParseWALName(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// damage changes the last byte of a file in the archive.
func (a *archive) damage(t *testing.T, name string) {
	t.Helper()
	for o, err := range a.List(ctx, "clusters/main/wal/", "") {
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasSuffix(o.Key, "/"+name+".zst") {
			continue
		}
		in, err := a.Get(ctx, o.Key, store.Range{})
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(in)
		if err := errors.Join(err, in.Close()); err != nil {
			t.Fatal(err)
		}
		b[len(b)-3] ^= 1
		if err := errors.Join(a.Delete(ctx, o.Key), a.Put(ctx, o.Key, bytes.NewReader(b), store.PutOptions{})); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatalf("no %s is archived", name)
}

// A server that recovers along timeline 2 asked for the segment in which timeline 1
// was left, got it, for timeline 1 had gone on, and opened with what timeline 2 had
// undone.
func TestWhatAnOlderTimelineWroteAfterItWasLeftIsAbsent(t *testing.T) {
	const history = "00000002.history" // timeline 1 was left in segment 4A
	synctest.Test(t, func(t *testing.T) {
		a := archived(t, seg+"49", seg+"4A", seg+"4B", history)
		f := a.fetcher(t, serverDir(t))
		for timeline, want := range map[pg.Timeline]error{0: nil, 1: nil, 2: wal.ErrAbsent} {
			f.Timeline = timeline
			if _, err := fetch(t, f, seg+"49"); err != nil {
				t.Errorf("along timeline %d: before the fork: %v", timeline, err)
			}
			for _, name := range []string{seg + "4A", seg + "4B"} {
				if took, err := fetch(t, f, name); !errors.Is(err, want) || took > 0 {
					t.Errorf("along timeline %d: %s: %v after %v, want %v", timeline, name, err, took, want)
				}
			}
		}
		f.Timeline = 2
		a.damage(t, history)
		if _, err := fetch(t, f, seg+"4A"); !errors.Is(err, fail.Corrupt) || errors.Is(err, wal.ErrAbsent) {
			t.Errorf("with a damaged history: %v", err)
		}
		kept := filepath.Join(f.DataDir, "pg_wal", history)
		if err := os.WriteFile(kept, content(t, history), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := fetch(t, f, seg+"4A"); !errors.Is(err, wal.ErrAbsent) {
			t.Errorf("with a damaged history that PostgreSQL had got before: %v", err)
		}
		f.Expect, _ = pg.ParseWALName("00000002000000000000004B")
		if _, err := fetch(t, f, seg+"4A"); !errors.Is(err, fail.Corrupt) || errors.Is(err, wal.ErrAbsent) {
			t.Errorf("where timeline 2 had a segment when the restore was planned: %v", err)
		}
	})
}

// A server that opens at the end of timeline 1 asks which numbers are taken. One
// flipped bit in the history of timeline 2 kept it from that.
func TestADamagedHistoryStillTakesItsNumber(t *testing.T) {
	const history = "00000002.history"
	synctest.Test(t, func(t *testing.T) {
		a := archived(t, seg+"49", history)
		a.damage(t, history)
		f := a.fetcher(t, serverDir(t))
		path := filepath.Join(f.DataDir, "pg_wal", "RECOVERYHISTORY")
		ask := func() error {
			os.Remove(path)
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			return f.Fetch(ctx, history, path)
		}
		for _, timeline := range []pg.Timeline{0, 2, 3} { // whoever may read it
			f.Timeline = timeline
			if err := ask(); !errors.Is(err, fail.Corrupt) {
				t.Errorf("along timeline %d: %v", timeline, err)
			}
		}
		f.Timeline = 1
		if err := ask(); err != nil {
			t.Errorf("along timeline 1: %v", err)
		}
		if b, err := os.ReadFile(path); err != nil || !strings.HasPrefix(string(b), "damaged: ") {
			t.Errorf("it holds %q (%v); PostgreSQL must not be able to read it", b, err)
		}
		if err := os.WriteFile(filepath.Join(f.DataDir, "standby.signal"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := ask(); !errors.Is(err, fail.Corrupt) {
			t.Errorf("a standby, which may follow it: %v", err)
		}
	})
}
