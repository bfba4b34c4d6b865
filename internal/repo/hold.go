package repo

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A Hold keeps a backup from being removed, by whatever rule, until it is lifted.
// A backup may have several.
type Hold struct {
	Header
	Ref
	Name   string    `json:"hold"`   // random; part of the key
	Reason string    `json:"reason"` // for people; never encrypted
	Host   string    `json:"host"`   // where it was made
	HeldAt time.Time `json:"held_at"`
}

const holdPrefix = "hold-"

func (h Hold) key() string { return h.dir() + holdPrefix + h.Name + ".json" }

// AddHold holds a backup. It fails with fail.NoBackup if there is none, or if it
// is marked as deleted just then; nothing is left behind in that case.
func (r *Repo) AddHold(ctx context.Context, b Ref, reason, host string, now time.Time) (Hold, error) {
	if strings.TrimSpace(reason) == "" {
		return Hold{}, fmt.Errorf("hold %s: no reason is given: %w", b.ID, fail.BadConfig)
	}
	if _, err := r.Backup(ctx, b); err != nil {
		return Hold{}, fmt.Errorf("hold: %w", err)
	}
	h := Hold{Header: r.access.header("hold"), Ref: b, Name: randomHex(4), Reason: reason, Host: host, HeldAt: now.UTC().Truncate(time.Second)}
	if err := putSigned(ctx, r.st, r.access, h.key(), h); err != nil {
		return Hold{}, err
	}
	// Who deletes looks for holds after the tombstone is written.
	if _, err := r.Backup(ctx, b); err != nil {
		if errors.Is(err, fail.NoBackup) {
			err = errors.Join(err, r.st.Delete(ctx, h.key()))
		}
		return Hold{}, fmt.Errorf("hold: %w", err)
	}
	return h, nil
}

// LiftHolds removes the hold of that name from a backup, or all of them if the
// name is "". It returns how many there were; none is fail.NoBackup.
func (r *Repo) LiftHolds(ctx context.Context, b Ref, name string) (int, error) {
	var keys []string
	for o, err := range r.st.List(ctx, b.dir()+holdPrefix, "") {
		if err != nil {
			return 0, wrap("list", b.dir()+holdPrefix, err)
		}
		if name == "" || o.Key == (Hold{Ref: b, Name: name}).key() {
			keys = append(keys, o.Key)
		}
	}
	if len(keys) == 0 {
		return 0, fail.Hint(fmt.Errorf("backup %s of cluster %s has no such hold: %w", b.ID, b.Cluster, fail.NoBackup), "pgkeep hold list shows them")
	}
	return len(keys), wrap("delete", keys[0], r.st.Delete(ctx, keys...))
}

// hold reads one. What stands under its key and cannot be believed holds all the
// same: nobody is to free a backup by breaking an object.
func (r *Repo) hold(ctx context.Context, b Ref, name string) (Hold, error) {
	want := Hold{Ref: b, Name: name}
	var h Hold
	err := r.getSigned(ctx, want.key(), "hold", &h)
	if err == nil && (h.Ref != b || h.Name != name) {
		err = fmt.Errorf("%s: is the hold %s of %s of %s: %w", want.key(), h.Name, h.ID, h.Cluster, fail.Corrupt)
	}
	if err != nil && !errors.Is(err, store.ErrNotExist) && damaged(err) {
		want.Reason = "cannot be read: " + err.Error()
		return want, nil
	}
	return h, err
}

// Holds lists the holds of a backup by name.
func (r *Repo) Holds(ctx context.Context, b Ref) ([]Hold, error) {
	var all []Hold
	for o, err := range r.st.List(ctx, b.dir()+holdPrefix, "") {
		if err != nil {
			return nil, wrap("list", b.dir()+holdPrefix, err)
		}
		name := strings.TrimSuffix(strings.TrimPrefix(o.Key, b.dir()+holdPrefix), ".json")
		h, err := r.hold(ctx, b, name)
		if errors.Is(err, store.ErrNotExist) { // lifted since
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, h)
	}
	slices.SortFunc(all, func(a, b Hold) int { return a.HeldAt.Compare(b.HeldAt) })
	return all, nil
}

// unheld fails with fail.Held if somebody holds the backup.
func (r *Repo) unheld(ctx context.Context, b Ref) error {
	all, err := r.Holds(ctx, b)
	if err == nil && len(all) > 0 {
		err = fmt.Errorf("backup %s of cluster %s is held: %s: %w", b.ID, b.Cluster, all[0].Reason, fail.Held)
	}
	return err
}
