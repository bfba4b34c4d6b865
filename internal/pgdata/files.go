package pgdata

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// A File is one entry of the tree of a backup: a file, a directory, or a link
// that is kept as a link.
type File struct {
	// Path is data/… for what is in the data directory, tablespaces/<oid>/… for
	// what is in a tablespace, config/<n>/<name> for a file of the configuration
	// that stands elsewhere.
	Path     string
	Dir      bool
	Link     string      // where it leads, as the link says it; "": it is none
	Mode     fs.FileMode // permission bits
	Size     int64       // of a file
	Modified time.Time
}

// errStop ends a listing that nobody reads on.
var errStop = errors.New("stop")

// Files lists what a backup takes, in the order of the bytes of the paths, and
// reads each directory only when it gets there. What a live server removes in
// the meantime is left out, but for what KeepDatabases has noted. Global/pg_control is not listed: it is read last.
//
// After an error nothing follows.
func (d *Dir) Files(ctx context.Context) iter.Seq2[File, error] {
	return func(yield func(File, error) bool) {
		l := lister{Dir: d, ctx: ctx, yield: func(f File) error {
			if !utf8.ValidString(f.Path) || !utf8.ValidString(f.Link) {
				return fail.Hint(fmt.Errorf("list %q: it, or where it leads, is not UTF-8: %w", f.Path, fail.BadConfig),
					"PostgreSQL makes no such file: rename it, or move it out of the data directory (ls -b shows names so)")
			}
			if !yield(f, nil) {
				return errStop
			}
			return ctx.Err()
		}}
		if err := l.list(); err != nil && err != errStop {
			yield(File{}, err)
		}
	}
}

type lister struct {
	*Dir
	ctx     context.Context
	yield   func(File) error
	outside []string // directories below PGDATA that are tablespaces, and listed there
}

func (l *lister) list() error {
	spaces, err := l.Tablespaces()
	if err != nil {
		return err
	}
	spaces = slices.DeleteFunc(spaces, func(t Tablespace) bool { return t.Path == "" })
	for _, t := range spaces {
		if in := l.within(t.Path); in != "" {
			l.outside = append(l.outside, in)
		}
	}
	for i := range l.config {
		if err := l.configFile(i); err != nil {
			return err
		}
	}
	if err := l.top(l.root, "data", "."); err != nil {
		return err
	}
	names := make([]string, len(spaces))
	for i, t := range spaces {
		names[i] = fmt.Sprint(t.OID)
	}
	slices.Sort(names)
	for _, oid := range names {
		if err := l.tablespace(oid); err != nil {
			return err
		}
	}
	return nil
}

func (l *lister) configFile(i int) error {
	real := l.config[i]
	info, err := os.Stat(real)
	if errors.Is(err, fs.ErrNotExist) {
		l.opt.Note(real, "this file of the configuration is not there")
		return nil
	}
	if err != nil {
		return fmt.Errorf("list the configuration: %w", kinded(err))
	}
	if !info.Mode().IsRegular() {
		l.opt.Note(real, "not a regular file")
		return nil
	}
	return l.yield(File{Path: fmt.Sprintf("config/%03d/%s", i, filepath.Base(real)), Mode: info.Mode().Perm(), Size: info.Size(), Modified: info.ModTime()})
}

// top lists a directory that no name leads to, and what is in it.
func (l *lister) top(r *root, tree, below string) error {
	info, err := r.Stat(".")
	if err != nil {
		return fmt.Errorf("list %s: %w", tree, kinded(err))
	}
	if err := l.yield(File{Path: tree, Dir: true, Mode: info.Mode().Perm(), Modified: info.ModTime()}); err != nil {
		return err
	}
	return l.walk(r, ".", tree, below)
}

// tablespace lists what a tablespace holds of this cluster: another one may
// keep files there, too, after pg_upgrade.
func (l *lister) tablespace(oid string) error {
	link := "pg_tblspc/" + oid
	for i := 0; ; i++ {
		r, err := l.space(link)
		if err == nil {
			_, err = r.Stat(l.version)
		}
		if err == nil {
			return l.top(r, "tablespaces/"+oid, link)
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("list tablespace %s: %w", oid, kinded(err))
		}
		// DROP TABLESPACE removes the directory first, then the link.
		if _, gone := l.root.Lstat(link); errors.Is(gone, fs.ErrNotExist) {
			return l.Present()
		}
		if i > len(backoff) {
			return fail.Hint(fmt.Errorf("tablespace %s is not there: %v: %w", oid, err, fail.FilesLost), "is its file system mounted?")
		}
		if err := pause(l.ctx, i); err != nil {
			return err
		}
	}
}

