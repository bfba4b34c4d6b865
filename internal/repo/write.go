package repo

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"maps"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/store"
)

// A Writing says how the content of a backup is stored.
type Writing struct {
	Ref

	// Open opens a file to be read. fs.ErrNotExist: it vanished, and its entry
	// is left out. It may correct the size of a file that is read in one chunk
	// (of up to 32 MiB); bytes that are missing in the end are zeros. Nil: files
	// are opened below Root, and a file that became shorter is an error.
	Open func(f *File) (Source, error)
	Root *os.Root

	Readers  int   // goroutines that read, hash and compress; 0: one for each processor
	Senders  int   // uploads at a time; 0: 4
	PackSize int   // bytes at which a pack is sent; 0: 16 MiB
	Total    int64 // bytes to come, for Progress; 0: as many as were listed so far

	// Progress, when not nil, is told now and then how far it is. It is
	// called from several goroutines.
	Progress func(Progress)
	// Wait, when not nil, is called before n bytes are read: a throttle.
	Wait func(ctx context.Context, n int64) error
	// Stored, when not nil, is told of each entry whose content is stored, in
	// path order within a batch.
	Stored func(Entry)

	limits limits // tests alone lower them
}

// limits are how much is handled together.
type limits struct {
	chunk  int64 // blocks of a file that one reader takes at a time
	stride int   // what is begun before all that is begun is ended, in files, of which a chunk counts for chunkWeight
	layers int   // of a chunk
	feet   int64 // bytes of directories of packs that are kept for comparing
	tree   treeLimits
}

var defaultLimits = limits{chunk: 4096, stride: 16 << 10, layers: 32, feet: feetMemory, tree: treeLimits{entries: 20_000, packs: 1_024, frames: 1 << 18, bytes: 8 << 20}}

// A Source is a file that is being read, by several goroutines.
//
// It may have a method more: Damaged() []int64 is asked after the last read for
// the blocks whose page checksum is wrong.
type Source interface {
	io.ReaderAt
	io.Closer
}

// Progress counts what was done so far.
type Progress struct {
	Read  int64 // bytes of files read and compared or compressed
	Total int64 // bytes of all files
	Kept  int64 // bytes of files that were stored already, by earlier attempts or backups
	Sent  int64 // bytes of packs sent
}

// Write stores files below w.Root and returns the Content: Begin, Add and Finish
// in one.
func (r *Repo) Write(ctx context.Context, w Writing, files []File) (Content, error) {
	for _, f := range files {
		w.Total += f.Size
	}
	wr, err := r.Begin(ctx, w)
	if err != nil {
		return Content{}, err
	}
	err = wr.Add(ctx, func(yield func(File, error) bool) {
		for _, f := range files {
			if !yield(f, nil) {
				return
			}
		}
	})
	if err != nil {
		return Content{}, err
	}
	return wr.Finish(ctx, nil, nil)
}

// A Writer stores the content of one backup. What is stored already, by
// unfinished attempts of the same backup or by the newest backup that its intent
// pins, is compared by hash, block by block, and kept: only the rest is sent.
//
// Data goes in packs, then parts of the list of files, then the draft, which
// makes it count. Its methods are called one after another. It writes nothing to
// this host's disks. The memory it takes does not grow with the number or size of
// files, but for the keys of packs: about 150 bytes for each pack of the backup.
type Writer struct {
	repo *Repo
	opt  Writing
	to   recipients
	seed uint64
	done *Content // a finished draft

	feet     *footers
	attempts []attempt
	prior    *prior

	number atomic.Int64       // of the newest pack
	free   chan *bytes.Buffer // of the size of a pack; their number bounds the memory
	spare  atomic.Int64       // bytes of old layers that may still be stored anew

	read, kept, sent, total atomic.Int64

	batch   int
	tree    treeWriter
	content Content
	packs   map[string]bool // keys of all packs that the trees name
	uses    map[ID]bool
}

const (
	chunkBlocks = 4096      // of a file, that one reader takes at a time: 32 MiB
	readSize    = 1 << 20   // bytes read at a time
	packFrames  = 8192      // a pack is sent at so many frames, for its directory is held in memory, …
	packContent = 128 << 20 // … and at so many bytes of content, for who reads it back takes a pack at a time
	feetMemory  = 48 << 20  // bytes of directories of packs that are kept at a time
	strideFiles = 16 << 10  // what is begun before all that is begun is ended, in files …
	chunkWeight = 4         // … of which a chunk counts for as many
	spareShare  = 20        // of what the prior holds, 1/20 may be stored anew to keep layers few and young
)

