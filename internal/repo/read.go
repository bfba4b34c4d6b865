package repo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A Reading says what to read back of a backup, and where to put it.
type Reading struct {
	// Dir receives the files, which must not be there yet. Nil, and Place too:
	// everything is read, opened and compared, and nothing written.
	Dir *os.Root
	// Place says where an entry goes, instead of Dir: below which directory,
	// under which name there. Not ok: the entry is left out.
	//
	// Directories are made with mode 0700, files with their own and writable,
	// links as they are. Nothing is written through a link that leaves its root.
	Place func(path string) (dir *os.Root, name string, ok bool)
	// Keep allows files to be there. Blocks of them that are equal, by hash,
	// are kept; the others are written, and sizes are corrected. What stands in
	// the way of a file and is no directory is removed. A reading that was cut
	// is continued in this way.
	Keep bool
	// Want chooses files by their path; nil: all of them.
	Want func(path string) bool
	// Packs chooses, where nothing is written, whose data is read; directories
	// of packs are read of all. Nil: all of them.
	Packs func(Pack) bool
	// Entries, when not nil, is told of every entry, in order, before anything
	// of its part of the list is read or written. Its error ends the reading,
	// and so does a part that cannot be read: every entry, or an error.
	Entries func(Entry) error
	// Readers is how many packs are read at a time; 0: 3.
	Readers int
	// Progress, when not nil, is told now and then how far it is: Read counts
	// stored bytes, Kept those of files that were equal. It is called from
	// several goroutines.
	Progress func(Progress)
}

