// Package pgdata is the data directory of a PostgreSQL cluster as a tree of
// files: which of them a backup needs, and how each is read right while a server
// works on it. It only reads.
package pgdata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// Options say what the data directory alone does not tell. The zero value is
// right where everything stands inside of it.
type Options struct {
	// Config are the files of the configuration, as absolute paths. Those that
	// stand in the data directory are part of it anyway; the others, also where a
	// link in the data directory leads to them, become config/<n>/<name>, in this
	// order.
	Config []string
	// LogDirectory is the server's setting log_directory: the directory of its
	// log is kept, if it is below the data directory, and its contents are not.
	LogDirectory string
	// Note is told of every file that is left out though nobody expects it, and
	// why. It may be called from several goroutines. Nil: nobody is told.
	Note func(path, why string)
}

// A Dir is a data directory. Its methods may be called from several goroutines
// at once.
type Dir struct {
	path    string // without symbolic links
	opt     Options
	logs    string // below PGDATA, slashes; "": elsewhere
	config  []string
	version string // the name of this cluster's directory in every tablespace
	control pg.Control
	root    *root
	moved   []string            // the server's own directories that are links
	kept    map[string][]string // directories of databases that were there, by that they stand in, below PGDATA

	mu     sync.Mutex
	spaces map[string]*root // what links lead to, by their path below PGDATA
}

// A root is a directory that holds a part of the cluster, and may be a file
// system of its own.
type root struct {
	path string
	*os.Root
	proof []string // files that are there as long as the directory is
	info  fs.FileInfo
}

// Open opens the data directory at a path. It must hold a cluster; whether a
// server runs on it does not matter.
func Open(dir string, opt Options) (*Dir, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, fmt.Errorf("open data directory: %w", kinded(err))
	}
	real, err = filepath.Abs(real)
	if err != nil {
		return nil, fmt.Errorf("open data directory: %w", err)
	}
	if opt.Note == nil {
		opt.Note = func(string, string) {}
	}
	d := &Dir{path: real, opt: opt, spaces: make(map[string]*root)}
	if d.root, err = openRoot(real, "PG_VERSION", controlFile); err != nil {
		return nil, fmt.Errorf("open data directory: %w", err)
	}
	if err := d.identify(); err != nil {
		d.Close()
		return nil, fmt.Errorf("open data directory: %w", err)
	}
	d.logs = d.within(opt.LogDirectory)
	for _, c := range opt.Config {
		if !d.met(c) {
			d.config = append(d.config, c)
		}
	}
	return d, nil
}

// met reports whether the walk meets a file of the configuration. Of a link it
// meets only what leads to the file, but for the few that it follows.
func (d *Dir) met(file string) bool {
	parent, err := filepath.EvalSymlinks(filepath.Dir(file))
	switch {
	case err != nil, parent != d.path && d.within(parent) == "":
		return false
	case parent == d.path && slices.Contains(configs, filepath.Base(file)):
		return true
	}
	real, err := filepath.EvalSymlinks(file)
	return err != nil || d.within(real) != "" // what is not there is not missed
}

// identify reads what kind of cluster this is.
func (d *Dir) identify() error {
	for _, name := range owned {
		info, err := d.root.Lstat(name)
		if err == nil && info.Mode()&fs.ModeSymlink != 0 {
			d.moved = append(d.moved, name)
		}
	}
	major, err := readSome(d.root.Root, "PG_VERSION", 64)
	if err != nil {
		return kinded(err)
	}
	if d.control, _, err = d.Control(context.Background()); err != nil {
		return err
	}
	// TABLESPACE_VERSION_DIRECTORY in PostgreSQL's common/relpath.h
	d.version = fmt.Sprintf("PG_%s_%d", strings.TrimSpace(string(major)), d.control.Catalog)
	return nil
}

// within returns a path as seen from the data directory; "" if it is not below.
func (d *Dir) within(p string) string {
	if p == "" {
		return ""
	}
	if filepath.IsAbs(p) {
		if real, err := filepath.EvalSymlinks(p); err == nil {
			p = real
		}
		rel, err := filepath.Rel(d.path, p)
		if err != nil {
			return ""
		}
		p = rel
	}
	p = filepath.ToSlash(filepath.Clean(p))
	if p == "." || p == ".." || strings.HasPrefix(p, "../") {
		return ""
	}
	return p
}

