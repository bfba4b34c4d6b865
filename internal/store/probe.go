package store

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// Probe tries out on st what the repository relies on, with a few small
// objects under prefix that it removes again: create-only writes, reads that
// see the write before them, ranges, listing in key order, deleting. A store
// that lacks one of these fails with fail.StoreUnfit, which names it. Other
// errors are those of st.
func Probe(ctx context.Context, st Store, prefix string) (err error) {
	dir := join(prefix, "probe-"+strings.ToLower(rand.Text()))
	first, second := dir+"/1", dir+"/2"
	defer func() {
		if err == nil {
			return
		}
		// Under another context: a probe that was cancelled leaves nothing either.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		defer cancel()
		err = errors.Join(err, st.Delete(ctx, first, second))
	}()

	content, other := []byte("pgkeep probes this store: 1"), []byte("pgkeep probes this store: 2")
	// The second key first: a store that lists in the order of writing shows.
	for _, key := range []string{second, first} {
		if err := st.Put(ctx, key, bytes.NewReader(content), PutOptions{IfAbsent: true}); err != nil {
			return fmt.Errorf("probe: %w", err)
		}
	}
	switch err := st.Put(ctx, first, bytes.NewReader(other), PutOptions{IfAbsent: true}); {
	case err == nil:
		return unfit("conditional writes: a second create of one object succeeded")
	case !errors.Is(err, ErrExist):
		return fmt.Errorf("probe: %w", err)
	}
	for _, c := range []struct {
		lacks string
		part  Range
		want  []byte
	}{
		{"reads after writes: an object reads otherwise than it was written", Range{}, content},
		{"ranged reads: a part of an object reads otherwise", Range{Off: 7, Len: 6}, content[7:13]},
		{"ranged reads: the rest of an object reads otherwise", Range{Off: 7}, content[7:]},
	} {
		switch got, err := ReadAll(ctx, st, first, c.part); {
		case errors.Is(err, ErrNotExist), errors.Is(err, io.ErrUnexpectedEOF), err == nil && !bytes.Equal(got, c.want):
			return unfit(c.lacks)
		case err != nil:
			return fmt.Errorf("probe: %w", err)
		}
	}
	if err := listed(ctx, st, dir+"/", first, second); err != nil {
		return err
	}
	if err := st.Delete(ctx, first, second); err != nil {
		return fmt.Errorf("probe: %w", err)
	}
	switch _, err := ReadAll(ctx, st, first, Range{}); {
	case err == nil:
		return unfit("deletes: a deleted object is still there")
	case !errors.Is(err, ErrNotExist):
		return fmt.Errorf("probe: %w", err)
	}
	return listed(ctx, st, dir+"/")
}

// listed compares what st lists under prefix with keys.
func listed(ctx context.Context, st Store, prefix string, keys ...string) error {
	var got []string
	for o, err := range st.List(ctx, prefix, "") {
		if err != nil {
			return fmt.Errorf("probe: %w", err)
		}
		got = append(got, strings.TrimPrefix(o.Key, prefix))
	}
	var want []string
	for _, k := range keys {
		want = append(want, strings.TrimPrefix(k, prefix))
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		return unfit(fmt.Sprintf("lists: it shows %q where %q is", got, want))
	}
	return nil
}

func unfit(lacks string) error {
	return fmt.Errorf("probe: the store lacks %s: %w", lacks, fail.StoreUnfit)
}

func join(prefix, name string) string {
	if prefix == "" || strings.HasSuffix(prefix, "/") {
		return prefix + name
	}
	return prefix + "/" + name
}

// ReadAll returns a part of an object, which should be small.
func ReadAll(ctx context.Context, st Store, key string, part Range) ([]byte, error) {
	r, err := st.Get(ctx, key, part)
	if err != nil {
		return nil, err
	}
	b, err := io.ReadAll(r)
	return b, errors.Join(err, r.Close())
}
