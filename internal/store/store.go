// Package store is object storage as pgkeep needs it: whole objects under flat
// keys, written once, listed by prefix.
package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"time"
	"unicode"
	"unicode/utf8"
)

var (
	// ErrNotExist means that there is no object under the key: the store said
	// so itself. Every other trouble is another error.
	ErrNotExist = errors.New("object does not exist")
	// ErrExist means that a Put with IfAbsent found an object under the key.
	ErrExist = errors.New("object already exists")
)

// A Store keeps objects. Its methods may be called concurrently. A key is what
// CheckKey accepts, and no key is the directory of another ("a" and "a/b"): a
// store may refuse the second.
// Package storetest checks an implementation against these comments.
//
// A method retries what may pass by itself (no connection, time-outs, 5xx,
// SlowDown) with back-off until its context ends or its own patience does, and
// then fails with fail.StoreDown. It does not retry refusals: fail.StoreDenied.
type Store interface {
	// Put stores everything r yields under key. The object appears whole or
	// not at all: if r or the transfer fails, the key is as it was before.
	// The store compares a checksum of what it received with that of what was sent.
	// An r that is also an io.Seeker is not copied into memory; it may be
	// read twice, from where it stands, and must not change meanwhile.
	Put(ctx context.Context, key string, r io.Reader, opt PutOptions) error

	// Get opens a part of the object for reading, or fails with ErrNotExist.
	// A part that reaches beyond the end of the object fails with
	// io.ErrUnexpectedEOF at once, and so does a reader that ends before the
	// part does. The context covers the reading too. The caller closes the reader.
	Get(ctx context.Context, key string, part Range) (io.ReadCloser, error)

	// List yields the objects whose keys begin with prefix and sort behind
	// after ("": all of them), in key order. After an error it yields nothing more.
	List(ctx context.Context, prefix, after string) iter.Seq2[Object, error]

	// Delete removes objects. A key that is already gone is not an error.
	// After an error some may be removed.
	Delete(ctx context.Context, keys ...string) error
}

// A Sweeper is a Store in which a Put that was killed can leave something
// behind that is no object and takes space all the same.
type Sweeper interface {
	// AbortStale removes what Puts that have been quiet for longer than age
	// left behind, and says how many there were.
	AbortStale(ctx context.Context, age time.Duration) (int, error)
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

// Within resolves r in an object of size bytes to an offset and a length, or
// fails with io.ErrUnexpectedEOF if it reaches beyond the end.
func (r Range) Within(size int64) (off, n int64, err error) {
	n = r.Len
	if n == 0 {
		n = size - r.Off
	}
	if r.Off < 0 || r.Len < 0 {
		return 0, 0, fmt.Errorf("bytes %d+%d: negative", r.Off, r.Len)
	}
	if n < 0 || r.Off > size-n {
		return 0, 0, fmt.Errorf("bytes %d+%d of an object of %d: %w", r.Off, r.Len, size, io.ErrUnexpectedEOF)
	}
	return r.Off, n, nil
}

// An Object describes a stored object.
type Object struct {
	Key      string
	Size     int64     // bytes
	Modified time.Time // by the store's clock
}

// maxKey is the longest key in bytes. S3 allows 1,024, of which a repository's
// prefix takes some.
const maxKey = 900

// CheckKey reports whether key can name an object in every Store: elements
// separated by single slashes, none of them "." or "..", no control characters.
func CheckKey(key string) error {
	switch {
	case !utf8.ValidString(key), !fs.ValidPath(key), key == ".", len(key) > maxKey:
		return fmt.Errorf("%.40q is not an object key", key)
	}
	for _, c := range key {
		if unicode.IsControl(c) {
			return fmt.Errorf("%.40q is not an object key", key)
		}
	}
	return nil
}
