package repo_test

import (
	"bytes"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

var damages = flag.Int("damages", 30, "damage each of two repositories `NUMBER` times")

// Objects of a bucket that are lost, swapped, cut, lengthened, flipped, or put
// back as they were: reading refuses, or gives what was stored, never another
// byte. Also when it goes over files that are there.
func TestDamageNeverGivesAWrongByte(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 7))
	refused := 0
	for _, encrypted := range []bool{false, true} {
		b := setup(t, new(store.Mem), encrypted)
		h := history{rnd: rnd, mem: b.st.(*store.Mem), r: b.r, disk: make(disk), live: make(map[int]disk)}
		for len(h.live) < 4 { // each keeps blocks of those before
			h.change()
			n := len(h.live)
			if err := intend(b.r, n, n-1); err != nil {
				t.Fatal(err)
			}
			if err := h.finish(h.mem, n); err != nil {
				t.Fatal(err)
			}
		}
		good := objects(t, b.st)
		keys := slices.Sorted(maps.Keys(good))
		packs := slices.DeleteFunc(slices.Clone(keys), func(k string) bool { return !strings.HasSuffix(k, ".pack") })
		for range *damages {
			bad, what := maps.Clone(good), ""
			for range 1 + rnd.IntN(3) {
				from := keys
				if rnd.IntN(2) == 0 {
					from = packs
				}
				what += damageOne(rnd, bad, from)
			}
			st := new(store.Mem)
			for k, v := range bad {
				put(t, st, k, v)
			}
			r, err := repo.Open(ctx, st, b.operator)
			if err != nil {
				refused++
				continue
			}
			for n, want := range h.live {
				m, err := r.Backup(ctx, repo.Ref{Cluster: "main", ID: backupID(n)})
				if err != nil {
					refused++
					continue
				}
				dir, keep := t.TempDir(), rnd.IntN(2) == 0
				if keep { // somebody else's files, which are longer or shorter
					for p, content := range h.live[rnd.IntN(4)] {
						p = filepath.Join(dir, strings.Replace(p, "data/", "DATA/", 1))
						if err := os.MkdirAll(filepath.Dir(p), 0o700); err != nil {
							t.Fatal(err)
						}
						if err := os.WriteFile(p, content, 0o600); err != nil {
							t.Fatal(err)
						}
					}
				}
				got, _, err := readDisk(t, r, m, dir, keep)
				if err != nil {
					refused++
					continue
				}
				for p := range want {
					if b, ok := got[p]; !ok || !bytes.Equal(b, want[p]) {
						t.Errorf("encrypted=%v, backup %d after %s: %s is another", encrypted, n, what, p)
					}
				}
			}
		}
	}
	if refused < 2**damages {
		t.Errorf("only %d refusals: is anything damaged?", refused)
	}
}

// damageOne damages one of the objects, or two, and says how.
func damageOne(rnd *rand.Rand, all map[string][]byte, keys []string) string {
	k, other := keys[rnd.IntN(len(keys))], keys[rnd.IntN(len(keys))]
	b := bytes.Clone(all[k])
	if len(b) == 0 {
		return ""
	}
	switch rnd.IntN(6) {
	case 0:
		delete(all, k)
		return "loss of " + k + "; "
	case 1:
		all[k], all[other] = all[other], b
		return "swap of " + k + " and " + other + "; "
	case 2:
		all[k] = b[:rnd.IntN(len(b))]
		return "cut of " + k + "; "
	case 3:
		all[k] = append(b, all[other]...)
		return "growth of " + k + "; "
	case 4:
		all[k] = bytes.Clone(all[other])
		return fmt.Sprintf("%s in place of %s; ", other, k)
	default:
		b[rnd.IntN(len(b))] ^= 1 << rnd.IntN(8)
		all[k] = b
		return "flip in " + k + "; "
	}
}

// Thirty daily backups, one page in twenty-five written anew between any two,
// take less than a third of what thirty full ones would.
func TestThirtyDaysAreSmall(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	rnd := rand.New(rand.NewPCG(3, 3))
	d := make(disk)
	for n := range 4 {
		d[fmt.Sprintf("data/base/%d", n)] = pages(n, 500)
	}
	packs := func() (sum int64) {
		for o, err := range b.st.List(ctx, "clusters/main/packs/", "") {
			if err != nil {
				t.Fatal(err)
			}
			sum += o.Size
		}
		return sum
	}
	var full int64
	for n := range 30 {
		m, _, err := take(b.r, d, n, n-1)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			full = packs()
		}
		if n == 29 {
			t.Logf("a full backup takes %d KB, thirty days %d KB: %.2f of thirty full ones; the last refers to %d packs of %d KB",
				full>>10, packs()>>10, float64(packs())/float64(30*full), m.Packs, m.Stored>>10)
			if packs() > 10*full {
				t.Error("that is too much")
			}
			if m.Stored > 3*full {
				t.Errorf("a restore reads from %d bytes of packs", m.Stored)
			}
			got, _, err := readDisk(t, b.r, m, t.TempDir(), false)
			delete(got, "data/base/")
			if err != nil || !maps.EqualFunc(got, d, bytes.Equal) {
				t.Errorf("restored files differ, %v", err)
			}
		}
		for p, content := range d {
			content = bytes.Clone(content)
			for page := range len(content) / 8192 {
				if rnd.IntN(25) == 0 {
					copy(content[page*8192:], pages(rnd.IntN(1<<30), 1))
				}
			}
			d[p] = content
		}
	}
	for n := range 29 { // whatever is left of them goes
		if _, err := b.r.Delete(ctx, repo.Ref{Cluster: "main", ID: backupID(n)}, now); err != nil {
			t.Fatal(err)
		}
	}
	m, err := b.r.Backup(ctx, repo.Ref{Cluster: "main", ID: backupID(29)})
	if err != nil {
		t.Fatal(err)
	}
	if packs() != m.Stored {
		t.Errorf("%d bytes of packs are left, the only backup uses %d", packs(), m.Stored)
	}
}
