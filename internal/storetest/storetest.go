// Package storetest checks that a store.Store keeps the promises in its
// interface comment.
package storetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"time"

	"github.com/pgkeep/pgkeep/internal/store"
)

// Run runs the whole suite. open returns an empty store for one test.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for _, c := range []struct {
		promise string
		check   func(t *testing.T, s store.Store)
	}{
		{"get returns what put stored", roundTrip},
		{"an empty object is an object", empty},
		{"put replaces", replace},
		{"put begins where the reader stands", fromPosition},
		{"a reader that cannot seek is stored whole", streamed},
		{"a failed put leaves no object", failedPut},
		{"a failed put leaves the object that was there", failedReplace},
		{"if-absent does not replace", ifAbsent},
		{"of many creators one wins", race},
		{"get of a missing object says so", missing},
		{"get returns the part asked for", ranges},
		{"a part beyond the end is an unexpected EOF", beyond},
		{"list is in key order", listOrder},
		{"list yields all of many objects", listMany},
		{"list begins behind a key", listAfter},
		{"list stops when told", listBreak},
		{"list describes objects", listFacts},
		{"list of nothing is empty", listNothing},
		{"a key may hold spaces, signs and any letters", oddKeys},
		{"what is no key is refused", badKeys},
		{"delete removes", deletes},
		{"delete of a missing key is not an error", deleteMissing},
		{"after a cancelled context nothing happens", cancelled},
		{"abort-stale spares objects", sweep},
		{"a probe finds the store fit", probe},
	} {
		t.Run(c.promise, func(t *testing.T) { c.check(t, open(t)) })
	}
}

func roundTrip(t *testing.T, s store.Store) {
	put(t, s, "k", "v")
	wantObject(t, s, "k", "v")
}

