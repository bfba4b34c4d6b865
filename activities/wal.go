package activities

import (
	"context"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/cluster"
)

// WAL holds the activities that look after the archive of a cluster, on the
// cluster's host. What is said of Host holds for it too.
type WAL struct {
	Auditors map[string]*audit.Auditor // by the name of the cluster
}

func (w *WAL) auditor(cluster string) (*audit.Auditor, error) {
	if a, ok := w.Auditors[cluster]; ok {
		return a, nil
	}
	return nil, unknownCluster(cluster)
}

// AuditWALRequest says whose archive is to be audited.
type AuditWALRequest struct {
	Cluster string         `json:"cluster"`
	Known   []audit.Report `json:"known,omitempty"` // by an earlier audit; none: all is listed
}

// AuditWALResult is what the audit found.
type AuditWALResult struct {
	Archives []audit.Report `json:"archives"`
}

// AuditWAL finds out what is in the archive, and what is missing.
func (w *WAL) AuditWAL(ctx context.Context, req AuditWALRequest) (res AuditWALResult, err error) {
	a, err := w.auditor(req.Cluster)
	if err == nil {
		res.Archives, err = a.Audit(ctx, req.Known)
	}
	return res, border(ctx, err)
}

// InspectArchiverRequest says whose archiver is meant.
type InspectArchiverRequest struct {
	Cluster string `json:"cluster"`
}

// InspectArchiverResult is how the archiver is doing.
type InspectArchiverResult struct {
	Archiver cluster.Archiver `json:"archiver"`
}

// InspectArchiver asks PostgreSQL what waits to be archived.
func (w *WAL) InspectArchiver(ctx context.Context, req InspectArchiverRequest) (res InspectArchiverResult, err error) {
	a, err := w.auditor(req.Cluster)
	if err == nil {
		res.Archiver, err = a.Cluster.Archiver(ctx)
	}
	return res, border(ctx, err)
}

// FillWALRequest says what is missing.
type FillWALRequest struct {
	Cluster string         `json:"cluster"`
	Found   []audit.Report `json:"found"`
}

// FillWALResult says what was put back, by name.
type FillWALResult struct {
	Files   []string `json:"segments"`          // and histories
	Refused []string `json:"refused,omitempty"` // what is in pg_wal and not sound, and why
}

// FillWAL archives what a lost primary did not, as far as pg_wal here has it.
func (w *WAL) FillWAL(ctx context.Context, req FillWALRequest) (res FillWALResult, err error) {
	a, err := w.auditor(req.Cluster)
	if err == nil {
		done, ferr := a.Fill(ctx, req.Found)
		res, err = FillWALResult{done.Files, done.Refused}, ferr
	}
	return res, border(ctx, err)
}
