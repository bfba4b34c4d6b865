package repo

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"slices"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A pack is an object of frames and a footer that says what they hold:
//
//	data     zstd frames one after another; encrypted as one age file
//	8 bytes  header of a zstd skippable frame: so zstd -d reads a plain pack
//	footer   zstd of a line of JSON and the block ids; encrypted as one age file
//	trailer  64 bytes, fixed
//
// Blocks are numbered within their file. A frame holds up to 16 of them, of one
// file, in ascending order.
const (
	blockSize   = 8192
	frameBlocks = 16
	smallFile   = 64 << 10 // a file up to this size is one block of its own size

	maxFrame    = max(blockSize*frameBlocks, smallFile)
	trailerSize = 64
	skipSize    = 8
	skipMagic   = 0x184D2A50 // RFC 8878, section 3.1.2
)

var packMagic = [8]byte{'P', 'G', 'K', 'E', 'E', 'P', 'P', '1'}

// A Pack is what a manifest knows of a pack. The two digests cover all of it
// that is not fixed by Size and Data.
type Pack struct {
	Key    string `json:"key"`
	Size   int64  `json:"size"`          // bytes of the object
	Data   int64  `json:"data"`          // bytes of its data section
	Sum    []byte `json:"data_sha256"`   // of the stored data section
	Footer []byte `json:"footer_sha256"` // of the stored footer
}

// A run is consecutive blocks: the first and how many.
type run [2]int64

// A frame is the directory entry of one frame.
type frame struct {
	File    int   `json:"f"` // index into footer.Files
	Stored  int   `json:"c"` // bytes, compressed
	Content int   `json:"u"` // bytes, plain
	Blocks  []run `json:"b"`

	at int64 // where its content begins in the plain content of the pack
	id int   // of its first block in footer.ids
}

func (f frame) blocks() (n int64) {
	for _, r := range f.Blocks {
		n += r[1]
	}
	return n
}

// A packFile is a file of which a pack holds blocks.
type packFile struct {
	Path  string `json:"p"`
	Size  int64  `json:"sz"`
	Block int64  `json:"bs"` // bytes of each block but the last
}

func (f packFile) length(block int64) int64 { return min(f.Block, f.Size-block*f.Block) }

func (f packFile) count() int64 {
	if f.Size == 0 {
		return 0
	}
	return (f.Size + f.Block - 1) / f.Block
}

// blockSizeFor returns into which blocks a file of size bytes is cut.
func blockSizeFor(size int64) int64 {
	if size <= smallFile {
		return max(size, 1)
	}
	return blockSize
}

// A footer is the directory of a pack. With it a pack explains itself: a
// crashed upload is continued from footers, and a lost list of files rebuilt.
type footer struct {
	Header
	Backup string     `json:"backup"`
	Number int        `json:"number"` // of the pack within the backup, from 1
	Seed   uint64     `json:"seed,string"`
	Sum    []byte     `json:"data_sha256"`
	Files  []packFile `json:"files"`
	Frames []frame    `json:"frames"`

	ids []seal.BlockID // of every block, in the order of the frames
}

func (f *footer) encode() ([]byte, error) {
	line, err := json.Marshal(f)
	if err != nil {
		return nil, err
	}
	line = append(line, '\n')
	for i := range f.ids {
		line = append(line, f.ids[i][:]...)
	}
	return line, nil
}

