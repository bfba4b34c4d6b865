package cluster

import (
	"context"
	"time"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// A Position is how far a cluster has come.
type Position struct {
	Timeline pg.Timeline // of the last checkpoint, see Facts
	LSN      pg.LSN      // written; of a standby, replayed
	// LastCommit is a moment, UTC, after which nothing was committed: when the
	// last commit was, where the server keeps that (track_commit_timestamp) or
	// replays; else when it was asked.
	LastCommit time.Time
}

// Position asks the cluster how far it has come.
func (c Cluster) Position(ctx context.Context) (p Position, err error) {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return p, err
	}
	defer hangUp(conn)
	var lsn string
	err = conn.QueryRow(ctx, `
		SELECT c.timeline_id, CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END::text,
		       coalesce(CASE WHEN pg_is_in_recovery() THEN pg_last_xact_replay_timestamp()
		                     WHEN current_setting('track_commit_timestamp') = 'on' THEN (SELECT timestamp FROM pg_last_committed_xact()) END, clock_timestamp())
		  FROM pg_control_checkpoint() c`).Scan(&p.Timeline, &lsn, &p.LastCommit)
	if err != nil {
		return Position{}, queryError("ask how far the cluster is", err)
	}
	p.LastCommit = p.LastCommit.UTC()
	p.LSN, err = pg.ParseLSN(lsn)
	return p, err
}
