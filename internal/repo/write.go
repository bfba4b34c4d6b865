package repo

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A Writing is a tree to be stored as the content of a backup.
type Writing struct {
	Ref
	Root  *os.Root
	Files []File

	Readers  int // goroutines that read, hash and compress; 0: one for each processor
	Senders  int // uploads at a time; 0: 4
	PackSize int // bytes at which a pack is sent; 0: 16 MiB

	// Progress, when not nil, is told now and then how far it is. It is
	// called from several goroutines.
	Progress func(Progress)
}

// Progress counts what a Write has done so far.
type Progress struct {
	Read  int64 // bytes of files read and compared or compressed
	Total int64 // bytes of all files
	Kept  int64 // bytes of files that earlier attempts had stored already
	Sent  int64 // bytes of packs sent
}

// Write stores a tree and returns its Content. When an earlier attempt of the
// same backup finished, it returns that one's. What unfinished attempts left in
// the bucket is listed, hash-checked against the files, and kept: only the rest
// is sent.
//
// Data goes in packs, then the list of files, then the draft, which makes it count.
func (r *Repo) Write(ctx context.Context, w Writing) (Content, error) {
	content, err := r.Draft(ctx, w.Ref)
	if !errors.Is(err, store.ErrNotExist) {
		return content, err
	}
	wr, err := r.newWriter(ctx, w)
	if err != nil {
		return Content{}, err
	}
	if err := wr.run(ctx); err != nil {
		return Content{}, err
	}
	tree := wr.tree()
	part, err := r.writeTree(ctx, w.dir()+"tree-"+randomHex(4)+".jsonl.zst", string(w.ID), tree)
	if err != nil {
		return Content{}, err
	}
	content = Content{Trees: []Part{part}, Files: len(tree.Entries), Packs: len(tree.Packs)}
	for _, e := range tree.Entries {
		content.Bytes += e.Size
	}
	for _, p := range tree.Packs {
		content.Stored += p.Size
	}
	err = putSigned(ctx, r.st, r.access, w.dir()+"draft.json", draft{r.access.header("draft"), w.Ref, content})
	if errors.Is(err, store.ErrExist) { // another attempt was faster; its packs are as good
		return r.Draft(ctx, w.Ref)
	}
	return content, err
}

// chunkBlocks is how many blocks of a file one reader takes at a time: 32 MiB.
const chunkBlocks = 4096

type writer struct {
	repo  *Repo
	opt   Writing
	to    recipients
	prior *prior
	seed  uint64

	number atomic.Int64       // of the newest pack
	free   chan *bytes.Buffer // of the size of a pack; their number bounds the memory
	send   chan *builder

	read, kept, sent atomic.Int64
	total            int64

	mu    sync.Mutex
	files []fileState // parallel to opt.Files
	packs map[int64]Pack
}

// fileState is what is known of a file while it is being stored.
type fileState struct {
	crc    uint32
	zero   []run
	layers []layerRef // not in order; chunks of one file do not overlap
}

// layerRef is a layer before packs have an index: stored now, or found.
type layerRef struct {
	pack   packID
	first  int
	frames int
	offset int64
	block  int64 // first block, to bring layers into the order of the file
}

// packID names a pack of this attempt by its number, one of an earlier attempt
// by its index among those found.
type packID struct {
	found bool
	n     int64
}

func (r *Repo) newWriter(ctx context.Context, w Writing) (*writer, error) {
	if w.Readers == 0 {
		w.Readers = runtime.GOMAXPROCS(0)
	}
	if w.Senders == 0 {
		w.Senders = 4
	}
	if w.PackSize == 0 {
		w.PackSize = 16 << 20
	}
	wr := &writer{repo: r, opt: w, files: make([]fileState, len(w.Files)), packs: make(map[int64]Pack),
		free: make(chan *bytes.Buffer, w.Readers+w.Senders), send: make(chan *builder)}
	for _, f := range w.Files {
		wr.total += f.Size
	}
	var err error
	if wr.to.data, err = r.data(); err != nil {
		return nil, err
	}
	if wr.to.meta, err = r.metadata(); err != nil {
		return nil, err
	}
	if wr.prior, err = r.findPrior(ctx, w.Ref, wr.progress); err != nil {
		return nil, err
	}
	wr.number.Store(wr.prior.last)
	if wr.seed = wr.prior.seed; len(wr.prior.packs) == 0 {
		var b [8]byte
		rand.Read(b[:])
		wr.seed = binary.LittleEndian.Uint64(b[:])
	}
	for range cap(wr.free) {
		wr.free <- new(bytes.Buffer)
	}
	return wr, nil
}

