// Package fault breaks stores on purpose, for tests.
package fault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strings"
	"sync"

	"github.com/pgkeep/pgkeep/internal/store"
)

// ErrInjected is the error of an injected failure.
var ErrInjected = errors.New("injected failure")

// A Store passes calls on to another Store, writes each one down, and fails
// the call numbered At (from 1). At 0 fails none. It may be used concurrently,
// its fields set before. Only the Store's own methods pass: a Sweeper does not.
type Store struct {
	store.Store
	At    int
	After bool // fail after the call took effect: the lost acknowledgement

	// Before, if set, sees every call first, and fails those for which it
	// returns an error: an outage, a denial of some keys. op is put, get,
	// list or delete, key is the key, the prefix, or the keys with spaces
	// between them.
	Before func(op, key string) error

	mu  sync.Mutex
	log []string
}

// Log returns the calls so far, one a line: what golden files hold.
func (s *Store) Log() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.log, "\n") + "\n"
}

// Hit reports whether the failure At has been injected.
func (s *Store) Hit() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.At > 0 && len(s.log) >= s.At
}

// Put implements store.Store.
func (s *Store) Put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	return s.call("put", key, func() error { return s.Store.Put(ctx, key, r, opt) })
}

// Get implements store.Store.
func (s *Store) Get(ctx context.Context, key string, part store.Range) (io.ReadCloser, error) {
	var rc io.ReadCloser
	err := s.call("get", key, func() (err error) { rc, err = s.Store.Get(ctx, key, part); return err })
	if err != nil && rc != nil {
		rc.Close()
		rc = nil
	}
	return rc, err
}

// List implements store.Store. The call is the beginning of the loop.
func (s *Store) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		if err := s.call("list", prefix, func() error { return nil }); err != nil {
			yield(store.Object{}, err)
			return
		}
		s.Store.List(ctx, prefix, after)(yield)
	}
}

// Delete implements store.Store.
func (s *Store) Delete(ctx context.Context, keys ...string) error {
	return s.call("delete", strings.Join(keys, " "), func() error { return s.Store.Delete(ctx, keys...) })
}

func (s *Store) call(op, key string, do func() error) error {
	s.mu.Lock()
	s.log = append(s.log, op+" "+key)
	broken := len(s.log) == s.At
	s.mu.Unlock()
	if s.Before != nil {
		if err := s.Before(op, key); err != nil {
			return err
		}
	}
	if broken && !s.After {
		return fmt.Errorf("%s %s: %w", op, key, ErrInjected)
	}
	err := do()
	if broken {
		return fmt.Errorf("%s %s: %w", op, key, ErrInjected)
	}
	return err
}
