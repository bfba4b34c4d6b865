package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A Reading says what to read back of a backup, and where to put it.
type Reading struct {
	// Dir receives the files, which must not be there yet. Nil: everything is
	// read, opened and compared, and nothing written.
	Dir *os.Root
	// Want chooses files by their path; nil: all of them.
	Want func(path string) bool
	// Readers is how many packs are read at a time; 0: 3.
	Readers int
	// Progress, when not nil, is told now and then how far it is: Read counts
	// stored bytes. It is called from several goroutines.
	Progress func(Progress)
}

// A Report is what reading a backup back found.
type Report struct {
	Verified Verified `json:"verified"` // how deep it looked
	Files    int      `json:"files"`
	Packs    int      `json:"packs"`
	Bytes    int64    `json:"bytes"`  // of the files
	Stored   int64    `json:"stored"` // of the packs read
	Damage   []Damage `json:"damage,omitempty"`
}

// Damage is an object that is not what was stored.
type Damage struct {
	Object string `json:"object"` // key
	Reason string `json:"reason"`
	kind   fail.Kind
}

// Err is nil for a sound backup. Otherwise it names the first damaged object
// and how many there are.
func (rep Report) Err() error {
	if len(rep.Damage) == 0 {
		return nil
	}
	first, more := rep.Damage[0], ""
	if n := len(rep.Damage) - 1; n > 0 {
		more = fmt.Sprintf("; and %d more", n)
	}
	return fail.With(first.kind, fmt.Errorf("%s: %s%s", first.Object, first.Reason, more)) // the reason says the kind
}

// add notes err as damage of the object under key, or returns it when it says
// nothing about the object: the store's trouble, a cancelled context.
func (rep *Report) add(key string, err error) error {
	if err == nil {
		return nil
	}
	kind := fail.Corrupt
	switch {
	case errors.Is(err, store.ErrNotExist):
		err = errors.New("is missing")
	case errors.Is(err, io.ErrUnexpectedEOF) && fail.KindOf(err) == fail.Unknown: // with a kind, the connection broke
		err = errors.New("is shorter than it was")
	case errors.Is(err, fail.Corrupt):
	case errors.Is(err, fail.Untrusted), errors.Is(err, fail.Unsupported), errors.Is(err, fail.NoKey):
		kind = fail.KindOf(err)
	default:
		return err
	}
	rep.Damage = append(rep.Damage, Damage{key, err.Error(), kind})
	return nil
}

// Read reads the content of a backup back, and compares every digest on the
// way. Damage stands in the report. When files are to be written, the first
// damage ends it as an error: what is in Dir then is not to be used.
//
// Where no key at hand opens the data, the stored bytes are compared (see
// VerifiedStored); writing files is then fail.NoKey.
func (r *Repo) Read(ctx context.Context, id ID, c Content, rd Reading) (Report, error) {
	rep := Report{Verified: VerifiedContent}
	if !r.OpensData() {
		if rd.Dir != nil {
			return rep, fmt.Errorf("read backup %s: %w", id, fail.NoKey)
		}
		rep.Verified = VerifiedStored
	}
	re := &reader{repo: r, opt: rd, rep: &rep}
	for _, part := range c.Trees {
		tree, err := r.readTree(ctx, part, string(id))
		if err := rep.add(part.Key, err); err != nil {
			return rep, err
		}
		if err != nil {
			continue
		}
		if err := re.tree(ctx, tree); err != nil {
			return rep, err
		}
		rep.Packs += len(tree.Packs)
		rep.Files += len(tree.Entries)
	}
	if len(rep.Damage) == 0 && rd.Want == nil && (rep.Files != c.Files || rep.Packs != c.Packs || rep.Bytes != c.Bytes) {
		rep.Damage = append(rep.Damage, Damage{c.Trees[0].Key, "number of files, packs or bytes is not what was published", fail.Corrupt})
	}
	slices.SortFunc(rep.Damage, func(a, b Damage) int { return bytes.Compare([]byte(a.Object), []byte(b.Object)) })
	if rd.Dir != nil {
		return rep, rep.Err()
	}
	return rep, nil
}

type reader struct {
	repo *Repo
	opt  Reading

	mu  sync.Mutex
	rep *Report

	read, total atomic.Int64
}

// wantedFile is a file to be read, and what of it has been.
type wantedFile struct {
	entry Entry
	crc   uint32 // of what was read so far, and of zero runs
}

