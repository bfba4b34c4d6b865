package restore_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

// PostgreSQL crashes in the middle of a copy. What was read is no backup, for its
// session has ended; the next attempt reads everything, and sends what the first
// had not, and what recovery changed.
func TestACrashOfPostgreSQLCostsNoSecondUpload(t *testing.T) {
	s := newSite(t)
	s.rows(3)
	s.exec("CREATE EXTENSION pgcrypto", "CREATE TABLE big AS SELECT i, gen_random_bytes(1000) AS b FROM generate_series(1, 60000) i", "CHECKPOINT")
	s.archived()
	var once sync.Once
	crashed := int64(0) // when so many bytes of packs were there
	packs := func() (bytes int64, n int) {
		for o, err := range s.store.List(t.Context(), "clusters/main/packs/", "") {
			if err != nil {
				t.Fatal(err)
			}
			bytes, n = bytes+o.Size, n+1
		}
		return bytes, n
	}
	r, err := repo.Open(t.Context(), &fault.Store{Store: s.store, Before: func(op, key string) error {
		if have, n := packs(); op == "put" && strings.Contains(key, "/packs/") && n == 1 {
			once.Do(func() {
				crashed = have
				s.pg.Kill()
				if err := s.pg.Restart(context.WithoutCancel(t.Context()), nil); err != nil {
					t.Error(err)
				}
				s.exec("INSERT INTO ledger VALUES (5000, 'after the crash')")
			})
		}
		return nil
	}}, s.access)
	if err != nil {
		t.Fatal(err)
	}
	b := s.physicalOf(s.pg)
	b.Open = func(context.Context) (*repo.Repo, error) { return r, nil }
	b.Readers, b.Pace.Rate = 1, 8<<20 // there is more to read when the loss is noticed
	id, began := repo.NewID(time.Now(), fmt.Sprintf("%08x", 1)), time.Now().UTC()
	if _, err := b.Preflight(t.Context(), id, began, backup.Owner{}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Copy(t.Context(), id, func(repo.Progress) {}); !errors.Is(err, fail.PGDown) || !fail.KindOf(err).Retry() {
		t.Fatalf("the copy that PostgreSQL left: %v", err)
	}
	s.own()
	before, _ := packs()
	if crashed == 0 {
		t.Fatal("nothing crashed")
	}
	b.Pace = backup.Pace{}
	c, err := b.Copy(t.Context(), id, func(repo.Progress) {})
	if err != nil {
		t.Fatal(err)
	}
	s.own()
	after, _ := packs()
	again := after - c.Stored
	t.Logf("stored at the crash: %d, at the end of that attempt: %d; the backup refers to %d; sent: %d, of it again: %d", crashed, before, c.Stored, c.Sent, again)
	if again*10 > before {
		t.Errorf("%d bytes were sent again, of %d stored before", again, before)
	}
	if c.Sent == 0 || before*10 > c.Stored*9 {
		t.Errorf("the first attempt had stored %d of %d bytes: that is not the middle", before, c.Stored)
	}
	if _, err := b.WaitWAL(t.Context(), id, func(int64, int64) {}); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Publish(t.Context(), id, backup.Published{Started: began, Verified: repo.VerifiedContent}); err != nil {
		t.Fatal(err)
	}
	s.own()
	s.archived()
	p := s.physical("again", restore.Target{Kind: restore.Latest})
	s.restored(p)
	s.verifyBackup(p.Dir)
	server, err := s.start(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Kill()
	const sum = "SELECT count(*)::text || md5(string_agg(md5(b), '' ORDER BY i)) FROM big"
	if got, want := query[string](t, server, sum), query[string](t, s.pg, sum); got != want || len(seqs(t, server)) != len(seqs(t, s.pg)) {
		t.Errorf("restored %s, want %s", got, want)
	}
}
