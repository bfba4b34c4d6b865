package s3_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/store/s3"
	"github.com/pgkeep/pgkeep/internal/storetest"
)

// The suite, against a real service over TLS: with a prefix, and as the only
// user of a bucket.
func TestConformance(t *testing.T) {
	srv := lab.S3ForTest(t)
	var n atomic.Int64
	storetest.Run(t, func(t *testing.T) store.Store {
		opt := options(srv)
		opt.Prefix = fmt.Sprintf("/a prefix/%d/", n.Add(1))
		return open(t, opt)
	})
	// A large object that can seek is cut into parts too, from where it lies.
	t.Run("in parts", func(t *testing.T) {
		opt := options(srv)
		opt.Prefix, opt.MaxPut = "parts", 1<<20
		b := open(t, opt)
		want := bytes.Repeat([]byte("0123456789abcde\n"), 40<<20/16)
		r := bytes.NewReader(append([]byte("skip"), want...))
		r.Seek(4, io.SeekStart)
		if err := b.Put(t.Context(), "k", r, store.PutOptions{IfAbsent: true}); err != nil {
			t.Fatal(err)
		}
		got, err := store.ReadAll(t.Context(), b, "k", store.Range{})
		if err != nil || !bytes.Equal(got, want) {
			t.Errorf("%d bytes came back as %d (%v)", len(want), len(got), err)
		}
		if err := b.Put(t.Context(), "k", bytes.NewReader(want), store.PutOptions{IfAbsent: true}); !errors.Is(err, store.ErrExist) {
			t.Errorf("second create: err = %v, want ErrExist", err)
		}
		broken := struct{ io.ReadSeeker }{bytes.NewReader(want)}
		if err := b.Put(t.Context(), "broken", &failingAt{broken, 30 << 20}, store.PutOptions{}); !errors.Is(err, errCut) {
			t.Errorf("reader that fails midway: err = %v, want %v", err, errCut)
		}
		if n, err := b.AbortStale(t.Context(), -time.Hour); n != 0 || err != nil {
			t.Errorf("AbortStale = %d, %v, want 0, nil", n, err)
		}
	})
}

func TestStaleUploadsAreAborted(t *testing.T) {
	srv := lab.S3ForTest(t)
	proxy := lab.ProxyForTest(t, srv.Addr)
	opt := options(srv)
	opt.Endpoint, opt.Prefix, opt.Patience = "https://"+proxy.Addr, "p", 300*time.Millisecond
	b := open(t, opt)
	// The connection goes away after two parts, and does not come back in time
	// for an abort: as if the process had been killed.
	body := io.MultiReader(bytes.NewReader(make([]byte, 33<<20)), readerFunc(func([]byte) (int, error) {
		return 0, errors.Join(errCut, proxy.Set(lab.Refuse))
	}))
	if err := b.Put(t.Context(), "k", body, store.PutOptions{}); !errors.Is(err, errCut) {
		t.Fatalf("err = %v, want %v", err, errCut)
	}
	if err := proxy.Set(lab.Pass); err != nil {
		t.Fatal(err)
	}
	if n, err := b.AbortStale(t.Context(), time.Hour); n != 0 || err != nil {
		t.Errorf("young upload: AbortStale = %d, %v, want 0, nil", n, err)
	}
	opt.Prefix = "other"
	if n, err := open(t, opt).AbortStale(t.Context(), -time.Hour); n != 0 || err != nil {
		t.Errorf("another prefix: AbortStale = %d, %v, want 0, nil", n, err)
	}
	if n, err := b.AbortStale(t.Context(), -time.Hour); n != 1 || err != nil {
		t.Errorf("old upload: AbortStale = %d, %v, want 1, nil", n, err)
	}
	if n, err := b.AbortStale(t.Context(), -time.Hour); n != 0 || err != nil {
		t.Errorf("again: AbortStale = %d, %v, want 0, nil", n, err)
	}
}

// Whatever the outage is, a request that was under way succeeds after it.
func TestAnOutageIsWaitedFor(t *testing.T) {
	srv := lab.S3ForTest(t)
	for name, mode := range map[string]lab.ProxyMode{"refuse": lab.Refuse, "reset": lab.Reset, "black hole": lab.BlackHole} {
		t.Run(name, func(t *testing.T) {
			proxy := lab.ProxyForTest(t, srv.Addr)
			opt := options(srv)
			opt.Endpoint, opt.Prefix, opt.Stall = "https://"+proxy.Addr, name, 500*time.Millisecond
			b := open(t, opt)
			want := bytes.Repeat([]byte("pgkeep!\n"), 4<<20/8)
			if err := b.Put(t.Context(), "before", bytes.NewReader(want), store.PutOptions{}); err != nil {
				t.Fatal(err)
			}
			r, err := b.Get(t.Context(), "before", store.Range{Off: 1})
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			if _, err := io.ReadFull(r, make([]byte, 99)); err != nil {
				t.Fatal(err)
			}

			if err := proxy.Set(mode); err != nil {
				t.Fatal(err)
			}
			var wg sync.WaitGroup
			over := make(chan struct{})
			wg.Go(func() {
				if err := b.Put(t.Context(), "during", bytes.NewReader(want), store.PutOptions{}); err != nil {
					t.Errorf("put: %v", err)
				}
			})
			wg.Go(func() {
				if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, want[100:]) {
					t.Errorf("get goes on with %d bytes (%v), want %d", len(got), err, len(want)-100)
				}
			})
			wg.Go(func() {
				<-time.After(700 * time.Millisecond) // an outage has a duration
				if err := proxy.Set(lab.Pass); err != nil {
					t.Error(err)
				}
				close(over)
			})
			wg.Wait()
			<-over
			if got, err := store.ReadAll(t.Context(), b, "during", store.Range{}); err != nil || !bytes.Equal(got, want) {
				t.Errorf("it holds %d bytes (%v), want %d", len(got), err, len(want))
			}
		})
	}
}

