package repo

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A tombstone ends a backup: from then on nobody lists it, restores it or
// builds on it, and what it holds may be removed.
type tombstone struct {
	Header
	Ref
	DeletedAt time.Time `json:"deleted_at"`
}

const tombstoneName = "deleted.json"

func (r *Repo) tombstone(ctx context.Context, b Ref) (t tombstone, err error) {
	err = r.getSigned(ctx, b.dir()+tombstoneName, "tombstone", &t)
	if err == nil && t.Ref != b {
		err = fmt.Errorf("%s%s: is the tombstone of %s of %s: %w", b.dir(), tombstoneName, t.ID, t.Cluster, fail.Corrupt)
	}
	return t, err
}

// Delete removes a backup, finished or not, and every object it wrote. It may
// be repeated until it succeeds, wherever it was cut. Deleting what is not
// there is fail.NoBackup.
//
// The order makes every moment safe: first a signed tombstone, then a look for
// backups in progress that came to rely on this one (they look for tombstones
// after they say so), then packs, lists, manifest, intent, and last the
// tombstone.
func (r *Repo) Delete(ctx context.Context, b Ref, now time.Time) (objects int, err error) {
	packs, rest, err := r.objects(ctx, b)
	if err != nil {
		return 0, err
	}
	if len(packs)+len(rest) == 0 {
		return 0, fmt.Errorf("backup %s of cluster %s: %w", b.ID, b.Cluster, fail.NoBackup)
	}
	if _, err := r.tombstone(ctx, b); errors.Is(err, store.ErrNotExist) {
		t := tombstone{r.access.header("tombstone"), b, now.UTC().Truncate(time.Second)}
		err = putSigned(ctx, r.st, r.access, b.dir()+tombstoneName, t)
		if err != nil && !errors.Is(err, store.ErrExist) { // another deletion's is as good
			return 0, err
		}
	} else if err != nil {
		return 0, err
	}
	// What was written since, too: a manifest must not be left without its packs.
	if packs, rest, err = r.objects(ctx, b); err != nil {
		return 0, err
	}
	if by, err := r.pinnedBy(ctx, b); err != nil {
		return 0, err
	} else if by != "" {
		return 0, fail.Hint(fmt.Errorf("backup %s is needed by %s, which is being taken: %w", b.ID, by, fail.AlreadyRunning),
			"it is hidden from now on; delete it again when the other one is done")
	}
	if err := r.renewLatest(ctx, b.Cluster); err != nil {
		return 0, err
	}
	last := b.dir() + tombstoneName
	if err := r.st.Delete(ctx, packs...); err != nil {
		return 0, wrap("delete packs of", string(b.ID), err)
	}
	for _, name := range []string{"tree-", "draft", "manifest", "intent", ""} { // "": whatever else there is
		var keys []string
		for _, key := range rest {
			if strings.HasPrefix(strings.TrimPrefix(key, b.dir()), name) && key != last {
				keys = append(keys, key)
			}
		}
		if err := r.st.Delete(ctx, keys...); err != nil {
			return 0, wrap("delete", b.dir()+name, err)
		}
	}
	return len(packs) + len(rest) - 1, wrap("delete", last, r.st.Delete(ctx, last))
}

// objects lists the keys of all that a backup wrote: its packs, and the rest.
func (r *Repo) objects(ctx context.Context, b Ref) (packs, rest []string, err error) {
	for _, prefix := range []string{b.packs(), b.dir()} {
		for o, err := range r.st.List(ctx, prefix, "") {
			if err != nil {
				return nil, nil, wrap("list", prefix, err)
			}
			if prefix == b.packs() {
				packs = append(packs, o.Key)
			} else {
				rest = append(rest, o.Key)
			}
		}
	}
	return packs, rest, nil
}

// pinnedBy returns a backup in progress that pins b, or "".
func (r *Repo) pinnedBy(ctx context.Context, b Ref) (ID, error) {
	all, err := r.Backups(ctx, b.Cluster)
	if err != nil {
		return "", err
	}
	for _, other := range all {
		if !other.Unfinished {
			continue
		}
		var in Intent
		err := r.getSigned(ctx, other.dir()+"intent.json", "intent", &in)
		if errors.Is(err, store.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", err
		}
		for _, pin := range in.Pins {
			if pin == b.ID {
				return other.ID, nil
			}
		}
	}
	return "", nil
}
