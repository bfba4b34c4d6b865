package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// An Archiver puts files into an archive. It opens the repository while it reads
// and compresses the first file, and sends nothing before it knows that marker
// and keys are good. Use NewArchiver. Its methods may be called concurrently.
type Archiver struct {
	st       store.Store
	access   Access
	archive  Archive
	instance string

	turn   chan struct{} // holds one while somebody opens the repository
	opened chan struct{} // closed when r is known
	r      *Repo

	parcels sync.Pool
}

// NewArchiver returns an Archiver that writes in the name of an instance. It
// does nothing yet.
func NewArchiver(st store.Store, access Access, a Archive, instance string) *Archiver {
	return &Archiver{st: st, access: access, archive: a, instance: instance, turn: make(chan struct{}, 1), opened: make(chan struct{})}
}

// Archiver returns an Archiver for a repository that is open already.
func (r *Repo) Archiver(a Archive, instance string) *Archiver {
	w := NewArchiver(r.st, r.access, a, instance)
	w.r = r
	close(w.opened)
	return w
}

// Open opens the repository, once: who comes later waits for it. If it fails, for
// instance because the time of who began it is over, the next one tries again.
func (w *Archiver) Open(ctx context.Context) error {
	select {
	case <-w.opened:
		return nil
	case w.turn <- struct{}{}:
		defer func() { <-w.turn }()
	case <-ctx.Done():
		return fmt.Errorf("open repository: %w", ctx.Err())
	}
	select {
	case <-w.opened: // meanwhile
		return nil
	default:
	}
	r, err := Open(ctx, w.st, w.access)
	if err == nil {
		w.r = r
		close(w.opened)
	}
	return err
}

func (w *Archiver) repo(ctx context.Context) (*Repo, error) {
	if err := w.Open(ctx); err != nil {
		return nil, err
	}
	return w.r, nil
}

// Repository is Marker.ID of the repository, which it opens if need be.
func (w *Archiver) Repository(ctx context.Context) (string, error) {
	r, err := w.repo(ctx)
	if err != nil {
		return "", err
	}
	return r.Marker.ID, nil
}

// A WALFile is a file to archive.
type WALFile struct {
	Name    pg.WALName
	Size    int64 // bytes
	Content io.Reader
	// May says whether the file may be written, and is asked while it is being
	// read. If not, it is enough that the archive holds the same file already.
	// Nil: it may.
	May func(context.Context) error
}

// Put stores a file, which is durable when nil is returned, and returns its
// SHA-256. The same content again is success, once all that is stored was read
// back and compared; other content is fail.WALConflict, and nothing is changed.
func (w *Archiver) Put(ctx context.Context, f WALFile) ([]byte, error) {
	if w.access.Signer == nil {
		return nil, fail.Hint(fmt.Errorf("archive %v: no signing key: %w", f.Name, fail.BadConfig), "pgkeep key init makes one")
	}
	p, _ := w.parcels.Get().(*parcel)
	if p == nil {
		p = new(parcel)
	}
	defer w.parcels.Put(p)
	var refused, opened error
	var h walHeader
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { opened = w.Open(gctx); return opened })
	if f.May != nil {
		g.Go(func() error { refused = f.May(gctx); return nil })
	}
	g.Go(func() (err error) { h, err = w.pack(gctx, p, f); return wrap("archive", f.Name.String(), err) })
	err := g.Wait()
	if opened != nil && ctx.Err() != nil {
		err = opened // it tells what the time went into
	}
	if err != nil {
		return nil, err
	}
	if refused == nil {
		err := w.r.putWAL(ctx, w.archive, f.Name, h, p)
		return h.Sum, err
	}
	if err := w.r.sameWAL(ctx, w.archive, f.Name, h); err != nil {
		return nil, refused
	}
	return h.Sum, nil
}

func (r *Repo) putWAL(ctx context.Context, a Archive, n pg.WALName, h walHeader, p *parcel) error {
	doc, err := r.access.Signer.Sign(h)
	if err != nil {
		return wrap("sign", n.String(), err)
	}
	key := a.keyBy(n, h.Instance)
	err = r.st.Put(ctx, key, bytes.NewReader(p.object(doc)), store.PutOptions{IfAbsent: true})
	if errors.Is(err, store.ErrExist) {
		return wrap("compare", key, r.sameWAL(ctx, a, n, h))
	}
	return wrap("write", key, err)
}

// headroom is what a parcel leaves before the body for what goes there last.
const headroom = 8 + maxWALHeader

// A parcel holds an object while it is made. It is used again: memory is what
// bounds how many files are on their way at a time.
type parcel struct {
	buf    []byte // headroom, then the body
	pieces []piece
}

func (p *parcel) Write(b []byte) (int, error) { p.buf = append(p.buf, b...); return len(b), nil }

func (p *parcel) body() []byte { return p.buf[headroom:] }

// object puts the header before the body.
func (p *parcel) object(doc []byte) []byte {
	head := append(encodeSkip(int64(len(doc))), doc...)
	at := headroom - len(head)
	copy(p.buf[at:], head)
	return p.buf[at:]
}

