package s3_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/store"
)

func TestLocksOnlyBecomeLonger(t *testing.T) {
	srv, err := lab.StartS3(t.Context(), lab.S3Options{Versions: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Stop() })
	b := open(t, options(srv))
	if err := b.Put(t.Context(), "a/b", strings.NewReader("x"), store.PutOptions{IfAbsent: true}); err != nil {
		t.Fatal(err)
	}
	is := func(what string, want store.Lock) {
		t.Helper()
		if got, err := b.Locked(t.Context(), "a/b"); err != nil || !got.Until.Equal(want.Until) || got.Mode != want.Mode {
			t.Errorf("%s: locked %+v, %v, want %+v", what, got, err, want)
		}
	}
	lock := func(in time.Duration, mode store.LockMode) store.Lock {
		t.Helper()
		l := store.Lock{Until: time.Now().Add(in).UTC().Truncate(time.Second), Mode: mode}
		if err := b.Lock(t.Context(), "a/b", l); err != nil {
			t.Errorf("lock for %v in mode %s: %v", in, mode, err)
		}
		return l
	}
	is("at first", store.Lock{})
	first := lock(2*time.Hour, store.Governance)
	is("first", first)
	lock(time.Hour, store.Governance)
	is("after a shorter one", first)
	longer := lock(3*time.Hour, store.Compliance)
	is("after a longer one of the other mode", store.Lock{Until: longer.Until, Mode: store.Governance})
	longer = lock(4*time.Hour, store.Governance)
	is("after a longer one", longer)

	if err := b.Delete(t.Context(), "a/b"); err != nil { // which marks it, and destroys nothing
		t.Fatal(err)
	}
	for _, key := range []string{"a/b", "none"} {
		_, err := b.Locked(t.Context(), key)
		if lerr := b.Lock(t.Context(), key, longer); !errors.Is(err, store.ErrNotExist) || !errors.Is(lerr, store.ErrNotExist) {
			t.Errorf("%s, which is not there: %v, %v", key, err, lerr)
		}
	}
}

func TestABucketWithoutObjectLockSaysSo(t *testing.T) {
	b := open(t, options(lab.S3ForTest(t)))
	if err := b.Put(t.Context(), "k", strings.NewReader("x"), store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	_, err := b.Locked(t.Context(), "k")
	lerr := b.Lock(t.Context(), "k", store.Lock{Until: time.Now().Add(time.Hour), Mode: store.Governance})
	if !errors.Is(err, fail.StoreUnfit) || !errors.Is(lerr, fail.StoreUnfit) {
		t.Errorf("%v, %v, want store-unfit", err, lerr)
	}
}
