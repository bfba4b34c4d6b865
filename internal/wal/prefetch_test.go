package wal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// segments names count segments from the one with the last two digits first.
func segments(t *testing.T, tli, first, count int) (names []string) {
	t.Helper()
	for i := range count {
		name, err := pg.SegmentName(pg.Timeline(tli), pg.LSN((first+i)<<20), server.SegmentSize)
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, name)
	}
	return names
}

// shelf returns the segments that are ready, and "+" for one that is on its way.
func shelf(t *testing.T, dir string) (ready []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(dir, "pg_wal/pgkeep/prefetch"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, e := range entries {
		segment, _, ok := strings.Cut(e.Name(), "-")
		switch {
		case ok:
			ready = append(ready, segment)
		case strings.HasSuffix(e.Name(), ".part"):
			ready = append(ready, "+")
		}
	}
	return ready
}

func wantShelf(t *testing.T, dir string, want ...string) {
	t.Helper()
	if got := shelf(t, dir); strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("ready: %v, want %v", got, want)
	}
}

// A recovery is a server that asks, and what fetches ahead for it. It lives in
// a synctest bubble.
type recovery struct {
	wal.Fetcher
	*archive
	running, started atomic.Int32
}

func (a *archive) recovery(t *testing.T, dir string, n int) *recovery {
	r := &recovery{archive: a, Fetcher: a.fetcher(t, dir)}
	r.Ahead = n
	helper := r.Fetcher
	helper.Open = func(ctx context.Context) (*repo.Repo, error) { return repo.Open(ctx, a.Store, access(t)) } // not counted
	r.Spawn = func() {
		r.running.Add(1)
		r.started.Add(1)
		go func() {
			helper.Prefetch(context.Background())
			r.running.Add(-1)
		}()
	}
	return r
}

// fetch wants a segment, from the shelf or from the archive.
func (r *recovery) fetch(t *testing.T, name string, ahead bool) {
	t.Helper()
	r.opened = 0
	if _, err := fetch(t, r.Fetcher, name); err != nil {
		t.Errorf("%s: %v", name, err)
	}
	if (r.opened == 0) != ahead {
		t.Errorf("%s: the repository was opened %d times", name, r.opened)
	}
}

// settle lets time pass that is short for a server and long for a fetch.
func settle() { time.Sleep(2 * time.Second) }

func TestTheNextSegmentsAreReady(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := segments(t, 1, 0x42, 12)
		dir := serverDir(t)
		r := archived(t, s...).recovery(t, dir, 3)
		r.fetch(t, s[0], false)
		for i := range 8 {
			settle()
			wantShelf(t, dir, s[i+1:i+4]...)
			r.fetch(t, s[i+1], true)
		}
		r.fetch(t, s[9], true) // they need not be asked for slowly
		r.fetch(t, s[10], true)
		if r.started.Load() != 1 {
			t.Errorf("%d processes were started", r.started.Load())
		}
		settle()
		wantShelf(t, dir, s[11])
		r.fetch(t, s[11], true)
		settle()
		if r.running.Load() > 0 {
			t.Error("nothing is left to fetch, and it runs on")
		}
		if _, err := fetch(t, r.Fetcher, seg+"4E"); !errors.Is(err, wal.ErrAbsent) {
			t.Errorf("the end of the log: %v", err)
		}
	})
}

func TestNobodyAsksAnyMore(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := segments(t, 1, 0x42, 9)
		dir := serverDir(t)
		r := archived(t, s...).recovery(t, dir, 4)
		r.fetch(t, s[0], false)
		time.Sleep(29 * time.Second)
		wantShelf(t, dir, s[1:5]...)
		time.Sleep(2 * time.Second)
		wantShelf(t, dir)
		if r.running.Load() > 0 {
			t.Error("it runs on")
		}
		r.fetch(t, s[1], false)
		settle()
		wantShelf(t, dir, s[2:6]...)
		time.Sleep(time.Minute)
	})
}

func TestATimelineSwitchIsFollowed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one, two := segments(t, 1, 0x42, 9), segments(t, 2, 0x44, 9)
		dir := serverDir(t)
		r := archived(t, append(one, append(two, "00000002.history")...)...).recovery(t, dir, 3)
		r.fetch(t, one[0], false)
		settle()
		r.fetch(t, one[1], true)
		r.fetch(t, "00000002.history", false)
		r.fetch(t, two[0], false)
		settle()
		wantShelf(t, dir, two[1:4]...)
		r.fetch(t, two[1], true)
		if r.started.Load() != 1 {
			t.Errorf("%d processes were started", r.started.Load())
		}
		time.Sleep(time.Minute)
	})
}

