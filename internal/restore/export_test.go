package restore

import (
	"context"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// WithFree is p where the file systems have that much room.
func (p Physical) WithFree(free func(dir string) (device uint64, free int64, err error)) Physical {
	p.free = free
	return p
}

// Place is where a recovery has what was counted: from one position to another.
func Place(ctx context.Context, res Resolved, t Target, c cluster.Counted, scan Scan) (from, to pg.LSN, why string, err error) {
	pl, why, err := halt(ctx, res, t, c, scan)
	return pl.from, pl.to, why, err
}

// Together makes halts of counts with their places.
func Together(counted []cluster.Counted, from, to []pg.LSN) []Halt {
	var places []place
	for i, c := range counted {
		places = append(places, place{from[i], to[i], c})
	}
	return together(places)
}

// Life is which of a cluster's archives a restore looks at.
func (p Physical) Life(backups []repo.Listed) repo.Archive { return p.life(backups) }
