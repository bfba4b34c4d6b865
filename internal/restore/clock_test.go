package restore_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/restore"
)

// clockSource is a library that stands between a server and the C library: while a
// file says so, the server's clock stands still at so many microseconds since 1970.
const clockSource = `
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/time.h>
#include <unistd.h>
int gettimeofday(struct timeval *restrict tv, void *restrict tz)
{
	static int (*real)(struct timeval *, void *);
	char text[32];
	const char *file = getenv("PGKEEP_TEST_CLOCK");
	int fd = file ? open(file, O_RDONLY) : -1;
	if (fd >= 0) {
		ssize_t n = read(fd, text, sizeof text - 1);
		close(fd);
		if (n > 0) {
			text[n] = 0;
			long long at = atoll(text);
			tv->tv_sec = at / 1000000;
			tv->tv_usec = at % 1000000;
			return 0;
		}
	}
	if (!real)
		real = (int (*)(struct timeval *, void *)) dlsym(RTLD_NEXT, "gettimeofday");
	return real(tv, tz);
}
`

// At the source the clock is set back and forth, by minutes, and stands still:
// whatever time is asked for, the plan says what PostgreSQL makes of it, and that is
// what is restored.
func TestATimeMeansWhatItMeansToPostgreSQL(t *testing.T) {
	dir := lab.DirForTest(t)
	source, library, clock := filepath.Join(dir, "clock.c"), filepath.Join(dir, "clock.so"), filepath.Join(dir, "clock")
	if err := os.WriteFile(source, []byte(clockSource), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "cc", "-shared", "-fPIC", "-o", library, source, "-ldl").CombinedOutput(); err != nil {
		t.Fatalf("cc: %v\n%s", err, out)
	}
	s := newSiteOf(t, 0, "LD_PRELOAD="+library, "PGKEEP_TEST_CLOCK="+clock)
	first := query[string](t, s.pg, "SELECT pg_walfile_name(pg_current_wal_lsn())")
	s.take()
	noon := time.Now().Add(time.Hour).Truncate(time.Second)
	minutes := []int{1, 2, 3, 4, 5, 3, 4, 4, 5, 6, 30, 31, 7, 8, 8, 9, 10} // set back twice, and ahead once; some twice
	for i, m := range minutes {
		at := noon.Add(time.Duration(m) * time.Minute)
		if err := os.WriteFile(clock, fmt.Append(nil, at.UnixMicro()), 0o644); err != nil {
			t.Fatal(err)
		}
		sql := fmt.Sprintf("INSERT INTO ledger SELECT %d, string_agg(md5(random()::text), '') FROM generate_series(1, 20000)", i+1)
		if i == 7 {
			sql = "BEGIN; INSERT INTO ledger VALUES (-1); ROLLBACK"
		}
		s.exec(sql)
	}
	if err := os.Remove(clock); err != nil {
		t.Fatal(err)
	}
	last := s.archived()
	told := &story{site: s, ways: map[pg.Timeline][]line{1: dump(t, s.pg, first, last)}, row: map[pg.Timeline]map[uint32]int32{1: {}}}
	for i, xid := range query[[]int64](t, s.pg, "SELECT array_agg(xmin::text::bigint ORDER BY seq) FROM ledger") {
		told.row[1][uint32(xid)] = seqs(t, s.pg)[i]
	}
	if times := told.times(noon); !slices.Equal(times, minutes) {
		t.Fatalf("the log says minutes %v, want %v", times, minutes)
	}

	type asked struct {
		minute    int
		by        time.Duration
		exclusive bool
	}
	plans, noted, really := 0, 0, map[asked]bool{{4, 0, true}: true, {5, 0, false}: true, {8, 0, false}: true}
	asking := slices.Clone(minutes)
	slices.Sort(asking)
	for _, m := range slices.Compact(asking) {
		for _, by := range []time.Duration{-time.Microsecond, 0} {
			for _, exclusive := range []bool{false, true} {
				ask := asked{m, by, exclusive}
				target := restore.Target{Kind: restore.ToTime, Time: noon.Add(time.Duration(m)*time.Minute + by), Exclusive: exclusive}
				want, reached := told.expect(target, 1)
				p := s.physical(fmt.Sprintf("m%d-%d-%v", m, by, exclusive), target)
				plan, err := p.Plan(t.Context())
				if !reached || err != nil {
					if reached || !errors.Is(err, fail.Unreachable) {
						t.Errorf("%+v: %v, and PostgreSQL reaches it: %v", ask, err, reached)
					}
					continue
				}
				plans++
				if slices.ContainsFunc(plan.Notes, func(note string) bool { return strings.Contains(note, "clock of the source was set back") }) {
					noted++
				}
				got := []int32{}
				for _, l := range told.ways[1] {
					if seq, wrote := told.row[1][l.xid]; wrote && l.kind == "COMMIT" && l.at < plan.Stop.LSN {
						got = append(got, seq)
					}
				}
				if slices.Sort(got); !slices.Equal(got, want) {
					t.Errorf("%+v: the plan stops before %v, with rows %v; PostgreSQL would have %v", ask, plan.Stop.LSN, got, want)
				}
				if really[ask] {
					delete(really, ask)
					told.exact(fmt.Sprintf("r%d", plans), target, 1, want)
					told.byItself(fmt.Sprintf("i%d", plans), target, want)
					if exclusive { // a restore test does the same, and one is enough
						rep := s.prove(fmt.Sprintf("p%d", plans), target, int64(len(want)), func(restore.PhysicalPlan) {})
						if rep.Verdict != proof.Passed || !strings.Contains(rep.Reason, "before WAL location") {
							t.Errorf("%+v: a restore test ends by %q and finds: %s", ask, rep.Reason, rep.Summary())
						}
					}
				}
			}
		}
	}
	if plans < 40 || noted < 10 || len(really) > 0 {
		t.Errorf("%d plans, of which %d say that the clock was set back; not done: %v", plans, noted, really)
	}
}

