package repo

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"syscall"

	"github.com/pgkeep/pgkeep/internal/seal"
)

// makeDirs makes the directories and links that are wanted, and those that
// files need.
func (re *reader) makeDirs(files []*wantedFile) error {
	if re.opt.Place == nil {
		return nil
	}
	var in *os.Root
	made := "" // the last one
	for _, f := range files {
		parent := path.Dir(f.name)
		if f.entry.Dir {
			parent = f.name
		}
		if parent != "." && (in != f.dir || made != parent) {
			if err := f.dir.MkdirAll(parent, 0o700); err != nil {
				return err
			}
			in, made = f.dir, parent
		}
		if f.entry.Link != "" {
			if err := f.link(re.opt.Keep); err != nil {
				return err
			}
		}
	}
	return nil
}

// link makes the symbolic link. It is never followed here.
func (f *wantedFile) link(keep bool) error {
	err := f.dir.Symlink(f.entry.Link, f.name)
	if !keep || !errors.Is(err, fs.ErrExist) {
		return err
	}
	if have, err := f.dir.Readlink(f.name); err == nil && have == f.entry.Link {
		return nil
	}
	if err := f.dir.Remove(f.name); err != nil {
		return err
	}
	return f.dir.Symlink(f.entry.Link, f.name)
}

// prepare makes the file, of its size and empty, and returns what is to be
// written into it. One that is there is compared, and what it has left out.
func (re *reader) prepare(f *wantedFile, picks []pick) (rest []pick, err error) {
	flags := os.O_WRONLY | os.O_CREATE | os.O_EXCL
	if re.opt.Keep {
		info, err := f.dir.Lstat(f.name)
		switch {
		case err == nil && info.Mode().IsRegular() && !hasOtherNames(info):
			flags = os.O_RDWR
		case err == nil:
			err = f.dir.Remove(f.name)
		case errors.Is(err, fs.ErrNotExist):
			err = nil
		}
		if err != nil {
			return nil, err
		}
	}
	mode := f.entry.Mode&fs.ModePerm | 0o200
	file, err := f.dir.OpenFile(f.name, flags, mode)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	if flags == os.O_RDWR {
		if err := file.Chmod(mode); err != nil {
			return nil, err
		}
		if err := file.Truncate(f.entry.Size); err != nil {
			return nil, err
		}
		return re.compare(f, file, picks)
	}
	return picks, file.Truncate(f.entry.Size)
}

// hasOtherNames reports whether a file has more than one name: what is written to
// it changes the others too, in a copy that was made with hard links.
func hasOtherNames(info fs.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && st.Nlink > 1
}

// compare reads a file that is there, makes zeros of what is to be zeros, and
// returns the picks whose blocks differ.
func (re *reader) compare(f *wantedFile, file *os.File, picks []pick) (rest []pick, err error) {
	buf := make([]byte, readSize)
	read := func(off, n int64) ([]byte, error) {
		b := buf[:n]
		if got, err := file.ReadAt(b, off); got < len(b) {
			return nil, fmt.Errorf("at byte %d: %w", off, errors.Join(err, io.ErrUnexpectedEOF))
		}
		return b, nil
	}
	for _, z := range f.entry.Zero {
		off, end := z[0]*f.entry.Block, z[0]*f.entry.Block+f.entry.runLength(z)
		for ; off < end; off += readSize {
			b, err := read(off, min(readSize, end-off))
			if err != nil {
				return nil, err
			}
			for at := 0; at < len(b); at += len(zeroBlock) {
				piece := b[at:min(at+len(zeroBlock), len(b))]
				if allZero(piece) {
					continue
				}
				if _, err := file.WriteAt(zeroBlock[:len(piece)], off+int64(at)); err != nil {
					return nil, err
				}
			}
		}
		re.kept.Add(f.entry.runLength(z))
	}
	for _, p := range picks {
		var differ []run
		ids := p.ids
		for _, r := range p.blocks {
			b, err := read(r[0]*f.entry.Block, f.entry.runLength(r))
			if err != nil {
				return nil, err
			}
			for n := r[0]; n < r[0]+r[1]; n++ {
				block := b[:f.entry.packFile().length(n)]
				if seal.Identify(block, p.seed) == ids[0] {
					re.kept.Add(int64(len(block)))
				} else {
					differ = appendRun(differ, n)
				}
				b, ids = b[len(block):], ids[1:]
			}
		}
		if len(differ) > 0 {
			p.blocks, p.ids = differ, nil
			rest = append(rest, p)
		}
	}
	re.progress(0)
	return slices.Clip(rest), nil
}
