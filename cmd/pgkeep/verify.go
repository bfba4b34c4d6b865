package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/verify"
)

func verifyCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "verify",
		Usage:     "read backups back and compare every byte",
		ArgsUsage: "[BACKUP]",
		Category:  backups,
		Description: "BACKUP is an id, the beginning of one, or \"latest\". All that a logical backup\n" +
			"consists of is read, decrypted, decompressed, compared; pg_restore reads the table\n" +
			"of contents. Of a physical one, every list and every pack's directory is, and the\n" +
			"content of one pack in 30, other ones each time; with --full, of all. Without an\n" +
			"operator's key, the stored bytes are compared.\n\n" + examples(
			"pgkeep verify latest", "the newest of the only cluster",
			"pgkeep verify --full latest", "every byte of it",
			"pgkeep verify --cluster main --all", "all of one cluster",
			"pgkeep verify --all", "all there are"),
		Flags: []cli.Flag{
			clusterFlag(),
			boolFlag("all", "verify every backup that was finished"),
			boolFlag("full", "read the content of every pack of a physical backup"),
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			return e.verify(c.Context, verifyOptions{Cluster: c.String("cluster"), Backup: c.Args().First(), All: c.Bool("all"), Full: c.Bool("full"), JSON: c.Bool("json")})
		},
	}
}

type verifyOptions struct {
	Cluster   string
	Backup    string
	All, Full bool
	JSON      bool
}

func (e *env) verify(ctx context.Context, opt verifyOptions) error {
	if opt.All == (opt.Backup != "") {
		return fail.Hint(config.Errorf("verify takes the id of a backup, or --all"), "pgkeep verify latest")
	}
	r, chosen, err := e.toVerify(ctx, opt)
	if err != nil {
		return err
	}
	var verdicts []verdict
	for _, b := range chosen {
		v, err := e.verifyOne(ctx, r, b, opt.Full)
		if err != nil {
			return fmt.Errorf("verify %s: %w", b.ID, err)
		}
		verdicts = append(verdicts, v)
		if !opt.JSON {
			v.print(e)
		}
	}
	if opt.JSON {
		err := printJSON(e.out, "verify", struct {
			Backups []verdict `json:"backups"`
		}{append([]verdict{}, verdicts...)})
		if err != nil {
			return err
		}
	}
	if len(verdicts) == 0 {
		e.say("there is no backup to verify")
	}
	return sum(verdicts)
}

// toVerify returns the backups that are meant.
func (e *env) toVerify(ctx context.Context, opt verifyOptions) (*repo.Repo, []repo.Listed, error) {
	if !opt.All {
		r, b, err := e.theBackup(ctx, opt.Cluster, opt.Backup)
		if err == nil && b.Unfinished {
			_, err = finished(b)
		}
		return r, []repo.Listed{b}, err
	}
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return nil, nil, err
	}
	clusters := []string{opt.Cluster}
	if opt.Cluster == "" {
		clusters, err = r.Clusters(ctx)
	} else {
		_, err = whichOf(ctx, cfg, r, opt.Cluster)
	}
	if err != nil {
		return nil, nil, err
	}
	var chosen []repo.Listed
	for _, name := range clusters {
		all, err := r.Backups(ctx, name)
		if err != nil {
			return nil, nil, err
		}
		for _, b := range all {
			if !b.Unfinished {
				chosen = append(chosen, b)
			}
		}
	}
	return r, chosen, nil
}

// A verdict says what verifying one backup found.
type verdict struct {
	repo.Ref
	Sound bool `json:"sound"`
	// Contents tells whether pg_restore read the tables of contents.
	Contents bool `json:"contents_listed"`
	repo.Report
	Error string `json:"error,omitempty"` // what is wrong, or why it cannot be said

	err   error
	notes []string // what was not looked at
}

// verifyOne returns an error for trouble that says nothing about the backup.
func (e *env) verifyOne(ctx context.Context, r *repo.Repo, b repo.Listed, full bool) (verdict, error) {
	v := verdict{Ref: b.Ref}
	m, err := finished(b)
	if err == nil {
		err = e.readBack(ctx, r, m, full, &v)
	}
	if err == nil && m.Physical != nil && m.Physical.Damaged > 0 {
		err = fmt.Errorf("%s of the cluster were damaged when it was taken: %w", count(m.Physical.Damaged, "page"), fail.PageDamage)
	}
	switch fail.KindOf(err) {
	case fail.Corrupt, fail.Untrusted, fail.Unsupported, fail.NoKey, fail.PageDamage:
		v.err, v.Error = err, err.Error()
		return v, nil
	}
	v.Sound = err == nil
	return v, err
}

