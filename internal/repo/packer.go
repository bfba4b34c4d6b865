package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/pgkeep/pgkeep/internal/seal"
)

// A packer is one reader's state: the pack it fills and what it needs for that.
type packer struct {
	w    *Writer
	send chan<- *builder
	comp *seal.Compressor
	b    *builder // nil: none begun

	in         []byte // what was read last
	winners    []winner
	pending    frameBuf
	compressed []byte // one frame
}

// reader handles chunks until there are no more, then sends what it has.
func (w *Writer) reader(ctx context.Context, chunks <-chan chunk, send chan<- *builder) error {
	comp, err := seal.NewCompressor()
	if err != nil {
		return err
	}
	p := &packer{w: w, send: send, comp: comp, in: make([]byte, readSize)}
	for c := range chunks {
		err := p.chunk(ctx, c)
		if cerr := c.file.close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fmt.Errorf("store %s: %w", c.file.file.Path, err)
		}
		w.progress()
	}
	return p.flush(ctx)
}

func (p *packer) flush(ctx context.Context) error {
	if p.b == nil {
		return nil
	}
	select {
	case p.send <- p.b:
		p.b = nil
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// chunkState is what is known of a chunk while it is being stored.
type chunkState struct {
	file   packFile
	crc    uint32
	zeros  int64 // bytes of zeros that crc does not cover yet
	zero   []run
	layers []layerRef
	held   []heldLayer
}

// chunk stores the blocks of c that are not stored yet.
func (p *packer) chunk(ctx context.Context, c chunk) error {
	f := c.file
	if ok, err := f.open(&p.w.opt); !ok || err != nil {
		return err
	}
	st := chunkState{file: f.packFile(), held: f.held}
	if f.chunks == 1 { // its size may be another than was listed
		c.first, c.count = 0, st.file.count()
	}
	if c.count == 0 {
		return nil
	}
	var uses []layerUse
	var err error
	p.winners, uses, err = p.w.winners(ctx, f.held, &f.mu, st.file, c.first, c.count, p.winners)
	if err != nil {
		return err
	}
	p.rebase(st.file, uses)
	step := max(1, readSize/st.file.Block)
	for n, end := c.first, c.first+c.count; n < end; n += step {
		step = min(step, end-n)
		off := n * st.file.Block
		size := min(step*st.file.Block, st.file.Size-off)
		if err := p.blocks(ctx, f, &st, n, c.first, size); err != nil {
			return err
		}
		p.w.read.Add(size)
		p.w.progress()
	}
	if err := p.frame(ctx, &st); err != nil {
		return err
	}
	st.addZeros()
	after := st.file.Size - min((c.first+c.count)*st.file.Block, st.file.Size)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.crc ^= seal.ShiftCRC(st.crc, after)
	f.zero = append(f.zero, st.zero...)
	f.layers = append(f.layers, st.layers...)
	return ctx.Err()
}

// rebase gives up layers: their blocks win no more.
func (p *packer) rebase(file packFile, uses []layerUse) {
	must, may := rebase(uses, oldFor(file.Path), p.w.opt.limits.layers)
	for _, i := range may {
		cost := uses[i].live * file.Block
		if p.w.spare.Add(-cost) < 0 {
			p.w.spare.Add(cost)
			continue
		}
		must = append(must, i)
	}
	if len(must) == 0 {
		return
	}
	drop := make([]bool, len(uses))
	for _, i := range must {
		drop[i] = true
	}
	for i := range p.winners {
		if win := &p.winners[i]; win.ok && drop[win.layer] {
			win.ok = false
		}
	}
}

// blocks reads size bytes from block n on, and compares or packs each block.
func (p *packer) blocks(ctx context.Context, f *filing, st *chunkState, n, first, size int64) error {
	if p.w.opt.Wait != nil {
		if err := p.w.opt.Wait(ctx, size); err != nil {
			return err
		}
	}
	in := p.in[:size]
	got, err := f.source.ReadAt(in, n*st.file.Block)
	switch {
	case got == len(in):
	case err != nil && !errors.Is(err, io.EOF):
		return fmt.Errorf("at byte %d of %d: %w", n*st.file.Block+int64(got), st.file.Size, err)
	case p.w.opt.Open == nil:
		return fmt.Errorf("at byte %d of %d: the file became shorter while it was read", n*st.file.Block+int64(got), st.file.Size)
	default:
		clear(in[got:])
	}
	for ; len(in) > 0; n++ {
		block := in[:st.file.length(n)]
		in = in[len(block):]
		if allZero(block) {
			st.zero = appendRun(st.zero, n)
			st.zeros += int64(len(block))
			continue
		}
		id := seal.Identify(block, p.w.seed)
		st.addZeros()
		st.crc = seal.ShiftCRC(st.crc, int64(len(block))) ^ id.CRC()
		if win := p.winners[n-first]; win.ok && win.id == id {
			st.keep(win)
			p.w.kept.Add(int64(len(block)))
			continue
		}
		p.pending.add(n, id, block)
		if p.pending.n == frameBlocks {
			if err := p.frame(ctx, st); err != nil {
				return err
			}
		}
	}
	return nil
}

// addZeros brings the checksum up to date.
func (st *chunkState) addZeros() {
	if st.zeros > 0 {
		st.crc = seal.ShiftCRC(st.crc, st.zeros) ^ seal.ZeroCRC(st.zeros)
		st.zeros = 0
	}
}

// A frameBuf collects the blocks of the next frame.
type frameBuf struct {
	n       int
	blocks  []run
	ids     []seal.BlockID
	content []byte
}

func (b *frameBuf) add(n int64, id seal.BlockID, block []byte) {
	b.n++
	b.blocks = appendRun(b.blocks, n)
	b.ids = append(b.ids, id)
	b.content = append(b.content, block...)
}

func (b *frameBuf) reset() {
	b.n, b.blocks, b.ids, b.content = 0, b.blocks[:0], b.ids[:0], b.content[:0]
}

// frame compresses what is pending and adds it to the pack.
func (p *packer) frame(ctx context.Context, st *chunkState) error {
	if p.pending.n == 0 {
		return nil
	}
	if p.b == nil {
		var buf *bytes.Buffer
		select {
		case buf = <-p.w.free:
		case <-ctx.Done():
			return ctx.Err()
		}
		// Doubling would leave it twice as large: a pack, its last frame, its footer.
		buf.Grow(p.w.opt.PackSize + seal.Overhead(p.w.opt.PackSize, 2) + 1<<20)
		var err error
		if p.b, err = newBuilder(buf, p.w.repo.access.header("pack"), string(p.w.opt.ID), int(p.w.number.Add(1)), p.w.seed, p.w.to); err != nil {
			return err
		}
	}
	p.compressed = p.comp.Append(p.compressed[:0], p.pending.content)
	st.stored(&p.b.pack, len(p.b.foot.Frames), p.b.plain)
	if err := p.b.add(st.file, p.pending.blocks, p.pending.ids, len(p.pending.content), p.compressed); err != nil {
		return err
	}
	p.pending.reset()
	if p.b.buf.Len() >= p.w.opt.PackSize || p.b.plain >= packContent || len(p.b.foot.Frames) >= packFrames {
		return p.flush(ctx)
	}
	return nil
}

// stored notes a frame that was just added to a pack.
func (st *chunkState) stored(pack *Pack, frame int, offset int64) {
	if n := len(st.layers); n > 0 {
		if l := &st.layers[n-1]; l.pack == pack && l.first+l.frames == frame {
			l.frames++
			return
		}
	}
	st.layers = append(st.layers, layerRef{order: -1, pack: pack, first: frame, frames: 1, offset: offset})
}

// keep notes a block that is stored already.
func (st *chunkState) keep(w winner) {
	held, frame := &st.held[w.layer], int(w.frame)
	for i := len(st.layers) - 1; i >= 0; i-- {
		l := &st.layers[i]
		if l.order != held.order {
			continue
		}
		if frame < l.first { // no writer of ours makes a layer whose blocks descend
			l.first, l.frames, l.offset = frame, l.first+l.frames-frame, w.at
		}
		l.frames = max(l.frames, frame+1-l.first)
		return
	}
	st.layers = append(st.layers, layerRef{order: held.order, pack: held.pack, first: frame, frames: 1, offset: w.at})
}
