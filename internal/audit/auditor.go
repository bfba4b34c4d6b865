package audit

import (
	"context"
	"fmt"
	"time"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// An Auditor audits the archive of one cluster, on the host of the cluster.
type Auditor struct {
	Name    string // of the cluster
	Cluster cluster.Cluster
	Open    func(context.Context) (*repo.Repo, error) // the repository
}

// Audit is Take; it begins now.
func (a *Auditor) Audit(ctx context.Context, known []Report) ([]Report, error) {
	now := time.Now()
	r, err := a.Open(ctx)
	if err != nil {
		return nil, err
	}
	return Take(ctx, r, a.Name, known, now)
}

// Fill is Fill with what is found to be missing.
func (a *Auditor) Fill(ctx context.Context, found []Report) (wal.Filled, error) {
	r, err := a.Open(ctx)
	if err != nil {
		return wal.Filled{}, err
	}
	return Fill(ctx, r, a.Name, a.Cluster, found)
}

// Patience is how long a file may wait to be archived.
const Patience = 5 * time.Minute

// Stuck is a fail.NotArchiving that says how archiving has come to a halt, or
// nil: nothing waits longer than Patience, or files are being archived all the
// same. A standby that archives nothing is as it should be.
func Stuck(cluster string, a cluster.Archiver) error {
	since := func(t time.Time) time.Duration { return a.Now.Sub(t).Round(time.Second) }
	recent := func(t time.Time) bool { return !t.IsZero() && a.Now.Sub(t) <= Patience }
	waiting := "1 file waits"
	if a.Waiting > 1 {
		waiting = fmt.Sprintf("%d files wait", a.Waiting)
	}
	switch {
	case !a.Archiving && a.Standby:
		return nil
	case !a.Archiving:
		return fail.Hint(fmt.Errorf("cluster %s: PostgreSQL archives nothing: %w", cluster, fail.NotArchiving),
			"set archive_mode = on and archive_command = 'pgkeep-wal push %p'")
	case a.Waiting == 0 || since(a.Oldest) <= Patience || recent(a.LastArchived):
		return nil
	case recent(a.LastFailed):
		return fmt.Errorf("cluster %s: %s to be archived, the first for %v: archive_command fails on %s: %w", cluster, waiting, since(a.Oldest), a.FailedWAL, fail.NotArchiving)
	}
	return fail.Hint(fmt.Errorf("cluster %s: %s to be archived, the first for %v, and PostgreSQL counts neither success nor failure: %w", cluster, waiting, since(a.Oldest), fail.NotArchiving),
		"archive_command hangs, is killed or ends with a status above 125, which pg_stat_archiver does not count: look at the server's log, and at the processes of the archiver")
}
