package health_test

import (
	"bytes"
	"context"
	"io"
	"iter"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A meter counts requests as S3 does, where a list shows a thousand objects at a
// time. It makes of each listed object one that is there for a day.
type meter struct {
	store.Store
	requests int
}

func (m *meter) Get(ctx context.Context, key string, part store.Range) (io.ReadCloser, error) {
	m.requests++
	return m.Store.Get(ctx, key, part)
}

func (m *meter) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		n := 0
		for o, err := range m.Store.List(ctx, prefix, after) {
			if n++; n%1000 == 1 {
				m.requests++
			}
			if o.Modified = o.Modified.Add(-24 * time.Hour); !yield(o, err) {
				return
			}
		}
		if n == 0 {
			m.requests++
		}
	}
}

// A look at an archive of 50,000 segments lists it once a day. Those in between
// list what is new, and see a hole in it.
func TestALookAtALongArchiveListsWhatIsNew(t *testing.T) {
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	st := &meter{Store: new(store.Mem)}
	r, _, err := repo.Init(t.Context(), st, repo.Access{Signer: signer, Version: "test"}, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	const size, segments = pg.SegmentSize(1 << 20), 50_000
	a := repo.Archive{Cluster: "main", System: 7, Major: 15}
	first := make([]byte, size)
	add := func(n int) {
		t.Helper()
		text, err := pg.SegmentName(1, pg.LSN(n)*pg.LSN(size), size)
		if err != nil {
			t.Fatal(err)
		}
		name, err := pg.ParseWALName(text)
		if err == nil && n == 1 { // of which the size is read
			_, err = r.Archiver(a, "").Put(t.Context(), repo.WALFile{Name: name, Size: int64(size), Content: bytes.NewReader(first)})
		} else if err == nil {
			err = st.Put(t.Context(), "clusters/main/wal/7-15/00000001/"+text+".zst", strings.NewReader("listed, and never read"), store.PutOptions{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for n := 1; n <= segments; n++ {
		add(n)
	}
	memory := audit.Memory(t.TempDir())
	look := func(m audit.Memory, now time.Time) (s health.Stored, requests int) {
		t.Helper()
		before := st.requests
		s, err := health.Look(t.Context(), r, "main", m, now)
		if err != nil {
			t.Fatal(err)
		}
		return s, st.requests - before
	}
	now := time.Now()
	all, full := look(memory, now)
	add(segments + 1)
	again, few := look(memory, now.Add(10*time.Minute))
	if full < segments/1000 || few > 10 {
		t.Errorf("%d requests at first, %d then", full, few)
	}
	if was, is := all.Archives[0].Bytes(), again.Archives[0].Bytes(); was < segments*22 || is != was+22 {
		t.Errorf("%d bytes, then %d after one more of 22", was, is)
	}
	add(segments + 3)
	if s, n := look(memory, now.Add(20*time.Minute)); len(s.Holes()) != 1 || n > 10 {
		t.Errorf("holes: %v, with %d requests", s.Holes(), n)
	}
	if err := st.Delete(t.Context(), "clusters/main/wal/7-15/00000001/"+must(t)(pg.SegmentName(1, 20_000*pg.LSN(size), size))+".zst"); err != nil {
		t.Fatal(err)
	}
	s, anew := look(memory, now.Add(audit.Anew+time.Minute))
	if len(s.Holes()) != 2 || anew < segments/1000 {
		t.Errorf("a day later, holes: %v, with %d requests", s.Holes(), anew)
	}
	if _, n := look("", now); n < segments/1000 {
		t.Errorf("without a memory %d requests", n)
	}
	t.Logf("%d segments: %d requests for all, %d for what is new", segments, full, few)
}

func must(t *testing.T) func(string, error) string {
	return func(s string, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}
