package repo

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// An Entry is one file, directory or symbolic link of a backup.
//
// The content of a file is its size, its runs of zero blocks, and its layers,
// newest first: for each block the first layer that has it counts.
type Entry struct {
	Path     string      `json:"p"` // slash-separated, below the root of the tree
	Dir      bool        `json:"d,omitempty"`
	Link     string      `json:"ln,omitempty"` // what a symbolic link points at, as it stood on the host; "": none
	Mode     fs.FileMode `json:"m"`            // permission bits
	Size     int64       `json:"sz,omitempty"` // bytes
	Modified time.Time   `json:"-"`            // to the second; zero: not known. In JSON "mt", Unix seconds
	Block    int64       `json:"bs,omitempty"` // bytes of each block but the last
	CRC      uint32      `json:"crc,omitempty"`
	Zero     []run       `json:"zr,omitempty"`
	Layers   []Layer     `json:"L,omitempty"`
	Damaged  []int64     `json:"dmg,omitempty"` // blocks stored as they were found, their page checksum wrong
}

// file reports whether e has content.
func (e Entry) file() bool { return !e.Dir && e.Link == "" }

// MarshalJSON and UnmarshalJSON write the time as a number.
func (e Entry) MarshalJSON() ([]byte, error) {
	j := jsonEntry{plainEntry: plainEntry(e)}
	if !e.Modified.IsZero() {
		j.Seconds = e.Modified.Unix()
	}
	return json.Marshal(j)
}

func (e *Entry) UnmarshalJSON(b []byte) error {
	var j jsonEntry
	if err := json.Unmarshal(b, &j); err != nil {
		return err
	}
	*e = Entry(j.plainEntry)
	if j.Seconds != 0 {
		e.Modified = time.Unix(j.Seconds, 0).UTC()
	}
	return nil
}

type plainEntry Entry

type jsonEntry struct {
	plainEntry
	Seconds int64 `json:"mt,omitempty"`
}

// A Layer is a run of frames of one file in one pack.
type Layer struct {
	Pack   int   // index into the tree's packs
	First  int   // frame within the pack
	Frames int   // how many
	Offset int64 // of the first frame's content in the plain content of the pack
}

// MarshalJSON and UnmarshalJSON keep a layer to four numbers.
func (l Layer) MarshalJSON() ([]byte, error) {
	return json.Marshal([4]int64{int64(l.Pack), int64(l.First), int64(l.Frames), l.Offset})
}

func (l *Layer) UnmarshalJSON(b []byte) error {
	var n [4]int64
	if err := json.Unmarshal(b, &n); err != nil {
		return err
	}
	*l = Layer{int(n[0]), int(n[1]), int(n[2]), n[3]}
	return nil
}

func (e Entry) packFile() packFile { return packFile{e.Path, e.Size, e.Block} }

// treeLine is a line of a tree object after its header: exactly one field is set.
type treeLine struct {
	Pack  *Pack  `json:"pack,omitempty"`
	Entry *Entry `json:"entry,omitempty"`
	End   *int   `json:"end,omitempty"` // lines before this one, without the header
}

type treeHeader struct {
	Header
	Backup string `json:"backup"`
}

// A Part names an object that holds a part of the list of files of a backup.
type Part struct {
	Key  string `json:"key"`
	Size int64  `json:"size"`
	Sum  []byte `json:"sha256"`
	// Batch counts from 0: the parts of a batch follow each other, and its
	// entries are in path order across them.
	Batch int `json:"batch,omitempty"`
}

// treeLimits are what a part is cut at, so that neither writer nor reader holds
// much more.
type treeLimits struct {
	entries, packs int
	frames         int // of all layers
	bytes          int // of JSON
}

// A treeWriter collects the next part of a list of files.
type treeWriter struct {
	packs   []Pack
	index   map[string]int // in packs, by key
	lines   bytes.Buffer   // the entries, encoded
	entries int
	frames  int
}

