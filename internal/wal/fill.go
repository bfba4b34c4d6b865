package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// Filled tells what Fill did.
type Filled struct {
	Files   []string // that are in the archive now
	Refused []string // that are in pg_wal, and why they were not archived
}

// Fill archives files that nobody did: segments and histories in pg_wal of the
// data directory for which missing is true. A standby received what an earlier
// primary did not archive, and after its promotion PostgreSQL archives only what
// it writes itself. A segment counts only if it lies wholly before the position at
// which a history in pg_wal says that its timeline was left, so that nobody writes
// it any more, and if every record in it is sound, to the end of the segment. A
// history counts only if something shows that it is the one that is missing: see
// vouch.
func Fill(ctx context.Context, r *repo.Repo, cluster, pgdata string, missing func(pg.WALName) bool) (Filled, error) {
	var done Filled
	s, err := ReadServer(pgdata)
	if err != nil {
		return done, err
	}
	a := s.archive(cluster)
	fl := filler{r: r, archive: a, pgdata: pgdata, server: s, forks: make(map[pg.Timeline][]pg.Fork),
		archiver: r.Archiver(a, "")} // no instance: the timeline may be that of the server that is gone
	dir := filepath.Join(pgdata, "pg_wal")
	files, err := os.ReadDir(dir)
	if err != nil {
		return done, fmt.Errorf("fill: %w", err)
	}
	for _, f := range files {
		n, err := pg.ParseWALName(f.Name())
		if err != nil || n.Kind != pg.History {
			continue
		}
		text, err := readFile(filepath.Join(dir, f.Name()), maxText)
		if err != nil {
			return done, fmt.Errorf("fill: %w", err)
		}
		if fl.forks[n.Timeline], err = pg.ParseHistory(n.Timeline, string(text)); err != nil {
			return done, fmt.Errorf("fill: %w: %w", err, fail.Corrupt)
		}
	}
	for _, f := range files { // in the order of their names
		n, err := pg.ParseWALName(f.Name())
		if err != nil || !(n.Kind == pg.History || n.Kind == pg.Segment && fl.closed(n)) || !missing(n) {
			continue
		}
		err = fl.put(ctx, n, filepath.Join(dir, f.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // recycled just now
		}
		switch k := fail.KindOf(err); k {
		case fail.Corrupt, fail.WrongSystem, fail.WALConflict, fail.TimelineTaken:
			done.Refused = append(done.Refused, fmt.Sprintf("%v: %v", n, err))
			continue
		}
		if err != nil {
			return done, fmt.Errorf("fill %v: %w", n, err)
		}
		done.Files = append(done.Files, n.String())
	}
	return done, nil
}

// A filler archives files of a data directory that were left out.
type filler struct {
	r        *repo.Repo
	archive  repo.Archive
	archiver *repo.Archiver
	pgdata   string
	server   Server
	forks    map[pg.Timeline][]pg.Fork // by the histories in pg_wal
}

// put archives one file, if it can be the one that is missing.
func (fl *filler) put(ctx context.Context, n pg.WALName, path string) error {
	content, err := readFile(path, maxFile)
	if err != nil {
		return err
	}
	if n.Kind == pg.History {
		err = fl.vouch(ctx, n)
	} else {
		err = checkWhole(n, fl.server, content)
	}
	if err == nil {
		_, err = fl.archiver.Put(ctx, repo.WALFile{Name: n, Size: int64(len(content)), Content: bytes.NewReader(content)})
	}
	return err
}

// vouch returns nil if the history of a timeline in pg_wal is that of the
// timeline in the archive. Every history of a later timeline that comes through
// this one, in pg_wal or in the archive, must begin with its forks, and there must
// be one; or the timeline is the server's own, and this instance archives it.
// Timelines are numbered by whoever is promoted: two can have one number.
func (fl *filler) vouch(ctx context.Context, n pg.WALName) error {
	named := false
	agree := func(t pg.Timeline, forks []pg.Fork) error {
		i := slices.IndexFunc(forks, func(f pg.Fork) bool { return f.Timeline == n.Timeline })
		if i < 0 {
			return nil
		}
		if named = true; !slices.Equal(forks[:i], fl.forks[n.Timeline]) {
			return fmt.Errorf("timeline %v comes from another timeline of that number: %w", t, fail.Corrupt)
		}
		return nil
	}
	for t, forks := range fl.forks {
		if err := agree(t, forks); err != nil {
			return err
		}
	}
	for h, err := range histories(ctx, fl.r, fl.archive, n.Timeline) {
		if err == nil {
			err = agree(h.name.Timeline, h.forks)
		}
		if err != nil {
			return err
		}
	}
	if named {
		return nil
	}
	if n.Timeline == fl.server.Timeline {
		c, err := fl.archiver.Claim(ctx, n.Timeline)
		if err != nil && !errors.Is(err, store.ErrNotExist) {
			return err
		}
		i, err := OpenInstance(fl.pgdata)
		if err != nil || i.ID == c.Instance {
			return err
		}
	}
	return fmt.Errorf("nothing shows that it is that of the timeline in the archive: %w", fail.TimelineTaken)
}

// closed reports whether a segment ends before its timeline was left.
func (fl *filler) closed(n pg.WALName) bool {
	start, err := n.Start(fl.server.SegmentSize)
	for _, forks := range fl.forks {
		for _, f := range forks {
			if err == nil && f.Timeline == n.Timeline && f.At >= start && f.At-start >= pg.LSN(fl.server.SegmentSize) {
				return true
			}
		}
	}
	return false
}

// checkWhole is check for a segment that no archiver vouches for: it reads every
// record, up to the end of the segment.
func checkWhole(n pg.WALName, s Server, content []byte) error {
	if err := check(n, s, content, int64(len(content))); err != nil {
		return err
	}
	log := pg.NewWALScanner(bytes.NewReader(content))
	for {
		if _, err := log.Next(); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
	}
	err := log.Why()
	if err == nil && log.Timeline() > n.Timeline {
		err = fmt.Errorf("a page of it is of timeline %v", log.Timeline())
	}
	return fail.With(fail.Corrupt, err)
}
