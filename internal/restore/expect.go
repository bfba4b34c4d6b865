package restore

import "github.com/pgkeep/pgkeep/internal/repo"

// FetchCommand is the restore_command of a server on what a plan restores: the
// one that Run writes into its settings.
func (p Physical) FetchCommand(plan PhysicalPlan) string { return p.fetchCommand(plan.resolved) }

// Manifest is that of the backup that a plan restores.
func (plan PhysicalPlan) Manifest() repo.Manifest { return plan.resolved.Backup }