// pack reads a file, compresses it, and encrypts it as soon as the keys are there.
func (w *Archiver) pack(ctx context.Context, p *parcel, f WALFile) (walHeader, error) {
	if room := headroom + int(f.Size) + seal.Overhead(int(f.Size), 1); cap(p.buf) < room {
		p.buf = make([]byte, headroom, room) // most of it will never be touched
	}
	p.buf = p.buf[:headroom]
	sealed, err := seal.EncryptTo(p) // to nobody; a repository that does not want that is not opened
	if w.access.Encrypted {
		sealed = &late{ctx: ctx, ready: w.opened, open: func() (io.WriteCloser, error) {
			to, err := w.r.walReaders(f.Name)
			if err != nil {
				return nil, err
			}
			return seal.EncryptTo(p, to...)
		}}
	}
	if err != nil {
		return walHeader{}, err
	}
	sum := sha256.New()
	size, err := p.compress(ctx, sum, sealed, io.LimitReader(f.Content, f.Size+1))
	switch {
	case err != nil:
		return walHeader{}, err
	case size != f.Size:
		return walHeader{}, fmt.Errorf("the file has not the %d bytes it had a moment ago", f.Size)
	}
	if err := sealed.Close(); err != nil {
		return walHeader{}, err
	}
	if err := wait(ctx, w.opened); err != nil {
		return walHeader{}, err
	}
	stored := sha256.Sum256(p.body())
	return walHeader{Header: w.access.header("wal"), Archive: w.archive, Name: f.Name.String(), Instance: w.instance,
		Size: size, Sum: sum.Sum(nil), Stored: int64(len(p.body())), StoredSum: stored[:], Epoch: w.r.epochNumber()}, nil
}

// compress reads r to its end, a piece at a time. It passes the content on to
// plain and, in frames of zstd, to packed. Reading, hashing and compressing go on
// at the same time: PostgreSQL waits.
func (p *parcel) compress(ctx context.Context, plain, packed io.Writer, r io.Reader) (int64, error) {
	g, ctx := errgroup.WithContext(ctx)
	if p.pieces == nil {
		for range min(4, 1+runtime.GOMAXPROCS(0)) { // memory that was never touched costs time too
			comp, err := seal.NewCompressor()
			if err != nil {
				return 0, err
			}
			p.pieces = append(p.pieces, piece{comp: comp, plain: make([]byte, pieceSize)})
		}
	}
	free := make(chan *piece, len(p.pieces))
	for i := range p.pieces {
		free <- &p.pieces[i]
	}
	order := make(chan *piece, len(p.pieces)) // has room for all
	var size int64
	g.Go(func() error {
		defer close(order)
		for {
			var one *piece
			select {
			case one = <-free:
			case <-ctx.Done():
				return ctx.Err()
			}
			n, err := io.ReadFull(r, one.plain[:pieceSize])
			size += int64(n)
			if n > 0 {
				one.plain, one.done = one.plain[:n], make(chan struct{})
				g.Go(func() error {
					defer close(one.done)
					one.packed = one.comp.Append(one.packed[:0], one.plain)
					return nil
				})
				order <- one
			}
			if err == io.EOF || err == io.ErrUnexpectedEOF {
				return nil
			}
			if err != nil {
				return err
			}
		}
	})
	g.Go(func() error {
		for one := range order {
			if _, err := plain.Write(one.plain); err != nil {
				return err
			}
			<-one.done
			if _, err := packed.Write(one.packed); err != nil {
				return err
			}
			free <- one
		}
		return nil
	})
	err := g.Wait()
	return size, err
}

// A piece of a file on its way through compress becomes a frame.
type piece struct {
	comp          *seal.Compressor
	plain, packed []byte
	done          chan struct{} // closed when packed is there
}

const pieceSize = 256 << 10 // bytes

// A late writer holds what is written until the one it is for can be opened.
type late struct {
	ctx   context.Context // of who waits
	ready <-chan struct{}
	held  [][]byte
	open  func() (io.WriteCloser, error)
	to    io.WriteCloser
}

func (l *late) Write(b []byte) (int, error) {
	if l.to == nil {
		select {
		case <-l.ready:
		default:
			l.held = append(l.held, bytes.Clone(b))
			return len(b), nil
		}
		if err := l.begin(); err != nil {
			return 0, err
		}
	}
	return l.to.Write(b)
}

func (l *late) begin() (err error) {
	if l.to, err = l.open(); err != nil {
		return err
	}
	for _, b := range l.held {
		if _, err := l.to.Write(b); err != nil {
			return err
		}
	}
	l.held = nil // and its memory
	return nil
}

// Close waits until what was held could be written.
func (l *late) Close() error {
	if l.to == nil {
		if err := wait(l.ctx, l.ready); err != nil {
			return err
		}
		if err := l.begin(); err != nil {
			return err
		}
	}
	return l.to.Close()
}

// wait returns when something is ready, or why nobody waits for it any more.
func wait(ctx context.Context, ready <-chan struct{}) error {
	select {
	case <-ready:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// epochNumber is that of the key that content is encrypted to now; 0 for none.
func (r *Repo) epochNumber() int {
	if len(r.epochs) == 0 {
		return 0
	}
	return r.epochs[len(r.epochs)-1].Number
}
