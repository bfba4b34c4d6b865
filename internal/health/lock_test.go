package health_test

import (
	"context"
	"net/http"
	"slices"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// In a bucket with Object Lock and no default, what stands is not locked: that is
// seen, and gone after a run of expire; and so is a right that lacks.
func TestLockFindings(t *testing.T) {
	srv, err := lab.StartS3(t.Context(), lab.S3Options{Versions: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Stop() })
	g := newGate(t, srv)
	st := g.bucket(t, srv)
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	r, _, err := repo.Init(t.Context(), st, repo.Access{Signer: signer, Version: "test"}, nil, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.WriteIntent(t.Context(), repo.Intent{Ref: repo.Ref{Cluster: "main", ID: repo.NewID(time.Now(), "0123abcd")}, StartedAt: time.Now()}, time.Now); err != nil {
		t.Fatal(err)
	}
	const wanted = 8 * 24 * time.Hour
	find := func(in time.Duration) []string {
		t.Helper()
		now := time.Now()
		l := health.AskLocks(t.Context(), r, "main", store.Governance, wanted, now)
		return names(l.Findings(now.Add(in)))
	}
	want := func(when string, in time.Duration, names ...string) {
		t.Helper()
		if got := find(in); !slices.Equal(got, names) {
			t.Errorf("%s: %v, want %v", when, got, names)
		}
	}
	want("at first", 0, "lock-ended")
	x := &expire.Expirer{Name: "main", Lock: retention.Lock{For: wanted}, Open: func(context.Context) (*repo.Repo, error) { return r, nil }}
	if _, err := x.Relock(t.Context()); err != nil {
		t.Fatal(err)
	}
	want("after a run", 0)
	want("where runs were missed", wanted*7/8, "lock-ends")
	want("where none came any more", wanted*2, "lock-ended")

	g.answer = func(r *http.Request) (int, string) {
		if r.Method == http.MethodPut && r.URL.Query().Has("retention") {
			return http.StatusForbidden, "<Error><Code>AccessDenied</Code></Error>"
		}
		return 0, ""
	}
	want("without the right", 0, "lock-denied")
	g.answer = func(*http.Request) (int, string) { return 0, "" }
	want("with it", 0)

	plain := lab.S3ForTest(t) // a bucket without Object Lock
	if r, _, err = repo.Init(t.Context(), newGate(t, plain).bucket(t, plain), repo.Access{Signer: signer, Version: "test"}, nil, time.Now()); err != nil {
		t.Fatal(err)
	}
	want("without Object Lock", 0, "lock-unknown")
}