// What is ready is a private matter of one data directory, one life of it, and
// one configuration.
func TestNobodyElseUsesWhatIsReady(t *testing.T) {
	for what, change := range map[string]func(t *testing.T, r *recovery){
		"another repository": func(t *testing.T, r *recovery) { r.Place = "there" },
		"another cluster": func(t *testing.T, r *recovery) {
			p := wal.Pusher{Cluster: "other", DataDir: serverDir(t), Connect: archiver(archiveIn(t, r.Store))}
			if err := p.Push(ctx, write(t, seg+"43", content(t, seg+"43"))); err != nil {
				t.Fatal(err)
			}
			r.Cluster = "other"
		},
		"a copy": func(t *testing.T, r *recovery) {
			r.DataDir = copyTree(t, r.DataDir, filepath.Join(t.TempDir(), "copy"))
		},
		"restored in place": func(t *testing.T, r *recovery) {
			if err := os.Remove(filepath.Join(r.DataDir, "pg_wal/pgkeep/instance")); err != nil {
				t.Fatal(err)
			}
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := segments(t, 1, 0x42, 9)
			r := archived(t, s...).recovery(t, serverDir(t), 3)
			r.fetch(t, s[0], false)
			settle()
			wantShelf(t, r.DataDir, s[1:4]...)
			change(t, r)
			r.fetch(t, s[1], false)
			settle()
			if r.running.Load() > 0 && strings.HasPrefix(what, "another") { // what fetches ahead is still for the first
				t.Errorf("%s: it runs on", what)
			}
			time.Sleep(time.Minute)
		})
	}
}

func write(t *testing.T, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// Whatever stands on the shelf, right bytes are delivered.
func TestWhatIsReadyIsVerifiedWhenItIsUsed(t *testing.T) {
	flip := func(at int) func([]byte) []byte { return func(b []byte) []byte { b[at] ^= 1; return b } }
	for what, damage := range map[string]func([]byte) []byte{
		"a bit of the first page": flip(40),
		"a bit in the middle":     flip(1 << 19),
		"the last bit":            flip(1<<20 - 1),
		"cut":                     func(b []byte) []byte { return b[:1<<19] },
		"nothing":                 func(b []byte) []byte { return nil },
		"longer":                  func(b []byte) []byte { return append(b, 0) },
		"zeroes":                  func(b []byte) []byte { return make([]byte, len(b)) },
		"another segment":         func([]byte) []byte { return content(t, seg+"44") },
	} {
		synctest.Test(t, func(t *testing.T) {
			s := segments(t, 1, 0x42, 9)
			dir := serverDir(t)
			r := archived(t, s...).recovery(t, dir, 3)
			r.fetch(t, s[0], false)
			settle()
			found, err := filepath.Glob(filepath.Join(dir, "pg_wal/pgkeep/prefetch", s[1]+"-*"))
			if err != nil || len(found) != 1 {
				t.Fatalf("%s: %q, %v", what, found, err)
			}
			b, err := os.ReadFile(found[0])
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(found[0], damage(b), 0o600); err != nil {
				t.Fatal(err)
			}
			r.fetch(t, s[1], false)
			r.fetch(t, s[2], true)
			time.Sleep(time.Minute)
		})
	}
}

func TestALabelAloneProvesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := segments(t, 1, 0x42, 9)
		dir := serverDir(t)
		r := archived(t, s...).recovery(t, dir, 3)
		r.fetch(t, s[0], false)
		settle()
		found, _ := filepath.Glob(filepath.Join(dir, "pg_wal/pgkeep/prefetch/*-*"))
		// The file of the second under the name of the first, hash and all.
		if err := os.Rename(found[1], strings.Replace(found[1], s[2], s[1], 1)); err != nil {
			t.Fatal(err)
		}
		if err := os.Remove(found[0]); err != nil {
			t.Fatal(err)
		}
		r.fetch(t, s[1], false)
		time.Sleep(time.Minute)
	})
}

// A gate holds back the reading of one object.
type gate struct {
	store.Store
	name string
	open chan struct{}
}

