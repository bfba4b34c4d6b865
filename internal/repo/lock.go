package repo

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

// Shelves is on how many shelves the objects of a cluster stand.
const Shelves = 32

// A Shelf is a share of all objects that stand of a cluster, with those of the
// repository itself. They are locked together, the oldest last: so the lock of that
// one says for how long at least all those are locked that were there then. What
// came later has the lock that the bucket gives by itself.
type Shelf struct {
	Objects int
	Until   time.Time // when the lock of the oldest ends; zero: it has none

	keys []string // newest first
}

// Shelves lists all objects that stand of a cluster, and reads a lock for each
// shelf. It fails with fail.StoreUnfit where nothing can be locked.
func (r *Repo) Shelves(ctx context.Context, cluster string) ([]Shelf, error) {
	locker, err := r.locker()
	if err != nil {
		return nil, err
	}
	var on [Shelves][]store.Object
	put := func(o store.Object) {
		n := crc32.ChecksumIEEE([]byte(o.Key)) % Shelves
		on[n] = append(on[n], o)
	}
	put(store.Object{Key: markerKey}) // older than all others, and roles may not list it
	for _, prefix := range []string{"keys/", "names/" + cluster, clusterPrefix(cluster)} {
		for o, err := range r.st.List(ctx, prefix, "") {
			if err != nil {
				return nil, wrap("list", prefix, err)
			}
			name, inside := strings.CutPrefix(o.Key, clusterPrefix(cluster))
			if inside && (strings.HasPrefix(name, "latest-") || strings.HasPrefix(name, "clock-") || strings.Contains(name, "/probe/")) || !inside && strings.HasPrefix(o.Key, "names/") && o.Key != prefix {
				continue // advice, and what is there for a moment
			}
			put(o)
		}
	}
	shelves := make([]Shelf, 0, Shelves)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, objects := range on {
		if len(objects) == 0 {
			continue
		}
		slices.SortStableFunc(objects, func(a, b store.Object) int { return b.Modified.Compare(a.Modified) })
		s := Shelf{Objects: len(objects)}
		for _, o := range objects {
			s.keys = append(s.keys, o.Key)
		}
		shelves = append(shelves, s)
		of := &shelves[len(shelves)-1] // of an array that never moves
		g.Go(func() error {
			lock, err := locker.Locked(gctx, of.keys[of.Objects-1])
			if errors.Is(err, store.ErrNotExist) { // it went: the next run asks another
				return nil
			}
			of.Until = lock.Until
			return err
		})
	}
	return shelves, g.Wait()
}

// Lock locks the objects of a shelf anew. What went since is passed over. It may be
// repeated, wherever it was cut.
func (r *Repo) Lock(ctx context.Context, s Shelf, lock store.Lock) error {
	locker, err := r.locker()
	if err != nil {
		return err
	}
	one := func(ctx context.Context, key string) error {
		if err := locker.Lock(ctx, key, lock); !errors.Is(err, store.ErrNotExist) {
			return err
		}
		return nil
	}
	last := len(s.keys) - 1
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for _, key := range s.keys[:last] {
		g.Go(func() error { return one(gctx, key) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	return one(ctx, s.keys[last])
}

// TryLock finds out whether locks can be made longer: it makes that of the
// repository's marker a second longer, or locks it for a minute.
func (r *Repo) TryLock(ctx context.Context, mode store.LockMode, now time.Time) error {
	locker, err := r.locker()
	if err != nil {
		return err
	}
	lock, err := locker.Locked(ctx, markerKey)
	if err != nil {
		return err
	}
	if lock.Until = lock.Until.Add(time.Second); lock.Until.Before(now) {
		lock = store.Lock{Until: now.Add(time.Minute).UTC().Truncate(time.Second), Mode: mode}
	}
	return locker.Lock(ctx, markerKey, lock)
}

func (r *Repo) locker() (store.Locker, error) {
	if l, ok := r.st.(store.Locker); ok {
		return l, nil
	}
	return nil, fail.Hint(fmt.Errorf("this store can lock nothing: %w", fail.StoreUnfit), "take retention.lock out of the configuration")
}
