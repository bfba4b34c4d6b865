package repo

import (
	"context"
	"fmt"
	"path"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A Claim says who archives a timeline: one instance of a server, that is one
// copy of its data directory. Two clones of a cluster have one system
// identifier, and after a promotion even the same history file, but not the same
// WAL. Of the claims on a timeline, the one with the highest number counts.
type Claim struct {
	Header
	Archive
	Timeline  pg.Timeline `json:"timeline"`
	Number    int         `json:"claim"` // from 1
	Instance  string      `json:"instance"`
	Host      string      `json:"host"`       // where it was then, for people
	ClaimedAt time.Time   `json:"claimed_at"` // UTC
}

func (a Archive) claims(t pg.Timeline) string { return fmt.Sprintf("%sclaims/%v.", a.dir(), t) }

func (a Archive) claimKey(t pg.Timeline, number int) string {
	return fmt.Sprintf("%s%04d.json", a.claims(t), number)
}

// Claim returns the claim on a timeline that counts. It fails with
// store.ErrNotExist where nobody has claimed it. It does not wait for Open.
func (w *Archiver) Claim(ctx context.Context, t pg.Timeline) (Claim, error) {
	prefix, number := w.archive.claims(t), 0
	for o, err := range w.st.List(ctx, prefix, "") {
		if err != nil {
			return Claim{}, wrap("list", prefix, err)
		}
		var n int
		if _, err := fmt.Sscanf(o.Key[len(prefix):], "%d.json", &n); err == nil && o.Key == w.archive.claimKey(t, n) {
			number = max(number, n)
		}
	}
	if number == 0 {
		return Claim{}, fmt.Errorf("claim on timeline %v: %w", t, store.ErrNotExist)
	}
	var c Claim
	key := w.archive.claimKey(t, number)
	if err := (&Repo{st: w.st, access: w.access}).getSigned(ctx, key, "claim", &c); err != nil {
		return Claim{}, err
	}
	if c.Archive != w.archive || c.Timeline != t || c.Number != number || c.Instance == "" {
		return Claim{}, fmt.Errorf("%s: is claim %d on timeline %v of cluster %q: %w", path.Base(key), c.Number, c.Timeline, c.Cluster, fail.Corrupt)
	}
	return c, nil
}

// WriteClaim claims a timeline for the Archiver's instance, after the claim that
// counted until now, which is zero where there was none. It fails with
// store.ErrExist if somebody else did so just now: of two, one succeeds.
func (w *Archiver) WriteClaim(ctx context.Context, t pg.Timeline, after Claim, host string, now time.Time) (Claim, error) {
	r, err := w.repo(ctx) // nothing is sent to what is not our repository
	if err != nil {
		return Claim{}, err
	}
	c := Claim{Header: r.access.header("claim"), Archive: w.archive, Timeline: t, Number: after.Number + 1,
		Instance: w.instance, Host: host, ClaimedAt: now.UTC().Truncate(time.Second)}
	return c, putSigned(ctx, r.st, r.access, w.archive.claimKey(t, c.Number), c)
}
