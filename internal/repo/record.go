package repo

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A Record is a backup with all that decides whether it is kept. Unlike a list,
// it also shows those that are marked as deleted.
type Record struct {
	Listed
	// Intent of one that is unfinished. Zero: there is none.
	Intent Intent
	// Deleted is nil for one that is not.
	Deleted *Tombstone
	Holds   []Hold
	// Proof is the newest restore test that can be believed and came to an answer;
	// nil: there is none.
	Proof *Proof
}

// Records returns all backups of a cluster of which there are documents, oldest
// first. It fails rather than leave one out.
func (r *Repo) Records(ctx context.Context, cluster string) ([]Record, error) {
	prefix := clusterPrefix(cluster) + "backups/"
	var all []Record
	var names [][]string
	for o, err := range r.st.List(ctx, prefix, "") {
		if err != nil {
			return nil, wrap("list", prefix, err)
		}
		id, name, ok := strings.Cut(strings.TrimPrefix(o.Key, prefix), "/")
		if !ok || !idForm.MatchString(id) {
			continue
		}
		if n := len(all); n == 0 || all[n-1].ID != ID(id) {
			all, names = append(all, Record{Listed: Listed{Manifest: Manifest{Ref: Ref{cluster, ID(id)}}}}), append(names, nil)
		}
		names[len(names)-1] = append(names[len(names)-1], name)
	}
	gone := make([]bool, len(all))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i := range all {
		g.Go(func() (err error) {
			gone[i], err = r.record(gctx, &all[i], names[i])
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var there []Record
	for i, b := range all {
		if !gone[i] {
			there = append(there, b)
		}
	}
	return there, nil
}

// record reads what the documents of those names say; gone tells that it is no
// backup any more: a deletion has come to its end.
func (r *Repo) record(ctx context.Context, b *Record, names []string) (gone bool, err error) {
	b.Unfinished = !slices.Contains(names, "manifest.json")
	ref := b.Ref
	for _, name := range slices.Backward(names) { // the newest proof first
		var err error
		test, ok := strings.CutPrefix(strings.TrimSuffix(name, ".json"), proofPrefix)
		hold, held := strings.CutPrefix(strings.TrimSuffix(name, ".json"), holdPrefix)
		switch {
		case name == tombstoneName:
			var t Tombstone
			if t, err = r.tombstone(ctx, ref); err == nil {
				b.Deleted = &t
			} else if errors.Is(err, store.ErrNotExist) {
				var left []string
				if left, err = r.names(ctx, ref); err == nil && alone(left) {
					return true, nil
				}
			}
		case name == "manifest.json":
			var m Manifest
			if m, err = r.manifest(ctx, ref); err == nil {
				b.Manifest = m
				if alone(names) {
					return true, nil
				}
			}
		case name == "intent.json" && b.Unfinished:
			err = r.getSigned(ctx, ref.dir()+name, "intent", &b.Intent)
		case held:
			var h Hold
			if h, err = r.hold(ctx, ref, hold); err == nil {
				b.Holds = append(b.Holds, h)
			} else if errors.Is(err, store.ErrNotExist) {
				err = nil
			}
		case ok && b.Proof == nil && idForm.MatchString(test):
			p, perr := r.proof(ctx, ref, ID(test))
			switch {
			case perr == nil && !p.Trouble:
				b.Proof = &p
			case perr != nil && !damaged(perr):
				err = perr
			}
		}
		switch {
		case err == nil:
		case !damaged(err), ctx.Err() != nil:
			return false, err // the store's trouble, not this backup's
		case b.Err == nil:
			b.Err = err
		}
	}
	b.Ref = ref
	return false, nil
}

// StoreClock returns by how much the store's clock is ahead of now, to the
// second. To learn it, it writes an object and removes it.
func (r *Repo) StoreClock(ctx context.Context, cluster string, now func() time.Time) (ahead time.Duration, err error) {
	key := clusterPrefix(cluster) + "clock-" + randomHex(8)
	if err := r.st.Put(ctx, key, strings.NewReader(""), store.PutOptions{IfAbsent: true}); err != nil {
		return 0, wrap("write", key, err)
	}
	defer func() {
		derr := wrap("delete", key, r.st.Delete(context.WithoutCancel(ctx), key))
		if !errors.Is(derr, fail.StoreDenied) { // locked like all others: it is of no size
			err = errors.Join(err, derr)
		}
	}()
	for o, err := range r.st.List(ctx, key, "") {
		if err != nil {
			return 0, wrap("list", key, err)
		}
		if o.Key == key {
			return o.Modified.Sub(now()), nil
		}
	}
	return 0, wrap("list", key, fail.StoreUnfit)
}