// A Report is what reading a backup back found.
type Report struct {
	Verified Verified `json:"verified"` // how deep it looked
	Files    int      `json:"files"`
	Packs    int      `json:"packs"`
	Read     int      `json:"packs_read"` // of them, those whose content was read
	Bytes    int64    `json:"bytes"`      // of the files
	Stored   int64    `json:"stored"`     // of the packs read
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
// damage ends it as an error: what is there then is not to be used.
//
// Where no key at hand opens the data, the stored bytes are compared (see
// VerifiedStored); writing files is then fail.NoKey.
//
// It goes from part to part of the list of files, so that memory does not grow
// with their number.
func (r *Repo) Read(ctx context.Context, id ID, c Content, rd Reading) (Report, error) {
	rep := Report{Verified: VerifiedContent}
	if dir := rd.Dir; dir != nil && rd.Place == nil {
		rd.Place = func(path string) (*os.Root, string, bool) { return dir, path, true }
	}
	if !r.OpensData() {
		if rd.Place != nil {
			return rep, fmt.Errorf("read backup %s: %w", id, fail.NoKey)
		}
		rep.Verified = VerifiedStored
	}
	if rd.Readers == 0 {
		rd.Readers = 3
	}
	re := &reader{repo: r, opt: rd, rep: &rep, feet: newFooters(r, feetMemory), seen: make(map[string]bool), bad: make(map[string]bool)}
	for _, part := range c.Trees {
		if err := re.part(ctx, id, part); err != nil {
			return rep, err
		}
	}
	if len(rep.Damage) == 0 && rd.Want == nil && rd.Place == nil && (rep.Files != c.Files || rep.Packs != c.Packs || rep.Bytes != c.Bytes) {
		object := string(id)
		if len(c.Trees) > 0 {
			object = c.Trees[0].Key
		}
		rep.Damage = append(rep.Damage, Damage{object, "number of files, packs or bytes is not what was published", fail.Corrupt})
	}
	slices.SortFunc(rep.Damage, func(a, b Damage) int { return strings.Compare(a.Object, b.Object) })
	if rd.Place != nil {
		return rep, rep.Err()
	}
	return rep, nil
}

type reader struct {
	repo *Repo
	opt  Reading
	feet *footers
	seen map[string]bool // packs of which the directory was read, by key and digest

	mu  sync.Mutex
	rep *Report
	bad map[string]bool // packs whose directory is damaged, by key

	read, kept, total atomic.Int64
}

// A wantedFile is a file to be read.
type wantedFile struct {
	entry Entry
	dir   *os.Root // nil: it is not written
	name  string   // below dir
}

// A wantedFrame says which blocks of a frame count, and for which file.
type wantedFrame struct {
	frame  int
	file   *wantedFile
	blocks []run
}

// part reads all that is wanted of one part of the list: directories of packs
// first, to know which frame of which pack has the newest version of each
// block; then the packs, in any order, each once.
func (re *reader) part(ctx context.Context, id ID, part Part) error {
	files, packs, err := re.list(ctx, id, part)
	if err := re.damage(part.Key, err); err != nil {
		return err
	}
	if err != nil && re.opt.Entries != nil {
		return err
	}
	if err != nil {
		return re.stop()
	}
	need := make([]bool, len(packs))
	for _, f := range files {
		re.rep.Bytes += f.entry.Size
		for _, l := range f.entry.Layers {
			need[l.Pack] = true
		}
	}
	fresh := make([]bool, len(packs)) // not read for another part
	for i, p := range packs {
		key := p.Key + string(p.Footer) + string(p.Sum)
		fresh[i] = !re.seen[key]
		re.seen[key] = true
		if fresh[i] {
			re.rep.Packs++
		}
		need[i] = need[i] || re.opt.Want == nil && fresh[i]
	}
	if err := re.footers(ctx, packs, need); err != nil {
		return err
	}
	if err := re.stop(); err != nil {
		return err
	}
	if err := re.makeDirs(files); err != nil {
		return err
	}
	frames, err := re.assign(ctx, files, packs)
	if err != nil {
		return err
	}
	if err := re.stop(); err != nil {
		return err
	}
	var work []packWork
	for i, p := range packs {
		switch {
		case re.known(p):
		case re.opt.Place != nil && len(frames[i]) == 0:
		case re.opt.Place == nil && (!need[i] || !fresh[i] || re.opt.Packs != nil && !re.opt.Packs(p)):
		default:
			work = append(work, packWork{p, frames[i]})
			re.total.Add(p.Size)
			if fresh[i] {
				re.rep.Read++
			}
		}
	}
	return re.packs(ctx, work)
}

// stop ends a reading that writes at the first damage.
func (re *reader) stop() error {
	if re.opt.Place == nil {
		return nil
	}
	return re.rep.Err()
}

// list reads a part of the list, and returns the files that are wanted.
func (re *reader) list(ctx context.Context, id ID, part Part) (files []*wantedFile, packs []Pack, err error) {
	t, err := re.repo.openTree(ctx, part, id)
	if err != nil {
		return nil, nil, err
	}
	defer t.Close()
	for {
		e, err := t.next()
		if err == io.EOF {
			return files, t.packs, nil
		}
		if err != nil {
			return nil, nil, err
		}
		re.rep.Files++
		if re.opt.Entries != nil {
			if err := re.opt.Entries(e); err != nil {
				return nil, nil, callerError{err}
			}
		}
		if re.opt.Want != nil && !re.opt.Want(e.Path) {
			continue
		}
		f := &wantedFile{entry: e}
		if re.opt.Place != nil {
			var ok bool
			if f.dir, f.name, ok = re.opt.Place(e.Path); !ok {
				continue
			}
		}
		files = append(files, f)
	}
}

// A callerError is one that a callback returned: it says nothing about an
// object, whatever its kind.
type callerError struct{ error }

func (e callerError) Unwrap() error { return e.error }

func (re *reader) damage(key string, err error) error {
	if _, ok := errors.AsType[callerError](err); ok {
		return err
	}
	re.mu.Lock()
	defer re.mu.Unlock()
	return re.rep.add(key, err)
}

// known reports whether the directory of p is known to be damaged.
func (re *reader) known(p Pack) bool {
	re.mu.Lock()
	defer re.mu.Unlock()
	return re.bad[p.Key]
}

// progress tells that n more bytes were read, or that it moves.
func (re *reader) progress(n int64) {
	if re.opt.Progress != nil {
		re.opt.Progress(Progress{Read: re.read.Add(n), Total: re.total.Load(), Kept: re.kept.Load()})
	}
}

// footers reads the directories of the packs that are needed, and notes which
// are damaged.
func (re *reader) footers(ctx context.Context, packs []Pack, need []bool) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(8)
	for i, p := range packs {
		if !need[i] || re.known(p) {
			continue
		}
		g.Go(func() error {
			_, err := re.feet.get(ctx, p)
			re.progress(0)
			if err != nil && damaged(err) {
				re.mu.Lock()
				re.bad[p.Key] = true
				re.mu.Unlock()
			}
			return re.damage(p.Key, err)
		})
	}
	return g.Wait()
}

