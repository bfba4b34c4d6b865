package main

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
)

func showCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "show",
		Usage:     "show everything about one backup",
		ArgsUsage: "[CLUSTER] BACKUP",
		Category:  backups,
		Description: "BACKUP is an id, the beginning of one, or \"latest\".\n\n" + examples(
			"pgkeep show latest", "the newest of the only cluster",
			"pgkeep show main 20261122", "the one of that day"),
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			args := c.Args().Slice()
			cluster := ""
			if len(args) == 2 {
				cluster = args[0]
			}
			return e.show(c.Context, cluster, args[len(args)-1], c.Bool("json"))
		},
	}
}

func (e *env) show(ctx context.Context, cluster, what string, asJSON bool) error {
	r, b, err := e.theBackup(ctx, cluster, what)
	if err != nil {
		return err
	}
	shown, err := show(r, b)
	if err != nil {
		return err
	}
	now := time.Now()
	if shown.State == complete {
		cfg, err := e.config()
		if err != nil {
			return err
		}
		var standing proof.Standing
		if shown.Proof, standing, err = shownProof(ctx, r, b.Ref, cfg.RestoreTest.Within, now); err != nil {
			return err
		}
		if standing.Last.Test != "" {
			rep, err := whole(r, standing)
			if err != nil {
				return err
			}
			shown.Proof.Report = &rep
		}
	}
	link := e.linkOf(shown)
	if asJSON {
		return printJSON(e.out, "show", struct {
			backupShown
			Databases []backup.DatabaseDump   `json:"databases"` // in place of their short form
			Globals   string                  `json:"globals,omitempty"`
			Skipped   []string                `json:"skipped"` // databases of the cluster that are not in it
			Physical  *backup.PhysicalDetails `json:"details,omitempty"`
			Content   *repo.Content           `json:"content"`
			Link      string                  `json:"link,omitempty"`
		}{shown, shown.details.Databases, shown.details.Globals, append([]string{}, shown.details.Skipped...), shown.physical, contentOf(b), link})
	}
	if err := pairs(e.out, shown.pairs(b.Manifest, link, now)); err != nil {
		return err
	}
	if shown.State != complete {
		_, err := finished(b)
		return err
	}
	if err := e.printContents(shown); err != nil {
		return err
	}
	return e.printProof(shown.Proof)
}

// printContents prints what only those see who read metadata.
func (e *env) printContents(shown backupShown) error {
	if shown.Kind == repo.Physical {
		return e.showPhysical(shown.physical)
	}
	if len(shown.Databases) == 0 {
		e.say("no key here opens the names of the databases")
		return nil
	}
	fmt.Fprintln(e.out)
	var rows [][]string
	for _, db := range shown.details.Databases {
		rows = append(rows, []string{db.Name, size(db.Bytes), bracket(db.LSN.Before, db.LSN.After), moment(db.TakenAt), db.Snapshot})
	}
	if err := table(e.out, "DATABASE SIZE LSN TAKEN SNAPSHOT", rows); err != nil {
		return err
	}
	for _, db := range shown.details.Databases {
		if db.Uncounted != "" {
			e.say("rows of database %s were not counted: %s", db.Name, db.Uncounted)
		}
	}
	return nil
}

// showPhysical is printContents for a physical backup.
func (e *env) showPhysical(d *backup.PhysicalDetails) error {
	if d == nil {
		e.say("no key here opens the details")
		return nil
	}
	lines := [][2]string{{"data directory", d.DataDirectory}}
	for _, path := range d.Config {
		lines = append(lines, [2]string{"configuration", path})
	}
	for _, s := range d.Tablespaces {
		lines = append(lines, [2]string{"tablespace", fmt.Sprintf("%s (%d) at %s", s.Name, s.OID, s.Path)})
	}
	for _, f := range d.Damaged {
		lines = append(lines, [2]string{"DAMAGED", fmt.Sprintf("%s, blocks %v", f.Path, f.Blocks)})
	}
	for _, c := range d.Counted {
		lines = append(lines, [2]string{"rows counted", fmt.Sprintf("of %s in database %s, before %v", count(len(c.Tables), "table"), c.Database, c.After)})
	}
	for _, why := range d.Uncounted {
		lines = append(lines, [2]string{"NOT COUNTED", why})
	}
	return pairs(e.out, lines)
}

