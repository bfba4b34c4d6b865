// Package verify proves one backup: that its objects are what was stored, and
// that PostgreSQL's own program can read what is in them.
package verify

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// ScrubShare is of how many packs the content of one is read, where a sample is
// enough.
const ScrubShare = 30

// Options for Backup. The zero value reads a sample of a physical backup, all of
// a logical one, and lists nothing.
type Options struct {
	// Tools read the tables of contents of a logical backup; zero: they are
	// not read.
	Tools cluster.Tools
	// Scratch is where tables of contents are unpacked; "": the system's.
	Scratch string
	// Full reads the content of every pack of a physical backup. Else that of a
	// sample is read: each pack was read back when it was written, and nothing
	// writes to it since.
	Full     bool
	Salt     string // another one makes another sample
	Progress func(repo.Progress)
}

// Backup reads a published backup back, and everything signed that belongs to
// it. What is damaged stands in the report, each object by name.
func Backup(ctx context.Context, r *repo.Repo, m repo.Manifest, opt Options) (repo.Report, error) {
	docs, err := r.CheckDocuments(ctx, m)
	if err != nil {
		return repo.Report{}, err
	}
	reading := repo.Reading{Progress: opt.Progress}
	if m.Kind == repo.Physical && !opt.Full {
		reading.Packs = repo.Scrub(opt.Salt, ScrubShare)
	}
	rep, err := r.Read(ctx, m.ID, m.Content, reading)
	if err != nil {
		return rep, err
	}
	rep.Damage = append(docs, rep.Damage...)
	if len(rep.Damage) > 0 || m.Kind != repo.Logical || rep.Verified != repo.VerifiedContent || opt.Tools == (cluster.Tools{}) {
		return rep, nil
	}
	return rep, TOCs(ctx, r, m.ID, m.Content, opt.Tools, opt.Scratch)
}

// TOCs reads the table of contents of every database in a logical backup back,
// and lets pg_restore list it. One that it cannot read is fail.Corrupt.
func TOCs(ctx context.Context, r *repo.Repo, id repo.ID, c repo.Content, tools cluster.Tools, scratch string) (err error) {
	dir, err := os.MkdirTemp(scratch, "pgkeep-verify-")
	if err != nil {
		return fmt.Errorf("scratch directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("scratch directory: %w", err)
	}
	defer root.Close()
	var found []string
	_, err = r.Read(ctx, id, c, repo.Reading{Dir: root, Want: func(p string) bool {
		if path.Base(p) != "toc.dat" {
			return false
		}
		found = append(found, path.Dir(p))
		return true
	}})
	if err != nil {
		return fmt.Errorf("read tables of contents: %w", err)
	}
	if len(found) == 0 {
		return fmt.Errorf("backup %s has no table of contents: %w", id, fail.Corrupt)
	}
	for _, d := range found {
		if _, err := cluster.ListTOC(ctx, tools, path.Join(dir, d)); err != nil {
			return err
		}
	}
	return nil
}
