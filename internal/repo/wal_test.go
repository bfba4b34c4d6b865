package repo_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

const walKey = "clusters/main/wal/7300000000000000001-15/00000001/000000010000000000000042.zst"

var archive = repo.Archive{Cluster: "main", System: 7_300_000_000_000_000_001, Major: 15}

// putWAL archives a file in the name of an instance, without a claim.
func putWAL(r *repo.Repo, n pg.WALName, content []byte) error {
	sum, err := r.Archiver(archive, "i1").Put(ctx, repo.WALFile{Name: n, Size: int64(len(content)), Content: bytes.NewReader(content)})
	if want := sha256.Sum256(content); err == nil && !bytes.Equal(sum, want[:]) {
		return fmt.Errorf("its SHA-256 is %x, they say %x", want, sum)
	}
	return err
}

func segment(t *testing.T) (pg.WALName, []byte) {
	t.Helper()
	n, err := pg.ParseWALName("000000010000000000000042")
	if err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	content := make([]byte, 1<<20) // the second half is zeros
	for i := range content[:1<<19] {
		content[i] = byte(rnd.Uint32())
	}
	return n, content
}

func next(t *testing.T, n pg.WALName) pg.WALName {
	t.Helper()
	n, err := n.Next(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func object(t *testing.T, st store.Store, key string) []byte {
	t.Helper()
	rc, err := st.Get(ctx, key, store.Range{})
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	b, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func TestWALComesBackAndIsNeverReplaced(t *testing.T) {
	for _, encrypted := range []bool{false, true} {
		b := setup(t, new(store.Mem), encrypted)
		host := b.open(t, b.host)
		n, content := segment(t)
		if err := putWAL(host, n, content); err != nil {
			t.Fatal(err)
		}
		stored := object(t, b.st, walKey)
		if err := putWAL(host, n, content); err != nil {
			t.Errorf("the same again, by a host that holds no key to the data: %v", err)
		}
		other := bytes.Clone(content)
		other[77]++
		if err := putWAL(host, n, other); !errors.Is(err, fail.WALConflict) {
			t.Errorf("other content: %v, want %v", err, fail.WALConflict)
		}
		if !bytes.Equal(stored, object(t, b.st, walKey)) {
			t.Error("the object was replaced")
		}
		var got bytes.Buffer
		if err := b.r.ReadWAL(ctx, archive, n, &got); err != nil || !bytes.Equal(got.Bytes(), content) {
			t.Errorf("read %d bytes, %v", got.Len(), err)
		}
		if err := host.ReadWAL(ctx, archive, n, io.Discard); encrypted && !errors.Is(err, fail.NoKey) {
			t.Errorf("a host without a key reads: %v", err)
		}
		var listed []pg.WALName
		for n, err := range host.ListWAL(ctx, archive, 1, pg.WALName{}) {
			if err != nil {
				t.Fatal(err)
			}
			listed = append(listed, n)
		}
		if len(listed) != 1 || listed[0] != n {
			t.Errorf("listed %v", listed)
		}
		if !encrypted {
			dec, err := zstd.NewReader(bytes.NewReader(stored)) // knows nothing of pgkeep
			if err != nil {
				t.Fatal(err)
			}
			defer dec.Close()
			if plain, err := io.ReadAll(dec); err != nil || !bytes.Equal(plain, content) {
				t.Errorf("zstd reads %d bytes, %v", len(plain), err)
			}
		}
	}
}

// Whatever happens to an object, what it yields is never taken for the file, and
// a host that would archive the file again is not told that it is there.
func TestC5DamagedWALIsNeverDelivered(t *testing.T) {
	for _, encrypted := range []bool{false, true} {
		b := setup(t, new(store.Mem), encrypted)
		n, content := segment(t)
		if err := putWAL(b.r, n, content); err != nil {
			t.Fatal(err)
		}
		host := b.open(t, b.host) // opens no data
		if err := host.CheckWAL(ctx, archive, n); err != nil {
			t.Error(err)
		}
		if err := host.CheckWAL(ctx, archive, next(t, n)); !errors.Is(err, store.ErrNotExist) {
			t.Errorf("a segment that is not there: %v", err)
		}
		sound := object(t, b.st, walKey)
		rnd := rand.New(rand.NewPCG(3, 4))
		damaged := [][]byte{nil, sound[:5], sound[:9], sound[:len(sound)-1], append(bytes.Clone(sound), 0)}
		for range 60 {
			d := bytes.Clone(sound)
			d[rnd.IntN(len(d))] ^= 1 << rnd.IntN(8)
			head := bytes.Clone(sound)
			head[rnd.IntN(1000)] ^= 1 << rnd.IntN(8)
			damaged = append(damaged, d, head, sound[:rnd.IntN(len(sound))])
		}
		for i, d := range damaged {
			if err := b.st.Put(ctx, walKey, bytes.NewReader(d), store.PutOptions{}); err != nil {
				t.Fatal(err)
			}
			if err := b.r.ReadWAL(ctx, archive, n, io.Discard); !errors.Is(err, fail.Corrupt) {
				t.Errorf("damage %d: read: %v, want %v", i, err, fail.Corrupt)
			}
			if err := host.CheckWAL(ctx, archive, n); !errors.Is(err, fail.Corrupt) {
				t.Errorf("damage %d: checked: %v, want %v", i, err, fail.Corrupt)
			}
			if err := putWAL(b.r, n, content); !errors.Is(err, fail.Corrupt) {
				t.Errorf("damage %d: archived again: %v, want %v", i, err, fail.Corrupt)
			}
		}
	}
}

func TestWALOfAnotherPlaceIsRefused(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	n, content := segment(t)
	if err := putWAL(b.r, n, content); err != nil {
		t.Fatal(err)
	}
	stored := object(t, b.st, walKey)
	system, cluster := archive, archive
	system.System++
	cluster.Cluster = "other"
	for key, tt := range map[string]struct {
		a    repo.Archive
		n    pg.WALName
		want fail.Kind
	}{
		"clusters/main/wal/7300000000000000001-15/00000001/000000010000000000000043.zst":  {archive, next(t, n), fail.Corrupt},
		"clusters/main/wal/7300000000000000002-15/00000001/000000010000000000000042.zst":  {system, n, fail.WrongSystem},
		"clusters/other/wal/7300000000000000001-15/00000001/000000010000000000000042.zst": {cluster, n, fail.WrongSystem},
	} {
		if err := b.st.Put(ctx, key, bytes.NewReader(stored), store.PutOptions{}); err != nil {
			t.Fatal(err)
		}
		if err := b.r.ReadWAL(ctx, tt.a, tt.n, io.Discard); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", key, err, tt.want)
		}
	}
	stranger := b.operator
	var err error
	if stranger.Signer, err = seal.NewSigner(); err != nil {
		t.Fatal(err)
	}
	stranger.Trusted = []seal.PublicKey{b.operator.Signer.Public()}
	if err := putWAL(b.open(t, stranger), next(t, n), content); !errors.Is(err, fail.Corrupt) { // 43 holds 42's
		t.Errorf("archived over a misplaced object: %v", err)
	}
	free := next(t, next(t, n))
	if err := putWAL(b.open(t, stranger), free, content); err != nil {
		t.Fatal(err)
	}
	if err := b.r.ReadWAL(ctx, archive, free, io.Discard); !errors.Is(err, fail.Untrusted) {
		t.Errorf("signed by a stranger: %v, want %v", err, fail.Untrusted)
	}
}

// Each who leaves a timeline archives the last piece of it. Earlier versions kept
// one, and what they kept is read.
func TestEachPartialSegmentHasAPlaceOfItsOwn(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	whole, content := segment(t)
	n, err := pg.ParseWALName(whole.String() + ".partial")
	if err != nil {
		t.Fatal(err)
	}
	dir := strings.TrimSuffix(walKey, ".zst")
	put := func(instance string, first byte) {
		t.Helper()
		own := bytes.Clone(content)
		own[0] = first
		if _, err := b.r.Archiver(archive, instance).Put(ctx, repo.WALFile{Name: n, Size: int64(len(own)), Content: bytes.NewReader(own)}); err != nil {
			t.Fatal(err)
		}
	}
	first := func() (byte, error) {
		var got bytes.Buffer
		if err := b.r.ReadWAL(ctx, archive, n, &got); err != nil {
			return 0, err
		}
		return got.Bytes()[0], nil
	}
	if _, err := first(); !errors.Is(err, store.ErrNotExist) {
		t.Errorf("none is there: %v", err)
	}
	put("", 1) // that is where earlier versions put it
	object(t, b.st, dir+".partial.zst")
	if got, err := first(); got != 1 || err != nil {
		t.Errorf("the one of an earlier version: %d, %v", got, err)
	}
	put("i1", 2)
	put("i1", 2)
	put("i2", 3)
	var keys []string
	for o, err := range b.r.WALObjects(ctx, archive, pg.WALName{}) {
		if err != nil || o.Name != n {
			t.Fatal(o, err)
		}
		if size, err := b.r.WALSize(ctx, archive, o); err != nil || size != int64(len(content)) {
			t.Errorf("%s has %d bytes, %v", o.Key, size, err)
		}
		keys = append(keys, o.Key)
	}
	if want := []string{dir + ".partial.i1.zst", dir + ".partial.i2.zst", dir + ".partial.zst"}; !slices.Equal(keys, want) {
		t.Errorf("got %q, want %q", keys, want)
	}
	if _, err := first(); !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), keys[1]) {
		t.Errorf("which of three: %v; hint: %s", err, fail.HintOf(err))
	}
	stolen := repo.WALObject{Name: n, Key: dir + ".partial.i3.zst"}
	if err := b.st.Put(ctx, stolen.Key, bytes.NewReader(object(t, b.st, keys[0])), store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.r.WALSize(ctx, archive, stolen); !errors.Is(err, fail.Corrupt) {
		t.Errorf("at the place of another instance: %v", err)
	}
}

// Of those who archive together one may have less time, and be the first to open
// the repository.
func TestARepositoryThatOneCouldNotOpenAnotherOpens(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	first := true
	w := repo.NewArchiver(&fault.Store{Store: b.st, Before: func(op, key string) error {
		if key == "PGKEEP" && first {
			first = false
			return context.DeadlineExceeded
		}
		return nil
	}}, b.host, archive, "i1")
	if err := w.Open(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Open = %v", err)
	}
	n, content := segment(t)
	if _, err := w.Put(ctx, repo.WALFile{Name: n, Size: int64(len(content)), Content: bytes.NewReader(content)}); err != nil {
		t.Error(err)
	}
	if id, err := w.Repository(ctx); err != nil || id != b.r.Marker.ID {
		t.Errorf("Repository = %q, %v, want %q", id, err, b.r.Marker.ID)
	}
}

func TestWhoWaitsForARepositoryToOpenWaitsNoLongerThanHeMay(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	asked, answer := make(chan struct{}), make(chan struct{})
	w := repo.NewArchiver(&fault.Store{Store: b.st, Before: func(_, key string) error {
		if key == "PGKEEP" {
			close(asked)
			<-answer
		}
		return nil
	}}, b.host, archive, "i1")
	done := make(chan error, 1)
	go func() { done <- w.Open(ctx) }()
	<-asked
	brief, cancel := context.WithTimeout(ctx, 20*time.Millisecond)
	defer cancel()
	if err := w.Open(brief); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Open = %v", err)
	}
	n, content := segment(t)
	if _, err := w.Put(brief, repo.WALFile{Name: n, Size: int64(len(content)), Content: bytes.NewReader(content)}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Put = %v", err)
	}
	close(answer)
	if err := <-done; err != nil {
		t.Error(err)
	}
}
