package repo_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// spoiled is a source that knows of damage.
type spoiled struct {
	source
	damaged []int64
	closed  *int
}

func (s spoiled) Damaged() []int64 { return s.damaged }
func (s spoiled) Close() error     { *s.closed++; return nil }

// store2 stores these files as backup n with sources of the test's own.
func store2(t *testing.T, r *repo.Repo, n int, w repo.Writing, files ...repo.File) (repo.Manifest, map[string]repo.Entry) {
	t.Helper()
	if err := intend(r, n, n-1); err != nil {
		t.Fatal(err)
	}
	entries := make(map[string]repo.Entry)
	w.Ref, w.Stored = repo.Ref{Cluster: "main", ID: backupID(n)}, func(e repo.Entry) { entries[e.Path] = e }
	wr, err := r.Begin(ctx, w)
	if err != nil {
		t.Fatal(err)
	}
	defer wr.Close()
	err = wr.Add(ctx, func(yield func(repo.File, error) bool) {
		for _, f := range files {
			if !yield(f, nil) {
				return
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := wr.Finish(ctx, nil, nil); err != nil {
		t.Fatal(err)
	}
	m, err := publish(r, n)
	if err != nil {
		t.Fatal(err)
	}
	return m, entries
}

func TestFilesThatMove(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	large := pages(1, 300) // several chunks of 32 blocks
	now := disk{"data/grown": pages(2, 2), "data/gone/half": nil, "data/shrunk": pages(3, 1)[:100], "data/shorter": large[:100*8192+5]}
	open := func(f *repo.File) (repo.Source, error) {
		b, ok := now[f.Path]
		if !ok || strings.Contains(f.Path, "gone") {
			return nil, fs.ErrNotExist
		}
		if f.Size < 32*8192 {
			f.Size = int64(len(b)) // a file of one chunk: as long as it is now
		} else {
			f.Size = 1 // of others the size stands
		}
		return source{bytes.NewReader(b)}, nil
	}
	m, entries := store2(t, b.r, 0, repo.Small(repo.Writing{Open: open}),
		repo.File{Path: "data/gone", Dir: true}, repo.File{Path: "data/gone/half", Size: 300 * 8192}, repo.File{Path: "data/gone1", Size: 7},
		repo.File{Path: "data/grown", Size: 0}, repo.File{Path: "data/shorter", Size: 300 * 8192}, repo.File{Path: "data/shrunk", Size: 20_000})
	got, _, err := readDisk(t, b.r, m, t.TempDir(), false)
	want := disk{"data/gone/": nil, "data/grown": now["data/grown"], "data/shrunk": now["data/shrunk"],
		"data/shorter": append(bytes.Clone(now["data/shorter"]), make([]byte, 200*8192-5)...)}
	if err != nil || !maps.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("restored %v, %v", slices.Sorted(maps.Keys(got)), err)
	}
	if _, ok := entries["data/gone/half"]; ok || len(entries) != 4 {
		t.Errorf("entries: %v", entries)
	}
}

func TestZerosAreNotStoredAndDamageIsNoted(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	content := append(pages(1, 256), make([]byte, 1000*8192+17)...)
	closed, waited := 0, int64(0)
	var mu sync.Mutex
	open := func(*repo.File) (repo.Source, error) {
		return spoiled{source{bytes.NewReader(content)}, []int64{200, 3}, &closed}, nil
	}
	m, entries := store2(t, b.r, 0, repo.Small(repo.Writing{Open: open, Wait: func(_ context.Context, n int64) error {
		mu.Lock()
		defer mu.Unlock()
		waited += n
		return nil
	}}), repo.File{Path: "data/1", Size: int64(len(content)), Modified: now})
	if closed != 1 || waited != int64(len(content)) || m.Stored > 256*8192+64<<10 {
		t.Errorf("closed %d times, waited for %d bytes", closed, waited)
	}
	if e := entries["data/1"]; !slices.Equal(e.Damaged, []int64{3, 200}) || !e.Modified.Equal(now) {
		t.Errorf("entry %+v", e)
	}
	got, _, err := readDisk(t, b.r, m, t.TempDir(), false)
	if err != nil || !bytes.Equal(got["data/1"], content) {
		t.Errorf("restored file differs, %v", err)
	}
	var listed []repo.Entry
	never := func(string) bool { return false }
	rep, err := b.r.Read(ctx, m.ID, m.Content, repo.Reading{Want: never, Entries: func(e repo.Entry) error { listed = append(listed, e); return nil }})
	if err != nil || len(listed) != 1 || !slices.Equal(listed[0].Damaged, []int64{3, 200}) || !listed[0].Modified.Equal(now) || rep.Stored != 0 {
		t.Errorf("listed %+v, %d bytes read, %v", listed, rep.Stored, err)
	}
	stop := errors.New("enough")
	if _, err := b.r.Read(ctx, m.ID, m.Content, repo.Reading{Entries: func(repo.Entry) error { return stop }}); !errors.Is(err, stop) {
		t.Errorf("err = %v", err)
	}
	if err := b.st.Delete(ctx, m.Trees[0].Key); err != nil {
		t.Fatal(err)
	}
	if _, err := b.r.Read(ctx, m.ID, m.Content, repo.Reading{Want: never, Entries: func(repo.Entry) error { return nil }}); err == nil {
		t.Error("a list that is lost reads like one without entries")
	}
}

func TestFilesOutOfOrderAreRefused(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	d := disk{"a": nil, "b": nil}
	for _, files := range [][]string{{"b", "a"}, {"a", "a"}, {"../a"}, {"/a"}} {
		w, err := b.r.Begin(ctx, repo.Writing{Ref: ref, Open: d.open})
		if err != nil {
			t.Fatal(err)
		}
		err = w.Add(ctx, func(yield func(repo.File, error) bool) {
			for _, p := range files {
				if !yield(repo.File{Path: p}, nil) {
					return
				}
			}
		})
		if err == nil {
			t.Errorf("%q: stored", files)
		}
		w.Close()
	}
}

// A delta fetches what differs and nothing else, whatever stands there.
func TestDeltaFetchesWhatDiffers(t *testing.T) {
	for _, encrypted := range []bool{false, true} {
		b := setup(t, new(store.Mem), encrypted)
		d := disk{"data/base/1": pages(1, 3000), "data/base/2": pages(2, 20), "data/base/zeros": make([]byte, 200_000), "data/link@": []byte("/somewhere")}
		m, _, err := take(b.r, d, 0)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if _, _, err := readDisk(t, b.r, m, dir, true); err != nil {
			t.Fatal(err)
		}
		one := filepath.Join(dir, "DATA/base/1")
		f, err := os.OpenFile(one, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		f.WriteAt([]byte("changed"), 1234*8192+50)
		f.WriteAt([]byte("longer"), 3000*8192)
		f.Close()
		os.Truncate(filepath.Join(dir, "DATA/base/2"), 1000)
		os.WriteFile(filepath.Join(dir, "DATA/base/zeros"), pages(9, 5), 0o600)
		os.Remove(filepath.Join(dir, "DATA/link@"))
		os.Symlink("/elsewhere", filepath.Join(dir, "DATA/link@"))
		got, rep, err := readDisk(t, b.r, m, dir, true)
		delete(got, "data/base/")
		if err != nil || !maps.EqualFunc(got, d, bytes.Equal) {
			t.Errorf("restored %v, %v", slices.Sorted(maps.Keys(got)), err)
		}
		if rep.Stored == 0 || rep.Stored > m.Stored/10 {
			t.Errorf("read %d of %d bytes", rep.Stored, m.Stored)
		}
		if _, rep, err = readDisk(t, b.r, m, dir, true); err != nil || rep.Stored != 0 {
			t.Errorf("again: read %d bytes, %v", rep.Stored, err)
		}
		// A link in the way of a file is not followed.
		outside := filepath.Join(t.TempDir(), "outside")
		os.WriteFile(outside, []byte("mine"), 0o600)
		os.Remove(one)
		os.Symlink(outside, one)
		got, _, err = readDisk(t, b.r, m, dir, true)
		if mine, _ := os.ReadFile(outside); err != nil || string(mine) != "mine" || !bytes.Equal(got["data/base/1"], d["data/base/1"]) {
			t.Errorf("outside: %q, %v", mine, err)
		}
		// Nor is a file written to that has another name, as in a copy made with cp -al.
		two := filepath.Join(dir, "DATA/base/2")
		os.WriteFile(two, pages(7, 20), 0)
		os.Chmod(two, 0o640)
		before, _ := os.ReadFile(two)
		sibling := filepath.Join(t.TempDir(), "sibling")
		if err := os.Link(two, sibling); err != nil {
			t.Fatal(err)
		}
		got, _, err = readDisk(t, b.r, m, dir, true)
		after, _ := os.ReadFile(sibling)
		if info, _ := os.Stat(sibling); err != nil || !bytes.Equal(before, after) || info.Mode() != 0o640 || !bytes.Equal(got["data/base/2"], d["data/base/2"]) {
			t.Errorf("the other name of a file has changed (%v)", err)
		}
	}
}

// Whatever call to the store fails while an incremental backup is taken or read
// back, before or after it took effect, doing it again succeeds.
func TestIncrementalSurvivesEveryFailure(t *testing.T) {
	d := disk{"data/base/1": pages(1, 100), "data/base/2": pages(2, 40), "data/base/3": pages(3, 3)}
	changed := maps.Clone(d)
	changed["data/base/1"] = append(pages(7, 3), d["data/base/1"][3*8192:]...)
	changed["data/base/2"] = d["data/base/2"][:9*8192]
	for _, after := range []bool{false, true} {
		for at := 1; ; at++ {
			b := setup(t, new(store.Mem), false)
			if _, _, err := take(b.r, d, 0); err != nil {
				t.Fatal(err)
			}
			broken := &fault.Store{Store: b.st, At: at, After: after}
			m, _, err := take(b.r.Through(broken), changed, 1, 0)
			if err == nil {
				_, _, err = readDisk(t, b.r.Through(broken), m, t.TempDir(), false)
			}
			if !broken.Hit() {
				if err != nil || at < 20 {
					t.Errorf("%d calls, %v", at, err)
				}
				break
			}
			if err == nil {
				t.Errorf("call %d broken (after=%v), and nothing failed", at, after)
			}
			if errors.Is(err, context.Canceled) {
				t.Errorf("call %d broken (after=%v): %v: the reason is lost", at, after, err)
			}
			if m, _, err = take(b.r, changed, 1, 0); err != nil {
				t.Errorf("call %d broken (after=%v): again: %v", at, after, err)
				continue
			}
			got, _, err := readDisk(t, b.r, m, t.TempDir(), false)
			delete(got, "data/base/")
			if err != nil || !maps.EqualFunc(got, changed, bytes.Equal) {
				t.Errorf("call %d broken (after=%v): restored files differ, %v", at, after, err)
			}
		}
	}
}

// What cannot be read of an earlier backup is stored anew: its loss is healed.
func TestC1DamagedPriorIsNotBuiltOn(t *testing.T) {
	for _, what := range []string{".pack", "/tree-", "/manifest.json", "other key", "other intent"} {
		b := setup(t, new(store.Mem), true)
		d := disk{"data/base/1": pages(1, 100), "data/base/2": pages(2, 40)}
		if _, _, err := take(b.open(t, b.host), d, 0); err != nil {
			t.Fatal(err)
		}
		for key := range objects(t, b.st) {
			if strings.Contains(key, what) {
				b.st.Delete(ctx, key)
			}
		}
		host := b.open(t, b.host)
		pins := []int{0}
		switch what {
		case "other key": // another host of the cluster
			a := b.host
			a.Metadata = newIdentity(t)
			host = b.open(t, a)
		case "other intent":
			pins = nil
		}
		m, p, err := take(host, d, 1, pins...)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if p.Kept != 0 || len(m.Uses) != 0 {
			t.Errorf("%s: kept %d bytes, uses %v", what, p.Kept, m.Uses)
		}
		got, _, err := readDisk(t, b.r, m, t.TempDir(), false)
		delete(got, "data/base/")
		if err != nil || !maps.EqualFunc(got, d, bytes.Equal) {
			t.Errorf("%s: restored files differ, %v", what, err)
		}
	}
}

// A backup that is deleted while it is taken is not published later, when
// nothing tells of the deletion any more.
func TestC2DeletedWhileItIsTaken(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	d := disk{"data/base/1": pages(1, 40)}
	if err := intend(b.r, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := b.r.Delete(ctx, repo.Ref{Cluster: "main", ID: backupID(0)}, now); err != nil {
		t.Fatal(err)
	}
	if _, err := upload(b.r, d, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := publish(b.r, 0); !errors.Is(err, fail.NoBackup) {
		t.Errorf("err = %v, want no-backup", err)
	}
	if list, err := b.r.Backups(ctx, "main"); err != nil || slices.ContainsFunc(list, func(l repo.Listed) bool { return !l.Unfinished }) {
		t.Errorf("Backups = %v, %v", list, err)
	}
}
