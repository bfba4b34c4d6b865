// Package dir is a store.Store in a directory: for a disk that is carried away,
// a mounted file server, and for trying out without S3. A key is a file's path.
//
// The directory must be on a file system with hard links, by which an object
// is created under a name that is free, or not at all.
package dir

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A Store keeps objects as files below one directory. Use Open.
type Store struct{ root *os.Root }

var (
	_ store.Store   = (*Store)(nil)
	_ store.Sweeper = (*Store)(nil)
)

// Open uses the directory at name, which must exist: one that is missing may be
// a disk that is not mounted.
func Open(name string) (*Store, error) {
	root, err := os.OpenRoot(name)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR):
		return nil, fail.Hint(fmt.Errorf("open store: %w: %w", fail.BadConfig, err), "make the directory first; if it is on a disk of its own, is that mounted?")
	case err != nil:
		return nil, fmt.Errorf("open store: %w", kindly(err))
	}
	return &Store{root}, nil
}

// Close ends the use of the directory. Readers that are open stay usable.
func (s *Store) Close() error { return s.root.Close() }

// check refuses what is no key, and what could be a file that is not finished.
func check(key string) error {
	if err := store.CheckKey(key); err != nil {
		return err
	}
	if durable.IsTemp(path.Base(key)) {
		return fmt.Errorf("%q is the name of an unfinished file", key)
	}
	return nil
}

// Put implements store.Store. A file system takes no checksums: this is the
// store that cannot compare one.
func (s *Store) Put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	err := check(key)
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		err = s.put(ctx, key, r, opt)
	}
	if err != nil {
		return fmt.Errorf("put %s: %w", key, kindly(err))
	}
	return nil
}

func (s *Store) put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	if info, err := s.root.Lstat(key); err == nil && !info.Mode().IsRegular() {
		return errors.New("there is something else than a file")
	}
	place := durable.Replace
	if opt.IfAbsent {
		place = durable.Create
	}
	for tries := 1; ; tries++ {
		begun := false
		err := durable.MkdirAll(s.root, path.Dir(key), 0o700)
		if err == nil {
			err = place(s.root, key, 0o600, func(w io.Writer) error {
				begun = true
				if _, err := io.Copy(w, reader{ctx, r}); err != nil {
					return err
				}
				return ctx.Err() // so that nothing appears after the context ended
			})
		}
		if errors.Is(err, fs.ErrNotExist) && !begun && tries < 100 {
			continue // a Delete that ran meanwhile took the empty directory away
		}
		if link, ok := errors.AsType[*os.LinkError](err); ok && opt.IfAbsent {
			switch {
			case errors.Is(link, fs.ErrExist):
				return store.ErrExist
			case errors.Is(link, syscall.EPERM), errors.Is(link, errors.ErrUnsupported):
				return fmt.Errorf("the file system has no hard links: %w: %w", fail.StoreUnfit, err)
			}
		}
		return err
	}
}

// A reader ends with its context. It hides what else r can do: copying in one
// go could not be ended.
type reader struct {
	ctx context.Context
	r   io.Reader
}

func (r reader) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.r.Read(p)
}

// Get implements store.Store.
func (s *Store) Get(ctx context.Context, key string, part store.Range) (io.ReadCloser, error) {
	err := check(key)
	if err == nil {
		err = ctx.Err()
	}
	if err == nil {
		var rc io.ReadCloser
		if rc, err = s.get(ctx, key, part); err == nil {
			return rc, nil
		}
	}
	return nil, fmt.Errorf("get %s: %w", key, kindly(err))
}

func (s *Store) get(ctx context.Context, key string, part store.Range) (io.ReadCloser, error) {
	f, err := s.root.Open(key)
	if missing(err) {
		return nil, store.ErrNotExist
	}
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = store.ErrNotExist // a directory of objects is none
	}
	var off, n int64
	if err == nil {
		off, n, err = part.Within(info.Size())
	}
	if err == nil {
		_, err = f.Seek(off, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &object{reader{ctx, f}, f, n}, nil
}

// An object is n bytes of a file, no less: it may be cut while it is read.
type object struct {
	reader
	io.Closer
	n int64
}

func (o *object) Read(p []byte) (int, error) {
	if o.n == 0 {
		return 0, io.EOF
	}
	n, err := o.reader.Read(p[:min(int64(len(p)), o.n)])
	o.n -= int64(n)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// List implements store.Store. It holds one directory's names at a time, and
// those above it.
func (s *Store) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		err := s.walk(ctx, path.Dir(prefix+"x"), prefix, func(key string, info fs.FileInfo) error {
			if key <= after || durable.IsTemp(info.Name()) || store.CheckKey(key) != nil {
				return nil // unfinished, or not ours
			}
			if !yield(store.Object{Key: key, Size: info.Size(), Modified: info.ModTime()}, nil) {
				return fs.SkipAll
			}
			return nil
		})
		if err != nil && err != fs.SkipAll {
			yield(store.Object{}, fmt.Errorf("list %q: %w", prefix, kindly(err)))
		}
	}
}

