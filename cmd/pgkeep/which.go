package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/suggest"
)

// This file finds out which cluster and which backup are meant.

func clusterFlag() cli.Flag {
	return &cli.StringFlag{Name: "cluster", Usage: "of cluster `NAME`, if there are several"}
}

// repository opens the repository with the keys of this host.
func (e *env) repository(ctx context.Context) (*config.Config, *repo.Repo, error) {
	cfg, err := e.config()
	if err != nil {
		return nil, nil, err
	}
	r, err := open.Repository(ctx, cfg, thisVersion().Version)
	return cfg, r, err
}

// theBackup opens the repository and finds a backup in it, whatever state that
// is in. The latest is the latest of one of these kinds; none means any.
func (e *env) theBackup(ctx context.Context, cluster, what string, kinds ...repo.Kind) (*repo.Repo, repo.Listed, error) {
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return nil, repo.Listed{}, err
	}
	if cluster, err = whichOf(ctx, cfg, r, cluster); err != nil {
		return nil, repo.Listed{}, err
	}
	all, err := r.Backups(ctx, cluster)
	if err != nil {
		return nil, repo.Listed{}, err
	}
	if what == latest && len(kinds) > 0 {
		all = slices.DeleteFunc(all, func(b repo.Listed) bool { return b.Kind != "" && !slices.Contains(kinds, b.Kind) })
	}
	b, err := pick(all, what)
	if err != nil {
		return nil, b, fmt.Errorf("cluster %s: %w", cluster, err)
	}
	return r, b, nil
}

// whichOf is which for a repository and a configuration.
func whichOf(ctx context.Context, cfg *config.Config, r *repo.Repo, name string) (string, error) {
	stored, err := r.Clusters(ctx)
	if err != nil {
		return "", err
	}
	var configured []string
	for n := range cfg.Clusters {
		configured = append(configured, string(n))
	}
	return which(name, configured, stored)
}

// which cluster is meant: the one that is named, else the only one in the
// configuration, else the only one in the repository.
func which(name string, configured, stored []string) (string, error) {
	known := slices.Concat(configured, stored)
	slices.Sort(known)
	known = slices.Compact(known)
	switch {
	case name != "" && slices.Contains(known, name):
		return name, nil
	case name != "":
		return "", fail.Hint(config.Errorf("no cluster %q in the repository, nor in the configuration%s", name, suggest.DidYouMean(name, known)),
			"pgkeep list shows what there is")
	case len(configured) == 1:
		return configured[0], nil
	case len(stored) == 1:
		return stored[0], nil
	case len(known) == 0:
		return "", fail.With(fail.NoBackup, fmt.Errorf("the repository is empty"))
	}
	return "", fail.Hint(config.Errorf("which cluster?"), "name one of: "+strings.Join(known, ", "))
}

// latest is the word for the newest backup.
const latest = "latest"

// pick finds a backup among all those of a cluster, oldest first: by its id, by
// the beginning of it if no other id begins so, or as the latest that was
// finished. If the latest cannot be believed, it is an error: an older one is
// not what was asked for.
func pick(all []repo.Listed, what string) (repo.Listed, error) {
	if what == latest {
		for _, b := range slices.Backward(all) {
			if !b.Unfinished {
				return b, nil
			}
		}
		return repo.Listed{}, fail.With(fail.NoBackup, fmt.Errorf("there is no backup yet"))
	}
	var found []repo.Listed
	var ids []string
	for _, b := range all {
		if what != "" && strings.HasPrefix(string(b.ID), what) {
			found = append(found, b)
			ids = append(ids, string(b.ID))
		}
	}
	switch {
	case len(found) == 1:
		return found[0], nil
	case len(found) == 0:
		return repo.Listed{}, fail.With(fail.NoBackup, fmt.Errorf("there is no backup %q", what))
	}
	if n := len(ids); n > 5 {
		ids = append(ids[:4], fmt.Sprintf("and %d more", n-4))
	}
	return repo.Listed{}, fail.Hint(config.Errorf("%d backups begin with %q", len(found), what), "one of: "+strings.Join(ids, ", "))
}

// finished is the manifest of a backup that can be used.
func finished(b repo.Listed) (repo.Manifest, error) {
	switch {
	case b.Err != nil:
		return repo.Manifest{}, b.Err // it names the object
	case b.Unfinished:
		return repo.Manifest{}, fail.Hint(fail.With(fail.NoBackup, fmt.Errorf("backup %s of cluster %s was not finished", b.ID, b.Cluster)),
			"pgkeep ps shows whether it is being taken; pgkeep list shows those that are done")
	}
	return b.Manifest, nil
}
