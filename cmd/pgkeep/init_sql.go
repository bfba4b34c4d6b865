package main

import (
	"fmt"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/workflows"
)

// backupRole is the role that is proposed in place of a superuser.
const backupRole = "pgkeep_backup"

// initSQL prints what makes the role of a cluster. It asks no server.
func (e *env) initSQL(name, kind string) error {
	cfg, err := e.config()
	if err != nil {
		return err
	}
	name, settings, err := theCluster(cfg, name)
	if err != nil {
		return err
	}
	duties, err := duties(cfg, name, kind)
	if err != nil {
		return err
	}
	at, err := reach(settings)
	if err != nil {
		return err
	}
	role, database, err := at.Login()
	if err != nil {
		return err
	}
	if role == "postgres" || role == "root" { // the superuser, or nobody was named
		role = backupRole
		e.say("put user=%s into clusters.%s.conninfo, in place of the superuser", role, name)
	}
	fmt.Fprint(e.out, sqlPreface(name, role, database), cluster.RoleSQL(role, duties))
	return nil
}

func sqlPreface(cluster, role, database string) string {
	return fmt.Sprintf(`-- The role of pgkeep in cluster %[1]s. As a superuser:
--   pgkeep init --sql %[1]s | psql -X -v ON_ERROR_STOP=1 -d %[3]s
-- It has no password. For a worker that runs as the server's OS user postgres,
-- and connects through the socket, these lines let it in, before all others:
--   pg_hba.conf    local  all  %[2]s  peer map=pgkeep
--   pg_ident.conf  pgkeep  postgres  %[2]s
`, cluster, role, database)
}

// duties are those that the schedules of a cluster tell of; physical ones if
// there is no schedule.
func duties(cfg *config.Config, name, kind string) (d cluster.Duties, err error) {
	switch kind {
	case workflows.Physical:
		return cluster.Duties{Physical: true}, nil
	case workflows.Logical:
		return cluster.Duties{Logical: true}, nil
	case "":
	default:
		return d, fail.Hint(config.Errorf("--kind %s: want physical or logical", kind), "without it, it is what the schedules of the cluster need")
	}
	for _, s := range cfg.Schedules {
		if string(s.Cluster) == name {
			d.Logical = d.Logical || s.Kind == workflows.Logical
			d.Physical = d.Physical || s.Kind != workflows.Logical
		}
	}
	if d == (cluster.Duties{}) {
		d.Physical = true
	}
	return d, nil
}
