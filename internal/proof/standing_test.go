package proof_test

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// What counts is the newest test that came to an answer, and for how long a
// proof does.
func TestStandings(t *testing.T) {
	start := time.Date(2026, 11, 22, 0, 0, 0, 0, time.UTC)
	at := func(day int) time.Time { return start.AddDate(0, 0, day) }
	test := func(day int, verdict proof.Verdict, kind fail.Kind) repo.ListedProof {
		rep := proof.Report{Verdict: verdict, Checks: []proof.Check{{Name: "replay", Verdict: verdict, Kind: kind, Message: "m"}}}
		text, err := json.Marshal(rep)
		must(t, err)
		return repo.ListedProof{Proof: repo.Proof{Test: repo.NewID(at(day), "00000000"), FinishedAt: at(day), Passed: verdict == proof.Passed, Report: text}}
	}
	passed := func(day int) repo.ListedProof { return test(day, proof.Passed, "") }
	refuted := func(day int) repo.ListedProof { return test(day, proof.Failed, "") }
	full := func(day int) repo.ListedProof { return test(day, proof.Failed, fail.NoSpace) }
	forged := passed(5)
	forged.Err = fail.Untrusted
	const week = 7 * 24 * time.Hour
	for name, tt := range map[string]struct {
		proofs  []repo.ListedProof
		day     int
		within  time.Duration
		want    proof.State
		trouble bool
	}{
		"never tested":                       {nil, 0, week, proof.Unproven, false},
		"passed":                             {[]repo.ListedProof{passed(1)}, 8, week, proof.Proven, false},
		"passed too long ago":                {[]repo.ListedProof{passed(1)}, 9, week, proof.Unproven, false},
		"passed long ago, and that will do":  {[]repo.ListedProof{passed(1)}, 900, 0, proof.Proven, false},
		"refuted":                            {[]repo.ListedProof{refuted(1)}, 1, week, proof.Refuted, false},
		"refuted after it had passed":        {[]repo.ListedProof{passed(1), refuted(2)}, 2, week, proof.Refuted, false},
		"refuted long ago":                   {[]repo.ListedProof{refuted(1)}, 100, week, proof.Refuted, false},
		"passed since it was refuted":        {[]repo.ListedProof{refuted(1), passed(2)}, 2, week, proof.Proven, false},
		"passed, and then a disk was full":   {[]repo.ListedProof{passed(1), full(2)}, 2, week, proof.Proven, true},
		"refuted, and then a disk was full":  {[]repo.ListedProof{refuted(1), full(2)}, 2, week, proof.Refuted, true},
		"a full disk alone":                  {[]repo.ListedProof{full(1)}, 1, week, proof.Unproven, true},
		"a full disk, and passed since":      {[]repo.ListedProof{full(1), passed(2)}, 2, week, proof.Proven, false},
		"passed, says a clock ahead of ours": {[]repo.ListedProof{refuted(1), passed(3)}, 2, week, proof.Refuted, false},
		"nobody we trust says that":          {[]repo.ListedProof{refuted(1), forged}, 5, week, proof.Refuted, false},
	} {
		s := proof.Judge(tt.proofs, at(tt.day))
		if got := s.State(tt.within, at(tt.day)); got != tt.want || (s.Trouble.Test != "") != tt.trouble {
			t.Errorf("%s: %s, trouble %q, want %s", name, got, s.Trouble.Test, tt.want)
		}
	}
}
