package repo

import (
	"cmp"
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

// A Tombstone ends a backup: from then on nobody lists it, restores it or
// builds on it. What it holds may be removed once PurgeAfter has passed; until
// then Undelete brings it back.
type Tombstone struct {
	Header
	Ref
	DeletedAt  time.Time `json:"deleted_at"`           // UTC
	PurgeAfter time.Time `json:"purge_after,omitzero"` // UTC; zero: at once
	Nonce      string    `json:"nonce,omitempty"`      // tells it from an earlier tombstone of the backup
	Reasons    []string  `json:"reasons,omitempty"`    // why, for people
}

// A settlement decides once what becomes of a tombstone. Who removes a backup and
// who brings it back both create it, under one key, before they touch anything:
// of the two one succeeds, and the other learns it.
type settlement struct {
	Header
	Ref
	Nonce     string `json:"nonce"`
	Undeleted bool   `json:"undeleted"` // else what the backup holds is removed
}

const tombstoneName = "deleted.json"

// settlement is the key of what becomes of t.
func (t Tombstone) settlement() string {
	return t.dir() + "settled-" + cmp.Or(t.Nonce, "0") + ".json"
}

func (r *Repo) tombstone(ctx context.Context, b Ref) (t Tombstone, err error) {
	err = r.getSigned(ctx, b.dir()+tombstoneName, "tombstone", &t)
	if err == nil && t.Ref != b {
		err = fmt.Errorf("%s%s: is the tombstone of %s of %s: %w", b.dir(), tombstoneName, t.ID, t.Cluster, fail.Corrupt)
	}
	return t, err
}

// settle decides what becomes of a tombstone, or finds that it is decided.
func (r *Repo) settle(ctx context.Context, t Tombstone, undelete bool) (undeleted bool, err error) {
	key := t.settlement()
	s := settlement{r.access.header("settlement"), t.Ref, t.Nonce, undelete}
	if err := putSigned(ctx, r.st, r.access, key, s); !errors.Is(err, store.ErrExist) {
		return undelete, err
	}
	if err := r.getSigned(ctx, key, "settlement", &s); err != nil {
		return false, err
	}
	if s.Ref != t.Ref || s.Nonce != t.Nonce {
		return false, fmt.Errorf("%s: is about another tombstone: %w", key, fail.Corrupt)
	}
	return s.Undeleted, nil
}

// Mark ends a backup, finished or not: it is hidden at once. What it holds stays
// for so long as grace says, and then goes with the next Sweep. One that is
// marked already keeps its time. A backup that somebody holds is fail.Held, and
// one that is not there fail.NoBackup. RenewLatest is to follow.
func (r *Repo) Mark(ctx context.Context, b Ref, now time.Time, grace time.Duration, reasons ...string) error {
	found := false
	for _, err := range r.st.List(ctx, b.dir(), "") { // packs alone are what others use of a deleted one
		if err != nil {
			return wrap("list", b.dir(), err)
		}
		found = true
		break
	}
	if !found {
		return fmt.Errorf("backup %s of cluster %s: %w", b.ID, b.Cluster, fail.NoBackup)
	}
	if err := r.unheld(ctx, b); err != nil {
		return err
	}
	if _, err := r.tombstone(ctx, b); errors.Is(err, store.ErrNotExist) {
		t := Tombstone{Header: r.access.header("tombstone"), Ref: b, DeletedAt: now.UTC().Truncate(time.Second), Nonce: randomHex(8), Reasons: reasons}
		if grace > 0 {
			t.PurgeAfter = t.DeletedAt.Add(grace)
		}
		err = putSigned(ctx, r.st, r.access, b.dir()+tombstoneName, t)
		if err != nil && !errors.Is(err, store.ErrExist) { // another deletion's is as good
			return err
		}
	} else if err != nil {
		return err
	}
	// Who holds a backup looks for a tombstone after the hold is written: at least
	// one of the two sees the other.
	if err := r.unheld(ctx, b); err != nil {
		return errors.Join(err, r.Undelete(ctx, b))
	}
	return nil
}

// Undelete brings back a backup that was marked, as long as its removal has not
// begun. It may be repeated until it succeeds.
func (r *Repo) Undelete(ctx context.Context, b Ref) error {
	t, err := r.tombstone(ctx, b)
	if errors.Is(err, store.ErrNotExist) {
		return fail.Hint(fmt.Errorf("backup %s of cluster %s is not marked as deleted: %w", b.ID, b.Cluster, fail.NoBackup), "pgkeep expire shows those that can be brought back")
	}
	if err != nil {
		return err
	}
	undeleted, err := r.settle(ctx, t, true)
	if err != nil {
		return err
	}
	if undeleted { // nothing was removed since; of one whose removal was cut at its end, nothing may be left
		names, err := r.names(ctx, b)
		names = slices.DeleteFunc(names, func(name string) bool { return name == tombstoneName })
		if err == nil && alone(names) {
			undeleted, err = false, r.st.Delete(ctx, t.settlement())
		}
		if err != nil {
			return err
		}
	}
	if !undeleted {
		return fmt.Errorf("backup %s of cluster %s: its removal has begun: %w", b.ID, b.Cluster, fail.NoBackup)
	}
	if err := r.st.Delete(ctx, b.dir()+tombstoneName); err != nil {
		return wrap("delete", b.dir()+tombstoneName, err)
	}
	return r.RenewLatest(ctx, b.Cluster)
}

// Delete removes a backup, finished or not, and every object that nobody else
// needs: packs that another backup refers to stay, and go with the last that
// does. It also clears away what earlier deletions had to leave; of those that can be
// brought back yet, or could by another clock, it touches none. It may be
// repeated until it succeeds, wherever it was cut, and returns how many objects
// were removed. Deleting what is not there is fail.NoBackup, and what somebody
// holds fail.Held.
//
// A backup that one in progress pins is hidden at once, and removed by a
// deletion after that one is done.
func (r *Repo) Delete(ctx context.Context, b Ref, now time.Time) (objects int, err error) {
	if err := r.Mark(ctx, b, now, 0); err != nil {
		return 0, err
	}
	if err := r.RenewLatest(ctx, b.Cluster); err != nil {
		return 0, err
	}
	s, err := r.sweep(ctx, b.Cluster, now, b.ID)
	if err == nil && len(s.Refused) > 0 {
		err = s.Refused[0].err
	}
	return s.Objects, err
}

// Swept is what a Sweep removed.
type Swept struct {
	Objects int       `json:"objects"`
	Backups []ID      `json:"backups,omitempty"` // of which nothing is left but packs that others need
	Refused []Refused `json:"refused,omitempty"`
}

// Refused is a deletion that the store denies: for want of a right, or because
// the object is locked for some time yet. What is left of the backup stays
// hidden, and the next Sweep tries again.
type Refused struct {
	ID  ID     `json:"id"`
	Why string `json:"why"`
	err error
}

// Sweep removes what backups hold that were marked and whose grace has passed at
// now, and what earlier deletions had to leave for others. It may be repeated,
// wherever it was cut.
func (r *Repo) Sweep(ctx context.Context, cluster string, now time.Time) (Swept, error) {
	return r.sweep(ctx, cluster, now, "")
}

// sweep removes what tombstones allow; or, of one backup at once and of those that
// have no grace, so that no clock decides: of
// each that nobody pins or holds its manifest, its packs that nobody needs, then
// its lists, draft, intent, and last the tombstone; and packs that deletions
// before left for others.
//
// It may run beside backups and other sweeps, for of two looks the later decides:
// packs are listed before backups, so that the intent of who wrote them is seen;
// tombstones are written before it begins, and who takes a backup looks for them
// after it said what it pins.
func (r *Repo) sweep(ctx context.Context, cluster string, now time.Time, atOnce ID) (s Swept, err error) {
	packs, err := r.packsByOwner(ctx, cluster)
	if err != nil {
		return s, err
	}
	all, err := r.standing(ctx, cluster)
	if err == nil {
		err = r.bury(ctx, all, now)
	}
	if err != nil {
		return s, err
	}
	due := func(b standing) bool {
		return b.stone != nil && !b.held && (b.ID == atOnce || b.stone.PurgeAfter.IsZero() || atOnce == "" && !now.Before(b.stone.PurgeAfter))
	}
	pinned := make(map[ID]bool)
	for _, b := range all {
		for _, pin := range b.pins {
			pinned[pin] = pinned[pin] || !due(b) // one in its grace may go on
		}
	}
	var roots, dead []standing
	for _, b := range all {
		if due(b) && !pinned[b.ID] {
			undeleted, err := r.settle(ctx, *b.stone, false)
			if err == nil && undeleted { // and cut before it was done
				err = wrap("delete", b.dir()+tombstoneName, r.st.Delete(ctx, b.dir()+tombstoneName))
			}
			if err != nil {
				return s, err
			}
			if !undeleted {
				dead = append(dead, b)
				continue
			}
		}
		delete(packs, b.ID) // all that it wrote stays
		if b.manifest {
			roots = append(roots, b)
		}
	}
	if err := r.keepUsed(ctx, roots, packs); err != nil {
		return s, err
	}
	refused := make(map[ID]bool)
	remove := func(id ID, what string, keys ...string) error {
		if len(keys) == 0 || refused[id] {
			return nil
		}
		err := wrap("delete", what, r.st.Delete(ctx, keys...))
		if errors.Is(err, fail.StoreDenied) {
			refused[id] = true
			s.Refused = append(s.Refused, Refused{id, err.Error(), err})
			return nil
		}
		if err == nil {
			s.Objects += len(keys)
		}
		return err
	}
	for _, b := range dead {
		if b.manifest { // without it nothing is a backup, whatever becomes of the tombstone
			if err := remove(b.ID, b.dir()+"manifest.json", b.dir()+"manifest.json"); err != nil {
				return s, err
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(packs)) {
		if err := remove(id, "packs of "+string(id), packs[id]...); err != nil {
			return s, err
		}
	}
	for _, b := range dead {
		keys, err := r.documents(ctx, b.Ref)
		if err != nil {
			return s, err
		}
		for _, some := range keys {
			if err := remove(b.ID, "documents of "+string(b.ID), some...); err != nil {
				return s, err
			}
		}
		if !refused[b.ID] {
			s.Backups = append(s.Backups, b.ID)
		}
	}
	return s, nil
}

// A standing is a backup of which there are documents.
type standing struct {
	Ref
	stone    *Tombstone // nil: it is not deleted
	held     bool
	manifest bool
	names    []string
	pins     []ID // of one that is not finished
}

// bury marks what a deletion left that did not see the manifest come: see alone.
// Nobody is to bring that back.
func (r *Repo) bury(ctx context.Context, all []standing, now time.Time) error {
	for i := range all {
		b := &all[i]
		if !b.manifest || b.stone != nil || !alone(b.names) {
			continue
		}
		if _, err := r.manifest(ctx, b.Ref); damaged(err) { // whoever wrote it has no say
			continue
		} else if err != nil {
			return err
		}
		names, err := r.names(ctx, b.Ref) // at one time: the list of all has many pages
		if err != nil {
			return err
		}
		if !alone(names) {
			continue
		}
		err = r.Mark(ctx, b.Ref, now, 0, "deleted while it was published")
		var t Tombstone
		if err == nil {
			t, err = r.tombstone(ctx, b.Ref)
		}
		switch {
		case err == nil:
			b.stone = &t
		case !errors.Is(err, fail.Held) && !errors.Is(err, fail.NoBackup) && !errors.Is(err, store.ErrNotExist): // somebody was faster
			return err
		}
	}
	return nil
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
		b.names = append(b.names, name)
		switch name {
		case "manifest.json":
			b.manifest = true
		case tombstoneName:
			t, err := r.tombstone(ctx, b.Ref)
			switch {
			case err == nil:
				b.stone = &t
			case !damaged(err): // gone since: it is brought back, or nothing is left of it
				return nil, err
			}
		default:
			b.held = b.held || strings.HasPrefix(name, holdPrefix)
		}
	}
	for i := range all {
		b := &all[i]
		if b.manifest {
			continue // its own packs and its trees say what it needs
		}
		var in Intent
		err := r.getSigned(ctx, b.dir()+"intent.json", "intent", &in)
		if errors.Is(err, store.ErrNotExist) {
			continue
		}
		if damaged(err) && b.stone != nil {
			continue
		}
		if damaged(err) {
			return nil, fail.Hint(fmt.Errorf("what backup %s, which is not finished, keeps of others is not known, so nothing is removed: %w", b.ID, err),
				"if it does not run any more, delete it: pgkeep delete "+string(b.ID))
		}
		if err != nil {
			return nil, err
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
		m, err := r.manifest(ctx, b.Ref)
		switch {
		case errors.Is(err, store.ErrNotExist): // removed by another sweep
			continue
		case err != nil && !damaged(err):
			return err
		case err != nil:
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

// documents are the keys of what describes a deleted backup, in the order in
// which they are to be removed: the tombstone comes last.
func (r *Repo) documents(ctx context.Context, b Ref) (keys [][]string, err error) {
	names, err := r.names(ctx, b)
	if err != nil {
		return nil, err
	}
	for _, first := range []string{"manifest", "tree-", "draft", "intent", "", tombstoneName} { // "": whatever else there is
		var some []string
		names = slices.DeleteFunc(names, func(name string) bool {
			if !strings.HasPrefix(name, first) || first != tombstoneName && name == tombstoneName {
				return false
			}
			some = append(some, b.dir()+name)
			return true
		})
		keys = append(keys, some)
	}
	return keys, nil
}
