package cluster

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// An LSNBracket places a snapshot in the write-ahead log.
//
// Exact: Before and After are one position P, the consistent point of a logical
// slot made with the snapshot. A transaction is in the snapshot if its commit
// record begins before P, and not in it otherwise: decoding from P yields
// exactly what the snapshot lacks.
//
// Not exact: After was read when the snapshot was taken already, so a
// transaction is in the snapshot only if its commit record begins before After;
// a cluster recovered to After or beyond has all that the snapshot has. Before
// was read when it was not yet taken, so every commit that a client had been
// told of while the log was shorter than Before is in it. A commit that nobody
// had been told of, for example one that waited for a synchronous standby, may
// stand before Before and still be missing.
//
// On a standby both are positions of replay. There the snapshot may show one
// commit that is being replayed at that instant and ends after the position
// replay has reported. After therefore covers what has been received by
// streaming, or is read when replay has moved on or has stood still for a
// second.
type LSNBracket struct {
	Before pg.LSN `json:"before"`
	After  pg.LSN `json:"after"`
	Exact  bool   `json:"exact"`
}

// A Snapshot is one state of a database that several sessions can see, among
// them pg_dump's. It lasts until Close. While it lasts, VACUUM keeps dead rows,
// but the server keeps no WAL for it.
type Snapshot struct {
	ID      string // for pg_dump --snapshot
	Text    string // what pg_current_snapshot says: which transactions it sees
	LSN     LSNBracket
	Inexact error // why LSN is not exact; nil if it is

	conn *pgx.Conn
}

// SnapshotOptions tune OpenSnapshot. The zero value is right.
type SnapshotOptions struct {
	// SlotWait is how long the exact way may take: making a logical slot waits
	// until every transaction running at that time has ended. 0: 30 seconds.
	// Negative: it is not tried.
	SlotWait time.Duration
}

// OpenSnapshot takes a snapshot of a database. Where wal_level is logical, the
// role may replicate and a slot is free, its position is exact; else it is a
// bracket, and Inexact says why.
func (c Cluster) OpenSnapshot(ctx context.Context, database string, opt SnapshotOptions) (*Snapshot, error) {
	if opt.SlotWait == 0 {
		opt.SlotWait = 30 * time.Second
	}
	conn, err := c.Connect(ctx, database)
	if err != nil {
		return nil, err
	}
	s := &Snapshot{conn: conn}
	s.Inexact = mayDecode(ctx, conn)
	if s.Inexact == nil && opt.SlotWait < 0 {
		s.Inexact = errors.New("not asked for")
	}
	if s.Inexact == nil {
		s.Inexact = c.exact(ctx, database, opt.SlotWait, s)
	}
	if s.Inexact != nil && ctx.Err() == nil {
		err = s.bracket(ctx)
	}
	if err = errors.Join(err, ctx.Err()); err != nil {
		s.Close()
		return nil, queryError(fmt.Sprintf("take a snapshot of database %q", database), err)
	}
	return s, nil
}

// Close lets the snapshot go. What reads it already may go on.
func (s *Snapshot) Close() { hangUp(s.conn) }

// mayDecode says why a logical slot cannot be made; nil: it can be tried.
func mayDecode(ctx context.Context, conn *pgx.Conn) error {
	var level string
	var recovering, may bool
	err := conn.QueryRow(ctx, `SELECT current_setting('wal_level'), pg_is_in_recovery(), rolsuper OR rolreplication
		FROM pg_roles WHERE rolname = current_user`).Scan(&level, &recovering, &may)
	switch {
	case err != nil:
		return err
	case level != "logical":
		return fmt.Errorf("wal_level is %s, not logical", level)
	case recovering:
		return errors.New("the server is a standby")
	case !may:
		return errors.New("the role may not replicate")
	}
	return nil
}