// add appends an entry whose layers lie in packs, one for each.
func (t *treeWriter) add(e Entry, packs []*Pack) error {
	if t.index == nil {
		t.index = make(map[string]int)
	}
	for i, p := range packs {
		n, ok := t.index[p.Key]
		if !ok {
			n = len(t.packs)
			t.index[p.Key] = n
			t.packs = append(t.packs, *p)
		}
		e.Layers[i].Pack = n
		t.frames += e.Layers[i].Frames
	}
	t.entries++
	return json.NewEncoder(&t.lines).Encode(treeLine{Entry: &e})
}

func (t *treeWriter) full(at treeLimits) bool {
	return t.entries >= at.entries || len(t.packs) >= at.packs || t.frames >= at.frames || t.lines.Len() >= at.bytes
}

// reset begins the next part, in the same memory.
func (t *treeWriter) reset() {
	clear(t.index)
	t.packs, t.entries, t.frames = t.packs[:0], 0, 0
	t.lines.Reset()
}

// writeTree stores what t collected under key, compressed and encrypted.
func (r *Repo) writeTree(ctx context.Context, key, backup string, batch int, t *treeWriter) (Part, error) {
	to, err := r.metadata()
	if err != nil {
		return Part{}, err
	}
	var buf bytes.Buffer
	ew, err := seal.EncryptTo(&buf, to...)
	if err != nil {
		return Part{}, err
	}
	zw, err := seal.CompressTo(ew)
	if err != nil {
		return Part{}, err
	}
	enc := json.NewEncoder(zw)
	err = enc.Encode(treeHeader{r.access.header("tree"), backup})
	for i := 0; i < len(t.packs) && err == nil; i++ {
		err = enc.Encode(treeLine{Pack: &t.packs[i]})
	}
	if err == nil {
		_, err = zw.Write(t.lines.Bytes())
	}
	if err == nil {
		n := len(t.packs) + t.entries
		err = enc.Encode(treeLine{End: &n})
	}
	if err == nil {
		err = zw.Close()
	}
	if err == nil {
		err = ew.Close()
	}
	if err != nil {
		return Part{}, wrap("write", key, err)
	}
	sum := sha256.Sum256(buf.Bytes())
	return Part{Key: key, Size: int64(buf.Len()), Sum: sum[:], Batch: batch}, putOnce(ctx, r.st, key, buf.Bytes())
}

// openTree reads the part that p names, and believes none of it: every path it
// yields is local, and every layer lies in a pack of the list.
func (r *Repo) openTree(ctx context.Context, p Part, backup ID) (*treeReader, error) {
	stored, err := readPart(ctx, r.st, p.Key, store.Range{}, p.Size)
	if err != nil {
		return nil, err
	}
	if sum := sha256.Sum256(stored); int64(len(stored)) != p.Size || !bytes.Equal(sum[:], p.Sum) {
		return nil, fmt.Errorf("%s is not what was stored: %w", p.Key, fail.Corrupt)
	}
	packed, err := r.openMetadata(stored)
	if err != nil {
		return nil, wrap("open", p.Key, err)
	}
	zr, err := seal.DecompressFrom(bytes.NewReader(packed))
	if err != nil {
		return nil, wrap("open", p.Key, err)
	}
	t, err := newTreeReader(zr, string(backup))
	if err != nil {
		zr.Close()
		return nil, wrap("read", p.Key, err)
	}
	t.key, t.close = p.Key, zr
	return t, nil
}

// A treeReader yields the entries of a part one by one.
type treeReader struct {
	key   string
	packs []Pack // those read so far: all that the entries so far need
	dec   *json.Decoder
	lines int
	close io.Closer
}

func newTreeReader(r io.Reader, backup string) (*treeReader, error) {
	t := &treeReader{dec: json.NewDecoder(bufio.NewReader(r)), close: io.NopCloser(nil)}
	var h treeHeader
	if err := t.dec.Decode(&h); err != nil {
		return nil, fmt.Errorf("header: %w: %w", err, fail.Corrupt)
	}
	if err := h.check("tree"); err != nil {
		return nil, err
	}
	if h.Backup != backup {
		return nil, fmt.Errorf("list of files of %s: %w", h.Backup, fail.Corrupt)
	}
	return t, nil
}

