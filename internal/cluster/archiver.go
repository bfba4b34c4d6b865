package cluster

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// An Archiver is how the archiver of a cluster is doing. Times are by the
// server's clock, and zero for never.
type Archiver struct {
	System pg.SystemID `json:"system_id,omitzero"`
	Major  int         `json:"pg_major,omitempty"`
	LSN    pg.LSN      `json:"lsn,omitzero"` // how far its log reaches; of a standby, what it has of it

	Now       time.Time `json:"now"`
	Archiving bool      `json:"archiving"` // this server hands its WAL to an archiver
	Standby   bool      `json:"standby,omitempty"`
	Ours      bool      `json:"ours"` // archive_command runs pgkeep-wal

	Waiting int       `json:"waiting"`         // files to archive: those with a .ready
	Oldest  time.Time `json:"oldest,omitzero"` // since when the first of them waits

	Archived     int64     `json:"archived"` // since the statistics were reset
	Failed       int64     `json:"failed"`
	LastArchived time.Time `json:"last_archived,omitzero"`
	LastFailed   time.Time `json:"last_failed,omitzero"`
	FailedWAL    string    `json:"failed_wal,omitempty"` // what it failed on last
}

// Archiver asks the cluster about its archiver: what waits in
// pg_wal/archive_status, and pg_stat_archiver. The statistics alone do not tell
// that archiving has stopped: a command that is killed, that ends with a status
// above 125 or that hangs counts neither as failed nor as archived.
func (c Cluster) Archiver(ctx context.Context) (Archiver, error) {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return Archiver{}, err
	}
	defer hangUp(conn)
	f, err := readFacts(ctx, conn)
	if err != nil {
		return Archiver{}, queryError("ask the cluster about itself", err)
	}
	a := Archiver{System: f.System, Major: f.Version.Major(), Archiving: f.Archiving(), Standby: f.InRecovery}
	if a.LSN, _, err = position(ctx, conn); err != nil {
		return Archiver{}, queryError("ask how far the log reaches", err)
	}
	var command string
	var oldest, archived, failed *time.Time
	err = conn.QueryRow(ctx, `
		SELECT now(), current_setting('archive_command'), s.archived_count, s.failed_count,
		       s.last_archived_time, s.last_failed_time, coalesce(s.last_failed_wal, ''), w.waiting, w.oldest
		  FROM pg_stat_archiver s,
		       (SELECT count(*)::int AS waiting, min(modification) AS oldest FROM pg_ls_archive_statusdir() WHERE name LIKE '%.ready') w`).
		Scan(&a.Now, &command, &a.Archived, &a.Failed, &archived, &failed, &a.FailedWAL, &a.Waiting, &oldest)
	if err != nil {
		if err = queryError("ask about the archiver", err); errors.Is(err, fail.PGDenied) {
			err = fail.Hint(err, "grant the role pg_monitor to that of the conninfo")
		}
		return Archiver{}, err
	}
	a.Now = a.Now.UTC()
	a.Ours = strings.Contains(command, "pgkeep-wal")
	for to, t := range map[*time.Time]*time.Time{&a.Oldest: oldest, &a.LastArchived: archived, &a.LastFailed: failed} {
		if t != nil {
			*to = t.UTC()
		}
	}
	return a, nil
}
