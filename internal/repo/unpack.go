package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// packWork is a pack to be read and the frames of it that are wanted.
type packWork struct {
	pack Pack
	want []wantedFrame // frames ascend
}

// packs reads each pack once.
func (re *reader) packs(ctx context.Context, all []packWork) error {
	work := make(chan packWork)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(work)
		for _, w := range all {
			select {
			case work <- w:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range re.opt.Readers {
		g.Go(func() (err error) {
			dec, err := seal.NewDecompressor(1 << 20)
			if err != nil {
				return err
			}
			defer dec.Close()
			u := unpacker{re: re, dec: dec}
			defer func() { err = errors.Join(err, u.closeFile()) }()
			for w := range work {
				err := u.pack(ctx, w)
				if derr := re.damage(w.pack.Key, err); derr != nil {
					return derr
				}
				if err != nil && re.opt.Place != nil {
					return wrap("read", w.pack.Key, err)
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// An unpacker is what one goroutine needs to read packs.
type unpacker struct {
	re     *reader
	dec    *seal.Decompressor
	stored bytes.Buffer
	packed []byte // one frame, compressed
	plain  []byte // one frame

	file *os.File    // the one written last, still open
	of   *wantedFile // whose it is
}

// pack reads a pack, compares its digests, and does with each frame what is
// wanted. Where little of it is, only that is read.
func (u *unpacker) pack(ctx context.Context, w packWork) error {
	if u.re.opt.Place != nil {
		foot, err := u.re.feet.get(ctx, w.pack)
		if err != nil {
			return err
		}
		if spans, few := foot.spans(w.want); few {
			return u.ranges(ctx, w, foot, spans)
		}
	}
	p := w.pack
	rc, err := u.re.repo.st.Get(ctx, p.Key, store.Range{})
	if err != nil {
		return err
	}
	defer rc.Close()
	u.stored.Reset()
	u.stored.Grow(int(p.Size) + bytes.MinRead)
	if _, err := u.stored.ReadFrom(io.LimitReader(rc, p.Size+1)); err != nil {
		return err
	}
	b := u.stored.Bytes()
	if int64(len(b)) != p.Size {
		return fmt.Errorf("size is not %d bytes: %w", p.Size, fail.Corrupt)
	}
	foot, _, err := u.re.repo.decodeTail(b[p.Data:], p.Size, &p)
	if err != nil {
		return err
	}
	if sum := sha256.Sum256(b[:p.Data]); !bytes.Equal(sum[:], p.Sum) {
		return fmt.Errorf("data is not what was stored: %w", fail.Corrupt)
	}
	if u.re.rep.Verified == VerifiedContent {
		if err := u.frames(ctx, b[:p.Data], foot, w.want); err != nil {
			return err
		}
	}
	u.done(p.Size, p.Size)
	return nil
}

// done counts a pack of size bytes that is done with, and what was read of it.
func (u *unpacker) done(read, size int64) {
	u.re.mu.Lock()
	u.re.rep.Stored += read
	u.re.mu.Unlock()
	u.re.progress(size)
}

// frames opens every frame. Where nothing is written, every block is compared;
// else those that are wanted are, and written.
func (u *unpacker) frames(ctx context.Context, data []byte, foot *footer, want []wantedFrame) error {
	src := io.Reader(bytes.NewReader(data))
	if u.re.repo.Marker.Encrypted {
		var err error
		if src, err = seal.DecryptFrom(src, u.re.repo.opened()...); err != nil {
			return err
		}
	}
	for n, fr := range foot.Frames {
		if err := ctx.Err(); err != nil {
			return err
		}
		u.packed = slices.Grow(u.packed[:0], fr.Stored)[:fr.Stored]
		if _, err := io.ReadFull(src, u.packed); err != nil {
			return fmt.Errorf("frame %d: %w: %w", n, err, fail.Corrupt)
		}
		var w *wantedFrame
		if len(want) > 0 && want[0].frame == n {
			w, want = &want[0], want[1:]
		}
		if w == nil && u.re.opt.Place != nil {
			continue
		}
		if err := u.frame(foot, n, u.packed, w); err != nil {
			return err
		}
	}
	if n, err := src.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return fmt.Errorf("data goes on after the last frame: %w", fail.Corrupt)
	}
	return nil
}

// frame opens one frame, compares its blocks and writes those that are wanted.
// want is nil where nothing is written.
func (u *unpacker) frame(foot *footer, n int, packed []byte, want *wantedFrame) (err error) {
	fr := foot.Frames[n]
	file := foot.Files[fr.File]
	if u.plain, err = u.dec.Append(u.plain[:0], packed); err != nil {
		return fmt.Errorf("frame %d of %s: %w", n, file.Path, err)
	}
	if len(u.plain) != fr.Content {
		return fmt.Errorf("frame %d of %s: %d bytes, want %d: %w", n, file.Path, len(u.plain), fr.Content, fail.Corrupt)
	}
	writes := u.re.opt.Place != nil
	var runs []run // wanted and not met yet
	if writes {
		runs = want.blocks
	}
	var gather struct{ from, to, off int64 } // content to be written, and where
	flush := func() error {
		if gather.from == gather.to {
			return nil
		}
		return u.write(want.file, gather.off, u.plain[gather.from:gather.to])
	}
	id, at := fr.id, int64(0)
	for _, r := range fr.Blocks {
		for b := r[0]; b < r[0]+r[1]; b, id = b+1, id+1 {
			begin, end := at, at+file.length(b)
			at = end
			for len(runs) > 0 && runs[0][0]+runs[0][1] <= b {
				runs = runs[1:]
			}
			if writes && (len(runs) == 0 || runs[0][0] > b) {
				continue
			}
			if seal.Identify(u.plain[begin:end], foot.Seed) != foot.ids[id] {
				return fmt.Errorf("block %d of %s is not what was stored: %w", b, file.Path, fail.Corrupt)
			}
			if !writes {
				continue
			}
			if off := b * file.Block; gather.to != begin || gather.off+begin-gather.from != off {
				if err := flush(); err != nil {
					return err
				}
				gather.from, gather.off = begin, off
			}
			gather.to = end
		}
	}
	return flush()
}

// write writes a part of a file.
func (u *unpacker) write(f *wantedFile, off int64, b []byte) error {
	if u.of != f {
		if err := u.closeFile(); err != nil {
			return err
		}
		file, err := f.dir.OpenFile(f.name, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		u.file, u.of = file, f
	}
	_, err := u.file.WriteAt(b, off)
	return err
}

func (u *unpacker) closeFile() error {
	if u.file == nil {
		return nil
	}
	err := u.file.Close()
	u.file, u.of = nil, nil
	return err
}
