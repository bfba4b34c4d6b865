package audit

import (
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Memory is a directory in which looks at a repository note what they found, so
// that the next lists only what is new: see Survey. "" remembers nothing. It is an
// advice: what cannot be read or written there costs requests, and no look.
type Memory string

// Anew is how long what was noted is believed. Then everything is listed again, and
// a segment that was lost in the middle is noticed.
const Anew = 24 * time.Hour

// noted is what stands in a file of it.
type noted struct {
	Repository string    `json:"repository"` // id
	ListedAt   time.Time `json:"listed_at"`  // when all was listed
	Reports    []Report  `json:"reports"`
}

// Take is as Take, with what is remembered as known.
func (m Memory) Take(ctx context.Context, r *repo.Repo, cluster string, now time.Time) ([]Report, error) {
	n := m.recall(cluster)
	if age := now.Sub(n.ListedAt); n.Repository != r.Marker.ID || age < 0 || age > Anew {
		n = noted{Repository: r.Marker.ID, ListedAt: now}
	}
	all, err := Take(ctx, r, cluster, n.Reports, now)
	if err != nil {
		return nil, err
	}
	n.Reports = all
	m.note(cluster, n)
	return all, nil
}

func (m Memory) file(cluster string) string {
	return filepath.Join(string(m), "ledger-"+cluster+".json")
}

func (m Memory) recall(cluster string) (n noted) {
	if m == "" {
		return n
	}
	b, err := os.ReadFile(m.file(cluster))
	if err != nil || json.Unmarshal(b, &n) != nil {
		return noted{}
	}
	return n
}

// note writes what the next look may know. Who may not write there, as one who only
// looks, lists more the next time.
func (m Memory) note(cluster string, n noted) {
	if b, err := json.Marshal(n); m != "" && err == nil {
		_ = durable.WriteFile(m.file(cluster), 0o644, func(w io.Writer) error { // whoever may look there may read it
			_, err := w.Write(b)
			return err
		})
	}
}
