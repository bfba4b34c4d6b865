package restore

import (
	"context"
	"strings"

	"github.com/pgkeep/pgkeep/internal/repo"
)

// FetchCommand is the restore_command of a server on what a plan restores: the
// one that Run writes into its settings.
func (p Physical) FetchCommand(plan PhysicalPlan) string { return p.fetchCommand(plan.resolved) }

// Manifest is that of the backup that a plan restores.
func (plan PhysicalPlan) Manifest() repo.Manifest { return plan.resolved.Backup }

// Closed are the files of Needs that the server's owner may not read: it would
// not get its log.
func (p Physical) Closed(plan PhysicalPlan) (names []string) {
	for _, name := range p.Needs {
		if plan.owner.cannotRead(name) != "" {
			names = append(names, name)
		}
	}
	return names
}

// Reach finds out which backup leads to the target, and over which log. Nothing
// of the plan is said about directories: Dir is not looked at.
func (p Physical) Reach(ctx context.Context) (plan PhysicalPlan, err error) {
	if plan.resolved, _, err = p.resolve(ctx); err == nil {
		plan.describe(p)
	}
	return plan, err
}

// TablespaceOIDs lists the tablespaces of Backup.
func (p Physical) TablespaceOIDs(ctx context.Context) (oids []string, err error) {
	m, err := p.Repo.Backup(ctx, repo.Ref{Cluster: p.Cluster, ID: p.Backup})
	if err != nil {
		return nil, err
	}
	err = entries(ctx, p.Repo, m, func(e repo.Entry) error {
		if oid, ok := strings.CutPrefix(e.Path, dataRoot+"/pg_tblspc/"); ok && e.Link != "" {
			oids = append(oids, oid)
		}
		return nil
	})
	return oids, err
}
