package restore_test

import (
	"bytes"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

var mutations = flag.Int("mutations", 8, "damage the repository `NUMBER` times")

// P26, F109: whatever happens to three objects of the bucket, a restore refuses,
// or what it makes is what the backup was, to the byte.
func TestNoDamageBecomesAWrongByte(t *testing.T) {
	s := newSite(t)
	s.rows(30)
	s.take()
	s.rows(10)
	s.take()
	s.archived()
	want := map[repo.ID]map[string]string{} // what a sound restore of each backup makes
	attempt := func() (repo.ID, map[string]string, error) {
		p := s.physical("damaged", restore.Target{Kind: restore.Latest})
		defer os.RemoveAll(filepath.Dir(p.Dir))
		r, err := repo.Open(t.Context(), s.store, s.access)
		if err != nil {
			return "", nil, err
		}
		p.Repo = r
		plan, err := p.Plan(t.Context())
		if err == nil {
			_, err = p.Run(t.Context(), plan)
		}
		if err != nil {
			return "", nil, err
		}
		have := tree(t, filepath.Dir(p.Dir))
		delete(have, filepath.Join(p.Dir, "postgresql.auto.conf")) // which names the last segment
		return plan.Backup.ID, have, nil
	}
	id, have, err := attempt()
	if err != nil {
		t.Fatal(err)
	}
	want[id] = have
	var objects []string
	root := filepath.Join(s.dir, "repository")
	if err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			objects = append(objects, name)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	rnd := rand.New(rand.NewPCG(uint64(*mutations), 3))
	refused, fell, same := 0, 0, 0
	for i := range *mutations {
		undo, what := damage(t, rnd, objects)
		got, have, err := attempt()
		undo()
		switch {
		case err != nil:
			refused++
			if k := fail.KindOf(err); k == fail.Unknown {
				t.Errorf("%d: %s: an error of no kind: %v", i, what, err)
			}
		case want[got] == nil: // an older one, of which the whole is not known yet
			fell++
			if sound, whole := s.older(got); sound {
				want[got] = whole
			}
			fallthrough
		default:
			if got == id {
				same++
			}
			if diff := cmp.Diff(want[got], have); diff != "" {
				t.Fatalf("%d: %s: restored %s with\n%.2000s", i, what, got, diff)
			}
		}
	}
	t.Logf("%d of %d refused, %d the same, %d from an older backup", refused, *mutations, same, fell)
	if refused == 0 || same == 0 {
		t.Error("the test has lost its point")
	}
}

// older is what the restore of a backup makes while nothing is damaged.
func (s *site) older(id repo.ID) (bool, map[string]string) {
	s.t.Helper()
	p := s.physical("damaged", restore.Target{Kind: restore.Latest})
	defer os.RemoveAll(filepath.Dir(p.Dir))
	p.Backup = id
	s.restored(p)
	have := tree(s.t, filepath.Dir(p.Dir))
	delete(have, filepath.Join(p.Dir, "postgresql.auto.conf"))
	return true, have
}

// damage does something to three objects, and returns what undoes it.
func damage(t *testing.T, rnd *rand.Rand, objects []string) (undo func(), what string) {
	t.Helper()
	was := map[string][]byte{}
	put := func(name string, b []byte) {
		if err := os.WriteFile(name, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 3 {
		name := objects[rnd.IntN(len(objects))]
		if was[name] != nil {
			continue
		}
		b, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		was[name] = b
		kind := rnd.IntN(4)
		what += fmt.Sprintf("%s (%d), ", filepath.Base(name), kind)
		switch {
		case kind == 0:
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
		case kind == 1 && len(b) > 0:
			put(name, b[:rnd.IntN(len(b))])
		case kind == 2 && len(b) > 0:
			c := bytes.Clone(b)
			c[rnd.IntN(len(c))] ^= 1 << rnd.IntN(8)
			put(name, c)
		default: // another object's content, of its own kind if there is one
			other := objects[rnd.IntN(len(objects))]
			for range 50 {
				if o := objects[rnd.IntN(len(objects))]; filepath.Ext(o) == filepath.Ext(name) && o != name && was[o] == nil {
					other = o
				}
			}
			c, err := os.ReadFile(other)
			if err != nil {
				c = nil // removed just now
			}
			put(name, c)
		}
	}
	return func() {
		for name, b := range was {
			put(name, b)
		}
	}, what
}
