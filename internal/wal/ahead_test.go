package wal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// waiting makes segments that PostgreSQL wants archived, and returns their names.
func (s *site) waiting(count int) (names []string) {
	s.t.Helper()
	for n := range count {
		name := fmt.Sprintf("%s%02X", seg, 0x42+n)
		s.write(name, byte(n))
		if err := os.WriteFile(s.ready(name), nil, 0o600); err != nil {
			s.t.Fatal(err)
		}
		names = append(names, name)
	}
	return names
}

func (s *site) ready(name string) string {
	return filepath.Join(s.dir, "pg_wal/archive_status", name+".ready")
}

// archive does as PostgreSQL does: it asks for a file, and forgets it then.
func (s *site) archive(name string) {
	s.t.Helper()
	if err := s.Push(ctx, filepath.Join(s.dir, "pg_wal", name)); err != nil {
		s.t.Errorf("%s: %v", name, err)
		return
	}
	if err := os.Remove(s.ready(name)); err != nil {
		s.t.Error(err)
	}
}

func (s *site) records() (names []string) {
	s.t.Helper()
	entries, err := os.ReadDir(filepath.Join(s.dir, "pg_wal/pgkeep/pushed"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, strings.TrimSuffix(e.Name(), ".json"))
	}
	return names
}

var errNetwork = errors.New("there is no network")

func offline(context.Context, repo.Archive, string) (*repo.Archiver, error) { return nil, errNetwork }

func TestFilesThatWaitGoUpTogether(t *testing.T) {
	st := new(store.Mem)
	s := newSite(t, archiveIn(t, st), serverDir(t), "db1")
	names := s.waiting(20)
	s.archive(names[0])
	if got := s.records(); strings.Join(got, " ") != strings.Join(names[1:16], " ") {
		t.Fatalf("records %q", got)
	}
	s.Connect = offline
	for _, name := range names[1:16] {
		s.archive(name)
	}
	if err := s.Push(ctx, filepath.Join(s.dir, "pg_wal", names[16])); !errors.Is(err, errNetwork) {
		t.Errorf("a file that nobody sent: %v", err)
	}
	if got := s.records(); len(got) > 0 {
		t.Errorf("left over: %q", got)
	}
	for _, name := range names[:16] {
		if got := strings.Count(objects(t, st), name); got != 1 {
			t.Errorf("%d objects of %s", got, name)
		}
	}
}

func TestNothingGoesUpOutOfTurnIfItShouldNot(t *testing.T) {
	st := new(store.Mem)
	s := newSite(t, archiveIn(t, st), serverDir(t), "db1")
	names := s.waiting(4)
	s.Parallel = 1
	s.archive(names[0])
	s.Parallel = 4
	if err := os.Remove(s.ready(names[2])); err != nil { // not complete yet
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), names[1]) // somewhere else: a call by hand
	if err := os.Rename(filepath.Join(s.dir, "pg_wal", names[1]), path); err != nil {
		t.Fatal(err)
	}
	if err := s.Push(ctx, path); err != nil {
		t.Error(err)
	}
	if got := s.records(); len(got) > 0 {
		t.Errorf("sent ahead: %q", got)
	}
	if err := os.Rename(path, filepath.Join(s.dir, "pg_wal", names[1])); err != nil {
		t.Fatal(err)
	}
	s.archive(names[1])
	if got := s.records(); len(got) > 0 {
		t.Errorf("sent ahead: %q", got)
	}
}

// A record counts only while everything is as it was.
func TestARecordIsBelievedOnlyIfAllFits(t *testing.T) {
	st := new(store.Mem)
	r := archiveIn(t, st)
	base := newSite(t, r, serverDir(t), "db1")
	for what, spoil := range map[string]func(s *site, segment, record string) error{
		"nothing changed": nil,
		"another byte, at the same time": func(s *site, segment, _ string) error {
			info, err := os.Stat(segment)
			if err != nil {
				return err
			}
			s.write(filepath.Base(segment), 77)
			return os.Chtimes(segment, time.Time{}, info.ModTime())
		},
		"another time": func(_ *site, segment, _ string) error { return os.Chtimes(segment, time.Time{}, time.Unix(1e9, 1)) },
		"another inode": func(_ *site, segment, _ string) error {
			return errors.Join(os.Rename(segment, segment+"~"), syscall.Link(segment+"~", segment), os.Remove(segment),
				cp(segment+"~", segment))
		},
		"another repository": func(s *site, _, _ string) error { s.Place = "there"; return nil },
		"another cluster":    func(s *site, _, _ string) error { s.Cluster = "other"; return nil },
		"another copy of the directory": func(s *site, _, _ string) error {
			dir := s.dir + "2"
			copyTree(s.t, s.dir, dir)
			s.dir, s.DataDir = dir, dir
			return nil
		},
		"a damaged record": func(_ *site, _, record string) error { return os.Truncate(record, 100) },
		"an empty record":  func(_ *site, _, record string) error { return os.Truncate(record, 0) },
		"no record":        func(_ *site, _, record string) error { return os.Remove(record) },
		"another's record": func(s *site, _, record string) error {
			return cp(filepath.Join(filepath.Dir(record), seg+"44.json"), record)
		},
	} {
		t.Run(what, func(t *testing.T) {
			st := new(store.Mem)
			r := archiveIn(t, st)
			s := newSite(t, r, filepath.Join(t.TempDir(), "data"), base.Host)
			makeServer(t, s.dir)
			names := s.waiting(3)
			s.archive(names[0])
			if len(s.records()) != 2 {
				t.Fatal("no records")
			}
			if spoil != nil {
				if err := spoil(s, filepath.Join(s.dir, "pg_wal", names[1]), filepath.Join(s.dir, "pg_wal/pgkeep/pushed", names[1]+".json")); err != nil {
					t.Fatal(err)
				}
			}
			s.Connect = offline
			err := s.Push(ctx, filepath.Join(s.dir, "pg_wal", names[1]))
			if spoil == nil && err != nil || spoil != nil && !errors.Is(err, errNetwork) {
				t.Errorf("push: %v", err)
			}
			for _, name := range s.records() {
				if name == names[1] {
					t.Error("the record is there still")
				}
			}
		})
	}
}