// Begin looks for what is stored already. Where the same backup's upload is
// finished, Done says so, and Add and Finish have nothing to do.
func (r *Repo) Begin(ctx context.Context, w Writing) (*Writer, error) {
	content, err := r.Draft(ctx, w.Ref)
	if err == nil {
		return &Writer{repo: r, opt: w, done: &content}, nil
	}
	if !errors.Is(err, store.ErrNotExist) {
		return nil, err
	}
	if w.Readers == 0 {
		w.Readers = runtime.GOMAXPROCS(0)
	}
	if w.Senders == 0 {
		w.Senders = 4
	}
	if w.PackSize == 0 {
		w.PackSize = 16 << 20
	}
	if w.limits == (limits{}) {
		w.limits = defaultLimits
	}
	wr := &Writer{repo: r, opt: w, feet: newFooters(r, w.limits.feet), free: make(chan *bytes.Buffer, w.Readers+w.Senders),
		packs: make(map[string]bool), uses: make(map[ID]bool)}
	if wr.to.data, err = r.data(); err != nil {
		return nil, err
	}
	if wr.to.meta, err = r.metadata(); err != nil {
		return nil, err
	}
	if wr.prior, err = r.findPrior(ctx, w.Ref); err != nil {
		return nil, fmt.Errorf("look for an earlier backup: %w", err)
	}
	if wr.prior != nil {
		wr.seed = wr.prior.seed
		wr.spare.Store(wr.prior.manifest.Bytes / spareShare)
	}
	var highest int64
	if wr.attempts, highest, err = wr.findAttempts(ctx); err != nil {
		return nil, err
	}
	wr.number.Store(highest)
	if wr.seed == 0 {
		var b [8]byte
		rand.Read(b[:])
		wr.seed = binary.LittleEndian.Uint64(b[:])
	}
	for range cap(wr.free) {
		wr.free <- new(bytes.Buffer)
	}
	return wr, nil
}

// Done returns the content of an upload that was finished before.
func (w *Writer) Done() (Content, bool) {
	if w.done == nil {
		return Content{}, false
	}
	return *w.done, true
}

// Add stores a batch of files, in the byte order of their paths. When it
// returns, they are in the bucket. It may be called again with other files.
func (w *Writer) Add(ctx context.Context, files iter.Seq2[File, error]) error {
	if w.done != nil {
		return nil
	}
	l := lister{chunk: w.opt.limits.chunk, cursor: w.prior.cursor(w.batch), attempts: newAttemptsInOrder(w.attempts)}
	defer l.cursor.close()
	var stop func()
	l.next, stop = iter.Pull2(files)
	defer stop()
	for !l.ended {
		stride, err := w.stride(ctx, &l)
		if err != nil {
			return err
		}
		for _, f := range stride {
			if err := w.enter(ctx, f); err != nil {
				return err
			}
		}
	}
	err := w.writePart(ctx)
	w.batch++
	return err
}

// Finish writes the draft and returns the content. physical is nil for a
// logical backup. details, sealed by SealDetails, may be nil, and are those of
// the manifest unless Publish is given others.
func (w *Writer) Finish(ctx context.Context, physical *PhysicalFacts, details json.RawMessage) (Content, error) {
	if w.done != nil {
		return *w.done, nil
	}
	if len(w.content.Trees) == 0 { // an empty list is one, too
		if err := w.writeTree(ctx); err != nil {
			return Content{}, err
		}
	}
	w.content.Packs, w.content.Physical = len(w.packs), physical
	w.content.Uses = slices.Sorted(maps.Keys(w.uses))
	err := putSigned(ctx, w.repo.st, w.repo.access, w.opt.dir()+"draft.json", draft{w.repo.access.header("draft"), w.opt.Ref, w.content, details})
	if errors.Is(err, store.ErrExist) { // another attempt was faster; its packs are as good
		return w.repo.Draft(ctx, w.opt.Ref)
	}
	return w.content, err
}

// Close lets go of what an unfinished Writer holds. What it stored stays, for
// the next attempt.
func (w *Writer) Close() {
	w.feet, w.attempts, w.prior, w.free = nil, nil, nil, nil
	w.tree = treeWriter{}
}

