package repo

import (
	"context"

	"github.com/pgkeep/pgkeep/internal/store"
)

// PriorBytes returns how many bytes of files the packs of a backup in progress
// hold.
func (r *Repo) PriorBytes(ctx context.Context, b Ref) (sum int64, err error) {
	w := &Writer{repo: r, opt: Writing{Ref: b}, feet: newFooters(r, feetMemory)}
	attempts, _, err := w.findAttempts(ctx)
	if err != nil {
		return 0, err
	}
	for _, a := range attempts {
		foot, err := w.feet.get(ctx, a.pack)
		if err != nil {
			return 0, err
		}
		for _, f := range foot.Frames {
			sum += int64(f.Content)
		}
	}
	return sum, nil
}

// Small returns w with everything cut into small pieces: chunks of two frames,
// few files, few layers, one directory of a pack at a time.
func Small(w Writing) Writing {
	w.limits = limits{chunk: 32, stride: 20, layers: 4, feet: 1, tree: treeLimits{entries: 4, packs: 6, frames: 40, bytes: 2000}}
	return w
}

// Through returns r with another way to its store.
func (r *Repo) Through(st store.Store) *Repo {
	other := *r
	other.st = st
	return &other
}
