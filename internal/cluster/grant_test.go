package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
)

// On every version the role that the SQL makes does what it is for, and what it
// is not for is refused. The tests of package restore take their physical
// backups of every version with it.
func TestRoleHasTheRightsItNeedsAndNoOthers(t *testing.T) {
	for major := 14; major <= 18; major++ {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			t.Parallel()
			p, c := start(t, lab.PostgresOptions{Version: major, Settings: map[string]string{"archive_mode": "on", "archive_command": "true"}})
			exec(t, p, "postgres", "CREATE TABLE private AS SELECT 'a secret' AS x", "SELECT lo_from_bytea(4711, 'a secret')", "CREATE DATABASE other")
			physicalRole(t, p, as(c, `it\'s "me"`))
			logicalRole(t, p, as(c, "dumper"))
		})
	}
}

func physicalRole(t *testing.T, p *lab.Postgres, c cluster.Cluster) {
	ctx := t.Context()
	sql := cluster.RoleSQL(`it's "me"`, cluster.Duties{Physical: true})
	exec(t, p, "postgres", sql, sql) // it may be run again
	if err := c.CheckBackupRights(ctx); err != nil {
		t.Error(err)
	}
	if _, err := c.Archiver(ctx); err != nil {
		t.Error(err)
	}
	if _, err := c.StandbyLag(ctx); err != nil {
		t.Error(err)
	}
	f, err := c.Facts(ctx)
	if err != nil || f.DataDirectory != p.DataDir {
		t.Errorf("%+v, %v", f, err)
	}
	for _, d := range f.Databases {
		if d.Bytes <= 0 {
			t.Errorf("the size of database %s is not known", d.Name)
		}
	}
	s := startBackup(t, c)
	if _, err := s.Stop(ctx); err != nil {
		t.Error(err)
	}
	for _, query := range []string{
		"TABLE public.private", "SELECT lo_get(4711)", "TABLE pg_authid", "SELECT pg_read_file('PG_VERSION')", "SELECT pg_ls_dir('.')",
		"COPY public.private TO '/dev/null'", "COPY (SELECT 1) TO PROGRAM 'true'", "SELECT pg_create_physical_replication_slot('s')",
		"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'postgres'", "ALTER SYSTEM SET fsync = off", "CREATE ROLE another",
		"CREATE DATABASE another", "SELECT pg_promote()", "SET lo_compat_privileges = on", "SET session_replication_role = replica",
	} {
		refused(t, c, query)
	}
	if err := c.CheckRights(ctx, []string{"postgres"}, false); !errors.Is(err, fail.PGDenied) {
		t.Errorf("it may dump every table: %v", err)
	}
}

func logicalRole(t *testing.T, p *lab.Postgres, c cluster.Cluster) {
	ctx := t.Context()
	sql := cluster.RoleSQL("dumper", cluster.Duties{Logical: true})
	exec(t, p, "postgres", sql, sql)
	if err := c.CheckRights(ctx, []string{"postgres", "other"}, false); err != nil {
		t.Error(err)
	}
	for _, query := range []string{
		"INSERT INTO public.private VALUES ('mine')", "DROP TABLE public.private", "UPDATE pg_authid SET rolsuper = true", "SELECT pg_read_file('PG_VERSION')",
		"ALTER SYSTEM SET fsync = off", "CREATE ROLE another",
	} {
		refused(t, c, query)
	}
	if err := c.CheckBackupRights(ctx); !errors.Is(err, fail.PGDenied) {
		t.Errorf("it may take physical backups: %v", err)
	}
}

// refused runs a query that the role must not be allowed.
func refused(t *testing.T, c cluster.Cluster, query string) {
	t.Helper()
	conn, err := c.Connect(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	_, err = conn.PgConn().Exec(t.Context(), query).ReadAll()
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); !ok || pgErr.Code != "42501" {
		t.Errorf("%s: %v, want that it is denied", query, err)
	}
}
