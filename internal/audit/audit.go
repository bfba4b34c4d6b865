package audit

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Report is what an audit found in one archive. As JSON it stands in workflow
// histories, without what an audit finds anew.
type Report struct {
	Ledger
	Holes   []Hole   `json:"holes"`
	Odd     []Odd    `json:"odd,omitempty"`
	OddMore int      `json:"odd_more,omitempty"` // how many there are beside those
	Windows []Window `json:"-"`
	Stuck   []Base   `json:"stuck,omitempty"` // bases that lead nowhere
}

// Take audits the archives of a cluster: one for each system and major version
// it has been. known is what an earlier audit found, see Survey; none means
// to list everything. A hole younger than Grace is not reported yet. now is the
// time at which the audit begins.
func Take(ctx context.Context, r *repo.Repo, cluster string, known []Report, now time.Time) ([]Report, error) {
	archives, err := r.Archives(ctx, cluster)
	if err != nil {
		return nil, err
	}
	backups, err := r.Backups(ctx, cluster)
	if err != nil {
		return nil, err
	}
	var all []Report
	for _, a := range archives {
		var before Ledger
		for _, rep := range known {
			if rep.Archive == a {
				before = rep.Ledger
			}
		}
		ledger, odd, err := Survey(ctx, r, a, before) // what is damaged is odd
		if err != nil {
			return nil, err
		}
		rep := Report{Ledger: ledger, Odd: odd.Told, OddMore: odd.Count - len(odd.Told)}
		bases, whole := basesOf(a, backups)
		rep.Windows, rep.Stuck = rep.Ledger.Windows(bases)
		if !whole { // what cannot be read may need any segment
			bases = nil
		}
		for _, h := range rep.Ledger.Holes(bases) {
			if now.Sub(h.Since) > Grace {
				rep.Holes = append(rep.Holes, h)
			}
		}
		all = append(all, rep)
	}
	return all, nil
}

// basesOf are the physical backups of an archive's system; whole is false if
// there may be others.
func basesOf(a repo.Archive, backups []repo.Listed) (bases []Base, whole bool) {
	whole = true
	for _, b := range backups {
		switch {
		case b.Err != nil:
			whole = false
		case b.Unfinished || b.Physical == nil || b.System != a.System || b.Version.Major() != a.Major:
		default:
			p := b.Physical
			bases = append(bases, Base{string(b.ID), p.StopTimeline, p.Start, p.Stop, b.FinishedAt})
		}
	}
	return bases, whole
}

// Err is a fail.WALHole that names what is missing in any of the archives of a
// cluster, or nil.
func Err(cluster string, all []Report) error {
	var holes []string
	count := 0
	var bad Report
	for _, rep := range all {
		for _, h := range rep.Holes {
			bad = rep
			count += h.Count
			holes = append(holes, h.String())
		}
	}
	if len(holes) == 0 {
		return nil
	}
	if n := len(holes); n > 3 {
		holes = append(holes[:3], fmt.Sprintf("and in %d more places", n-3))
	}
	what := "files are"
	if count == 1 {
		what = "file is"
	}
	hint := "who has them in pg_wal can bring them back: on the new primary, pgkeep wal audit --fill; on the old one, let it archive. If nobody has, take a physical backup now"
	if len(bad.Windows) == 0 {
		hint += "; pgkeep wal list shows what is there"
	} else {
		hint += "; pgkeep windows shows what can be reached still"
	}
	return fail.Hint(fmt.Errorf("cluster %s: %d WAL %s missing from the archive: %s: %w", cluster, count, what, strings.Join(holes, ", "), fail.WALHole), hint)
}
