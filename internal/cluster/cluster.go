// Package cluster is a PostgreSQL cluster as seen from the host that backs it
// up: what it is, what we may do there, and its own programs pg_dump,
// pg_dumpall and pg_restore, run so that none of them outlives us or hangs
// unseen.
package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// A Cluster says how to reach a PostgreSQL cluster. It holds no connection; its
// methods open what they need and close it. It prints itself without the
// password.
type Cluster struct {
	// Conninfo is a libpq connection string, keywords or URI. Its dbname is
	// where questions about the whole cluster are asked; "postgres" if it has
	// none. What it leaves out comes from where libpq takes it: PG* variables,
	// service and password files.
	Conninfo string
	// Password goes before one in Conninfo. Empty: that one, or a password
	// file, or none.
	Password string
	// BinDir holds pg_dump, pg_dumpall and pg_restore. Empty: they are looked
	// for, see Tools.
	BinDir string
}

// String returns the connection string without the password, or says that it
// is not one.
func (c Cluster) String() string {
	info, _, err := parseConninfo(c.Conninfo)
	if err != nil {
		return "[conninfo that does not parse]"
	}
	return info.String()
}

// GoString is String: neither shows the password.
func (c Cluster) GoString() string { return c.String() }

// applicationName is what pg_stat_activity shows of our sessions.
const applicationName = "pgkeep"

// config makes the settings of a session in a database; "" is the one in
// Conninfo.
func (c Cluster) config(database string) (*pgx.ConnConfig, error) {
	info, password, err := parseConninfo(c.Conninfo)
	if err != nil {
		return nil, err
	}
	if database != "" {
		info = info.with("dbname", database)
	}
	cfg, err := pgx.ParseConfig(info.without(libpqOnly).String()) // it has no password that an error could quote
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, fail.BadConfig)
	}
	if cfg.Database == "" {
		cfg.Database = "postgres"
	}
	if password != "" {
		cfg.Password = password
	}
	if c.Password != "" {
		cfg.Password = c.Password
	}
	for name, value := range map[string]string{
		"application_name":                    applicationName,
		"client_encoding":                     "UTF8",
		"search_path":                         "pg_catalog",
		"statement_timeout":                   "0",
		"lock_timeout":                        "0",
		"idle_in_transaction_session_timeout": "0",
	} {
		cfg.RuntimeParams[name] = value
	}
	// A connection that holds a snapshot says nothing for hours.
	cfg.DialFunc = (&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 30 * time.Second, Interval: 10 * time.Second, Count: 6,
	}}).DialContext
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = 30 * time.Second
	}
	return cfg, nil
}

// Connect opens a session in a database, or, if that is "", in the one that
// Conninfo names. The session has no timeouts and sees only pg_catalog by
// unqualified names. It fails with fail.PGDown, fail.PGDenied or
// fail.BadConfig.
func (c Cluster) Connect(ctx context.Context, database string) (*pgx.Conn, error) {
	cfg, err := c.config(database)
	if err != nil {
		return nil, err
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, connectError(ctx, cfg.Database, err)
	}
	// Younger timeouts, which a startup packet cannot name on a server that
	// does not know them.
	_, err = conn.Exec(ctx, `SELECT set_config(name, '0', false) FROM pg_settings
		WHERE name IN ('idle_session_timeout', 'transaction_timeout')`, pgx.QueryExecModeSimpleProtocol)
	if err != nil {
		hangUp(conn)
		return nil, connectError(ctx, cfg.Database, err)
	}
	return conn, nil
}

// hangUp closes a connection, politely if that takes no time. The context of
// the work may be over by then.
func hangUp(conn interface{ Close(context.Context) error }) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	conn.Close(ctx)
}

func connectError(ctx context.Context, database string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("connect to database %q: %w", database, ctx.Err())
	}
	kind := kindOf(err)
	if kind == fail.Unknown {
		kind = fail.PGDown
	}
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		err = pgErr // what the server said, without the attempts over TLS and without
	} else {
		err = errors.New(strings.Join(strings.Fields(err.Error()), " ")) // on one line
	}
	err = fmt.Errorf("connect to database %q: %w: %w", database, err, kind)
	if kind == fail.BadConfig {
		err = fail.Hint(err, "the conninfo of the cluster, or the name of a database, is wrong; pgkeep config show prints the settings in force")
	}
	return err
}

// queryError adds the operation and the kind to an error of a session.
func queryError(op string, err error) error {
	if err == nil {
		return nil
	}
	if kind := kindOf(err); kind != fail.Unknown {
		return fmt.Errorf("%s: %w: %w", op, err, kind)
	}
	return fmt.Errorf("%s: %w", op, err)
}

// kindOf finds what an operator would do about an error of pgx. Codes are those
// of the PostgreSQL documentation, appendix "PostgreSQL Error Codes".
func kindOf(err error) fail.Kind {
	if kind := fail.KindOf(err); kind != fail.Unknown {
		return kind
	}
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch {
		case pgErr.Code == "42501", strings.HasPrefix(pgErr.Code, "28"):
			return fail.PGDenied
		case pgErr.Code == "3D000":
			return fail.BadConfig
		case pgErr.Code == "53100":
			return fail.NoSpace
		case strings.HasPrefix(pgErr.Code, "08"), strings.HasPrefix(pgErr.Code, "57P0"), pgErr.Code == "53300":
			return fail.PGDown
		}
		return fail.Unknown
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return fail.BadConfig
	}
	_, isNet := errors.AsType[net.Error](err)
	if isNet || errors.Is(err, os.ErrNotExist) || errors.Is(err, net.ErrClosed) || pgconn.Timeout(err) {
		return fail.PGDown
	}
	return fail.Unknown
}
