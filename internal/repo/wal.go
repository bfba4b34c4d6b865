package repo

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash"
	"io"
	"iter"
	"path"
	"strings"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// An Archive is the write-ahead log of one PostgreSQL cluster.
type Archive struct {
	Cluster string      `json:"cluster"`
	System  pg.SystemID `json:"system_id"`
	Major   int         `json:"pg_major"` // of PostgreSQL, for example 15
}

func (a Archive) dir() string {
	return fmt.Sprintf("%swal/%v-%d/", clusterPrefix(a.Cluster), a.System, a.Major)
}

func (a Archive) timeline(t pg.Timeline) string { return a.dir() + t.String() + "/" }

func (a Archive) key(n pg.WALName) string {
	return a.timeline(n.Timeline) + n.String() + ".zst"
}

// keyBy is the key of a file that an instance archives. Every server that leaves
// a timeline archives a last piece of it, as far as it had come: they differ, all
// are right, and none may keep the next from archiving.
func (a Archive) keyBy(n pg.WALName, instance string) string {
	if n.Kind != pg.Partial || instance == "" {
		return a.key(n)
	}
	return a.timeline(n.Timeline) + n.String() + "." + instance + ".zst"
}

// name takes a key apart, into the file's name and, of a partial segment, the
// instance: earlier versions wrote none there. ok is false for other keys.
func (a Archive) name(key string) (n pg.WALName, instance string, ok bool) {
	text := strings.TrimSuffix(path.Base(key), ".zst")
	if file, by, cut := strings.Cut(text, ".partial."); cut && by != "" {
		text, instance = file+".partial", by
	}
	n, err := pg.ParseWALName(text)
	return n, instance, err == nil && key == a.keyBy(n, instance)
}

// A walHeader begins every object of the archive. It is signed and never
// encrypted, so that a host that cannot read data can compare.
type walHeader struct {
	Header
	Archive
	Name      string `json:"name"`
	Instance  string `json:"instance,omitempty"` // who wrote it
	Size      int64  `json:"size"`               // bytes
	Sum       []byte `json:"sha256"`             // of the file
	Stored    int64  `json:"stored"`             // bytes of the body
	StoredSum []byte `json:"stored_sha256"`
	Epoch     int    `json:"epoch,omitempty"` // whose key opens the body; 0: not encrypted
}

// maxWALHeader is far above what a walHeader with its signature takes.
const maxWALHeader = 64 << 10

// sameWAL fails unless what is stored is what is to be stored, and whole.
func (r *Repo) sameWAL(ctx context.Context, a Archive, n pg.WALName, want walHeader) error {
	o, err := r.openWAL(ctx, a, n, a.keyBy(n, want.Instance))
	if err != nil {
		return err
	}
	defer o.Close()
	if !bytes.Equal(o.header.Sum, want.Sum) || o.header.Size != want.Size {
		return fmt.Errorf("a file of %d bytes with SHA-256 %x is archived under this name, this one has %d bytes and %x: %w",
			o.header.Size, o.header.Sum, want.Size, want.Sum, fail.WALConflict)
	}
	return o.finish()
}

// CheckWAL reads a file of the archive and compares what is stored with its
// signed header. That takes no key. It fails with store.ErrNotExist where the
// store says that there is no such object.
func (r *Repo) CheckWAL(ctx context.Context, a Archive, n pg.WALName) error {
	o, err := r.findWAL(ctx, a, n)
	if err == nil {
		err = o.finish()
		o.Close()
	}
	return wrap("check", a.key(n), err)
}

// ReadWAL writes the content of a file of the archive to w. What w got counts
// only if nil is returned: then its signature, place, size and SHA-256 are those
// of the file that was archived. It fails with store.ErrNotExist where the store
// says that there is no such object.
func (r *Repo) ReadWAL(ctx context.Context, a Archive, n pg.WALName, w io.Writer) error {
	o, err := r.findWAL(ctx, a, n)
	if err == nil {
		defer o.Close()
		err = r.copyWAL(o, w)
	}
	return wrap("read", a.key(n), err)
}

func (r *Repo) copyWAL(o *walObject, w io.Writer) (err error) {
	var body io.Reader = o
	if o.header.Epoch > 0 {
		if body, err = seal.DecryptFrom(o, r.metadataIdentities()...); err != nil {
			return cmp.Or(o.finish(), o.why(err)) // damage can look like a missing key
		}
	}
	plain, err := seal.DecompressFrom(body)
	if err != nil {
		return o.why(err)
	}
	defer plain.Close()
	sum, sink := sha256.New(), &sink{w: w}
	size, err := io.Copy(io.MultiWriter(sink, sum), io.LimitReader(plain, o.header.Size+1))
	switch {
	case sink.err != nil:
		return fmt.Errorf("store it here: %w", sink.err)
	case err != nil:
		return o.why(err)
	case size != o.header.Size || !bytes.Equal(sum.Sum(nil), o.header.Sum):
		return fmt.Errorf("content is not what was archived: %w", fail.Corrupt)
	}
	return o.finish()
}

// A sink remembers that writing failed, which is not the object's fault.
type sink struct {
	w   io.Writer
	err error
}

func (s *sink) Write(p []byte) (int, error) {
	n, err := s.w.Write(p)
	s.err = err
	return n, err
}

// A walObject is an object of the archive whose header was checked. Reading
// yields its body as stored.
type walObject struct {
	io.ReadCloser
	header walHeader
	read   int64
	sum    hash.Hash
	err    error // of the store, but for the end
}

