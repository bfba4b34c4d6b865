package repo_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// longer text. That must not keep later versions from taking backups.
func TestClusterNamedByAnotherVersion(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	clock := func() time.Time { return now }
	for i, version := range []string{"1.2.3-rc.1+longer", "1.2.3", "1.2.3-rc.2"} {
		a := b.host
		a.Version = version
		in := repo.Intent{Ref: repo.Ref{Cluster: "main", ID: repo.NewID(now.Add(time.Duration(i)*time.Hour), "4f2a9c01")}, StartedAt: now}
		if _, err := b.open(t, a).WriteIntent(ctx, in, clock); err != nil {
			t.Errorf("version %s: %v", version, err)
		}
	}
}

// A backup that is published while it is deleted is deleted whole, or there whole.
func TestPublishWhileDeleting(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	root, _ := tree(t)
	clock := func() time.Time { return now }
	if _, err := b.r.WriteIntent(ctx, repo.Intent{Ref: ref, Kind: repo.Logical, StartedAt: now}, clock); err != nil {
		t.Fatal(err)
	}
	if _, err := write(b.r, writing(root)); err != nil {
		t.Fatal(err)
	}
	racing := &fault.Store{Store: b.st, Before: func(op, key string) error {
		if op == "put" && strings.HasSuffix(key, "/deleted.json") {
			_, err := b.r.Publish(ctx, repo.Manifest{Ref: ref, Kind: repo.Logical, StartedAt: now, FinishedAt: now})
			return err
		}
		return nil
	}}
	r, err := repo.Open(ctx, racing, b.operator)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Delete(ctx, ref, now); err != nil {
		t.Fatal(err)
	}
	if list, err := b.r.Backups(ctx, "main"); err != nil || len(list) != 0 {
		t.Errorf("deleted, and listed: %v, %v", list, err)
	}
}

// Whoever can write to the bucket, and has no key, cannot hide a backup.
func TestTombstoneOfNobodyHidesNothing(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	root, _ := tree(t)
	backUp(t, b.r, root)
	put(t, b.st, "clusters/main/backups/"+string(ref.ID)+"/deleted.json", []byte("{}\n"))
	list, err := b.r.Backups(ctx, "main")
	if err != nil || len(list) != 1 || list[0].Err == nil {
		t.Errorf("Backups = %v, %v, want one with an error", list, err)
	}
}

// A pack that lost its end is damage, not trouble of the store.
func TestCutPackIsDamage(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	root, _ := tree(t)
	m := backUp(t, b.r, root)
	for key, content := range objects(t, b.st) {
		if !strings.HasSuffix(key, ".pack") {
			continue
		}
		for _, n := range []int{1, len(content) - 10} {
			if err := b.st.Delete(ctx, key); err != nil {
				t.Fatal(err)
			}
			put(t, b.st, key, content[:len(content)-n])
			rep, err := b.r.Read(ctx, m.ID, m.Content, repo.Reading{})
			if err != nil || !errors.Is(rep.Err(), fail.Corrupt) || !strings.Contains(rep.Err().Error(), key) {
				t.Errorf("%s cut by %d: %v, %v, want it named as corrupt", key, n, rep.Err(), err)
			}
		}
		return
	}
}

