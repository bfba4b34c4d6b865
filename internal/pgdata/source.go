package pgdata

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// A PageCheck says how pages with a wrong checksum are judged. The zero value
// judges none; nor is one judged where the cluster has no checksums.
//
// A page that the server writes while it is read may come out half old, half
// new. The log heals it if the change was logged after the backup began, with a
// whole image of the page: so a page is taken for right if it changes while we
// watch, or if it says that it was changed since. It can say so by accident when
// it is damaged; therefore it may not claim to be of the future.
type PageCheck struct {
	Start pg.LSN                 // where the backup began
	Now   func() (pg.LSN, error) // a position that no page is ahead of; nil: only a page that changes is healed
}

// slack is how far a page may be ahead of Now: on a standby, by the record that
// is being replayed.
const slack = 16 << 20

// small files that are not relations are read at once, until they stand still.
const small = 1 << 20

// A Source is an open file of the tree. It may be read by several goroutines.
type Source struct {
	size    int64
	content []byte // of a small file; else nil
	file    *os.File
	cold    cold

	check  PageCheck // zero: its pages are not judged
	page   int       // bytes
	first  uint32    // number of its first block
	mu     sync.Mutex
	broken []int64 // in order
}

// OpenFile opens a file of the tree. Only Path and Size of f are used. It fails
// with fs.ErrNotExist if the server has removed the file, or made it one that
// no backup needs; but with fail.FilesLost if all that is around it has gone.
func (d *Dir) OpenFile(ctx context.Context, f File, check PageCheck) (*Source, error) {
	s, err := d.open(ctx, f, check)
	if errors.Is(err, fs.ErrNotExist) {
		if lost := d.Present(); lost != nil {
			err = lost
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", f.Path, kinded(err))
	}
	return s, nil
}

func (d *Dir) open(ctx context.Context, f File, check PageCheck) (*Source, error) {
	p, ok := parsePath(f.Path)
	if !ok {
		return nil, errors.New("not a path in a backup")
	}
	below := p.below()
	if p.rest != "" && holdsRelations(path.Dir(below)) {
		if rel, ok := parseRelation(path.Base(below)); ok {
			return d.openRelation(p, f.Size, rel, check)
		}
	}
	if below == controlFile {
		_, content, err := d.Control(ctx)
		return &Source{size: int64(len(content)), content: content}, err
	}
	if f.Size <= small {
		content, err := d.steady(ctx, p)
		if err == nil || !errors.Is(err, errLarge) {
			return &Source{size: int64(len(content)), content: content}, err
		}
	}
	file, err := d.openPlace(p)
	if err != nil {
		return nil, err
	}
	return &Source{size: f.Size, file: file, cold: coldIn(file, f.Size)}, nil
}

func (d *Dir) openRelation(p place, size int64, rel relation, check PageCheck) (*Source, error) {
	if rel.Fork != "init" { // an unlogged one may have come after the listing
		init := p
		init.rest = path.Join(path.Dir(p.rest), rel.Node+"_init")
		r, name, err := d.locate(init)
		if err != nil {
			return nil, err
		}
		if _, err := r.Lstat(name); err == nil {
			return nil, fmt.Errorf("unlogged: %w", fs.ErrNotExist)
		}
	}
	file, err := d.openPlace(p)
	if err != nil {
		return nil, err
	}
	s := &Source{size: size, file: file, cold: coldIn(file, size), page: d.control.BlockSize}
	if d.control.Checksums && check.Start != 0 {
		s.check, s.first = check, uint32(rel.Segment)*uint32(d.control.RelSegBlocks)
	}
	return s, nil
}

// openPlace opens a regular file, and nothing else: whatever stands at the name
// now, opening it does not block.
func (d *Dir) openPlace(p place) (*os.File, error) {
	const flags = os.O_RDONLY | syscall.O_NONBLOCK
	var file *os.File
	var err error
	switch {
	case p.rest == "" && p.config < len(d.config):
		file, err = os.OpenFile(d.config[p.config], flags, 0)
	case p.rest == "":
		return nil, fs.ErrNotExist
	case p.oid == "" && slices.Contains(configs, p.rest): // perhaps a link
		file, err = os.OpenFile(filepath.Join(d.path, p.rest), flags, 0)
	default:
		var r *root
		var name string
		if r, name, err = d.locate(p); err == nil {
			file, err = r.OpenFile(name, flags, 0)
		}
	}
	if err != nil {
		return nil, err
	}
	info, err := file.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = errors.New("not a regular file any more")
	}
	if err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}

var errLarge = errors.New("grown large")

// steady reads a small file until two readings agree. One that has only grown may
// still be half written, so it is read again; what never stands still is taken as
// it was last: the log heals what is important of that kind. But it does not heal
// the state of a prepared transaction, of which more is asked.
func (d *Dir) steady(ctx context.Context, p place) ([]byte, error) {
	prepared := path.Dir(p.below()) == "pg_twophase"
	last, err := d.readPlace(p)
	why := "it does not stand still"
	for i := 0; err == nil && i < len(backoff); i++ {
		if prepared && preparedWhole(last) {
			return last, nil
		}
		if err := pause(ctx, i); err != nil {
			return nil, err
		}
		now, err := d.readPlace(p)
		switch {
		case err != nil:
			return nil, err
		case prepared:
			why = "it is not whole: a server that recovers stops there"
		case bytes.Equal(now, last):
			return now, nil
		case len(last) > 0 && bytes.HasPrefix(now, last):
			why = "" // something is added all the time: to what is there already, nothing happens
		default:
			why = "it does not stand still"
		}
		last = now
	}
	if err == nil && why != "" && !(prepared && preparedWhole(last)) {
		d.opt.Note(p.below(), why)
	}
	return last, err
}

