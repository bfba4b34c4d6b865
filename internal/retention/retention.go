// Package retention decides which backups of a cluster, and which segments of
// its log, nobody needs any more. It decides from what it is given and touches
// nothing; what it is not sure of, it keeps.
package retention

import (
	"fmt"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Policy says what is to be kept of a cluster, of each kind of backup. A backup
// is kept if any of it says so. The zero Policy keeps everything.
type Policy struct {
	// Window is how far back every moment stays reachable: all backups that are
	// younger, the newest physical one before it, and the log from there on.
	Window time.Duration
	// The newest backup of each of so many days, weeks (ISO 8601) and months, in
	// UTC. Only those count in which there is a good backup: where none is taken,
	// none expires.
	Daily, Weekly, Monthly int
	// Min is how many good backups stay in any case; at least 1.
	Min int
	// Grace is for how long a backup that was let go can be brought back, and the
	// log stays that nothing needs any more: a restore that began while a moment
	// could be reached comes to its end. 0: all goes at once.
	Grace time.Duration
}

// IsZero reports whether p keeps everything: Min and Grace alone say nothing about
// what may go.
func (p Policy) IsZero() bool {
	return p.Window == 0 && p.Daily == 0 && p.Weekly == 0 && p.Monthly == 0
}

// Facts are all that a decision rests on.
type Facts struct {
	Cluster  string
	Backups  []repo.Record  // all there are, oldest first
	Archives []audit.Ledger // one for each system and major version
	// Damage says for which archives the ledger is not all: something there
	// cannot be read.
	Damage map[repo.Archive]error
	Now    time.Time
}

// A Plan says of everything whether it stays, and why.
type Plan struct {
	Cluster string    `json:"cluster"`
	Now     time.Time `json:"now"`
	Backups []Verdict `json:"backups"` // oldest first
	WAL     []WAL     `json:"wal"`
	// Against is what stands against removing anything at all; empty: nothing.
	Against []string `json:"against,omitempty"`
	// Confirm is 0, or how many backups are to go, where that is so many that
	// somebody has to say the number.
	Confirm int `json:"confirm,omitempty"`
}

// A Verdict is the decision about one backup.
type Verdict struct {
	ID      repo.ID   `json:"id"`
	Kind    repo.Kind `json:"kind,omitempty"`
	Stored  int64     `json:"stored,omitempty"` // bytes; others may need some of them
	Keep    bool      `json:"keep"`
	Reasons []string  `json:"reasons"` // why it is kept, or why not
	// Deleted: it is marked already, and goes when its grace has passed.
	Deleted bool `json:"deleted,omitempty"`
}

// WAL is the decision about the log of one archive.
type WAL struct {
	repo.Archive
	SegmentSize pg.SegmentSize `json:"segment_size"`
	Floors      []repo.Floor   `json:"floors,omitempty"` // below them, segments go that no backup needs itself
	Segments    int            `json:"segments"`         // how many can go; they do a grace after that was first recorded
	Why         string         `json:"why"`              // what the floors rest on, or why nothing goes

	own  map[string]bool        // names of the segments that backups need themselves
	from map[pg.Timeline]pg.LSN // all segments from there on stay
}

// Needed reports whether the segment that a file belongs to leads to a moment
// that is kept, or is needed by a backup itself.
func (w WAL) Needed(n pg.WALName) bool {
	at, err := n.Start(w.SegmentSize)
	from, decided := w.from[n.Timeline]
	return err != nil || !decided || at >= from || w.own[n.Segment()]
}

// Removals are the backups to be marked as deleted.
func (p Plan) Removals() (ids []repo.ID) {
	for _, v := range p.Backups {
		if !v.Keep && !v.Deleted {
			ids = append(ids, v.ID)
		}
	}
	return ids
}

// Err is nil if the plan may be carried out by somebody who said that number of
// backups, or a higher one, as when a run was cut; 0: nobody did. Else it is fail.ExpireRefused, and says why.
func (p Plan) Err(confirm int) error {
	if len(p.Against) > 0 {
		return fmt.Errorf("expire %s: %s: %w", p.Cluster, p.Against[0], fail.ExpireRefused)
	}
	if p.Confirm > confirm {
		return fail.Hint(fmt.Errorf("expire %s: %d of %d backups would go at once: %w", p.Cluster, p.Confirm, p.standing(), fail.ExpireRefused),
			fmt.Sprintf("look at the plan; if it is meant: pgkeep expire --apply --confirm %d", p.Confirm))
	}
	return nil
}

// standing is how many backups there are that are finished and not deleted.
func (p Plan) standing() (n int) {
	for _, v := range p.Backups {
		if !v.Deleted && v.Kind != "" {
			n++
		}
	}
	return n
}
