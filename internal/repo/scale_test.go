package repo_test

import (
	"bytes"
	"flag"
	"fmt"
	"iter"
	"math/rand/v2"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/store/dir"
)

var scale = flag.Int64("scale", 1, "how many times 20,000 small files and 2 GB of holes; 50 makes a million, and 100 GB")

// island is a file of zeros with some pages in the middle.
type island struct {
	at   int64
	page []byte
}

func (i island) ReadAt(b []byte, off int64) (int, error) {
	clear(b)
	if i.at >= off && i.at < off+int64(len(b)) {
		copy(b[i.at-off:], i.page)
	}
	return len(b), nil
}
func (island) Close() error { return nil }

// peak watches how much memory the process takes from the system.
func peak() (stop func() (bytes uint64)) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	var most uint64
	wg.Go(func() {
		var m runtime.MemStats
		for {
			runtime.ReadMemStats(&m)
			most = max(most, m.Sys-m.HeapReleased)
			select {
			case <-done:
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
	})
	return func() uint64 { close(done); wg.Wait(); return most }
}

// Memory does not grow with a database: of a million files, and of a file of
// 100 GB, only the next are ever held.
func TestMemoryDoesNotGrow(t *testing.T) {
	st, err := dir.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b := setup(t, st, true)
	small, large := 20_000**scale, *scale*2<<30
	files := func(yield func(repo.File, error) bool) {
		for n := range small {
			if !yield(repo.File{Path: fmt.Sprintf("data/base/%04d/%07d", n/1000, n), Mode: 0o600, Size: 20}, nil) {
				return
			}
		}
		yield(repo.File{Path: "data/base/sparse", Mode: 0o600, Size: large}, nil)
	}
	open := func(f *repo.File) (repo.Source, error) {
		if f.Size == large {
			return island{large / 2 / 8192 * 8192, pages(1, 3)}, nil
		}
		return source{bytes.NewReader([]byte(f.Path)[:20])}, nil
	}
	for n, limit := range []uint64{400, 400} {
		if err := intend(b.r, n, n-1); err != nil {
			t.Fatal(err)
		}
		runtime.GC()
		began, stop := time.Now(), peak()
		c, err := scaled(b.r, n, files, open)
		most := stop() >> 20
		if err != nil {
			t.Fatal(err)
		}
		if _, err := publish(b.r, n); err != nil {
			t.Fatal(err)
		}
		t.Logf("backup %d: %d files, %d MB, stored %d MB in %d packs, %d parts: %v, %d MB of memory",
			n, c.Files, c.Bytes>>20, c.Stored>>20, c.Packs, len(c.Trees), time.Since(began).Round(time.Millisecond), most)
		if int64(c.Files) != small+1 || most > limit {
			t.Errorf("%d files, %d MB of memory; want %d, at most %d", c.Files, most, small+1, limit)
		}
	}
	m, err := b.r.Backup(ctx, repo.Ref{Cluster: "main", ID: backupID(1)})
	if err != nil {
		t.Fatal(err)
	}
	began, stop := time.Now(), peak()
	rep, err := b.r.Read(ctx, m.ID, m.Content, repo.Reading{})
	most := stop() >> 20
	if err != nil || rep.Err() != nil || most > 400 {
		t.Errorf("Read: %v, %v, %d MB of memory", err, rep.Err(), most)
	}
	t.Logf("verified: %v, %d MB of memory", time.Since(began).Round(time.Millisecond), most)
}

func scaled(r *repo.Repo, n int, files iter.Seq2[repo.File, error], open func(*repo.File) (repo.Source, error)) (repo.Content, error) {
	w, err := r.Begin(ctx, repo.Writing{Ref: repo.Ref{Cluster: "main", ID: backupID(n)}, Open: open})
	if err != nil {
		return repo.Content{}, err
	}
	defer w.Close()
	if err := w.Add(ctx, files); err != nil {
		return repo.Content{}, err
	}
	return w.Finish(ctx, nil, nil)
}

// Packs that were sent are forgotten, but for their names.
func TestSentPacksAreForgotten(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	const size = 64 << 20
	noise := make([]byte, 1<<20)
	rnd := rand.New(rand.NewPCG(1, 2))
	for i := range noise {
		noise[i] = byte(rnd.Uint32())
	}
	var live uint64
	var stored atomic.Int64
	if err := intend(b.r, 0); err != nil {
		t.Fatal(err)
	}
	w, err := b.r.Begin(ctx, repo.Writing{Ref: repo.Ref{Cluster: "main", ID: backupID(0)}, PackSize: 64 << 10, Readers: 1, Senders: 1,
		Open: func(*repo.File) (repo.Source, error) {
			return reading(func(p []byte, off int64) {
				copy(p, noise)
				p[0] = byte(off >> 20)
				if off == size-1<<20 {
					var m runtime.MemStats
					runtime.GC()
					runtime.ReadMemStats(&m)
					live = m.HeapAlloc
				}
			}), nil
		},
		Progress: func(p repo.Progress) { stored.Store(p.Sent) }})
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	err = w.Add(ctx, func(yield func(repo.File, error) bool) {
		yield(repo.File{Path: "data/noise", Mode: 0o600, Size: size}, nil)
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d MB were sent; %d MB are held", stored.Load()>>20, live>>20)
	if held := int64(live) - stored.Load(); live == 0 || held > 40<<20 { // what is in the store is in memory here
		t.Errorf("%d MB are held beside what is stored", held>>20)
	}
}

// reading is a source that fills what it is given.
type reading func(p []byte, off int64)

func (r reading) ReadAt(p []byte, off int64) (int, error) {
	r(p, off)
	return len(p), nil
}
func (reading) Close() error { return nil }
