package health

import "time"

// A Schedule is what Temporal starts by itself for a cluster.
type Schedule struct {
	Kind     string // of what it starts
	Cron     string
	TimeZone string
	Paused   bool
	Note     string    // an operator's
	Next     time.Time // zero: it starts nothing
	Last     time.Time // zero: it never did
	Running  bool
	Missed   int // starts that were too old to be made up for
	Skipped  int // starts given up because a run was still going on
}
