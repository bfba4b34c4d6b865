package repo

import (
	"context"
	"strings"
)

// Usage lists what backups of a cluster take in the repository: how many bytes the
// objects have, by the backup that wrote them, also of deleted ones and of those in
// progress.
func (r *Repo) Usage(ctx context.Context, cluster string) (map[ID]int64, error) {
	u := make(map[ID]int64)
	for _, area := range []string{"backups/", "packs/"} {
		prefix := clusterPrefix(cluster) + area
		for o, err := range r.st.List(ctx, prefix, "") {
			if err != nil {
				return nil, wrap("list", prefix, err)
			}
			if owner, _, _ := strings.Cut(strings.TrimPrefix(o.Key, prefix), "/"); idForm.MatchString(owner) {
				u[ID(owner)] += o.Size
			}
		}
	}
	return u, nil
}
