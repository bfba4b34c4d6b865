package wal_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// A helped site is one whose Push has the processes it wants, as goroutines. It
// lives in a synctest bubble.
type helped struct {
	*site
	st               store.Store
	connected        atomic.Int32 // by Push
	running, started atomic.Int32
	stop             context.CancelFunc // kills those that run
}

func newHelped(t *testing.T, mem, behind store.Store) *helped {
	t.Helper()
	archiveIn(t, mem)
	dir := filepath.Join(t.TempDir(), "data")
	makeServer(t, dir)
	h := &helped{site: newSite(t, nil, dir, "db1"), st: mem}
	h.Parallel = 3
	helper := h.Pusher
	helper.Connect = connect(t, behind)
	h.Connect = func(ctx context.Context, a repo.Archive, instance string) (*repo.Archiver, error) {
		h.connected.Add(1)
		return connect(t, mem)(ctx, a, instance)
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	h.stop = cancel
	h.Spawn = func(after pg.WALName) error {
		h.started.Add(1)
		h.running.Add(1)
		go func() {
			defer h.running.Add(-1)
			helper.PushAhead(ctx, after)
		}()
		return nil
	}
	return h
}

// archive wants a file archived in turn, by Push itself or by who was there first.
func (h *helped) archive(name string, ahead bool) {
	h.t.Helper()
	before := h.connected.Load()
	h.site.archive(name)
	if (h.connected.Load() == before) != ahead {
		h.t.Errorf("%s: sent ahead: %t, want %t", name, !ahead, ahead)
	}
	if got := strings.Count(objects(h.t, h.st), name); got != 1 {
		h.t.Errorf("%d objects of %s", got, name)
	}
}

func (h *helped) idle() {
	h.t.Helper()
	if n := h.running.Load(); n > 0 {
		h.t.Errorf("%d processes run on", n)
	}
	if got := h.records(); len(got) > 0 {
		h.t.Errorf("left over: %q", got)
	}
}

func TestAProcessOfItsOwnSendsWhatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := new(store.Mem)
		h := newHelped(t, mem, mem)
		names := h.waiting(40)
		h.archive(names[0], false)
		settle()
		if got := h.records(); len(got) != 16 {
			t.Errorf("PostgreSQL is behind %d files, want 16", len(got))
		}
		for _, name := range names[1:] {
			h.archive(name, true)
			time.Sleep(50 * time.Millisecond)
		}
		if h.started.Load() != 1 {
			t.Errorf("%d processes were started", h.started.Load())
		}
		settle()
		h.idle()
	})
}

// It does not live for ever, and the next one goes on where it was.
func TestAProcessEndsAfterAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := new(store.Mem)
		h := newHelped(t, mem, mem)
		names := h.waiting(30)
		h.archive(names[0], false)
		time.Sleep(11 * time.Second)
		if h.running.Load() > 0 {
			t.Error("it runs on, and PostgreSQL asks for nothing")
		}
		if len(h.records()) != 16 {
			t.Errorf("%d records", len(h.records()))
		}
		h.archive(names[1], false) // the repository is looked at again: the records are old
		h.archive(names[2], false)
		settle()
		if h.started.Load() != 2 {
			t.Errorf("%d processes were started", h.started.Load())
		}
		if got := h.records(); len(got) != 16 || got[15] != names[18] {
			t.Errorf("records %q", got)
		}
		time.Sleep(time.Minute)
	})
}

// Whose the timeline is, it asks now and then, not for each file; and when another
// instance takes the timeline over, it sends no more.
func TestAProcessSeesThatItsTimelineIsTakenOver(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := new(store.Mem)
		var asked atomic.Int32
		h := newHelped(t, mem, &fault.Store{Store: mem, Before: func(op, key string) error {
			if op == "list" && strings.Contains(key, "/claims/") {
				asked.Add(1)
			}
			return nil
		}})
		names := h.waiting(30)
		h.archive(names[0], false)
		settle()
		if got := len(h.records()); got != 16 || asked.Load() > 3 { // three go up at a time
			t.Errorf("asked %d times for %d files", asked.Load(), got)
		}
		r, err := repo.Open(ctx, mem, access(t))
		if err != nil {
			t.Fatal(err)
		}
		clone := h.cloneOf(r, "db2")
		if _, err := clone.Claim(ctx); err != nil {
			t.Fatal(err)
		}
		for _, name := range names[1:4] { // they were sent in time
			h.archive(name, true)
		}
		settle()
		if got := h.records(); len(got) != 13 {
			t.Errorf("%d records: it goes on sending", len(got))
		}
	})
}

func TestOneFileThatWaitsTakesNoProcess(t *testing.T) {
	mem := new(store.Mem)
	s := newSite(t, archiveIn(t, mem), serverDir(t), "db1")
	s.Spawn = func(pg.WALName) error { t.Error("a process is started"); return nil }
	names := s.waiting(2)
	s.archive(names[0])
	if got := s.records(); len(got) != 1 {
		t.Errorf("records: %q", got)
	}
	s.Connect = offline
	s.archive(names[1])
}

