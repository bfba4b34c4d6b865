package activities

import (
	"context"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

func (h *Host) physical(j Job) (*backup.Physical, repo.ID, error) {
	p, ok := h.Physical[j.Cluster]
	if !ok {
		return nil, "", unknownCluster(j.Cluster)
	}
	id, err := repo.ParseID(j.ID)
	return p, id, err
}

// CopyClusterResult is what stands in the repository after CopyCluster.
type CopyClusterResult struct {
	Files    int         `json:"files"`
	Packs    int         `json:"packs"`
	Bytes    int64       `json:"bytes"`
	Stored   int64       `json:"stored"`
	Kept     int64       `json:"kept"` // bytes of files that the repository had already
	Sent     int64       `json:"sent"` // bytes of packs that this attempt sent
	Timeline pg.Timeline `json:"timeline"`
	Start    pg.LSN      `json:"start"`
	Stop     pg.LSN      `json:"stop"`
	Damaged  int         `json:"damaged,omitempty"` // pages
	// How many things kept rows from being counted: the backup itself says which.
	Uncounted int `json:"uncounted,omitempty"`
}

// CopyResult is c for a history: numbers, and no names.
func CopyResult(c backup.Copied) CopyClusterResult {
	return CopyClusterResult{c.Files, c.Packs, c.Bytes, c.Stored, c.Kept, c.Sent, c.StopTimeline, c.Start, c.Stop, c.Damaged, c.Uncounted}
}

// CopyCluster copies the data directory into the repository.
func (h *Host) CopyCluster(ctx context.Context, j Job) (res CopyClusterResult, err error) {
	p, id, err := h.physical(j)
	if err != nil {
		return res, border(ctx, err)
	}
	err = watched(ctx, "copy", h.grace(), usual, func(ctx context.Context, moved moved) error {
		c, err := p.Copy(ctx, id, func(pr repo.Progress) { moved(Progress{Done: pr.Read, Total: pr.Total}) })
		res = CopyResult(c)
		return err
	})
	return res, err
}

// WaitWALResult names the last segment that the copy needs.
type WaitWALResult struct {
	Last string `json:"last"`
}

// WaitWAL waits until the log that the copy needs is in the archive.
func (h *Host) WaitWAL(ctx context.Context, j Job) (res WaitWALResult, err error) {
	p, id, err := h.physical(j)
	if err != nil {
		return res, border(ctx, err)
	}
	err = watched(ctx, "wait for WAL", h.grace(), usual, func(ctx context.Context, moved moved) error {
		res.Last, err = p.WaitWAL(ctx, id, func(done, total int64) { moved(Progress{Done: done, Total: total}) })
		return err
	})
	return res, err
}