const controlFile = "global/pg_control"

func openRoot(dir string, proof ...string) (*root, error) {
	r, err := os.OpenRoot(dir)
	if err != nil {
		return nil, kinded(err)
	}
	info, err := r.Stat(".")
	if err != nil {
		return nil, errors.Join(kinded(err), r.Close())
	}
	return &root{path: dir, Root: r, proof: proof, info: info}, nil
}

// present finds out whether the directory is still what stands at its path. A
// file system that is not mounted any more leaves an empty directory behind.
func (r *root) present() error {
	lost := func(err error) error {
		return fmt.Errorf("directory %s was there before: %v: %w", r.path, err, fail.FilesLost) // not fs.ErrNotExist, which means less
	}
	info, err := os.Stat(r.path)
	if err != nil {
		return lost(err)
	}
	if !os.SameFile(info, r.info) {
		return lost(errors.New("now it is another one"))
	}
	for _, name := range r.proof {
		if _, err := os.Stat(filepath.Join(r.path, name)); err != nil {
			return lost(err)
		}
	}
	return nil
}

// kinded gives an error of the file system the kind it has for an operator.
func kinded(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return fail.Hint(fail.With(fail.BadConfig, err),
			"pgkeep reads the data directory as PostgreSQL's OS user, or as a member of its group after initdb --allow-group-access")
	}
	return err
}

// Close lets the directories go.
func (d *Dir) Close() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.root.Close()
	for _, r := range d.spaces {
		r.Close()
	}
	clear(d.spaces)
}

// Path is where the data directory is, without symbolic links.
func (d *Dir) Path() string { return d.path }

// Config returns the files of the tree below config, by their number.
func (d *Dir) Config() []string { return slices.Clone(d.config) }

// Present finds out whether the data directory and the tablespaces met so far
// are still there. Else it is fail.FilesLost.
func (d *Dir) Present() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.root.present(); err != nil {
		return err
	}
	for link, r := range d.spaces {
		gone, err := d.spaceGone(link, r)
		if err != nil {
			return err
		}
		if gone {
			delete(d.spaces, link) // somebody may be reading through r
		}
	}
	return nil
}

// spaceGone reports whether a tablespace was dropped: the server removes what
// it holds, and then the link, at once.
func (d *Dir) spaceGone(link string, r *root) (bool, error) {
	for i := 0; ; i++ {
		err := r.present()
		if err == nil {
			return false, nil
		}
		if _, lerr := d.root.Lstat(link); errors.Is(lerr, fs.ErrNotExist) {
			return true, nil
		}
		if i == len(backoff) {
			return false, err
		}
		time.Sleep(backoff[i])
	}
}

// Control reads global/pg_control. The server writes it over, so what is read
// can be half of the old and half of the new: it is read again until its
// checksum is right, and given up when it stands still and is wrong.
func (d *Dir) Control(ctx context.Context) (pg.Control, []byte, error) {
	var last []byte
	for i := 0; ; i++ {
		b, err := d.readControl()
		if err != nil {
			return pg.Control{}, nil, fmt.Errorf("read pg_control: %w", kinded(err))
		}
		c, err := pg.ParseControl(b)
		if err == nil {
			return c, b, nil
		}
		if !errors.Is(err, pg.ErrTorn) || i >= len(backoff) && bytes.Equal(b, last) || i > 100 {
			return pg.Control{}, nil, fmt.Errorf("%w: %w", err, fail.Corrupt)
		}
		last = b
		if err := pause(ctx, i); err != nil {
			return pg.Control{}, nil, err
		}
	}
}

func (d *Dir) readControl() ([]byte, error) {
	r, name, err := d.locate(place{rest: controlFile})
	if err != nil {
		return nil, err
	}
	return readSome(r.Root, name, 64<<10)
}

// backoff is how long a reader waits before it looks again at what the server
// seems to be writing. One torn read in ten is torn again at once.
var backoff = []time.Duration{0, time.Millisecond, 10 * time.Millisecond, 50 * time.Millisecond, 200 * time.Millisecond}

