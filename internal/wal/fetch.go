package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// ErrAbsent means that a file is proved not to be in the archive, and that
// nothing there shows that it should be.
var ErrAbsent = errors.New("not in the archive")

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
	for f, err := range r.ListWAL(ctx, a, n.Timeline, n) {
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
	for _, err := range r.ListWAL(ctx, a, 0, pg.WALName{}) {
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
