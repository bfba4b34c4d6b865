// Package wal moves files of the write-ahead log between a data directory and
// the archive, for PostgreSQL's archive_command and restore_command. It says
// yes only to what it has proved.
package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// ErrAbsent means that a file is proved not to be in the archive, and that
// nothing there shows that it should be.
var ErrAbsent = errors.New("not in the archive")

// A Server is what a data directory says about itself.
type Server struct {
	System      pg.SystemID
	Major       int         // of PostgreSQL
	Timeline    pg.Timeline // of the last checkpoint
	SegmentSize pg.SegmentSize
}

// ReadServer asks a data directory whose it is. PostgreSQL may run on it.
func ReadServer(pgdata string) (Server, error) {
	hint := func(err error) error {
		return fail.Hint(fmt.Errorf("whose WAL is it: %w", err), "PostgreSQL runs its commands in the data directory; elsewhere, name it with --pgdata")
	}
	text, err := os.ReadFile(filepath.Join(pgdata, "PG_VERSION"))
	if err != nil {
		return Server{}, hint(err)
	}
	major, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return Server{}, hint(fmt.Errorf("PG_VERSION: %w", err))
	}
	b, err := readFile(filepath.Join(pgdata, "global", "pg_control"), 64<<10)
	if err != nil {
		return Server{}, hint(err)
	}
	c, err := pg.ParseControl(b)
	if err != nil {
		return Server{}, hint(err)
	}
	return Server{c.System, major, c.Timeline, c.SegmentSize}, nil
}

func (s Server) archive(cluster string) repo.Archive {
	return repo.Archive{Cluster: cluster, System: s.System, Major: s.Major}
}

// Push archives the file at path, which PostgreSQL calls name. When it returns
// nil, the whole file is durable in the repository. A file that cannot be one of
// this server is refused before anything is sent: fail.WrongSystem if it is
// another's, fail.Corrupt if it is none.
func Push(ctx context.Context, r *repo.Repo, cluster string, s Server, path string) error {
	n, err := pg.ParseWALName(filepath.Base(path))
	if err != nil {
		return fail.With(fail.BadConfig, err)
	}
	content, err := readFile(path, maxFile)
	if err != nil {
		return fmt.Errorf("push %v: %w", n, err)
	}
	if err := check(n, s, content); err != nil {
		err = fmt.Errorf("push %v: %w", n, err)
		if errors.Is(err, fail.Corrupt) {
			err = fail.Hint(err, "the file in the data directory is not what its name says, and nothing was sent; is the disk sound?")
		}
		return err
	}
	return r.PutWAL(ctx, s.archive(cluster), n, content)
}

const (
	maxFile = 1 << 30 // the largest segment
	maxText = 1 << 20 // a history is far smaller
)

// readFile reads a regular file of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s: %d bytes, %v: want a file of at most %d: %w", path, info.Size(), info.Mode(), limit, fail.Corrupt)
	}
	b := make([]byte, info.Size())
	_, err = io.ReadFull(f, b)
	return b, err
}

// check refuses content that cannot be what the name says, on that server.
func check(n pg.WALName, s Server, content []byte) error {
	switch n.Kind {
	case pg.History, pg.BackupHistory:
		if len(content) > maxText {
			return fmt.Errorf("%d bytes are too many: %w", len(content), fail.Corrupt)
		}
		if n.Kind == pg.History {
			_, err := pg.ParseHistory(n.Timeline, string(content))
			return fail.With(fail.Corrupt, err)
		}
		if !bytes.HasPrefix(content, []byte("START WAL LOCATION: ")) {
			return fmt.Errorf("not the note of a base backup: %w", fail.Corrupt)
		}
		return nil
	}
	return checkHead(n, s, content[:min(len(content), pg.PageHeaderSize)], int64(len(content)))
}

// checkHead compares the beginning of a segment of size bytes with its name.
func checkHead(n pg.WALName, s Server, head []byte, size int64) error {
	h, err := pg.ParsePageHeader(head)
	if err != nil {
		return fmt.Errorf("%w: %w", err, fail.Corrupt)
	}
	if h.System != s.System || h.Major != s.Major {
		return fmt.Errorf("a segment of system %v, PostgreSQL %d; this server is %v, PostgreSQL %d: %w", h.System, h.Major, s.System, s.Major, fail.WrongSystem)
	}
	start, err := n.Start(s.SegmentSize)
	switch {
	case h.SegmentSize != s.SegmentSize:
		return fmt.Errorf("its segments have %d bytes, those of this server %d: %w", h.SegmentSize, s.SegmentSize, fail.WrongSystem)
	case err != nil:
		return fmt.Errorf("%w: %w", err, fail.Corrupt)
	case size != int64(h.SegmentSize):
		return fmt.Errorf("%d bytes, where a segment has %d: %w", size, h.SegmentSize, fail.Corrupt)
	case h.Address != start:
		return fmt.Errorf("it begins at %v, and by its name at %v: %w", h.Address, start, fail.Corrupt)
	case h.Timeline > n.Timeline:
		return fmt.Errorf("it was written on timeline %v: %w", h.Timeline, fail.Corrupt)
	}
	return nil
}