// next returns the next entry, or io.EOF behind the last.
func (t *treeReader) next() (Entry, error) {
	e, err := t.entry()
	if err != nil && err != io.EOF {
		err = wrap("read", t.key, err)
	}
	return e, err
}

func (t *treeReader) entry() (Entry, error) {
	bad := func(format string, args ...any) (Entry, error) {
		return Entry{}, fmt.Errorf(format+": %w", append(args, fail.Corrupt)...)
	}
	for ; ; t.lines++ {
		var line treeLine
		if err := t.dec.Decode(&line); err != nil {
			return bad("line %d: %w", t.lines, err)
		}
		switch {
		case line.End != nil:
			if *line.End != t.lines {
				return bad("%d lines of %d", t.lines, *line.End)
			}
			return Entry{}, io.EOF
		case line.Pack != nil:
			t.packs = append(t.packs, *line.Pack)
		case line.Entry != nil:
			if err := line.Entry.validate(t.packs); err != nil {
				return bad("%q: %w", line.Entry.Path, err)
			}
			t.lines++
			return *line.Entry, nil
		default:
			return bad("line %d is neither pack nor file", t.lines)
		}
	}
}

// Close frees what the reader holds.
func (t *treeReader) Close() error { return t.close.Close() }

// validate refuses what no writer of ours makes: paths that leave the root,
// impossible sizes, layers of packs that are not listed.
func (e Entry) validate(packs []Pack) error {
	if err := validPath(e.Path); err != nil {
		return err
	}
	if !e.file() {
		if strings.Contains(e.Link, "\x00") || e.Dir && e.Link != "" || e.Size != 0 || len(e.Layers)+len(e.Zero) > 0 {
			return fmt.Errorf("a directory or link that is more")
		}
		return nil
	}
	if e.Size < 0 || e.Block < 1 || e.Block > smallFile {
		return fmt.Errorf("%d bytes in blocks of %d", e.Size, e.Block)
	}
	for _, z := range e.Zero {
		if z[0] < 0 || z[1] < 1 || z[0] > e.packFile().count()-z[1] {
			return fmt.Errorf("zero run %v", z)
		}
	}
	for _, l := range e.Layers {
		if l.Pack < 0 || l.Pack >= len(packs) || l.First < 0 || l.Frames < 1 {
			return fmt.Errorf("layer %v", l)
		}
	}
	return nil
}

func validPath(p string) error {
	if !fs.ValidPath(p) || p == "." || strings.ContainsAny(p, "\x00") || !utf8.ValidString(p) {
		return fmt.Errorf("path leaves the tree, or is not text")
	}
	return nil
}

// A File is what is to be stored: a file, a directory or a symbolic link.
type File struct {
	Path     string // slash-separated
	Dir      bool
	Link     string      // what a symbolic link points at; "": it is none
	Mode     fs.FileMode // permission bits
	Size     int64       // bytes
	Modified time.Time   // zero: not known
}

// ListFiles lists everything below root, in the byte order of paths. Other kinds of files
// than regular ones and directories are an error.
func ListFiles(root fs.FS) ([]File, error) {
	var files []File
	err := fs.WalkDir(root, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == "." {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if !d.IsDir() && !info.Mode().IsRegular() {
			return fmt.Errorf("%s: neither a file nor a directory", p)
		}
		if err := validPath(p); err != nil {
			return fmt.Errorf("%q: %w", p, err)
		}
		f := File{Path: path.Clean(p), Dir: d.IsDir(), Mode: info.Mode().Perm()}
		if !f.Dir {
			f.Size = info.Size()
		}
		files = append(files, f)
		return nil
	})
	slices.SortFunc(files, func(a, b File) int { return strings.Compare(a.Path, b.Path) }) // a walk puts a/b before a.txt
	return files, err
}
