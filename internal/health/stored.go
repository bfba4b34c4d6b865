// Package health finds out how well a cluster is backed up.
package health

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// Stored is what a repository holds of one cluster.
type Stored struct {
	Cluster  string
	Backups  []Backup       // oldest first, also those not finished
	Archives []audit.Report // of its write-ahead log, one for each system and major version
}

// A Backup is a backup with the restore tests made of it.
type Backup struct {
	repo.Listed
	Tests []Test // oldest first
}

// A Test is a restore test.
type Test struct {
	repo.ListedProof
	Report proof.Report // zero if Err is not nil
}

// Answered reports whether t can be believed, and says something about the
// backup.
func (t Test) Answered() bool { return t.Err == nil && proof.Answered(t.Proof, t.Report) }

// Look reads what the repository holds of a cluster. It takes no key that opens
// data. now is when it begins, and m what earlier looks found.
func Look(ctx context.Context, r *repo.Repo, cluster string, m audit.Memory, now time.Time) (Stored, error) {
	s := Stored{Cluster: cluster}
	all, err := r.Backups(ctx, cluster)
	if err != nil {
		return s, err
	}
	s.Backups = make([]Backup, len(all))
	group, asking := errgroup.WithContext(ctx)
	group.SetLimit(8)
	for i, b := range all {
		s.Backups[i].Listed = b
		group.Go(func() (err error) {
			s.Backups[i].Tests, err = tests(asking, r, b.Ref)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return s, err
	}
	s.Archives, err = m.Take(ctx, r, cluster, now)
	return s, err
}

func tests(ctx context.Context, r *repo.Repo, b repo.Ref) ([]Test, error) {
	all, err := r.Proofs(ctx, b)
	var tests []Test
	for _, p := range all {
		t := Test{ListedProof: p}
		if t.Err == nil {
			if err := json.Unmarshal(p.Report, &t.Report); err != nil {
				t.Err = fmt.Errorf("restore test %s of %s: %w: %w", p.Test, b.ID, err, fail.Corrupt)
			}
		}
		tests = append(tests, t)
	}
	return tests, err
}

// Usable reports whether b was finished, and its manifest can be believed.
func (b Backup) Usable() bool { return b.Err == nil && !b.Unfinished }

// Tested is the newest restore test of b that came to an answer; that holds. It is
// false if there is none: the backup is unproven.
func (b Backup) Tested(now time.Time) (Test, bool) {
	for _, t := range slices.Backward(b.Tests) {
		if t.Answered() && proof.Counts(t.ListedProof, now) {
			return t, true
		}
	}
	return Test{}, false
}

// Sound reports whether b counts, at a time: it is usable, none of its pages was
// damaged, the log that it needs is there, and it is not dated in the future.
func (s Stored) Sound(b Backup, now time.Time) bool {
	return b.Usable() && !Early(b.FinishedAt, now) && (b.Physical == nil || b.Physical.Damaged == 0) && !s.stuck(b.ID)
}

// Early reports whether only a wrong clock can have said t.
func Early(t, now time.Time) bool { return t.After(now.Add(proof.Ahead)) }

func (s Stored) stuck(id repo.ID) bool {
	for _, a := range s.Archives {
		if slices.ContainsFunc(a.Stuck, func(b audit.Base) bool { return b.ID == string(id) }) {
			return true
		}
	}
	return false
}

// Newest is the sound backup that was finished last, of one of these kinds; none
// means any. It is false if there is none.
func (s Stored) Newest(now time.Time, kinds ...repo.Kind) (newest Backup, ok bool) {
	for _, b := range s.Backups {
		if s.Sound(b, now) && among(b.Kind, kinds) && !b.FinishedAt.Before(newest.FinishedAt) {
			newest, ok = b, true
		}
	}
	return newest, ok
}

func among(kind repo.Kind, kinds []repo.Kind) bool {
	return len(kinds) == 0 || slices.Contains(kinds, kind)
}

// Has reports whether there are usable backups of a kind, sound or not.
func (s Stored) Has(kind repo.Kind) bool {
	return slices.ContainsFunc(s.Backups, func(b Backup) bool { return b.Usable() && b.Kind == kind })
}

// Proven is what a restore test has shown.
type Proven struct {
	Backup
	Test Test // its newest
	// Moment is the newest that came back: when the backup was finished, or the
	// last commit that was replayed behind it. Everything newer is hope.
	Moment time.Time
}

// Proven is the newest moment that came back in a restore test of a backup of one
// of these kinds, which is sound and passed its newest test; none means any. It is
// false if there is none.
func (s Stored) Proven(now time.Time, kinds ...repo.Kind) (newest Proven, ok bool) {
	for _, b := range s.Backups {
		t, tested := b.Tested(now)
		if !tested || !t.Passed || !s.Sound(b, now) || !among(b.Kind, kinds) {
			continue
		}
		p := Proven{b, t, b.FinishedAt}
		if at := t.Report.Reached.LastCommit; at.After(p.Moment) && !at.After(t.FinishedAt) { // else a clock is wrong
			p.Moment = at
		}
		if !p.Moment.Before(newest.Moment) {
			newest, ok = p, true
		}
	}
	return newest, ok
}

// Ahead is how far the latest backup or restore test is dated in the future; 0:
// none is.
func (s Stored) Ahead(now time.Time) (most time.Duration) {
	for _, b := range s.Backups {
		if b.Usable() {
			most = max(most, b.FinishedAt.Sub(now))
		}
		for _, t := range b.Tests {
			if t.Err == nil {
				most = max(most, t.FinishedAt.Sub(now))
			}
		}
	}
	return most
}

// Moments are those from From to To, both by clocks of the cluster's side: From
// by the server's, To by the store's.
type Moments struct{ From, To time.Time }

// Window is to which moments an archive leads, from physical backups: ascending,
// and none touches the next. Between two of them, what was archived leads
// nowhere: segments are missing.
func (s Stored) Window(a audit.Report) []Moments {
	var all []Moments
	for _, w := range a.Windows {
		i := slices.IndexFunc(s.Backups, func(b Backup) bool { return string(b.ID) == w.Base.ID })
		if i < 0 {
			continue // taken since
		}
		m := Moments{s.Backups[i].Physical.StoppedAt, w.Archived}
		if m.To.Before(m.From) { // it is not known when the last segment came, or clocks differ
			m.To = m.From
		}
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b Moments) int { return cmp.Or(a.From.Compare(b.From), a.To.Compare(b.To)) })
	var merged []Moments
	for _, m := range all {
		if n := len(merged); n > 0 && !m.From.After(merged[n-1].To) {
			if m.To.After(merged[n-1].To) {
				merged[n-1].To = m.To
			}
			continue
		}
		merged = append(merged, m)
	}
	return merged
}

// Recoverable is the newest run of moments without a gap; false if there is none.
func (s Stored) Recoverable() (newest Moments, ok bool) {
	for _, a := range s.Archives {
		if all := s.Window(a); len(all) > 0 && !all[len(all)-1].To.Before(newest.To) {
			newest, ok = all[len(all)-1], true
		}
	}
	return newest, ok
}

// Until is the newest moment that can be recovered with the log; false if there
// is none.
func (s Stored) Until() (time.Time, bool) {
	m, ok := s.Recoverable()
	return m.To, ok
}

// Holes are all that are known.
func (s Stored) Holes() (holes []audit.Hole) {
	for _, a := range s.Archives {
		holes = append(holes, a.Holes...)
	}
	return holes
}
