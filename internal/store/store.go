// Package store is object storage as pgkeep needs it: whole objects under flat
// keys, written once, listed by prefix.
package store

import (
	"context"
	"errors"
	"io"
	"iter"
	"time"
)

var (
	// ErrNotExist means that there is no object under the key: the store said
	// so itself. Every other trouble is another error.
	ErrNotExist = errors.New("object does not exist")
	// ErrExist means that a Put with IfAbsent found an object under the key.
	ErrExist = errors.New("object already exists")
)

// A Store keeps objects. Its methods may be called concurrently. A key is
// slash-separated text without an empty, "." or ".." element.
// Package storetest checks an implementation against these comments.
//
// A method retries what may pass by itself (no connection, time-outs, 5xx,
// SlowDown) with back-off until its context ends or its own patience does, and
// then fails with fail.StoreDown. It does not retry refusals: fail.StoreDenied.
type Store interface {
	// Put stores everything r yields under key. The object appears whole or
	// not at all: if r or the transfer fails, the key is as it was before.
	// The store compares a checksum of what it received with that of what was sent.
	// An r that is also an io.Seeker is not copied into memory.
	Put(ctx context.Context, key string, r io.Reader, opt PutOptions) error

	// Get opens a part of the object for reading, or fails with ErrNotExist.
	// A reader that ends before the part does fails with
	// io.ErrUnexpectedEOF. The caller closes it.
	Get(ctx context.Context, key string, part Range) (io.ReadCloser, error)

	// List yields the objects whose keys begin with prefix, in key order.
	// After an error it yields nothing more.
	List(ctx context.Context, prefix string) iter.Seq2[Object, error]

	// Delete removes objects. A key that is already gone is not an error.
	Delete(ctx context.Context, keys ...string) error
}

// PutOptions tune a Put. The zero value overwrites.
type PutOptions struct {
	// IfAbsent makes Put fail with ErrExist rather than replace an object.
	// A Put that wrote the object itself, and lost the answer, may say
	// ErrExist too: the caller compares content.
	IfAbsent bool
}

// A Range is a part of an object, in bytes. The zero Range is the whole.
type Range struct {
	Off int64 // from the beginning
	Len int64 // 0: to the end
}

// An Object describes a stored object.
type Object struct {
	Key      string
	Size     int64     // bytes
	Modified time.Time // by the store's clock
}
