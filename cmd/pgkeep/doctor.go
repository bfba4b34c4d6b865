package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"
	enumspb "go.temporal.io/api/enums/v1"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/sandbox"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/workflows"
)

func doctorCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "doctor",
		Usage:    "find what goes wrong, or is about to, and how to put it right",
		Category: setUp,
		Description: "It looks at the store and what this host may do there, at keys, at the clusters of\n" +
			"this host and their archiving, at disks, backups, restore tests and schedules. Nothing\n" +
			"is changed, but for a small object that is written to the store and removed. The exit\n" +
			"status is 51 if a finding is critical.\n\n" + examples(
			"pgkeep doctor", "", "pgkeep doctor --json | jq -r '.findings[].name'", "for scripts"),
		Flags: []cli.Flag{clusterFlag(), timeoutFlag("5m"), jsonFlag()},
		Action: func(c *cli.Context) error {
			ctx, cancel := context.WithTimeout(c.Context, timeout(c, 5*time.Minute))
			defer cancel()
			return e.doctor(ctx, c.String("cluster"), c.Bool("json"))
		},
	}
}

// patience is how long the store may take to answer a question: who waits for a
// diagnosis does not wait for the store to come back.
const patience = 30 * time.Second

func (e *env) doctor(ctx context.Context, only string, asJSON bool) error {
	cfg, err := e.config()
	if err != nil {
		return err
	}
	if only != "" {
		if _, err := cfg.Cluster(only); err != nil {
			return err
		}
	}
	bucket, r, err := e.askBucket(ctx, cfg)
	if err != nil {
		return err
	}
	found := bucket.Findings(health.Part{Writes: len(writes(cfg)) > 0, Deletes: expires(cfg)})
	work, noTemporal := e.askTemporal(ctx, cfg)
	if noTemporal != nil {
		found = append(found, health.Finding{Name: string(fail.TemporalDown), Severity: health.Warning, What: "nothing is known of schedules: " + oneLine(noTemporal.Error()), Fix: fail.HintOf(noTemporal)})
	}
	if len(cfg.Clusters) == 0 {
		found = append(found, health.Finding{Name: "no-cluster", Severity: health.Warning, What: "the configuration names no cluster: there is nothing to back up", Fix: "describe one under clusters in the configuration"})
	}
	var dumps, sandboxes int64 // bytes that are needed for the largest cluster
	for _, name := range slices.Sorted(maps.Keys(cfg.Clusters)) {
		if only != "" && string(name) != only {
			continue
		}
		x, err := e.examine(ctx, cfg, r, string(name))
		if err != nil {
			return err
		}
		found = append(found, x.found...)
		if x.duty.Logical {
			dumps = max(dumps, x.bytes)
		}
		if slices.Contains(x.kinds, string(config.KindRestoreTest)) {
			sandboxes = max(sandboxes, x.bytes)
		}
		if noTemporal == nil {
			found = append(found, work[name].Findings(time.Now())...)
		}
	}
	spool := health.AskDisk("dumps, and packs not yet sent", string(cfg.Spool), true)
	spool.Needs = dumps
	found = append(found, spool.Findings("")...)
	if sandboxes > 0 {
		d := health.AskDisk("restore tests", string(cfg.RestoreTest.Directory), true)
		d.Needs = sandboxes
		found = append(found, d.Findings("")...)
		if d.Err == nil {
			found = append(found, tryIsolation(ctx, cfg)...)
		}
	}
	return e.printFindings("doctor", found, asJSON)
}

// tryIsolation looks whether a restore test would be kept apart from this host.
func tryIsolation(ctx context.Context, cfg *config.Config) []health.Finding {
	opt := sandboxOf(cfg, nil)
	id, _ := newRun()
	opt.Name = string(id)
	s, err := sandbox.Make(ctx, opt)
	var is sandbox.Isolation
	if err == nil {
		defer s.Remove()
		is, err = s.Try()
	}
	switch {
	case err != nil:
		return []health.Finding{{Name: "isolation", Severity: health.Critical, What: "no restore test can be made here: " + oneLine(err.Error()), Fix: fail.HintOf(err)}}
	case !is.Network || !is.Processes || !is.Files:
		return []health.Finding{{Name: "isolation", Severity: health.Warning,
			What: "restored data is not kept apart from this host: a superuser of the source can reach whatever the server of a restore test can",
			Fix:  "set restore_test.isolation: required, and do what pgkeep doctor says then"}}
	}
	return nil
}

