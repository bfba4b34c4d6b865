package main

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"time"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/workflows"
)

// backupDirect takes a backup in this process: the steps of the workflow, one
// after the other. Nobody repeats one that fails.
func (e *env) backupDirect(ctx context.Context, cfg *config.Config, name string, settings config.Cluster, opt backupOptions) error {
	if settings.Host != "" && settings.Host != cfg.Host {
		return fail.Hint(config.Errorf("--direct: cluster %s is of host %s, this is %s", name, settings.Host, cfg.Host), "run it there")
	}
	log, err := e.log()
	if err != nil {
		return err
	}
	st, access, err := storeAndKeys(ctx, cfg)
	if err != nil {
		return err
	}
	id, started := newRun()
	bars := &stages{e: e}
	defer bars.End()
	if opt.Kind == workflows.Logical {
		l, err := logicalOf(cfg, name, st, access, log)
		if err != nil {
			return err
		}
		if len(opt.Databases) > 0 {
			l.Databases, l.Exclude = opt.Databases, nil
		}
		res, err := directLogical(ctx, l, id, started, bars)
		if err != nil {
			return fmt.Errorf("backup %s: %w", id, err)
		}
		bars.End()
		return e.printLogical(name, "", res, opt.JSON)
	}
	p, err := physicalOf(cfg, name, st, access, log)
	if err != nil {
		return err
	}
	res, damaged, err := directPhysical(ctx, p, id, started, bars)
	if err != nil {
		return fmt.Errorf("backup %s: %w", id, err)
	}
	bars.End()
	if err := e.printPhysical(name, "", res, opt.JSON); err != nil {
		return err
	}
	return damaged
}

func directPhysical(ctx context.Context, p *backup.Physical, id repo.ID, started time.Time, bars *stages) (res workflows.PhysicalBackupResult, damaged, err error) {
	seen, err := p.Preflight(ctx, id, started, backup.Owner{})
	if err != nil {
		return res, nil, err
	}
	c, err := p.Copy(ctx, id, func(pr repo.Progress) { bars.Set("copy", pr.Read, pr.Total) })
	if err != nil {
		return res, nil, err
	}
	rep, err := p.Verify(ctx, id, func(pr repo.Progress) { bars.Set("verify", pr.Read, pr.Total) })
	if err != nil { // meanwhile the server archives the last segment
		return res, nil, err
	}
	last, err := p.WaitWAL(ctx, id, func(done, total int64) { bars.Set("wait for WAL", done, total) })
	if err != nil {
		return res, nil, err
	}
	m, err := p.Publish(ctx, id, backup.Published{Seen: seen, Verified: rep.Verified, Started: started})
	if err != nil {
		return res, nil, err
	}
	res = workflows.PhysicalBackupResult{ID: string(id), Copy: activities.CopyResult(c), LastWAL: last, Verified: string(rep.Verified), Finished: m.FinishedAt}
	return res, c.Err(id), nil
}

func directLogical(ctx context.Context, l *backup.Logical, id repo.ID, started time.Time, bars *stages) (res workflows.LogicalBackupResult, err error) {
	defer func() {
		tidy, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		if cerr := l.CleanUp(tidy, id); err == nil {
			err = cerr
		}
	}()
	seen, err := l.Preflight(ctx, id, started, backup.Owner{})
	if err != nil {
		return res, err
	}
	d, err := l.Dump(ctx, id, func(bytes int64) { bars.Set("dump", bytes, 0) })
	if err != nil {
		return res, err
	}
	c, err := l.Upload(ctx, id, func(pr repo.Progress) { bars.Set("upload", pr.Read, pr.Total) })
	if err != nil {
		return res, err
	}
	lsn, err := l.RecordLSN(ctx, d.Span())
	if err != nil {
		return res, err
	}
	rep, err := l.Verify(ctx, id, func(pr repo.Progress) { bars.Set("verify", pr.Read, pr.Total) })
	if err != nil {
		return res, err
	}
	m, err := l.Publish(ctx, id, backup.Published{Seen: seen, LSN: lsn, Verified: rep.Verified, Started: started})
	if err != nil {
		return res, err
	}
	return workflows.LogicalBackupResult{ID: string(id), Databases: len(d.Databases), Bytes: c.Bytes, Stored: c.Stored, Packs: c.Packs,
		LSN: activities.RecordLSNResult{LSN: lsn}, Verified: string(rep.Verified), Finished: m.FinishedAt}, nil
}

// newRun names a run that no workflow names: its id, and when it began.
func newRun() (repo.ID, time.Time) {
	random := make([]byte, 4)
	rand.Read(random) // never fails, by its documentation
	started := time.Now().UTC().Truncate(time.Millisecond)
	return repo.NewID(started, hex.EncodeToString(random)), started
}