func contentOf(b repo.Listed) *repo.Content {
	if b.Err != nil || b.Unfinished {
		return nil
	}
	return &b.Content
}

// pairs are the lines that show a backup.
func (b backupShown) pairs(m repo.Manifest, link string, now time.Time) [][2]string {
	all := [][2]string{
		{"backup", string(b.ID)},
		{"cluster", b.Cluster},
		{"state", b.State},
		{"started", moment(b.StartedAt) + ", " + span(now.Sub(b.StartedAt)) + " ago"},
	}
	if b.State != complete {
		return all
	}
	encrypted := "no"
	if b.Epoch > 0 {
		encrypted = fmt.Sprintf("to the key of epoch %d", b.Epoch)
	}
	wal := b.LSN.Archived
	if b.LSN.LastWAL != "" {
		wal += ", last " + b.LSN.LastWAL
	}
	all = append(all, [][2]string{
		{"finished", moment(m.FinishedAt) + ", in " + span(m.FinishedAt.Sub(m.StartedAt))},
		{"kind", string(b.Kind)},
		{"PostgreSQL", fmt.Sprintf("%s, system %v, timeline %v, on %s", b.Version, b.System, b.LSN.Timeline, b.Host)},
		{"LSN", bracket(b.LSN.Before, b.LSN.After)},
		{"WAL archive", wal},
		{"size", size(b.Bytes) + " in " + count(m.Files, "file")},
		{"stored", fmt.Sprintf("%s in %s, encrypted: %s", size(b.Stored), count(m.Packs, "pack"), encrypted)},
		{"verified", verifiedMeans(b.Verified)},
		{"restored", b.Proof.standing(now)},
		{"writer", "pgkeep " + b.Writer},
	}...)
	if b.Workflow != "" {
		all = append(all, [2]string{"workflow", strings.TrimSpace(b.Workflow + " " + b.Run)})
	}
	if f := m.Physical; f != nil {
		all = append(all, [][2]string{
			{"recovers from", fmt.Sprintf("%s, at %v", moment(f.StoppedAt), f.Stop)},
			{"needs WAL", f.FirstWAL + " to " + f.LastWAL},
			{"page checksums", checksumsMean(*f)},
		}...)
		if n := len(m.Uses); n > 0 {
			all = append(all, [2]string{"shares with", count(n, "other backup")})
		}
	}
	if link != "" {
		all = append(all, [2]string{"link", link})
	}
	if len(b.details.Skipped) > 0 {
		all = append(all, [2]string{"not in it", strings.Join(b.details.Skipped, ", ")})
	}
	return all
}

func checksumsMean(f repo.PhysicalFacts) string {
	switch {
	case !f.Checksums:
		return "off: nobody can tell whether pages were damaged on disk"
	case f.Damaged > 0:
		return fmt.Sprintf("%s of the cluster are DAMAGED, in %s", count(f.Damaged, "page"), count(f.DamagedFiles, "file"))
	}
	return "compared, every page"
}

// bracket shows two positions, or one if they are the same.
func bracket(before, after pg.LSN) string {
	if before == after {
		return after.String()
	}
	return fmt.Sprintf("%v..%v", before, after)
}

// verifiedMeans says in words how deep somebody looked.
func verifiedMeans(v repo.Verified) string {
	switch v {
	case repo.VerifiedContent:
		return "content: read back, opened, every block compared"
	case repo.VerifiedStored:
		return "stored: read back and compared, not opened"
	}
	return string(v)
}

// linkOf is the page of the run that took a backup, in the Web UI of today's
// configuration; "" if nobody knows. Temporal is not asked.
func (e *env) linkOf(b backupShown) string {
	cfg, err := e.config()
	if err != nil || b.Workflow == "" {
		return ""
	}
	opt, err := e.temporalOptions()
	if err != nil {
		return ""
	}
	s := server{namespace: opt.Namespace, ui: cmp.Or(string(cfg.Temporal.UIURL), uiOf(opt.HostPort))}
	return s.link(b.Workflow, b.Run)
}