// writes are the clusters that this host takes backups of.
func writes(cfg *config.Config) (names []string) {
	for _, name := range slices.Sorted(maps.Keys(cfg.Clusters)) {
		if host := cfg.Clusters[name].Host; host == "" || host == cfg.Host {
			names = append(names, string(name))
		}
	}
	return names
}

// askTemporal learns what Temporal is to do for each cluster of the
// configuration, and whether there is anybody to do it.
func (e *env) askTemporal(ctx context.Context, cfg *config.Config) (map[config.Name]health.Work, error) {
	s, err := e.temporal(ctx)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	schedules, err := e.schedulesOn(ctx, s)
	if err != nil {
		return nil, err
	}
	all := make(map[config.Name]health.Work)
	for name, c := range cfg.Clusters {
		w := health.Work{Cluster: string(name), Have: schedules[string(name)], Wanted: scheduled(cfg, string(name)), Host: string(cmp.Or(c.Host, cfg.Host)), Keeps: !c.Retention.IsZero()}
		queue, err := s.DescribeTaskQueue(ctx, workflows.HostQueue(w.Host), enumspb.TASK_QUEUE_TYPE_ACTIVITY)
		if err != nil {
			return nil, fmt.Errorf("ask who serves host %s: %w", w.Host, err)
		}
		for _, poller := range queue.Pollers { // the server remembers one for some minutes
			w.Served = w.Served || time.Since(poller.LastAccessTime.AsTime()) < 2*time.Minute
		}
		all[name] = w
	}
	return all, nil
}

// expires reports whether this host is to remove what is not needed any more.
func expires(cfg *config.Config) bool {
	for _, c := range cfg.Clusters {
		if host := c.Expirer(); !c.Retention.IsZero() && (host == "" || host == cfg.Host) {
			return true
		}
	}
	return false
}

// askBucket looks at the repository from the outside; r is nil if it does not
// open, and the findings say why.
func (e *env) askBucket(ctx context.Context, cfg *config.Config) (b health.Bucket, r *repo.Repo, err error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	st, access, err := storeAndKeys(ctx, cfg)
	if err != nil {
		return b, nil, err
	}
	keys := []string{"probe/" + string(cfg.Host)}
	if names := slices.Sorted(maps.Keys(cfg.Clusters)); len(names) > 0 { // where policies let somebody write
		keys = []string{"clusters/" + string(names[0]) + "/wal/probe/" + string(cfg.Host)}
	}
	for _, name := range writes(cfg) {
		keys = append(keys, "clusters/"+name+"/packs/probe/"+string(cfg.Host))
	}
	b = health.AskBucket(ctx, st, access, keys...)
	b.Wanted = cfg.Keys.Recipients
	if b.Err == nil {
		r, b.Err = repo.Open(ctx, st, access)
	}
	return b, r, nil
}

// An examination is what doctor learnt of one cluster.
type examination struct {
	found []health.Finding
	kinds []string // of its schedules
	duty  health.Duty
	bytes int64 // of its databases; 0: not known
}