// walk lists what is in a directory: name in r, tree in the backup, below as
// seen from PGDATA.
//
// The names come in the order that whole paths have: what is in directory "a"
// follows "a-b" and "a.b", for these are before "a/".
func (l *lister) walk(r *root, name, tree, below string) error {
	dir, err := r.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return l.Present()
	}
	if err != nil {
		return fmt.Errorf("list %s: %w", tree, kinded(err))
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list %s: %w", tree, err)
	}
	names = append(names, l.kept[below]...)
	slices.Sort(names)
	names = slices.Compact(names)
	var waiting []string // directories to go into, the last one first
	enter := func(before string) error {
		for n := len(waiting); n > 0 && (before == "" || waiting[n-1]+"/" < before); n-- {
			sub := waiting[n-1]
			waiting = waiting[:n-1]
			if err := l.enter(r, path.Join(name, sub), tree+"/"+sub, path.Join(below, sub)); err != nil {
				return err
			}
		}
		return nil
	}
	logged := l.logged(names, below)
	for _, n := range names {
		if err := enter(n); err != nil {
			return err
		}
		if below == "pg_tblspc" && !isOID(n) || strings.HasPrefix(tree, "tablespaces/") && name == "." && n != l.version {
			continue // not ours
		}
		v := judge(below, n, l.logs)
		if v == skip || !logged(n) {
			continue
		}
		f, err := l.stat(int(dir.Fd()), n, tree, below, v)
		if errors.Is(err, fs.ErrNotExist) {
			if err := l.Present(); err != nil {
				return err
			}
			if slices.Contains(l.kept[below], n) {
				if err := l.yield(File{Path: tree + "/" + n, Dir: true, Mode: 0o700, Modified: time.Now().UTC()}); err != nil {
					return err
				}
			}
			continue
		}
		if errors.Is(err, errSkip) {
			continue
		}
		if err != nil {
			return fmt.Errorf("list %s/%s: %w", tree, n, kinded(err))
		}
		if err := l.yield(f); err != nil {
			return err
		}
		if f.Dir && v == keep && !slices.Contains(l.outside, path.Join(below, n)) {
			waiting = append(waiting, n)
		}
	}
	return enter("")
}

func (l *lister) enter(r *root, name, tree, below string) error {
	if slices.Contains(l.moved, below) {
		moved, err := l.space(below)
		if err != nil {
			return fmt.Errorf("list %s: %w", tree, kinded(err))
		}
		r, name = moved, "."
	}
	return l.walk(r, name, tree, below)
}

// logged tells which files of a directory are not of unlogged relations. Those
// are empty after every recovery; only what they begin with is kept, the fork
// called init.
func (l *lister) logged(names []string, below string) func(name string) bool {
	if !holdsRelations(below) {
		return func(string) bool { return true }
	}
	return func(name string) bool {
		rel, ok := parseRelation(name)
		if !ok || rel.Fork == "init" {
			return true
		}
		_, unlogged := slices.BinarySearch(names, rel.Node+"_init")
		return !unlogged
	}
}

var errSkip = errors.New("left out")

// stat describes one name in an open directory.
func (l *lister) stat(fd int, name, tree, below string, v verdict) (File, error) {
	var st unix.Stat_t
	if err := unix.Fstatat(fd, name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return File{}, err
	}
	if st.Mode&unix.S_IFMT == unix.S_IFLNK {
		link, err := l.link(fd, name, path.Join(below, name), v)
		if err != nil {
			return File{}, err
		}
		if link != "" {
			return File{Path: tree + "/" + name, Link: link, Mode: 0o777, Modified: modified(&st)}, nil
		}
		if err := unix.Fstatat(fd, name, &st, 0); err != nil {
			return File{}, fmt.Errorf("follow the link: %v: %w", err, fail.FilesLost)
		}
	}
	f := File{Path: tree + "/" + name, Mode: fs.FileMode(st.Mode & 0o777), Modified: modified(&st)}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		f.Dir = true
	case unix.S_IFREG:
		if v == empty {
			return File{}, errSkip
		}
		f.Size = st.Size
	default:
		l.opt.Note(f.Path, "neither a file nor a directory")
		return File{}, errSkip
	}
	return f, nil
}

func modified(st *unix.Stat_t) time.Time { return time.Unix(st.Mtim.Unix()).UTC() }

// link decides about a symbolic link: "" to follow it, else what it says. The
// server's own directories are followed, and the files of the configuration. The
// links of tablespaces are links in the backup. A stranger's link is kept as one,
// and nothing is read through it; where the server keeps data, one is refused,
// for the backup would lack what it leads to.
func (l *lister) link(fd int, name, below string, v verdict) (string, error) {
	if v == empty || slices.Contains(configs, below) {
		return "", nil
	}
	buf := make([]byte, 4096)
	n, err := unix.Readlinkat(fd, name, buf)
	if err != nil {
		return "", err
	}
	target := string(buf[:n])
	top, rest, _ := strings.Cut(below, "/")
	switch {
	case slices.Contains(l.moved, below):
		if l.within(target) != "" {
			return "", fail.Hint(fmt.Errorf("a link into the data directory: %w", fail.BadConfig), "remove the link, and move the directory to where it was")
		}
		return "", nil
	case top == "pg_tblspc" && isOID(rest):
		return target, nil
	case slices.Contains(owned, top):
		return "", fail.Hint(fmt.Errorf("a link to %q where PostgreSQL keeps data: %w", target, fail.BadConfig),
			"replace the link by what it leads to; to keep tables elsewhere, use a tablespace")
	}
	l.opt.Note(below, fmt.Sprintf("a link to %s: kept as a link, and not followed", target))
	return target, nil
}
