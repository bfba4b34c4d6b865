package schedule_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/schedule"
)

var nightly = schedule.Schedule{
	Cluster: "main", Kind: "logical", Host: "db1", Cron: "30 1 * * *", TimeZone: "Europe/Berlin",
	Jitter: 10 * time.Minute, CatchupWindow: 6 * time.Hour, RunTimeout: 24 * time.Hour,
}

// with returns a changed copy of nightly.
func with(change func(*schedule.Schedule)) schedule.Schedule {
	s := nightly
	change(&s)
	return s
}

// existing is s as a server has it after pgkeep wrote it.
func existing(s schedule.Schedule) schedule.Existing {
	return schedule.Existing{ID: s.ID(), Host: s.Host, Hash: s.Hash()}
}

func TestPlan(t *testing.T) {
	other := with(func(s *schedule.Schedule) { s.Cluster = "other" })
	later := with(func(s *schedule.Schedule) { s.Cron = "30 2 * * *" })
	elsewhere := with(func(s *schedule.Schedule) { s.Cluster, s.Host = "there", "db2" })
	moved := with(func(s *schedule.Schedule) { s.Host = "db2" })
	foreign := schedule.Existing{ID: "pgkeep/made/by-hand"}
	paused := existing(nightly)
	paused.Paused, paused.Note = true, "storage moves"
	type list = []schedule.Schedule
	type has = []schedule.Existing

	for _, tc := range []struct {
		name  string
		want  list
		have  has
		prune bool
		plan  []string
	}{
		{"nothing wanted, nothing there", nil, nil, false, nil},
		{"a new one is created", list{nightly}, nil, false, []string{"create pgkeep/main/logical"}},
		{"the same one is left alone", list{nightly}, has{existing(nightly)}, true, []string{"unchanged pgkeep/main/logical"}},
		{"a changed one is updated", list{later}, has{existing(nightly)}, true, []string{"update pgkeep/main/logical"}},
		{"one that a human has paused is left alone", list{nightly}, has{paused}, true, []string{"unchanged pgkeep/main/logical"}},
		{"one that is not wanted is an orphan", list{nightly}, has{existing(nightly), existing(other)}, false, []string{"unchanged pgkeep/main/logical", "orphan pgkeep/other/logical"}},
		{"and goes if that is asked for", nil, has{existing(other)}, true, []string{"delete pgkeep/other/logical"}},
		{"that of another host is nobody's business", list{nightly}, has{existing(nightly), existing(elsewhere)}, true, []string{"unchanged pgkeep/main/logical"}},
		{"one made by somebody else neither", nil, has{foreign}, true, nil},
		{"a cluster that came to this host is updated", list{nightly}, has{existing(moved)}, true, []string{"update pgkeep/main/logical"}},
		{"in the order of ids", list{other, nightly}, nil, false, []string{"create pgkeep/main/logical", "create pgkeep/other/logical"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []string
			for _, c := range schedule.Plan(tc.want, tc.have, schedule.Options{Hosts: []string{"db1"}, Prune: tc.prune}) {
				got = append(got, string(c.Action)+" "+c.ID)
			}
			if diff := cmp.Diff(tc.plan, got); diff != "" {
				t.Errorf("plan differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestEveryFieldIsInTheHash(t *testing.T) {
	seen := map[string]string{nightly.Hash(): "nothing"}
	for name, change := range map[string]func(*schedule.Schedule){
		"cluster":    func(s *schedule.Schedule) { s.Cluster = "x" },
		"kind":       func(s *schedule.Schedule) { s.Kind = "x" },
		"host":       func(s *schedule.Schedule) { s.Host = "x" },
		"cron":       func(s *schedule.Schedule) { s.Cron = "@daily" },
		"zone":       func(s *schedule.Schedule) { s.TimeZone = "UTC" },
		"jitter":     func(s *schedule.Schedule) { s.Jitter++ },
		"catch-up":   func(s *schedule.Schedule) { s.CatchupWindow++ },
		"timeout":    func(s *schedule.Schedule) { s.RunTimeout++ },
		"searchable": func(s *schedule.Schedule) { s.Searchable = true },
	} {
		hash := with(change).Hash()
		if same, ok := seen[hash]; ok {
			t.Errorf("changing %s gives the same hash as changing %s", name, same)
		}
		seen[hash] = name
	}
}
