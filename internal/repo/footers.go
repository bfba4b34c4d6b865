package repo

import (
	"container/list"
	"context"
	"errors"
	"sync"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// footers reads directories of packs when they are asked for, and keeps those
// used last, up to a number of bytes. Its methods may be called concurrently.
type footers struct {
	repo  *Repo
	limit int64 // bytes, about

	mu    sync.Mutex
	size  int64
	byKey map[string]*list.Element // of *heldFooter
	order list.List                // used last at the front
}

type heldFooter struct {
	key  string
	done chan struct{} // closed when the rest is set
	foot *footer
	err  error
	size int64
}

func newFooters(r *Repo, limit int64) *footers {
	return &footers{repo: r, limit: limit, byKey: make(map[string]*list.Element)}
}

// get returns the directory of p, which is not to be changed.
func (c *footers) get(ctx context.Context, p Pack) (*footer, error) {
	for {
		c.mu.Lock()
		el, ok := c.byKey[p.Key]
		if !ok {
			break
		}
		c.order.MoveToFront(el)
		c.mu.Unlock()
		h := el.Value.(*heldFooter)
		select {
		case <-h.done:
			if ctx.Err() == nil && (errors.Is(h.err, context.Canceled) || errors.Is(h.err, context.DeadlineExceeded)) {
				continue // who read it was stopped; that says nothing about the pack
			}
			return h.foot, h.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	h := &heldFooter{key: p.Key, done: make(chan struct{})}
	c.byKey[p.Key] = c.order.PushFront(h)
	c.mu.Unlock()

	foot, _, err := c.repo.readFooter(ctx, p.Key, p.Size, &p)
	c.finish(h, foot, err)
	return foot, err
}

// put keeps a directory that was read otherwise.
func (c *footers) put(key string, foot *footer) {
	c.mu.Lock()
	if _, ok := c.byKey[key]; ok {
		c.mu.Unlock()
		return
	}
	h := &heldFooter{key: key, done: make(chan struct{})}
	c.byKey[key] = c.order.PushFront(h)
	c.mu.Unlock()
	c.finish(h, foot, nil)
}

func (c *footers) finish(h *heldFooter, foot *footer, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	h.foot, h.err = foot, err
	close(h.done)
	if foot != nil {
		h.size = foot.memory()
		c.size += h.size
	} else if !damaged(err) { // a moment's trouble is not kept
		c.order.Remove(c.byKey[h.key])
		delete(c.byKey, h.key)
	}
	for el := c.order.Back(); el != nil && c.size > c.limit; {
		old, before := el.Value.(*heldFooter), el.Prev()
		if old.foot != nil && old != h {
			c.size -= old.size
			c.order.Remove(el)
			delete(c.byKey, old.key)
		}
		el = before
	}
}

// memory is about how many bytes f takes.
func (f *footer) memory() int64 {
	n := int64(len(f.ids)*len(seal.BlockID{}) + len(f.Frames)*80 + len(f.Files)*100)
	for _, fr := range f.Frames {
		n += int64(len(fr.Blocks) * 16)
	}
	return n
}

// damaged reports whether err says that an object cannot be used here, now and
// later: as opposed to trouble of the store.
func damaged(err error) bool {
	return errors.Is(err, fail.Corrupt) || errors.Is(err, fail.NoKey) || errors.Is(err, fail.Untrusted) ||
		errors.Is(err, fail.Unsupported) || errors.Is(err, store.ErrNotExist)
}
