package workflows

import (
	"fmt"
	"strings"
	"time"

	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/workflow"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
)

// archive: only the names of its methods are used.
var archive *activities.WAL

// fullEvery is how many audits there are for one that lists the whole archive.
// The others list what is new, and take the rest for unchanged.
const fullEvery = 24

// WALAuditRequest asks for an audit of the archive of a cluster.
type WALAuditRequest struct {
	Cluster string `json:"cluster"`
	Host    string `json:"host"`           // whose worker does it
	Full    bool   `json:"full,omitempty"` // list all of the archive
}

// WALAuditResult is what an audit found. Of a schedule, the next run begins from
// it.
type WALAuditResult struct {
	Archives []audit.Report   `json:"archives"`
	Archiver cluster.Archiver `json:"archiver"`
	Filled   []string         `json:"filled,omitempty"` // files that were put back
	SinceAll int              `json:"since_all"`        // audits since the whole archive was listed
}

// WALAudit looks for holes in the archive of a cluster, fills those that the
// server of the cluster can, and looks whether archiving goes on. It fails with
// fail.WALHole or fail.NotArchiving: what is wrong then is to be seen in the list
// of workflows, until it is right again. Of a hole it tells first, also while
// PostgreSQL is down.
func WALAudit(ctx workflow.Context, req WALAuditRequest) (res WALAuditResult, err error) {
	b := newBoard(ctx, "WAL audit of "+req.Cluster, "")
	defer func() {
		err = b.end(ctx, err)
		b.tell(ctx, req.Host, req.Cluster, KindWALAudit, err)
	}()

	var before WALAuditResult
	if !req.Full && workflow.HasLastCompletionResult(ctx) {
		if err := workflow.GetLastCompletionResult(ctx, &before); err != nil || before.SinceAll+1 >= fullEvery {
			before = WALAuditResult{} // what cannot be read is not known
		} else {
			res.SinceAll = before.SinceAll + 1
		}
	}
	found, err := b.audit(ctx, req, "list what is archived", before.Archives)
	if err != nil {
		return res, noWorker(err, req.Host)
	}

	b.stage(ctx, "archiver")
	var seen activities.InspectArchiverResult
	unseen := do(ctx, glance(req.Host, "what waits to be archived"), archive.InspectArchiver, activities.InspectArchiverRequest{Cluster: req.Cluster}).Get(ctx, &seen)
	if temporal.IsCanceledError(unseen) {
		return res, unseen
	}
	if unseen != nil { // that there is a hole matters more
		b.row("Archiver", "see the failure of InspectArchiver")
	} else {
		res.Archiver = seen.Archiver
		b.archiver(seen.Archiver)
	}

	hole := audit.Err(req.Cluster, found)
	if hole != nil && unseen == nil { // else nobody says where pg_wal is
		b.stage(ctx, "fill")
		var filled activities.FillWALResult
		ferr := do(ctx, few(req.Host, "look into pg_wal for what is missing"), archive.FillWAL, activities.FillWALRequest{Cluster: req.Cluster, Found: found}).Get(ctx, &filled)
		if temporal.IsCanceledError(ferr) {
			return res, ferr
		}
		if ferr != nil { // likewise
			workflow.GetLogger(ctx).Warn("hole not filled", "error", ferr)
			b.row("Not filled", "see the failure of FillWAL")
		}
		if res.Filled = filled.Files; len(res.Filled) > 0 {
			b.row("Filled", fmt.Sprintf("%d files, from %s on", len(res.Filled), res.Filled[0]))
			if found, err = b.audit(ctx, req, "list what is archived now", found); err != nil {
				return res, err
			}
			hole = audit.Err(req.Cluster, found)
		}
	}
	res.Archives = found
	if hole == nil && unseen != nil {
		return res, unseen
	}
	for _, err := range []error{hole, audit.Stuck(req.Cluster, res.Archiver)} {
		if err != nil {
			return res, temporal.NewNonRetryableApplicationError(err.Error(), string(fail.KindOf(err)), nil, activities.Advice{Hint: fail.HintOf(err)})
		}
	}
	return res, nil
}

// audit lists the archive, beyond what is known.
func (b *board) audit(ctx workflow.Context, req WALAuditRequest, summary string, known []audit.Report) ([]audit.Report, error) {
	b.stage(ctx, "audit")
	var res activities.AuditWALResult
	err := do(ctx, few(req.Host, summary), archive.AuditWAL, activities.AuditWALRequest{Cluster: req.Cluster, Known: known}).Get(ctx, &res)
	for _, rep := range res.Archives {
		var holes []string
		for _, h := range rep.Holes {
			holes = append(holes, h.String())
		}
		if len(holes) > 5 {
			holes = append(holes[:5], "…")
		}
		state := "no hole"
		if len(holes) > 0 {
			state = "missing: " + strings.Join(holes, ", ")
		}
		at, timeline, to := rep.Newest()
		b.row(fmt.Sprintf("System %v, PostgreSQL %d", rep.System, rep.Major),
			fmt.Sprintf("%s; up to %v on timeline %d, archived %s", state, to, timeline, at.UTC().Format(time.DateTime)))
	}
	return res.Archives, err
}

func (b *board) archiver(a cluster.Archiver) {
	switch {
	case !a.Archiving:
		b.row("Archiver", "off")
	case a.Waiting == 0:
		b.row("Archiver", "nothing waits")
	default:
		b.row("Archiver", fmt.Sprintf("%d files wait, the first since %s", a.Waiting, a.Oldest.Format(time.DateTime)))
	}
	if a.Archiving && !a.Ours {
		b.row("archive_command", "is not that of pgkeep")
	}
}
