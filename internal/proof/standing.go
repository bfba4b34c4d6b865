package proof

import (
	"encoding/json"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A State says what restore tests have shown of a backup.
type State string

const (
	Unproven State = "unproven" // nobody has seen it work, or not lately
	Proven   State = "proven"
	Refuted  State = "refuted" // the newest test that came to an answer found something wrong
)

// A Standing is what restore tests say about a backup. The zero Standing is
// that of one that was never tested.
type Standing struct {
	Passed bool       // the newest test with an answer passed
	At     time.Time  // when a test passed last; zero: never
	Last   repo.Proof // the newest test with an answer; zero: there was none
	Report Report     // its report, without findings
	// Trouble is a newer test that came to no answer: a disk was full, say.
	// Zero: there is none. Troubled is its report.
	Trouble  repo.Proof
	Troubled Report
}

// Ahead is how far the clock that dated a backup or a test may be before ours.
// What is dated later comes from a clock that is wrong, or ours is: nobody knows
// how old it is, and it counts for nothing.
const Ahead = 5 * time.Minute

// Counts reports whether a proof can be believed, at a time.
func Counts(p repo.ListedProof, now time.Time) bool {
	return p.Err == nil && !p.FinishedAt.After(now.Add(Ahead))
}

// Judge reads the proofs of a backup, oldest first, as repo.Proofs lists them. One
// that does not count says nothing.
func Judge(proofs []repo.ListedProof, now time.Time) (s Standing) {
	for _, p := range proofs {
		var rep Report
		if !Counts(p, now) || json.Unmarshal(p.Report, &rep) != nil {
			continue
		}
		if !Answered(p.Proof, rep) {
			s.Trouble, s.Troubled = p.Proof, rep
			continue
		}
		s.Passed, s.Last, s.Report = p.Passed, p.Proof, rep
		s.Trouble, s.Troubled = repo.Proof{}, Report{}
		if p.Passed {
			s.At = p.FinishedAt
		}
	}
	return s
}

// Answered reports whether a test says something about the backup: it passed, or
// found something wrong. Else it was kept from an answer, as by a full disk.
func Answered(p repo.Proof, rep Report) bool {
	return p.Passed || fail.KindOf(rep.Err()) == fail.ProofFailed
}

// State at a time, if a proof counts for that long. 0: for ever.
func (s Standing) State(within time.Duration, now time.Time) State {
	switch {
	case s.Last.Test != "" && !s.Passed:
		return Refuted
	case s.At.IsZero() || within > 0 && now.Sub(s.At) > within:
		return Unproven
	}
	return Proven
}
