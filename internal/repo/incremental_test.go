package repo_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"iter"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A disk is the files of a cluster as a test sees them: content by path.
type disk map[string][]byte

// source is an open file of a disk.
type source struct{ *bytes.Reader }

func (source) Close() error { return nil }

const label = "data/backup_label"

// files lists the label alone, or all but that; a path that ends in "@" is a link to its content, one
// that ends in "/" a directory.
func (d disk) files(last bool) iter.Seq2[repo.File, error] {
	return func(yield func(repo.File, error) bool) {
		for _, p := range slices.Sorted(maps.Keys(d)) {
			if (p == label) != last {
				continue
			}
			f := repo.File{Path: p, Mode: 0o600, Size: int64(len(d[p])), Modified: now}
			switch {
			case strings.HasSuffix(p, "@"):
				f = repo.File{Path: p, Link: string(d[p]), Mode: 0o777}
			case strings.HasSuffix(p, "/"):
				f = repo.File{Path: strings.TrimSuffix(p, "/"), Dir: true, Mode: 0o700}
			}
			if !yield(f, nil) {
				return
			}
		}
	}
}

func (d disk) open(f *repo.File) (repo.Source, error) {
	b, ok := d[f.Path]
	if !ok {
		return nil, fs.ErrNotExist
	}
	return source{bytes.NewReader(b)}, nil
}

// backupID returns the id of the n-th backup.
func backupID(n int) repo.ID {
	return repo.NewID(now.Add(time.Duration(n)*7*24*time.Hour), fmt.Sprintf("%08x", n))
}

// take stores and publishes a disk as backup n, which may keep blocks of others.
func take(r *repo.Repo, d disk, n int, pins ...int) (repo.Manifest, repo.Progress, error) {
	if err := intend(r, n, pins...); err != nil {
		return repo.Manifest{}, repo.Progress{}, err
	}
	progress, err := upload(r, d, n)
	if err != nil {
		return repo.Manifest{}, progress, err
	}
	m, err := publish(r, n)
	return m, progress, err
}

func intend(r *repo.Repo, n int, pins ...int) error {
	in := repo.Intent{Ref: repo.Ref{Cluster: "main", ID: backupID(n)}, Kind: repo.Physical, StartedAt: now}
	for _, pin := range pins {
		if pin < 0 { // before the first
			continue
		}
		in.Pins = append(in.Pins, backupID(pin))
	}
	_, err := r.WriteIntent(ctx, in, func() time.Time { return now })
	return err
}

func publish(r *repo.Repo, n int) (repo.Manifest, error) {
	return r.Publish(ctx, repo.Manifest{Ref: repo.Ref{Cluster: "main", ID: backupID(n)}, Kind: repo.Physical, StartedAt: now, FinishedAt: now})
}

func upload(r *repo.Repo, d disk, n int) (progress repo.Progress, err error) {
	return store1(r, d, repo.Writing{Ref: repo.Ref{Cluster: "main", ID: backupID(n)}, PackSize: 200_000})
}

// store1 stores a disk, with one reader and one sender unless w says otherwise.
func store1(r *repo.Repo, d disk, w repo.Writing) (progress repo.Progress, err error) {
	w.Open, w.Readers, w.Senders = d.open, max(1, w.Readers), max(1, w.Senders)
	var mu sync.Mutex
	w.Progress = func(p repo.Progress) {
		mu.Lock()
		defer mu.Unlock()
		progress = repo.Progress{Read: max(progress.Read, p.Read), Kept: max(progress.Kept, p.Kept), Sent: max(progress.Sent, p.Sent)}
	}
	wr, err := r.Begin(ctx, w)
	if err != nil {
		return progress, err
	}
	defer wr.Close()
	for _, last := range []bool{false, true} {
		if err := wr.Add(ctx, d.files(last)); err != nil {
			return progress, err
		}
	}
	_, err = wr.Finish(ctx, &repo.PhysicalFacts{Start: 1 << 24, Stop: 2 << 24, SegmentSize: pg.SegmentSize(16 << 20)}, nil)
	return progress, err
}

// readDisk reads a backup back into a directory, placed by the first element of
// its paths.
func readDisk(t testing.TB, r *repo.Repo, m repo.Manifest, dir string, keep bool) (disk, repo.Report, error) {
	t.Helper()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	rep, err := r.Read(ctx, m.ID, m.Content, repo.Reading{Keep: keep, Place: func(p string) (*os.Root, string, bool) {
		first, rest, _ := strings.Cut(p, "/")
		return root, filepath.Join(strings.ToUpper(first), rest), first != "config"
	}})
	if err != nil {
		return nil, rep, err
	}
	got := make(disk)
	err = fs.WalkDir(root.FS(), ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == "." || p == "DATA" {
			return err
		}
		name := "data" + strings.TrimPrefix(p, "DATA")
		switch {
		case d.IsDir():
			got[name+"/"] = nil
		case d.Type() == fs.ModeSymlink:
			to, err := root.Readlink(p)
			got[name] = []byte(to)
			return err
		default:
			got[name], err = root.ReadFile(p)
		}
		return err
	})
	return got, rep, err
}

