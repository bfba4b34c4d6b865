package wal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// may says whether this instance may write a file: if the timeline is its own,
// or it is the first to archive it. A server in recovery does not come first:
// with archive_mode=always it archives beside its primary.
//
// The last, partial segment of a timeline is nobody's: every server that leaves the
// timeline archives its own.
func (p *push) may(ctx context.Context, n pg.WALName) error {
	if n.Kind == pg.Partial {
		return nil
	}
	own := n.Timeline == p.server.Timeline
	if own && time.Now().UnixNano()-p.confirmed.Load() < int64(lookAbout) {
		return nil
	}
	asked := time.Now()
	c, err := p.archiver.Claim(ctx, n.Timeline)
	if errors.Is(err, store.ErrNotExist) {
		if p.server.Recovering {
			return fail.Hint(fmt.Errorf("nobody archives timeline %v yet, and a standby does not begin: %w", n.Timeline, fail.TimelineTaken),
				"its primary archives first. If the primary is not meant to, give the timeline to this server: pgkeep-wal claim, in its data directory")
		}
		c, err = p.claim(ctx, n.Timeline, repo.Claim{})
	}
	if err != nil {
		return err
	}
	if c.Instance == p.instance.ID {
		if own {
			p.confirmed.Store(asked.UnixNano())
		}
		return nil
	}
	if shared, err := p.shared(ctx, n); shared || err != nil {
		return err
	}
	return taken(c)
}

// claim writes the claim after another one, and returns the one that counts.
func (p *push) claim(ctx context.Context, t pg.Timeline, after repo.Claim) (repo.Claim, error) {
	c, err := p.archiver.WriteClaim(ctx, t, after, p.Host, time.Now())
	if errors.Is(err, store.ErrExist) {
		return p.archiver.Claim(ctx, t)
	}
	return c, err
}

func taken(c repo.Claim) error {
	return fmt.Errorf("timeline %v of cluster %q is archived by another instance, on host %s since %s: %w",
		c.Timeline, c.Cluster, c.Host, When(c.ClaimedAt), fail.TimelineTaken)
}

// When writes the time of a claim for people.
func When(t time.Time) string { return t.Format(time.DateTime + " MST") }

// shared reports whether a file of an older timeline belongs to the past of one
// that this instance has claimed. What its primary did not live to archive is the
// same there and here.
func (p *push) shared(ctx context.Context, n pg.WALName) (bool, error) {
	if n.Timeline >= p.server.Timeline {
		return false, nil
	}
	text, err := os.ReadFile(filepath.Join(p.DataDir, "pg_wal", pg.HistoryName(p.server.Timeline).String()))
	if err != nil {
		return false, nil // no proof
	}
	forks, err := pg.ParseHistory(p.server.Timeline, string(text))
	if err != nil {
		return false, nil
	}
	for _, f := range forks {
		if f.Timeline != n.Timeline {
			continue
		}
		if n.Kind != pg.History {
			start, err := n.Start(p.server.SegmentSize)
			if err != nil || start+pg.LSN(p.server.SegmentSize) > f.At {
				return false, nil
			}
		}
		c, err := p.archiver.Claim(ctx, p.server.Timeline)
		if errors.Is(err, store.ErrNotExist) {
			return false, nil
		}
		return err == nil && c.Instance == p.instance.ID, err
	}
	return false, nil
}

// A Taking is what Claim did.
type Taking struct {
	Timeline pg.Timeline
	From     repo.Claim // zero: nobody had claimed it
	Was      bool       // it was this instance's already
}

// Claim takes the server's timeline over, so that this instance archives it and
// no other. It fails with fail.TimelineTaken if another instance did so at the
// same moment.
func (p Pusher) Claim(ctx context.Context) (Taking, error) {
	j, err := p.begin()
	if err != nil {
		return Taking{}, err
	}
	if err := j.connect(ctx); err != nil {
		return Taking{}, err
	}
	t := Taking{Timeline: j.server.Timeline}
	if err := j.archiver.Open(ctx); err != nil {
		return Taking{}, err
	}
	t.From, err = j.archiver.Claim(ctx, t.Timeline)
	if err != nil && !errors.Is(err, store.ErrNotExist) {
		return Taking{}, err
	}
	if t.From.Instance == j.instance.ID {
		t.Was = true
		return t, nil
	}
	c, err := j.claim(ctx, t.Timeline, t.From)
	if err == nil && c.Instance != j.instance.ID {
		err = taken(c)
	}
	return t, err
}
