// Package wal moves files of the write-ahead log between a data directory and
// the archive, for PostgreSQL's archive_command and restore_command. It says
// yes only to what it has proved.
package wal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Server is what a data directory says about itself.
type Server struct {
	System      pg.SystemID
	Major       int         // of PostgreSQL
	Timeline    pg.Timeline // that it writes; of one in recovery, that of the last checkpoint
	SegmentSize pg.SegmentSize
	Recovering  bool // a standby, or a backup that is being restored
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
	c, err := readControl(filepath.Join(pgdata, "global", "pg_control"))
	if err != nil {
		return Server{}, hint(err)
	}
	recovering := c.State == pg.ShutDownInRecovery || c.State == pg.InArchiveRecovery
	timeline := c.Timeline
	if !recovering {
		// A promoted standby writes for up to checkpoint_timeout before its next
		// checkpoint. Until then the new timeline stands beside the minimum
		// recovery point, which the checkpoint clears (CreateEndOfRecoveryRecord
		// and CreateCheckPoint in access/transam/xlog.c).
		timeline = max(timeline, c.MinRecoveryTimeline)
	}
	return Server{c.System, major, timeline, c.SegmentSize, recovering}, nil
}

// readControl reads pg_control until it is not being written.
func readControl(path string) (pg.Control, error) {
	for n := 0; ; n++ {
		b, err := readFile(path, 64<<10)
		if err != nil {
			return pg.Control{}, err
		}
		c, err := pg.ParseControl(b)
		if !errors.Is(err, pg.ErrTorn) || n == 20 {
			return c, err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (s Server) archive(cluster string) repo.Archive {
	return repo.Archive{Cluster: cluster, System: s.System, Major: s.Major}
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

// check refuses a file of size bytes that cannot be what the name says, on that
// server. Of a segment it wants the beginning, of other files all.
func check(n pg.WALName, s Server, content []byte, size int64) error {
	switch n.Kind {
	case pg.History, pg.BackupHistory:
		if size > maxText {
			return fmt.Errorf("%d bytes are too many: %w", size, fail.Corrupt)
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
	return checkHead(n, s, content[:min(len(content), pg.PageHeaderSize)], size)
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
