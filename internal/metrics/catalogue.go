package metrics

import (
	"math"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/schedule"
	"github.com/pgkeep/pgkeep/workflows"
)

const (
	kindWAL   = "wal"
	kindOther = "other"
)

// scheduled are the kinds of schedules.
func scheduled() []string {
	return []string{workflows.Logical, workflows.Physical, workflows.KindWALAudit, workflows.KindExpire, workflows.KindRestoreTest}
}

// A Metric is a gauge, one of those that there are for every cluster.
type Metric struct {
	Name   string
	Help   string
	Label  string   // besides cluster; "": none
	Values []string // of Label: each has its series from the start

	value func(s *State, of string, now time.Time) float64
}

// Catalogue lists the metrics of clusters.
func Catalogue() []Metric {
	backups := []string{string(repo.Logical), string(repo.Physical)}
	scheduled := scheduled()
	sources := []string{string(Repository), string(Server), string(Schedules)}

	stored := func(f func(s *State, of string, now time.Time) float64) func(*State, string, time.Time) float64 {
		return func(s *State, of string, now time.Time) float64 {
			if !s.knows(Repository) {
				return unknown
			}
			return f(s, of, now)
		}
	}
	tested := func(f func(t health.Test) float64) func(*State, string, time.Time) float64 {
		return stored(func(s *State, of string, now time.Time) float64 {
			t, ok := s.tested(of, now)
			if !ok {
				return unknown
			}
			return f(t)
		})
	}
	served := func(f func(s *State, now time.Time) float64) func(*State, string, time.Time) float64 {
		return func(s *State, _ string, now time.Time) float64 {
			if !s.Good[Server] {
				return unknown
			}
			return f(s, now)
		}
	}
	planned := func(f func(e schedule.Existing) float64) func(*State, string, time.Time) float64 {
		return func(s *State, of string, _ time.Time) float64 {
			e, ok := s.schedule(of)
			if !ok {
				return unknown
			}
			return f(e)
		}
	}
	at := func(f func(s *State, of string, now time.Time) time.Time) func(*State, string, time.Time) float64 {
		return func(s *State, of string, now time.Time) float64 { return moment(f(s, of, now)) }
	}
	since := func(f func(s *State, of string, now time.Time) time.Time) func(*State, string, time.Time) float64 {
		return func(s *State, of string, now time.Time) float64 { return age(f(s, of, now), now) }
	}
	start := func(f func(e schedule.Existing) time.Time) func(*State, string, time.Time) float64 {
		return at(func(s *State, of string, _ time.Time) (t time.Time) {
			if e, ok := s.schedule(of); ok {
				t = f(e)
			}
			return t
		})
	}
	lastTest := func(s *State, of string, now time.Time) time.Time { t, _ := s.tested(of, now); return t.FinishedAt }
	ended := func(s *State, of string, _ time.Time) time.Time { return s.ended(of).At }

	return []Metric{
		{Name: "pgkeep_backup_last_success_timestamp_seconds", Label: "kind", Values: backups, value: at((*State).newest),
			Help: "When the newest backup was finished."},
		{Name: "pgkeep_backup_age_seconds", Label: "kind", Values: backups, value: since((*State).newest),
			Help: "How long ago that was."},
		{Name: "pgkeep_backup_age_limit_seconds", Label: "kind", Values: backups,
			Help: "How old it may be: one and a half times the time between two starts in the configuration. Without schedules 8 days, of the kind that was taken last. 0: none is expected.",
			value: func(s *State, of string, now time.Time) float64 {
				return s.Stored.Limit(s.Promise.Backups, repo.Kind(of), now).Seconds()
			}},
		{Name: "pgkeep_backup_oldest_age_seconds", Label: "kind", Values: backups, value: since((*State).oldest),
			Help: "How long ago the oldest backup was finished that is there."},
		{Name: "pgkeep_backups", Label: "kind", Values: backups,
			Help: "Backups that count: they can be believed, no page was damaged, the archive has what they need of the log, and none is dated in the future.",
			value: stored(func(s *State, of string, now time.Time) float64 {
				return s.counted(func(b health.Backup) bool { return s.Stored.Sound(b, now) && string(b.Kind) == of })
			})},
		{Name: "pgkeep_backups_damaged", Help: "Backups that are there and cannot be believed.",
			value: stored(func(s *State, _ string, _ time.Time) float64 {
				return s.counted(func(b health.Backup) bool { return b.Err != nil })
			})},
		{Name: "pgkeep_backups_page_damage", Help: "Physical backups of clusters with damaged pages.",
			value: stored(func(s *State, _ string, _ time.Time) float64 {
				return s.counted(func(b health.Backup) bool { return b.Usable() && b.Physical != nil && b.Physical.Damaged > 0 })
			})},
		{Name: "pgkeep_backups_unusable", Help: "Physical backups that lead nowhere: the archive lacks what they need of the log.",
			value: stored(func(s *State, _ string, _ time.Time) float64 {
				n := 0
				for _, a := range s.Stored.Archives {
					n += len(a.Stuck)
				}
				return float64(n)
			})},
		{Name: "pgkeep_dated_ahead_seconds", Help: "How far the latest backup or restore test is dated in the future; 0: none is. More than 300 s, and it counts for nothing: a clock is wrong.",
			value: stored(func(s *State, _ string, now time.Time) float64 { return s.Stored.Ahead(now).Seconds() })},
		{Name: "pgkeep_stored_bytes", Label: "kind", Values: append(backups[:2:2], kindWAL, kindOther),
			Help:  "Bytes in the repository: of backups that are there, of the archived log, and of other backups, deleted or in progress, whose objects are there still.",
			value: stored(func(s *State, of string, _ time.Time) float64 { return float64(s.stored(of)) })},

		{Name: "pgkeep_proven_timestamp_seconds", Label: "kind", Values: backups, value: at((*State).proven),
			Help: "The newest moment that came back in a restore test: when a backup was finished that passed its last one, or the last commit that was replayed behind it."},
		{Name: "pgkeep_proven_age_seconds", Label: "kind", Values: backups, value: since((*State).proven),
			Help: "How long ago that was: everything newer is hope."},
		{Name: "pgkeep_proven_age_limit_seconds", Label: "kind", Values: backups,
			Help: "How long ago it may be: restore_test.within of the configuration, and not less than the newest backup may be old. 0: at any time.",
			value: func(s *State, of string, _ time.Time) float64 {
				return s.Promise.Backups.ProofLimit(repo.Kind(of)).Seconds()
			}},
		{Name: "pgkeep_restore_test_timestamp_seconds", Label: "kind", Values: backups, value: at(lastTest),
			Help: "When the last restore test was finished."},
		{Name: "pgkeep_restore_test_age_seconds", Label: "kind", Values: backups, value: since(lastTest),
			Help: "How long ago that was."},
		{Name: "pgkeep_restore_test_passed", Label: "kind", Values: backups, Help: "1: the last restore test passed. 0: it failed.",
			value: tested(func(t health.Test) float64 { return yes(t.Passed) })},
		{Name: "pgkeep_restore_test_rto_seconds", Label: "kind", Values: backups, Help: "How long the last restore test took until PostgreSQL was open.",
			value: tested(func(t health.Test) float64 { return finite(t.Report.RTO) })},
		{Name: "pgkeep_restore_test_rpo_seconds", Label: "kind", Values: backups, Help: "How far what the last restore test reached was behind the server, between last commits.",
			value: tested(func(t health.Test) float64 {
				if t.Report.Lag == nil {
					return unknown
				}
				return finite(t.Report.Lag.Seconds)
			})},
		{Name: "pgkeep_restore_test_rpo_bytes", Label: "kind", Values: backups, Help: "The same in bytes of log.",
			value: tested(func(t health.Test) float64 {
				if t.Report.Lag == nil {
					return unknown
				}
				return float64(t.Report.Lag.Bytes)
			})},

		{Name: "pgkeep_window_start_timestamp_seconds", Help: "From which moment on, without a gap up to the end, every moment can be recovered.",
			value: at(func(s *State, _ string, _ time.Time) time.Time { return s.window().From })},
		{Name: "pgkeep_window_end_timestamp_seconds", Help: "Up to which moment: when the last segment was archived.",
			value: at(func(s *State, _ string, _ time.Time) time.Time { return s.window().To })},
		{Name: "pgkeep_window_age_seconds", value: since(func(s *State, _ string, _ time.Time) time.Time { return s.window().From }),
			Help: "How long ago the window begins; +Inf: there is none."},
		{Name: "pgkeep_window_promised_seconds", Help: "How long the retention of the cluster promises it to be; 0: it promises nothing.",
			value: func(s *State, _ string, _ time.Time) float64 { return s.Promise.Window.Seconds() }},
		{Name: "pgkeep_wal_holes", Help: "Places where files are missing in the archive of the write-ahead log.",
			value: stored(func(s *State, _ string, _ time.Time) float64 { return float64(len(s.Stored.Holes())) })},
		{Name: "pgkeep_wal_missing_files", Help: "Files that are missing in these places.",
			value: stored(func(s *State, _ string, _ time.Time) float64 {
				n := 0
				for _, h := range s.Stored.Holes() {
					n += h.Count
				}
				return float64(n)
			})},
		{Name: "pgkeep_wal_newest_timestamp_seconds", Help: "When the newest segment was archived, by the store's clock.",
			value: at(func(s *State, _ string, _ time.Time) time.Time { return s.Newest.Archived })},
		{Name: "pgkeep_wal_lag_bytes", Help: "Bytes of log that the server has written and the archive does not hold. The segment that is being written is among them.",
			value: served(func(s *State, _ time.Time) float64 {
				if !s.knows(Repository) {
					return unknown
				}
				return float64(s.behind())
			})},
		{Name: "pgkeep_wal_lag_seconds", Help: "How long ago the newest segment was archived, if the server has written log behind it; else 0. What was committed since would be lost with the server.",
			value: served(func(s *State, now time.Time) float64 {
				switch {
				case !s.knows(Repository):
					return unknown
				case s.behind() == 0:
					return 0
				}
				return age(s.Newest.Archived, now)
			})},
		{Name: "pgkeep_wal_archiving", Help: "1: the server hands its log to an archiver. 0: it does not.",
			value: served(func(s *State, _ time.Time) float64 { return yes(s.Archiver.Archiving) })},
		{Name: "pgkeep_wal_ready_files", Help: "Files that wait to be archived: those with a .ready.",
			value: served(func(s *State, _ time.Time) float64 { return float64(s.Archiver.Waiting) })},
		{Name: "pgkeep_wal_ready_age_seconds", Help: "How long the first of them has waited; 0: none waits.",
			value: served(func(s *State, _ time.Time) float64 {
				if s.Archiver.Waiting == 0 || s.Archiver.Oldest.IsZero() {
					return 0
				}
				return max(0, s.Archiver.Now.Sub(s.Archiver.Oldest).Seconds())
			})},

		{Name: "pgkeep_schedule_wanted", Label: "kind", Values: scheduled, Help: "1: the configuration has such a schedule. 0: it has none.",
			value: func(s *State, of string, _ time.Time) float64 { return yes(slices.Contains(s.Promise.Schedules, of)) }},
		{Name: "pgkeep_schedule_present", Label: "kind", Values: scheduled, Help: "1: Temporal has the schedule. 0: it has none of that kind.",
			value: func(s *State, of string, _ time.Time) float64 {
				if !s.Good[Schedules] {
					return unknown
				}
				_, ok := s.schedule(of)
				return yes(ok)
			}},
		{Name: "pgkeep_schedule_paused", Label: "kind", Values: scheduled, Help: "1: somebody paused the schedule. 0: it goes on.",
			value: planned(func(e schedule.Existing) float64 { return yes(e.Paused) })},
		{Name: "pgkeep_schedule_running", Label: "kind", Values: scheduled, Help: "Runs of the schedule that are going on.",
			value: planned(func(e schedule.Existing) float64 { return float64(len(e.Running)) })},
		{Name: "pgkeep_schedule_period_seconds", Label: "kind", Values: scheduled, Help: "The longest time between any two of its next starts. Of one that is paused it is not known.",
			value: planned(func(e schedule.Existing) float64 {
				if e.Every == 0 {
					return unknown
				}
				return e.Every.Seconds()
			})},
		{Name: "pgkeep_schedule_next_timestamp_seconds", Label: "kind", Values: scheduled, value: start(func(e schedule.Existing) time.Time { return e.Next }),
			Help: "When the schedule starts something next."},
		{Name: "pgkeep_schedule_last_timestamp_seconds", Label: "kind", Values: scheduled, value: start(func(e schedule.Existing) time.Time { return e.Last }),
			Help: "When it last did."},
		{Name: "pgkeep_schedule_missed", Label: "kind", Values: scheduled,
			Help:  "Starts, since there is the schedule, that were too old to be made up for when Temporal was there again.",
			value: planned(func(e schedule.Existing) float64 { return float64(e.Missed) })},
		{Name: "pgkeep_schedule_skipped", Label: "kind", Values: scheduled,
			Help:  "Starts, since there is the schedule, given up because a run was still going on.",
			value: planned(func(e schedule.Existing) float64 { return float64(e.Skipped) })},
		{Name: "pgkeep_schedule_last_run_passed", Label: "kind", Values: scheduled,
			Help: "1: the newest run of the schedule that is over did what it should. 0: it failed, or was ended.",
			value: func(s *State, of string, _ time.Time) float64 {
				if s.ended(of).At.IsZero() {
					return unknown
				}
				return yes(s.ended(of).Done)
			}},
		{Name: "pgkeep_schedule_last_run_timestamp_seconds", Label: "kind", Values: scheduled, value: at(ended),
			Help: "When that run was over."},

		{Name: "pgkeep_look_success", Label: "source", Values: sources, Help: "1: the newest look at that source was good. 0: it failed, or there was none yet.",
			value: func(s *State, of string, _ time.Time) float64 { return yes(s.Good[Source(of)]) }},
		{Name: "pgkeep_look_age_seconds", Label: "source", Values: sources, Help: "How long ago a look at that source was good.",
			value: since(func(s *State, of string, _ time.Time) time.Time { return s.Seen[Source(of)] })},
	}
}

// moment is t in seconds since 1970.
func moment(t time.Time) float64 {
	if t.IsZero() {
		return never
	}
	return float64(t.UnixMilli()) / 1e3
}

// age is how long ago t was; for ever, if it never was, or is not yet: then a clock
// is wrong, and nobody knows.
func age(t, now time.Time) float64 {
	if t.IsZero() || health.Early(t, now) {
		return math.Inf(1)
	}
	return max(0, now.Sub(t).Seconds())
}

func yes(is bool) float64 {
	if is {
		return 1
	}
	return 0
}

// finite keeps what no series may hold out of it.
func finite(f float64) float64 {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return unknown
	}
	return f
}
