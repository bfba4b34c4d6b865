package repo

import (
	"context"
	"strings"
)

// A Usage is how many bytes the objects of a cluster take in the repository, as
// the store lists them.
type Usage struct {
	Backups map[ID]int64 // by the backup that wrote them: also deleted ones, and those in progress
	WAL     int64        // archived, of all systems
}

// Usage lists all objects of a cluster.
func (r *Repo) Usage(ctx context.Context, cluster string) (Usage, error) {
	u := Usage{Backups: make(map[ID]int64)}
	prefix := clusterPrefix(cluster)
	for o, err := range r.st.List(ctx, prefix, "") {
		if err != nil {
			return u, wrap("list", prefix, err)
		}
		area, rest, _ := strings.Cut(strings.TrimPrefix(o.Key, prefix), "/")
		owner, _, _ := strings.Cut(rest, "/")
		switch {
		case area == "wal":
			u.WAL += o.Size
		case (area == "packs" || area == "backups") && idForm.MatchString(owner):
			u.Backups[ID(owner)] += o.Size
		}
	}
	return u, nil
}
