package repo_test

import (
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A report on a sample does not pass for one on all.
func TestASampleSaysHowMuchWasRead(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	m, _, err := take(b.r, disk{"data/base/1": pages(1, 100), "data/base/2": pages(2, 100)}, 0)
	if err != nil {
		t.Fatal(err)
	}
	asked, chosen := 0, 0
	rep, err := b.r.Read(ctx, m.ID, m.Content, repo.Reading{Packs: func(repo.Pack) bool {
		asked++
		if asked%3 == 1 {
			chosen++
		}
		return asked%3 == 1
	}})
	if err != nil || rep.Err() != nil || rep.Packs != m.Packs || rep.Read != chosen || chosen == 0 || chosen == m.Packs {
		t.Errorf("%d packs of %d were chosen; the report is %+v (%v)", chosen, m.Packs, rep, err)
	}
	if rep, err = b.r.Read(ctx, m.ID, m.Content, repo.Reading{}); err != nil || rep.Read != m.Packs {
		t.Errorf("all: %+v (%v)", rep, err)
	}
}

// An intent that cannot be read stops every deletion, for it may pin anything; so
// the error says what to do about it.
func TestAnUnreadableIntentSaysWhatToDo(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	d := disk{"data/base/1": pages(1, 10)}
	if _, _, err := take(b.r, d, 0); err != nil {
		t.Fatal(err)
	}
	if err := intend(b.r, 1, 0); err != nil {
		t.Fatal(err)
	}
	of := func(n int) repo.Ref { return repo.Ref{Cluster: "main", ID: backupID(n)} }
	intent := "clusters/main/backups/" + string(backupID(1)) + "/intent.json"
	if err := b.st.Delete(ctx, intent); err != nil {
		t.Fatal(err)
	}
	put(t, b.st, intent, []byte("{}\n"))
	if _, err := b.r.Delete(ctx, of(0), now); err == nil || !strings.Contains(fail.HintOf(err), "pgkeep delete "+string(backupID(1))) {
		t.Errorf("%v; %s", err, fail.HintOf(err))
	}
	if _, err := b.r.Delete(ctx, of(1), now); err != nil {
		t.Fatal(err)
	}
	for o, err := range b.st.List(ctx, "clusters/", "") {
		t.Errorf("%s is left (%v)", o.Key, err)
	}
}
