package cluster

import (
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// Duties are what a role takes. Archiving is none of them: archive_command runs
// as the server, and opens no session.
type Duties struct {
	Physical bool // and audits of the archive
	Logical  bool
}

// RoleSQL returns the statements that make a role with the rights that its
// duties take, and no others; a role that is there is given them. A superuser
// runs them in the database that pgkeep connects to, for rights on functions are
// of one database. They suit PostgreSQL 14 and newer, and may be run again.
//
// With physical duties alone the role reads no table of a user: the files are
// read by the worker, whose OS user may.
func RoleSQL(role string, d Duties) string {
	name, text := pgx.Identifier{role}.Sanitize(), "'"+strings.ReplaceAll(role, "'", "''")+"'"
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("BEGIN;")
	line("DO $pgkeep$ BEGIN")
	line("  IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = %s) THEN", text)
	line("    CREATE ROLE %s LOGIN;", name)
	line("  END IF;")
	line("END $pgkeep$;")
	line("-- where the files are, how large the databases, how far standbys")
	line("GRANT pg_read_all_settings, pg_read_all_stats TO %s;", name)
	if d.Physical {
		line("-- physical backups: to start and stop one; PostgreSQL 15 renamed the functions")
		line("DO $pgkeep$ BEGIN")
		line("  IF current_setting('server_version_num')::int >= 150000 THEN")
		line("    GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO %s;", name)
		line("  ELSE")
		line("    GRANT EXECUTE ON FUNCTION pg_start_backup(text, boolean, boolean), pg_stop_backup(boolean, boolean) TO %s;", name)
		line("  END IF;")
		line("END $pgkeep$;")
		line("-- configuration files that others include are in the backup too")
		line("GRANT SELECT ON pg_catalog.pg_file_settings TO %s;", name)
		line("GRANT EXECUTE ON FUNCTION pg_show_all_file_settings() TO %s;", name)
		line("-- audits of the archive: what waits to be archived")
		line("GRANT EXECUTE ON FUNCTION pg_ls_archive_statusdir() TO %s;", name)
	}
	if d.Logical {
		line("-- logical backups: every row, past row-level security, and every large object;")
		line("-- that is also the hashes of passwords in pg_authid, which are not dumped unless the configuration says so")
		line("GRANT pg_read_all_data TO %s;", name)
		line("ALTER ROLE %s BYPASSRLS;", name)
		line("ALTER ROLE %s SET lo_compat_privileges = on;", name)
	}
	line("COMMIT;")
	return b.String()
}

// Login returns the role and the database that pgkeep connects with and to.
func (c Cluster) Login() (role, database string, err error) {
	cfg, err := c.config("")
	if err != nil {
		return "", "", err
	}
	return cfg.User, cfg.Database, nil
}