func empty(t *testing.T, s store.Store) {
	put(t, s, "seekable", "")
	if err := s.Put(t.Context(), "streamed", stream(strings.NewReader("")), store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	wantObject(t, s, "seekable", "")
	wantObject(t, s, "streamed", "")
}

func replace(t *testing.T, s store.Store) {
	put(t, s, "k", "first")
	put(t, s, "k", "second")
	wantObject(t, s, "k", "second")
}

func fromPosition(t *testing.T, s store.Store) {
	r := strings.NewReader("headerbody")
	if _, err := r.Seek(6, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	if err := s.Put(t.Context(), "k", r, store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	wantObject(t, s, "k", "body")
}

// Big is more than a store should hold in one piece: the s3 one cuts a stream
// of this size into parts.
const Big = 40 << 20

func streamed(t *testing.T, s store.Store) {
	want := random(Big + 1)
	for _, size := range []int{1, 16 << 20, Big + 1} {
		key := fmt.Sprintf("k%d", size)
		if err := s.Put(t.Context(), key, stream(bytes.NewReader(want[:size])), store.PutOptions{IfAbsent: true}); err != nil {
			t.Fatal(err)
		}
		if got := read(t, s, key, store.Range{}); !bytes.Equal(got, want[:size]) {
			t.Errorf("%d bytes came back as %d others", size, len(got))
		}
		err := s.Put(t.Context(), key, stream(bytes.NewReader(want[:size])), store.PutOptions{IfAbsent: true})
		if !errors.Is(err, store.ErrExist) {
			t.Errorf("second create of %d bytes: err = %v, want ErrExist", size, err)
		}
	}
}

func failedPut(t *testing.T, s store.Store) {
	cut := errors.New("cut")
	for _, size := range []int{0, 10, 16 << 20, Big} {
		// An unexpected EOF is how a reader says that its own source is cut.
		for _, cut := range []error{cut, io.ErrUnexpectedEOF} {
			half := io.MultiReader(bytes.NewReader(random(size)), iotest.ErrReader(cut))
			if err := s.Put(t.Context(), "k", half, store.PutOptions{}); !errors.Is(err, cut) {
				t.Fatalf("put of a reader that fails after %d bytes: err = %v, want %v", size, err, cut)
			}
			wantNone(t, s, "k")
		}
	}
	broken := &brokenSeeker{strings.NewReader("0123456789"), cut}
	if err := s.Put(t.Context(), "k", broken, store.PutOptions{}); !errors.Is(err, cut) {
		t.Fatalf("put of a seekable reader that fails: err = %v, want %v", err, cut)
	}
	wantNone(t, s, "k")
	wantList(t, s, "")
	wantNothingStale(t, s)
}

func failedReplace(t *testing.T, s store.Store) {
	put(t, s, "k", "old")
	half := io.MultiReader(strings.NewReader("new"), iotest.ErrReader(errors.New("cut")))
	if err := s.Put(t.Context(), "k", half, store.PutOptions{}); err == nil {
		t.Fatal("put of a broken reader succeeded")
	}
	wantObject(t, s, "k", "old")
}

func ifAbsent(t *testing.T, s store.Store) {
	put(t, s, "k", "first")
	err := s.Put(t.Context(), "k", strings.NewReader("second"), store.PutOptions{IfAbsent: true})
	if !errors.Is(err, store.ErrExist) {
		t.Errorf("err = %v, want ErrExist", err)
	}
	wantObject(t, s, "k", "first")
}

func race(t *testing.T, s store.Store) {
	const creators = 16
	errs := make([]error, creators)
	var wg sync.WaitGroup
	for i := range creators {
		wg.Go(func() {
			body := strings.Repeat(fmt.Sprint(i%10), 10_000+i)
			errs[i] = s.Put(t.Context(), "dir/k", strings.NewReader(body), store.PutOptions{IfAbsent: true})
		})
	}
	wg.Wait()
	winner := -1
	for i, err := range errs {
		switch {
		case err == nil && winner >= 0:
			t.Errorf("creators %d and %d both won", winner, i)
		case err == nil:
			winner = i
		case !errors.Is(err, store.ErrExist):
			t.Errorf("creator %d: %v", i, err)
		}
	}
	if winner < 0 {
		t.Fatal("nobody won")
	}
	wantObject(t, s, "dir/k", strings.Repeat(fmt.Sprint(winner%10), 10_000+winner))
}

func missing(t *testing.T, s store.Store) {
	put(t, s, "dir/file", "x")
	for _, key := range []string{"nothing", "dir", "dir/other", "dir/file/below", "no/such/dir"} {
		wantNone(t, s, key)
	}
	if _, err := s.Get(t.Context(), "nothing", store.Range{Off: 10, Len: 1}); !errors.Is(err, store.ErrNotExist) {
		t.Errorf("a part of a missing object: err = %v, want ErrNotExist", err)
	}
}

func ranges(t *testing.T, s store.Store) {
	put(t, s, "k", "0123456789")
	for _, c := range []struct {
		part store.Range
		want string
	}{
		{store.Range{}, "0123456789"},
		{store.Range{Off: 3}, "3456789"},
		{store.Range{Len: 4}, "0123"},
		{store.Range{Off: 3, Len: 4}, "3456"},
		{store.Range{Off: 9, Len: 1}, "9"},
		{store.Range{Len: 10}, "0123456789"},
		{store.Range{Off: 10}, ""},
	} {
		if got := read(t, s, "k", c.part); string(got) != c.want {
			t.Errorf("%+v = %q, want %q", c.part, got, c.want)
		}
	}
}

func beyond(t *testing.T, s store.Store) {
	put(t, s, "k", "0123456789")
	put(t, s, "empty", "")
	for _, c := range []struct {
		key  string
		part store.Range
	}{
		{"k", store.Range{Off: 11}},
		{"k", store.Range{Off: 10, Len: 1}},
		{"k", store.Range{Off: 5, Len: 6}},
		{"k", store.Range{Len: 11}},
		{"k", store.Range{Off: 100, Len: 100}},
		{"empty", store.Range{Len: 1}},
	} {
		if r, err := s.Get(t.Context(), c.key, c.part); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%s %+v: err = %v, want %v", c.key, c.part, err, io.ErrUnexpectedEOF)
			if err == nil {
				r.Close()
			}
		}
	}
	for _, part := range []store.Range{{Off: -1}, {Len: -1}} {
		if _, err := s.Get(t.Context(), "k", part); err == nil {
			t.Errorf("%+v succeeded", part)
		}
	}
}

func listOrder(t *testing.T, s store.Store) {
	// By bytes, "-" and "." come before "/", digits after it.
	want := []string{"a-b", "a.b", "a/2", "a/2x/1", "a0", "b/1", "c/d/e/f", "c/d/e0", "é", "日本"}
	for _, i := range rand.Perm(len(want)) {
		put(t, s, want[i], want[i])
	}
	wantList(t, s, "", want...)
	wantList(t, s, "a", "a-b", "a.b", "a/2", "a/2x/1", "a0")
	wantList(t, s, "a/", "a/2", "a/2x/1")
	wantList(t, s, "a/2", "a/2", "a/2x/1")
	wantList(t, s, "c/d/e", "c/d/e/f", "c/d/e0")
	wantList(t, s, "c/d/e/", "c/d/e/f")
}

func listMany(t *testing.T, s store.Store) {
	var want []string
	for i := range 1_200 {
		want = append(want, fmt.Sprintf("many/%d/%04d", i/500, i))
	}
	const putters = 8
	errs := make([]error, putters)
	var wg sync.WaitGroup
	for p := range putters {
		wg.Go(func() {
			for i := p; i < len(want) && errs[p] == nil; i += putters {
				errs[p] = s.Put(t.Context(), want[i], strings.NewReader("x"), store.PutOptions{})
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	put(t, s, "many-others", "x")
	put(t, s, "zzz", "x")
	wantList(t, s, "many/", want...)
	wantList(t, s, "many/1/", want[500:1000]...)
	if err := s.Delete(t.Context(), want...); err != nil {
		t.Fatal(err)
	}
	wantList(t, s, "", "many-others", "zzz")
}

func listAfter(t *testing.T, s store.Store) {
	for _, key := range []string{"p/a", "p/b", "p/b.x", "p/c/d", "q"} {
		put(t, s, key, "")
	}
	for after, want := range map[string][]string{
		"":      {"p/a", "p/b", "p/b.x", "p/c/d"},
		"o":     {"p/a", "p/b", "p/b.x", "p/c/d"},
		"p/a":   {"p/b", "p/b.x", "p/c/d"},
		"p/b":   {"p/b.x", "p/c/d"},
		"p/c":   {"p/c/d"},
		"p/c/d": nil,
		"q":     nil,
	} {
		var got []string
		for o, err := range s.List(t.Context(), "p/", after) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, o.Key)
		}
		if !slices.Equal(got, want) {
			t.Errorf("after %q: %q, want %q", after, got, want)
		}
	}
}

func listBreak(t *testing.T, s store.Store) {
	put(t, s, "a", "")
	put(t, s, "b", "")
	for o, err := range s.List(t.Context(), "", "") {
		if err != nil || o.Key != "a" {
			t.Errorf("first is %q, %v", o.Key, err)
		}
		break
	}
}

func listFacts(t *testing.T, s store.Store) {
	put(t, s, "k", "12345")
	for o, err := range s.List(t.Context(), "k", "") {
		if err != nil {
			t.Fatal(err)
		}
		if o.Size != 5 {
			t.Errorf("size %d, want 5", o.Size)
		}
		if age := time.Since(o.Modified); age < -time.Minute || age > time.Minute {
			t.Errorf("modified %v ago", age)
		}
	}
}

func listNothing(t *testing.T, s store.Store) {
	wantList(t, s, "")
	wantList(t, s, "no/such/prefix")
	put(t, s, "file", "x")
	wantList(t, s, "file/")
}

func oddKeys(t *testing.T, s store.Store) {
	keys := []string{"with space", "plus+plus", "per%20cent", "a&b=c?d#e", "quote'\"<x>", "ünï/日本", "~tilde*(!)", "dots..", ".hidden", "comma,;:@$"}
	for _, k := range keys {
		put(t, s, k, k)
	}
	for _, k := range keys {
		wantObject(t, s, k, k)
	}
	slices.Sort(keys)
	wantList(t, s, "", keys...)
	if err := s.Delete(t.Context(), keys...); err != nil {
		t.Fatal(err)
	}
	wantList(t, s, "")
}

func badKeys(t *testing.T, s store.Store) {
	for _, k := range []string{"", ".", "..", "/", "/a", "a/", "a//b", "../a", "a/../b", "a/./b", "a\x00b", "a\nb", "a\xffb", strings.Repeat("x", 2000)} {
		if err := s.Put(t.Context(), k, strings.NewReader("x"), store.PutOptions{}); err == nil {
			t.Errorf("put %q succeeded", k)
		}
		if r, err := s.Get(t.Context(), k, store.Range{}); err == nil {
			r.Close()
			t.Errorf("get %q succeeded", k)
		}
	}
	wantList(t, s, "")
}

func deletes(t *testing.T, s store.Store) {
	put(t, s, "dir/a", "a")
	put(t, s, "dir/b", "b")
	put(t, s, "c", "c")
	if err := s.Delete(t.Context(), "dir/a", "c"); err != nil {
		t.Fatal(err)
	}
	wantNone(t, s, "dir/a")
	wantList(t, s, "", "dir/b")
	if err := s.Delete(t.Context(), "dir/b"); err != nil {
		t.Fatal(err)
	}
	put(t, s, "dir/b", "again")
	wantObject(t, s, "dir/b", "again")
}

func deleteMissing(t *testing.T, s store.Store) {
	if err := s.Delete(t.Context()); err != nil {
		t.Error(err)
	}
	put(t, s, "dir/a", "a")
	if err := s.Delete(t.Context(), "nothing", "dir/b", "no/such", "dir", "dir/a/b"); err != nil {
		t.Error(err)
	}
	wantList(t, s, "", "dir/a")
}

func cancelled(t *testing.T, s store.Store) {
	put(t, s, "old", "old")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Put(ctx, "new", strings.NewReader("new"), store.PutOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("put: err = %v, want %v", err, context.Canceled)
	}
	if err := s.Delete(ctx, "old"); !errors.Is(err, context.Canceled) {
		t.Errorf("delete: err = %v, want %v", err, context.Canceled)
	}
	if _, err := s.Get(ctx, "old", store.Range{}); !errors.Is(err, context.Canceled) {
		t.Errorf("get: err = %v, want %v", err, context.Canceled)
	}
	n := 0
	for _, err := range s.List(ctx, "", "") {
		if n++; !errors.Is(err, context.Canceled) {
			t.Errorf("list: err = %v, want %v", err, context.Canceled)
		}
	}
	if n != 1 {
		t.Errorf("list yielded %d times, want once, an error", n)
	}
	wantList(t, s, "", "old")
	wantObject(t, s, "old", "old")

	// Cancelled in the middle of a stream that has become several parts.
	ctx, cancel = context.WithCancel(t.Context())
	defer cancel()
	body := io.MultiReader(bytes.NewReader(random(Big)), readerFunc(func([]byte) (int, error) {
		cancel()
		return 0, io.EOF
	}))
	if err := s.Put(ctx, "new", body, store.PutOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("put cancelled midway: err = %v, want %v", err, context.Canceled)
	}
	wantList(t, s, "", "old")
	wantNothingStale(t, s)
}

func sweep(t *testing.T, s store.Store) {
	put(t, s, "dir/k", "v")
	wantNothingStale(t, s)
	wantObject(t, s, "dir/k", "v")
}

// wantNothingStale fails if a Put left something that is no object, however
// young.
func wantNothingStale(t *testing.T, s store.Store) {
	t.Helper()
	sw, ok := s.(store.Sweeper)
	if !ok {
		return // a Put leaves nothing in this store, even if it is killed
	}
	if n, err := sw.AbortStale(t.Context(), -time.Hour); n != 0 || err != nil {
		t.Errorf("AbortStale = %d, %v, want 0, nil", n, err)
	}
}

func probe(t *testing.T, s store.Store) {
	put(t, s, "else", "x")
	for _, prefix := range []string{"", "p", "p/q/"} {
		if err := store.Probe(t.Context(), s, prefix); err != nil {
			t.Errorf("Probe(%q) = %v", prefix, err)
		}
	}
	wantList(t, s, "", "else")
}

func put(t *testing.T, s store.Store, key, val string) {
	t.Helper()
	if err := s.Put(t.Context(), key, strings.NewReader(val), store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, s store.Store, key string, part store.Range) []byte {
	t.Helper()
	b, err := store.ReadAll(t.Context(), s, key, part)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func wantObject(t *testing.T, s store.Store, key, want string) {
	t.Helper()
	if got := read(t, s, key, store.Range{}); string(got) != want {
		t.Errorf("%s holds %.40q (%d bytes), want %.40q (%d bytes)", key, got, len(got), want, len(want))
	}
}

func wantNone(t *testing.T, s store.Store, key string) {
	t.Helper()
	r, err := s.Get(t.Context(), key, store.Range{})
	if !errors.Is(err, store.ErrNotExist) {
		t.Errorf("get %q: err = %v, want ErrNotExist", key, err)
	}
	if err == nil {
		r.Close()
	}
}

func wantList(t *testing.T, s store.Store, prefix string, want ...string) {
	t.Helper()
	var got []string
	for o, err := range s.List(t.Context(), prefix, "") {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, o.Key)
	}
	if !slices.Equal(got, want) {
		t.Errorf("list %q = %d keys %.200q, want %d keys %.200q", prefix, len(got), got, len(want), want)
	}
}

// random returns the same bytes for the same size.
func random(size int) []byte {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{}).Read(b)
	return b
}

// stream hides that r can do more than Read.
func stream(r io.Reader) io.Reader { return struct{ io.Reader }{r} }

// A brokenSeeker knows its size and fails in the middle.
type brokenSeeker struct {
	io.ReadSeeker
	err error
}

func (b *brokenSeeker) Read(p []byte) (int, error) {
	at, err := b.Seek(0, io.SeekCurrent)
	if err == nil && at > 0 {
		err = b.err
	}
	if err != nil {
		return 0, err
	}
	return b.ReadSeeker.Read(p[:1])
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