func (g *gate) Get(ctx context.Context, key string, part store.Range) (io.ReadCloser, error) {
	if path.Base(key) == g.name+".zst" {
		select {
		case <-g.open:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return g.Store.Get(ctx, key, part)
}

func TestASegmentThatIsOnItsWayIsNotFetchedTwice(t *testing.T) {
	for _, comes := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			s := segments(t, 1, 0x42, 9)
			dir := serverDir(t)
			a := archived(t, s...)
			plain := a.Store
			g := &gate{plain, s[1], make(chan struct{})}
			a.Store = g
			r := a.recovery(t, dir, 3)
			r.fetch(t, s[0], false)
			settle()
			wantShelf(t, dir, "+", s[2], s[3])
			start := time.Now()
			if comes {
				time.AfterFunc(3*time.Second, func() { close(g.open) })
			} else { // it hangs; a connection of one's own does not
				r.Fetcher.Open = func(ctx context.Context) (*repo.Repo, error) {
					r.opened++
					return repo.Open(ctx, plain, access(t))
				}
			}
			r.fetch(t, s[1], comes)
			if took := time.Since(start); took < 2*time.Second || took > 11*time.Second {
				t.Errorf("it took %v", took)
			}
			r.fetch(t, s[2], true)
			time.Sleep(time.Minute)
			if r.running.Load() > 0 {
				t.Error("it runs on")
			}
			wantShelf(t, dir)
		})
	}
}

// Absence and all other trouble are for Fetch to find.
func TestTroubleAheadIsLeftToFetch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := segments(t, 1, 0x42, 6)
		dir := serverDir(t)
		r := archived(t, s[0], s[1], s[3], s[4]).recovery(t, dir, 4)
		r.HoleGrace = 0
		r.fetch(t, s[0], false)
		settle()
		r.fetch(t, s[1], true)
		if _, err := fetch(t, r.Fetcher, s[2]); err == nil || errors.Is(err, wal.ErrAbsent) {
			t.Errorf("a hole: %v", err)
		}
		time.Sleep(time.Minute)
		if r.running.Load() > 0 {
			t.Error("it runs on")
		}
		wantShelf(t, dir)
	})
}

func TestADataDirectoryThatIsGone(t *testing.T) {
	for what, vanish := range map[string]func(dir string) error{
		"removed": os.RemoveAll,
		"renamed": func(dir string) error { return os.Rename(dir, dir+".old") },
	} {
		synctest.Test(t, func(t *testing.T) {
			s := segments(t, 1, 0x42, 6)
			dir := serverDir(t)
			r := archived(t, s...).recovery(t, dir, 4)
			r.fetch(t, s[0], false)
			settle()
			if err := vanish(dir); err != nil {
				t.Fatal(err)
			}
			settle()
			if r.running.Load() > 0 {
				t.Errorf("%s: it runs on", what)
			}
			os.Rename(dir+".old", dir)
			wantShelf(t, dir)
		})
	}
}

func TestOneFetchesAhead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := segments(t, 1, 0x42, 6)
		r := archived(t, s...).recovery(t, serverDir(t), 4)
		r.fetch(t, s[0], false)
		settle()
		start := time.Now()
		if err := r.Prefetch(ctx); err != nil || time.Since(start) > time.Second {
			t.Errorf("the second: %v after %v", err, time.Since(start))
		}
		if r.running.Load() != 1 {
			t.Errorf("%d run", r.running.Load())
		}
		time.Sleep(time.Minute)
	})
}

// What one who was killed had begun to fetch stands in nobody's way.
func TestAPartOfADeadProcessIsSwept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := segments(t, 1, 0x42, 6)
		dir := serverDir(t)
		r := archived(t, s...).recovery(t, dir, 3)
		shelf := filepath.Join(dir, "pg_wal/pgkeep/prefetch")
		if err := errors.Join(os.MkdirAll(shelf, 0o700), os.WriteFile(filepath.Join(shelf, s[1]+".part"), []byte("half"), 0o600)); err != nil {
			t.Fatal(err)
		}
		r.fetch(t, s[0], false)
		settle()
		wantShelf(t, dir, s[1:4]...)
		r.fetch(t, s[1], true)
		time.Sleep(time.Minute)
	})
}

// Nothing that stands in the way of fetching ahead stands in the way of fetch.
func TestFetchNeedsNoShelf(t *testing.T) {
	dir := t.TempDir()
	makeServer(t, dir)
	if err := os.WriteFile(filepath.Join(dir, "pg_wal/pgkeep"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f := archived(t, seg+"42").fetcher(t, dir)
	var once sync.Once
	f.Ahead, f.Spawn = 8, func() { once.Do(func() { t.Error("somebody fetches ahead") }) }
	if _, err := fetch(t, f, seg+"42"); err != nil {
		t.Error(err)
	}
	elsewhere := t.TempDir()
	makeServer(t, elsewhere)
	f.DataDir = elsewhere
	if err := f.Fetch(ctx, seg+"42", filepath.Join(dir, "x")); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(elsewhere, "pg_wal/pgkeep")); err == nil {
		t.Error(fmt.Errorf("a fetch to another place left its note"))
	}
}
