package restore_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/restore"
)

// Class C10: PostgreSQL replays the making of a tablespace at its path, and would
// write over that of the source beside it.
func TestC10TheSourcesTablespacesAreNotWrittenOver(t *testing.T) {
	s := newSite(t)
	s.exec("CREATE EXTENSION pg_walinspect")
	s.take()
	s.rows(5)
	before := s.position()
	s.rows(5)
	made := time.Now()
	s.until("the clock has gone on", func() bool { return time.Since(made) > 100*time.Millisecond })
	start := s.position()
	later := s.mkdir("later")
	s.exec("CREATE TABLESPACE later LOCATION '"+later+"'", "CREATE TABLE late (i int) TABLESPACE later", "INSERT INTO late SELECT generate_series(1, 1000)")
	making, err := pg.ParseLSN(query[string](t, s.pg, fmt.Sprintf(
		"SELECT start_lsn::text FROM pg_get_wal_records_info('%v', pg_current_wal_flush_lsn()) WHERE resource_manager = 'Tablespace'", start)))
	if err != nil {
		t.Fatal(err)
	}
	s.rows(5)
	behind, behindTime := s.position(), query[time.Time](t, s.pg, "SELECT clock_timestamp()")
	s.rows(5)
	s.archived()
	s.exec("INSERT INTO late SELECT generate_series(1001, 6000)", "CHECKPOINT") // in no archive yet
	for what, target := range map[string]restore.Target{
		"the latest moment": latestMoment,
		"a time behind":     {Kind: restore.ToTime, Time: behindTime},
		"a position behind": {Kind: restore.ToLSN, LSN: behind},
		"the very record":   {Kind: restore.ToLSN, LSN: making}, // no commit before it is as late as the tablespace
	} {
		p := s.physical("beside", target)
		if _, err := p.Plan(t.Context()); !errors.Is(err, fail.NotEmpty) || !strings.Contains(fail.HintOf(err), "restore to a moment before "+made.UTC().Format("2006-01-02T")) {
			t.Errorf("%s: %v; %s", what, err, fail.HintOf(err))
		}
		if _, err := os.Lstat(p.Dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: %s is there (%v)", what, p.Dir, err)
		}
	}
	for _, target := range []restore.Target{{Kind: restore.Immediate}, {Kind: restore.ToLSN, LSN: before}} {
		p := s.physical("beside "+string(target.Kind), target)
		s.restored(p)
		server, err := s.start(p, nil)
		if err != nil {
			t.Fatal(err)
		}
		server.Kill()
	}
	if err := s.pg.Restart(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	if n := query[int](t, s.pg, "SELECT count(*) FROM late"); n != 6000 {
		t.Errorf("the source has %d rows of 6000", n)
	}
	// With a backup that holds it, there is nothing to fear.
	s.take()
	p := s.physical("again", latestMoment)
	oid := query[string](t, s.pg, "SELECT oid::text FROM pg_tablespace WHERE spcname = 'later'")
	p.Tablespaces[oid] = filepath.Join(s.dir, "again/later")
	s.restored(p)
	// Nor if the link is younger, for a standby stands there that was made since. Unless
	// the tablespace was made while that backup was taken.
	link := filepath.Join(s.pg.DataDir, "pg_tblspc", oid)
	touch := func(at time.Time) {
		t.Helper()
		if err := unix.Lutimes(link, []unix.Timeval{unix.NsecToTimeval(at.UnixNano()), unix.NsecToTimeval(at.UnixNano())}); err != nil {
			t.Fatal(err)
		}
	}
	touch(time.Now().Add(-time.Hour))
	s.take()
	touch(time.Now())
	p = s.physical("of a standby", latestMoment)
	p.Tablespaces[oid] = filepath.Join(s.dir, "of a standby/later")
	if _, err := p.Plan(t.Context()); err != nil {
		t.Errorf("a standby that was made since: %v", err)
	}
	touch(time.Now().Add(time.Minute))
	s.take()
	p = s.physical("once more", latestMoment)
	p.Tablespaces[oid] = filepath.Join(s.dir, "once more/later")
	if _, err := p.Plan(t.Context()); !errors.Is(err, fail.NotEmpty) {
		t.Errorf("a tablespace made during the backup: %v", err)
	}
}

func (s *site) position() pg.LSN {
	s.t.Helper()
	lsn, err := pg.ParseLSN(query[string](s.t, s.pg, "SELECT pg_current_wal_insert_lsn()::text"))
	if err != nil {
		s.t.Fatal(err)
	}
	return lsn
}

// Class C10: a copy of the source's data directory has links to the tablespaces
// of the source, which runs.
func TestC10DeltaOverACopySparesTheSourcesTablespaces(t *testing.T) {
	s := newSite(t)
	s.take()
	s.archived()
	p := s.physical("copy", latestMoment)
	if out, err := exec.Command("cp", "-a", s.pg.DataDir, p.Dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if err := os.Remove(filepath.Join(p.Dir, "postmaster.pid")); err != nil {
		t.Fatal(err)
	}
	p.Delta = true
	space := filepath.Join(s.dir, "space")
	before := tree(t, space)
	for what, to := range map[string]map[string]string{
		"where it was":        nil,
		"there on request":    {s.space: space},
		"in it":               {s.space: filepath.Join(space, "new")},
		"in the source":       {s.space: filepath.Join(s.pg.DataDir, "pg_tblspc", "new")},
		"the same, by a link": {s.space: filepath.Join(p.Dir, "pg_tblspc", s.space)},
	} {
		p.Tablespaces = to
		if _, err := p.Plan(t.Context()); !errors.Is(err, fail.NotEmpty) || !strings.Contains(fail.HintOf(err), "--tablespace-map") {
			t.Errorf("%s: %v; %s", what, err, fail.HintOf(err))
		}
	}
	if diff := cmp.Diff(before, tree(t, space)); diff != "" {
		t.Error(diff)
	}
	// Nor is the link believed when the source is out of sight, unless somebody says so.
	source, aside := s.pg.DataDir, s.pg.DataDir+"-aside"
	move := func(from, to string) {
		t.Helper()
		if err := os.Rename(from, to); err != nil {
			t.Fatal(err)
		}
	}
	move(source, aside)
	p.Tablespaces = nil
	if _, err := p.Plan(t.Context()); !errors.Is(err, fail.NotEmpty) || !strings.Contains(fail.HintOf(err), "--tablespace-map") {
		t.Errorf("without a map: %v; %s", err, fail.HintOf(err))
	}
	p.Tablespaces = map[string]string{s.space: space}
	if _, err := p.Plan(t.Context()); err != nil {
		t.Errorf("with a map: %v", err)
	}
	// At the place of the source, the link is its own.
	move(p.Dir, source)
	p.Tablespaces, p.Dir = nil, source
	if _, err := p.Plan(t.Context()); err != nil {
		t.Errorf("over the source: %v", err)
	}
	move(source, source+"-copy")
	move(aside, source)
}
