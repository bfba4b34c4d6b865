package cluster

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// CheckRights reports whether the role can dump every row of the databases: it
// can connect to each, read every table past row-level security, and read every
// large object. A missing right is fail.PGDenied, and its hint is the SQL that
// grants it. With rolePasswords it may read those too.
func (c Cluster) CheckRights(ctx context.Context, databases []string, rolePasswords bool) error {
	if err := c.checkRole(ctx, rolePasswords); err != nil {
		return err
	}
	for _, name := range databases {
		if err := c.checkDatabase(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

// hintAs introduces statements that the backup role may not run itself.
const hintAs = "as a superuser: "

func (c Cluster) checkRole(ctx context.Context, rolePasswords bool) error {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return err
	}
	defer hangUp(conn)
	var role string
	var super, bypass, reader, passwords bool
	err = conn.QueryRow(ctx, `
		SELECT r.rolname::text, r.rolsuper, r.rolbypassrls,
		       coalesce((SELECT pg_has_role(p.oid, 'USAGE') FROM pg_roles p WHERE p.rolname = 'pg_read_all_data'), false),
		       has_table_privilege('pg_authid', 'SELECT')
		  FROM pg_roles r WHERE r.rolname = current_user`).Scan(&role, &super, &bypass, &reader, &passwords)
	if err != nil {
		return queryError("check rights", err)
	}
	if super {
		return nil
	}
	name := pgx.Identifier{role}.Sanitize()
	if server(conn).Major() < 14 {
		return denied(fmt.Sprintf("role %q is not a superuser, and before PostgreSQL 14 nothing less reads every table", role),
			"ALTER ROLE "+name+" SUPERUSER;")
	}
	var lacks, sql []string
	if !reader {
		lacks = append(lacks, "pg_read_all_data")
		sql = append(sql, "GRANT pg_read_all_data TO "+name+";")
	}
	if !bypass {
		lacks = append(lacks, "BYPASSRLS")
		sql = append(sql, "ALTER ROLE "+name+" BYPASSRLS;")
	}
	if rolePasswords && !passwords && reader {
		lacks = append(lacks, "SELECT on pg_authid")
		sql = append(sql, "GRANT SELECT ON pg_catalog.pg_authid TO "+name+";")
	}
	if len(lacks) == 0 {
		return nil
	}
	return denied(fmt.Sprintf("role %q lacks %s", role, strings.Join(lacks, " and ")), strings.Join(sql, " "))
}

func (c Cluster) checkDatabase(ctx context.Context, database string) error {
	conn, err := c.Connect(ctx, database)
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok && pgErr.Code == "42501" {
		cfg, _ := c.config(database)
		return denied(fmt.Sprintf("role %q may not connect to database %q", cfg.User, database),
			fmt.Sprintf("GRANT CONNECT ON DATABASE %s TO %s;", pgx.Identifier{database}.Sanitize(), pgx.Identifier{cfg.User}.Sanitize()))
	}
	if err != nil {
		return err
	}
	defer hangUp(conn)
	// Large objects are not tables: pg_read_all_data does not open them, their
	// own lists do. Before PostgreSQL 18 no function reads those for us.
	readable := `pg_has_role(o.lomowner, 'USAGE') OR EXISTS (SELECT FROM aclexplode(o.lomacl) a
		WHERE a.privilege_type = 'SELECT' AND CASE a.grantee WHEN 0 THEN true ELSE pg_has_role(a.grantee, 'USAGE') END)`
	if server(conn).Major() >= 18 {
		readable = "has_largeobject_privilege(o.oid, 'SELECT')"
	}
	var role string
	var hidden int
	err = conn.QueryRow(ctx, `SELECT current_user::text, count(*) FROM pg_largeobject_metadata o
		WHERE NOT (current_setting('lo_compat_privileges')::bool OR `+readable+`)`).Scan(&role, &hidden)
	if err != nil {
		return queryError(fmt.Sprintf("check rights in database %q", database), err)
	}
	if hidden > 0 {
		return denied(fmt.Sprintf("role %q may not read %d large objects of database %q", role, hidden, database),
			"ALTER ROLE "+pgx.Identifier{role}.Sanitize()+" SET lo_compat_privileges = on;")
	}
	return nil
}

func denied(what, sql string) error {
	return fail.Hint(fmt.Errorf("check rights: %s: %w", what, fail.PGDenied), hintAs+sql)
}
