package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"
)

// Rights says what a store let us do. Nil: it did; else why not.
type Rights struct {
	Put, Get, List, Delete error
	// Replaced: a create-only Put replaced an object. What is stored there is not
	// safe.
	Replaced bool
	// Skew is by how much the store's clock is ahead of ours, to the second; 0 if
	// it could not be learnt.
	Skew time.Duration
}

// Try finds out what st lets us do, each thing by itself, with a small object
// under each of keys: what one of them does not allow is not allowed. If it may
// not be deleted it stays, and the next Try finds it.
func Try(ctx context.Context, st Store, now func() time.Time, keys ...string) (all Rights) {
	first := func(a, b error) error {
		if a != nil {
			return a
		}
		return b
	}
	for _, key := range keys {
		r, marked := try(ctx, st, key, now)
		if marked {
			r, _ = try(ctx, st, key+"-"+strings.ToLower(rand.Text()), now)
		}
		all.Put, all.Get, all.List, all.Delete = first(all.Put, r.Put), first(all.Get, r.Get), first(all.List, r.List), first(all.Delete, r.Delete)
		all.Replaced = all.Replaced || r.Replaced
		if r.Skew.Abs() > all.Skew.Abs() {
			all.Skew = r.Skew
		}
	}
	return all
}

// try tries one key. It is marked if it was deleted, and the store, which keeps
// versions, takes the mark of that for an object.
func try(ctx context.Context, st Store, key string, now func() time.Time) (r Rights, marked bool) {
	content, other := []byte("pgkeep tries what it may do here\n"), []byte("and this must not replace it\n")
	began := now()
	r.Put = st.Put(ctx, key, bytes.NewReader(content), PutOptions{IfAbsent: true})
	fresh := r.Put == nil
	if errors.Is(r.Put, ErrExist) {
		r.Put = nil
	}
	if r.Put == nil {
		switch err := st.Put(ctx, key, bytes.NewReader(other), PutOptions{IfAbsent: true}); {
		case err == nil:
			r.Replaced = true
		case !errors.Is(err, ErrExist):
			r.Put = err
		}
	}
	_, r.Get = ReadAll(ctx, st, key, Range{})
	if !fresh && r.Put == nil && errors.Is(r.Get, ErrNotExist) {
		return r, true
	}
	if r.Put != nil && errors.Is(r.Get, ErrNotExist) { // we may read that there is nothing
		r.Get = nil
	}
	seen := false
	for o, err := range st.List(ctx, key, "") {
		if r.List = err; err != nil {
			break
		}
		if o.Key == key {
			seen = true
			if fresh {
				// What is listed was written between began and now.
				r.Skew = skew(began, o.Modified, now())
			}
		}
	}
	if r.List == nil && r.Put == nil && !seen {
		r.List = fmt.Errorf("list %s: what was just written is not there", key)
	}
	r.Delete = st.Delete(ctx, key)
	return r, false
}

// skew is how far at is outside of an interval, to the second that clocks of
// stores have.
func skew(from, at, to time.Time) time.Duration {
	from = from.Truncate(time.Second)
	switch {
	case at.Before(from):
		return at.Sub(from).Truncate(time.Second)
	case at.After(to):
		return at.Sub(to).Truncate(time.Second)
	}
	return 0
}

// A Rule is something that a store does with objects by itself.
type Rule struct {
	ID     string
	Prefix string // of the keys it concerns, among ours; "": all
	// Removes: objects that are in use go, when they are old enough.
	Removes bool
	// Freezes: they go where they must be brought back from before they can be
	// read.
	Freezes bool
}

// A Ruled is a Store that may have rules, and knows them.
type Ruled interface {
	// Rules returns those in force that concern our objects, and whether what
	// is deleted or replaced is kept as an older version. It fails with
	// fail.StoreDenied if we may not ask. A service that knows no rules has none.
	Rules(ctx context.Context) (rules []Rule, versioned bool, err error)
}
