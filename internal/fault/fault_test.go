package fault_test

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/storetest"
)

func TestAStoreWithoutFaultsIsOne(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return &fault.Store{Store: new(store.Mem)} })
}

func TestTheFailedCallTookEffectOnlyAfter(t *testing.T) {
	for _, after := range []bool{false, true} {
		mem := new(store.Mem)
		s := &fault.Store{Store: mem, At: 2, After: after}
		if err := put(t, s, "a"); err != nil || s.Hit() {
			t.Errorf("call 1: %v, hit %v", err, s.Hit())
		}
		if err := put(t, s, "b"); !errors.Is(err, fault.ErrInjected) || !s.Hit() {
			t.Errorf("call 2: %v, hit %v", err, s.Hit())
		}
		if err := put(t, s, "c"); err != nil {
			t.Errorf("call 3: %v", err)
		}
		_, err := mem.Get(t.Context(), "b", store.Range{})
		if errors.Is(err, store.ErrNotExist) == after {
			t.Errorf("after=%v: the object of the failed call: %v", after, err)
		}
		if got, want := s.Log(), "put a\nput b\nput c\n"; got != want {
			t.Errorf("log = %q, want %q", got, want)
		}
	}
}

func TestBeforeMakesAnOutage(t *testing.T) {
	down := errors.New("down")
	s := &fault.Store{Store: new(store.Mem), Before: func(op, key string) error {
		if op == "put" && strings.HasPrefix(key, "data/") {
			return fmt.Errorf("%s: %w", key, down)
		}
		return nil
	}}
	if err := put(t, s, "data/1"); !errors.Is(err, down) {
		t.Errorf("err = %v, want %v", err, down)
	}
	if err := put(t, s, "other"); err != nil {
		t.Error(err)
	}
}

func TestConcurrentCallsAreAllLogged(t *testing.T) {
	s := &fault.Store{Store: new(store.Mem), At: 50}
	var wg sync.WaitGroup
	var mu sync.Mutex
	failed := 0
	for i := range 100 {
		wg.Go(func() {
			if err := put(t, s, fmt.Sprint(i)); err != nil {
				mu.Lock()
				failed++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if n := strings.Count(s.Log(), "\n"); n != 100 || failed != 1 {
		t.Errorf("%d calls logged, %d failed, want 100, 1", n, failed)
	}
}

func put(t *testing.T, s store.Store, key string) error {
	return s.Put(t.Context(), key, strings.NewReader(key), store.PutOptions{})
}
