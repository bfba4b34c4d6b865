package wal_test

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// serverDir makes a data directory of the one server there is, the same for
// the whole test.
func serverDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(filepath.Dir(t.TempDir()), "data") // t.TempDir makes siblings
	if _, err := os.Stat(dir); err == nil {
		return dir
	}
	makeServer(t, dir)
	return dir
}

func makeServer(t *testing.T, dir string) {
	t.Helper()
	err := errors.Join(os.MkdirAll(filepath.Join(dir, "pg_wal/archive_status"), 0o700), os.MkdirAll(filepath.Join(dir, "global"), 0o700),
		os.WriteFile(filepath.Join(dir, "PG_VERSION"), []byte("15\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	control(t, dir, 1, pg.InProduction)
}

// control writes what ReadServer looks at.
func control(t *testing.T, dir string, timeline uint32, state pg.ControlState) {
	t.Helper()
	promoted(t, dir, timeline, 0, state)
}

// promoted is control with a minimum recovery point on a timeline of its own.
func promoted(t *testing.T, dir string, timeline, recovery uint32, state pg.ControlState) {
	t.Helper()
	b := make([]byte, 8192)
	le := binary.LittleEndian
	le.PutUint64(b, uint64(server.System))
	le.PutUint32(b[8:], 1300)
	le.PutUint32(b[16:], uint32(state))
	le.PutUint32(b[48:], timeline)
	le.PutUint32(b[144:], recovery)
	le.PutUint64(b[208:], math.Float64bits(1234567))
	le.PutUint32(b[216:], 8192)
	le.PutUint32(b[220:], 131072)
	le.PutUint32(b[228:], uint32(server.SegmentSize))
	le.PutUint32(b[288:], crc32.Checksum(b[:288], crc32.MakeTable(crc32.Castagnoli)))
	if err := os.WriteFile(filepath.Join(dir, "global/pg_control"), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

func archiver(r *repo.Repo) func(context.Context, repo.Archive, string) (*repo.Archiver, error) {
	return func(_ context.Context, a repo.Archive, instance string) (*repo.Archiver, error) {
		return r.Archiver(a, instance), nil
	}
}

// A site is a data directory that archives to a store.
type site struct {
	t   *testing.T
	dir string
	wal.Pusher
}

func newSite(t *testing.T, r *repo.Repo, dir, host string) *site {
	return &site{t, dir, wal.Pusher{Cluster: "main", DataDir: dir, Host: host, Place: "here", Connect: archiver(r)}}
}

// cloneOf makes another instance of the same server.
func (s *site) cloneOf(r *repo.Repo, host string) *site {
	s.t.Helper()
	return newSite(s.t, r, copyTree(s.t, s.dir, filepath.Join(s.t.TempDir(), host)), host)
}

// write makes a file that fits its name, with something of its own in it.
func (s *site) write(name string, own byte) string {
	s.t.Helper()
	b := content(s.t, name)
	if len(b) > 500_000 {
		b[500_000] = own
	}
	path := filepath.Join(s.dir, "pg_wal", name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// push archives a file and wants a kind of failure, "" for none.
func (s *site) push(name string, own byte, want fail.Kind) {
	s.t.Helper()
	if err := s.Push(ctx, s.write(name, own)); fail.KindOf(err) != want || (err == nil) != (want == "") {
		s.t.Errorf("%s pushes %s: %v, want %q", s.Host, name, err, want)
	}
}

// objects are all there are, as text.
func objects(t *testing.T, st store.Store) string {
	t.Helper()
	var all strings.Builder
	for o, err := range st.List(ctx, "clusters/", "") {
		if err != nil {
			t.Fatal(err)
		}
		rc, err := st.Get(ctx, o.Key, store.Range{})
		if err != nil {
			t.Fatal(err)
		}
		sum := sha256.New()
		io.Copy(sum, rc)
		rc.Close()
		fmt.Fprintf(&all, "%s %x\n", o.Key, sum.Sum(nil))
	}
	return all.String()
}

const seg = "0000000100000000000000"

func TestOneInstanceArchivesATimeline(t *testing.T) {
	st := new(store.Mem)
	r := archiveIn(t, st)
	first := newSite(t, r, serverDir(t), "db1")
	first.push(seg+"42", 1, "")
	clone := first.cloneOf(r, "db2")
	before := objects(t, st)
	if !strings.Contains(before, "/claims/00000001.0001.json") {
		t.Errorf("no claim among\n%s", before)
	}
	err := clone.Push(ctx, clone.write(seg+"43", 2))
	if !errors.Is(err, fail.TimelineTaken) || !strings.Contains(err.Error(), "on host db1 since 20") || !strings.Contains(fail.HintOf(err), "pgkeep-wal claim") {
		t.Errorf("a clone pushes: %v (hint: %s)", err, fail.HintOf(err))
	}
	clone.push(seg+"42", 2, fail.TimelineTaken)
	clone.push(seg+"42.00000028.backup", 2, fail.TimelineTaken)
	clone.push(seg+"42", 1, "") // as a standby does with archive_mode=always
	if after := objects(t, st); after != before {
		t.Errorf("a clone changed\n%sto\n%s", before, after)
	}
	first.push(seg+"43", 1, "")
	clone.push(seg+"44.partial", 2, "")
}

// Two clones that were promoted have the same history, to the byte.
func TestOneOfTwoPromotedClonesArchives(t *testing.T) {
	st := new(store.Mem)
	r := archiveIn(t, st)
	primary := newSite(t, r, serverDir(t), "db1")
	primary.push(seg+"42", 1, "")
	one, two := primary.cloneOf(r, "db2"), primary.cloneOf(r, "db3")
	control(t, one.dir, 2, pg.InProduction)
	control(t, two.dir, 2, pg.InProduction)
	one.push("00000002.history", 0, "")
	before := objects(t, st)
	two.push("00000002.history", 0, "")
	two.push("00000002000000000000004A", 3, fail.TimelineTaken)
	two.push(seg+"48", 1, fail.TimelineTaken)
	if after := objects(t, st); after != before {
		t.Errorf("the second changed\n%sto\n%s", before, after)
	}
	one.push("00000002000000000000004A", 2, "")
	two.push("00000002000000000000004A", 3, fail.TimelineTaken)
}

func TestATimelineIsTakenOver(t *testing.T) {
	st := new(store.Mem)
	r := archiveIn(t, st)
	old := newSite(t, r, serverDir(t), "db1")
	old.push(seg+"42", 1, "")
	moved := old.cloneOf(r, "db2")
	moved.push(seg+"43", 2, fail.TimelineTaken)
	took, err := moved.Claim(ctx)
	if err != nil || took.Was || took.From.Host != "db1" || took.Timeline != 1 {
		t.Errorf("Claim = %+v, %v", took, err)
	}
	moved.push(seg+"43", 2, "")
	old.push(seg+"44", 1, fail.TimelineTaken)
	if took, err := moved.Claim(ctx); err != nil || !took.Was {
		t.Errorf("Claim again = %+v, %v", took, err)
	}
	if _, err := old.Claim(ctx); err != nil { // back again
		t.Error(err)
	}
	moved.push(seg+"45", 2, fail.TimelineTaken)
	old.push(seg+"44", 1, "")
}

func TestOfManyWhoClaimAtOnceOneWins(t *testing.T) {
	r := archiveIn(t, new(store.Mem))
	first := newSite(t, r, serverDir(t), "db0")
	sites := []*site{first}
	for n := range 5 {
		sites = append(sites, first.cloneOf(r, fmt.Sprintf("db%d", n+1)))
	}
	won := make([]bool, len(sites))
	var g sync.WaitGroup
	for n, s := range sites {
		path := s.write(seg+"42", byte(n))
		g.Go(func() {
			err := s.Push(ctx, path)
			if err != nil && !errors.Is(err, fail.TimelineTaken) {
				t.Error(err)
			}
			won[n] = err == nil
		})
	}
	g.Wait()
	winners := 0
	for n, s := range sites {
		if won[n] {
			winners++
			s.push(seg+"43", byte(n), "")
		}
	}
	for n, s := range sites {
		if !won[n] {
			s.push(seg+"43", byte(n), fail.TimelineTaken)
		}
	}
	if winners != 1 {
		t.Errorf("%d won", winners)
	}
}

// With archive_mode=always a standby archives too, and may be faster than its
// primary.
func TestAStandbyIsNeverTheFirst(t *testing.T) {
	r := archiveIn(t, new(store.Mem))
	primary := newSite(t, r, serverDir(t), "db1")
	standby := primary.cloneOf(r, "db2")
	control(t, standby.dir, 1, pg.InArchiveRecovery)
	standby.push(seg+"42", 1, fail.TimelineTaken)
	primary.push(seg+"42", 1, "")
	standby.push(seg+"42", 1, "")

	if _, err := standby.Claim(ctx); err != nil { // unless it is told to
		t.Error(err)
	}
	standby.push(seg+"43", 1, "")
}

// What its primary did not live to archive, a promoted standby archives: up to
// where its own timeline begins.
func TestAPromotedStandbyArchivesTheSharedPast(t *testing.T) {
	r := archiveIn(t, new(store.Mem))
	primary := newSite(t, r, serverDir(t), "db1")
	primary.push(seg+"47", 1, "")
	standby := primary.cloneOf(r, "db2")
	control(t, standby.dir, 2, pg.InProduction)
	standby.write("00000002.history", 0) // it left timeline 1 in segment 4A
	standby.push(seg+"48", 1, fail.TimelineTaken)
	standby.push("00000002.history", 0, "")
	standby.push(seg+"48", 1, "")
	standby.push(seg+"49", 1, "")
	standby.push(seg+"4A", 1, fail.TimelineTaken)
	standby.push(seg+"4B", 1, fail.TimelineTaken)
	primary.push(seg+"4A", 2, "")
	primary.push(seg+"48", 2, fail.WALConflict)
}

// Whatever call of the store fails, before or after it took effect, a second
// push succeeds.
func TestPushOutlivesEveryFailure(t *testing.T) {
	for _, after := range []bool{false, true} {
		for at := 1; ; at++ {
			mem := new(store.Mem)
			archiveIn(t, mem)
			broken := &fault.Store{Store: mem, At: at, After: after}
			s := newSite(t, nil, filepath.Join(t.TempDir(), "data"), "db1")
			makeServer(t, s.dir)
			s.Connect = connect(t, broken)
			path := s.write(seg+"42", 1)
			err := s.Push(ctx, path)
			if !broken.Hit() {
				if err != nil || at < 5 {
					t.Fatalf("undisturbed, with %d calls: %v", at, err)
				}
				break
			}
			if !errors.Is(err, fault.ErrInjected) {
				t.Errorf("call %d broken, after=%v: %v", at, after, err)
			}
			s.Connect = connect(t, mem)
			if err := s.Push(ctx, path); err != nil {
				t.Errorf("call %d broken, after=%v: push again: %v", at, after, err)
			}
		}
	}
}

func connect(t *testing.T, st store.Store) func(context.Context, repo.Archive, string) (*repo.Archiver, error) {
	return func(_ context.Context, a repo.Archive, instance string) (*repo.Archiver, error) {
		return repo.NewArchiver(st, access(t), a, instance), nil
	}
}

// Nothing is sent to a place that is not the repository.
func TestNothingIsSentBeforeTheRepositoryIsKnown(t *testing.T) {
	for what, spoil := range map[string]func(st *store.Mem){
		"no marker": func(*store.Mem) {},
		"another's": func(st *store.Mem) {
			other := access(t)
			other.Signer, _ = seal.NewSigner()
			if _, _, err := repo.Init(ctx, st, other, nil, time.Now()); err != nil {
				t.Fatal(err)
			}
		},
	} {
		st := new(store.Mem)
		spoil(st)
		s := newSite(t, nil, serverDir(t), "db1")
		s.Connect = connect(t, st)
		if err := s.Push(ctx, s.write(seg+"42", 1)); err == nil {
			t.Errorf("%s: success", what)
		}
		if got := objects(t, st); got != "" {
			t.Errorf("%s: wrote %s", what, got)
		}
	}
}

// The primary fails, and two standbys are promoted one after the other, within
// one segment. PostgreSQL archives the last piece of the old timeline first: what
// it is refused for, it tries for ever, and the log of the only server that lives
// stays where it is.
func TestASecondFailoverWithinASegmentArchivesOn(t *testing.T) {
	st := new(store.Mem)
	r := archiveIn(t, st)
	primary := newSite(t, r, serverDir(t), "db1")
	primary.push(seg+"42", 1, "")
	primary.cloneOf(r, "refused").push(seg+"4A.partial", 9, "")
	b, c := primary.cloneOf(r, "db2"), primary.cloneOf(r, "db3")
	control(t, b.dir, 2, pg.InProduction)
	b.push("00000002.history", 0, "")
	b.push(seg+"4A.partial", 2, "") // as far as it had come
	control(t, c.dir, 3, pg.InProduction)
	c.push("00000003.history", 0, "")
	c.push(seg+"4A.partial", 3, "") // a little further
	c.push("00000003000000000000004A", 3, "")

	before := objects(t, st)
	c.push(seg+"4A.partial", 3, "")
	if after := objects(t, st); after != before {
		t.Errorf("pushed again, there is\n%safter\n%s", after, before)
	}
	if n := strings.Count(before, seg+"4A.partial."); n != 3 {
		t.Errorf("%d partial segments among\n%s", n, before)
	}
}
