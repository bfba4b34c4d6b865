package repo

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A span is frames that are read together.
type span struct {
	from, to int64         // bytes of the data section, decrypted
	want     []wantedFrame // in order; others may lie between
}

// spanGap is how many bytes between two wanted frames are rather read than
// left out: about what a request costs.
const spanGap = 256 << 10

// spans returns what is to be read for the wanted frames, and whether that is
// so little that it is better read alone than with the whole pack.
func (f *footer) spans(want []wantedFrame) (spans []span, few bool) {
	var at, sum int64
	next := 0
	for n, fr := range f.Frames {
		from, to := at, at+int64(fr.Stored)
		at = to
		if next == len(want) || want[next].frame != n {
			continue
		}
		if i := len(spans) - 1; i >= 0 && from-spans[i].to <= spanGap {
			sum += to - spans[i].to
			spans[i].to, spans[i].want = to, append(spans[i].want, want[next])
		} else {
			sum += to - from
			spans = append(spans, span{from, to, want[next : next+1 : next+1]})
		}
		next++
	}
	return spans, 2*sum < at
}

// ranges reads spans of a pack alone. Each block that is wanted is compared with
// its id, which the list of files vouches for through the directory.
func (u *unpacker) ranges(ctx context.Context, w packWork, foot *footer, spans []span) error {
	var plain int64
	for _, fr := range foot.Frames {
		plain += int64(fr.Stored)
	}
	src := &rangeReader{ctx: ctx, st: u.re.repo.st, key: w.pack.Key, size: w.pack.Data}
	encrypted := u.re.repo.Marker.Encrypted
	if encrypted {
		src.want(0, 4096) // age's header
		src.want(seal.Sealed(plain, plain, plain, w.pack.Data))
	}
	for _, s := range spans {
		if encrypted {
			src.want(seal.Sealed(s.from, s.to, plain, w.pack.Data))
		} else {
			src.want(s.from, s.to)
		}
	}
	if err := src.fetch(); err != nil {
		return err
	}
	data, n := io.ReaderAt(src), w.pack.Data
	if encrypted {
		var err error
		if data, n, err = seal.DecryptAt(src, w.pack.Data, u.re.repo.opened()...); err != nil {
			return src.why(err)
		}
	}
	if n != plain {
		return fmt.Errorf("data is of %d bytes, want %d: %w", n, plain, fail.Corrupt)
	}
	for _, s := range spans {
		if err := ctx.Err(); err != nil {
			return err
		}
		u.stored.Reset()
		u.stored.Grow(int(s.to - s.from))
		b := u.stored.AvailableBuffer()[:s.to-s.from]
		if got, err := data.ReadAt(b, s.from); got < len(b) {
			return src.why(fmt.Errorf("data: %w: %w", err, fail.Corrupt))
		}
		at, next := s.from, 0
		for n := s.want[0].frame; next < len(s.want); n++ {
			size := int64(foot.Frames[n].Stored)
			if s.want[next].frame == n {
				if err := u.frame(foot, n, b[at-s.from:at-s.from+size], &s.want[next]); err != nil {
					return err
				}
				next++
			}
			at += size
		}
	}
	u.done(src.read, w.pack.Size)
	return nil
}

// A rangeReader reads parts of an object: those that are wanted at once, others
// when they are asked for.
type rangeReader struct {
	ctx   context.Context // for as long as the reader is used: io.ReaderAt takes none
	st    store.Store
	key   string
	size  int64
	parts []rangePart
	read  int64
	err   error // the first trouble of the store, which others may have hidden
}

type rangePart struct {
	from, to int64
	b        []byte
}

// want adds a part; parts that touch are one.
func (r *rangeReader) want(from, to int64) {
	to = min(to, r.size)
	if from >= to {
		return
	}
	for i := range r.parts {
		if p := &r.parts[i]; from <= p.to && to >= p.from {
			p.from, p.to = min(p.from, from), max(p.to, to)
			return
		}
	}
	r.parts = append(r.parts, rangePart{from: from, to: to})
}

// fetch reads all wanted parts, some at a time.
func (r *rangeReader) fetch() error {
	g, ctx := errgroup.WithContext(r.ctx)
	g.SetLimit(4)
	for i := range r.parts {
		p := &r.parts[i]
		r.read += p.to - p.from
		g.Go(func() (err error) {
			p.b, err = readPart(ctx, r.st, r.key, store.Range{Off: p.from, Len: p.to - p.from}, p.to-p.from)
			return err
		})
	}
	return g.Wait()
}

// ReadAt implements io.ReaderAt, for one goroutine at a time.
func (r *rangeReader) ReadAt(b []byte, off int64) (int, error) {
	end := off + int64(len(b))
	for _, p := range r.parts {
		if p.from <= off && off < p.to {
			n := copy(b, p.b[off-p.from:])
			if n == len(b) || off+int64(n) == r.size {
				return n, eofAt(off+int64(n), r.size)
			}
			m, err := r.ReadAt(b[n:], off+int64(n))
			return n + m, err
		}
	}
	if off >= r.size {
		return 0, io.EOF
	}
	// Until the next part that is there, or the end.
	end = min(end, r.size)
	for _, p := range r.parts {
		if p.from > off {
			end = min(end, p.from)
		}
	}
	part, err := readPart(r.ctx, r.st, r.key, store.Range{Off: off, Len: end - off}, end-off)
	if err != nil {
		r.err = errors.Join(r.err, err)
		return 0, err
	}
	r.read += end - off
	n := copy(b, part)
	if n == len(b) || end == r.size {
		return n, eofAt(end, r.size)
	}
	m, err := r.ReadAt(b[n:], end)
	return n + m, err
}

func eofAt(off, size int64) error {
	if off == size {
		return io.EOF
	}
	return nil
}

// why returns the store's trouble rather than what came of it.
func (r *rangeReader) why(err error) error {
	if r.err != nil {
		return r.err
	}
	return err
}
