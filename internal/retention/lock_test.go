package retention_test

import (
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
)

func TestLocksThatAreHalfOverAreDue(t *testing.T) {
	now := time.Date(2026, 11, 22, 1, 30, 0, 0, time.UTC)
	in := func(days int) time.Time { return now.AddDate(0, 0, days) }
	lock := retention.Lock{For: 30 * day}
	d := lock.Decide([]repo.Shelf{{Objects: 5, Until: in(16)}, {Objects: 10, Until: in(15)}, {Objects: 20}, {Objects: 40, Until: in(40)}}, now)
	if d.Objects != 75 || d.Due != 30 || d.Later != 0 || !d.Ends.IsZero() || !d.Until.Equal(in(30)) {
		t.Errorf("%+v", d)
	}
	if s := d.Shelves(); len(s) != 2 || s[0].Objects != 20 {
		t.Errorf("to be locked: %+v, want what is not locked first", s)
	}
	// Many are done in several runs, a whole shelf in one.
	d = lock.Decide([]repo.Shelf{{Objects: 30_000, Until: in(2)}, {Objects: 15_000, Until: in(1)}, {Objects: 4_000, Until: in(3)}}, now)
	if d.Due != 19_000 || d.Later != 30_000 {
		t.Errorf("%+v", d)
	}
	if d = lock.Decide([]repo.Shelf{{Objects: 30_000, Until: in(2)}}, now); d.Due != 30_000 {
		t.Errorf("%+v", d)
	}
}
