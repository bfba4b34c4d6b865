package main

import (
	"cmp"
	"context"
	"fmt"
	"io"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/wal"
)

func (c call) pusher(cfg *config.Config, environ []string) wal.Pusher {
	r := cfg.Repository
	p := wal.Pusher{
		Cluster: c.cluster, DataDir: c.pgdata, Host: string(cfg.Host),
		Parallel: cfg.WAL(c.cluster).Parallel,
		Place:    fmt.Sprintf("%v %v %v %v", r.URL, r.Endpoint, r.Region, r.AccessKeyID),
		Connect: func(ctx context.Context, a repo.Archive, instance string) (*repo.Archiver, error) {
			st, err := open.Store(ctx, r)
			if err != nil {
				return nil, err
			}
			access, err := open.Access(cfg, cmp.Or(version, "unknown"))
			return repo.NewArchiver(st, access, a, instance), err
		},
	}
	if !c.adopts() {
		p.Spawn = func(after pg.WALName) error { return c.spawn(environ, pushAhead, "--after", after.String()) }
	}
	return p
}

// claim takes the timeline over, and says from whom.
func (c call) claim(ctx context.Context, cfg *config.Config, out io.Writer) error {
	t, err := c.pusher(cfg, nil).Claim(ctx)
	switch {
	case err != nil:
		return err
	case t.Was:
		fmt.Fprintf(out, "timeline %v of cluster %q is this instance's already\n", t.Timeline, c.cluster)
	case t.From.Number == 0:
		fmt.Fprintf(out, "timeline %v of cluster %q is this instance's now; nobody had claimed it\n", t.Timeline, c.cluster)
	default:
		fmt.Fprintf(out, "timeline %v of cluster %q is this instance's now; until now it was one's on host %s, since %s\n",
			t.Timeline, c.cluster, t.From.Host, wal.When(t.From.ClaimedAt))
	}
	return nil
}
