package cluster

import (
	"context"
	"fmt"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// ArchiveState says where the write-ahead log up to a position is.
type ArchiveState string

const (
	ArchiveOff     ArchiveState = "off"      // this server archives nothing
	ArchivePending ArchiveState = "pending"  // not all of it is known to be archived
	ArchiveDone    ArchiveState = "archived" // archive_command has taken all of it
)

// Archived answers WALArchived.
type Archived struct {
	State    ArchiveState
	Timeline pg.Timeline // of the server when it was asked
	Needed   string      // the last WAL file that is needed
	Last     string      // what archive_command took last; "": nothing yet
	Failing  string      // what it failed on since then; "": nothing
}

// WALArchived reports whether the log up to a position, that byte not included,
// has been handed to archive_command with success. What becomes of it then, this
// cannot tell. The last file is handed over when it is full, or at
// archive_timeout, or by pg_switch_wal: pending is a normal answer.
func (c Cluster) WALArchived(ctx context.Context, upTo pg.LSN) (Archived, error) {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return Archived{}, err
	}
	defer hangUp(conn)
	op := fmt.Sprintf("ask whether WAL up to %v is archived", upTo)
	f, err := readFacts(ctx, conn)
	if err != nil {
		return Archived{}, queryError(op, err)
	}
	a := Archived{State: ArchiveOff, Timeline: f.Timeline}
	if a.Needed, err = pg.SegmentName(f.Timeline, max(upTo, 1)-1, f.SegmentSize); err != nil {
		return Archived{}, fmt.Errorf("%s: %w", op, err)
	}
	if !f.Archiving() {
		return a, nil
	}
	err = conn.QueryRow(ctx, `
		SELECT coalesce(last_archived_wal, ''),
		       CASE WHEN last_failed_time > coalesce(last_archived_time, '-infinity') THEN last_failed_wal ELSE '' END
		  FROM pg_stat_archiver`).Scan(&a.Last, &a.Failing)
	if err != nil {
		return Archived{}, queryError(op, err)
	}
	a.State = ArchivePending
	if archivedThrough(a.Last, a.Needed, f.SegmentSize) {
		a.State = ArchiveDone
	}
	return a, nil
}

// WakeArchiver has the archiver try again at once what has failed, if the role may:
// a new segment wakes it. Where it may not, or the server is a standby, the archiver
// comes to it within a minute.
func (c Cluster) WakeArchiver(ctx context.Context) {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return
	}
	defer hangUp(conn)
	var may bool
	err = conn.QueryRow(ctx, "SELECT NOT pg_is_in_recovery() AND has_function_privilege('pg_switch_wal()', 'EXECUTE')").Scan(&may)
	if err == nil && may {
		// Where nothing was written, nothing is switched.
		_, _ = conn.Exec(ctx, "SELECT pg_logical_emit_message(false, 'pgkeep', ''), pg_switch_wal()")
	}
}

// archivedThrough reports whether needed has been archived, last being what was
// archived last. The archiver takes files in the order of their names, except
// that a timeline's history goes first, and so tells nothing. The name of a
// backup's history, or of a partial file, begins with that of a segment; the
// segment itself has gone before a backup history, and so has everything older
// before either.
func archivedThrough(last, needed string, size pg.SegmentSize) bool {
	if len(last) < len(needed) {
		return false
	}
	lastTLI, lastAt, err := pg.ParseSegmentName(last[:len(needed)], size)
	if err != nil {
		return false
	}
	if last[len(needed):] == ".partial" {
		if lastAt < pg.LSN(size) {
			return false
		}
		lastAt -= pg.LSN(size)
	}
	neededTLI, neededAt, err := pg.ParseSegmentName(needed, size)
	return err == nil && lastTLI >= neededTLI && lastAt >= neededAt
}