// Fetch puts the file that PostgreSQL calls name at path. It returns nil when it
// is there, whole, durable and verified. It fails with ErrAbsent when the store
// says that there is none and nothing in the archive shows that there should be;
// only then may PostgreSQL take this for the end of the log. Whatever else
// happens is another error.
func Fetch(ctx context.Context, r *repo.Repo, cluster string, s Server, name, path string) error {
	n, err := pg.ParseWALName(name)
	if err != nil {
		return fail.With(fail.BadConfig, err)
	}
	a := s.archive(cluster)
	err = durable.WriteFile(path, 0o600, func(w io.Writer) error {
		return read(ctx, r, a, n, s, w)
	})
	if errors.Is(err, store.ErrNotExist) {
		err = absent(ctx, r, a, n, s)
	}
	if err != nil {
		return fmt.Errorf("fetch %v: %w", n, err)
	}
	return nil
}

// read writes a verified file of the archive to w.
func read(ctx context.Context, r *repo.Repo, a repo.Archive, n pg.WALName, s Server, w io.Writer) error {
	if n.Kind == pg.History || n.Kind == pg.BackupHistory {
		var content bytes.Buffer
		if err := r.ReadWAL(ctx, a, n, &content); err != nil {
			return err
		}
		if err := check(n, s, content.Bytes()); err != nil {
			return err
		}
		_, err := w.Write(content.Bytes())
		return err
	}
	p := &peek{w: w}
	if err := r.ReadWAL(ctx, a, n, p); err != nil {
		return err
	}
	return checkHead(n, s, p.head, p.size)
}

// A peek remembers the beginning of what passes.
type peek struct {
	w    io.Writer
	head []byte
	size int64
}

func (p *peek) Write(b []byte) (int, error) {
	if want := pg.PageHeaderSize - len(p.head); want > 0 {
		p.head = append(p.head, b[:min(want, len(b))]...)
	}
	n, err := p.w.Write(b)
	p.size += int64(n)
	return n, err
}

// absent decides what it means that the store has no object for n: ErrAbsent, or
// why it should have one.
func absent(ctx context.Context, r *repo.Repo, a repo.Archive, n pg.WALName, s Server) error {
	if err := known(ctx, r, a); err != nil {
		return err
	}
	hole := func(witness pg.WALName) error {
		return fail.Hint(fmt.Errorf("it is missing, though the archive holds %v: %w", witness, fail.Corrupt),
			"bring the missing file back if a server or a copy of the bucket still has it; PostgreSQL must not open with fewer rows")
	}
	var last pg.WALName // of those that show that the segment was complete
	for f, err := range r.ListWAL(ctx, a, n.Timeline) {
		if err != nil {
			return err
		}
		if f.Kind != pg.History && (n.Kind == pg.History || f.Segment() > n.Segment()) {
			last = f
		}
	}
	if n.Kind == pg.History {
		// A timeline's files without its history. The first has none; that of
		// this server may have begun before it had an archive.
		if last != (pg.WALName{}) && n.Timeline > s.Timeline {
			return hole(last)
		}
		return ErrAbsent
	}
	if last != (pg.WALName{}) {
		return hole(last)
	}
	return forked(ctx, r, a, n, s, hole)
}

// known fails when the archive holds nothing at all of this server: it is
// another's, or the configuration names another cluster.
func known(ctx context.Context, r *repo.Repo, a repo.Archive) error {
	for _, err := range r.ListWAL(ctx, a, 0) {
		return err
	}
	return fail.Hint(fmt.Errorf("cluster %q has no WAL of system %v, PostgreSQL %d: %w", a.Cluster, a.System, a.Major, fail.WrongSystem),
		"is this the right cluster, and the right repository? Without any archive, leave restore_command out")
}

// forked looks for a timeline that left n's behind n: the archive must hold
// what both share. PostgreSQL numbers timelines without a gap, as far as it sees
// the archive (findNewestTimeLine in access/transam/timeline.c).
func forked(ctx context.Context, r *repo.Repo, a repo.Archive, n pg.WALName, s Server, hole func(pg.WALName) error) error {
	for t := n.Timeline + 1; t != 0; t++ {
		h := pg.HistoryName(t)
		var text bytes.Buffer
		err := r.ReadWAL(ctx, a, h, &text)
		if errors.Is(err, store.ErrNotExist) {
			break
		}
		if err != nil {
			return err
		}
		forks, err := pg.ParseHistory(t, text.String())
		if err != nil {
			return fmt.Errorf("%w: %w", err, fail.Corrupt)
		}
		for _, f := range forks {
			if f.Timeline != n.Timeline {
				continue
			}
			at, err := pg.SegmentName(f.Timeline, f.At, s.SegmentSize)
			if err != nil {
				return err
			}
			if n.Segment() < at { // the segment of the fork itself goes on in the new timeline
				return hole(h)
			}
		}
	}
	return ErrAbsent
}