func pause(ctx context.Context, i int) error {
	select {
	case <-time.After(backoff[min(i, len(backoff)-1)]):
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

func readSome(r *os.Root, name string, limit int64) ([]byte, error) {
	f, err := r.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit))
}

// A Tablespace is a place outside the data directory, or a directory in
// pg_tblspc.
type Tablespace struct {
	OID  uint32
	Path string // "": it stands in pg_tblspc itself
}

// Tablespaces lists the tablespaces there are, in order of their OIDs.
func (d *Dir) Tablespaces() ([]Tablespace, error) {
	info, err := d.root.Lstat("pg_tblspc")
	if err == nil && info.Mode()&fs.ModeSymlink != 0 {
		return nil, fail.Hint(fmt.Errorf("list tablespaces: pg_tblspc is a link: %w", fail.BadConfig), "make it a directory again; the links in it may lead anywhere")
	}
	names, err := fs.ReadDir(d.root.FS(), "pg_tblspc")
	if err != nil {
		return nil, fmt.Errorf("list tablespaces: %w", kinded(err))
	}
	var all []Tablespace
	for _, e := range names {
		if !isOID(e.Name()) {
			continue
		}
		oid, err := strconv.ParseUint(e.Name(), 10, 32)
		if err != nil {
			return nil, err
		}
		t := Tablespace{OID: uint32(oid)}
		if e.Type()&fs.ModeSymlink != 0 {
			t.Path, err = d.root.Readlink("pg_tblspc/" + e.Name())
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("list tablespaces: %w", err)
			}
		}
		all = append(all, t)
	}
	slices.SortFunc(all, func(a, b Tablespace) int { return int(int64(a.OID) - int64(b.OID)) })
	return all, nil
}

// KeepDatabases notes which directories of databases there are: from now on Files
// lists them, and if they are gone when it gets there, without content. It is
// called between the start of a backup and Files, once, and before the next
// checkpoint; see docs/decisions/0021-databases-that-were-dropped.md.
func (d *Dir) KeepDatabases() error {
	spaces, err := d.Tablespaces()
	if err != nil {
		return err
	}
	in := []string{"base"}
	for _, t := range spaces {
		in = append(in, fmt.Sprintf("pg_tblspc/%d/%s", t.OID, d.version))
	}
	d.kept = make(map[string][]string)
	for _, dir := range in {
		entries, err := os.ReadDir(filepath.Join(d.path, dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("list databases: %w", kinded(err))
		}
		for _, e := range entries {
			if e.IsDir() && isOID(e.Name()) {
				d.kept[dir] = append(d.kept[dir], e.Name())
			}
		}
	}
	return nil
}

// space returns the directory that the link at a path below PGDATA leads to:
// that of a tablespace, or one of the server's own directories that somebody
// has moved.
func (d *Dir) space(link string) (*root, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r := d.spaces[link]; r != nil {
		return r, nil
	}
	target, err := d.root.Readlink(link)
	if err != nil {
		return nil, err
	}
	if !filepath.IsAbs(target) {
		target = filepath.Join(d.path, filepath.Dir(link), target)
	}
	if info, err := os.Lstat(target); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		return nil, fail.Hint(fmt.Errorf("%s is a link to a link, %s: %w", link, target, fail.BadConfig), "let the link name the directory itself")
	}
	var proof []string
	if strings.HasPrefix(link, "pg_tblspc/") {
		proof = []string{d.version}
	}
	r, err := openRoot(target, proof...)
	if err != nil {
		return nil, err
	}
	d.spaces[link] = r
	return r, nil
}

// locate returns the directory that a place is in, and its name there. The
// files of the configuration have none.
func (d *Dir) locate(p place) (*root, string, error) {
	if p.oid != "" {
		r, err := d.space("pg_tblspc/" + p.oid)
		return r, p.rest, err
	}
	top, rest, _ := strings.Cut(p.rest, "/")
	if slices.Contains(d.moved, top) {
		r, err := d.space(top)
		return r, path.Clean("./" + rest), err
	}
	return d.root, p.rest, nil
}