// exact makes a temporary logical slot, which comes with a snapshot of the
// moment of its consistent point, and takes that snapshot over into s, so that
// the slot can go at once: it would keep WAL for as long as the dump takes.
func (c Cluster) exact(parent context.Context, database string, wait time.Duration, s *Snapshot) error {
	ctx, cancel := context.WithTimeout(parent, wait)
	defer cancel()
	cfg, err := c.config(database)
	if err != nil {
		return err
	}
	cfg.RuntimeParams["replication"] = "database"
	slot, err := pgconn.ConnectConfig(ctx, &cfg.Config)
	if err != nil {
		return fmt.Errorf("replication connection: %w", connectError(ctx, database, err))
	}
	defer func() {
		hangUp(slot)
		<-slot.CleanupDone()
	}()
	export := "EXPORT_SNAPSHOT"
	if server(s.conn).Major() >= 15 {
		export = "(SNAPSHOT 'export')"
	}
	name := "pgkeep_" + strings.ToLower(rand.Text()[:12])
	results, err := slot.Exec(ctx, "CREATE_REPLICATION_SLOT "+name+" TEMPORARY LOGICAL pgoutput "+export).ReadAll()
	if ctx.Err() != nil {
		return fmt.Errorf("no consistent point within %v: some transaction has run for longer", wait)
	}
	if err != nil {
		return fmt.Errorf("make a temporary slot: %w", err)
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) < 3 {
		return errors.New("make a temporary slot: the server's answer has an unknown form")
	}
	// slot_name, consistent_point, snapshot_name, output_plugin
	row := results[0].Rows[0]
	point, err := pg.ParseLSN(string(row[1]))
	if err != nil {
		return fmt.Errorf("make a temporary slot: %w", err)
	}
	// The session of s goes on also when there is no time left for this.
	if err := s.begin(parent, string(row[2]), func(seen pg.Snapshot) error { return c.settled(ctx, database, seen) }); err != nil {
		return fmt.Errorf("take over the slot's snapshot: %w", err)
	}
	s.LSN = LSNBracket{Before: point, After: point, Exact: true}
	return nil
}

// settled waits until every transaction that has ended for the snapshot of a
// session has ended for the server too, and so is marked as committed or not.
//
// The snapshot of a logical slot is made from the log: a transaction has ended
// as soon as its commit record is there. The server marks it as committed a
// moment later. A session that reads one of its rows in that moment finds it
// ended and not committed, takes it for aborted, and writes so into the row's
// header: the row is lost, in the cluster, for everybody. Ordinary snapshots
// cannot do that, and this one cannot when it waits.
func (c Cluster) settled(ctx context.Context, database string, seen pg.Snapshot) error {
	conn, err := c.Connect(ctx, database)
	if err != nil {
		return err
	}
	defer hangUp(conn)
	for {
		now, err := readView(ctx, conn)
		if err != nil {
			return err
		}
		if !aheadOf(seen, now) {
			return nil
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// readView reads no table, and so harms none.
func readView(ctx context.Context, conn *pgx.Conn) (pg.Snapshot, error) {
	var text string
	if err := conn.QueryRow(ctx, "SELECT pg_current_snapshot()::text").Scan(&text); err != nil {
		return pg.Snapshot{}, err
	}
	return pg.ParseSnapshot(text)
}

// aheadOf reports whether a transaction has ended for v that runs for now.
func aheadOf(v, now pg.Snapshot) bool { return slices.ContainsFunc(now.Running, v.Ended) }

// begin opens the transaction that holds the snapshot, a new one or that of
// another session, and exports it when it is ready to be read.
func (s *Snapshot) begin(ctx context.Context, imported string, ready func(pg.Snapshot) error) (err error) {
	defer func() {
		if err != nil {
			_, failed := s.conn.Exec(context.WithoutCancel(ctx), "ROLLBACK")
			err = errors.Join(err, failed)
		}
	}()
	if _, err := s.conn.Exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"); err != nil {
		return err
	}
	if imported != "" {
		_, err := s.conn.Exec(ctx, "SET TRANSACTION SNAPSHOT '"+strings.ReplaceAll(imported, "'", "''")+"'")
		if err != nil {
			return err
		}
		seen, err := readView(ctx, s.conn)
		if err != nil {
			return err
		}
		if err := ready(seen); err != nil {
			return err
		}
	}
	return s.conn.QueryRow(ctx, "SELECT pg_export_snapshot(), pg_current_snapshot()::text").Scan(&s.ID, &s.Text)
}

func (s *Snapshot) bracket(ctx context.Context) (err error) {
	if s.LSN.Before, _, err = position(ctx, s.conn); err != nil {
		return err
	}
	if err := s.begin(ctx, "", nil); err != nil {
		return err
	}
	var recovering bool
	if s.LSN.After, recovering, err = position(ctx, s.conn); err != nil || !recovering {
		return err
	}
	// Wait until replay has finished the record at hand: see LSNBracket.
	seen := s.LSN.After
	for range 20 {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(50 * time.Millisecond):
		}
		if s.LSN.After, _, err = position(ctx, s.conn); err != nil || s.LSN.After > seen {
			return err
		}
	}
	return nil
}

// position is how far the log of the server reaches: where the next record goes
// or, in recovery, what has been replayed or received for it.
func position(ctx context.Context, conn *pgx.Conn) (at pg.LSN, recovering bool, err error) {
	var text string
	err = conn.QueryRow(ctx, `SELECT CASE WHEN pg_is_in_recovery()
		THEN greatest(pg_last_wal_replay_lsn(), pg_last_wal_receive_lsn())
		ELSE pg_current_wal_insert_lsn() END::text, pg_is_in_recovery()`).Scan(&text, &recovering)
	if err != nil {
		return 0, false, err
	}
	at, err = pg.ParseLSN(text)
	return at, recovering, err
}