// decodeFooter parses and checks a footer: afterwards every frame belongs to a
// file, every block lies within it and has an id, and lengths agree.
func decodeFooter(b []byte) (*footer, error) {
	bad := func(format string, args ...any) (*footer, error) {
		return nil, fmt.Errorf("footer: "+format+": %w", append(args, fail.Corrupt)...)
	}
	line, ids, ok := bytes.Cut(b, []byte{'\n'})
	f := new(footer)
	if !ok {
		return bad("no end of line")
	}
	if err := json.Unmarshal(line, f); err != nil {
		return bad("%w", err)
	}
	if err := f.check("pack"); err != nil {
		return nil, err
	}
	var total, at int64
	for _, file := range f.Files {
		if file.Size < 0 || file.Block < 1 || file.Block > smallFile {
			return bad("file %q of %d bytes in blocks of %d", file.Path, file.Size, file.Block)
		}
	}
	for i, fr := range f.Frames {
		if fr.File < 0 || fr.File >= len(f.Files) || fr.Stored < 1 || fr.Content < 1 || fr.Content > maxFrame {
			return bad("frame %d: %d bytes of %d, of file %d", i, fr.Stored, fr.Content, fr.File)
		}
		file, content := f.Files[fr.File], int64(0)
		f.Frames[i].at, f.Frames[i].id = at, int(total)
		at += int64(fr.Content)
		for _, r := range fr.Blocks {
			if r[0] < 0 || r[1] < 1 || r[1] > frameBlocks || r[0] > file.count()-r[1] {
				return bad("frame %d: blocks %v", i, r)
			}
			content += (r[1]-1)*file.Block + file.length(r[0]+r[1]-1)
			total += r[1]
		}
		if content != int64(fr.Content) {
			return bad("frame %d: blocks of %d bytes, content of %d", i, content, fr.Content)
		}
	}
	if total*int64(len(seal.BlockID{})) != int64(len(ids)) {
		return bad("%d blocks, %d bytes of ids", total, len(ids))
	}
	f.ids = make([]seal.BlockID, total)
	for i := range f.ids {
		copy(f.ids[i][:], ids[i*len(seal.BlockID{}):])
	}
	return f, nil
}

// encodeTrailer returns the last bytes of a pack. They follow from the rest:
// magic, encrypted or not, length of data and footer, and the start of the
// footer's digest, against a trailer of another pack.
func encodeTrailer(encrypted bool, data, foot int64, footSum []byte) []byte {
	t := make([]byte, trailerSize)
	copy(t, packMagic[:])
	if encrypted {
		t[8] = 1
	}
	binary.LittleEndian.PutUint64(t[16:], uint64(data))
	binary.LittleEndian.PutUint64(t[24:], uint64(foot))
	copy(t[32:], footSum)
	return t
}

func encodeSkip(n int64) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint32(nil, skipMagic), uint32(n))
}

// A builder fills one pack in memory, in a buffer that is empty at first.
type builder struct {
	buf  *bytes.Buffer // what is stored
	foot footer
	data io.WriteCloser // compressed frames go here; encrypts
	pack Pack           // set by finish
	to   recipients

	plain  int64 // bytes of content so far: where the next frame begins in zstd -d of the data
	byPath map[string]int
}

// recipients of the two sections of a pack; none where it is not encrypted.
type recipients struct{ data, meta []age.Recipient }

func newBuilder(buf *bytes.Buffer, h Header, backup string, number int, seed uint64, to recipients) (*builder, error) {
	w, err := seal.EncryptTo(buf, to.data...)
	if err != nil {
		return nil, err
	}
	return &builder{buf: buf, data: w, to: to, byPath: make(map[string]int),
		foot: footer{Header: h, Backup: backup, Number: number, Seed: seed}}, nil
}

// add appends a frame: the blocks of one file, their ids, and their content compressed.
func (b *builder) add(file packFile, blocks []run, ids []seal.BlockID, content int, compressed []byte) error {
	i, ok := b.byPath[file.Path]
	if !ok {
		i = len(b.foot.Files)
		b.byPath[file.Path] = i
		b.foot.Files = append(b.foot.Files, file)
	}
	b.foot.Frames = append(b.foot.Frames, frame{File: i, Stored: len(compressed), Content: content, Blocks: slices.Clone(blocks)})
	b.foot.ids = append(b.foot.ids, ids...)
	b.plain += int64(content)
	_, err := b.data.Write(compressed)
	return err
}

