package activities

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"go.temporal.io/sdk/activity"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// Host holds the activities that must run where a cluster and its spool are.
// They are served on the task queue of that host. Requests name a cluster;
// where it is and how to get in, only the host's own configuration says.
//
// Requests and results stand in workflow histories: fields may be added, never
// renamed or given another meaning. Every activity may run twice, at one time,
// and after its workflow is gone.
type Host struct {
	Logical  map[string]*backup.Logical  // by the name of the cluster
	Physical map[string]*backup.Physical // likewise
	Grace    time.Duration               // how long work goes on when the worker is told to stop; 0: 15 s
}

// BackupID names the backup that a workflow run takes. Run ids begin with the
// time and end in random digits.
func BackupID(started time.Time, run string) string {
	return string(repo.NewID(started, run[len(run)-8:]))
}

// A Job says which backup an activity is to work on.
type Job struct {
	Cluster string       `json:"cluster"`
	ID      string       `json:"id"`
	Started time.Time    `json:"started"`
	Owner   backup.Owner `json:"owner"`
	Kind    repo.Kind    `json:"kind,omitempty"` // "": logical
	// Databases to dump instead of those of the configuration.
	Databases []string `json:"databases,omitempty"`
}

// A taker takes backups of one kind of one cluster.
type taker interface {
	Preflight(ctx context.Context, id repo.ID, started time.Time, by backup.Owner) (backup.Seen, error)
	Verify(ctx context.Context, id repo.ID, progress func(repo.Progress)) (repo.Report, error)
	Publish(ctx context.Context, id repo.ID, p backup.Published) (repo.Manifest, error)
}

// taker finds who takes that kind of backup of a cluster here.
func (h *Host) taker(j Job) (taker, repo.ID, error) {
	if j.Kind == repo.Physical {
		return h.physical(j)
	}
	return h.logical(j)
}

func unknownCluster(name string) error {
	return fail.Hint(fmt.Errorf("this worker knows no cluster %q: %w", name, fail.BadConfig),
		"describe it under clusters in the worker's configuration, and start the worker again")
}

func (h *Host) logical(j Job) (*backup.Logical, repo.ID, error) {
	l, ok := h.Logical[j.Cluster]
	if !ok {
		return nil, "", unknownCluster(j.Cluster)
	}
	id, err := repo.ParseID(j.ID)
	if len(j.Databases) > 0 {
		only := *l
		only.Databases, only.Exclude = j.Databases, nil
		l = &only
	}
	return l, id, err
}

func (h *Host) grace() time.Duration {
	if h.Grace == 0 {
		return 15 * time.Second
	}
	return h.Grace
}

// usual is how long a store may be away before heartbeats cease: longer than
// its own patience, which ends with an error that says more.
const usual = 5 * time.Minute

// PreflightResult is what Preflight found out.
type PreflightResult struct {
	Seen backup.Seen `json:"seen"`
}

// Preflight finds out whether the backup can succeed.
func (h *Host) Preflight(ctx context.Context, j Job) (res PreflightResult, err error) {
	t, id, err := h.taker(j)
	if err == nil {
		res.Seen, err = t.Preflight(ctx, id, j.Started, j.Owner)
	}
	return res, border(ctx, err)
}

// DumpResult is what stands in the spool after Dump.
type DumpResult struct {
	Databases int                `json:"databases"`
	Bytes     int64              `json:"bytes"`
	LSN       cluster.LSNBracket `json:"lsn"`
}

// Dump writes the databases into the spool.
func (h *Host) Dump(ctx context.Context, j Job) (res DumpResult, err error) {
	l, id, err := h.logical(j)
	if err != nil {
		return res, border(ctx, err)
	}
	quiet := cmp.Or(l.StallAfter, 10*time.Minute) + time.Minute // the dump notices by itself that it hangs, and says more
	err = watched(ctx, "dump", h.grace(), quiet, func(ctx context.Context, moved moved) error {
		d, err := l.Dump(ctx, id, func(bytes int64) { moved(Progress{Done: bytes}) })
		res = DumpResult{len(d.Databases), d.Bytes(), d.Span()}
		return err
	})
	return res, err
}

