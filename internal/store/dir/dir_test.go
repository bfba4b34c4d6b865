package dir_test

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/iotest"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/store/dir"
	"github.com/pgkeep/pgkeep/internal/storetest"
)

func TestConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store { return open(t, t.TempDir()) })
}

func TestOpenWantsADirectory(t *testing.T) {
	_, err := dir.Open(filepath.Join(t.TempDir(), "unmounted"))
	if !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "mounted") {
		t.Errorf("err = %v, hint %q, want bad-config that asks for the mount", err, fail.HintOf(err))
	}
}

// A process that is killed leaves its temporary file.
func TestUnfinishedFilesAreNoObjects(t *testing.T) {
	name := t.TempDir()
	s := open(t, name)
	put(t, s, "a/k", "v")
	left := filepath.Join(name, "a", ".pgkeep-tmp-LEFT")
	if err := os.WriteFile(left, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantKeys(t, s, "a/k")
	if _, err := s.Get(t.Context(), "a/.pgkeep-tmp-LEFT", store.Range{}); err == nil {
		t.Error("an unfinished file can be read as an object")
	}
	if n, err := s.AbortStale(t.Context(), time.Hour); n != 0 || err != nil {
		t.Errorf("young file: AbortStale = %d, %v, want 0, nil", n, err)
	}
	old := time.Now().Add(-2 * time.Hour)
	if err := os.Chtimes(left, old, old); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(name, "a/k"), old, old); err != nil {
		t.Fatal(err)
	}
	if n, err := s.AbortStale(t.Context(), time.Hour); n != 1 || err != nil {
		t.Errorf("old file: AbortStale = %d, %v, want 1, nil", n, err)
	}
	if _, err := os.Stat(left); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the old file is still there (%v)", err)
	}
	wantKeys(t, s, "a/k")
}

func TestAFailedPutLeavesNoFile(t *testing.T) {
	name := t.TempDir()
	s := open(t, name)
	half := io.MultiReader(strings.NewReader("half"), iotest.ErrReader(errors.New("cut")))
	if err := s.Put(t.Context(), "k", half, store.PutOptions{}); err == nil {
		t.Fatal("put of a broken reader succeeded")
	}
	put(t, s, "other", "x")
	if err := s.Put(t.Context(), "other", strings.NewReader("y"), store.PutOptions{IfAbsent: true}); !errors.Is(err, store.ErrExist) {
		t.Errorf("err = %v, want ErrExist", err)
	}
	if entries, err := os.ReadDir(name); err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v (%v)", entries, err)
	}
}

func TestDeleteRemovesEmptyDirectories(t *testing.T) {
	name := t.TempDir()
	s := open(t, name)
	put(t, s, "a/b/c/k", "v")
	put(t, s, "a/k", "v")
	if err := s.Delete(t.Context(), "a/b/c/k"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(name, "a/b")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a/b is still there (%v)", err)
	}
	wantKeys(t, s, "a/k")
}

// One who deletes takes away the directory that another is about to write in.
func TestPutAndDeleteMeetInOneDirectory(t *testing.T) {
	s := open(t, t.TempDir())
	errs := make([]error, 4)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() {
			key := fmt.Sprintf("a/b/%d", i)
			for range 200 {
				err := s.Put(t.Context(), key, strings.NewReader("x"), store.PutOptions{IfAbsent: true})
				if err == nil {
					err = s.Delete(t.Context(), key)
				}
				if err != nil {
					errs[i] = err
					return
				}
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Error(err)
	}
	wantKeys(t, s)
}

func TestLinksOutOfTheDirectoryAreNotFollowed(t *testing.T) {
	name, outside := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "secret"), []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(name, "out")); err != nil {
		t.Fatal(err)
	}
	s := open(t, name)
	if _, err := s.Get(t.Context(), "out/secret", store.Range{}); err == nil || errors.Is(err, store.ErrNotExist) {
		t.Errorf("get: err = %v, want one that is not ErrNotExist", err)
	}
	if err := s.Put(t.Context(), "out/new", strings.NewReader("x"), store.PutOptions{}); err == nil {
		t.Error("put went through the link")
	}
	if err := s.Delete(t.Context(), "out/secret"); err == nil {
		t.Error("delete went through the link")
	}
	// It could be part of a repository: leaving it out of a list would hide that.
	for _, err := range s.List(t.Context(), "", "") {
		if err == nil {
			t.Error("list went past the link")
		}
	}
}

func TestAFileCutWhileItIsReadIsAnUnexpectedEOF(t *testing.T) {
	name := t.TempDir()
	s := open(t, name)
	put(t, s, "k", "0123456789")
	r, err := s.Get(t.Context(), "k", store.Range{})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := os.Truncate(filepath.Join(name, "k"), 4); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(r); string(b) != "0123" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read %q, %v, want 0123, %v", b, err, io.ErrUnexpectedEOF)
	}
}

func TestTroubleOfTheFileSystemHasAKind(t *testing.T) {
	s := open(t, t.TempDir())
	for _, c := range []struct {
		errno syscall.Errno
		want  fail.Kind
	}{
		{syscall.ENOSPC, fail.NoSpace},
		{syscall.EDQUOT, fail.NoSpace},
		{syscall.EACCES, fail.StoreDenied},
		{syscall.EROFS, fail.StoreDenied},
		{syscall.EIO, fail.Unknown},
	} {
		err := s.Put(t.Context(), "k", iotest.ErrReader(&os.PathError{Op: "write", Path: "k", Err: c.errno}), store.PutOptions{})
		if got := fail.KindOf(err); got != c.want || !errors.Is(err, c.errno) {
			t.Errorf("%v: kind %q, want %q (%v)", c.errno, got, c.want, err)
		}
	}
}

func open(t *testing.T, name string) *dir.Store {
	t.Helper()
	s, err := dir.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func put(t *testing.T, s store.Store, key, val string) {
	t.Helper()
	if err := s.Put(t.Context(), key, strings.NewReader(val), store.PutOptions{}); err != nil {
		t.Fatal(err)
	}
}

func wantKeys(t *testing.T, s store.Store, want ...string) {
	t.Helper()
	var got []string
	for o, err := range s.List(t.Context(), "", "") {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, o.Key)
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("list = %q, want %q", got, want)
	}
}