// A lister brings files in path order together with what is stored of them.
type lister struct {
	chunk    int64 // blocks
	next     func() (File, error, bool)
	cursor   *cursor
	attempts *attemptsInOrder
	last     string
	ended    bool
}

// A filing is a file that is being stored.
type filing struct {
	file   File
	held   []heldLayer // newest first
	chunks int

	opening sync.Once
	source  Source // nil: vanished, or nothing to read
	err     error  // of opening it

	mu      sync.Mutex
	left    int // chunks
	gone    bool
	crc     uint32
	zero    []run
	layers  []layerRef // not in order; chunks of one file do not overlap
	damaged []int64
}

func (f *filing) packFile() packFile {
	return packFile{f.file.Path, f.file.Size, blockSizeFor(f.file.Size)}
}

// A layerRef is a layer before its pack has an index.
type layerRef struct {
	order  int   // among what was stored already; -1: stored now
	pack   *Pack // complete only when it is sent
	first  int
	frames int
	offset int64
}

// A chunk is blocks of one file that one reader handles.
type chunk struct {
	file         *filing
	first, count int64
}

// file lists the next file.
func (l *lister) file(ctx context.Context) (*filing, error) {
	file, err, ok := l.next()
	if !ok {
		l.ended = true
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := validPath(file.Path); err != nil {
		return nil, fmt.Errorf("%q: %w", file.Path, err)
	}
	if file.Path <= l.last {
		return nil, fmt.Errorf("%q is listed behind %q: not in path order", file.Path, l.last)
	}
	l.last = file.Path
	f := &filing{file: file}
	if file.Dir || file.Link != "" {
		f.file.Size = 0
		return f, nil
	}
	pf := f.packFile()
	f.chunks = max(1, int((pf.count()+l.chunk-1)/l.chunk))
	f.left = f.chunks
	for _, a := range l.attempts.at(file.Path) {
		f.held = append(f.held, heldLayer{order: len(f.held), pack: &a.pack, size: 1 << 62, own: true})
	}
	e, packs, ok, err := l.cursor.at(ctx, file.Path)
	if ok && e.file() {
		for _, layer := range e.Layers {
			f.held = append(f.held, heldLayer{order: len(f.held), pack: &packs[layer.Pack], first: layer.First, frames: layer.Frames, size: e.Size})
		}
	}
	return f, err
}

// stride stores the next files, so many that what is known of them fits into
// memory. Readers fill packs and hand full ones to senders; a pack's buffer goes
// back when it is sent. All packs are sent when it returns.
func (w *Writer) stride(ctx context.Context, l *lister) (stride []*filing, err error) {
	chunks, send := make(chan chunk), make(chan *builder)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(chunks)
		for weight := 0; weight < w.opt.limits.stride; {
			f, err := l.file(ctx)
			if f == nil || err != nil {
				return err
			}
			stride = append(stride, f)
			weight += 1 + chunkWeight*f.chunks
			w.total.Add(f.file.Size)
			count, size := f.packFile().count(), w.opt.limits.chunk
			for n := range int64(f.chunks) {
				select {
				case chunks <- chunk{f, n * size, min(size, count-n*size)}:
				case <-ctx.Done():
					return ctx.Err()
				}
			}
		}
		return nil
	})
	readers, rctx := errgroup.WithContext(ctx)
	for range w.opt.Readers {
		readers.Go(func() error { return w.reader(rctx, chunks, send) })
	}
	g.Go(func() error {
		defer close(send)
		return readers.Wait()
	})
	for range w.opt.Senders {
		g.Go(func() error {
			for b := range send {
				if err := w.sendPack(ctx, b); err != nil {
					return err
				}
			}
			return nil
		})
	}
	err = g.Wait()
	return stride, err
}

// sendPack completes and stores one pack.
func (w *Writer) sendPack(ctx context.Context, b *builder) error {
	err := b.finish(fmt.Sprintf("%s%06d-%s.pack", w.opt.packs(), b.foot.Number, randomHex(4)))
	if err != nil {
		return err
	}
	if err := putOnce(ctx, w.repo.st, b.pack.Key, b.buf.Bytes()); err != nil {
		return err
	}
	b.buf.Reset()
	w.free <- b.buf
	b.buf, b.data, b.byPath, b.foot = nil, nil, nil, footer{} // layers point at b.pack, and would hold all of it
	w.sent.Add(b.pack.Size)
	w.progress()
	return nil
}

