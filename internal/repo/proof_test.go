package repo_test

import (
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

func proofOf(t *testing.T, r *repo.Repo, at time.Time) repo.Proof {
	t.Helper()
	details, err := r.SealDetails(map[string]string{"finding": "public.secret has 1 row"})
	if err != nil {
		t.Fatal(err)
	}
	return repo.Proof{Ref: ref, Test: repo.NewID(at, "0a1b2c3d"), Host: "tester", FinishedAt: at.Add(time.Minute), Passed: true,
		Report: json.RawMessage(`{"verdict":"passed"}`), Details: details}
}

func TestProofs(t *testing.T) {
	for name, encrypted := range map[string]bool{"plain": false, "encrypted": true} {
		t.Run(name, func(t *testing.T) {
			b := setup(t, new(store.Mem), encrypted)
			root, _ := tree(t)
			backUp(t, b.r, root)
			if all, err := b.r.Proofs(ctx, ref); err != nil || len(all) != 0 {
				t.Fatalf("Proofs = %v, %v", all, err)
			}
			second, first := proofOf(t, b.r, now.Add(2*time.Hour)), proofOf(t, b.r, now.Add(time.Hour))
			second.Passed = false
			for _, p := range []repo.Proof{second, first} {
				if err := b.r.WriteProof(ctx, p); err != nil {
					t.Fatal(err)
				}
			}
			again := proofOf(t, b.r, now.Add(time.Hour)) // its details are other bytes, if sealed
			if err := b.r.WriteProof(ctx, again); err != nil {
				t.Errorf("the same test again: %v", err)
			}
			again.Passed = false
			if err := b.r.WriteProof(ctx, again); !errors.Is(err, store.ErrExist) {
				t.Errorf("another outcome of the same test: %v", err)
			}
			all, err := b.r.Proofs(ctx, ref)
			if err != nil || len(all) != 2 || all[0].Test != first.Test || !all[0].Passed || all[1].Passed || all[0].Err != nil {
				t.Fatalf("Proofs = %+v, %v", all, err)
			}
			var details map[string]string
			if err := b.r.OpenProofDetails(all[0].Proof, &details); err != nil || details["finding"] != "public.secret has 1 row" {
				t.Errorf("details = %v, %v", details, err)
			}
			if d := cmp.Diff(string(first.Report), string(all[0].Report)); d != "" {
				t.Errorf("report (-want +got):\n%s", d)
			}
			rc, err := b.st.Get(ctx, "clusters/main/backups/"+string(ref.ID)+"/proof-"+string(first.Test)+".json", store.Range{})
			if err != nil {
				t.Fatal(err)
			}
			defer rc.Close()
			if raw, _ := io.ReadAll(rc); strings.Contains(string(raw), "secret") == encrypted {
				t.Errorf("as stored: %s", raw)
			}
			if listed, err := b.r.Backups(ctx, "main"); err != nil || len(listed) != 1 || listed[0].Unfinished {
				t.Errorf("Backups = %+v, %v", listed, err)
			}
			if _, err := b.r.Delete(ctx, ref, now); err != nil {
				t.Fatal(err)
			}
			if all, err := b.r.Proofs(ctx, ref); err != nil || len(all) != 0 {
				t.Errorf("after the backup was deleted: %v, %v", all, err)
			}
		})
	}
}

func TestProofOfAStrangerCountsForNothing(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	root, _ := tree(t)
	backUp(t, b.r, root)
	stranger := b.operator
	var err error
	if stranger.Signer, err = seal.NewSigner(); err != nil {
		t.Fatal(err)
	}
	stranger.Trusted = []seal.PublicKey{b.operator.Signer.Public()}
	p := proofOf(t, b.r, now)
	if err := b.open(t, stranger).WriteProof(ctx, p); err != nil {
		t.Fatal(err)
	}
	// Nor does one of ours, under another name.
	own := proofOf(t, b.r, now.Add(time.Second))
	if err := b.r.WriteProof(ctx, own); err != nil {
		t.Fatal(err)
	}
	dir := "clusters/main/backups/" + string(ref.ID) + "/proof-"
	rc, err := b.st.Get(ctx, dir+string(own.Test)+".json", store.Range{})
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	other := repo.NewID(now.Add(2*time.Second), "00000000")
	if err := b.st.Put(ctx, dir+string(other)+".json", rc, store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
	all, err := b.r.Proofs(ctx, ref)
	if err == nil && len(all) == 3 {
		if all[1].Err != nil || !errors.Is(all[2].Err, fail.Corrupt) {
			t.Errorf("Proofs = %+v", all)
		}
		all = all[:1]
	}
	if err != nil || len(all) != 1 || !errors.Is(all[0].Err, fail.Untrusted) || all[0].Passed || all[0].Test != p.Test {
		t.Errorf("Proofs = %+v, %v", all, err)
	}
}

func TestProofNeedsItsBackup(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	if err := b.r.WriteProof(ctx, proofOf(t, b.r, now)); !errors.Is(err, fail.NoBackup) {
		t.Errorf("without a backup: %v", err)
	}
	root, _ := tree(t)
	backUp(t, b.r, root)
	bad := proofOf(t, b.r, now)
	bad.Test = "../x"
	if err := b.r.WriteProof(ctx, bad); !errors.Is(err, fail.BadConfig) {
		t.Errorf("a bad name: %v", err)
	}
	// The backup is deleted just before the proof is there.
	b.st = &fault.Store{Store: b.st, Before: func(op, key string) error {
		if op == "put" && strings.Contains(key, "/proof-") {
			_, err := b.r.Delete(ctx, ref, now)
			return err
		}
		return nil
	}}
	if err := b.open(t, b.operator).WriteProof(ctx, proofOf(t, b.r, now)); !errors.Is(err, fail.NoBackup) {
		t.Errorf("while it was deleted: %v", err)
	}
	for o := range b.st.List(ctx, "clusters/main/backups/", "") {
		t.Errorf("left: %s", o.Key)
	}
}

// A full disk of the tester's says nothing of a backup that was proven.
func TestATestWithoutAnswerHidesNone(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	root, _ := tree(t)
	backUp(t, b.r, root)
	passed, trouble := proofOf(t, b.r, now.Add(time.Hour)), proofOf(t, b.r, now.Add(2*time.Hour))
	trouble.Passed, trouble.Trouble = false, true
	for _, p := range []repo.Proof{passed, trouble} {
		if err := b.r.WriteProof(ctx, p); err != nil {
			t.Fatal(err)
		}
	}
	all, err := b.r.Records(ctx, "main")
	if err != nil || len(all) != 1 || all[0].Proof == nil || all[0].Proof.Test != passed.Test {
		t.Errorf("%+v, %v", all, err)
	}
}
