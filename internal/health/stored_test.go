package health_test

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

const day = 24 * time.Hour

var now = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

func backup(kind repo.Kind, age time.Duration, tests ...health.Test) health.Backup {
	at := now.Add(-age)
	m := repo.Manifest{Ref: repo.Ref{Cluster: "main", ID: repo.NewID(at, "01234567")}, Kind: kind, StartedAt: at, FinishedAt: at}
	if kind == repo.Physical {
		m.Physical = new(repo.PhysicalFacts)
	}
	return health.Backup{Listed: repo.Listed{Manifest: m}, Tests: tests}
}

func tested(age time.Duration, passed bool) health.Test {
	t := health.Test{ListedProof: repo.ListedProof{Proof: repo.Proof{Test: repo.NewID(now.Add(-age), "01234567"), FinishedAt: now.Add(-age), Passed: passed}}}
	t.Report = proof.Report{Verdict: proof.Passed}
	if !passed {
		t.Report = proof.Report{Verdict: proof.Failed, Checks: []proof.Check{{Name: proof.CheckHeap, Verdict: proof.Failed, Message: "1 table is damaged", Findings: []string{"canary"}}}}
	}
	return t
}

func TestFindingsOfBackups(t *testing.T) {
	daily := health.Policy{Age: map[repo.Kind]time.Duration{repo.Physical: 36 * time.Hour}}
	broken := backup(repo.Physical, 2*day)
	broken.Err = errors.Join(fail.Corrupt)
	unfinished := backup(repo.Physical, time.Hour)
	unfinished.Unfinished = true
	pages := backup(repo.Physical, time.Hour, tested(time.Minute, true))
	pages.Physical.Damaged = 3
	full := tested(time.Minute, false)
	full.Report.Checks[0].Kind = fail.NoSpace
	unbelieved := tested(time.Minute, true)
	unbelieved.Err = fail.Untrusted
	replayed := tested(time.Hour, true)
	replayed.Report.Reached.LastCommit = now.Add(-2 * time.Hour)
	both := health.Policy{Age: map[repo.Kind]time.Duration{repo.Physical: 36 * time.Hour, repo.Logical: 36 * time.Hour}, Proof: 7 * day}
	weekly := health.Policy{Age: map[repo.Kind]time.Duration{repo.Physical: 11 * day}, Proof: 7 * day}
	physical, logical := backup(repo.Physical, time.Hour, tested(time.Minute, true)), backup(repo.Logical, time.Hour, tested(time.Minute, true))
	for what, c := range map[string]struct {
		backups []health.Backup
		policy  health.Policy
		want    string
	}{
		"nothing":                    {nil, health.Policy{}, "critical backup-missing"},
		"one that is not finished":   {[]health.Backup{unfinished}, daily, "critical backup-missing"},
		"of each kind":               {[]health.Backup{physical, logical}, both, ""},
		"a clock was a minute ahead": {[]health.Backup{backup(repo.Physical, -time.Minute, tested(-2*time.Minute, true)), logical}, both, ""},
		"a clock was ahead, and then nothing came": {[]health.Backup{backup(repo.Physical, 100*day), backup(repo.Physical, -200*day, tested(-200*day, true)), logical}, both,
			"critical clock-skew, critical backup-old, warning never-tested"},
		"a test that a clock ahead says was tomorrow": {[]health.Backup{backup(repo.Physical, time.Hour, tested(time.Minute, false), tested(-day, true)), logical}, both, "critical clock-skew, critical test-failed"},
		"one kind was never tested":                   {[]health.Backup{backup(repo.Physical, time.Hour), logical}, both, "warning never-tested"},
		"a test of what is old":                       {[]health.Backup{backup(repo.Physical, 90*day, tested(day, true)), backup(repo.Physical, time.Hour), logical}, both, "warning unproven"},
		"a test that replayed the log of days":        {[]health.Backup{backup(repo.Physical, 10*day, replayed)}, health.Policy{Age: map[repo.Kind]time.Duration{repo.Physical: 11 * day}, Proof: day}, ""},
		"a test cannot be of what is not there yet":   {[]health.Backup{backup(repo.Physical, 8*day, tested(7*day, true))}, weekly, ""},
		"one that was never tested":                   {[]health.Backup{backup(repo.Physical, time.Hour)}, daily, "warning never-tested"},
		"a test nobody believes":                      {[]health.Backup{backup(repo.Physical, time.Hour, unbelieved)}, daily, "warning never-tested"},
		"all that is wanted":                          {[]health.Backup{backup(repo.Physical, 35*time.Hour, tested(time.Hour, true))}, daily, ""},
		"one of another kind":                         {[]health.Backup{backup(repo.Logical, time.Hour, tested(time.Hour, true))}, daily, "critical backup-missing"},
		"one that is late":                            {[]health.Backup{backup(repo.Physical, 37*time.Hour, tested(time.Hour, true))}, daily, "warning backup-old"},
		"one that is very late":                       {[]health.Backup{backup(repo.Physical, 73*time.Hour, tested(time.Hour, true))}, daily, "critical backup-old"},
		"nobody said how often":                       {[]health.Backup{backup(repo.Logical, 9*day, tested(time.Hour, true))}, health.Policy{}, "warning backup-old"},
		"a test without an answer":                    {[]health.Backup{backup(repo.Physical, day, tested(2*time.Hour, true), full)}, daily, ""},
		"a test long ago":                             {[]health.Backup{backup(repo.Physical, 99*day, tested(98*day, true)), backup(repo.Physical, time.Hour)}, daily, ""},
		"a test too long ago":                         {[]health.Backup{backup(repo.Physical, 8*day, tested(8*day, true)), backup(repo.Physical, time.Hour)}, health.Policy{Proof: 7 * day}, "warning unproven"},
		"a test that failed":                          {[]health.Backup{backup(repo.Physical, day, tested(2*time.Hour, true), tested(time.Hour, false))}, daily, "critical test-failed"},
		"failed, and then passed":                     {[]health.Backup{backup(repo.Physical, day, tested(2*time.Hour, false), tested(time.Hour, true))}, daily, ""},
		"a damaged manifest":                          {[]health.Backup{broken, backup(repo.Physical, time.Hour, tested(time.Hour, true))}, daily, "critical backup-damaged"},
		"damaged pages":                               {[]health.Backup{pages}, daily, "critical page-damage, critical backup-missing"},
		"damaged pages since":                         {[]health.Backup{backup(repo.Physical, 60*time.Hour, tested(time.Hour, true)), pages}, daily, "critical page-damage, warning backup-old"},
	} {
		found := health.Stored{Cluster: "main", Backups: c.backups}.Findings(c.policy, now)
		var got []string
		for _, f := range found {
			got = append(got, string(f.Severity)+" "+f.Name)
			if f.Fix == "" || f.Cluster != "main" || strings.Contains(f.What, "canary") {
				t.Errorf("%s: %+v", what, f)
			}
		}
		if strings.Join(got, ", ") != c.want {
			t.Errorf("%s: found %q, want %q", what, got, c.want)
		}
	}
}