func (w *Writer) progress() {
	if w.opt.Progress != nil {
		w.opt.Progress(Progress{Read: w.read.Load(), Total: max(w.opt.Total, w.total.Load()), Kept: w.kept.Load(), Sent: w.sent.Load()})
	}
}

// enter puts a stored file into the list.
func (w *Writer) enter(ctx context.Context, f *filing) error {
	if f.gone {
		return nil
	}
	e := Entry{Path: f.file.Path, Dir: f.file.Dir, Link: f.file.Link, Mode: f.file.Mode, Modified: f.file.Modified}
	var packs []*Pack
	if e.file() {
		e.Size, e.Block, e.CRC = f.file.Size, blockSizeFor(f.file.Size), f.crc
		slices.SortFunc(f.zero, func(a, b run) int { return int(a[0] - b[0]) })
		slices.Sort(f.damaged)
		e.Zero, e.Damaged = joinRuns(f.zero), f.damaged
		for _, l := range joinLayers(f.layers) {
			e.Layers = append(e.Layers, Layer{First: l.first, Frames: l.frames, Offset: l.offset})
			packs = append(packs, l.pack)
			if !w.packs[l.pack.Key] {
				w.packs[l.pack.Key] = true
				w.content.Stored += l.pack.Size
			}
			if owner := packOwner(l.pack.Key); owner != w.opt.ID {
				w.uses[owner] = true
			}
		}
	}
	w.content.Files++
	w.content.Bytes += e.Size
	if err := w.tree.add(e, packs); err != nil {
		return fmt.Errorf("list %s: %w", e.Path, err)
	}
	if w.opt.Stored != nil {
		w.opt.Stored(e)
	}
	if w.tree.full(w.opt.limits.tree) {
		return w.writePart(ctx)
	}
	return nil
}

// writePart stores the list as far as it goes.
func (w *Writer) writePart(ctx context.Context) error {
	if w.tree.entries == 0 {
		return nil
	}
	return w.writeTree(ctx)
}

func (w *Writer) writeTree(ctx context.Context) error {
	part, err := w.repo.writeTree(ctx, w.opt.dir()+"tree-"+randomHex(4)+".jsonl.zst", string(w.opt.ID), w.batch, &w.tree)
	w.content.Trees = append(w.content.Trees, part)
	w.tree.reset()
	return err
}

// joinLayers brings layers into order, newest first, and makes one of those
// whose frames follow each other, and of what is left of one that was kept. The
// frames between, which were part of it, hold nothing that counts: their blocks
// were compared, and what changed is in a newer layer.
func joinLayers(all []layerRef) (joined []layerRef) {
	slices.SortFunc(all, func(a, b layerRef) int {
		if a.order != b.order {
			return a.order - b.order
		}
		if c := strings.Compare(a.pack.Key, b.pack.Key); c != 0 {
			return c
		}
		return a.first - b.first
	})
	for _, l := range all {
		if n := len(joined); n > 0 {
			last := &joined[n-1]
			if end := last.first + last.frames; last.order == l.order && last.pack == l.pack && (l.order >= 0 || l.first <= end) {
				last.frames = max(end, l.first+l.frames) - last.first
				continue
			}
		}
		joined = append(joined, l)
	}
	return joined
}

// open opens the source once, and says whether there is one.
func (f *filing) open(w *Writing) (bool, error) {
	f.opening.Do(func() {
		file := f.file
		if w.Open == nil {
			var src *os.File
			if src, f.err = w.Root.Open(file.Path); f.err == nil {
				f.source = src
			}
			return
		}
		if f.source, f.err = w.Open(&file); errors.Is(f.err, fs.ErrNotExist) {
			f.gone, f.source, f.err = true, nil, nil
		} else if f.chunks == 1 {
			f.file.Size = max(0, file.Size)
		}
	})
	return !f.gone, f.err
}

// close ends one chunk; after the last one the source is not needed any more.
func (f *filing) close() error {
	f.mu.Lock()
	f.left--
	last := f.left == 0
	f.mu.Unlock()
	if !last || f.source == nil {
		return nil
	}
	if d, ok := f.source.(interface{ Damaged() []int64 }); ok {
		f.damaged = slices.Clone(d.Damaged())
	}
	return f.source.Close()
}

// zeroBlock is what blocks are compared with.
var zeroBlock [smallFile]byte

func allZero(b []byte) bool { return bytes.Equal(b, zeroBlock[:len(b)]) }

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