// wantedFrame says which blocks of a frame count.
type wantedFrame struct {
	file   *wantedFile
	blocks []run
}

// tree reads all that is wanted of one tree: directories of packs first, to
// know which frame of which pack has the newest version of each block; then the
// packs, in any order, each once.
func (re *reader) tree(ctx context.Context, t Tree) error {
	var files []*wantedFile
	need := make(map[int]bool)
	for _, e := range t.Entries {
		if re.opt.Want != nil && !re.opt.Want(e.Path) {
			continue
		}
		files = append(files, &wantedFile{entry: e})
		re.rep.Bytes += e.Size
		for _, l := range e.Layers {
			need[l.Pack] = true
		}
	}
	if re.opt.Want == nil {
		for i := range t.Packs {
			need[i] = true
		}
	}
	foots, err := re.footers(ctx, t, need)
	if err != nil {
		return err
	}
	frames := make([]map[int]wantedFrame, len(t.Packs))
	for _, f := range files {
		if err := re.assign(t, f, foots, frames); err != nil {
			return err
		}
	}
	if re.opt.Dir != nil {
		if err := re.rep.Err(); err != nil {
			return err
		}
		if err := createFiles(re.opt.Dir, files); err != nil {
			return err
		}
	}
	if err := re.packs(ctx, t, foots, frames); err != nil {
		return err
	}
	for _, f := range files {
		if len(re.rep.Damage) == 0 && !f.entry.Dir && re.rep.Verified == VerifiedContent && f.crc != f.entry.CRC {
			return re.damage(f.entry.Path, fmt.Errorf("checksum of the file is %08x, was %08x: %w", f.crc, f.entry.CRC, fail.Corrupt))
		}
	}
	return nil
}

func (re *reader) damage(key string, err error) error {
	re.mu.Lock()
	defer re.mu.Unlock()
	return re.rep.add(key, err)
}

// footers reads the directories of the packs that are needed; nil for a
// damaged one.
func (re *reader) footers(ctx context.Context, t Tree, need map[int]bool) ([]*footer, error) {
	foots := make([]*footer, len(t.Packs))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, p := range t.Packs {
		if !need[i] {
			continue
		}
		re.total.Add(p.Size)
		g.Go(func() error {
			foot, _, err := re.repo.readFooter(ctx, p.Key, p.Size, &p)
			if err == nil {
				foot.ids = nil // read again with the pack, when they are needed
				foots[i] = foot
			}
			re.progress(0)
			return re.damage(p.Key, err)
		})
	}
	return foots, g.Wait()
}

// assign finds for every block of f the frame that counts.
func (re *reader) assign(t Tree, f *wantedFile, foots []*footer, frames []map[int]wantedFrame) error {
	e := f.entry
	if e.Dir {
		return nil
	}
	bad := func(pack Pack, format string, args ...any) error {
		return re.damage(pack.Key, fmt.Errorf("%s: "+format+": %w", append(append([]any{e.Path}, args...), fail.Corrupt)...))
	}
	left := newBlockSet(e.packFile().count())
	for _, z := range e.Zero {
		n := left.take(z)
		if n != z[1] {
			return re.damage(e.Path, fmt.Errorf("zero run %v twice: %w", z, fail.Corrupt))
		}
		f.crc ^= seal.ShiftCRC(seal.ZeroCRC(e.runLength(z)), e.after(z))
	}
	for _, l := range e.Layers {
		foot, pack := foots[l.Pack], t.Packs[l.Pack]
		if foot == nil {
			return nil // the pack is damaged, and reported
		}
		if l.First > len(foot.Frames)-l.Frames {
			return bad(pack, "frames %d to %d of %d", l.First, l.First+l.Frames-1, len(foot.Frames))
		}
		var offset int64
		for _, fr := range foot.Frames[:l.First] {
			offset += int64(fr.Content)
		}
		if offset != l.Offset {
			return bad(pack, "offset %d, list of files says %d", offset, l.Offset)
		}
		for n := l.First; n < l.First+l.Frames; n++ {
			fr := foot.Frames[n]
			if foot.Files[fr.File] != e.packFile() {
				return bad(pack, "frame %d is of another file", n)
			}
			var blocks []run
			for _, r := range fr.Blocks {
				for b := r[0]; b < r[0]+r[1]; b++ {
					if left.take(run{b, 1}) == 1 {
						blocks = appendRun(blocks, b)
					}
				}
			}
			if frames[l.Pack] == nil {
				frames[l.Pack] = make(map[int]wantedFrame)
			}
			if len(blocks) > 0 { // of two layers with the same frame, the first has them
				frames[l.Pack][n] = wantedFrame{f, blocks}
			}
		}
	}
	if left.n != 0 {
		return re.damage(e.Path, fmt.Errorf("%d blocks are in no pack: %w", left.n, fail.Corrupt))
	}
	return nil
}