func pages(seed, n int) []byte {
	b := make([]byte, n*8192)
	x := uint64(seed)*2862933555777941757 + 3037000493
	for i := 0; i < len(b); i += 8 {
		x ^= x << 13
		x ^= x >> 7
		x ^= x << 17
		b[i], b[i+1], b[i+3] = byte(x), byte(x>>8), byte(x>>16)
	}
	return b
}

func TestNothingChangedSendsNothing(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	host := b.open(t, b.host)
	d := disk{"data/": nil, "data/base/": nil, "data/base/1": pages(1, 100), "data/base/2": make([]byte, 300_000), "data/base/3": pages(2, 3),
		"data/pg_tblspc@": []byte("/srv/fast"), "data/pg_notify/": nil, "data/empty": {}, label: []byte("START WAL LOCATION")}
	if _, _, err := take(host, d, 1); err != nil {
		t.Fatal(err)
	}
	m, p, err := take(host, d, 2, 1)
	if err != nil {
		t.Fatal(err)
	}
	if p.Sent > 0 || m.Packs == 0 || !slices.Equal(m.Uses, []repo.ID{backupID(1)}) {
		t.Errorf("sent %d bytes; %d packs, of %v", p.Sent, m.Packs, m.Uses)
	}
	if m.Physical == nil || m.Physical.Stop != 2<<24 {
		t.Errorf("facts = %+v", m.Physical)
	}
	got, _, err := readDisk(t, b.r, m, t.TempDir(), false)
	delete(d, "data/")
	if err != nil || !maps.EqualFunc(got, d, bytes.Equal) {
		t.Errorf("restored %v, %v", slices.Sorted(maps.Keys(got)), err)
	}
}

// Class C1: a change that nothing tells of but the content itself (not the size,
// not the time, not the page's LSN) is stored, in every block of a file.
func TestC1AChangeThatNothingBetrays(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	host := b.open(t, b.host)
	d := disk{"data/base/1": pages(1, 40), "data/base/2": pages(2, 3)}
	if _, _, err := take(host, d, 0); err != nil {
		t.Fatal(err)
	}
	for n := 1; n <= 40; n++ { // a chain: each keeps blocks of the one before
		d["data/base/1"][n*8192-1] ^= 1
		m, p, err := take(host, d, n, n-1)
		if err != nil {
			t.Fatal(err)
		}
		if p.Sent == 0 || !slices.Contains(m.Uses, backupID(0)) && n < 5 {
			t.Errorf("backup %d sent %d bytes, and uses %v", n, p.Sent, m.Uses)
		}
		got, _, err := readDisk(t, b.r, m, t.TempDir(), false)
		delete(got, "data/base/")
		if err != nil || !maps.EqualFunc(got, d, bytes.Equal) {
			t.Errorf("backup %d: restored files differ, %v", n, err)
		}
	}
}

// Class C7: the segments that a backup needs are all of them, and no other.
func TestC7SegmentsOfABackup(t *testing.T) {
	for _, tt := range []struct {
		first, last string
		size        pg.SegmentSize
		want        int // 0: they cannot be told
	}{
		{"000000010000000000000002", "000000010000000000000002", 16 << 20, 1},
		{"000000010000000000000002", "000000010000000000000003", 16 << 20, 2},
		{"0000000100000000000000FE", "000000010000000100000001", 16 << 20, 4},
		{"000000010000000000000FFF", "000000010000000100000000", 1 << 20, 2},
		{"000000010000000000000003", "000000010000000100000001", 1 << 30, 3},
		{"000000010000000000000003", "000000010000000000000002", 16 << 20, 0},
		{"000000010000000000000003", "000000020000000000000004", 16 << 20, 0},
		{"000000010000000000000003", "00000002.history", 16 << 20, 0},
		{"000000010000000000000003", "", 16 << 20, 0},
	} {
		names, err := repo.PhysicalFacts{FirstWAL: tt.first, LastWAL: tt.last, SegmentSize: tt.size}.Segments()
		if (err != nil) != (tt.want == 0) || len(names) != tt.want {
			t.Errorf("from %s to %s: %v, %v; want %d", tt.first, tt.last, names, err, tt.want)
			continue
		}
		if tt.want > 0 && (names[0].String() != tt.first || names[tt.want-1].String() != tt.last) {
			t.Errorf("from %s to %s: %v", tt.first, tt.last, names)
		}
	}
}

func newIdentity(t *testing.T) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}
