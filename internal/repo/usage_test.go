package repo_test

import (
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/store"
)

// What is stored is counted once, for the backup that wrote it, and nothing of
// another cluster.
func TestUsage(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	for _, tt := range []struct {
		key   string
		bytes int
	}{
		{"clusters/main/packs/20261122T230633Z-9b561eec/0001.pack", 1},
		{"clusters/main/packs/20261122T230633Z-9b561eec/0002.pack", 20},
		{"clusters/main/backups/20261122T230633Z-9b561eec/manifest.json", 300},
		{"clusters/main/backups/20261123T230633Z-9b561eec/intent.json", 4000},
		{"clusters/main/backups/x/y", 5},
		{"clusters/main/wal/7-15/00000001/000000010000000000000001.zst", 60000},
		{"clusters/main2/wal/7-15/00000001/000000010000000000000001.zst", 7},
	} {
		if err := b.st.Put(ctx, tt.key, strings.NewReader(strings.Repeat("x", tt.bytes)), store.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	u, err := b.r.Usage(ctx, "main")
	if err != nil || len(u) != 2 || u["20261122T230633Z-9b561eec"] != 321 || u["20261123T230633Z-9b561eec"] != 4000 {
		t.Errorf("%+v, %v", u, err)
	}
	if u, err := b.r.Usage(ctx, "none"); err != nil || len(u) != 0 {
		t.Errorf("of a cluster that there is nothing of: %+v, %v", u, err)
	}
}
