package proof

import (
	"cmp"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Policy says which backup is tested next.
type Policy string

const (
	Newest         Policy = "newest" // of the kind, physical or logical, whose turn it is
	Random         Policy = "random"
	OldestUnproven Policy = "oldest-unproven" // or, if all are proven, the one whose proof is oldest
	RandomMoment   Policy = "random-moment"   // in the window that can be recovered, with the backup it takes; of the kind whose turn it is
)

// ParsePolicy parses the text form.
func ParsePolicy(s string) (Policy, error) {
	switch p := Policy(s); p {
	case Newest, Random, OldestUnproven, RandomMoment:
		return p, nil
	}
	return "", fail.Hint(fmt.Errorf("%q is no policy for restore tests: %w", s, fail.BadConfig),
		fmt.Sprintf("one of %s, %s, %s, %s", Newest, Random, OldestUnproven, RandomMoment))
}

// A Candidate is a backup that could be tested.
type Candidate struct {
	ID     string
	Kind   repo.Kind
	At     time.Time // the first moment that it can be recovered to
	Until  time.Time // the last, without a gap in the log; zero: only At, as of a logical backup
	Proven time.Time // when it passed a test last; zero: never
	Tested time.Time // when it was tested last, whatever came of it; zero: never
}

// A Choice is what to test.
type Choice struct {
	ID string
	At time.Time // recover to this moment; zero: as far as can be
}

// Pick chooses what to test. The same candidates, policy and seed give the same
// choice, in whatever order the candidates come. No candidate is fail.NoBackup.
func Pick(p Policy, seed string, from []Candidate) (Choice, error) {
	if len(from) == 0 {
		return Choice{}, fmt.Errorf("pick a backup to test: there is none: %w", fail.NoBackup)
	}
	from = slices.SortedFunc(slices.Values(from), func(a, b Candidate) int {
		return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.ID, b.ID))
	})
	h := fnv.New64a()
	h.Write([]byte(seed)) // never fails
	random := rand.New(rand.NewPCG(h.Sum64(), 0))
	if p == Newest || p == RandomMoment {
		from = kindInTurn(from)
	}
	switch p {
	case Newest:
		return Choice{ID: from[len(from)-1].ID}, nil
	case Random:
		return Choice{ID: from[random.IntN(len(from))].ID}, nil
	case OldestUnproven:
		oldest := slices.MinFunc(from, func(a, b Candidate) int { return a.Proven.Compare(b.Proven) })
		return Choice{ID: oldest.ID}, nil
	case RandomMoment:
		return pickMoment(from, random), nil
	}
	return Choice{}, fmt.Errorf("pick a backup to test: policy %q: %w", p, fail.BadConfig)
}

// kindInTurn are those of the kind that was not tested for longest; of kinds that
// were never, the one with the newest. Else a cluster whose dumps come last would
// never have its physical backups tested, nor the other way round by moments. It is
// the last test that counts, not the last that passed: one kind that never passes
// does not keep the other from its turn.
func kindInTurn(from []Candidate) []Candidate {
	tested := make(map[repo.Kind]time.Time)
	for _, c := range from {
		if last, ok := tested[c.Kind]; !ok || c.Tested.After(last) {
			tested[c.Kind] = c.Tested
		}
	}
	turn := from[len(from)-1].Kind
	for _, c := range from { // no order of a map
		if tested[c.Kind].Before(tested[turn]) {
			turn = c.Kind
		}
	}
	return slices.DeleteFunc(from, func(c Candidate) bool { return c.Kind != turn })
}

// pickMoment draws a moment of all that can be recovered, each second as likely
// as another, and takes the last backup before it, as a restore would. Without
// any log it draws a backup.
func pickMoment(from []Candidate, random *rand.Rand) Choice {
	type span struct {
		id   string
		from time.Time
		len  time.Duration
	}
	var spans []span
	var total time.Duration
	for i, c := range from {
		end := c.Until
		if i+1 < len(from) && end.After(from[i+1].At) {
			end = from[i+1].At
		}
		if n := end.Sub(c.At); !c.Until.IsZero() && n > 0 {
			spans = append(spans, span{c.ID, c.At, n})
			total += n
		}
	}
	if total == 0 {
		return Choice{ID: from[random.IntN(len(from))].ID}
	}
	at := time.Duration(random.Int64N(int64(total)))
	for _, s := range spans {
		if at < s.len {
			return Choice{s.id, s.from.Add(at).Truncate(time.Microsecond)}
		}
		at -= s.len
	}
	return Choice{} // unreachable: at is less than the sum
}
