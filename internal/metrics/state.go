package metrics

import (
	"time"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/schedule"
)

// A Source is where values come from.
type Source string

// The sources there are.
const (
	Repository Source = "repository" // what is stored
	Server     Source = "server"     // PostgreSQL
	Schedules  Source = "schedules"  // Temporal
)

// A State is what is known of one cluster. The zero State knows nothing.
type State struct {
	Seen map[Source]time.Time // when a look succeeded last
	Good map[Source]bool      // the newest look did

	Promise   Promise
	Stored    health.Stored
	Usage     map[repo.ID]int64            // bytes of backups, by who wrote them
	Newest    Segment                      // of the archive that is written to
	Archiver  cluster.Archiver             // counts only while the newest look at the server was good
	Schedules map[string]schedule.Existing // by kind; likewise
	Ended     map[string]schedule.Ended    // the last runs of these that are over; likewise
}

// A Promise is what the configuration says of a cluster. The zero Promise
// promises nothing.
type Promise struct {
	Window    time.Duration // of moments that can be recovered; 0: none
	Backups   health.Policy
	Schedules []string // kinds of those that Temporal is to have
}

// A Segment is the newest in an archive.
type Segment struct {
	Archive  repo.Archive
	Name     pg.WALName
	Size     pg.SegmentSize
	End      pg.LSN    // where the next begins
	Archived time.Time // by the store's clock
}

// What stands for what is not known. Nothing is ever NaN, and no series is ever
// missing.
const (
	unknown = -1 // of counts, sizes and answers
	never   = 0  // of moments: the beginning of 1970
)

func (s *State) knows(src Source) bool { return !s.Seen[src].IsZero() }

// newest is the backup of a kind that was finished last.
func (s *State) newest(kind string, now time.Time) time.Time {
	b, _ := s.Stored.Newest(now, repo.Kind(kind))
	return b.FinishedAt
}

// oldest is the first backup of a kind that can be believed.
func (s *State) oldest(kind string, _ time.Time) time.Time {
	for _, b := range s.Stored.Backups {
		if b.Usable() && string(b.Kind) == kind {
			return b.FinishedAt
		}
	}
	return time.Time{}
}

// proven is the newest moment that came back in a restore test of a kind.
func (s *State) proven(kind string, now time.Time) time.Time {
	p, _ := s.Stored.Proven(now, repo.Kind(kind))
	return p.Moment
}

// tested is the restore test of a backup of a kind that was made last.
func (s *State) tested(kind string, now time.Time) (last health.Test, ok bool) {
	for _, b := range s.Stored.Backups {
		if t, found := b.Tested(now); found && string(b.Kind) == kind && t.FinishedAt.After(last.FinishedAt) {
			last, ok = t, true
		}
	}
	return last, ok
}

// counted is how many backups there are of which something is so.
func (s *State) counted(is func(b health.Backup) bool) float64 {
	n := 0
	for _, b := range s.Stored.Backups {
		if is(b) {
			n++
		}
	}
	return float64(n)
}

// window is the newest run of moments that can be reached.
func (s *State) window() (newest health.Moments) {
	for _, a := range s.Stored.Archives {
		for _, m := range s.Stored.Window(a) {
			if m.To.After(newest.To) {
				newest = m
			}
		}
	}
	return newest
}

// stored is how many bytes are stored for a kind: of backups that are there, of
// the log, or of other backups, which are deleted or in progress.
func (s *State) stored(kind string) (bytes int64) {
	if kind == kindWAL {
		for _, a := range s.Stored.Archives {
			bytes += a.Bytes()
		}
		return bytes
	}
	kinds := make(map[repo.ID]string)
	for _, b := range s.Stored.Backups {
		if b.Usable() {
			kinds[b.ID] = string(b.Kind)
		}
	}
	for id, n := range s.Usage {
		if of, ok := kinds[id]; ok && of == kind || !ok && kind == kindOther {
			bytes += n
		}
	}
	return bytes
}

// behind is how many bytes of log the server has written that are not in the
// archive.
func (s *State) behind() int64 {
	if s.Newest.Archive.System != s.Archiver.System || s.Newest.Archive.Major != s.Archiver.Major {
		return int64(s.Archiver.LSN) // of this system there is nothing
	}
	if s.Archiver.LSN <= s.Newest.End {
		return 0
	}
	return int64(s.Archiver.LSN - s.Newest.End)
}

// schedule is the schedule of a kind; false if there is none, or that is not known.
func (s *State) schedule(kind string) (schedule.Existing, bool) {
	e, ok := s.Schedules[kind]
	return e, ok && s.Good[Schedules]
}

// ended is the newest run of the schedule of a kind that is over, if that is known.
func (s *State) ended(kind string) (e schedule.Ended) {
	if s.Good[Schedules] {
		e = s.Ended[kind]
	}
	return e
}
