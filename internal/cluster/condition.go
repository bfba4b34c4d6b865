package cluster

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// A Condition is how a cluster is doing, as far as backups are concerned.
type Condition struct {
	Facts
	Now         time.Time // by the server's clock
	Archiver    Archiver
	ArchiverErr error // why nothing is known of it; a role for logical backups may not ask
	// ArchiveBy is the program that archives: the first word of archive_command,
	// without its directory, or the name of a library. "": none is set.
	ArchiveBy string
	Ours      bool // archive_command runs pgkeep-wal

	MaxWALSize int64 // bytes
	// Checkpoints since the statistics were reset: those that were due, and those
	// that were asked for, by somebody or by a log that grew to MaxWALSize.
	Timed, Requested int64

	Transactions []Transaction // open ones that are older than a minute, oldest first
	Slots        []Slot        // replication slots, by name
}

// A Transaction is open.
type Transaction struct {
	PID      int    // 0: it is prepared, and no session's
	Name     string // of a prepared one
	Database string
	User     string
	Idle     time.Duration // since its last statement ended; 0: it works, or is prepared
	Age      time.Duration
}

// A Slot is a replication slot.
type Slot struct {
	Name   string
	Active bool
	Holds  int64  // bytes of log that are kept for it
	State  string // pg_replication_slots.wal_status; "lost": it is of no use any more
}

// Condition asks the cluster how it is doing. Transactions younger than young
// are not listed; 0 is a minute.
func (c Cluster) Condition(ctx context.Context, young time.Duration) (Condition, error) {
	if young == 0 {
		young = time.Minute
	}
	f, err := c.Facts(ctx)
	if err != nil {
		return Condition{}, err
	}
	d := Condition{Facts: f}
	if d.Archiver, d.ArchiverErr = c.Archiver(ctx); d.ArchiverErr != nil && !errors.Is(d.ArchiverErr, fail.PGDenied) {
		return d, d.ArchiverErr
	}
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return d, err
	}
	defer hangUp(conn)
	if err = d.read(ctx, conn, young); err != nil {
		if err = queryError("ask how the cluster is doing", err); errors.Is(err, fail.PGDenied) {
			err = fail.Hint(err, "grant the roles pg_read_all_settings and pg_read_all_stats to that of the conninfo")
		}
	}
	return d, err
}

func (d *Condition) read(ctx context.Context, conn *pgx.Conn, young time.Duration) error {
	var command, library string
	err := conn.QueryRow(ctx, `
		SELECT clock_timestamp(), current_setting('archive_command'), coalesce(current_setting('archive_library', true), ''),
		       pg_size_bytes(current_setting('max_wal_size'))`).Scan(&d.Now, &command, &library, &d.MaxWALSize)
	if err != nil {
		return err
	}
	d.Ours = library == "" && strings.Contains(command, "pgkeep-wal")
	// The rest of a command may hold what is nobody's business.
	program, _, _ := strings.Cut(strings.TrimSpace(command), " ")
	if d.ArchiveBy = library; library == "" && program != "" && program != "(disabled)" {
		d.ArchiveBy = filepath.Base(program)
	}

	// PostgreSQL 17 moved the counters.
	checkpoints := "checkpoints_timed, checkpoints_req FROM pg_stat_bgwriter"
	if d.Version.Major() >= 17 {
		checkpoints = "num_timed, num_requested FROM pg_stat_checkpointer"
	}
	if err := conn.QueryRow(ctx, "SELECT "+checkpoints).Scan(&d.Timed, &d.Requested); err != nil {
		return err
	}

	rows, err := conn.Query(ctx, `
		SELECT pid, '', coalesce(datname::text, ''), coalesce(usename::text, ''),
		       CASE WHEN state LIKE 'idle in transaction%' THEN extract(epoch FROM clock_timestamp() - state_change) ELSE 0 END::float8,
		       extract(epoch FROM clock_timestamp() - xact_start)::float8
		  FROM pg_stat_activity
		 WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND xact_start < clock_timestamp() - make_interval(secs => $1)
		   AND application_name <> $2
		UNION ALL
		SELECT 0, gid, database::text, owner::text, 0, extract(epoch FROM clock_timestamp() - prepared)::float8
		  FROM pg_prepared_xacts WHERE prepared < clock_timestamp() - make_interval(secs => $1)
		 ORDER BY 6 DESC`, young.Seconds(), applicationName)
	if err != nil {
		return err
	}
	d.Transactions, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (t Transaction, err error) {
		var idle, age float64
		err = row.Scan(&t.PID, &t.Name, &t.Database, &t.User, &idle, &age)
		t.Idle, t.Age = time.Duration(idle*float64(time.Second)), time.Duration(age*float64(time.Second))
		return t, err
	})
	if err != nil {
		return fmt.Errorf("transactions: %w", err)
	}

	rows, err = conn.Query(ctx, `
		SELECT slot_name::text, active,
		       coalesce(pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END, restart_lsn), 0)::bigint,
		       coalesce(wal_status, '')
		  FROM pg_replication_slots ORDER BY slot_name`)
	if err != nil {
		return err
	}
	if d.Slots, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Slot]); err != nil {
		return fmt.Errorf("replication slots: %w", err)
	}
	return nil
}
