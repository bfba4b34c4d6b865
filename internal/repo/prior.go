package repo

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"io"
	"path"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// What is in the bucket already comes from two sides: packs that earlier
// attempts of the same backup left, and the newest published backup that this
// one's intent pins. Both are layers of a file, newest first, as in an Entry;
// blocks are compared with the first layer that has them, and with no other.
// So a layer that is kept never shows an older version of a block than the one
// that was compared.

// A heldLayer is a layer of a file in a pack that is in the bucket.
type heldLayer struct {
	order         int // place among the layers of the file
	pack          *Pack
	first, frames int   // frames 0: all of the file's in the pack
	size          int64 // of the file when the layer counted last: blocks behind it do not any more
	own           bool  // an earlier attempt's: as new as what is stored now

	low, high int64 // blocks it has are in [low, high); high 0: not known yet
}

// A winner is the stored version of a block that counts.
type winner struct {
	ok    bool
	id    seal.BlockID
	layer int32 // index into the layers of the file
	frame int32
	at    int64 // where the frame's content begins in the plain content of the pack
}

// usable reports whether blocks of a footer can be kept in file.
func (f *footer) usable(of packFile, i int, seed uint64) bool {
	return f.Seed == seed && f.Files[i].Path == of.Path && f.Files[i].Block == of.Block
}

