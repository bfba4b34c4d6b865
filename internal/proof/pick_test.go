package proof_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
)

func at(hour int) time.Time { return time.Date(2026, 11, 22, hour, 0, 0, 0, time.UTC) }

func TestPick(t *testing.T) {
	all := []proof.Candidate{
		{ID: "b", At: at(2), Until: at(9), Proven: at(20)},
		{ID: "c", At: at(4), Until: at(9)},
		{ID: "a", At: at(1), Until: at(9), Proven: at(10)},
	}
	for policy, want := range map[proof.Policy]string{proof.Newest: "c", proof.OldestUnproven: "c"} {
		if got, err := proof.Pick(policy, "", all); err != nil || got.ID != want || !got.At.IsZero() {
			t.Errorf("Pick(%s) = %+v, %v", policy, got, err)
		}
	}
	all[1].Proven = at(15)
	if got, err := proof.Pick(proof.OldestUnproven, "", all); err != nil || got.ID != "a" {
		t.Errorf("when all are proven: %+v, %v", got, err)
	}
	if _, err := proof.Pick(proof.Newest, "", nil); !errors.Is(err, fail.NoBackup) {
		t.Errorf("of none: %v", err)
	}
	if _, err := proof.Pick("best", "", all); !errors.Is(err, fail.BadConfig) {
		t.Errorf("an unknown policy: %v", err)
	}
	if _, err := proof.ParsePolicy("best"); !errors.Is(err, fail.BadConfig) {
		t.Errorf("ParsePolicy: %v", err)
	}
	if p, err := proof.ParsePolicy("random-moment"); err != nil || p != proof.RandomMoment {
		t.Errorf("ParsePolicy = %v, %v", p, err)
	}
}

// Where dumps are taken last, "newest" was always a dump.
func TestPickTakesKindsInTurn(t *testing.T) {
	all := []proof.Candidate{
		{ID: "base", Kind: repo.Physical, At: at(1), Until: at(3)},
		{ID: "later", Kind: repo.Physical, At: at(3), Until: at(9)},
		{ID: "dump", Kind: repo.Logical, At: at(2)},
		{ID: "last", Kind: repo.Logical, At: at(8)},
	}
	for i, step := range []struct {
		policy proof.Policy
		want   []string
	}{
		{proof.Newest, []string{"last"}}, {proof.Newest, []string{"later"}}, {proof.RandomMoment, []string{"dump", "last"}},
		{proof.RandomMoment, []string{"base", "later"}}, {proof.Newest, []string{"last"}},
	} {
		got, err := proof.Pick(step.policy, fmt.Sprint(i), all)
		n := slices.IndexFunc(all, func(c proof.Candidate) bool { return c.ID == got.ID })
		if err != nil || !slices.Contains(step.want, got.ID) {
			t.Fatalf("test %d, %s: %+v, %v; want one of %q", i, step.policy, got, err, step.want)
		}
		all[n].Tested = at(10 + i) // and, as nothing is Proven, it has failed
	}
}

// Seeds are names of workflow runs: each should choose anew.
func TestPickIsEven(t *testing.T) {
	all := []proof.Candidate{{ID: "short", At: at(1), Until: at(2)}, {ID: "hole", At: at(3)}, {ID: "long", At: at(4), Until: at(7)}}
	backups, moments := make(map[string]int), make(map[string]int)
	for i := range 4000 {
		seed := fmt.Sprint("run ", i)
		b, err := proof.Pick(proof.Random, seed, all)
		if err != nil {
			t.Fatal(err)
		}
		m, err := proof.Pick(proof.RandomMoment, seed, all)
		if err != nil {
			t.Fatal(err)
		}
		backups[b.ID]++
		moments[m.ID]++
	}
	for id, n := range backups {
		if n < 1200 || n > 1470 {
			t.Errorf("random took %s %d times of 4000", id, n)
		}
	}
	if moments["hole"] != 0 || moments["long"] < 2850 || moments["long"] > 3150 {
		t.Errorf("random-moment took %v", moments)
	}
}

func TestPickIsSteadyAndPossible(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	policies := []proof.Policy{proof.Newest, proof.Random, proof.OldestUnproven, proof.RandomMoment}
	for n := range 20_000 {
		var all []proof.Candidate
		for i := range 1 + random.IntN(8) {
			c := proof.Candidate{ID: fmt.Sprint(i), At: at(random.IntN(21))}
			if reach := random.IntN(12); reach > 0 {
				c.Until = c.At.Add(time.Duration(reach-1) * time.Hour)
			}
			all = append(all, c)
		}
		policy, seed := policies[n%4], fmt.Sprint(n)
		got, err := proof.Pick(policy, seed, all)
		if err != nil {
			t.Fatal(err)
		}
		shuffled := slices.Clone(all)
		random.Shuffle(len(all), func(i, j int) { shuffled[i], shuffled[j] = shuffled[j], shuffled[i] })
		if again, err := proof.Pick(policy, seed, shuffled); err != nil || again != got {
			t.Fatalf("in another order: %+v, %v, want %+v", again, err, got)
		}
		i := slices.IndexFunc(all, func(c proof.Candidate) bool { return c.ID == got.ID })
		if i < 0 {
			t.Fatalf("%+v is none of them", got)
		}
		c := all[i]
		if got.At.IsZero() {
			continue
		}
		if policy != proof.RandomMoment || got.At.Before(c.At) || !got.At.Before(c.Until) {
			t.Fatalf("%+v cannot be recovered from %+v", got, c)
		}
		for _, other := range all {
			if other.At.After(c.At) && !other.At.After(got.At) && !other.Until.IsZero() {
				t.Fatalf("for %v, %+v is nearer than %+v", got.At, other, c)
			}
		}
	}
}
