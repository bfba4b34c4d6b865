package main

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/notify"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// reach returns how to reach a cluster.
func reach(c config.Cluster) (cluster.Cluster, error) {
	password, err := c.Password()
	return cluster.Cluster{Conninfo: string(c.Conninfo), Password: password.Reveal(), BinDir: string(c.BinDir)}, err
}

// clusterOf returns the settings of a cluster, and how to reach it.
func clusterOf(c *config.Config, name string) (config.Cluster, cluster.Cluster, error) {
	settings, err := c.Cluster(name)
	if err != nil {
		return settings, cluster.Cluster{}, err
	}
	at, err := reach(settings)
	return settings, at, err
}

// storeAndKeys returns the store of the repository, and the keys to it that this
// host has.
func storeAndKeys(ctx context.Context, c *config.Config) (store.Store, repo.Access, error) {
	st, err := open.Store(ctx, c.Repository)
	if err != nil {
		return nil, repo.Access{}, err
	}
	access, err := open.Access(c, thisVersion().Version)
	return st, access, err
}

// logicalOf returns who takes the logical backups of a cluster on this host.
func logicalOf(c *config.Config, name string, st store.Store, a repo.Access, log *slog.Logger) (*backup.Logical, error) {
	settings, at, err := clusterOf(c, name)
	if err != nil {
		return nil, err
	}
	s := settings.Logical
	return &backup.Logical{Name: name, Host: string(c.Host), Cluster: at, Spool: string(c.Spool), Log: log,
		Open:      func(ctx context.Context) (*repo.Repo, error) { return repo.Open(ctx, st, a) },
		Databases: s.Databases, Exclude: s.Exclude, Jobs: s.Jobs, RolePasswords: s.RolePasswords,
		StallAfter: s.StallTimeout, LockWait: s.LockWait}, nil
}

// physicalOf returns who takes the physical backups of a cluster on this host.
func physicalOf(c *config.Config, name string, st store.Store, a repo.Access, log *slog.Logger) (*backup.Physical, error) {
	settings, at, err := clusterOf(c, name)
	if err != nil {
		return nil, err
	}
	s := settings.Physical
	var count []pg.TablePattern
	for _, t := range s.CountRows {
		count = append(count, t.Pattern())
	}
	return &backup.Physical{Name: name, Host: string(c.Host), Cluster: at, Spool: string(c.Spool), Log: log,
		Open:    func(ctx context.Context) (*repo.Repo, error) { return repo.Open(ctx, st, a) },
		Readers: s.Readers, SpreadCheckpoint: s.SpreadCheckpoint, WALWait: s.WALWait, CountRows: count,
		Pace: backup.Pace{Rate: int64(s.Rate), MaxLag: int64(s.MaxStandbyLag), MaxLatency: s.MaxReadLatency}}, nil
}

// notifierOf returns who tells people how runs end; nil if there is nobody to tell.
func notifierOf(c config.Notify) (*notify.Notifier, error) {
	webhook, ping, err := c.Addresses()
	if err != nil {
		return nil, fmt.Errorf("notify: %w", err)
	}
	if webhook.Reveal() == "" && ping.Reveal() == "" {
		return nil, nil
	}
	n, err := notify.New(webhook.Reveal(), ping.Reveal(), c.All)
	if err != nil {
		return nil, fmt.Errorf("notify: %w", err)
	}
	return n, nil
}
