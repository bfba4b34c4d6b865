package workflows

import "go.temporal.io/sdk/workflow"

// A Registry takes workflows: a worker's, or a replayer's.
type Registry interface {
	RegisterWorkflowWithOptions(w any, options workflow.RegisterOptions)
}

// Register is the list of workflows, under the names that stand in histories.
func Register(r Registry) {
	r.RegisterWorkflowWithOptions(Scheduled, workflow.RegisterOptions{Name: ScheduledName})
	r.RegisterWorkflowWithOptions(LogicalBackup, workflow.RegisterOptions{Name: LogicalBackupName})
	r.RegisterWorkflowWithOptions(PhysicalBackup, workflow.RegisterOptions{Name: PhysicalBackupName})
	r.RegisterWorkflowWithOptions(Restore, workflow.RegisterOptions{Name: RestoreName})
	r.RegisterWorkflowWithOptions(Expire, workflow.RegisterOptions{Name: ExpireName})
	r.RegisterWorkflowWithOptions(WALAudit, workflow.RegisterOptions{Name: WALAuditName})
	r.RegisterWorkflowWithOptions(RestoreTest, workflow.RegisterOptions{Name: RestoreTestName})
}