// After a file that was sent ahead, PostgreSQL asks for the next one at once.
func TestAProcessLeavesTheFileThatPostgresAsksForNow(t *testing.T) {
	s := newSite(t, archiveIn(t, new(store.Mem)), serverDir(t), "db1")
	names := s.waiting(2)
	s.archive(names[0])
	s.Connect = offline
	var after []string
	s.Spawn = func(n pg.WALName) error { after = append(after, n.String()); return nil }
	for _, name := range []string{seg + "44", seg + "45", seg + "46"} {
		s.write(name, 1)
		if err := os.WriteFile(s.ready(name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s.archive(names[1])
	if len(after) != 1 || after[0] != seg+"44" {
		t.Errorf("a process sends what comes after %q, want %s44", after, seg)
	}
}

// Whatever becomes of the process, PostgreSQL gets its files archived.
func TestNoProcessIsNeeded(t *testing.T) {
	for what, spawn := range map[string]func(pg.WALName) error{
		"it cannot be started": func(pg.WALName) error { return errors.New("no memory") },
		"it dies at once":      func(pg.WALName) error { return nil },
	} {
		t.Run(what, func(t *testing.T) {
			mem := new(store.Mem)
			s := newSite(t, archiveIn(t, mem), filepath.Join(t.TempDir(), "data"), "db1")
			makeServer(t, s.dir)
			s.Spawn = spawn
			names := s.waiting(20)
			for _, name := range names {
				s.archive(name)
			}
			for _, name := range names {
				if got := strings.Count(objects(t, mem), name); got != 1 {
					t.Errorf("%d objects of %s", got, name)
				}
			}
		})
	}
}

// A slow store holds back the writing of one object.
type slow struct {
	store.Store
	name string
	open chan struct{}
	puts atomic.Int32
}

func (s *slow) Put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	if strings.Contains(key, s.name) {
		s.puts.Add(1)
		select {
		case <-s.open:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return s.Store.Put(ctx, key, r, opt)
}

func TestAFileThatIsOnItsWayIsNotSentTwice(t *testing.T) {
	for what, tt := range map[string]struct {
		then        func(h *helped, g *slow)
		ahead       bool
		least, most time.Duration
	}{
		"it comes":           {func(_ *helped, g *slow) { close(g.open) }, true, 3 * time.Second, 4 * time.Second},
		"it hangs":           {func(*helped, *slow) {}, false, 30 * time.Second, 31 * time.Second},
		"its process dies":   {func(h *helped, _ *slow) { h.stop() }, false, 3 * time.Second, 4 * time.Second},
		"the directory goes": {func(h *helped, _ *slow) { os.Remove(filepath.Join(h.dir, "pg_wal/pgkeep/ahead.lock")) }, false, 3 * time.Second, 5 * time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			mem := new(store.Mem)
			g := &slow{Store: mem, open: make(chan struct{})}
			h := newHelped(t, mem, g)
			names := h.waiting(6)
			g.name = names[1]
			h.archive(names[0], false)
			settle()
			start := time.Now()
			time.AfterFunc(3*time.Second, func() { tt.then(h, g) })
			before := h.connected.Load()
			ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
			defer cancel()
			if err := h.Push(ctx, filepath.Join(h.dir, "pg_wal", names[1])); err != nil {
				t.Errorf("%s: %v", what, err)
			}
			if took := time.Since(start); took < tt.least || took > tt.most {
				t.Errorf("%s: it took %v", what, took)
			}
			if ahead := h.connected.Load() == before; ahead != tt.ahead {
				t.Errorf("%s: sent ahead: %t", what, ahead)
			}
			if got := g.puts.Load(); got != 1 {
				t.Errorf("%s: sent %d times ahead", what, got)
			}
			time.Sleep(2 * time.Minute)
			if h.running.Load() > 0 {
				t.Errorf("%s: it runs on", what)
			}
		})
	}
}

// What one who was killed has left behind delays nobody.
func TestTheMarkOfADeadProcessIsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		mem := new(store.Mem)
		h := newHelped(t, mem, mem)
		names := h.waiting(4)
		h.archive(names[0], false)
		settle()
		dir := filepath.Join(h.dir, "pg_wal/pgkeep/pushed")
		if err := errors.Join(os.Remove(filepath.Join(dir, names[1]+".json")), os.WriteFile(filepath.Join(dir, names[1]+".sending"), nil, 0o600)); err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		h.archive(names[1], false)
		if took := time.Since(start); took > time.Second {
			t.Errorf("it took %v", took)
		}
		settle()
	})
}

