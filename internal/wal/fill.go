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

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// Filled tells what Fill did.
type Filled struct {
	Segments []string // that are in the archive now
	Refused  []string // that are in pg_wal, and why they were not archived
}

// Fill archives segments that an earlier primary did not: those in pg_wal of the
// data directory for which missing is true. A standby received them, and after
// its promotion PostgreSQL archives only what it writes itself. A segment counts
// only if it lies wholly before the position at which a history in pg_wal says
// that its timeline was left, so that nobody writes it any more, and if every
// record in it is sound, to the end of the segment.
func Fill(ctx context.Context, r *repo.Repo, cluster, pgdata string, missing func(pg.WALName) bool) (Filled, error) {
	var done Filled
	s, err := ReadServer(pgdata)
	if err != nil {
		return done, err
	}
	dir := filepath.Join(pgdata, "pg_wal")
	files, err := os.ReadDir(dir)
	if err != nil {
		return done, fmt.Errorf("fill: %w", err)
	}
	var left []pg.Fork
	for _, f := range files {
		n, err := pg.ParseWALName(f.Name())
		if err != nil || n.Kind != pg.History {
			continue
		}
		text, err := readFile(filepath.Join(dir, f.Name()), maxText)
		if err != nil {
			return done, fmt.Errorf("fill: %w", err)
		}
		forks, err := pg.ParseHistory(n.Timeline, string(text))
		if err != nil {
			return done, fmt.Errorf("fill: %w: %w", err, fail.Corrupt)
		}
		left = append(left, forks...)
	}
	archiver := r.Archiver(s.archive(cluster), "") // no instance: the timeline may be that of the server that is gone
	for _, f := range files {                      // in the order of their names
		n, err := pg.ParseWALName(f.Name())
		if err != nil || n.Kind != pg.Segment || !closed(n, s.SegmentSize, left) || !missing(n) {
			continue
		}
		content, err := readFile(filepath.Join(dir, f.Name()), maxFile)
		if errors.Is(err, fs.ErrNotExist) {
			continue // recycled just now
		}
		if err == nil {
			err = checkWhole(n, s, content)
		}
		if errors.Is(err, fail.Corrupt) || errors.Is(err, fail.WrongSystem) {
			done.Refused = append(done.Refused, fmt.Sprintf("%v: %v", n, err))
			continue
		}
		if err != nil {
			return done, fmt.Errorf("fill %v: %w", n, err)
		}
		if _, err := archiver.Put(ctx, repo.WALFile{Name: n, Size: int64(len(content)), Content: bytes.NewReader(content)}); err != nil {
			return done, fmt.Errorf("fill %v: %w", n, err)
		}
		done.Segments = append(done.Segments, n.String())
	}
	return done, nil
}

// closed reports whether a segment ends before its timeline was left.
func closed(n pg.WALName, size pg.SegmentSize, left []pg.Fork) bool {
	start, err := n.Start(size)
	for _, f := range left {
		if err == nil && f.Timeline == n.Timeline && f.At >= start && f.At-start >= pg.LSN(size) {
			return true
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
