package restore

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Halt is a place on the way of a recovery at which tables have the rows that
// were counted at the source.
type Halt struct {
	// At: all records that begin before it are replayed, and no others.
	At      pg.LSN            `json:"at"`
	Counted []cluster.Counted `json:"counted"`
}

// Halts finds the places, in order, at which a recovery as planned has exactly
// what a snapshot saw in which rows were counted. Where it has no such place, why
// says so; it names nothing that is in the backup.
func (p Physical) Halts(ctx context.Context, plan PhysicalPlan) (halts []Halt, why string, err error) {
	m := plan.resolved.Backup
	var details backup.PhysicalDetails
	if err := p.Repo.OpenDetails(m, &details); err != nil {
		return nil, "", err
	}
	switch {
	case len(details.Uncounted) > 0:
		why = "not all rows could be counted at the source; pgkeep show of the backup says why"
	case len(details.Counted) == 0:
		why = "no rows were counted at the source: count_rows of the cluster says of which tables they are to be"
	}
	if len(details.Counted) == 0 {
		return nil, why, nil
	}
	a := repo.Archive{Cluster: m.Cluster, System: m.System, Major: m.Version.Major()}
	scan := ScanArchive(p.Repo, audit.Ledger{Archive: a, SegmentSize: m.Physical.SegmentSize})
	var places []place
	for _, c := range details.Counted {
		pl, reason, err := halt(ctx, plan.resolved, p.Target, c, scan)
		if err != nil {
			return nil, "", fmt.Errorf("find where rows were counted: %w", err)
		}
		if reason != "" {
			why = reason
			continue
		}
		places = append(places, pl)
	}
	return together(places), why, nil
}

// A place is where to halt for what was counted: anywhere from one position to
// another.
type place struct {
	from, to pg.LSN
	counted  cluster.Counted
}

const archiveEnds = "the archive ends before the moment at which rows were counted"

// halt finds the place at which a recovery has what a snapshot saw: behind the
// commit of every transaction that it saw, and before that of every other. There
// is none where a transaction that it did not see has its commit record before
// that of one that it saw: the server writes the record first, and lets others see
// what it did a moment later, or, with a synchronous standby, much later.
func halt(ctx context.Context, res Resolved, t Target, c cluster.Counted, scan Scan) (pl place, why string, err error) {
	f := res.Backup.Physical
	after := withoutHeader(c.After, f.SegmentSize)
	switch {
	case t.Kind == Immediate:
		return pl, "the target is the end of the backup, and rows were counted after that", nil
	case after > res.Window.To:
		return pl, archiveEnds, nil
	case after > res.Window.Leaves(f.StopTimeline):
		return pl, "the way to the target leaves the timeline before the moment at which rows were counted", nil
	}
	seen, err := pg.ParseSnapshot(c.Snapshot)
	if err != nil {
		return pl, "", err
	}
	pl = place{from: f.Stop, to: max(after, f.Stop), counted: c}
	for rec, err := range scan(ctx, res.Window, f.Stop, after, false) {
		if err != nil {
			return pl, "", err
		}
		switch {
		case rec.At < f.Stop || rec.At >= after || rec.Kind != pg.Commit || rec.XID == 0:
		case seen.EndedInLog(rec.XID):
			pl.from = max(pl.from, rec.End)
		default:
			pl.to = min(pl.to, rec.At)
		}
	}
	if pl.from > pl.to {
		return pl, "while rows were counted, transactions ended in another order than the log has them in", nil
	}
	begins, err := recordFrom(ctx, res, pl.from, scan)
	switch {
	case err != nil:
		return pl, "", err
	case begins == 0:
		return pl, archiveEnds, nil
	case res.Stop.At != 0 && pl.from > res.Stop.At:
		return pl, "the target lies before the moment at which rows were counted", nil
	}
	return pl, "", nil
}

// recordFrom is where the first record begins that begins at a position or
// behind it, where a recovery would notice that it is to halt; 0: there is none.
func recordFrom(ctx context.Context, res Resolved, at pg.LSN, scan Scan) (pg.LSN, error) {
	for rec, err := range scan(ctx, res.Window, at, res.Window.To, true) {
		if err != nil || rec.At >= at {
			return rec.At, err
		}
	}
	return 0, nil
}

// withoutHeader moves a position at which a segment's first record goes to where
// the segment begins: an archive that ends there has all before it.
func withoutHeader(at pg.LSN, size pg.SegmentSize) pg.LSN {
	if off := at % pg.LSN(size); off <= pg.PageHeaderSize {
		return at - off
	}
	return at
}

// together makes one halt of places that overlap.
func together(places []place) (halts []Halt) {
	slices.SortStableFunc(places, func(a, b place) int { return cmp.Compare(a.from, b.from) })
	var to pg.LSN
	for _, p := range places {
		if n := len(halts); n > 0 && p.from <= to {
			halts[n-1].At, to = p.from, min(to, p.to)
			halts[n-1].Counted = append(halts[n-1].Counted, p.counted)
			continue
		}
		halts, to = append(halts, Halt{p.from, []cluster.Counted{p.counted}}), p.to
	}
	return halts
}