// own: frames of the first are interrupted by those of the second.
func TestFileChangesBetweenAttempts(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	dir := t.TempDir()
	content := make([]byte, 40*8192+100)
	for i := range content {
		content[i] = byte(i*7 + i>>8 + i>>13)
	}
	save := func() {
		if err := os.WriteFile(filepath.Join(dir, "16384"), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	save()
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	broken := &fault.Store{Store: b.st, Before: func(op, key string) error {
		if op == "put" && strings.Contains(key, "/tree-") {
			return errors.New("cut")
		}
		return nil
	}}
	r, err := repo.Open(ctx, broken, b.operator)
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range []int{0, 5, 21} {
		content[block*8192] ^= 0xff
		save()
		if _, err := write(r, writing(root)); err == nil {
			t.Fatal("the cut was not noticed")
		}
	}
	m := backUp(t, b.r, root)
	got, err := extract(t, b.r, m)
	if err != nil || !bytes.Equal(got["16384"], content) {
		t.Errorf("restored file differs, %v", err)
	}
}

// word of it, an attempt that works is taken for one that hangs.
func TestReadingDirectoriesIsProgress(t *testing.T) {
	b := setup(t, new(store.Mem), false)
	root, _ := tree(t)
	broken := &fault.Store{Store: b.st, Before: func(op, key string) error {
		if op == "put" && strings.Contains(key, "/tree-") {
			return errors.New("cut")
		}
		return nil
	}}
	r, err := repo.Open(ctx, broken, b.operator)
	if err != nil {
		t.Fatal(err)
	}
	w := writing(root)
	if _, err := write(r, w); err == nil {
		t.Fatal("the cut was not noticed")
	}
	var before atomic.Int64 // calls before anything was read
	count := func(p repo.Progress) {
		if p.Read == 0 && p.Sent == 0 {
			before.Add(1)
		}
	}
	w.Progress = count
	content, err := write(b.r, w)
	if err != nil || before.Load() < int64(content.Packs) {
		t.Errorf("Write: %d calls for %d packs, %v", before.Load(), content.Packs, err)
	}
	before.Store(0)
	if _, err := b.r.Read(ctx, ref.ID, content, repo.Reading{Progress: count}); err != nil || before.Load() < int64(content.Packs) {
		t.Errorf("Read: %d calls for %d packs, %v", before.Load(), content.Packs, err)
	}
}

// A deletion that falls between Publish's last look and its write wins: nothing
// is listed that lacks its packs, though who takes backups may delete nothing, and
// the next deletion clears away what was written.
func TestC2DeletionWhilePublishing(t *testing.T) {
	for _, cut := range []bool{false, true} {
		deletionWhilePublishing(t, cut)
	}
}

// deletionWhilePublishing lets the first try die behind its write, if it is to be
// cut, and then tries once more.
func deletionWhilePublishing(t *testing.T, cut bool) {
	b := setup(t, new(store.Mem), false)
	root, _ := tree(t)
	deleted, written := false, false
	var mu sync.Mutex // two senders
	racing := &fault.Store{Store: b.st, Before: func(op, key string) error {
		mu.Lock()
		defer mu.Unlock()
		if op == "delete" {
			return fail.StoreDenied
		}
		if cut && written {
			written, cut = false, false
			return fault.ErrInjected
		}
		written = written || op == "put" && strings.HasSuffix(key, "/manifest.json")
		if op == "put" && strings.HasSuffix(key, "/manifest.json") && !deleted {
			deleted = true
			if _, err := b.r.Delete(ctx, ref, now); err != nil {
				t.Error(err)
			}
		}
		return nil
	}}
	r, err := repo.Open(ctx, racing, b.operator)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tryBackUp(r, writing(root))
	if errors.Is(err, fault.ErrInjected) {
		_, err = r.Publish(ctx, repo.Manifest{Ref: ref, Kind: repo.Logical, Host: "db1", StartedAt: now, FinishedAt: now})
	}
	if !errors.Is(err, fail.NoBackup) || !deleted || cut {
		t.Errorf("err = %v, want no-backup", err)
	}
	if _, err := b.r.Backup(ctx, ref); !errors.Is(err, fail.NoBackup) {
		t.Errorf("Backup: %v, want no-backup", err)
	}
	if list, err := b.r.Backups(ctx, "main"); err != nil || len(list) > 0 {
		t.Errorf("Backups = %v, %v, want none", list, err)
	}
	if all, err := b.r.Records(ctx, "main"); err != nil || len(all) > 0 {
		t.Errorf("Records = %v, %v, want none", all, err)
	}
	if s, err := b.r.Sweep(ctx, "main", now); err != nil || len(s.Backups) != 1 {
		t.Errorf("Sweep = %+v, %v, want one", s, err)
	}
	for key := range objects(t, b.st) {
		if strings.HasPrefix(key, "clusters/") {
			t.Errorf("left behind: %s", key)
		}
	}
}

// Of a backup that is there, one document may be lost: it is listed, and kept.
func TestALostIntentHidesNothing(t *testing.T) {
	for _, lost := range []string{"intent.json", "draft.json"} {
		b := setup(t, new(store.Mem), false)
		root, want := tree(t)
		m := backUp(t, b.r, root)
		if err := b.st.Delete(ctx, "clusters/main/backups/"+string(ref.ID)+"/"+lost); err != nil {
			t.Fatal(err)
		}
		if s, err := b.r.Sweep(ctx, "main", now); err != nil || s.Objects > 0 {
			t.Errorf("without %s: swept %+v, %v", lost, s, err)
		}
		if list, err := b.r.Backups(ctx, "main"); err != nil || len(list) != 1 || list[0].Err != nil {
			t.Errorf("without %s: Backups = %v, %v", lost, list, err)
		}
		if got, err := extract(t, b.r, m); err != nil || !same(got, want) {
			t.Errorf("without %s: %v", lost, err)
		}
	}
}