// findWAL is openWAL where only the file's name is known. Of partial segments
// there may be several, and none is better than another.
func (r *Repo) findWAL(ctx context.Context, a Archive, n pg.WALName) (*walObject, error) {
	if n.Kind != pg.Partial {
		return r.openWAL(ctx, a, n, a.key(n))
	}
	var found []string
	for o, err := range r.st.List(ctx, a.timeline(n.Timeline)+n.String()+".", "") {
		if err != nil {
			return nil, err
		}
		if same, _, ok := a.name(o.Key); ok && same == n {
			found = append(found, o.Key)
		}
	}
	switch len(found) {
	case 0:
		return nil, store.ErrNotExist
	case 1:
		return r.openWAL(ctx, a, n, found[0])
	}
	return nil, fail.Hint(fmt.Errorf("%d servers left the timeline within this segment: %w", len(found), fail.BadConfig),
		"PostgreSQL needs none of them: the segment of the next timeline begins with the same log. Read one from the repository itself: "+strings.Join(found, ", "))
}

// openWAL reads the header of an object and checks that it belongs there.
func (r *Repo) openWAL(ctx context.Context, a Archive, n pg.WALName, key string) (*walObject, error) {
	rc, err := r.st.Get(ctx, key, store.Range{})
	if err != nil {
		return nil, err
	}
	o := &walObject{ReadCloser: rc, sum: sha256.New()}
	if o.header, err = r.readWALHeader(o); err == nil {
		err = o.header.belongs(a, n, r.Marker.Encrypted)
	}
	if err == nil && key != a.key(n) && key != a.keyBy(n, o.header.Instance) {
		err = fmt.Errorf("holds a file of instance %q: %w", o.header.Instance, fail.Corrupt)
	}
	if err != nil {
		rc.Close()
		return nil, o.why(err)
	}
	o.read = 0
	o.sum.Reset() // what follows is the body
	return o, nil
}

func (r *Repo) readWALHeader(o io.Reader) (h walHeader, err error) {
	var frame [8]byte
	if _, err := io.ReadFull(o, frame[:]); err != nil {
		return h, err
	}
	length := binary.LittleEndian.Uint32(frame[4:])
	if binary.LittleEndian.Uint32(frame[:]) != skipMagic || length > maxWALHeader {
		return h, fmt.Errorf("does not begin with a header: %w", fail.Corrupt)
	}
	doc := make([]byte, length)
	if _, err := io.ReadFull(o, doc); err != nil {
		return h, err
	}
	err = r.parseSigned("header", doc, "wal", &h)
	return h, err
}

// belongs compares a header that somebody trusted signed with the place it was
// found at.
func (h walHeader) belongs(a Archive, n pg.WALName, encrypted bool) error {
	switch {
	case h.System != a.System || h.Major != a.Major:
		return fmt.Errorf("holds a file of system %v, PostgreSQL %d, not of %v, PostgreSQL %d: %w", h.System, h.Major, a.System, a.Major, fail.WrongSystem)
	case h.Cluster != a.Cluster:
		return fmt.Errorf("holds a file of cluster %q: %w", h.Cluster, fail.WrongSystem)
	case h.Name != n.String():
		return fmt.Errorf("holds the file %q: %w", h.Name, fail.Corrupt)
	case h.Size < 0 || h.Stored < 0 || (h.Epoch > 0) != encrypted:
		return fmt.Errorf("its header contradicts itself or the repository: %w", fail.Corrupt)
	}
	return nil
}

func (o *walObject) Read(p []byte) (int, error) {
	n, err := o.ReadCloser.Read(p)
	o.read += int64(n)
	o.sum.Write(p[:n])
	if err != nil && err != io.EOF {
		o.err = err
	}
	return n, err
}

// finish reads what is left of the body and compares the whole.
func (o *walObject) finish() error {
	if _, err := io.Copy(io.Discard, io.LimitReader(o, o.header.Stored+1-o.read)); err != nil {
		return o.why(err)
	}
	if o.read != o.header.Stored || !bytes.Equal(o.sum.Sum(nil), o.header.StoredSum) {
		return fmt.Errorf("the stored bytes are not those that were written: %w", fail.Corrupt)
	}
	return nil
}

// why tells the store's trouble from damage.
func (o *walObject) why(err error) error {
	switch {
	case o.err != nil:
		return o.err
	case fail.KindOf(err) == fail.Unknown:
		return fmt.Errorf("%w: %w", err, fail.Corrupt)
	}
	return err
}

// ListWAL yields the files of one timeline of an archive, in the order of their
// names; timeline 0 means all, timeline by timeline. A partial segment is yielded
// once for each who archived it. Of after and what sorts
// before it, nothing is listed; the zero name means from the beginning.
func (r *Repo) ListWAL(ctx context.Context, a Archive, t pg.Timeline, after pg.WALName) iter.Seq2[pg.WALName, error] {
	prefix := a.dir()
	if t != 0 {
		prefix = a.timeline(t)
	}
	last := ""
	if after != (pg.WALName{}) {
		last = a.key(after)
	}
	return func(yield func(pg.WALName, error) bool) {
		for o, err := range r.st.List(ctx, prefix, last) {
			if err != nil {
				yield(pg.WALName{}, wrap("list", prefix, err))
				return
			}
			n, _, ok := a.name(o.Key)
			if !ok {
				continue // not ours
			}
			if !yield(n, nil) {
				return
			}
		}
	}
}