// times are those of the transactions in the log, in minutes.
func (s *story) times(since time.Time) (minutes []int) {
	for _, l := range s.ways[1] {
		if d := l.time.Sub(since); (l.kind == "COMMIT" || l.kind == "ABORT") && d > 0 && d < 40*time.Minute {
			minutes = append(minutes, int(d/time.Minute))
		}
	}
	return minutes
}

// byItself has PostgreSQL recover to the time itself, and compares the rows.
func (s *story) byItself(name string, target restore.Target, want []int32) {
	s.t.Helper()
	p := s.physical(name, target)
	s.restored(p)
	path := filepath.Join(p.Dir, "postgresql.auto.conf")
	b, err := os.ReadFile(path)
	if err != nil {
		s.t.Fatal(err)
	}
	var lines []string
	for text := range strings.Lines(string(b)) {
		switch name, _, _ := strings.Cut(text, " "); name {
		case "recovery_target_time", "recovery_target_lsn", "recovery_target_inclusive":
		default:
			lines = append(lines, text)
		}
	}
	lines = append(lines, fmt.Sprintf("recovery_target_time = '%s'\nrecovery_target_inclusive = %v\n", target.Time.UTC().Format("2006-01-02 15:04:05.999999+00"), !target.Exclusive))
	if err := os.WriteFile(path, []byte(strings.Join(lines, "")), 0o600); err != nil {
		s.t.Fatal(err)
	}
	server, err := s.start(p, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer server.Kill()
	if diff := cmp.Diff(want, seqs(s.t, server)); diff != "" {
		s.t.Errorf("%+v, as PostgreSQL itself finds it:\n%s", target, diff)
	}
	log, err := os.ReadFile(filepath.Join(filepath.Dir(p.Dir), "log"))
	if err != nil || !strings.Contains(string(log), "recovery stopping before commit of transaction") && !strings.Contains(string(log), "recovery stopping before abort of transaction") {
		s.t.Errorf("%+v: PostgreSQL did not stop by a time (%v)", target, err)
	}
}