// UploadResult is what stands in the repository after Upload.
type UploadResult struct {
	Files  int   `json:"files"`
	Packs  int   `json:"packs"`
	Bytes  int64 `json:"bytes"`
	Stored int64 `json:"stored"`
	Kept   int64 `json:"kept"` // bytes of files that earlier attempts had stored
	Sent   int64 `json:"sent"` // bytes of packs that this attempt sent
}

// Upload stores the dump in the repository.
func (h *Host) Upload(ctx context.Context, j Job) (res UploadResult, err error) {
	l, id, err := h.logical(j)
	if err != nil {
		return res, border(ctx, err)
	}
	err = watched(ctx, "upload", h.grace(), usual, func(ctx context.Context, moved moved) error {
		var last counter
		c, err := l.Upload(ctx, id, func(p repo.Progress) {
			last.set(p)
			moved(Progress{Done: p.Read, Total: p.Total})
		})
		p := last.get()
		res = UploadResult{c.Files, c.Packs, c.Bytes, c.Stored, p.Kept, p.Sent}
		return err
	})
	return res, err
}

// RecordLSNRequest says which dump is meant.
type RecordLSNRequest struct {
	Job
	LSN cluster.LSNBracket `json:"lsn"`
}

// RecordLSNResult is where the dump stands in the write-ahead log.
type RecordLSNResult struct {
	LSN repo.LSNs `json:"lsn"`
}

// RecordLSN asks the server for its timeline and how far its log is archived.
func (h *Host) RecordLSN(ctx context.Context, req RecordLSNRequest) (res RecordLSNResult, err error) {
	l, _, err := h.logical(req.Job)
	if err == nil {
		res.LSN, err = l.RecordLSN(ctx, req.LSN)
	}
	return res, border(ctx, err)
}

// VerifyResult is how deep Verify could look.
type VerifyResult struct {
	Verified repo.Verified `json:"verified"`
	Packs    int           `json:"packs"`
	Stored   int64         `json:"stored"`
}

// Verify reads the upload back from the repository.
func (h *Host) Verify(ctx context.Context, j Job) (res VerifyResult, err error) {
	t, id, err := h.taker(j)
	if err != nil {
		return res, border(ctx, err)
	}
	err = watched(ctx, "verify", h.grace(), usual, func(ctx context.Context, moved moved) error {
		rep, err := t.Verify(ctx, id, func(p repo.Progress) { moved(Progress{Done: p.Read, Total: p.Total}) })
		res = VerifyResult{rep.Verified, rep.Packs, rep.Stored}
		return err
	})
	return res, err
}

// PublishRequest is what the manifest is made from, beside what stands in spool
// and repository.
type PublishRequest struct {
	Job
	Seen     backup.Seen   `json:"seen"`
	LSN      repo.LSNs     `json:"lsn"`
	Verified repo.Verified `json:"verified"`
}

// PublishResult names the backup that now exists.
type PublishResult struct {
	Finished time.Time   `json:"finished"`
	Timeline pg.Timeline `json:"timeline"`
}

// Publish makes the backup exist.
func (h *Host) Publish(ctx context.Context, req PublishRequest) (res PublishResult, err error) {
	t, id, err := h.taker(req.Job)
	if err != nil {
		return res, border(ctx, err)
	}
	m, err := t.Publish(ctx, id, backup.Published{Seen: req.Seen, LSN: req.LSN, Verified: req.Verified, Started: req.Started, By: req.Owner})
	if err == nil {
		activity.GetLogger(ctx).Info("backup published", "cluster", m.Cluster, "id", m.ID, "bytes", m.Bytes, "stored", m.Stored)
	}
	return PublishResult{m.FinishedAt, m.LSN.Timeline}, border(ctx, err)
}

// CleanUp removes the backup's directory from the spool.
func (h *Host) CleanUp(ctx context.Context, j Job) error {
	l, id, err := h.logical(j)
	if err == nil {
		err = l.CleanUp(ctx, id)
	}
	return border(ctx, err)
}