func (e *env) readBack(ctx context.Context, r *repo.Repo, m repo.Manifest, full bool, v *verdict) error {
	var d backup.Details
	if err := r.OpenDetails(m, &d); errors.Is(err, fail.NoKey) {
		if v.Damage, err = r.CheckDocuments(ctx, m); err != nil {
			return err
		}
		v.notes = append(v.notes, "only the signed documents were compared: no key here opens the lists of what is stored")
		if err := v.Report.Err(); err != nil {
			return err
		}
		return fmt.Errorf("the packs of %s were not read: %w", m.ID, fail.NoKey)
	} else if err != nil {
		return err
	}
	var tools cluster.Tools
	if m.Kind == repo.Logical {
		var err error
		if tools, err = e.toolsFor(ctx, m, d); err != nil {
			v.notes = append(v.notes, "the table of contents was not read: "+err.Error())
		}
	}
	bar := e.progress("verify "+string(m.ID), m.Stored)
	var err error
	v.Report, err = verify.Backup(ctx, r, m, verify.Options{Tools: tools, Scratch: e.scratch(""), Full: full, Salt: time.Now().String(),
		Progress: func(p repo.Progress) { bar.Set(p.Read, p.Total) }})
	bar.End()
	if err == nil {
		err = v.Report.Err()
	}
	if v.Verified == repo.VerifiedStored {
		v.notes = append(v.notes, "the stored bytes were compared, and not decrypted: no key here opens them")
	}
	v.Contents = err == nil && m.Kind == repo.Logical && v.Verified == repo.VerifiedContent && tools != (cluster.Tools{})
	return err
}

// toolsFor finds PostgreSQL's programs to read what those of that version wrote.
func (e *env) toolsFor(ctx context.Context, m repo.Manifest, d backup.Details) (cluster.Tools, error) {
	var at cluster.Cluster
	if cfg, err := e.config(); err == nil {
		at.BinDir = string(cfg.Clusters[config.Name(m.Cluster)].BinDir)
	}
	return at.Tools(ctx, max(m.Version, d.Tools))
}

// scratch is the directory for what is unpacked: the one that is given, else
// the spool if this host has one, else "", the system's.
func (e *env) scratch(given string) string {
	if given != "" {
		return given
	}
	cfg, err := e.config()
	if err != nil {
		return ""
	}
	if info, err := os.Stat(string(cfg.Spool)); err != nil || !info.IsDir() {
		return ""
	}
	return string(cfg.Spool)
}

// print shows a verdict: a line, and one for each damaged object.
func (v verdict) print(e *env) {
	for _, note := range v.notes {
		e.say("%s: %s", v.ID, note)
	}
	read := fmt.Sprintf("%s, %s in %s", count(v.Files, "file"), size(v.Stored), count(v.Packs, "pack"))
	if v.Read < v.Packs {
		read = fmt.Sprintf("%s, a sample of %s in %d of %s", count(v.Files, "file"), size(v.Stored), v.Read, count(v.Packs, "pack"))
	}
	switch {
	case v.Sound:
		fmt.Fprintf(e.out, "%s  %s  sound (%s): %s\n", v.ID, v.Cluster, v.Verified, read)
	case errors.Is(v.err, fail.NoKey):
		fmt.Fprintf(e.out, "%s  %s  not verified\n", v.ID, v.Cluster)
	default:
		fmt.Fprintf(e.out, "%s  %s  DAMAGED\n", v.ID, v.Cluster)
		for _, d := range v.Damage {
			fmt.Fprintf(e.out, "  %s: %s\n", d.Object, oneLine(d.Reason))
		}
		if len(v.Damage) == 0 {
			fmt.Fprintf(e.out, "  %s\n", oneLine(v.Error))
		}
	}
}

// sum is nil if every backup is sound.
func sum(verdicts []verdict) error {
	var bad []verdict
	for _, v := range verdicts {
		if !v.Sound {
			bad = append(bad, v)
		}
	}
	if len(bad) == 0 {
		return nil
	}
	err := fmt.Errorf("verify %s: %w", bad[0].ID, bad[0].err)
	if len(bad) > 1 {
		err = fmt.Errorf("%d of %d backups are not sound; %w", len(bad), len(verdicts), err)
	}
	if errors.Is(err, fail.Corrupt) {
		return fail.Hint(err, "restore from another backup: pgkeep list shows what there is, pgkeep verify --all which are sound")
	}
	return err
}
