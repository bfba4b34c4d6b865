package workflows

import (
	"errors"
	"fmt"
	"strings"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
)

// host: only the names of its methods are used.
var host *activities.Host

// LogicalBackupRequest asks for a logical backup of a cluster.
type LogicalBackupRequest struct {
	Cluster string `json:"cluster"`
	Host    string `json:"host"` // whose worker takes it
	// Databases to dump instead of those of the host's configuration.
	Databases []string `json:"databases,omitempty"`
}

// LogicalBackupResult names a published backup and tells what it took.
type LogicalBackupResult struct {
	ID        string                     `json:"id"`
	Databases int                        `json:"databases"`
	Bytes     int64                      `json:"bytes"`
	Stored    int64                      `json:"stored"`
	Packs     int                        `json:"packs"`
	LSN       activities.RecordLSNResult `json:"record"`
	Verified  string                     `json:"verified"`
	Finished  time.Time                  `json:"finished"`
}

// LogicalBackup takes a logical backup: dump, upload, record, verify, publish.
// The backup exists when the last of these is done, and not before. Whatever
// happens, the spool is cleaned at the end.
func LogicalBackup(ctx workflow.Context, req LogicalBackupRequest) (res LogicalBackupResult, err error) {
	info := workflow.GetInfo(ctx)
	started := workflow.Now(ctx).UTC().Truncate(time.Millisecond)
	job := activities.Job{
		Cluster: req.Cluster, ID: activities.BackupID(started, info.OriginalRunID), Started: started, Databases: req.Databases,
		Owner: backup.Owner{Namespace: info.Namespace, Workflow: info.WorkflowExecution.ID, Run: info.WorkflowExecution.RunID},
	}
	res.ID = job.ID
	b := newBoard(ctx, "Logical backup of "+req.Cluster, job.ID)
	defer func() {
		err = b.end(ctx, err)
		tidy, cancel := workflow.NewDisconnectedContext(ctx)
		defer cancel()
		if cerr := do(tidy, cleanup(req.Host, "remove the dump from the spool"), host.CleanUp, job).Get(tidy, nil); cerr != nil {
			workflow.GetLogger(ctx).Warn("spool not cleaned; the worker will", "error", cerr)
		}
		b.tell(ctx, req.Host, req.Cluster, Logical, err)
	}()

	b.stage(ctx, "preflight")
	var seen activities.PreflightResult
	if err := do(ctx, quick(req.Host, "can it succeed?"), host.Preflight, job).Get(ctx, &seen); err != nil {
		return res, noWorker(err, req.Host)
	}
	b.row("Server", fmt.Sprintf("PostgreSQL %v, system %v", seen.Seen.Version, seen.Seen.System))
	b.row("Databases", fmt.Sprintf("%d, %s on disk", seen.Seen.Databases, size(seen.Seen.Bytes)))

	b.stage(ctx, "dump")
	var dumped activities.DumpResult
	err = do(ctx, dump(req.Host, fmt.Sprintf("pg_dump of %d databases, %s on disk", seen.Seen.Databases, size(seen.Seen.Bytes))), host.Dump, job).Get(ctx, &dumped)
	if err != nil {
		return res, err
	}
	res.Databases = dumped.Databases
	b.row("Dump", fmt.Sprintf("%s at LSN %v", size(dumped.Bytes), dumped.LSN.After))

	b.stage(ctx, "upload")
	var stored activities.UploadResult
	if err := do(ctx, long(req.Host, "compress, encrypt and store "+size(dumped.Bytes)), host.Upload, job).Get(ctx, &stored); err != nil {
		return res, err
	}
	res.Bytes, res.Stored, res.Packs = stored.Bytes, stored.Stored, stored.Packs
	b.row("Stored", fmt.Sprintf("%s in %d packs", size(stored.Stored), stored.Packs))

	b.stage(ctx, "record")
	err = do(ctx, patient(req.Host, "timeline, LSN, and how far WAL is archived"), host.RecordLSN,
		activities.RecordLSNRequest{Job: job, LSN: dumped.LSN}).Get(ctx, &res.LSN)
	if err != nil {
		return res, err
	}
	b.row("WAL up to the dump", res.LSN.LSN.Archived)

	b.stage(ctx, "verify")
	var verified activities.VerifyResult
	if err := do(ctx, long(req.Host, fmt.Sprintf("read %d packs back", stored.Packs)), host.Verify, job).Get(ctx, &verified); err != nil {
		return res, err
	}
	res.Verified = string(verified.Verified)
	b.row("Verified", res.Verified)

	b.stage(ctx, "publish")
	var published activities.PublishResult
	err = do(ctx, patient(req.Host, "sign and write the manifest"), host.Publish,
		activities.PublishRequest{Job: job, Seen: seen.Seen, LSN: res.LSN.LSN, Verified: verified.Verified}).Get(ctx, &published)
	if err != nil {
		return res, err
	}
	res.Finished = published.Finished
	b.upsert(ctx, PgkeepBytes.ValueSet(res.Bytes))
	return res, nil
}

