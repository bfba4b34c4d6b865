package repo_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

var (
	ctx = context.Background()
	now = time.Date(2026, 11, 22, 1, 30, 0, 0, time.UTC)
	ref = repo.Ref{Cluster: "main", ID: repo.NewID(now, "4f2a9c01")}
)

// A bundle is what a test of a repository needs: an operator with every key,
// and a host that can only write.
type bundle struct {
	st       store.Store
	operator repo.Access
	host     repo.Access
	r        *repo.Repo // the operator's
}

func setup(t *testing.T, st store.Store, encrypted bool) bundle {
	t.Helper()
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	b := bundle{st: st, host: repo.Access{Encrypted: encrypted, Signer: signer, Version: "1.2.3"}}
	var recipients []string
	if encrypted {
		b.host.Metadata, _ = age.GenerateX25519Identity()
		operator, _ := age.GenerateX25519Identity()
		recipients = []string{operator.Recipient().String()}
		b.operator = b.host
		b.operator.Identities = []age.Identity{operator}
	} else {
		b.operator = b.host
	}
	r, created, err := repo.Init(ctx, st, b.operator, recipients, now)
	if err != nil || !created {
		t.Fatalf("Init: created %v, %v", created, err)
	}
	b.r = r
	return b
}

func (b bundle) open(t *testing.T, a repo.Access) *repo.Repo {
	t.Helper()
	r, err := repo.Open(ctx, b.st, a)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// tree makes files of every awkward size, and returns their content.
func tree(t *testing.T) (*os.Root, map[string][]byte) {
	t.Helper()
	rnd := rand.New(rand.NewPCG(1, 2))
	files := make(map[string][]byte)
	for _, size := range []int{0, 1, 8191, 8192, 64 << 10, 64<<10 + 1, 8192 * 17, 8192*40 + 5, 300_000} {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(rnd.Uint32() >> (rnd.Uint32() % 9))
		}
		files[fmt.Sprintf("databases/app/%d.dat", size)] = b
	}
	holes := bytes.Clone(files["databases/app/300000.dat"])
	clear(holes[8192*3 : 8192*9])
	clear(holes[8192*30:])
	files["holes.dat"] = holes
	files["zero.dat"] = make([]byte, 100_000)
	dir := t.TempDir()
	for name, b := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { root.Close() })
	return root, files
}

func writing(root *os.Root) repo.Writing {
	return repo.Writing{Ref: ref, Root: root, Readers: 2, Senders: 2, PackSize: 100_000}
}

// write stores everything below w.Root.
func write(r *repo.Repo, w repo.Writing) (repo.Content, error) {
	files, err := repo.ListFiles(w.Root.FS())
	if err != nil {
		return repo.Content{}, err
	}
	return r.Write(ctx, w, files)
}

