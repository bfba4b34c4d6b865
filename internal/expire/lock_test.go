package expire_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/store/s3"
)

// A vault locks what is put there for so long, by the clock of the world, as a
// bucket with versions and a default retention does.
type vault struct {
	clocked
	lasts time.Duration
	locks map[string]time.Time
	asked int
	fails func(n int) bool
}

func (v *vault) Put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	err := v.clocked.Put(ctx, key, r, opt)
	if err == nil {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.locks[key] = v.now.Add(v.lasts)
	}
	return err
}

func (v *vault) Locked(_ context.Context, key string) (store.Lock, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	return store.Lock{Until: v.locks[key], Mode: store.Compliance}, nil
}

func (v *vault) Lock(_ context.Context, key string, lock store.Lock) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.asked++; v.fails != nil && v.fails(v.asked) {
		return fmt.Errorf("lock %s: %w", key, fail.StoreDown)
	}
	if lock.Until.After(v.locks[key]) {
		v.locks[key] = lock.Until
	}
	return nil
}

// Through months in which backups come and go and share packs, in which runs are
// missed, and others cut: no lock of what stands ends, and few are made anew each
// night.
func TestNoLockOfWhatStandsEnds(t *testing.T) {
	w := newWorld(t, 11)
	const lasts = 16 * day
	v := &vault{clocked: w.st, lasts: lasts, locks: make(map[string]time.Time)}
	// What was there before has a lock too: the world began with an empty vault.
	for o, err := range w.st.List(t.Context(), "", "") {
		w.must(err)
		v.locks[o.Key] = w.now.Add(lasts)
	}
	w.access = repo.Access{Signer: w.access.Signer, Version: "test"}
	r, err := repo.Open(t.Context(), v, w.access)
	w.must(err)
	w.r = r
	x := w.expirer(v)
	x.Policy = retention.Policy{Window: 9 * day, Daily: 12, Weekly: 4, Monthly: 3, Min: 2, Grace: 3 * day}
	x.Lock = retention.Lock{For: lasts, Compliance: true}
	total, nights, oldest := 0, 0, time.Duration(0)
	for night := range 80 {
		w.days(1)
		if night%9 < 3 { // nobody ran it
			continue
		}
		v.asked, v.fails = 0, nil
		if night%5 == 0 {
			v.fails = func(n int) bool { return n == 1+night%7 }
		}
		if _, err := x.RelockAt(t.Context(), w.now); err != nil && !errors.Is(err, fail.StoreDown) {
			t.Fatal(err)
		}
		total, nights = total+v.asked, nights+1
		plan, err := x.PlanAt(t.Context(), w.now)
		w.must(err)
		_, err = x.ApplyAt(t.Context(), expire.Order{Backups: plan.Removals(), Confirm: plan.Confirm}, w.now)
		w.must(err)
		objects := 0
		for o, err := range v.List(t.Context(), "", "") {
			w.must(err)
			if strings.Contains(o.Key, "/latest-") {
				continue
			}
			objects++
			if ends := v.locks[o.Key]; !ends.After(w.now.Add(2 * day)) {
				t.Fatalf("night %d: the lock of %s, written %v ago, ends in %v", night, o.Key, w.now.Sub(o.Modified), ends.Sub(w.now))
			}
			oldest = max(oldest, w.now.Sub(o.Modified))
		}
		if night > 60 && v.asked > objects {
			t.Errorf("night %d: %d locks for %d objects", night, v.asked, objects)
		}
	}
	t.Logf("%d nights, %d locks; the oldest object is %v days old", nights, total, int(oldest.Hours()/24))
	if oldest < 2*lasts {
		t.Error("nothing became old")
	}
}

// Against a real bucket with Object Lock: what stands is locked for longer, and who
// may not do that is told.
func TestRelockOfABucket(t *testing.T) {
	srv, err := lab.StartS3(t.Context(), lab.S3Options{Versions: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { srv.Stop() })
	st, err := s3.Open(t.Context(), s3.Options{Bucket: srv.Bucket, Prefix: "prod", Endpoint: srv.Endpoint, Region: srv.Region, PathStyle: true, CAFile: srv.CAFile,
		AccessKeyID: srv.AccessKeyID, SecretAccessKey: srv.SecretAccessKey})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	access := repo.Access{Signer: signer, Version: "test"}
	w := &world{t: t, rnd: rand.New(rand.NewPCG(1, 1)), access: access, now: time.Now(), timeline: 1, disk: make(map[string][]byte), whole: make(map[repo.ID]map[string][]byte)}
	if w.r, _, err = repo.Init(t.Context(), st, access, nil, w.now); err != nil {
		t.Fatal(err)
	}
	w.begin(repo.Physical)
	x := &expire.Expirer{Name: "main", Lock: retention.Lock{For: 4 * day, Compliance: true}, Open: func(context.Context) (*repo.Repo, error) { return w.r, nil }}
	planned, err := x.Locking(t.Context())
	w.must(err)
	done, err := x.Relock(t.Context())
	w.must(err)
	objects := 0
	for o, err := range st.List(t.Context(), "", "") {
		w.must(err)
		objects++
		if lock, err := st.Locked(t.Context(), o.Key); err != nil || !lock.Until.Equal(done.Until) || lock.Mode != store.Compliance {
			t.Errorf("%s is locked %+v, %v, want until %v", o.Key, lock, err, done.Until)
		}
	}
	if planned.Due != objects || done.Due != objects || objects < 3 {
		t.Errorf("planned %+v, done %+v, of %d objects", planned, done, objects)
	}
	if again, err := x.Relock(t.Context()); err != nil || again.Due != 0 || again.Ends.IsZero() {
		t.Errorf("once more: %+v, %v", again, err)
	}
}
