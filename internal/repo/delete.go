package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
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

// Delete removes a backup, finished or not, and every object that nobody else
// needs: packs that another backup refers to stay, and go with the last that
// does. It also clears away what earlier deletions had to leave. It may be
// repeated until it succeeds, wherever it was cut, and returns how many objects
// were removed. Deleting what is not there is fail.NoBackup.
//
// A backup that one in progress pins is hidden at once, and removed by a
// deletion after that one is done.
func (r *Repo) Delete(ctx context.Context, b Ref, now time.Time) (objects int, err error) {
	found := false
	for _, err := range r.st.List(ctx, b.dir(), "") { // packs alone are what others use of a deleted one
		if err != nil {
			return 0, wrap("list", b.dir(), err)
		}
		found = true
		break
	}
	if !found {
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
	if err := r.renewLatest(ctx, b.Cluster); err != nil {
		return 0, err
	}
	return r.sweep(ctx, b.Cluster)
}

// sweep removes what tombstones allow: of each deleted backup that nobody pins
// its packs that nobody needs, then its lists, draft, manifest, intent, and last
// the tombstone; and packs that deletions before left for others.
//
// It may run beside backups and other sweeps, for of two looks the later decides:
// packs are listed before backups, so that the intent of who wrote them is seen;
// tombstones are written before it begins, and who takes a backup looks for them
// after it said what it pins.
func (r *Repo) sweep(ctx context.Context, cluster string) (removed int, err error) {
	packs, err := r.packsByOwner(ctx, cluster)
	if err != nil {
		return 0, err
	}
	all, err := r.standing(ctx, cluster)
	if err != nil {
		return 0, err
	}
	pinned := make(map[ID]bool)
	for _, b := range all {
		for _, pin := range b.pins {
			pinned[pin] = true
		}
	}
	var roots, dead []standing
	for _, b := range all {
		if b.deleted && !pinned[b.ID] {
			dead = append(dead, b)
			continue
		}
		delete(packs, b.ID) // all that it wrote stays
		if b.manifest {
			roots = append(roots, b)
		}
	}
	if err := r.keepUsed(ctx, roots, packs); err != nil {
		return 0, err
	}
	for _, id := range slices.Sorted(maps.Keys(packs)) {
		if err := r.st.Delete(ctx, packs[id]...); err != nil {
			return removed, wrap("delete packs of", string(id), err)
		}
		removed += len(packs[id])
	}
	for _, b := range dead {
		n, err := r.removeDocuments(ctx, b.Ref)
		if removed += n; err != nil {
			return removed, err
		}
	}
	return removed, nil
}

// A standing is a backup of which there are documents.
type standing struct {
	Ref
	deleted  bool // there is a tombstone
	manifest bool
	pins     []ID // of one in progress
}

// packsByOwner lists the keys of all packs of a cluster by who wrote them.
func (r *Repo) packsByOwner(ctx context.Context, cluster string) (map[ID][]string, error) {
	prefix := clusterPrefix(cluster) + "packs/"
	packs := make(map[ID][]string)
	for o, err := range r.st.List(ctx, prefix, "") {
		if err != nil {
			return nil, wrap("list", prefix, err)
		}
		if id := packOwner(o.Key); id != "" {
			packs[id] = append(packs[id], o.Key)
		}
	}
	return packs, nil
}

// standing lists the backups of a cluster of which there are documents, also the
// deleted ones. A tombstone that cannot be believed deletes nothing.
func (r *Repo) standing(ctx context.Context, cluster string) (all []standing, err error) {
	prefix := clusterPrefix(cluster) + "backups/"
	for o, err := range r.st.List(ctx, prefix, "") {
		if err != nil {
			return nil, wrap("list", prefix, err)
		}
		id, name, ok := strings.Cut(strings.TrimPrefix(o.Key, prefix), "/")
		if !ok || !idForm.MatchString(id) {
			continue
		}
		if n := len(all); n == 0 || all[n-1].ID != ID(id) {
			all = append(all, standing{Ref: Ref{cluster, ID(id)}})
		}
		b := &all[len(all)-1]
		switch name {
		case "manifest.json":
			b.manifest = true
		case tombstoneName:
			_, err := r.tombstone(ctx, b.Ref)
			if err != nil && !damaged(err) {
				return nil, err
			}
			b.deleted = err == nil || errors.Is(err, store.ErrNotExist)
		}
	}
	for i := range all {
		b := &all[i]
		if b.deleted || b.manifest {
			continue // its own packs and its trees say what it needs; or it needs nothing
		}
		var in Intent
		err := r.getSigned(ctx, b.dir()+"intent.json", "intent", &in)
		if errors.Is(err, store.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err // it may pin anything
		}
		b.pins = in.Pins
	}
	return all, nil
}

// keepUsed takes out of packs what the trees of backups refer to. Where that
// cannot be read, everything they may refer to is taken out.
func (r *Repo) keepUsed(ctx context.Context, backups []standing, packs map[ID][]string) error {
	for _, b := range backups {
		if len(packs) == 0 {
			return nil
		}
		var m Manifest
		err := r.getSigned(ctx, b.dir()+"manifest.json", "manifest", &m)
		switch {
		case errors.Is(err, store.ErrNotExist): // removed by another sweep
			continue
		case err != nil && !damaged(err):
			return err
		case err != nil || m.Ref != b.Ref:
			clear(packs) // nobody knows what it uses
			return nil
		}
		if !slices.ContainsFunc(m.Uses, func(id ID) bool { return len(packs[id]) > 0 }) {
			continue
		}
		used := make(map[string]bool)
		for _, part := range m.Trees {
			err := r.eachPack(ctx, part, b.ID, func(p Pack) { used[p.Key] = true })
			if err == nil {
				continue
			}
			if !damaged(err) {
				return err
			}
			for _, id := range m.Uses {
				delete(packs, id)
			}
		}
		for _, id := range m.Uses {
			packs[id] = slices.DeleteFunc(packs[id], func(key string) bool { return used[key] })
		}
	}
	return nil
}

// eachPack calls f for each pack that a part of a list of files names.
func (r *Repo) eachPack(ctx context.Context, part Part, backup ID, f func(Pack)) error {
	t, err := r.openTree(ctx, part, backup)
	if err != nil {
		return err
	}
	defer t.Close()
	for err == nil {
		_, err = t.next()
	}
	for _, p := range t.packs {
		f(p)
	}
	if err == io.EOF {
		return nil
	}
	return err
}

// removeDocuments removes what describes a deleted backup, the tombstone last.
func (r *Repo) removeDocuments(ctx context.Context, b Ref) (removed int, err error) {
	var keys []string
	for o, err := range r.st.List(ctx, b.dir(), "") {
		if err != nil {
			return 0, wrap("list", b.dir(), err)
		}
		keys = append(keys, strings.TrimPrefix(o.Key, b.dir()))
	}
	for _, first := range []string{"tree-", "draft", "manifest", "intent", "", tombstoneName} { // "": whatever else there is
		var some []string
		keys = slices.DeleteFunc(keys, func(name string) bool {
			if !strings.HasPrefix(name, first) || first != tombstoneName && name == tombstoneName {
				return false
			}
			some = append(some, b.dir()+name)
			return true
		})
		if err := r.st.Delete(ctx, some...); err != nil {
			return removed, wrap("delete", b.dir()+first, err)
		}
		removed += len(some)
	}
	return removed, nil
}
