package main

import (
	"context"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/urfave/cli/v2"
	"go.temporal.io/sdk/client"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/metrics"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/worker"
)

func workerCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "worker",
		Usage:    "serve this host: take the backups that Temporal asks for",
		Category: setUp,
		Description: "Runs until SIGINT or SIGTERM. What is being done then has some seconds to finish; the rest\n" +
			"goes on from where it was when a worker is there again.\n\n" + examples(
			"pgkeep worker", "as systemd or a container starts it"),
		Flags: []cli.Flag{
			&cli.DurationFlag{Name: "grace", Usage: "let what runs go on for `DURATION` after the signal", Value: 15 * time.Second},
		},
		Action: func(c *cli.Context) error { return e.worker(c.Context, c.Duration("grace")) },
	}
}

// worker serves the clusters of this host until ctx ends. That is how it is
// told to stop: no failure.
func (e *env) worker(ctx context.Context, grace time.Duration) error {
	cfg, err := e.config()
	if err != nil {
		return err
	}
	log, err := e.log()
	if err != nil {
		return err
	}
	st, access, err := storeAndKeys(ctx, cfg)
	if err != nil {
		return err
	}
	if access.Signer == nil {
		return fail.Hint(config.Errorf("no signing key: nothing this host writes would be believed"), "pgkeep init makes one")
	}
	var logical []*backup.Logical
	var physical []*backup.Physical
	var audits []*audit.Auditor
	var expirers []*expire.Expirer
	promises := make(map[string]metrics.Promise)
	for _, name := range slices.Sorted(maps.Keys(cfg.Clusters)) {
		if host := cfg.Clusters[name].Expirer(); !cfg.Clusters[name].Retention.IsZero() && (host == "" || host == cfg.Host) {
			expirers = append(expirers, expirer(cfg, string(name), func(ctx context.Context) (*repo.Repo, error) { return repo.Open(ctx, st, access) }))
		}
		if host := cfg.Clusters[name].Host; host != "" && host != cfg.Host {
			continue
		}
		l, err := logicalOf(cfg, string(name), st, access, log)
		if err != nil {
			return err
		}
		p, err := physicalOf(cfg, string(name), st, access, log)
		if err != nil {
			return err
		}
		logical, physical = append(logical, l), append(physical, p)
		audits = append(audits, &audit.Auditor{Name: l.Name, Cluster: l.Cluster, Open: l.Open})
		promises[l.Name] = metrics.Promise{Window: cfg.Clusters[name].Retention.Window, Backups: expected(cfg, l.Name), Schedules: scheduled(cfg, l.Name)}
	}
	if len(logical)+len(expirers) == 0 {
		return config.Errorf("no cluster of host %s in the configuration: nothing to serve", cfg.Host)
	}
	notifier, err := notifierOf(cfg.Notify)
	if err != nil {
		return err
	}
	measured, stop, err := serveMetrics(ctx, string(cfg.Metrics.Listen), metrics.Options{Clusters: audits, Log: log, Memory: audit.Memory(cfg.Spool), Promises: promises})
	if err != nil {
		return err
	}
	defer stop()
	s, err := e.temporalAtLast(ctx, measured.Temporal())
	if err != nil {
		return err
	}
	defer s.Close()
	measured.Connected(s.Client)
	return worker.Run(ctx, worker.Options{Client: s.Client, Namespace: s.namespace, Host: string(cfg.Host), Logical: logical, Physical: physical, Audits: audits, Expirers: expirers,
		Notifier: notifier, Store: st, Log: log, Grace: grace, Tests: testerOf(cfg, st, access, log), Restore: func(ctx context.Context, q activities.RestoreRequest) (restore.Physical, error) {
			r, err := repo.Open(ctx, st, access)
			if err != nil {
				return restore.Physical{}, err
			}
			return prepareAllowed(cfg, r, q)
		}})
}

// serveMetrics begins to serve metrics at an address, if there is one, until stop
// is called: before Temporal is there, which is when they are looked at.
func serveMetrics(ctx context.Context, listen string, opt metrics.Options) (m *metrics.Metrics, stop func(), err error) {
	if m, err = metrics.New(opt); err != nil || listen == "" {
		return m, func() {}, err
	}
	l, err := net.Listen("tcp", listen)
	if err != nil {
		return nil, nil, config.Errorf("metrics.listen: %w", err)
	}
	opt.Log.Info("metrics are served", "url", "http://"+l.Addr().String()+"/metrics")
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := m.Serve(ctx, l); err != nil { // backups go on
			opt.Log.Error("metrics are not served any more", "error", err)
		}
	})
	return m, func() { cancel(); wg.Wait() }, nil
}

// temporalAtLast connects to the server, and waits for it as long as it takes:
// at boot the worker may well be there first.
func (e *env) temporalAtLast(ctx context.Context, m client.MetricsHandler) (*server, error) {
	for wait, said := time.Second, false; ; wait = min(2*wait, 30*time.Second) {
		s, err := e.dial(ctx, m)
		if err == nil || fail.KindOf(classify(ctx, err)) != fail.TemporalDown {
			return s, err
		}
		if !said {
			e.say("waiting for Temporal: %v", err)
			said = true
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(wait):
		}
	}
}
