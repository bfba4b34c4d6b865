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
	"strings"
	"unicode/utf8"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// An Entry is one file or directory of a backup.
//
// The content of a file is its size, its runs of zero blocks, and its layers,
// newest first: for each block the first layer that has it counts.
type Entry struct {
	Path   string      `json:"p"` // slash-separated, below the root of the tree
	Dir    bool        `json:"d,omitempty"`
	Mode   fs.FileMode `json:"m"`            // permission bits
	Size   int64       `json:"sz,omitempty"` // bytes
	Block  int64       `json:"bs,omitempty"` // bytes of each block but the last
	CRC    uint32      `json:"crc,omitempty"`
	Zero   []run       `json:"zr,omitempty"`
	Layers []Layer     `json:"L,omitempty"`
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

// A Tree is the list of files of a backup and the packs that hold them.
type Tree struct {
	Packs   []Pack
	Entries []Entry
}

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

// A Part names an object that holds a part of a backup's description.
type Part struct {
	Key  string `json:"key"`
	Size int64  `json:"size"`
	Sum  []byte `json:"sha256"`
}

// writeTree stores the list under key, compressed and encrypted.
func (r *Repo) writeTree(ctx context.Context, key, backup string, t Tree) (Part, error) {
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
	for i := 0; i < len(t.Packs) && err == nil; i++ {
		err = enc.Encode(treeLine{Pack: &t.Packs[i]})
	}
	for i := 0; i < len(t.Entries) && err == nil; i++ {
		err = enc.Encode(treeLine{Entry: &t.Entries[i]})
	}
	if err == nil {
		n := len(t.Packs) + len(t.Entries)
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
	return Part{Key: key, Size: int64(buf.Len()), Sum: sum[:]}, putOnce(ctx, r.st, key, buf.Bytes())
}

// readTree reads the list that p names, and believes none of it: afterwards
// every path is local, and every layer lies in a pack of the list.
func (r *Repo) readTree(ctx context.Context, p Part, backup string) (Tree, error) {
	stored, err := readPart(ctx, r.st, p.Key, store.Range{}, p.Size)
	if err != nil {
		return Tree{}, err
	}
	if sum := sha256.Sum256(stored); int64(len(stored)) != p.Size || !bytes.Equal(sum[:], p.Sum) {
		return Tree{}, fmt.Errorf("%s is not what was stored: %w", p.Key, fail.Corrupt)
	}
	packed, err := r.openMetadata(stored)
	if err != nil {
		return Tree{}, wrap("open", p.Key, err)
	}
	zr, err := seal.DecompressFrom(bytes.NewReader(packed))
	if err != nil {
		return Tree{}, wrap("open", p.Key, err)
	}
	defer zr.Close()
	t, err := decodeTree(zr, backup)
	return t, wrap("read", p.Key, err)
}

func decodeTree(r io.Reader, backup string) (t Tree, err error) {
	bad := func(format string, args ...any) (Tree, error) {
		return Tree{}, fmt.Errorf(format+": %w", append(args, fail.Corrupt)...)
	}
	dec := json.NewDecoder(bufio.NewReader(r))
	var h treeHeader
	if err := dec.Decode(&h); err != nil {
		return bad("header: %w", err)
	}
	if err := h.check("tree"); err != nil {
		return Tree{}, err
	}
	if h.Backup != backup {
		return bad("list of files of %s", h.Backup)
	}
	for {
		var line treeLine
		if err := dec.Decode(&line); err != nil {
			return bad("line %d: %w", len(t.Packs)+len(t.Entries), err)
		}
		switch {
		case line.End != nil:
			if *line.End != len(t.Packs)+len(t.Entries) {
				return bad("%d lines of %d", len(t.Packs)+len(t.Entries), *line.End)
			}
			return t, nil
		case line.Pack != nil:
			t.Packs = append(t.Packs, *line.Pack)
		case line.Entry != nil:
			if err := line.Entry.validate(t.Packs); err != nil {
				return bad("%q: %w", line.Entry.Path, err)
			}
			t.Entries = append(t.Entries, *line.Entry)
		default:
			return bad("line %d is neither pack nor file", len(t.Packs)+len(t.Entries))
		}
	}
}

// validate refuses what no writer of ours makes: paths that leave the root,
// impossible sizes, layers of packs that are not listed.
func (e Entry) validate(packs []Pack) error {
	if err := validPath(e.Path); err != nil {
		return err
	}
	if e.Dir {
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

// A File is what is to be stored: a file or directory below a root.
type File struct {
	Path string // slash-separated
	Dir  bool
	Mode fs.FileMode // permission bits
	Size int64       // bytes
}

// ListFiles lists everything below root, in path order. Other kinds of files
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
	return files, err
}
