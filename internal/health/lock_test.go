package health_test

import (
	"context"
	"net/http"
	"slices"
	"strings"
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
	ask := func() []health.Finding {
		t.Helper()
		now := time.Now()
		return health.AskLocks(t.Context(), r, "main", store.Governance, wanted, now).Findings(now)
	}
	run := func(lasts time.Duration) func(string) { // of expire
		return func(string) {
			t.Helper()
			x := &expire.Expirer{Name: "main", Lock: retention.Lock{For: lasts}, Open: func(context.Context) (*repo.Repo, error) { return r, nil }}
			if _, err := x.Relock(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	answer := func(method string, status int, body string) {
		g.answer = func(r *http.Request) (int, string) {
			if r.Method == method && r.URL.Query().Has("retention") {
				return status, body
			}
			return 0, ""
		}
	}
	allow := func(string) { answer("", 0, "") }
	sick(t, "lock-ended", health.Critical, ask, run(wanted/8))
	sick(t, "lock-ends", health.Warning, ask, run(wanted))
	answer(http.MethodPut, http.StatusForbidden, "<Error><Code>AccessDenied</Code></Error>")
	sick(t, "lock-denied", health.Critical, ask, allow)
	answer(http.MethodGet, http.StatusBadRequest, "<Error><Code>InvalidRequest</Code><Message>Bucket is missing Object Lock Configuration</Message></Error>")
	sick(t, "lock-unknown", health.Critical, ask, allow)
	if found := ask(); len(found) > 0 {
		t.Errorf("in the end: %v", found)
	}

	plain := lab.S3ForTest(t) // a bucket without Object Lock
	if r, _, err = repo.Init(t.Context(), newGate(t, plain).bucket(t, plain), repo.Access{Signer: signer, Version: "test"}, nil, time.Now()); err != nil {
		t.Fatal(err)
	}
	if found := ask(); !slices.Equal(names(found), []string{"lock-unknown"}) || !strings.Contains(found[0].Fix, "retention.lock") {
		t.Errorf("without Object Lock: %+v", found)
	}
}
