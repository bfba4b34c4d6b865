package lab

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// A TableSum tells whether two tables hold the same rows, in whatever order.
type TableSum struct {
	Rows int64  // of a sequence: its last value
	Sum  string // a sum over a 64-bit hash of every row's text
}

// Fingerprint describes the content of the database that conninfo names: one
// entry per table and materialized view, one per sequence, and one for all large
// objects together if there are any. Equal maps mean equal rows. The session
// needs to be allowed to read everything.
func Fingerprint(ctx context.Context, conninfo string) (map[string]TableSum, error) {
	cfg, err := pgx.ParseConfig(conninfo)
	if err != nil {
		return nil, fmt.Errorf("fingerprint: %w", err)
	}
	// The text of a row depends on these.
	for name, value := range map[string]string{
		"search_path": "pg_catalog", "timezone": "UTC", "datestyle": "ISO", "intervalstyle": "postgres",
		"bytea_output": "hex", "extra_float_digits": "1", "row_security": "off", "statement_timeout": "0",
	} {
		cfg.RuntimeParams[name] = value
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("fingerprint: %w", err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	sums := make(map[string]TableSum)
	err = pgx.BeginTxFunc(ctx, conn, pgx.TxOptions{IsoLevel: pgx.RepeatableRead, AccessMode: pgx.ReadOnly}, func(tx pgx.Tx) error {
		return fingerprint(ctx, tx, sums)
	})
	if err != nil {
		return nil, fmt.Errorf("fingerprint database %q: %w", cfg.Database, err)
	}
	return sums, nil
}

func fingerprint(ctx context.Context, tx pgx.Tx, sums map[string]TableSum) error {
	rows, err := tx.Query(ctx, `
		SELECT format('%I.%I', n.nspname, c.relname), c.relkind::text
		  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		 WHERE c.relkind IN ('r', 'm', 'S') AND c.relpersistence <> 't'
		   AND n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
		 ORDER BY 1`)
	if err != nil {
		return err
	}
	type relation struct{ Name, Kind string }
	relations, err := pgx.CollectRows(rows, pgx.RowToStructByPos[relation])
	if err != nil {
		return err
	}
	for _, r := range relations {
		var sum TableSum
		query := "SELECT count(*), coalesce(sum(hashtextextended(t::text, 0)::numeric), 0)::text FROM ONLY " + r.Name + " t"
		if r.Kind == "S" {
			query = "SELECT last_value, is_called::text FROM " + r.Name
		}
		if err := tx.QueryRow(ctx, query).Scan(&sum.Rows, &sum.Sum); err != nil {
			return fmt.Errorf("%s: %w", r.Name, err)
		}
		sums[r.Name] = sum
	}
	var objects TableSum
	err = tx.QueryRow(ctx, `
		SELECT count(*), coalesce(sum(hashtextextended(oid::text || md5(lo_get(oid)), 0)::numeric), 0)::text
		  FROM pg_largeobject_metadata`).Scan(&objects.Rows, &objects.Sum)
	if err != nil {
		return fmt.Errorf("large objects: %w", err)
	}
	if objects.Rows > 0 {
		sums["large objects"] = objects
	}
	return nil
}