// A chunk is blocks of one file that one reader handles.
type chunk struct {
	file         int // index into files
	first, count int64
}

// run reads, compares, packs and sends everything. Readers fill packs and hand
// full ones to senders; a pack's buffer goes back when it is sent.
func (w *writer) run(ctx context.Context) error {
	chunks := make(chan chunk)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(chunks)
		for i, f := range w.opt.Files {
			pf := packFile{f.Path, f.Size, blockSizeFor(f.Size)}
			for first := int64(0); first < pf.count(); first += chunkBlocks {
				select {
				case chunks <- chunk{i, first, min(chunkBlocks, pf.count()-first)}:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		return nil
	})
	readers, rctx := errgroup.WithContext(ctx)
	for range w.opt.Readers {
		readers.Go(func() error { return w.reader(rctx, chunks) })
	}
	g.Go(func() error {
		defer close(w.send)
		return readers.Wait()
	})
	for range w.opt.Senders {
		g.Go(func() error {
			for b := range w.send {
				if err := w.sendPack(ctx, b); err != nil {
					return err
				}
			}
			return nil
		})
	}
	return g.Wait()
}

// sendPack completes and stores one pack.
func (w *writer) sendPack(ctx context.Context, b *builder) error {
	n := int64(b.foot.Number)
	p, err := b.finish(fmt.Sprintf("%s%06d-%s.pack", w.opt.packs(), n, randomHex(4)))
	if err != nil {
		return err
	}
	if err := putOnce(ctx, w.repo.st, p.Key, b.buf.Bytes()); err != nil {
		return err
	}
	w.mu.Lock()
	w.packs[n] = p
	w.mu.Unlock()
	b.buf.Reset()
	w.free <- b.buf
	w.sent.Add(p.Size)
	w.progress()
	return nil
}

func (w *writer) progress() {
	if w.opt.Progress != nil {
		w.opt.Progress(Progress{Read: w.read.Load(), Total: w.total, Kept: w.kept.Load(), Sent: w.sent.Load()})
	}
}

// A packer is one reader's state: the pack it fills and what it needs for that.
type packer struct {
	w    *writer
	comp *seal.Compressor
	b    *builder // nil: none begun

	in         *bufio.Reader
	block      []byte // one
	compressed []byte // one frame
}

// reader handles chunks until there are no more, then sends what it has.
func (w *writer) reader(ctx context.Context, chunks <-chan chunk) error {
	comp, err := seal.NewCompressor()
	if err != nil {
		return err
	}
	p := &packer{w: w, comp: comp, in: bufio.NewReaderSize(nil, 1<<20), block: make([]byte, smallFile)}
	for c := range chunks {
		if err := p.chunk(ctx, c); err != nil {
			return fmt.Errorf("store %s: %w", w.opt.Files[c.file].Path, err)
		}
	}
	return p.flush(ctx)
}

func (p *packer) flush(ctx context.Context) error {
	if p.b == nil {
		return nil
	}
	select {
	case p.w.send <- p.b:
		p.b = nil
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// chunk stores the blocks of c that are not stored yet.
func (p *packer) chunk(ctx context.Context, c chunk) error {
	f := p.w.opt.Files[c.file]
	file := packFile{f.Path, f.Size, blockSizeFor(f.Size)}
	src, err := p.w.opt.Root.Open(f.Path)
	if err != nil {
		return err
	}
	defer src.Close()

	var st fileState
	var pending frameBuf
	winners := p.w.prior.file(file, c.first, c.count)
	in := p.in
	in.Reset(io.NewSectionReader(src, c.first*file.Block, c.count*file.Block))
	for n := c.first; n < c.first+c.count; n++ {
		block := p.block[:file.length(n)]
		if _, err := io.ReadFull(in, block); err != nil {
			return fmt.Errorf("at byte %d of %d: %w", n*file.Block, file.Size, noEOF(err))
		}
		after := file.Size - n*file.Block - int64(len(block))
		id := seal.Identify(block, p.w.seed)
		st.crc ^= seal.ShiftCRC(id.CRC(), after)
		switch winner := winners[n-c.first]; {
		case allZero(block):
			st.zero = appendRun(st.zero, n)
		case winner.ok && winner.id == id:
			st.keep(winner, n)
			p.w.kept.Add(int64(len(block)))
		default:
			pending.add(n, id, block)
		}
		if pending.n == frameBlocks || n == c.first+c.count-1 {
			if err := p.frame(ctx, file, &st, &pending); err != nil {
				return err
			}
		}
		p.w.read.Add(int64(len(block)))
	}
	p.w.mu.Lock()
	all := &p.w.files[c.file]
	all.crc ^= st.crc
	all.zero = append(all.zero, st.zero...)
	all.layers = append(all.layers, st.layers...)
	p.w.mu.Unlock()
	p.w.progress()
	return ctx.Err()
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
func (p *packer) frame(ctx context.Context, file packFile, st *fileState, pending *frameBuf) error {
	if pending.n == 0 {
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
	p.compressed = p.comp.Append(p.compressed[:0], pending.content)
	st.stored(packID{n: int64(p.b.foot.Number)}, len(p.b.foot.Frames), p.b.plain, pending.blocks[0][0])
	if err := p.b.add(file, pending.blocks, pending.ids, len(pending.content), p.compressed); err != nil {
		return err
	}
	pending.reset()
	if p.b.buf.Len() >= p.w.opt.PackSize {
		return p.flush(ctx)
	}
	return nil
}

// stored notes a frame that was just added to a pack.
func (s *fileState) stored(pack packID, frame int, offset, block int64) {
	if n := len(s.layers); n > 0 {
		if l := &s.layers[n-1]; l.pack == pack && l.first+l.frames == frame {
			l.frames++
			return
		}
	}
	s.layers = append(s.layers, layerRef{pack: pack, first: frame, frames: 1, offset: offset, block: block})
}

// keep notes a block that an earlier attempt stored.
func (s *fileState) keep(w winner, block int64) {
	if n := len(s.layers); n > 0 {
		l := &s.layers[n-1]
		if last := l.first + l.frames; l.pack == w.pack && (w.frame == last-1 || w.frame == last) {
			l.frames += w.frame - last + 1
			return
		}
	}
	s.layers = append(s.layers, layerRef{pack: w.pack, first: w.frame, frames: 1, offset: w.offset, block: block})
}

// tree builds the list of files once everything is stored.
func (w *writer) tree() Tree {
	var t Tree
	index := make(map[packID]int)
	for i, f := range w.opt.Files {
		st := w.files[i]
		e := Entry{Path: f.Path, Dir: f.Dir, Mode: f.Mode, Size: f.Size}
		if !f.Dir {
			e.Block, e.CRC = blockSizeFor(f.Size), st.crc
			slices.SortFunc(st.zero, func(a, b run) int { return int(a[0] - b[0]) })
			e.Zero = joinRuns(st.zero)
		}
		// What is stored now is newer than what was found, and of what was
		// found a later pack is newer: within each the order of the file.
		slices.SortFunc(st.layers, func(a, b layerRef) int {
			if a.pack.found != b.pack.found {
				if a.pack.found {
					return 1
				}
				return -1
			}
			if a.pack.found && a.pack.n != b.pack.n {
				return int(a.pack.n - b.pack.n)
			}
			return int(a.block - b.block)
		})
		for _, l := range st.layers {
			n, ok := index[l.pack]
			if !ok {
				n = len(t.Packs)
				index[l.pack] = n
				if l.pack.found {
					t.Packs = append(t.Packs, w.prior.packs[l.pack.n])
				} else {
					t.Packs = append(t.Packs, w.packs[l.pack.n])
				}
			}
			e.Layers = append(e.Layers, Layer{Pack: n, First: l.first, Frames: l.frames, Offset: l.offset})
		}
		t.Entries = append(t.Entries, e)
	}
	return t
}

// A prior is what unfinished attempts of the same backup left: the packs whose
// directories could be read and checked, newest first.
type prior struct {
	seed   uint64
	last   int64 // highest number of a pack
	packs  []Pack
	frames map[string][]priorFrame // by path, newest pack first
}

type priorFrame struct {
	file   packFile
	pack   int // index into packs
	frame  int
	offset int64
	blocks []run
	ids    []seal.BlockID
}

// A winner is the newest stored version of a block.
type winner struct {
	ok     bool
	id     seal.BlockID
	pack   packID
	frame  int
	offset int64
}

// findPrior lists the packs of a backup and reads their directories. A pack
// that cannot be read is left alone: it will not be part of the backup. After
// each, moved is called.
func (r *Repo) findPrior(ctx context.Context, b Ref, moved func()) (*prior, error) {
	p := &prior{frames: make(map[string][]priorFrame)}
	var objects []store.Object
	for o, err := range r.st.List(ctx, b.packs(), "") {
		if err != nil {
			return nil, wrap("list", b.packs(), err)
		}
		objects = append(objects, o)
	}
	slices.Reverse(objects) // numbers ascend: newest first
	type read struct {
		foot *footer
		pack Pack
	}
	reads := make([]read, len(objects))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, o := range objects {
		g.Go(func() error {
			foot, pack, err := r.readFooter(gctx, o.Key, o.Size, nil)
			switch {
			case err == nil:
				reads[i] = read{foot, pack}
			case errors.Is(err, fail.Corrupt), errors.Is(err, fail.NoKey), errors.Is(err, store.ErrNotExist):
			default:
				return err
			}
			moved()
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for i, o := range objects {
		var n int64
		if _, err := fmt.Sscanf(path.Base(o.Key), "%d-", &n); err == nil {
			p.last = max(p.last, n)
		}
		rd := reads[i]
		if rd.foot == nil || rd.foot.Backup != string(b.ID) || len(p.packs) > 0 && rd.foot.Seed != p.seed {
			continue
		}
		p.seed = rd.foot.Seed
		p.add(rd.foot, rd.pack)
	}
	return p, nil
}

func (p *prior) add(foot *footer, pack Pack) {
	n, offset := len(p.packs), int64(0)
	p.packs = append(p.packs, pack)
	ids := foot.ids
	for i, fr := range foot.Frames {
		file, count := foot.Files[fr.File], fr.blocks()
		p.frames[file.Path] = append(p.frames[file.Path], priorFrame{file, n, i, offset, fr.Blocks, ids[:count]})
		ids = ids[count:]
		offset += int64(fr.Content)
	}
}

// file returns the winners for blocks first.. of a file. A file that had
// another size then has none: its blocks may be cut elsewhere.
func (p *prior) file(f packFile, first, count int64) []winner {
	winners := make([]winner, count)
	for _, fr := range p.frames[f.Path] {
		end := fr.blocks[len(fr.blocks)-1]
		if fr.file != f || fr.blocks[0][0] >= first+count || end[0]+end[1] <= first {
			continue
		}
		i := 0
		for _, r := range fr.blocks {
			for b := r[0]; b < r[0]+r[1]; b, i = b+1, i+1 {
				if b < first || b >= first+count || winners[b-first].ok {
					continue
				}
				winners[b-first] = winner{true, fr.ids[i], packID{true, int64(fr.pack)}, fr.frame, fr.offset}
			}
		}
	}
	return winners
}

func appendRun(runs []run, n int64) []run {
	if len(runs) > 0 {
		if last := &runs[len(runs)-1]; last[0]+last[1] == n {
			last[1]++
			return runs
		}
	}
	return append(runs, run{n, 1})
}

func joinRuns(sorted []run) (joined []run) {
	for _, r := range sorted {
		if n := len(joined); n > 0 && joined[n-1][0]+joined[n-1][1] == r[0] {
			joined[n-1][1] += r[1]
		} else {
			joined = append(joined, r)
		}
	}
	return joined
}

func allZero(b []byte) bool {
	return len(b) > 0 && b[0] == 0 && bytes.Equal(b[1:], b[:len(b)-1])
}

// noEOF names the end of a file that came too early.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the file became shorter while it was read")
	}
	return err
}