func TestHolesAreFoundAndGoWhenFilled(t *testing.T) {
	a := access(t)
	r, _, err := repo.Init(t.Context(), new(store.Mem), a, []string{identity(t).Recipient().String()}, now)
	if err != nil {
		t.Fatal(err)
	}
	archive := func(name string) {
		t.Helper()
		n, err := pg.ParseWALName(name)
		if err == nil {
			_, err = r.Archiver(repo.Archive{Cluster: "main", System: 7, Major: 15}, "").Put(t.Context(), repo.WALFile{Name: n, Size: 1 << 20, Content: bytes.NewReader(make([]byte, 1<<20))})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	look := func() health.Stored {
		t.Helper()
		s, err := health.Look(t.Context(), r, "main", "", time.Now().Add(2*audit.Grace))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	archive("000000010000000000000001")
	archive("000000010000000000000003")
	f, ok := find(look().Findings(health.Policy{}, time.Now()), "wal-hole")
	if !ok || f.Severity != health.Critical || !strings.Contains(f.What, "1 file missing from the archive: 000000010000000000000002") || !strings.Contains(f.Fix, "wal audit --fill") {
		t.Errorf("found %+v", f)
	}
	archive("000000010000000000000002") // as audit --fill does
	if f, ok := find(look().Findings(health.Policy{}, time.Now()), "wal-hole"); ok {
		t.Errorf("found %+v", f)
	}
}

// A backup that the log does not lead away from is none that could be gone back to.
func TestAStuckBackupIsNotTheNewest(t *testing.T) {
	older, stuck := backup(repo.Physical, 3*day, tested(day, true)), backup(repo.Physical, time.Hour)
	s := health.Stored{Cluster: "main", Backups: []health.Backup{older, stuck}, Archives: []audit.Report{{Stuck: []audit.Base{{ID: string(stuck.ID)}}}}}
	if b, ok := s.Newest(now, repo.Physical); !ok || b.ID != older.ID {
		t.Errorf("the newest is %s", b.ID)
	}
	found := s.Findings(health.Policy{Age: map[repo.Kind]time.Duration{repo.Physical: 36 * time.Hour}}, now)
	if got := strings.Join(names(found), ", "); got != "backup-stuck, backup-old" {
		t.Errorf("found %s", got)
	}
}

// The moments of windows that overlap are one; what no window has is a gap.
func TestWindowIsTheSumOfWindows(t *testing.T) {
	b := []health.Backup{backup(repo.Physical, 5*day), backup(repo.Physical, 4*day), backup(repo.Physical, 2*day)}
	var rep audit.Report
	for i, until := range []time.Duration{3*day + 12*time.Hour, 3 * day, 0} {
		b[i].Physical.StoppedAt = b[i].FinishedAt
		rep.Windows = append(rep.Windows, audit.Window{Base: audit.Base{ID: string(b[i].ID)}, Archived: now.Add(-until)})
	}
	rep.Windows = append(rep.Windows, audit.Window{Base: audit.Base{ID: string(b[2].ID)}}, audit.Window{Base: audit.Base{ID: "taken since"}})
	got := health.Stored{Backups: b}.Window(rep)
	want := []health.Moments{{From: now.Add(-5 * day), To: now.Add(-3 * day)}, {From: now.Add(-2 * day), To: now}}
	if !slices.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
}

func TestScheduleFindings(t *testing.T) {
	good := health.Schedule{Kind: "physical", Next: now.Add(time.Hour), Every: day, Last: now.Add(-time.Hour)}
	paused, running, ended, failed := good, good, good, good
	failed.Failed, failed.Run = now.Add(-time.Hour), "pgkeep/main/physical/scheduled-1"
	paused.Paused, paused.Next, paused.Note = true, time.Time{}, "storage moves"
	expire := good
	expire.Kind = "expire"
	running.Running = true
	ended.Next = time.Time{}
	for what, c := range map[string]struct {
		have   []health.Schedule
		wanted []string
		served bool
		at     time.Time
		want   string
		keeps  bool
	}{
		"nothing":                        {nil, nil, false, now, "unscheduled", false},
		"not applied":                    {[]health.Schedule{good}, []string{"physical", "logical"}, true, now, "schedule-missing", false},
		"as it should be":                {[]health.Schedule{good}, []string{"physical"}, true, now, "", false},
		"nobody works":                   {[]health.Schedule{good}, []string{"physical"}, false, now, "no-worker", false},
		"paused":                         {[]health.Schedule{paused}, []string{"physical"}, true, now, "schedule-paused", false},
		"running":                        {[]health.Schedule{running}, nil, true, now, "", false},
		"running into the next start":    {[]health.Schedule{running}, nil, true, now.Add(day), "schedule-skipping", false},
		"the last run failed":            {[]health.Schedule{failed}, nil, true, now, "schedule-failing", false},
		"one that never starts anything": {[]health.Schedule{ended}, nil, true, now, "schedule-ended", false},
		"nothing expires":                {[]health.Schedule{good}, nil, true, now, "never-expires", true},
		"nothing at all":                 {nil, nil, false, now, "unscheduled, never-expires", true},
		"it expires":                     {[]health.Schedule{good, expire}, nil, true, now, "", true},
		"it is to expire, not applied":   {[]health.Schedule{good}, []string{"expire"}, true, now, "schedule-missing", true},
	} {
		found := health.Work{Cluster: "main", Have: c.have, Wanted: c.wanted, Host: "db1", Served: c.served, Keeps: c.keeps}.Findings(c.at)
		if got := strings.Join(names(found), ", "); got != c.want {
			t.Errorf("%s: found %q, want %q", what, got, c.want)
		}
	}
}