// examine looks at a cluster: at what the repository, if it opens, holds of it,
// and at its server if it is of this host.
func (e *env) examine(ctx context.Context, cfg *config.Config, r *repo.Repo, name string) (x examination, err error) {
	now := time.Now()
	x.kinds = scheduled(cfg, name)
	audits := slices.Contains(x.kinds, string(config.KindWALAudit)) // of a log that is archived
	x.duty = health.Duty{Physical: audits || slices.Contains(x.kinds, string(repo.Physical)), Logical: slices.Contains(x.kinds, string(repo.Logical))}
	if r != nil {
		looking, cancel := context.WithTimeout(ctx, 10*patience)
		defer cancel()
		s, err := health.Look(looking, r, name, audit.Memory(cfg.Spool), now)
		if err != nil {
			x.found = append(x.found, health.Finding{Name: "repository", Severity: health.Critical, Cluster: name, What: "the repository cannot be read: " + oneLine(err.Error()), Fix: fail.HintOf(err)})
		} else {
			x.found = append(x.found, s.Findings(expected(cfg, name), now)...)
		}
		if k := cfg.Clusters[config.Name(name)]; k.Retention.Lock > 0 && (k.Expirer() == "" || k.Expirer() == cfg.Host) {
			mode := store.Governance
			if k.Retention.LockMode == config.LockCompliance {
				mode = store.Compliance
			}
			x.found = append(x.found, health.AskLocks(looking, r, name, mode, k.Retention.Lock, now).Findings(now)...)
		}
		x.duty.Physical, x.duty.Logical = x.duty.Physical || s.Has(repo.Physical), x.duty.Logical || s.Has(repo.Logical)
	}
	settings := cfg.Clusters[config.Name(name)]
	if settings.Host != "" && settings.Host != cfg.Host {
		return x, nil
	}
	at, err := reach(settings)
	if err != nil {
		return x, err
	}
	server := health.AskServer(ctx, name, at, x.duty)
	x.found = append(x.found, server.Findings(x.duty)...)
	for _, db := range server.Databases {
		x.bytes += max(0, db.Bytes)
	}
	if server.DataDirectory != "" {
		if d := health.AskDisk("the data directory, with pg_wal", server.DataDirectory, false); d.Err == nil { // it may be elsewhere, or closed to us
			x.found = append(x.found, d.Findings(name)...)
		}
	}
	return x, nil
}

// scheduled are the kinds of what the configuration has Temporal start for a
// cluster.
func scheduled(cfg *config.Config, cluster string) (kinds []string) {
	for _, s := range cfg.Schedules {
		if string(s.Cluster) == cluster {
			kinds = append(kinds, string(s.Kind))
		}
	}
	return kinds
}

// expected is what the schedules of a cluster promise: a backup may be late by
// half of the time between two, as a run takes its time.
func expected(cfg *config.Config, cluster string) health.Policy {
	p := health.Policy{Age: make(map[repo.Kind]time.Duration), Proof: cfg.RestoreTest.Within}
	for _, s := range cfg.Schedules {
		kind := repo.Kind(s.Kind)
		if every := s.Cron.Every(); string(s.Cluster) == cluster && every > 0 && (kind == repo.Physical || kind == repo.Logical) {
			p.Age[kind] = every + every/2 + s.Jitter
		}
	}
	return p
}

// printFindings is the answer of doctor and check. The error says that some are
// critical.
func (e *env) printFindings(command string, found []health.Finding, asJSON bool) error {
	slices.SortStableFunc(found, health.BySeverity)
	if asJSON {
		err := printJSON(e.out, command, struct {
			Findings []health.Finding `json:"findings"`
		}{append([]health.Finding{}, found...)})
		return errors.Join(err, critical(command, found))
	}
	for _, f := range found {
		of := ""
		if f.Cluster != "" {
			of = f.Cluster + ": "
		}
		fmt.Fprintf(e.out, "%-8s  %s\n", f.Severity, f.Name)
		for _, line := range wrap(of+f.What, e.width()-10) {
			fmt.Fprintf(e.out, "          %s\n", line)
		}
		fmt.Fprintf(e.out, "          fix: %s\n", f.Fix) // whole: it is copied
	}
	if len(found) == 0 {
		fmt.Fprintln(e.out, "nothing is wrong")
	}
	return critical(command, found)
}

// critical is an error if a finding is.
func critical(command string, found []health.Finding) error {
	n := 0
	var names []string
	for _, f := range found {
		if f.Severity == health.Critical {
			n++
			names = append(names, f.Name)
		}
	}
	if n == 0 {
		return nil
	}
	slices.Sort(names)
	err := fail.With(fail.Unhealthy, fmt.Errorf("%s: %s", count(n, "critical finding"), strings.Join(slices.Compact(names), ", ")))
	if command == "doctor" { // which looks at everything
		return fail.Hint(err, "each finding says how to put it right")
	}
	return err
}