// A file is not read again if the times prove that nobody wrote to it; a write in
// the moment in which it was read may have left none of its own.
func TestTimesProveThatAFileIsTheSame(t *testing.T) {
	sent := time.Date(2026, 3, 29, 1, 0, 0, 0, time.UTC)
	for name, c := range map[string]struct {
		changed, now time.Time
		want         bool
	}{
		"complete for long":       {sent.Add(-time.Hour), sent.Add(-time.Hour), true},
		"complete a moment ago":   {sent.Add(-time.Second), sent.Add(-time.Second), false},
		"changed while it was":    {sent.Add(time.Second), sent.Add(time.Second), false},
		"changed since":           {sent.Add(-time.Hour), sent.Add(time.Minute), false},
		"replaced by an old file": {sent.Add(-time.Hour), sent.Add(-2 * time.Hour), false},
		"a clock that was ahead":  {sent.Add(time.Hour), sent.Add(time.Hour), false},
	} {
		if got := wal.Untouched(c.changed, sent, c.now); got != c.want {
			t.Errorf("%s: untouched = %t", name, got)
		}
	}
}

func cp(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(to, b, 0o600), os.Chtimes(to, time.Time{}, info.ModTime()))
}

// What happens to the others says nothing about the one that is asked for.
func TestTroubleAheadIsNoTroubleNow(t *testing.T) {
	mem := new(store.Mem)
	archiveIn(t, mem)
	s := newSite(t, nil, serverDir(t), "db1")
	names := s.waiting(5)
	if err := os.WriteFile(filepath.Join(s.dir, "pg_wal", names[3]), []byte("no segment"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.Connect = connect(t, &fault.Store{Store: mem, Before: func(op, key string) error {
		if op == "put" && strings.Contains(key, names[1]) {
			return fault.ErrInjected
		}
		return nil
	}})
	s.archive(names[0])
	if got := strings.Join(s.records(), " "); got != names[2]+" "+names[4] {
		t.Errorf("records: %s", got)
	}
	if err := s.Push(ctx, filepath.Join(s.dir, "pg_wal", names[1])); !errors.Is(err, fault.ErrInjected) {
		t.Errorf("its own turn: %v", err)
	}
	s.Connect = connect(t, mem)
	s.archive(names[1])
	s.archive(names[2])
	if err := s.Push(ctx, filepath.Join(s.dir, "pg_wal", names[3])); !errors.Is(err, fail.Corrupt) {
		t.Errorf("no segment: %v", err)
	}
}

func TestLeftoversAreSwept(t *testing.T) {
	s := newSite(t, archiveIn(t, new(store.Mem)), serverDir(t), "db1")
	names := s.waiting(3)
	dir := filepath.Join(s.dir, "pg_wal/pgkeep/pushed")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".pgkeep-tmp-x", seg + "41.json", "junk"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.archive(names[0])
	if got := strings.Join(s.records(), " "); got != names[1]+" "+names[2] {
		t.Errorf("there is %s", got)
	}
}

// One process looks ahead; another, started over it, sends its own file alone.
func TestOneProcessLooksAhead(t *testing.T) {
	s := newSite(t, archiveIn(t, new(store.Mem)), serverDir(t), "db1")
	names := s.waiting(3)
	if _, err := wal.OpenInstance(s.dir); err != nil {
		t.Fatal(err)
	}
	lock, err := os.Create(filepath.Join(s.dir, "pg_wal/pgkeep/ahead.lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	s.archive(names[0])
	if got := s.records(); len(got) > 0 {
		t.Errorf("sent ahead: %q", got)
	}
}

// Files that hang in the store do not hold up the one that is done.
func TestPostgresDoesNotWaitForWhatHangsAhead(t *testing.T) {
	mem := new(store.Mem)
	archiveIn(t, mem)
	s := newSite(t, nil, serverDir(t), "db1")
	names := s.waiting(3)
	s.Connect = connect(t, hanging{mem, names[1]})
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := s.Push(ctx, filepath.Join(s.dir, "pg_wal", names[0])); err != nil || ctx.Err() != nil {
		t.Errorf("Push = %v (%v)", err, ctx.Err())
	}
}

// hanging is a store that does not answer to what goes to some keys.
type hanging struct {
	store.Store
	name string
}

func (h hanging) Put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	if strings.Contains(key, h.name) {
		<-ctx.Done()
		return ctx.Err()
	}
	return h.Store.Put(ctx, key, r, opt)
}

// Whatever a record holds, it is not taken for the truth.
func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"repository":"here","cluster":"main","name":"x"}`))
	f.Add([]byte("{"))
	f.Fuzz(func(t *testing.T, b []byte) {
		s := newSite(t, nil, serverDir(t), "db1")
		s.Connect = offline
		name := s.waiting(1)[0]
		dir := filepath.Join(s.dir, "pg_wal/pgkeep/pushed")
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(filepath.Join(dir, name+".json"), b, 0o600)); err != nil {
			t.Fatal(err)
		}
		if err := s.Push(ctx, filepath.Join(s.dir, "pg_wal", name)); !errors.Is(err, errNetwork) {
			t.Errorf("%q: %v", b, err)
		}
	})
}