// Who looks ahead for a server ends with it, and with the data directory.
func TestAProcessEndsWithItsServer(t *testing.T) {
	for what, end := range map[string]func(dir string) error{
		"removed":            os.RemoveAll,
		"renamed":            func(dir string) error { return os.Rename(dir, dir+".old") },
		"restored":           func(dir string) error { return os.RemoveAll(filepath.Join(dir, "pg_wal/pgkeep")) },
		"stopped":            func(dir string) error { return os.Remove(filepath.Join(dir, "postmaster.pid")) },
		"crashed, restarted": func(dir string) error { return running(dir, os.Getppid()) },
		"crashed":            nil,
	} {
		server := exec.Command("sleep", "1000")
		if err := server.Start(); err != nil {
			t.Fatal(err)
		}
		crash := func(string) error { server.Process.Kill(); server.Wait(); return nil }
		defer crash("")
		if end == nil {
			end = crash
		}
		synctest.Test(t, func(t *testing.T) {
			mem := new(store.Mem)
			h := newHelped(t, mem, mem)
			if err := running(h.dir, server.Process.Pid); err != nil {
				t.Fatal(err)
			}
			names := h.waiting(30)
			h.archive(names[0], false)
			settle()
			if h.running.Load() != 1 {
				t.Errorf("%s: it has ended before", what)
			}
			if err := end(h.dir); err != nil {
				t.Fatal(err)
			}
			settle()
			if h.running.Load() > 0 {
				t.Errorf("%s: it runs on", what)
			}
			if _, err := os.Stat(filepath.Join(h.dir, "pg_wal/pgkeep")); err == nil && (what == "removed" || what == "restored") {
				t.Errorf("%s: it made something there", what)
			}
		})
	}
}

// running makes a data directory one that a process serves.
func running(dir string, pid int) error {
	return os.WriteFile(filepath.Join(dir, "postmaster.pid"), fmt.Appendf(nil, "%d\n%s\n1763856000\n5432\n", pid, dir), 0o600)
}

// Another repository may have been made at the same place since.
func TestARecordIsOfOneRepository(t *testing.T) {
	one, two := new(store.Mem), new(store.Mem)
	s := newSite(t, archiveIn(t, one), serverDir(t), "db1")
	names := s.waiting(4)
	s.archive(names[0])
	for _, name := range names[1:] {
		age(t, filepath.Join(s.dir, "pg_wal/pgkeep/pushed", name+".json"))
	}
	before := objects(t, one)
	s.Connect = connect(t, readOnly{one})
	s.archive(names[1]) // the same: it is not sent again
	if objects(t, one) != before {
		t.Error("it was written again")
	}
	s.Connect = offline
	if err := s.Push(ctx, filepath.Join(s.dir, "pg_wal", names[2])); !errors.Is(err, errNetwork) {
		t.Errorf("nobody knows what is there: %v", err)
	}
	archiveIn(t, two)
	s.Connect = connect(t, two)
	s.Parallel = 1
	s.archive(names[3])
	if !strings.Contains(objects(t, two), names[3]) {
		t.Errorf("%s is not in the repository that is there now", names[3])
	}
}

// readOnly is a store that cannot be written.
type readOnly struct{ store.Store }

func (readOnly) Put(context.Context, string, io.Reader, store.PutOptions) error {
	return errors.New("read-only")
}

// age makes a record one of long ago.
func age(t *testing.T, record string) {
	t.Helper()
	b, err := os.ReadFile(record)
	if err != nil {
		t.Fatal(err)
	}
	before, after, ok := strings.Cut(string(b), `"archived_ns":`)
	digits := strings.IndexAny(after, ",}")
	if !ok || digits < 0 {
		t.Fatalf("%s", b)
	}
	text := before + `"archived_ns":` + strconv.FormatInt(time.Now().Add(-time.Hour).UnixNano(), 10) + after[digits:]
	if err := os.WriteFile(record, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// A fast promotion makes no checkpoint: pg_control names the old timeline still.
func TestAPromotedStandbyClaimsItsNewTimeline(t *testing.T) {
	r := archiveIn(t, new(store.Mem))
	primary := newSite(t, r, serverDir(t), "db1")
	primary.push(seg+"42", 1, "")
	standby := primary.cloneOf(r, "db2")
	promoted(t, standby.dir, 1, 2, pg.InProduction)
	if took, err := standby.Claim(ctx); err != nil || took.Timeline != 2 || took.Was || took.From.Number != 0 {
		t.Errorf("Claim = %+v, %v", took, err)
	}
	primary.push(seg+"43", 1, "")
	promoted(t, standby.dir, 1, 2, pg.InArchiveRecovery) // not promoted: it replays 2, and its checkpoint is of 1
	if s, err := wal.ReadServer(standby.dir); err != nil || s.Timeline != 1 {
		t.Errorf("in recovery: %+v, %v", s, err)
	}
}