// walk calls visit for the files below dir whose keys begin with prefix, in key
// order, until visit returns an error.
func (s *Store) walk(ctx context.Context, dir, prefix string, visit func(key string, info fs.FileInfo) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	entries, err := s.entries(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		key := path.Join(dir, e.Name())
		switch {
		case e.IsDir():
			if strings.HasPrefix(key+"/", prefix) {
				err = s.walk(ctx, key, prefix, visit)
			}
		case strings.HasPrefix(key, prefix):
			info, serr := s.root.Lstat(key)
			switch {
			case missing(serr): // removed meanwhile
			case serr != nil:
				err = serr
			case !info.Mode().IsRegular():
				err = fmt.Errorf("%s is not a regular file", key)
			default:
				if err = ctx.Err(); err == nil {
					err = visit(key, info)
				}
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// entries reads a directory, none if it is not there, in the order of the keys
// below it: the slash that follows a directory's name counts.
func (s *Store) entries(dir string) ([]fs.DirEntry, error) {
	f, err := s.root.Open(dir)
	if missing(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	entries, err := f.ReadDir(-1)
	if errors.Is(err, syscall.ENOTDIR) {
		entries, err = nil, nil
	}
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	slices.SortFunc(entries, func(a, b fs.DirEntry) int { return cmp.Compare(sortName(a), sortName(b)) })
	return entries, nil
}

func sortName(e fs.DirEntry) string {
	if e.IsDir() {
		return e.Name() + "/"
	}
	return e.Name()
}

// Delete implements store.Store. It removes directories that it made empty.
func (s *Store) Delete(ctx context.Context, keys ...string) error {
	changed := make(map[string]bool) // directories whose names must last
	for _, key := range keys {
		err := check(key)
		if err == nil {
			err = ctx.Err()
		}
		if err == nil {
			err = s.delete(key, changed)
		}
		if err != nil {
			return fmt.Errorf("delete %s: %w", key, kindly(err))
		}
	}
	for dir := range changed {
		if err := durable.SyncDir(s.root, dir); err != nil && !missing(err) {
			return fmt.Errorf("delete in %s: %w", dir, kindly(err))
		}
	}
	return nil
}

func (s *Store) delete(key string, changed map[string]bool) error {
	info, err := s.root.Lstat(key)
	if missing(err) || err == nil && info.IsDir() {
		return nil
	}
	if err != nil {
		return err
	}
	if err := s.root.Remove(key); err != nil && !missing(err) {
		return err
	}
	dir := path.Dir(key)
	for dir != "." && s.root.Remove(dir) == nil { // fails unless it is empty
		dir = path.Dir(dir)
	}
	changed[dir] = true
	return nil
}

// AbortStale implements store.Sweeper: it removes temporary files that nobody
// has written to for longer than age.
func (s *Store) AbortStale(ctx context.Context, age time.Duration) (int, error) {
	n := 0
	err := s.walk(ctx, ".", "", func(key string, info fs.FileInfo) error {
		if !durable.IsTemp(info.Name()) || time.Since(info.ModTime()) <= age {
			return nil
		}
		if err := s.root.Remove(key); err != nil && !missing(err) {
			return err
		}
		n++
		return nil
	})
	if err != nil {
		return n, fmt.Errorf("abort stale: %w", kindly(err))
	}
	return n, nil
}

// missing reports whether err says that there is no such file: neither it, nor
// a directory above it.
func missing(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR)
}

// kindly adds to err the kind that its errno has for the operator.
func kindly(err error) error {
	switch {
	case fail.KindOf(err) != fail.Unknown:
		return err
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fail.Hint(fmt.Errorf("%w: %w", fail.NoSpace, err), "free space on the file system of the repository")
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fail.Hint(fmt.Errorf("%w: %w", fail.StoreDenied, err), "check owner and mode of the repository's directory, and how it is mounted")
	}
	return err
}
