package repo_test

import (
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// longer text. That must not keep later versions from taking backups.
func TestClusterNamedByAnotherVersion(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	clock := func() time.Time { return now }
	for i, version := range []string{"1.2.3-rc.1+longer", "1.2.3", "1.2.3-rc.2"} {
		a := b.host
		a.Version = version
		in := repo.Intent{Ref: repo.Ref{Cluster: "main", ID: repo.NewID(now.Add(time.Duration(i)*time.Hour), "4f2a9c01")}, StartedAt: now}
		if _, err := b.open(t, a).WriteIntent(ctx, in, clock); err != nil {
			t.Errorf("version %s: %v", version, err)
		}
	}
}