// winners finds the versions of blocks first.. of file that count, among
// layers, into buf, and how much of each layer that is.
func (w *Writer) winners(ctx context.Context, layers []heldLayer, mu *sync.Mutex, file packFile, first, count int64, buf []winner) ([]winner, []layerUse, error) {
	buf = slices.Grow(buf[:0], int(count))[:count]
	clear(buf)
	if len(layers) == 0 || count == 0 {
		return buf, nil, nil
	}
	end := first + count
	mu.Lock()
	now := slices.Clone(layers) // other chunks of the file learn of low and high
	mu.Unlock()
	feet := make([]*footer, len(layers))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, l := range now {
		if l.high > 0 && (l.low >= end || l.high <= first) {
			continue
		}
		g.Go(func() error {
			foot, err := w.feet.get(gctx, *l.pack)
			if err == nil {
				feet[i] = foot
			} else if !damaged(err) {
				return err
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, nil, err
	}
	seen := newBlockSet(count)
	uses := make([]layerUse, len(layers))
	for i, foot := range feet {
		if foot == nil {
			continue
		}
		l := now[i]
		from, to := l.first, l.first+l.frames
		if l.frames == 0 {
			from, to = foot.framesOf(file.Path)
		}
		if from >= to || to > len(foot.Frames) {
			continue
		}
		low, high := int64(1<<62), int64(1)
		uses[i] = layerUse{age: w.opt.ID.Time().Sub(packOwner(l.pack.Key).Time()), own: l.own}
		for n := from; n < to; n++ {
			fr := foot.Frames[n]
			last := fr.Blocks[len(fr.Blocks)-1]
			low, high = min(low, fr.Blocks[0][0]), max(high, last[0]+last[1])
			if fr.Blocks[0][0] >= end || last[0]+last[1] <= first || !foot.usable(file, fr.File, w.seed) {
				continue
			}
			stored, k, live, here := foot.Files[fr.File], fr.id, int64(0), int64(0)
			for _, r := range fr.Blocks {
				for b := r[0]; b < r[0]+r[1]; b, k = b+1, k+1 {
					if b < first || b >= end {
						continue
					}
					here++
					if b*file.Block >= l.size || seen.take(run{b - first, 1}) == 0 {
						continue
					}
					if stored.length(b) == file.length(b) {
						live++
						buf[b-first] = winner{true, foot.ids[k], int32(i), int32(n), fr.at}
					}
				}
			}
			if live > 0 { // a frame of which nothing counts is not read
				uses[i].live += live
				uses[i].stored += here
			}
		}
		mu.Lock()
		layers[i].low, layers[i].high = low, high
		mu.Unlock()
	}
	return buf, uses, nil
}

// framesOf returns the frames of a file; a pack has those of one file together,
// and files in path order.
func (f *footer) framesOf(p string) (from, to int) {
	i, ok := slices.BinarySearchFunc(f.Files, p, func(file packFile, p string) int { return strings.Compare(file.Path, p) })
	if !ok {
		return 0, 0
	}
	from, _ = slices.BinarySearchFunc(f.Frames, i, func(fr frame, i int) int { return cmp.Compare(fr.File, i) })
	to, _ = slices.BinarySearchFunc(f.Frames, i+1, func(fr frame, i int) int { return cmp.Compare(fr.File, i) })
	return from, to
}

// inOrder reports whether framesOf can be used.
func (f *footer) inOrder() bool {
	return slices.IsSortedFunc(f.Files, func(a, b packFile) int { return strings.Compare(a.Path, b.Path) }) &&
		slices.IsSortedFunc(f.Frames, func(a, b frame) int { return cmp.Compare(a.File, b.File) })
}

// packOwner returns the backup that wrote the pack under key; "" if it is none.
func packOwner(key string) ID {
	if id := path.Base(path.Dir(key)); idForm.MatchString(id) {
		return ID(id)
	}
	return ""
}

// Bounds of what is kept of old layers, within the blocks that are handled
// together, besides limits.layers. They bound what a restore reads in vain, and
// how long anything in the bucket is relied on.
const (
	maxAge    = 90 * 24 * time.Hour
	ageSpread = 30 * 24 * time.Hour // by path, so that not everything is stored anew on one day
)

// A layerUse says how much of a layer counts.
type layerUse struct {
	stored, live int64 // blocks
	age          time.Duration
	own          bool
}

// rebase decides which layers are given up, their live blocks stored anew: some
// must be, for there are too many; others may be, as far as bytes can be spared,
// for less than half of them counts or they are old.
func rebase(uses []layerUse, old time.Duration, limit int) (must, may []int) {
	var kept []int
	for i, u := range uses {
		switch {
		case u.live == 0:
		case !u.own && (2*u.live < u.stored || u.age > old):
			may = append(may, i)
			kept = append(kept, i)
		default:
			kept = append(kept, i)
		}
	}
	if n := len(kept) + 1 - limit; n > 0 { // one more is about to be made
		slices.SortFunc(kept, func(a, b int) int { return cmp.Compare(uses[a].live, uses[b].live) })
		must = kept[:n]
		may = slices.DeleteFunc(may, func(i int) bool { return slices.Contains(must, i) })
	}
	return must, may
}

// oldFor is the age at which layers of the file at p are given up.
func oldFor(p string) time.Duration {
	h := fnv.New32a()
	io.WriteString(h, p)
	return maxAge - time.Duration(h.Sum32())%(ageSpread/time.Second)*time.Second
}

// An attempt is a pack that an earlier attempt of the same backup stored.
type attempt struct {
	pack        Pack
	first, last string // paths of files
}

// findAttempts lists the packs of a backup, newest first, and reads their
// directories. One that cannot be read, or has another seed than most, is left
// alone: it will not be part of the backup. After each, moved is called.
func (w *Writer) findAttempts(ctx context.Context) (found []attempt, highest int64, err error) {
	var objects []store.Object
	for o, err := range w.repo.st.List(ctx, w.opt.packs(), "") {
		if err != nil {
			return nil, 0, wrap("list", w.opt.packs(), err)
		}
		objects = append(objects, o)
	}
	slices.Reverse(objects) // numbers ascend
	reads := make([]*attempt, len(objects))
	seeds := make([]uint64, len(objects))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, o := range objects {
		g.Go(func() error {
			foot, pack, err := w.repo.readFooter(gctx, o.Key, o.Size, nil)
			if err != nil && !damaged(err) {
				return err
			}
			if err == nil && foot.Backup == string(w.opt.ID) && len(foot.Files) > 0 && foot.inOrder() {
				reads[i] = &attempt{pack, foot.Files[0].Path, foot.Files[len(foot.Files)-1].Path}
				seeds[i] = foot.Seed
				w.feet.put(o.Key, foot)
			}
			w.progress()
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, 0, err
	}
	for i, o := range objects {
		var n int64
		if _, err := fmt.Sscanf(path.Base(o.Key), "%d-", &n); err == nil {
			highest = max(highest, n)
		}
		if reads[i] == nil {
			continue
		}
		if w.seed == 0 {
			w.seed = seeds[i]
		}
		if seeds[i] == w.seed {
			found = append(found, *reads[i])
		}
	}
	return found, highest, nil
}

// attemptsInOrder yields, for paths that ascend, the packs of attempts that may hold them.
type attemptsInOrder struct {
	coming []*attempt // by first path
	active []*attempt // newest first
}

func newAttemptsInOrder(all []attempt) *attemptsInOrder {
	a := new(attemptsInOrder)
	for i := range all {
		a.coming = append(a.coming, &all[i])
	}
	slices.SortStableFunc(a.coming, func(x, y *attempt) int { return strings.Compare(x.first, y.first) })
	return a
}

func (a *attemptsInOrder) at(p string) []*attempt {
	a.active = slices.DeleteFunc(a.active, func(x *attempt) bool { return x.last < p })
	n := len(a.active)
	for len(a.coming) > 0 && a.coming[0].first <= p {
		if a.coming[0].last >= p {
			a.active = append(a.active, a.coming[0])
		}
		a.coming = a.coming[1:]
	}
	if len(a.active) > n {
		slices.SortFunc(a.active, func(x, y *attempt) int { return strings.Compare(y.pack.Key, x.pack.Key) })
	}
	return a.active
}

// A prior is a published backup whose blocks may be kept.
type prior struct {
	repo     *Repo
	manifest Manifest
	seed     uint64
}

// findPrior opens the newest backup that this one's intent pins and that can be
// used: it is published and not deleted, and a key at hand opens its lists.
// Pins keep its packs from being deleted; what is not pinned is not used.
func (r *Repo) findPrior(ctx context.Context, b Ref) (*prior, error) {
	var in Intent
	err := r.getSigned(ctx, b.dir()+"intent.json", "intent", &in)
	if errors.Is(err, store.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	if in.Ref != b {
		return nil, fmt.Errorf("%sintent.json: belongs to %s of %s: %w", b.dir(), in.ID, in.Cluster, fail.Corrupt)
	}
	pins := slices.Clone(in.Pins)
	slices.Sort(pins)
	for _, pin := range slices.Backward(pins) {
		p, err := r.openPrior(ctx, Ref{b.Cluster, pin})
		if err == nil {
			return p, nil
		}
		if !damaged(err) && !errors.Is(err, fail.NoBackup) {
			return nil, err
		}
	}
	return nil, nil
}

// openPrior reads the manifest of a backup and learns its seed.
func (r *Repo) openPrior(ctx context.Context, b Ref) (*prior, error) {
	m, err := r.Backup(ctx, b)
	if err != nil {
		return nil, err
	}
	for _, part := range m.Trees {
		t, err := r.openTree(ctx, part, b.ID)
		if err != nil {
			return nil, err
		}
		_, err = t.next() // packs stand before it
		packs := t.packs
		t.Close()
		if err != nil && err != io.EOF {
			return nil, err
		}
		for i, p := range packs {
			foot, _, err := r.readFooter(ctx, p.Key, p.Size, &p)
			if err == nil {
				return &prior{r, m, foot.Seed}, nil
			}
			if !damaged(err) || i == len(packs)-1 {
				return nil, err
			}
		}
	}
	return &prior{repo: r, manifest: m}, nil
}

// A cursor walks the entries of one batch of a prior in step with ascending
// paths. The nil cursor has none.
type cursor struct {
	prior *prior
	parts []Part
	tree  *treeReader
	entry Entry
	ok    bool // entry is the next one
	last  string
}

func (p *prior) cursor(batch int) *cursor {
	if p == nil {
		return nil
	}
	c := &cursor{prior: p}
	for _, part := range p.manifest.Trees {
		if part.Batch == batch {
			c.parts = append(c.parts, part)
		}
	}
	return c
}

// at returns the entry at path and the packs its layers are in. A list that
// cannot be read any more, or is out of order, ends: what it has is stored anew.
func (c *cursor) at(ctx context.Context, path string) (e Entry, packs []Pack, ok bool, err error) {
	if c == nil {
		return e, nil, false, nil
	}
	for !c.ok || c.entry.Path < path {
		c.ok = false
		if c.tree == nil {
			if len(c.parts) == 0 {
				return e, nil, false, nil
			}
			c.tree, err = c.prior.repo.openTree(ctx, c.parts[0], c.prior.manifest.ID)
			c.parts = c.parts[1:]
		}
		if err == nil {
			c.entry, err = c.tree.next()
		}
		switch {
		case err == io.EOF:
			err = c.tree.Close()
			c.tree = nil
		case err == nil && c.entry.Path > c.last:
			c.ok, c.last = true, c.entry.Path
		case err == nil || damaged(err):
			c.parts, err = nil, nil
			c.close()
		}
		if err != nil {
			return e, nil, false, err
		}
	}
	if c.entry.Path != path {
		return e, nil, false, nil
	}
	return c.entry, c.tree.packs, true, nil
}

func (c *cursor) close() {
	if c != nil && c.tree != nil {
		c.tree.Close()
		c.tree = nil
	}
}