// preparedWhole reports whether a file is the state of a prepared transaction
// from its beginning to its end. The server writes it in two pieces, and reads
// no other when it recovers (RecreateTwoPhaseFile and ReadTwoPhaseFile in
// access/transam/twophase.c): its length stands behind its magic number, and its
// CRC at the end.
func preparedWhole(b []byte) bool {
	le, n := binary.LittleEndian, len(b)-4
	return n >= 8 && uint64(le.Uint32(b[4:])) == uint64(len(b)) && le.Uint32(b[n:]) == crc32.Checksum(b[:n], crc32.MakeTable(crc32.Castagnoli))
}

func (d *Dir) readPlace(p place) ([]byte, error) {
	f, err := d.openPlace(p)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, small+1))
	if err == nil && len(b) > small {
		err = errLarge
	}
	return b, err
}

// Size is how much there is to read: of a small file what it holds, else what
// was listed.
func (s *Source) Size() int64 { return s.size }

// Damaged returns the numbers of the blocks met so far, counted from the
// beginning of this file, whose checksum is wrong and that no log heals.
func (s *Source) Damaged() []int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.broken)
}

// Close lets the file go.
func (s *Source) Close() error {
	if s.file == nil {
		return nil
	}
	return s.file.Close()
}

// ReadAt reads not beyond Size. If the file has become shorter, it ends sooner.
// Pages are judged as they are read; they come as they are, damaged or not.
func (s *Source) ReadAt(b []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read before the beginning")
	}
	if s.file == nil {
		return bytes.NewReader(s.content).ReadAt(b, off)
	}
	end := min(off+int64(len(b)), s.size)
	if off >= end && len(b) > 0 {
		return 0, io.EOF
	}
	var n int
	var err error
	if s.check.Start == 0 {
		n, err = s.file.ReadAt(b[:end-off], off)
	} else {
		n, err = s.readPages(b[:end-off], off)
	}
	s.cold.drop(s.file, off, off+int64(n), s.size)
	if err == nil && n < len(b) {
		err = io.EOF
	}
	return n, err
}

// readPages reads whole pages, also where less is asked for.
func (s *Source) readPages(b []byte, off int64) (int, error) {
	page := int64(s.page)
	end := off + int64(len(b))
	from, to := off/page*page, min((end+page-1)/page*page, s.size)
	if from == off && to == end {
		n, err := s.file.ReadAt(b, off)
		if jerr := s.judge(b[:n], off); jerr != nil {
			return 0, jerr
		}
		return n, err
	}
	whole := make([]byte, to-from)
	n, err := s.readPages(whole, from)
	n = copy(b, whole[min(int64(n), off-from):n])
	if n == len(b) {
		err = nil
	}
	return n, err
}

// judge looks at every whole page in b. Those that are wrong are read again, in
// place, until they are right, or have changed, or time is up.
func (s *Source) judge(b []byte, off int64) error {
	var wrong []suspect
	for at := 0; at+s.page <= len(b); at += s.page {
		page := b[at : at+s.page]
		block := (off + int64(at)) / int64(s.page)
		if !sound(page, s.first+uint32(block)) {
			wrong = append(wrong, suspect{block, page, bytes.Clone(page)})
		}
	}
	for i := 0; len(wrong) > 0 && i < len(backoff); i++ {
		time.Sleep(backoff[i])
		var err error
		wrong = slices.DeleteFunc(wrong, func(w suspect) bool {
			n, rerr := s.file.ReadAt(w.page, w.block*int64(s.page))
			if rerr != nil && rerr != io.EOF {
				err = rerr
			}
			// A page that is cut off by now is the log's, as is one that changes.
			return n < s.page || sound(w.page, s.first+uint32(w.block)) || !bytes.Equal(w.page, w.before)
		})
		if err == nil && i == 0 {
			wrong, err = s.unhealed(wrong)
		}
		if err != nil {
			return err
		}
	}
	for _, w := range wrong {
		s.damaged(w.block)
	}
	return nil
}

// unhealed returns those of the pages that do not say that they were changed
// since the backup began.
func (s *Source) unhealed(wrong []suspect) ([]suspect, error) {
	if len(wrong) == 0 || s.check.Now == nil {
		return wrong, nil
	}
	now, err := s.check.Now()
	if err != nil {
		return nil, fmt.Errorf("judge a page: %w", err)
	}
	return slices.DeleteFunc(wrong, func(w suspect) bool {
		lsn := pg.PageLSN(w.page)
		return s.check.Start <= lsn && lsn <= now+slack
	}), nil
}

// A suspect is a page whose checksum was wrong.
type suspect struct {
	block  int64  // in the file
	page   []byte // as it was read last
	before []byte // as it was read first
}

// sound reports whether a page is right, as far as it tells.
func sound(page []byte, block uint32) bool {
	if pg.PageIsNew(page) {
		return allZero(page)
	}
	return pg.StoredChecksum(page) == pg.PageChecksum(page, block)
}

var zeros [32 << 10]byte

func allZero(b []byte) bool { return bytes.Equal(b, zeros[:len(b)]) }

func (s *Source) damaged(block int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, there := slices.BinarySearch(s.broken, block); !there {
		s.broken = slices.Insert(s.broken, i, block)
	}
}
