package cluster

import "context"

// StandbyLag returns how many bytes of WAL the streaming standby that is most
// behind has not replayed yet; 0 where there is none.
func (c Cluster) StandbyLag(ctx context.Context) (bytes int64, err error) {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return 0, err
	}
	defer hangUp(conn)
	err = conn.QueryRow(ctx, `
		SELECT coalesce(max(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_receive_lsn() ELSE pg_current_wal_lsn() END, replay_lsn)), 0)::bigint
		  FROM pg_stat_replication WHERE state = 'streaming'`).Scan(&bytes)
	return max(bytes, 0), queryError("ask how far standbys are behind", err)
}
