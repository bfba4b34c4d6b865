package workflows

import (
	"fmt"
	"time"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
)

// PhysicalBackupRequest asks for a physical backup of a cluster.
type PhysicalBackupRequest struct {
	Cluster string `json:"cluster"`
	Host    string `json:"host"` // whose worker takes it
}

// PhysicalBackupResult names a published backup and tells what it took.
type PhysicalBackupResult struct {
	ID       string                       `json:"id"`
	Copy     activities.CopyClusterResult `json:"copy"`
	LastWAL  string                       `json:"last_wal"`
	Verified string                       `json:"verified"`
	Finished time.Time                    `json:"finished"`
}

// PhysicalBackup takes a physical backup: copy, wait for the log, verify,
// publish. The backup exists when the last of these is done, and not before. One
// of a cluster with damaged pages is published, and the run fails: somebody must
// look.
func PhysicalBackup(ctx workflow.Context, req PhysicalBackupRequest) (res PhysicalBackupResult, err error) {
	info := workflow.GetInfo(ctx)
	started := workflow.Now(ctx).UTC().Truncate(time.Millisecond)
	job := activities.Job{
		Cluster: req.Cluster, ID: activities.BackupID(started, info.OriginalRunID), Started: started, Kind: Physical,
		Owner: backup.Owner{Namespace: info.Namespace, Workflow: info.WorkflowExecution.ID, Run: info.WorkflowExecution.RunID},
	}
	res.ID = job.ID
	b := newBoard(ctx, "Physical backup of "+req.Cluster, job.ID)
	defer func() {
		err = b.end(ctx, err)
		b.tell(ctx, req.Host, req.Cluster, Physical, err)
	}()

	b.stage(ctx, "preflight")
	var seen activities.PreflightResult
	if err := do(ctx, quick(req.Host, "can it succeed?"), host.Preflight, job).Get(ctx, &seen); err != nil {
		return res, noWorker(err, req.Host)
	}
	b.row("Server", fmt.Sprintf("PostgreSQL %v, system %v", seen.Seen.Version, seen.Seen.System))
	b.row("Databases", fmt.Sprintf("%d, %s on disk", seen.Seen.Databases, size(seen.Seen.Bytes)))

	b.stage(ctx, "copy")
	if err := do(ctx, copying(req.Host, "copy "+size(seen.Seen.Bytes)+" of data directory"), host.CopyCluster, job).Get(ctx, &res.Copy); err != nil {
		return res, err
	}
	b.row("Copied", fmt.Sprintf("%s in %d files, from %v to %v", size(res.Copy.Bytes), res.Copy.Files, res.Copy.Start, res.Copy.Stop))
	b.row("Stored", fmt.Sprintf("%s new, %s were there", size(res.Copy.Sent), size(res.Copy.Kept)))

	b.stage(ctx, "wal")
	var wal activities.WaitWALResult
	if err := do(ctx, long(req.Host, "every segment of the copy is archived"), host.WaitWAL, job).Get(ctx, &wal); err != nil {
		return res, err
	}
	res.LastWAL = wal.Last

	b.stage(ctx, "verify")
	var verified activities.VerifyResult
	if err := do(ctx, long(req.Host, "read back what was sent"), host.Verify, job).Get(ctx, &verified); err != nil {
		return res, err
	}
	res.Verified = string(verified.Verified)
	b.row("Verified", res.Verified)

	b.stage(ctx, "publish")
	var published activities.PublishResult
	err = do(ctx, patient(req.Host, "sign and write the manifest"), host.Publish,
		activities.PublishRequest{Job: job, Seen: seen.Seen, Verified: verified.Verified}).Get(ctx, &published)
	if err != nil {
		return res, err
	}
	res.Finished = published.Finished
	b.upsert(ctx, PgkeepBytes.ValueSet(res.Copy.Bytes))
	if n := res.Copy.Damaged; n > 0 {
		b.row("**Damaged pages**", fmt.Sprint(n))
		return res, temporal.NewNonRetryableApplicationError(
			fmt.Sprintf("backup %s has %d damaged pages of the cluster in it, and counts for nothing", res.ID, n),
			string(fail.PageDamage), nil, activities.Advice{Hint: "pgkeep show " + res.ID + " names the files and blocks; keep the last clean backup, and look at the disk"})
	}
	return res, nil
}
