package main

import (
	"context"
	"crypto/sha256"
	"database/sql"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"syscall"

	"go.temporal.io/server/common/headers"
	"go.temporal.io/server/common/persistence/sql/sqlplugin"
	_ "go.temporal.io/server/common/persistence/sql/sqlplugin/sqlite" // the driver "sqlite"
	sqliteschema "go.temporal.io/server/schema/sqlite"
)

// A lock keeps a second server away from a database. Two would both own the
// one shard, and each undo what the other wrote.
type lock struct{ f *os.File }

// lockDB takes the lock of a database file and makes the directory. The lock is
// another file: closing any descriptor of the database itself would drop the
// locks that SQLite holds on it in this process.
func lockDB(file string) (lock, error) {
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return lock{}, err
	}
	f, err := os.OpenFile(file+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return lock{}, err
	}
	err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = advise(errors.New("another pgkeep-server uses it"), "stop that one, or give this one a file of its own with --db")
	}
	if err != nil {
		f.Close()
		return lock{}, fmt.Errorf("lock %s: %w", file, err)
	}
	return lock{f}, nil
}

func (l lock) release() error { return l.f.Close() }

// prepare makes sure that file is a database which this program may use: it
// makes a new one, accepts one of the same schema, and refuses all others.
// Temporal has no migrations for SQLite and does not look; a server on tables
// of another version fails much later, and worse.
func prepare(ctx context.Context, file string) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	err = errors.Join(f.Chmod(0o600), f.Close())
	if err != nil {
		return err
	}
	db, err := sql.Open("sqlite", dsn(file))
	if err != nil {
		return fmt.Errorf("open %s: %w", file, err)
	}
	defer db.Close()

	var tables, stamped int
	const count = `SELECT count(*), count(*) FILTER (WHERE name = 'pgkeep_server') FROM sqlite_master`
	if err := db.QueryRowContext(ctx, count).Scan(&tables, &stamped); err != nil {
		return fmt.Errorf("read %s: %w", file, err)
	}
	switch {
	case tables == 0:
		return install(ctx, db)
	case stamped == 0:
		return advise(fmt.Errorf("%s: not a database of pgkeep-server", file), "name another file with --db; this one was not changed")
	}
	return accept(ctx, db, file)
}

// install makes all tables and the stamp in one transaction: a database that
// has tables has all of them.
func install(ctx context.Context, db *sql.DB) error {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer tx.Rollback()
	if err := sqliteschema.SetupSchemaOnDB(schemaTx{tx: tx}); err != nil {
		return err
	}
	id, err := schemaID(ctx, tx)
	if err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `CREATE TABLE pgkeep_server (schema TEXT NOT NULL, server TEXT NOT NULL)`); err != nil {
		return err
	}
	if _, err := tx.ExecContext(ctx, `INSERT INTO pgkeep_server VALUES (?, ?)`, id, headers.ServerVersion); err != nil {
		return err
	}
	return tx.Commit()
}

// accept refuses the stamped database db if its schema is not the one that
// this program would make.
func accept(ctx context.Context, db *sql.DB, file string) error {
	var schema, server string
	if err := db.QueryRowContext(ctx, `SELECT schema, server FROM pgkeep_server`).Scan(&schema, &server); err != nil {
		return fmt.Errorf("read the stamp of %s: %w", file, err)
	}
	want, err := ownSchemaID(ctx)
	if err != nil {
		return err
	}
	if schema != want {
		return advise(
			fmt.Errorf("%s has schema %s, made by Temporal %s; this is Temporal %s, with schema %s", file, schema, server, headers.ServerVersion, want),
			"Temporal cannot convert an SQLite database: move the file aside, start anew, and let pgkeep apply its schedules again; the backups are in the bucket")
	}
	return nil
}

// ownSchemaID is the schemaID of a database that this program makes.
func ownSchemaID(ctx context.Context) (string, error) {
	db, err := sql.Open("sqlite", ":memory:")
	if err != nil {
		return "", err
	}
	defer db.Close()
	tx, err := db.BeginTx(ctx, nil) // a transaction stays on one connection, as such a database must
	if err != nil {
		return "", err
	}
	defer tx.Rollback()
	if err := sqliteschema.SetupSchemaOnDB(schemaTx{tx: tx}); err != nil {
		return "", err
	}
	return schemaID(ctx, tx)
}

// schemaID names the tables in tx: Temporal's version of them and a hash of
// their definitions, because the visibility tables once changed under the same
// version.
func schemaID(ctx context.Context, tx *sql.Tx) (string, error) {
	rows, err := tx.QueryContext(ctx, `SELECT type, name, coalesce(sql, '') FROM sqlite_master ORDER BY type, name`)
	if err != nil {
		return "", err
	}
	defer rows.Close()
	h := sha256.New()
	for rows.Next() {
		var kind, name, def string
		if err := rows.Scan(&kind, &name, &def); err != nil {
			return "", err
		}
		fmt.Fprintf(h, "%q %q %q\n", kind, name, def)
	}
	return fmt.Sprintf("%s-%x", sqliteschema.Version, h.Sum(nil)[:4]), rows.Err()
}

// schemaTx is as much of an AdminDB as SetupSchemaOnDB uses.
type schemaTx struct {
	sqlplugin.AdminDB
	tx *sql.Tx
}

func (s schemaTx) Exec(stmt string, args ...any) error {
	_, err := s.tx.Exec(stmt, args...)
	return err
}

// checkpoint moves all of the write-ahead log into the database, so that the
// file alone is complete and a plain copy of it is a backup.
func checkpoint(ctx context.Context, file string) error {
	db, err := sql.Open("sqlite", dsn(file))
	if err != nil {
		return err
	}
	defer db.Close()
	if _, err := db.ExecContext(ctx, `PRAGMA wal_checkpoint(TRUNCATE)`); err != nil {
		return fmt.Errorf("checkpoint %s: %w", file, err)
	}
	return nil
}

func dsn(file string) string { return "file:" + escape(file) + "?_pragma=busy_timeout(10000)" }

// escape makes a path fit for an SQLite URI, where "?", "#" and "%" have a meaning.
func escape(file string) string { return (&url.URL{Path: file}).EscapedPath() }
