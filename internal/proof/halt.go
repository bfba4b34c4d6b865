package proof

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// halt brings the files to each place at which rows were counted at the source,
// opens them there to be read, and counts. That it cannot be done says nothing
// about the backup: then the check is skipped, with the reason, and what goes
// before the end will show at the end. The error is that of ctx.
func (t Test) halt(ctx context.Context, r *Report, recovery sandbox.Recovery) (done sandbox.Recovered, c Check, err error) {
	c = Check{Name: CheckRows, Verdict: Passed}
	if !t.wants(CheckRows) {
		return done, Check{Name: CheckRows, Verdict: Skipped, Message: "it was not asked for"}, nil
	}
	unknown := t.Unknown
	for _, h := range t.Halts {
		there := recovery
		there.Target = sandbox.Target{LSN: h.At, Exclusive: true}
		one, err := t.Sandbox.Halt(ctx, there)
		done = one.After(done)
		if ctx.Err() != nil {
			return done, c, ctx.Err()
		}
		if err != nil { // going on from here, Recover finds the same, and says it
			unknown = "recovery did not halt where rows were counted"
			break
		}
		begun := time.Now()
		t.tell("counting rows")
		err = t.Sandbox.Peek(ctx, there)
		if err == nil {
			for _, counted := range h.Counted {
				if why := t.compare(ctx, &c, counted); why != "" {
					unknown = why
				}
			}
		} else {
			unknown = "the cluster could not be read where rows were counted"
		}
		if cerr := t.Sandbox.Close(ctx); cerr != nil && err == nil {
			unknown = "the cluster did not stop where rows were counted"
		}
		if ctx.Err() != nil {
			return done, c, ctx.Err()
		}
		c.Seconds += time.Since(begun).Seconds()
	}
	switch {
	case c.Verdict == Failed:
		c.Message = fmt.Sprintf("tables do not have the rows that were counted at the source (%d of %d)", c.Failed, c.Items)
	case c.Items == 0:
		c.Verdict, c.Message = Skipped, unknown
	case unknown != "":
		c.Message = unknown
	}
	return done, c, nil
}

// compare counts the rows of one database's tables. why says what kept it from
// an answer for some of them; the checks that come later will tell more.
func (t Test) compare(ctx context.Context, c *Check, counted cluster.Counted) (why string) {
	seen, err := pg.ParseSnapshot(counted.Snapshot)
	if err != nil {
		return "the snapshot in which rows were counted has no form that is known"
	}
	conn, err := t.Sandbox.ConnectAs(ctx, counted.Database, counted.Role, map[string]string{"search_path": "pg_catalog", "row_security": "off"})
	if err != nil {
		return "the role that counted rows may not connect any more"
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if early, err := committed(ctx, conn, seen); err != nil || early {
		return "a transaction was being committed when rows were counted, for longer than the log tells"
	}
	for _, want := range counted.Tables {
		var got int64
		err := conn.QueryRow(ctx, "SELECT count(*) FROM ONLY "+pgx.Identifier{want.Schema, want.Table}.Sanitize(), pgx.QueryExecModeExec).Scan(&got)
		pgErr, _ := errors.AsType[*pgconn.PgError](err)
		switch {
		case pgErr != nil && pgErr.Code == "42P01": // undefined_table
			c.find("%s: %s is not there, and should have %d rows", counted.Database, want, want.Rows)
		case err != nil:
			why = "a table could not be read where its rows were counted"
			if conn.IsClosed() {
				return why
			}
			continue
		case got != want.Rows:
			c.find("%s: %s has %d rows, and should have %d", counted.Database, want, got, want.Rows)
		}
		c.Items++
	}
	return why
}

// committed reports whether a transaction has committed that was still running
// for a snapshot: its record was in the log before the backup began, though others
// did not see it for all that time.
func committed(ctx context.Context, conn *pgx.Conn, seen pg.Snapshot) (yes bool, err error) {
	var running []string
	for _, xid := range seen.Running {
		running = append(running, fmt.Sprint(xid))
	}
	// A transaction that has left no trace in the log yet has no status here.
	err = conn.QueryRow(ctx, `
		SELECT coalesce(bool_or(CASE WHEN x::xid8 < pg_snapshot_xmax(pg_current_snapshot()) THEN pg_xact_status(x::xid8) = 'committed' END), false)
		  FROM unnest($1::text[]) x`, pgx.QueryExecModeExec, running).Scan(&yes)
	return yes, err
}
