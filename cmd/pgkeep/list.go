package main

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

func listCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "list",
		Usage:     "list the backups in the repository",
		ArgsUsage: "[CLUSTER]",
		Category:  backups,
		Description: "Without CLUSTER, of all clusters. Only the repository is asked, not Temporal.\n\n" + examples(
			"pgkeep list", "all there is",
			"pgkeep list --all main", "of one, with those not finished",
			"pgkeep list --json | jq -r '.backups[-1].id'", "for scripts"),
		Flags: []cli.Flag{
			boolFlag("all", "also those that were not finished: under way, or given up"),
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			return e.list(c.Context, listOptions{Cluster: c.Args().First(), All: c.Bool("all"), JSON: c.Bool("json")})
		},
	}
}

type listOptions struct {
	Cluster   string // "": all
	All, JSON bool
}

func (e *env) list(ctx context.Context, opt listOptions) error {
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return err
	}
	clusters := []string{opt.Cluster}
	if opt.Cluster == "" {
		clusters, err = r.Clusters(ctx)
	} else {
		_, err = whichOf(ctx, cfg, r, opt.Cluster)
	}
	if err != nil {
		return err
	}
	var shown []backupShown
	for _, cluster := range clusters {
		all, err := r.Backups(ctx, cluster)
		if err != nil {
			return err
		}
		for _, b := range all {
			if b.Unfinished && !opt.All {
				continue
			}
			one, err := show(r, b)
			if err != nil {
				return err
			}
			shown = append(shown, one)
		}
	}
	now := time.Now()
	if err := prove(ctx, r, shown, cfg.RestoreTest.Within, now); err != nil {
		return err
	}
	return e.printList(shown, opt, now)
}

// States of a backup.
const (
	complete   = "complete"
	unfinished = "unfinished"
	damaged    = "damaged" // its manifest cannot be believed, or not be understood
)

// A backupShown is a backup as list and show print it. Of one that is not
// complete, only the first lines are known.
type backupShown struct {
	repo.Ref
	State     string    `json:"state"`
	Error     string    `json:"error,omitempty"` // what is wrong with a damaged one
	StartedAt time.Time `json:"started_at"`

	Kind       repo.Kind     `json:"kind,omitempty"`
	Host       string        `json:"host,omitempty"`
	System     pg.SystemID   `json:"system_id,omitzero"`
	Version    string        `json:"pg_version,omitempty"`
	FinishedAt *time.Time    `json:"finished_at"`
	Bytes      int64         `json:"bytes"`  // of its files
	Stored     int64         `json:"stored"` // in the repository
	LSN        *repo.LSNs    `json:"lsn"`
	Verified   repo.Verified `json:"verified,omitempty"`
	Epoch      int           `json:"epoch,omitempty"`
	Writer     string        `json:"writer,omitempty"` // version of pgkeep
	Workflow   string        `json:"workflow,omitempty"`
	Run        string        `json:"run,omitempty"`

	// Proof is what restore tests say; null of a backup that is not complete.
	Proof *proofShown `json:"proof"`

	// Databases is null where no key at hand opens it.
	Databases []databaseShown `json:"databases"`

	// Of a physical backup.
	Start     pg.LSN     `json:"start,omitempty"`      // recovery begins here
	StoppedAt *time.Time `json:"stopped_at,omitempty"` // the first moment it can be recovered to
	Damaged   int        `json:"damaged_pages,omitempty"`

	details  backup.Details
	physical *backup.PhysicalDetails // nil: no physical backup, or no key at hand opens them
	kind     fail.Kind               // of Error
}

type databaseShown struct {
	Name  string `json:"name"`
	Bytes int64  `json:"bytes"` // of the dump
}

// show gathers what is known of a backup.
func show(r *repo.Repo, b repo.Listed) (backupShown, error) {
	s := backupShown{Ref: b.Ref, State: complete, StartedAt: b.ID.Time()}
	switch {
	case b.Err != nil:
		s.State, s.Error, s.kind = damaged, b.Err.Error(), fail.KindOf(b.Err)
		return s, nil
	case b.Unfinished:
		s.State = unfinished
		return s, nil
	}
	m := b.Manifest
	s.StartedAt, s.FinishedAt = m.StartedAt, jsonTime(m.FinishedAt)
	s.Kind, s.Host, s.System, s.Version = m.Kind, m.Host, m.System, m.Version.String()
	s.Bytes, s.Stored, s.LSN, s.Verified, s.Epoch, s.Writer = m.Bytes, m.Stored, &m.LSN, m.Verified, m.Epoch, m.Writer
	s.Workflow, s.Run = m.Workflow, m.Run
	if f := m.Physical; f != nil {
		s.Start, s.StoppedAt, s.Damaged = f.Start, jsonTime(f.StoppedAt), f.Damaged
		s.physical = new(backup.PhysicalDetails)
		err := r.OpenDetails(m, s.physical)
		if errors.Is(err, fail.NoKey) {
			s.physical, err = nil, nil
		}
		return s, err
	}
	err := r.OpenDetails(m, &s.details)
	if errors.Is(err, fail.NoKey) {
		return s, nil
	}
	for _, db := range s.details.Databases {
		s.Databases = append(s.Databases, databaseShown{db.Name, db.Bytes})
	}
	return s, err
}

func (e *env) printList(shown []backupShown, opt listOptions, now time.Time) error {
	if opt.JSON {
		return printJSON(e.out, "list", struct {
			Backups []backupShown `json:"backups"`
		}{append([]backupShown{}, shown...)})
	}
	if len(shown) == 0 {
		of, hint := "", ""
		if opt.Cluster != "" {
			of = " of cluster " + opt.Cluster
		}
		if !opt.All {
			hint = "; --all shows what was not finished"
		}
		e.say("there is no backup%s%s", of, hint)
		return nil
	}
	slices.SortStableFunc(shown, func(a, b backupShown) int { return cmp.Compare(a.Cluster, b.Cluster) })
	var rows [][]string
	for _, b := range shown {
		rows = append(rows, b.row(now))
	}
	if err := table(e.out, "ID CLUSTER KIND AGE SIZE STORED LSN VERIFIED PROVEN", rows); err != nil {
		return err
	}
	for _, b := range shown {
		if b.State == damaged {
			e.say("%s: %s", b.ID, b.Error)
		}
	}
	return nil
}

func (b backupShown) row(now time.Time) []string {
	age := span(now.Sub(b.StartedAt))
	switch b.State {
	case complete:
		verified := string(b.Verified)
		if b.Damaged > 0 {
			verified = "DAMAGED PAGES"
		}
		return []string{string(b.ID), b.Cluster, string(b.Kind), age, size(b.Bytes), size(b.Stored), b.LSN.After.String(), verified, b.Proof.word(now)}
	case damaged:
		return []string{string(b.ID), b.Cluster, "", age, "", "", "", strings.ToUpper(cmp.Or(string(b.kind), damaged)), ""}
	}
	return []string{string(b.ID), b.Cluster, "", age, "", "", "", b.State, ""}
}