// finish completes the pack; the bytes to store are then in b.buf, and b.pack
// tells of them.
func (b *builder) finish(key string) error {
	if err := b.data.Close(); err != nil {
		return err
	}
	data := int64(b.buf.Len())
	sum := sha256.Sum256(b.buf.Bytes())
	b.foot.Sum = sum[:]
	plain, err := b.foot.encode()
	if err != nil {
		return err
	}
	packed, err := compress(plain)
	if err != nil {
		return err
	}
	foot, err := seal.Encrypt(packed, b.to.meta...)
	if err != nil {
		return err
	}
	footSum := sha256.Sum256(foot)
	b.buf.Write(encodeSkip(int64(len(foot)) + trailerSize))
	b.buf.Write(foot)
	b.buf.Write(encodeTrailer(len(b.to.data) > 0, data, int64(len(foot)), footSum[:]))
	b.pack = Pack{Key: key, Size: int64(b.buf.Len()), Data: data, Sum: sum[:], Footer: footSum[:]}
	return nil
}

func compress(plain []byte) ([]byte, error) {
	c, err := seal.NewCompressor()
	if err != nil {
		return nil, err
	}
	return c.Append(nil, plain), nil
}

// decodeTail checks everything of a pack behind its data section and returns
// the directory. tail is the end of an object of size bytes; it must hold all
// of that. want, when not nil, is what the manifest knows of the pack.
func (r *Repo) decodeTail(tail []byte, size int64, want *Pack) (*footer, Pack, error) {
	bad := func(what string) (*footer, Pack, error) {
		return nil, Pack{}, fmt.Errorf("%s: %w", what, fail.Corrupt)
	}
	if size < trailerSize+skipSize || len(tail) < trailerSize || !bytes.HasPrefix(tail[len(tail)-trailerSize:], packMagic[:]) {
		return bad("no pack, or one that was cut")
	}
	trailer := tail[len(tail)-trailerSize:]
	data, foot := int64(binary.LittleEndian.Uint64(trailer[16:])), int64(binary.LittleEndian.Uint64(trailer[24:]))
	if data < 0 || foot < 0 || foot > maxFooter || data != size-trailerSize-skipSize-foot {
		return bad("lengths in the trailer do not add up")
	}
	if int64(len(tail)) < skipSize+foot+trailerSize {
		return nil, Pack{Size: size, Data: data}, errShortTail
	}
	tail = tail[int64(len(tail))-skipSize-foot-trailerSize:]
	stored := tail[skipSize : skipSize+foot]
	sum := sha256.Sum256(stored)
	if !bytes.Equal(tail[:skipSize], encodeSkip(foot+trailerSize)) || !bytes.Equal(trailer, encodeTrailer(r.Marker.Encrypted, data, foot, sum[:])) {
		return bad("footer or trailer changed")
	}
	if want != nil && (want.Size != size || want.Data != data || !bytes.Equal(want.Footer, sum[:])) {
		return bad("footer is not the one that was stored")
	}
	packed, err := r.openMetadata(stored)
	if err != nil {
		return nil, Pack{}, fmt.Errorf("footer: %w", err)
	}
	dec, err := seal.NewDecompressor(maxFooter)
	if err != nil {
		return nil, Pack{}, err
	}
	defer dec.Close()
	plain, err := dec.Append(nil, packed)
	if err != nil {
		return nil, Pack{}, fmt.Errorf("footer: %w", err)
	}
	f, err := decodeFooter(plain)
	if err != nil {
		return nil, Pack{}, err
	}
	if want != nil && !bytes.Equal(f.Sum, want.Sum) {
		return bad("footer tells of other data")
	}
	return f, Pack{Size: size, Data: data, Sum: f.Sum, Footer: sum[:]}, nil
}

// errShortTail: more of the end of the pack is needed.
var errShortTail = fmt.Errorf("end of pack: %w", io.ErrUnexpectedEOF)

// readFooter reads the directory of the pack under key, of size bytes.
func (r *Repo) readFooter(ctx context.Context, key string, size int64, want *Pack) (*footer, Pack, error) {
	guess := min(size, 128<<10)
	if want != nil {
		guess = min(size, size-want.Data)
	}
	for {
		tail, err := readPart(ctx, r.st, key, store.Range{Off: size - guess, Len: guess}, guess)
		if err != nil {
			return nil, Pack{}, err
		}
		f, p, err := r.decodeTail(tail, size, want)
		if err == errShortTail && guess < size {
			guess = size - p.Data
			continue
		}
		p.Key = key
		return f, p, wrap("pack", key, err)
	}
}
