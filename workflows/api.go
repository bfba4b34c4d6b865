// Package workflows says what happens in which order, and what if not. This
// file holds the names that callers, workers and schedules must agree on.
package workflows

import "go.temporal.io/sdk/temporal"

// Queue is the task queue of workflows, and of activities that need nothing but
// the repository. Any worker serves it.
const Queue = "pgkeep"

// HostQueue is the task queue of activities that must run on host.
func HostQueue(host string) string { return "pgkeep-host-" + host }

// Workflow types. They stand in histories and schedules: never rename one.
const (
	ScheduledName      = "pgkeep.Scheduled"
	LogicalBackupName  = "pgkeep.LogicalBackup"
	PhysicalBackupName = "pgkeep.PhysicalBackup"
	RestoreName        = "pgkeep.Restore"
	WALAuditName       = "pgkeep.WALAudit"
	ExpireName         = "pgkeep.Expire"
	RestoreTestName    = "pgkeep.RestoreTest"
)

// TypePrefix begins the name of every workflow type of pgkeep.
const TypePrefix = "pgkeep."

// The kinds of backups: made with pg_dump, or from the files of the cluster.
const (
	Logical  = "logical"
	Physical = "physical"
)

// KindWALAudit is the kind of a schedule that audits the archive of WAL.
const KindWALAudit = "wal-audit"

// KindRestoreTest is the kind of a schedule, and of a run, that tests a backup.
const KindRestoreTest = "restore-test"

// KindExpire is the kind of a schedule that lets go of what retention does not
// keep.
const KindExpire = "expire"

// BackupWorkflowID is the one workflow id under which backups of that kind of
// that cluster run. Temporal runs at most one workflow of an id at a time: this
// is what keeps two backups of one cluster apart.
func BackupWorkflowID(cluster, kind string) string { return "pgkeep/" + cluster + "/" + kind }

// RestoreWorkflowID is the one workflow id under which a directory of a host is
// restored.
func RestoreWorkflowID(host, dir string) string { return "pgkeep/restore/" + host + dir }

// RestoreTestWorkflowID is the one workflow id under which backups of a cluster
// are tested by hand, and by a schedule: one at a time.
func RestoreTestWorkflowID(cluster string) string { return BackupWorkflowID(cluster, KindRestoreTest) }

// ScheduledRequest is what a schedule hands to the workflow it starts.
type ScheduledRequest struct {
	Cluster string `json:"cluster"`
	Kind    string `json:"kind"`
	Host    string `json:"host"` // whose worker takes the backup
}

// Search attributes. "pgkeep init" registers them; without them everything works
// except the search.
var (
	PgkeepCluster  = temporal.NewSearchAttributeKeyKeyword("PgkeepCluster")
	PgkeepHost     = temporal.NewSearchAttributeKeyKeyword("PgkeepHost")
	PgkeepKind     = temporal.NewSearchAttributeKeyKeyword("PgkeepKind")
	PgkeepBackupID = temporal.NewSearchAttributeKeyKeyword("PgkeepBackupID")
	PgkeepStage    = temporal.NewSearchAttributeKeyKeyword("PgkeepStage")
	PgkeepOutcome  = temporal.NewSearchAttributeKeyKeyword("PgkeepOutcome")
	PgkeepBytes    = temporal.NewSearchAttributeKeyInt64("PgkeepBytes")
)

// SearchAttributes lists them all.
func SearchAttributes() []temporal.SearchAttributeKey {
	return []temporal.SearchAttributeKey{PgkeepCluster, PgkeepHost, PgkeepKind, PgkeepBackupID, PgkeepStage, PgkeepOutcome, PgkeepBytes}
}
