package health

import (
	"fmt"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/human"
)

// expiry is the kind of a schedule that removes what retention does not keep.
const expiry = "expire"

// A Schedule is what Temporal starts by itself for a cluster.
type Schedule struct {
	Kind     string // of what it starts
	Cron     string
	TimeZone string
	Paused   bool
	Note     string        // an operator's
	Next     time.Time     // zero: it starts nothing
	Every    time.Duration // the time between the next two starts; 0: not known
	Last     time.Time     // zero: it never did
	Running  bool
	Missed   int       // starts that were too old to be made up for, since there is the schedule
	Skipped  int       // starts given up because a run was still going on, likewise
	Failed   time.Time // when the newest run that is over failed or was ended; zero: it did not, or that is not known
	Run      string    // its workflow id
}

// Work is what Temporal is to do for a cluster.
type Work struct {
	Cluster string
	Have    []Schedule
	Wanted  []string // kinds of those that must be there
	Host    string   // whose worker does it
	Served  bool     // there is such a worker
	Keeps   bool     // there is a retention: what it does not keep is to go
}

// Findings are what is wrong with the work.
func (w Work) Findings(now time.Time) []Finding {
	f := &findings{cluster: w.Cluster}
	if len(w.Have)+len(w.Wanted) > 0 && !w.Served {
		f.add(string(fail.NoWorker), Critical, "start pgkeep worker on "+w.Host, "no worker serves host %s: nothing that starts there gets on", w.Host)
	}
	if len(w.Have)+len(w.Wanted) == 0 {
		f.add("unscheduled", Warning, "write schedules into the configuration, then: pgkeep schedule apply", "nothing starts backups by itself")
	}
	found := make(map[string]bool)
	for _, s := range w.Have {
		found[s.Kind] = true
		name := w.Cluster + "/" + s.Kind
		switch {
		case s.Paused:
			note := ""
			if s.Note != "" {
				note = fmt.Sprintf(" (%s)", s.Note)
			}
			f.add("schedule-paused", Warning, "pgkeep schedule unpause "+name, "schedule %s is paused%s: it starts nothing", name, note)
		case s.Running && s.Every > 0 && now.Sub(s.Last) > s.Every:
			f.add("schedule-skipping", Warning, "pgkeep ps shows what it does; pgkeep cancel "+name+" ends it", "the run of schedule %s goes on for %s, and it should start every %s: starts are skipped",
				name, human.Span(now.Sub(s.Last)), human.Span(s.Every))
		case s.Next.IsZero():
			f.add("schedule-ended", Warning, "give it a time that comes in the configuration, then: pgkeep schedule delete "+name+"; pgkeep schedule apply", "schedule %s has no next start", name)
		}
		if !s.Failed.IsZero() {
			f.add("schedule-failing", Warning, "the Temporal Web UI shows why, and so does the worker's log (journalctl -u pgkeep-worker); when that is mended: pgkeep schedule trigger "+name,
				"the last run of schedule %s failed %s ago: workflow %s", name, human.Span(now.Sub(s.Failed)), s.Run)
		}
	}
	if w.Keeps && !found[expiry] && !slices.Contains(w.Wanted, expiry) {
		f.add("never-expires", Warning, fmt.Sprintf(`write {cluster: %s, kind: %s, cron: "@daily"} into schedules of the configuration, then: pgkeep schedule apply`, w.Cluster, expiry),
			"the cluster has a retention, and no schedule that lets go of what it does not keep: the store fills, unless somebody runs pgkeep expire --apply")
	}
	for _, kind := range w.Wanted {
		if !found[kind] {
			f.add("schedule-missing", Critical, "pgkeep schedule apply", "schedule %s/%s stands in the configuration, and the Temporal server does not have it", w.Cluster, kind)
		}
	}
	return f.all
}
