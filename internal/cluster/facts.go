package cluster

import (
	"context"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// Facts are what a cluster says about itself. They hold at the moment they were
// asked; only the system identifier holds for life.
type Facts struct {
	System     pg.SystemID
	Timeline   pg.Timeline // of the last checkpoint: on a server just promoted, still the old one
	Version    pg.Version
	InRecovery bool   // a standby, or a server that replays its archive
	WALLevel   string // minimal, replica or logical

	ArchiveMode       string // off, on or always
	ArchiveCommandSet bool   // there is an archive_command, or a library in its place
	SegmentSize       pg.SegmentSize
	DataChecksums     bool
	DataDirectory     string // "" if the role may not see it: that takes pg_read_all_settings

	Databases []Database // by name; also those that take no connections
}

// Archiving reports whether this server hands its WAL to an archiver. With
// archive_mode=on, a standby does not.
func (f Facts) Archiving() bool {
	if f.InRecovery && f.ArchiveMode != "always" {
		return false
	}
	return f.ArchiveMode != "off" && f.ArchiveCommandSet
}

// A Database is one row of pg_database. As JSON it stands in backups.
type Database struct {
	Name  string `json:"name"`
	OID   uint32 `json:"oid"`
	Bytes int64  `json:"bytes"` // on disk; -1 if the role may not ask

	Owner      string         `json:"owner"`
	Encoding   string         `json:"encoding"`
	Provider   LocaleProvider `json:"provider"`
	Collate    string         `json:"collate"`
	CType      string         `json:"ctype"`
	Locale     string         `json:"locale,omitempty"` // of the provider, if that is not libc
	ICURules   string         `json:"icu_rules,omitempty"`
	Tablespace string         `json:"tablespace"`

	AllowConn  bool `json:"allow_conn"`
	IsTemplate bool `json:"is_template"`
	ConnLimit  int  `json:"conn_limit"` // -1: none; -2: a DROP DATABASE was interrupted, and nobody can connect
}

// Dumpable reports whether a logical backup of the whole cluster covers the
// database: it takes connections, and is not a template.
func (d Database) Dumpable() bool { return d.AllowConn && !d.IsTemplate && d.ConnLimit != -2 }

// A LocaleProvider is where a database's collations come from, as pg_database
// writes it.
type LocaleProvider string

const (
	Libc    LocaleProvider = "c"
	ICU     LocaleProvider = "i" // since PostgreSQL 15
	Builtin LocaleProvider = "b" // since PostgreSQL 17
)

// Facts asks the cluster about itself.
func (c Cluster) Facts(ctx context.Context) (Facts, error) {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return Facts{}, err
	}
	defer hangUp(conn)
	f, err := readFacts(ctx, conn)
	if err != nil {
		return Facts{}, queryError("ask the cluster about itself", err)
	}
	if f.Databases, err = readDatabases(ctx, conn, f.Version); err != nil {
		return Facts{}, queryError("list databases", err)
	}
	return f, nil
}

func readFacts(ctx context.Context, conn *pgx.Conn) (Facts, error) {
	var f Facts
	var system int64 // the server has no unsigned numbers
	var checksums int
	err := conn.QueryRow(ctx, `
		SELECT s.system_identifier, c.timeline_id, i.data_page_checksum_version,
		       current_setting('server_version_num')::int, pg_is_in_recovery(),
		       current_setting('wal_level'), current_setting('archive_mode'),
		       current_setting('archive_mode') <> 'off'
		           AND (current_setting('archive_command') <> '' OR coalesce(current_setting('archive_library', true), '') <> ''),
		       (SELECT setting::bigint FROM pg_settings WHERE name = 'wal_segment_size'),
		       coalesce((SELECT setting FROM pg_settings WHERE name = 'data_directory'), '')
		  FROM pg_control_system() s, pg_control_checkpoint() c, pg_control_init() i`).
		Scan(&system, &f.Timeline, &checksums, &f.Version, &f.InRecovery, &f.WALLevel, &f.ArchiveMode,
			&f.ArchiveCommandSet, &f.SegmentSize, &f.DataDirectory)
	f.System, f.DataChecksums = pg.SystemID(system), checksums > 0
	return f, err
}

func readDatabases(ctx context.Context, conn *pgx.Conn, v pg.Version) ([]Database, error) {
	provider, locale, rules := "'c'", "NULL", "NULL"
	if v.Major() >= 15 {
		provider, locale = "d.datlocprovider::text", "d.daticulocale"
	}
	if v.Major() >= 16 {
		rules = "d.daticurules"
	}
	if v.Major() >= 17 {
		locale = "d.datlocale"
	}
	mayReadStats := "pg_has_role('pg_read_all_stats', 'USAGE')"
	rows, err := conn.Query(ctx, fmt.Sprintf(`
		SELECT d.datname::text, d.oid,
		       coalesce(CASE WHEN %s OR has_database_privilege(d.oid, 'CONNECT') THEN pg_database_size(d.oid) END, -1),
		       coalesce(a.rolname::text, ''), pg_encoding_to_char(d.encoding)::text, %s,
		       coalesce(d.datcollate::text, ''), coalesce(d.datctype::text, ''), coalesce(%s, ''), coalesce(%s, ''),
		       coalesce(t.spcname::text, ''), d.datallowconn, d.datistemplate, d.datconnlimit
		  FROM pg_database d LEFT JOIN pg_roles a ON a.oid = d.datdba LEFT JOIN pg_tablespace t ON t.oid = d.dattablespace
		 ORDER BY d.datname::text COLLATE "C"`, mayReadStats, provider, locale, rules))
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[Database])
}

// server asks a session for its server's version; pgx was told it at connect.
func server(conn *pgx.Conn) pg.Version {
	// "15.18 (Debian 15.18-0+deb12u1)"
	number, _, _ := strings.Cut(conn.PgConn().ParameterStatus("server_version"), " ")
	v, _ := parseVersion(number)
	return v
}