// runLength returns the bytes of a run of blocks, and after those behind it.
func (e Entry) runLength(r run) int64 { return min(r[1]*e.Block, e.Size-r[0]*e.Block) }
func (e Entry) after(r run) int64     { return max(0, e.Size-(r[0]+r[1])*e.Block) }

// packs reads every needed pack once.
func (re *reader) packs(ctx context.Context, t Tree, foots []*footer, frames []map[int]wantedFrame) error {
	readers := re.opt.Readers
	if readers == 0 {
		readers = 3
	}
	work := make(chan int)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(work)
		for i := range t.Packs {
			if foots[i] == nil {
				continue
			}
			select {
			case work <- i:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range readers {
		g.Go(func() error {
			dec, err := seal.NewDecompressor(1 << 20)
			if err != nil {
				return err
			}
			defer dec.Close()
			u := unpacker{re: re, dec: dec}
			defer u.closeFile()
			for i := range work {
				err := u.pack(ctx, t.Packs[i], frames[i])
				if derr := re.damage(t.Packs[i].Key, err); derr != nil {
					return derr
				}
				if err != nil && re.opt.Dir != nil {
					return wrap("read", t.Packs[i].Key, err)
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

	file *os.File // the file written last, still open
	path string
}

// pack reads a pack, compares its digests, and does with each frame what is wanted.
func (u *unpacker) pack(ctx context.Context, p Pack, want map[int]wantedFrame) error {
	rc, err := u.re.repo.st.Get(ctx, p.Key, store.Range{})
	if err != nil {
		return err
	}
	defer rc.Close()
	u.stored.Reset()
	u.stored.Grow(int(p.Size) + 1)
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
		if err := u.frames(ctx, b[:p.Data], foot, want); err != nil {
			return err
		}
	}
	u.re.mu.Lock()
	u.re.rep.Stored += p.Size
	u.re.mu.Unlock()
	u.re.progress(p.Size)
	return nil
}

// progress tells that n more bytes were read, or that it moves.
func (re *reader) progress(n int64) {
	if re.opt.Progress != nil {
		re.opt.Progress(Progress{Read: re.read.Add(n), Total: re.total.Load()})
	}
}

// frames opens every frame, compares every block, and writes what is wanted.
func (u *unpacker) frames(ctx context.Context, data []byte, foot *footer, want map[int]wantedFrame) error {
	src := io.Reader(bytes.NewReader(data))
	if u.re.repo.Marker.Encrypted {
		var err error
		if src, err = seal.DecryptFrom(src, u.re.repo.opened()...); err != nil {
			return err
		}
	}
	ids := foot.ids
	for n, fr := range foot.Frames {
		if err := ctx.Err(); err != nil {
			return err
		}
		u.packed = slices.Grow(u.packed[:0], fr.Stored)[:fr.Stored]
		if _, err := io.ReadFull(src, u.packed); err != nil {
			return fmt.Errorf("frame %d: %w: %w", n, err, fail.Corrupt)
		}
		var err error
		if u.plain, err = u.dec.Append(u.plain[:0], u.packed); err != nil {
			return fmt.Errorf("frame %d: %w", n, err)
		}
		if len(u.plain) != fr.Content {
			return fmt.Errorf("frame %d: %d bytes, want %d: %w", n, len(u.plain), fr.Content, fail.Corrupt)
		}
		count := fr.blocks()
		if err := u.frame(foot.Files[fr.File], fr, ids[:count], foot.Seed, want[n]); err != nil {
			return fmt.Errorf("frame %d of %s: %w", n, foot.Files[fr.File].Path, err)
		}
		ids = ids[count:]
	}
	if n, err := src.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		return fmt.Errorf("data goes on after the last frame: %w", fail.Corrupt)
	}
	return nil
}

func (u *unpacker) frame(file packFile, fr frame, ids []seal.BlockID, seed uint64, want wantedFrame) error {
	at, i, next := int64(0), 0, 0 // next: index into want.blocks
	for _, r := range fr.Blocks {
		for b := r[0]; b < r[0]+r[1]; b, i = b+1, i+1 {
			block := u.plain[at : at+file.length(b)]
			at += int64(len(block))
			if seal.Identify(block, seed) != ids[i] {
				return fmt.Errorf("block %d is not what was stored: %w", b, fail.Corrupt)
			}
			for next < len(want.blocks) && want.blocks[next][0]+want.blocks[next][1] <= b {
				next++
			}
			if next < len(want.blocks) && want.blocks[next][0] <= b {
				if err := u.take(want.file, b, block, ids[i].CRC()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// take counts a block that is part of a file, and writes it.
func (u *unpacker) take(f *wantedFile, n int64, block []byte, crc uint32) error {
	shifted := seal.ShiftCRC(crc, f.entry.after(run{n, 1}))
	u.re.mu.Lock()
	f.crc ^= shifted
	u.re.mu.Unlock()
	if u.re.opt.Dir == nil {
		return nil
	}
	if u.file == nil || u.path != f.entry.Path {
		if err := u.closeFile(); err != nil {
			return err
		}
		file, err := u.re.opt.Dir.OpenFile(f.entry.Path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		u.file, u.path = file, f.entry.Path
	}
	_, err := u.file.WriteAt(block, n*f.entry.Block)
	return err
}

func (u *unpacker) closeFile() error {
	if u.file == nil {
		return nil
	}
	err := u.file.Close()
	u.file = nil
	return err
}

// createFiles makes all directories, and all files at their size and empty.
func createFiles(dir *os.Root, files []*wantedFile) error {
	made := map[string]bool{".": true}
	for _, f := range files {
		e := f.entry
		parent := path.Dir(e.Path)
		if e.Dir {
			parent = e.Path
		}
		if !made[parent] {
			if err := dir.MkdirAll(parent, 0o700); err != nil {
				return err
			}
			made[parent] = true
		}
		if e.Dir {
			continue
		}
		out, err := dir.OpenFile(e.Path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, e.Mode&fs.ModePerm|0o200)
		if err != nil {
			return err
		}
		if err := errors.Join(out.Truncate(e.Size), out.Close()); err != nil {
			return err
		}
	}
	return nil
}

// A blockSet is a set of block numbers of a file, full at first.
type blockSet struct {
	taken []uint64
	n     int64 // how many are left
}

func newBlockSet(n int64) *blockSet { return &blockSet{make([]uint64, (n+63)/64), n} }

// take removes a run and returns how many of its blocks were there.
func (s *blockSet) take(r run) (n int64) {
	for b := r[0]; b < r[0]+r[1]; b++ {
		if word, bit := &s.taken[b/64], uint64(1)<<(b%64); *word&bit == 0 {
			*word |= bit
			n++
		}
	}
	s.n -= n
	return n
}

// CheckDocuments reads the small signed objects that belong to a backup and to
// the repository, and reports those that cannot be believed.
func (r *Repo) CheckDocuments(ctx context.Context, m Manifest) ([]Damage, error) {
	var rep Report
	keys := []struct{ prefix, kind string }{
		{m.dir() + "intent.json", "intent"}, {m.dir() + "draft.json", "draft"}, {"names/" + m.Cluster, "name"}, {"keys/", "epoch"},
	}
	for _, k := range keys {
		found := false
		for o, err := range r.st.List(ctx, k.prefix, "") {
			if err != nil {
				return nil, wrap("list", k.prefix, err)
			}
			if k.kind != "epoch" && o.Key != k.prefix {
				continue
			}
			found = true
			var doc struct {
				Header
				Ref
			}
			err = r.getSigned(ctx, o.Key, k.kind, &doc)
			if err == nil && (k.kind == "intent" || k.kind == "draft") && doc.Ref != m.Ref {
				err = fmt.Errorf("belongs to %s of %s: %w", doc.ID, doc.Cluster, fail.Corrupt)
			}
			if err := rep.add(o.Key, err); err != nil {
				return nil, err
			}
		}
		if !found && k.kind != "epoch" {
			rep.Damage = append(rep.Damage, Damage{k.prefix, "is missing", fail.Corrupt})
		}
	}
	err := r.checkLatest(ctx, m, &rep)
	return rep.Damage, err
}