// do schedules an activity.
func do(ctx workflow.Context, opt workflow.ActivityOptions, activity, request any) workflow.Future {
	return workflow.ExecuteActivity(workflow.WithActivityOptions(ctx, opt), activity, request)
}

// noWorker says what it means that an activity was never taken up.
func noWorker(err error, host string) error {
	var late *temporal.TimeoutError
	if errors.As(err, &late) && late.TimeoutType() == enumspb.TIMEOUT_TYPE_SCHEDULE_TO_START {
		return temporal.NewNonRetryableApplicationError(fmt.Sprintf("no worker serves the queue %s", HostQueue(host)), string(fail.NoWorker), nil,
			activities.Advice{Hint: "start pgkeep worker on host " + host + ", or correct the host of the cluster in the configuration"})
	}
	return err
}

// A board tells people what happens: in the Web UI's details of the workflow,
// and in search attributes where the server has them.
type board struct {
	title, id  string
	now        string
	rows       []string
	searchable bool
}

func newBoard(ctx workflow.Context, title, id string) *board {
	b := &board{title: title}
	if id != "" {
		b.id = " `" + id + "`"
	}
	// Whoever started this set an attribute only if the server knows them; an
	// unknown one would stop the workflow.
	b.searchable = workflow.GetTypedSearchAttributes(ctx).ContainsKey(PgkeepCluster)
	if id != "" {
		b.upsert(ctx, PgkeepBackupID.ValueSet(id))
	}
	return b
}

func (b *board) upsert(ctx workflow.Context, set ...temporal.SearchAttributeUpdate) {
	if !b.searchable {
		return
	}
	if err := workflow.UpsertTypedSearchAttributes(ctx, set...); err != nil {
		workflow.GetLogger(ctx).Warn("search attributes not set", "error", err)
	}
}

func (b *board) stage(ctx workflow.Context, name string) {
	b.now = name
	b.upsert(ctx, PgkeepStage.ValueSet(name))
	b.show(ctx)
}

func (b *board) row(what, is string) { b.rows = append(b.rows, "| "+what+" | "+is+" |") }

func (b *board) show(ctx workflow.Context) {
	workflow.SetCurrentDetails(ctx, fmt.Sprintf("**%s**%s\n\n| | |\n|---|---|\n| Stage | %s |\n%s\n", b.title, b.id, b.now, strings.Join(b.rows, "\n")))
}

// end notes how it came out, and gives a cancellation its kind.
func (b *board) end(ctx workflow.Context, err error) error {
	switch {
	case err == nil:
		b.now = "done"
	case temporal.IsCanceledError(err) || ctx.Err() != nil:
		b.now = "cancelled during " + b.now
	default:
		b.now = "failed during " + b.now
	}
	outcome, _, _ := strings.Cut(b.now, " ")
	b.upsert(ctx, PgkeepOutcome.ValueSet(outcome))
	b.show(ctx)
	return err
}

// size writes a number of bytes for people.
func size(n int64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%.1f kB", float64(n)/(1<<10))
	}
	if n < 1<<30 {
		return fmt.Sprintf("%.1f MB", float64(n)/(1<<20))
	}
	return fmt.Sprintf("%.1f GB", float64(n)/(1<<30))
}
