package wal

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// Push archives the file at path, which PostgreSQL calls name. When it returns
// nil, the whole file is durable in the repository. A file that cannot be one of
// this server is refused before anything is sent: fail.WrongSystem if it is
// another's, fail.Corrupt if it is none.
func Push(ctx context.Context, r *repo.Repo, cluster string, s Server, path string) error {
	n, err := pg.ParseWALName(filepath.Base(path))
	if err != nil {
		return fail.With(fail.BadConfig, err)
	}
	content, err := readFile(path, maxFile)
	if err != nil {
		return fmt.Errorf("push %v: %w", n, err)
	}
	if err := check(n, s, content); err != nil {
		err = fmt.Errorf("push %v: %w", n, err)
		if errors.Is(err, fail.Corrupt) {
			err = fail.Hint(err, "the file in the data directory is not what its name says, and nothing was sent; is the disk sound?")
		}
		return err
	}
	return r.PutWAL(ctx, s.archive(cluster), n, content)
}