// A reader that goes on after an outage does not go on in another object.
func TestAReplacedObjectIsNotMixedWithTheOld(t *testing.T) {
	srv := lab.S3ForTest(t)
	proxy := lab.ProxyForTest(t, srv.Addr)
	opt := options(srv)
	direct := open(t, opt)
	opt.Endpoint = "https://" + proxy.Addr
	b := open(t, opt)
	old := bytes.Repeat([]byte("old!"), 32<<20/4)
	if err := direct.Put(t.Context(), "k", bytes.NewReader(old), store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	r, err := b.Get(t.Context(), "k", store.Range{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := io.ReadFull(r, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	if err := direct.Put(t.Context(), "k", bytes.NewReader(bytes.ToUpper(old)), store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(proxy.Set(lab.Reset), proxy.Set(lab.Pass)); err != nil {
		t.Fatal(err)
	}
	rest, err := io.ReadAll(r)
	if err == nil || !strings.Contains(err.Error(), "replaced") {
		t.Errorf("err = %v, want one that says that the object was replaced", err)
	}
	if bytes.Contains(rest, []byte("OLD!")) {
		t.Error("the new object follows the old one")
	}
}

func TestAStoreThatStaysAwayIsDown(t *testing.T) {
	srv := lab.S3ForTest(t)
	opt := options(srv)
	opt.Patience = 300 * time.Millisecond
	b := open(t, opt)
	srv.Kill()
	err := b.Put(t.Context(), "k", strings.NewReader("x"), store.PutOptions{})
	if !errors.Is(err, fail.StoreDown) || !strings.Contains(err.Error(), "connection refused") || strings.Contains(err.Error(), "https://") {
		t.Errorf("err = %v, want store-down, the cause and no URL", err)
	}
	opt.Endpoint = "https://no-such-host.invalid"
	err = open(t, opt).Put(t.Context(), "k", strings.NewReader("x"), store.PutOptions{})
	if !errors.Is(err, fail.StoreDown) {
		t.Errorf("no such host: err = %v, want store-down", err)
	}
	// The context's end comes before patience does.
	opt = options(srv)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	err = open(t, opt).Put(ctx, "k", strings.NewReader("x"), store.PutOptions{})
	if !errors.Is(err, fail.StoreDown) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("err = %v, want store-down and the deadline", err)
	}
}

func TestWrongKeysAreDenied(t *testing.T) {
	srv := lab.S3ForTest(t)
	for _, change := range []func(*s3.Options){
		func(o *s3.Options) { o.SecretAccessKey = "wrong" },
		func(o *s3.Options) { o.AccessKeyID = "NOBODY" },
	} {
		opt := options(srv)
		change(&opt)
		b := open(t, opt)
		began := time.Now()
		for op, err := range map[string]error{
			"put":    b.Put(t.Context(), "k", strings.NewReader("x"), store.PutOptions{IfAbsent: true}),
			"get":    get(t.Context(), b, "k"),
			"list":   list(t.Context(), b, ""),
			"delete": b.Delete(t.Context(), "k"),
		} {
			if !errors.Is(err, fail.StoreDenied) || errors.Is(err, store.ErrNotExist) || !strings.Contains(fail.HintOf(err), "access key") {
				t.Errorf("%s: err = %v, hint %q, want store-denied and a hint", op, err, fail.HintOf(err))
			}
			if err != nil && strings.Contains(err.Error(), srv.SecretAccessKey) {
				t.Errorf("%s: the error holds the secret", op)
			}
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("refused after %v: it was tried again", took)
		}
	}
}

func TestAMissingBucketIsNoMissingObject(t *testing.T) {
	srv := lab.S3ForTest(t)
	opt := options(srv)
	opt.Bucket = "elsewhere"
	b := open(t, opt)
	for op, err := range map[string]error{
		"put":    b.Put(t.Context(), "k", strings.NewReader("x"), store.PutOptions{}),
		"get":    get(t.Context(), b, "k"),
		"list":   list(t.Context(), b, ""),
		"delete": b.Delete(t.Context(), "k"),
		"sweep":  func() error { _, err := b.AbortStale(t.Context(), 0); return err }(),
	} {
		if !errors.Is(err, fail.BadConfig) || errors.Is(err, store.ErrNotExist) || !strings.Contains(fail.HintOf(err), "bucket") {
			t.Errorf("%s: err = %v, hint %q, want bad-config that speaks of the bucket", op, err, fail.HintOf(err))
		}
	}
}

// The authorities in CAFile count, and no others, whatever the environment says.
func TestOnlyTheCAFileVouches(t *testing.T) {
	srv := lab.S3ForTest(t)
	other, err := lab.NewCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"AWS_CA_BUNDLE", "SSL_CERT_FILE"} {
		t.Setenv(name, other.File)
	}
	if err := get(t.Context(), open(t, options(srv)), "k"); !errors.Is(err, store.ErrNotExist) {
		t.Errorf("right CA: err = %v, want ErrNotExist", err)
	}
	// Keys from the environment take the way through the SDK's own configuration.
	opt := options(srv)
	t.Setenv("AWS_ACCESS_KEY_ID", opt.AccessKeyID)
	t.Setenv("AWS_SECRET_ACCESS_KEY", opt.SecretAccessKey)
	opt.AccessKeyID, opt.SecretAccessKey = "", ""
	if err := get(t.Context(), open(t, opt), "k"); !errors.Is(err, store.ErrNotExist) {
		t.Errorf("right CA, keys of the environment: err = %v, want ErrNotExist", err)
	}
	for _, opt := range []s3.Options{opt, options(srv)} {
		t.Setenv("SSL_CERT_FILE", srv.CAFile)
		opt.CAFile = other.File
		err := get(t.Context(), open(t, opt), "k")
		if !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "ca_file") {
			t.Errorf("wrong CA: err = %v, hint %q, want bad-config that speaks of ca_file", err, fail.HintOf(err))
		}
	}
}

func TestOpenRefuses(t *testing.T) {
	for _, name := range []string{"AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"} {
		t.Setenv(name, "/nonexistent")
	}
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	for name, c := range map[string]struct {
		opt  s3.Options
		want fail.Kind
	}{
		"no bucket":        {s3.Options{AccessKeyID: "a", SecretAccessKey: "b"}, fail.BadConfig},
		"half a key":       {s3.Options{Bucket: "b", AccessKeyID: "a"}, fail.BadConfig},
		"no scheme":        {s3.Options{Bucket: "b", AccessKeyID: "a", SecretAccessKey: "b", Endpoint: "localhost:9000"}, fail.BadConfig},
		"no CA file":       {s3.Options{Bucket: "b", AccessKeyID: "a", SecretAccessKey: "b", CAFile: "/nonexistent"}, fail.BadConfig},
		"CA file without":  {s3.Options{Bucket: "b", AccessKeyID: "a", SecretAccessKey: "b", CAFile: "s3_test.go"}, fail.BadConfig},
		"nothing anywhere": {s3.Options{Bucket: "b"}, fail.StoreDenied},
	} {
		_, err := s3.Open(t.Context(), c.opt)
		if fail.KindOf(err) != c.want {
			t.Errorf("%s: err = %v, want %s", name, err, c.want)
		}
	}
}

func TestOptionsDoNotPrintKeys(t *testing.T) {
	opt := s3.Options{Bucket: "b", AccessKeyID: "AKIA", SecretAccessKey: "canary", SessionToken: "canary"}
	if got := fmt.Sprintf("%v %+v %#v %s", opt, opt, opt, opt); strings.Contains(got, "canary") {
		t.Errorf("printed: %s", got)
	}
}

func options(srv *lab.S3) s3.Options {
	return s3.Options{
		Bucket: srv.Bucket, Endpoint: srv.Endpoint, Region: srv.Region, PathStyle: true, CAFile: srv.CAFile,
		AccessKeyID: srv.AccessKeyID, SecretAccessKey: srv.SecretAccessKey,
	}
}

func open(t testing.TB, opt s3.Options) *s3.Bucket {
	t.Helper()
	b, err := s3.Open(t.Context(), opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func get(ctx context.Context, b *s3.Bucket, key string) error {
	_, err := store.ReadAll(ctx, b, key, store.Range{})
	return err
}

func list(ctx context.Context, b *s3.Bucket, prefix string) error {
	for _, err := range b.List(ctx, prefix, "") {
		if err != nil {
			return err
		}
	}
	return nil
}

var errCut = errors.New("cut")

// failingAt fails to read at an offset and after.
type failingAt struct {
	io.ReadSeeker
	at int64
}

func (f *failingAt) Read(p []byte) (int, error) {
	if at, _ := f.Seek(0, io.SeekCurrent); at >= f.at {
		return iotest.ErrReader(errCut).Read(p)
	}
	return f.ReadSeeker.Read(p)
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }
