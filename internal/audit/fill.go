package audit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// Fill puts segments and histories that are missing in the archive of a cluster
// into it, as far as the data directory of the server on this host has them: see
// wal.Fill.
func Fill(ctx context.Context, r *repo.Repo, name string, at cluster.Cluster, found []Report) (wal.Filled, error) {
	f, err := at.Facts(ctx)
	if err != nil {
		return wal.Filled{}, err
	}
	if f.DataDirectory == "" {
		return wal.Filled{}, fail.Hint(fmt.Errorf("where the data directory is, PostgreSQL does not say: %w", fail.PGDenied),
			"grant the role pg_read_all_settings")
	}
	done, err := wal.Fill(ctx, r, name, f.DataDirectory, func(n pg.WALName) bool {
		return slices.ContainsFunc(found, func(rep Report) bool {
			return rep.System == f.System && rep.Major == f.Version.Major() &&
				slices.ContainsFunc(rep.Holes, func(h Hole) bool { return h.has(n, f.SegmentSize) })
		})
	})
	if errors.Is(err, fs.ErrPermission) {
		err = fail.Hint(fail.With(fail.PGDenied, err), "only the OS user that runs PostgreSQL may read its data directory: run this, or the worker, as that user")
	}
	return done, err
}