// backUp stores and publishes a tree as this host.
func backUp(t *testing.T, r *repo.Repo, root *os.Root) repo.Manifest {
	t.Helper()
	m, err := tryBackUp(r, writing(root))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func tryBackUp(r *repo.Repo, w repo.Writing) (repo.Manifest, error) {
	clock := func() time.Time { return now }
	if _, err := r.WriteIntent(ctx, repo.Intent{Ref: ref, Kind: repo.Logical, Host: "db1", StartedAt: now}, clock); err != nil {
		return repo.Manifest{}, err
	}
	if _, err := write(r, w); err != nil {
		return repo.Manifest{}, err
	}
	details, err := r.SealDetails(map[string]string{"database": "sales"})
	if err != nil {
		return repo.Manifest{}, err
	}
	m, err := r.Publish(ctx, repo.Manifest{Ref: ref, Kind: repo.Logical, Host: "db1", StartedAt: now, FinishedAt: now, Details: details})
	if err != nil {
		return m, err
	}
	return m, r.WriteLatest(ctx, m)
}

func same(a, b map[string][]byte) bool { return maps.EqualFunc(a, b, bytes.Equal) }

func extract(t *testing.T, r *repo.Repo, m repo.Manifest) (map[string][]byte, error) {
	t.Helper()
	dir := t.TempDir()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if _, err := r.Read(ctx, m.ID, m.Content, repo.Reading{Dir: root}); err != nil {
		return nil, err
	}
	files := make(map[string][]byte)
	list, err := repo.ListFiles(root.FS())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range list {
		if !f.Dir {
			if files[f.Path], err = root.ReadFile(f.Path); err != nil {
				t.Fatal(err)
			}
		}
	}
	return files, nil
}

func TestRoundTrip(t *testing.T) {
	for _, encrypted := range []bool{false, true} {
		t.Run(fmt.Sprintf("encrypted=%v", encrypted), func(t *testing.T) {
			b := setup(t, new(store.Mem), encrypted)
			root, want := tree(t)
			m := backUp(t, b.open(t, b.host), root)
			got, err := extract(t, b.r, m)
			if err != nil {
				t.Fatal(err)
			}
			if !same(want, got) {
				t.Error("restored files differ")
			}
			var details map[string]string
			if err := b.r.OpenDetails(m, &details); err != nil || details["database"] != "sales" {
				t.Errorf("details = %v, %v", details, err)
			}
			list, err := b.r.Backups(ctx, "main")
			if err != nil || len(list) != 1 || list[0].ID != ref.ID || list[0].Err != nil {
				t.Errorf("Backups = %v, %v", list, err)
			}
			if names, err := b.r.Clusters(ctx); err != nil || len(names) != 1 || names[0] != "main" {
				t.Errorf("Clusters = %v, %v", names, err)
			}
			if leaked := grep(t, b.st, "sales", "databases/app"); encrypted && leaked != "" {
				t.Errorf("%s tells names in plain", leaked)
			}
		})
	}
}

// grep returns the key of an object that holds one of the words, as it is
// stored or once decompressed.
func grep(t *testing.T, st store.Store, words ...string) string {
	t.Helper()
	for key, b := range objects(t, st) {
		for _, word := range words {
			if bytes.Contains(b, []byte(word)) {
				return key
			}
		}
	}
	return ""
}

func objects(t *testing.T, st store.Store) map[string][]byte {
	t.Helper()
	all := make(map[string][]byte)
	for o, err := range st.List(ctx, "", "") {
		if err != nil {
			t.Fatal(err)
		}
		r, err := st.Get(ctx, o.Key, store.Range{})
		if err != nil {
			t.Fatal(err)
		}
		if all[o.Key], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
		r.Close()
	}
	return all
}

// A host that holds no key that opens data can say that what is stored is what
// it stored, and nothing more.
func TestWriteOnlyHost(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	root, _ := tree(t)
	host := b.open(t, b.host)
	m := backUp(t, host, root)
	rep, err := host.Read(ctx, m.ID, m.Content, repo.Reading{})
	if err != nil || rep.Err() != nil || rep.Verified != repo.VerifiedStored {
		t.Errorf("host: %+v, %v", rep, err)
	}
	if _, err := extract(t, host, m); !errors.Is(err, fail.NoKey) {
		t.Errorf("host reads data: err = %v, want no-key", err)
	}
	stranger := b.host
	stranger.Metadata, _ = age.GenerateX25519Identity()
	if rep, err := b.open(t, stranger).Read(ctx, m.ID, m.Content, repo.Reading{}); err == nil && !errors.Is(rep.Err(), fail.NoKey) {
		t.Errorf("another cluster's host reads metadata: %+v, %v", rep, err)
	}
}

// Whatever call to the store fails, before or after it took effect, taking the
// same backup again succeeds, and one backup is there, whole.
func TestBackupSurvivesEveryFailure(t *testing.T) {
	root, want := tree(t)
	for _, after := range []bool{false, true} {
		for at := 1; ; at++ {
			b := setup(t, new(store.Mem), true)
			broken := &fault.Store{Store: b.st, At: at, After: after}
			w := writing(root)
			w.Readers, w.Senders = 1, 1 // the same calls in the same order
			r, err := repo.Open(ctx, broken, b.operator)
			if err == nil {
				_, err = tryBackUp(r, w)
			}
			if !broken.Hit() {
				if err != nil {
					t.Fatal(err)
				}
				if at < 20 {
					t.Fatalf("only %d calls: is the pack size wrong?", at)
				}
				break
			}
			if err == nil {
				t.Errorf("call %d broken (after=%v), and nothing failed", at, after)
			}
			m, err := tryBackUp(b.r, w)
			if err != nil {
				t.Errorf("call %d broken (after=%v): again: %v", at, after, err)
				continue
			}
			got, err := extract(t, b.r, m)
			if err != nil || !same(want, got) {
				t.Errorf("call %d broken (after=%v): restored files differ, %v", at, after, err)
			}
		}
	}
}

// What an interrupted upload has stored is not sent again.
func TestUploadContinues(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	root, want := tree(t)
	w := writing(root)
	broken := &fault.Store{Store: b.st, Before: func(op, key string) error {
		if op == "put" && strings.Contains(key, "/000006-") {
			return errors.New("cut")
		}
		return nil
	}}
	r, err := repo.Open(ctx, broken, b.operator)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := write(r, w); err == nil {
		t.Fatal("the cut was not noticed")
	}
	stored := make(map[string]bool)
	for key := range objects(t, b.st) {
		stored[key] = true
	}
	have, err := b.r.PriorBytes(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	var last repo.Progress
	var mu sync.Mutex
	w.Readers, w.Progress = 1, func(p repo.Progress) {
		mu.Lock()
		defer mu.Unlock()
		last = repo.Progress{Read: max(last.Read, p.Read), Total: p.Total, Kept: max(last.Kept, p.Kept), Sent: max(last.Sent, p.Sent)}
	}
	m, err := tryBackUp(b.r, w)
	if err != nil {
		t.Fatal(err)
	}
	if last.Kept == 0 || last.Kept != have {
		t.Errorf("kept %d bytes, %d were there", last.Kept, have)
	}
	if last.Read != last.Total {
		t.Errorf("read %d of %d bytes", last.Read, last.Total)
	}
	if got, err := extract(t, b.r, m); err != nil || !same(want, got) {
		t.Errorf("restored files differ, %v", err)
	}
	packs := 0
	for key := range objects(t, b.st) {
		if strings.Contains(key, "/packs/") {
			packs++
		}
	}
	var before int64
	for key := range stored {
		if strings.Contains(key, "/packs/") {
			before += int64(len(objects(t, b.st)[key]))
		}
	}
	if before == 0 || before+last.Sent != m.Stored { // not a byte twice, and none too few
		t.Errorf("%d bytes stored before, %d sent, %d in the backup", before, last.Sent, m.Stored)
	}
	if m.Packs != packs { // one that is not part of the backup was sent in vain
		t.Errorf("%d packs in the backup, %d in the bucket, %d objects before", m.Packs, packs, len(stored))
	}
}

// One changed bit, a cut, or the loss of any object of a repository is found
// and named, whichever object it is.
func TestDamageIsFoundAndNamed(t *testing.T) {
	for _, encrypted := range []bool{false, true} {
		b := setup(t, new(store.Mem), encrypted)
		root, _ := tree(t)
		backUp(t, b.r, root)
		if err := verify(b.r, ref); err != nil {
			t.Fatal(err)
		}
		rnd := rand.New(rand.NewPCG(3, 4))
		for key, good := range objects(t, b.st) {
			for try := range 12 {
				bad := bytes.Clone(good)
				what := "flipped"
				switch {
				case try == 0:
					what, bad = "missing", nil
				case try == 1:
					what, bad = "cut", bad[:len(bad)-1]
				case try == 2:
					what, bad = "longer", append(bad, 0)
				case try == 3:
					bad[len(bad)-1] ^= 1
				default:
					bad[rnd.IntN(len(bad))] ^= 1 << rnd.IntN(8)
				}
				if bad == nil {
					if strings.Contains(key, "latest-") || strings.HasPrefix(key, "keys/") {
						continue // advice; and without any key nothing opens at all
					}
					b.st.Delete(ctx, key)
				} else {
					put(t, b.st, key, bad)
				}
				r, err := repo.Open(ctx, b.st, b.operator)
				if err == nil {
					err = verify(r, ref)
				}
				if err == nil {
					t.Errorf("encrypted=%v: %s %s: not noticed", encrypted, key, what)
				} else if name := strings.TrimSuffix(key, "/"); !strings.Contains(err.Error(), name) && what != "missing" {
					t.Errorf("encrypted=%v: %s %s: not named in: %v", encrypted, key, what, err)
				}
				put(t, b.st, key, good)
			}
		}
	}
}

// verify is what pgkeep verify does to a backup, less pg_restore --list.
func verify(r *repo.Repo, ref repo.Ref) error {
	m, err := r.Backup(ctx, ref)
	if err != nil {
		return err
	}
	docs, err := r.CheckDocuments(ctx, m)
	if err != nil {
		return err
	}
	rep, err := r.Read(ctx, m.ID, m.Content, repo.Reading{})
	if err != nil {
		return err
	}
	rep.Damage = append(rep.Damage, docs...)
	return rep.Err()
}

func put(t *testing.T, st store.Store, key string, b []byte) {
	t.Helper()
	if err := st.Put(ctx, key, bytes.NewReader(b), store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
}

func TestManifestOfAnUnknownSigner(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	root, _ := tree(t)
	other := b.operator
	other.Signer, _ = seal.NewSigner()
	other.Trusted = []seal.PublicKey{b.operator.Signer.Public()}
	backUp(t, b.open(t, other), root)

	if err := verify(b.r, ref); !errors.Is(err, fail.Untrusted) {
		t.Errorf("err = %v, want untrusted", err)
	}
	list, err := b.r.Backups(ctx, "main")
	if err != nil || len(list) != 1 || !errors.Is(list[0].Err, fail.Untrusted) {
		t.Errorf("Backups = %+v, %v", list, err)
	}
	pinned := b.operator
	pinned.Trusted = []seal.PublicKey{other.Signer.Public()}
	if err := verify(b.open(t, pinned), ref); err != nil {
		t.Errorf("pinned: %v", err)
	}
}

func TestConfigurationAndRepositoryMustAgree(t *testing.T) {
	for _, encrypted := range []bool{false, true} {
		b := setup(t, new(store.Mem), encrypted)
		a := b.operator
		a.Encrypted = !encrypted
		if _, err := repo.Open(ctx, b.st, a); !errors.Is(err, fail.BadConfig) {
			t.Errorf("encrypted=%v: err = %v, want bad-config", encrypted, err)
		}
	}
	if _, err := repo.Open(ctx, new(store.Mem), repo.Access{}); !errors.Is(err, fail.BadConfig) {
		t.Error("an empty place opens as a repository")
	}
}

// A repository of a newer pgkeep is refused, naming the version to install.
func TestNewerFormatIsRefused(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	for _, h := range []repo.Header{
		{Type: "repository", Format: 2, Writer: "9.0.0"},
		{Type: "repository", Format: 1, Features: []string{"teleport"}, Writer: "9.0.0"},
	} {
		doc, err := b.operator.Signer.Sign(repo.Marker{Header: h, ID: "x"})
		if err != nil {
			t.Fatal(err)
		}
		put(t, b.st, "PGKEEP", doc)
		_, err = repo.Open(ctx, b.st, b.operator)
		if !errors.Is(err, fail.Unsupported) || !strings.Contains(fail.HintOf(err), "9.0.0") {
			t.Errorf("err = %v, hint %q", err, fail.HintOf(err))
		}
	}
}

func TestKeys(t *testing.T) {
	b := setup(t, new(store.Mem), true)
	root, want := tree(t)
	m := backUp(t, b.r, root)

	second, _ := age.GenerateX25519Identity()
	n, err := b.r.AddRecipients(ctx, []string{second.Recipient().String()}, now)
	if err != nil || n != 1 {
		t.Fatalf("AddRecipients = %d, %v", n, err)
	}
	if n, err := b.open(t, b.operator).AddRecipients(ctx, []string{second.Recipient().String()}, now); err != nil || n != 0 {
		t.Errorf("again: %d, %v", n, err)
	}
	a := b.host
	a.Identities = []age.Identity{second}
	r := b.open(t, a)
	if got, err := extract(t, r, m); err != nil || !same(want, got) {
		t.Errorf("the added recipient cannot restore: %v", err)
	}
	if _, err := r.NewEpoch(ctx, []string{second.Recipient().String()}, now); err != nil {
		t.Fatal(err)
	}
	checks := b.open(t, b.operator).CheckKeys()
	if len(checks) != 2 || !checks[0].Opens || checks[1].Opens {
		t.Errorf("the first operator opens what it should not, or the reverse: %+v", checks)
	}
	if _, err := b.open(t, b.host).AddRecipients(ctx, []string{b.r.Epochs()[0].Recipient}, now); !errors.Is(err, fail.NoKey) {
		t.Errorf("a host without an identity added a recipient: %v", err)
	}
	// A planted epoch would make hosts encrypt to its owner.
	mallory := b.operator
	mallory.Signer, _ = seal.NewSigner()
	mallory.Trusted = []seal.PublicKey{b.operator.Signer.Public()}
	if _, err := b.open(t, mallory).NewEpoch(ctx, []string{second.Recipient().String()}, now); err != nil {
		t.Fatal(err)
	}
	if _, err := repo.Open(ctx, b.st, b.host); !errors.Is(err, fail.Untrusted) {
		t.Errorf("a planted epoch was accepted: %v", err)
	}
}

// Delete survives every failure, too: the backup is listed and whole, or not listed.
func TestDeleteSurvivesEveryFailure(t *testing.T) {
	root, _ := tree(t)
	for _, after := range []bool{false, true} {
		for at := 1; ; at++ {
			b := setup(t, new(store.Mem), false)
			backUp(t, b.r, root)
			broken := &fault.Store{Store: b.st, At: at, After: after}
			r, err := repo.Open(ctx, broken, b.operator)
			if err == nil {
				_, err = r.Delete(ctx, ref, now)
			}
			if !broken.Hit() {
				if err != nil {
					t.Fatal(err)
				}
				for key := range objects(t, b.st) {
					if strings.HasPrefix(key, "clusters/") {
						t.Errorf("left behind: %s", key)
					}
				}
				if _, err := b.r.Delete(ctx, ref, now); !errors.Is(err, fail.NoBackup) {
					t.Errorf("deleted twice: %v", err)
				}
				break
			}
			list, err := b.r.Backups(ctx, "main")
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range list {
				if err := verify(b.r, l.Ref); !l.Unfinished && err != nil {
					t.Errorf("call %d broken (after=%v): listed and not whole: %v", at, after, err)
				}
			}
			if _, err := b.r.Delete(ctx, ref, now); err != nil && !errors.Is(err, fail.NoBackup) {
				t.Errorf("call %d broken (after=%v): again: %v", at, after, err)
			}
		}
	}
}

func TestFileThatShrinksIsAnError(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	root, _ := tree(t)
	files, err := repo.ListFiles(root.FS())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(root.Name(), "holes.dat"), 8192*5); err != nil {
		t.Fatal(err)
	}
	if _, err := b.r.Write(ctx, writing(root), files); err == nil || !strings.Contains(err.Error(), "holes.dat") {
		t.Errorf("err = %v", err)
	}
}
