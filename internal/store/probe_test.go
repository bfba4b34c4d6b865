package store_test

import (
	"context"
	"errors"
	"io"
	"iter"
	"slices"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A lax store breaks one promise.
type lax struct {
	store.Store
	put  func(opt *store.PutOptions)
	get  func(part *store.Range) error
	list func([]store.Object) []store.Object
	keep bool // Delete does nothing
}

func (l *lax) Put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	if l.put != nil {
		l.put(&opt)
	}
	return l.Store.Put(ctx, key, r, opt)
}

func (l *lax) Get(ctx context.Context, key string, part store.Range) (io.ReadCloser, error) {
	if l.get != nil {
		if err := l.get(&part); err != nil {
			return nil, err
		}
	}
	return l.Store.Get(ctx, key, part)
}

func (l *lax) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		var all []store.Object
		for o, err := range l.Store.List(ctx, prefix, after) {
			if err != nil {
				yield(o, err)
				return
			}
			all = append(all, o)
		}
		if l.list != nil {
			all = l.list(all)
		}
		for _, o := range all {
			if !yield(o, nil) {
				return
			}
		}
	}
}

func (l *lax) Delete(ctx context.Context, keys ...string) error {
	if l.keep {
		return nil
	}
	return l.Store.Delete(ctx, keys...)
}

func TestProbeNamesWhatIsLacking(t *testing.T) {
	for lacks, st := range map[string]*lax{
		"conditional writes": {put: func(opt *store.PutOptions) { opt.IfAbsent = false }},
		"reads after writes": {get: func(*store.Range) error { return store.ErrNotExist }},
		"ranged reads":       {get: func(part *store.Range) error { *part = store.Range{}; return nil }},
		"lists":              {list: func(o []store.Object) []store.Object { slices.Reverse(o); return o }},
		"deletes":            {keep: true},
	} {
		mem := new(store.Mem)
		st.Store = mem
		err := store.Probe(t.Context(), st, "p")
		if !errors.Is(err, fail.StoreUnfit) || !strings.Contains(err.Error(), lacks) {
			t.Errorf("without %s: err = %v, want store-unfit that says so", lacks, err)
		}
		if !st.keep {
			wantEmpty(t, mem, lacks)
		}
	}
	late := &lax{Store: new(store.Mem), list: func([]store.Object) []store.Object { return nil }}
	if err := store.Probe(t.Context(), late, ""); !errors.Is(err, fail.StoreUnfit) {
		t.Errorf("with lists that come late: err = %v, want store-unfit", err)
	}
}

// Trouble with the store is not a lack of it, and a probe cleans up.
func TestProbeSurvivesEveryFailure(t *testing.T) {
	for _, after := range []bool{false, true} {
		for at := 1; ; at++ {
			mem := new(store.Mem)
			broken := &fault.Store{Store: mem, At: at, After: after}
			err := store.Probe(t.Context(), broken, "p")
			if !broken.Hit() {
				if err != nil {
					t.Fatal(err)
				}
				break
			}
			if !errors.Is(err, fault.ErrInjected) || errors.Is(err, fail.StoreUnfit) {
				t.Errorf("call %d broken (after=%v): err = %v, want that failure", at, after, err)
			}
			wantEmpty(t, mem, "a broken call")
		}
	}
}

func wantEmpty(t *testing.T, st store.Store, after string) {
	t.Helper()
	for o, err := range st.List(t.Context(), "", "") {
		t.Errorf("after %s: left %s (%v)", after, o.Key, err)
	}
}

func TestRangeWithin(t *testing.T) {
	for _, c := range []struct {
		part   store.Range
		size   int64
		off, n int64
		ok     bool
	}{
		{store.Range{}, 10, 0, 10, true},
		{store.Range{}, 0, 0, 0, true},
		{store.Range{Off: 4}, 10, 4, 6, true},
		{store.Range{Off: 10}, 10, 10, 0, true},
		{store.Range{Off: 4, Len: 6}, 10, 4, 6, true},
		{store.Range{Off: 11}, 10, 0, 0, false},
		{store.Range{Off: 4, Len: 7}, 10, 0, 0, false},
		{store.Range{Off: 1 << 62, Len: 1 << 62}, 10, 0, 0, false},
		{store.Range{Len: 1}, 0, 0, 0, false},
	} {
		off, n, err := c.part.Within(c.size)
		if off != c.off || n != c.n || (err == nil) != c.ok || err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%+v.Within(%d) = %d, %d, %v, want %d, %d, ok %v", c.part, c.size, off, n, err, c.off, c.n, c.ok)
		}
	}
	for _, part := range []store.Range{{Off: -1}, {Len: -1}} {
		if _, _, err := part.Within(10); err == nil {
			t.Errorf("%+v.Within(10) succeeded", part)
		}
	}
}

func FuzzCheckKey(f *testing.F) {
	for _, s := range []string{"a", "a/b", "", "/", "a/", "../a", "é", "a\x00", "a b+c"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, key string) {
		if store.CheckKey(key) != nil {
			return
		}
		for _, e := range strings.Split(key, "/") {
			if e == "" || e == "." || e == ".." || strings.ContainsAny(e, "\x00\n\x7f") {
				t.Errorf("%q is taken for a key", key)
			}
		}
	})
}
