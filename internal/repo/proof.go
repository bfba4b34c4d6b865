package repo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A Proof says what a restore test of a backup found. It stands beside the
// backup and goes with it.
type Proof struct {
	Header
	Ref
	Test       ID        `json:"test"` // the test's name, made as a backup's: its start, and random digits
	Host       string    `json:"host"` // where it was made
	FinishedAt time.Time `json:"finished_at"`
	Passed     bool      `json:"passed"`
	// Trouble: the test came to no answer, as when a disk was full or the store
	// away. It says nothing of the backup.
	Trouble bool `json:"trouble,omitempty"`

	// Report is what was measured, in numbers and in names of checks. It is
	// never encrypted.
	Report json.RawMessage `json:"report"`
	// Details hold names of tables, and rows: see SealDetails.
	Details json.RawMessage `json:"details,omitempty"`
}

const proofPrefix = "proof-"

func (p Proof) key() string { return p.dir() + proofPrefix + string(p.Test) + ".json" }

// WriteProof stores what a test found. Writing that of the same test again is
// success, and changes nothing. The backup must be there: else it is
// fail.NoBackup, and nothing is left behind.
func (r *Repo) WriteProof(ctx context.Context, p Proof) error {
	if !idForm.MatchString(string(p.Test)) {
		return fmt.Errorf("write proof: %q is no name of a test: %w", p.Test, fail.BadConfig)
	}
	if _, err := r.Backup(ctx, p.Ref); err != nil {
		return fmt.Errorf("write proof: %w", err)
	}
	p.Header = r.access.header("proof")
	err := putSigned(ctx, r.st, r.access, p.key(), p)
	if errors.Is(err, store.ErrExist) { // sealed again, details are other bytes
		if have, rerr := r.proof(ctx, p.Ref, p.Test); rerr == nil && have.Passed == p.Passed && have.FinishedAt.Equal(p.FinishedAt) {
			err = nil
		}
	}
	if err != nil {
		return err
	}
	// A deletion may have come in between, and have listed what there is before
	// the proof was there.
	_, err = r.Backup(ctx, p.Ref)
	if errors.Is(err, fail.NoBackup) {
		err = errors.Join(err, r.st.Delete(ctx, p.key()))
	}
	if err != nil {
		return fmt.Errorf("write proof: %w", err)
	}
	return nil
}

// A ListedProof is a proof as a list shows it.
type ListedProof struct {
	Proof
	Err error // it is there and cannot be believed; then only Ref and Test are set above
}

// Proofs lists the restore tests of a backup, oldest first.
func (r *Repo) Proofs(ctx context.Context, b Ref) ([]ListedProof, error) {
	prefix := b.dir() + proofPrefix
	var all []ListedProof
	for o, err := range r.st.List(ctx, prefix, "") {
		if err != nil {
			return nil, wrap("list", prefix, err)
		}
		id, ok := strings.CutSuffix(strings.TrimPrefix(o.Key, prefix), ".json")
		if !ok || !idForm.MatchString(id) {
			continue
		}
		p, err := r.proof(ctx, b, ID(id))
		switch {
		case errors.Is(err, store.ErrNotExist): // deleted since
			continue
		case err != nil && !damaged(err):
			return nil, err
		case err != nil:
			p = Proof{Ref: b, Test: ID(id)}
		}
		all = append(all, ListedProof{p, err})
	}
	slices.SortFunc(all, func(a, b ListedProof) int { return strings.Compare(string(a.Test), string(b.Test)) })
	return all, nil
}

func (r *Repo) proof(ctx context.Context, b Ref, test ID) (p Proof, err error) {
	key := Proof{Ref: b, Test: test}.key()
	err = r.getSigned(ctx, key, "proof", &p)
	if err == nil && (p.Ref != b || p.Test != test) {
		err = fmt.Errorf("%s: is the proof %s of %s of %s: %w", key, p.Test, p.ID, p.Cluster, fail.Corrupt)
	}
	return p, err
}

// OpenProofDetails decodes the details of p into v; fail.NoKey where no key at
// hand opens them.
func (r *Repo) OpenProofDetails(p Proof, v any) error {
	return r.OpenDetails(Manifest{Ref: p.Ref, Details: p.Details}, v)
}
