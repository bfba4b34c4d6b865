// Package proof restores a backup into a sandbox, opens it, checks it, measures
// it, and says what it found: green means that it was seen to work.
package proof

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// A Verdict on a check, or on the whole test.
type Verdict string

const (
	Passed  Verdict = "passed"
	Failed  Verdict = "failed"
	Skipped Verdict = "skipped" // it does not apply here; its message says why
)

// A Check is one thing that was looked at.
type Check struct {
	Name    string    `json:"name"`
	Verdict Verdict   `json:"verdict"`
	Kind    fail.Kind `json:"kind,omitempty"`    // of a failure that is not the backup's, such as a full disk
	Seconds float64   `json:"seconds"`           // of work; tables are checked several at a time
	Items   int64     `json:"items"`             // looked at: files, tables, indexes, databases
	Failed  int64     `json:"failed"`            // of them
	Message string    `json:"message,omitempty"` // the cause, without names or values of the source's data
	// Findings hold names of databases and tables, and of assertions rows: they
	// are for those who may read the backup. At most 20 are kept.
	Findings []string `json:"findings,omitempty"`
}

const maxFindings = 20

// find says that one thing failed.
func (c *Check) find(format string, args ...any) {
	c.Failed++
	c.note(format, args...)
}

func (c *Check) note(format string, args ...any) {
	c.Verdict = Failed
	if len(c.Findings) < maxFindings {
		c.Findings = append(c.Findings, fmt.Sprintf(format, args...))
	}
}

// A Phase is a part of the test, in order.
type Phase struct {
	Name    string  `json:"name"`
	Seconds float64 `json:"seconds"`
	Bytes   int64   `json:"bytes,omitempty"` // that went through it
}

// Rate in bytes per second; 0 if it is not known.
func (p Phase) Rate() float64 {
	if p.Bytes == 0 || p.Seconds <= 0 {
		return 0
	}
	return float64(p.Bytes) / p.Seconds
}

// Phases. The sum of fetch, load and replay is the time a restore takes until
// PostgreSQL is open.
const (
	Fetch     = "fetch"     // files, from the repository
	Load      = "load"      // pg_restore, of a logical backup
	Manifest  = "manifest"  // pg_verifybackup
	Replay    = "replay"    // of the log
	Rows      = "rows"      // counted on the way, with a start of the server for each time
	Checksums = "checksums" // pg_checksums
	Open      = "open"      // until it takes connections
	Checks    = "checks"    // of what is in it
)

// A Position is how far a cluster had come.
type Position struct {
	Timeline   pg.Timeline `json:"timeline,omitzero"`
	LSN        pg.LSN      `json:"lsn,omitzero"`
	LastCommit time.Time   `json:"last_commit,omitzero"` // zero: not known
}

// Lag is how far what was restored is behind the source at the test's start:
// the RPO that was achieved.
type Lag struct {
	Bytes   int64   `json:"bytes"`   // of log
	Seconds float64 `json:"seconds"` // between last commits
}

// A Report is what a test found. Without findings it names nothing of the
// source's data; see Public.
type Report struct {
	Started   time.Time         `json:"started_at"`
	Finished  time.Time         `json:"finished_at"`
	Verdict   Verdict           `json:"verdict"` // Passed or Failed
	Version   pg.Version        `json:"pg_version,omitzero"`
	System    pg.SystemID       `json:"system_id,omitzero"`
	Isolation sandbox.Isolation `json:"isolation"`

	Target   sandbox.Target `json:"target"`
	Reached  Position       `json:"reached"`
	Reason   string         `json:"reason,omitempty"` // why replay ended there, in PostgreSQL's words
	Segments int            `json:"segments"`         // of log, replayed
	Source   Position       `json:"source,omitzero"`  // at the test's start
	Lag      *Lag           `json:"lag,omitempty"`    // nil: not known

	RTO    float64 `json:"rto_seconds"` // fetch, load and replay
	Phases []Phase `json:"phases"`

	Databases int   `json:"databases"`
	Tables    int   `json:"tables"`
	Indexes   int   `json:"indexes"`
	Compared  int   `json:"indexes_compared"` // of them, those in which every row of the table was looked for
	Rows      int64 `json:"rows"`
	Bytes     int64 `json:"bytes"` // of the databases

	Checks []Check `json:"checks"`
}

// Public is the report without what only those may see who may read the backup.
func (r Report) Public() Report {
	checks := make([]Check, len(r.Checks))
	for i, c := range r.Checks {
		c.Findings = nil
		checks[i] = c
	}
	r.Checks = checks
	return r
}

// Summary says in one line what is wrong, with the first finding of each failed
// check; "" if nothing is.
func (r Report) Summary() string {
	var lines []string
	for _, c := range r.Checks {
		if c.Verdict != Failed {
			continue
		}
		line := c.Name + ": " + c.Message
		if len(c.Findings) > 0 {
			line = c.Name + ": " + c.Findings[0]
		}
		lines = append(lines, line)
	}
	return strings.Join(lines, "; ")
}

// Err is nil if the test passed. Else it is of fail.ProofFailed, or, if no check
// found anything wrong, of the kind of the trouble that kept the test from an answer. It names nothing that
// Public would not.
func (r Report) Err() error {
	if r.Verdict == Passed {
		return nil
	}
	kind, wrong := fail.ProofFailed, false
	var failed []error
	for _, c := range r.Checks {
		if c.Verdict == Failed {
			failed = append(failed, fmt.Errorf("%s: %s", c.Name, c.Message))
			wrong = wrong || c.Kind == fail.Unknown
			if kind == fail.ProofFailed && c.Kind != fail.Unknown {
				kind = c.Kind
			}
		}
	}
	if wrong { // whatever else there was
		kind = fail.ProofFailed
	}
	err := errors.Join(failed...)
	if err == nil {
		err = errors.New("nothing was checked")
	}
	return fmt.Errorf("restore test: %s: %w", strings.ReplaceAll(err.Error(), "\n", "; "), kind)
}

// Failed reports whether a check has: then the verdict is known.
func (r Report) Failed() bool {
	return slices.ContainsFunc(r.Checks, func(c Check) bool { return c.Verdict == Failed })
}

// judge gives the verdict: every check that was made must have passed, and one
// at least must have been made.
func (r *Report) judge() {
	r.Verdict = Failed
	passed := false
	for _, c := range r.Checks {
		switch c.Verdict {
		case Passed:
			passed = true
		case Failed:
			return
		}
	}
	if passed {
		r.Verdict = Passed
	}
}

func (r *Report) phase(name string, begun time.Time, bytes int64) {
	r.Phases = append(r.Phases, Phase{Name: name, Seconds: time.Since(begun).Seconds(), Bytes: bytes})
}