// assign finds for every block of the files the frame that counts. Of files
// that are there it leaves out what they have already.
func (re *reader) assign(ctx context.Context, files []*wantedFile, packs []Pack) ([][]wantedFrame, error) {
	frames := make([][]wantedFrame, len(packs))
	work := make(chan *wantedFile)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		defer close(work)
		for _, f := range files {
			if !f.entry.file() {
				continue
			}
			select {
			case work <- f:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		return nil
	})
	for range 2 * runtime.GOMAXPROCS(0) {
		g.Go(func() error {
			for f := range work {
				picks, err := re.picks(ctx, f, packs)
				if err == nil && f.dir != nil {
					picks, err = re.prepare(f, picks)
				}
				if err != nil {
					return err
				}
				re.mu.Lock()
				for _, p := range picks {
					frames[p.pack] = append(frames[p.pack], p.wantedFrame)
				}
				re.mu.Unlock()
			}
			return nil
		})
	}
	err := g.Wait()
	for _, f := range frames {
		slices.SortFunc(f, func(a, b wantedFrame) int { return a.frame - b.frame })
	}
	return frames, err
}

// A pick is blocks of a frame that count for a file.
type pick struct {
	wantedFrame
	pack int
	ids  []seal.BlockID // of those blocks
	seed uint64
}

// picks finds for every block of f the frame that counts. The checksum of the
// file follows from those of its blocks.
func (re *reader) picks(ctx context.Context, f *wantedFile, packs []Pack) (picks []pick, err error) {
	e, file := f.entry, f.entry.packFile()
	left, crc := newBlockSet(file.count()), uint32(0)
	for _, z := range e.Zero {
		if left.take(z) != z[1] {
			return nil, re.damage(e.Path, fmt.Errorf("zero run %v twice: %w", z, fail.Corrupt))
		}
		crc ^= seal.ShiftCRC(seal.ZeroCRC(e.runLength(z)), e.after(z))
	}
	for _, l := range e.Layers {
		pack := packs[l.Pack]
		bad := func(format string, args ...any) ([]pick, error) {
			return nil, re.damage(pack.Key, fmt.Errorf("%s: "+format+": %w", append(append([]any{e.Path}, args...), fail.Corrupt)...))
		}
		if re.known(pack) {
			return nil, nil // and reported
		}
		foot, err := re.feet.get(ctx, pack)
		if err != nil {
			return nil, re.damage(pack.Key, err)
		}
		if l.First > len(foot.Frames)-l.Frames {
			return bad("frames %d to %d of %d", l.First, l.First+l.Frames-1, len(foot.Frames))
		}
		if at := foot.Frames[l.First].at; at != l.Offset {
			return bad("offset %d, list of files says %d", at, l.Offset)
		}
		for n := l.First; n < l.First+l.Frames; n++ {
			fr := foot.Frames[n]
			// The file may have had another size when this was stored.
			stored := foot.Files[fr.File]
			if stored.Path != file.Path || stored.Block != file.Block {
				return bad("frame %d is of another file", n)
			}
			p := pick{wantedFrame: wantedFrame{frame: n, file: f}, pack: l.Pack, seed: foot.Seed}
			id := fr.id
			for _, r := range fr.Blocks {
				for b := r[0]; b < r[0]+r[1]; b, id = b+1, id+1 {
					if b >= file.count() || left.take(run{b, 1}) == 0 {
						continue
					}
					if stored.length(b) != file.length(b) {
						return bad("block %d has %d bytes, want %d", b, stored.length(b), file.length(b))
					}
					p.blocks, p.ids = appendRun(p.blocks, b), append(p.ids, foot.ids[id])
				}
			}
			if len(p.blocks) == 0 {
				continue
			}
			crc ^= p.crc(e)
			if f.dir == nil || !re.opt.Keep {
				p.ids = nil
			}
			picks = append(picks, p)
		}
	}
	switch {
	case left.n != 0:
		return nil, re.damage(e.Path, fmt.Errorf("%d blocks are in no pack: %w", left.n, fail.Corrupt))
	case crc != e.CRC:
		return nil, re.damage(e.Path, fmt.Errorf("checksum of the file is %08x, was %08x: %w", crc, e.CRC, fail.Corrupt))
	}
	return picks, nil
}

// crc is what the blocks contribute to the checksum of the file.
func (p *pick) crc(e Entry) (sum uint32) {
	file, ids := e.packFile(), p.ids
	for _, r := range p.blocks {
		var crc uint32
		for b := r[0]; b < r[0]+r[1]; b++ {
			crc = seal.ShiftCRC(crc, file.length(b)) ^ ids[0].CRC()
			ids = ids[1:]
		}
		sum ^= seal.ShiftCRC(crc, e.after(r))
	}
	return sum
}

// runLength returns the bytes of a run of blocks, and after those behind it.
func (e Entry) runLength(r run) int64 { return min(r[1]*e.Block, e.Size-r[0]*e.Block) }
func (e Entry) after(r run) int64     { return max(0, e.Size-(r[0]+r[1])*e.Block) }

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
