package main

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
)

func deleteCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "delete",
		Usage:     "remove one backup from the repository",
		ArgsUsage: "BACKUP",
		Category:  backups,
		Description: "BACKUP is a whole id: neither the beginning of one nor \"latest\" will do. What\n" +
			"was deleted cannot be brought back. Run again, it finishes what was cut short.\n\n" + examples(
			"pgkeep delete 20261122T013000Z-4f2a9c01", "asks first",
			"pgkeep delete --yes 20261122T013000Z-4f2a9c01", "for scripts"),
		Flags: []cli.Flag{
			clusterFlag(),
			boolFlag("yes", "do not ask"),
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			return e.delete(c.Context, deleteOptions{Cluster: c.String("cluster"), Backup: c.Args().First(), Yes: c.Bool("yes"), JSON: c.Bool("json")})
		},
	}
}

type deleteOptions struct {
	Cluster   string
	Backup    string
	Yes, JSON bool
}

func (e *env) delete(ctx context.Context, opt deleteOptions) error {
	id, err := repo.ParseID(opt.Backup)
	if err != nil {
		return err
	}
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return err
	}
	name, err := whichOf(ctx, cfg, r, opt.Cluster)
	if err != nil {
		return err
	}
	all, err := r.Backups(ctx, name)
	if err != nil {
		return err
	}
	b, about := describe(all, repo.Ref{Cluster: name, ID: id}, time.Now())
	if !opt.Yes {
		if err := e.confirm(ctx, "delete "+about); err != nil {
			return err
		}
	}
	objects, err := r.Delete(ctx, b.Ref, time.Now())
	if err != nil {
		return fmt.Errorf("delete %s: %w", id, err)
	}
	if opt.JSON {
		return printJSON(e.out, "delete", struct {
			repo.Ref
			Objects int   `json:"objects"`
			Stored  int64 `json:"stored"` // bytes, if the manifest told
		}{b.Ref, objects, b.Stored})
	}
	_, err = fmt.Fprintf(e.out, "deleted %s: %s\n", about, count(objects, "object"))
	return err
}

// describe says which backup it is, so that nobody deletes another than the one
// that is meant.
func describe(all []repo.Listed, ref repo.Ref, now time.Time) (repo.Listed, string) {
	b, complete := repo.Listed{Manifest: repo.Manifest{Ref: ref}}, 0
	for _, other := range all {
		if other.ID == ref.ID {
			b = other
		}
		if !other.Unfinished && other.Err == nil {
			complete++
		}
	}
	text := fmt.Sprintf("backup %s of cluster %s, %s old", ref.ID, ref.Cluster, span(now.Sub(ref.ID.Time())))
	switch {
	case b.Unfinished:
		text += ", not finished: maybe it is being taken"
	case b.Err != nil:
		text += ", damaged"
	case b.Stored > 0 && complete == 1:
		text += ", " + size(b.Stored) + ", the only one there is"
	case b.Stored > 0:
		text += ", " + size(b.Stored)
	}
	return b, text
}

// confirm asks, where there is somebody to ask.
func (e *env) confirm(ctx context.Context, what string) error {
	f, ok := e.in.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		return fail.Hint(config.Errorf("%s: not without --yes, as there is no terminal to ask on", what), "add --yes before the id")
	}
	fmt.Fprintf(e.errw, "%s? Type yes: ", what)
	answers := make(chan string, 1)
	go func() { answers <- firstLine(e.in) }() // nothing interrupts this read but the end of the process
	select {
	case answer := <-answers:
		if answer != "yes" {
			return fail.With(fail.Cancelled, fmt.Errorf("nothing was deleted"))
		}
		return nil
	case <-ctx.Done():
		fmt.Fprintln(e.errw)
		return ctx.Err()
	}
}

func firstLine(r io.Reader) string {
	line, _ := bufio.NewReader(r).ReadString('\n') // an error is no "yes"
	return strings.TrimSpace(line)
}
