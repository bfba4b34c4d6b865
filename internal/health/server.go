package health

import (
	"fmt"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/human"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// A Server is what is known of a cluster's PostgreSQL.
type Server struct {
	Cluster string
	Err     error // it did not tell how it is doing; then nothing else is known
	cluster.Condition
	Skew  time.Duration // by how much its clock is ahead of this host's
	Tools error         // why there is no pg_dump for it; nil: there is
	// Rights says what a logical backup may not read; nil: nothing.
	Rights error
}

// A Duty is what is wanted of a cluster.
type Duty struct {
	Physical bool // physical backups, and the log archived
	Logical  bool // logical backups

	// From where on things are too much; the zero value is right.
	Transaction time.Duration // age of a transaction; 0: 1 hour
	Idle        time.Duration // of a transaction without a statement; 0: 10 minutes
	Slot        int64         // bytes of log that one slot holds; 0: 1 GiB
}

// allowedSkew is how far the clocks of a host and of what it talks to may be
// apart: times of both are compared.
const allowedSkew = 5 * time.Second

// Findings are what is wrong with a server.
func (s Server) Findings(d Duty) []Finding {
	f := &findings{cluster: s.Cluster}
	if s.Err != nil {
		name := "pg-unknown"
		if kind := fail.KindOf(s.Err); kind != fail.Unknown {
			name = string(kind)
		}
		f.add(name, Critical, fixOf(s.Err), "PostgreSQL does not tell how it is doing: %v", s.Err)
		return f.all
	}
	s.findArchiving(f, d)
	s.findHeld(f, d)
	if s.Requested > 10 && s.Requested > 2*s.Timed {
		f.add("max-wal-size", Warning, sql(fmt.Sprintf("ALTER SYSTEM SET max_wal_size = '%dMB'", 2*s.MaxWALSize>>20), reload, "SELECT pg_stat_reset_shared("+quote(s.statistics())+")"),
			"%d checkpoints of %d were due to the log's growth, or asked for: max_wal_size is %s, and each writes whole pages to the log again",
			s.Requested, s.Requested+s.Timed, human.Size(s.MaxWALSize))
	}
	if !s.DataChecksums {
		f.add("checksums-off", Warning, "stop PostgreSQL, then: pg_checksums --enable -D "+orWord(s.DataDirectory, "DIRECTORY"),
			"pages carry no checksums: what a disk changes is backed up as if it were right")
	}
	if skew := s.Skew.Abs(); skew > allowedSkew {
		f.add("clock-skew", severe(skew > 5*time.Minute), "set both clocks with chrony or systemd-timesyncd", "the clock of PostgreSQL is %s from that of this host", human.Span(skew))
	}
	if s.Tools != nil {
		f.add("pg-dump", severe(d.Logical), fixOf(s.Tools), "there is no pg_dump for this server here: %v", s.Tools)
	}
	if s.Rights != nil && d.Logical {
		f.add("rights", Critical, fixOf(s.Rights), "a logical backup would fail: %v", s.Rights)
	}
	if why, upTo := badMinor(s.Version); why != "" {
		f.add("bad-minor", Warning, fmt.Sprintf("install PostgreSQL %v or a newer one of that major version", upTo), "PostgreSQL %v is known to be bad: %s", s.Version, why)
	}
	return f.all
}

// findArchiving looks at what brings the log into the archive.
func (s Server) findArchiving(f *findings, d Duty) {
	if s.InRecovery && s.ArchiveMode != "always" { // the primary does
		return
	}
	const set = "ALTER SYSTEM SET archive_command = 'pgkeep-wal push %p'"
	on := sql("ALTER SYSTEM SET archive_mode = 'on'", set) + " then restart PostgreSQL"
	switch {
	case s.WALLevel == "minimal" && d.Physical:
		f.add("wal-level", Critical, sql("ALTER SYSTEM SET wal_level = 'replica'")+" then restart PostgreSQL", "wal_level is minimal: the log is not enough to recover from")
	case s.ArchiveMode == "off" && d.Physical:
		f.add("archive-off", Critical, on, "PostgreSQL archives nothing: archive_mode is off")
	case s.ArchiveMode == "off":
		f.add("archive-off", Notice, on,
			"PostgreSQL archives nothing: between two backups no moment can be recovered")
	case s.ArchiveBy == "":
		f.add("archive-missing", Critical, sql(set, reload), "archive_mode is on, and there is no archive_command: the log piles up in pg_wal")
	case !s.Ours:
		f.add("archive-foreign", severe(d.Physical), sql(set, reload), "the log is archived by %s, not by pgkeep-wal", s.ArchiveBy)
	}
	err := audit.Stuck(s.Cluster, s.Archiver)
	switch {
	case s.ArchiverErr != nil && d.Physical:
		f.add("pg-denied", Critical, fixOf(s.ArchiverErr), "nothing is known of what waits to be archived: %v", s.ArchiverErr)
	case s.ArchiverErr != nil || err == nil || !s.Archiver.Archiving:
	case !s.Archiver.LastFailed.IsZero() && s.Archiver.Now.Sub(s.Archiver.LastFailed) <= audit.Patience:
		f.add("archive-failing", Critical, fixOf(err), "%v", err)
	default:
		f.add("archive-silent", Critical, fixOf(err), "%v", err)
	}
}

// findHeld looks for what keeps the log, or dead rows, from going away.
func (s Server) findHeld(f *findings, d Duty) {
	if d.Transaction == 0 {
		d.Transaction = time.Hour
	}
	if d.Idle == 0 {
		d.Idle = 10 * time.Minute
	}
	if d.Slot == 0 {
		d.Slot = 1 << 30
	}
	for _, t := range s.Transactions {
		end := sql(fmt.Sprintf("SELECT pg_terminate_backend(%d)", t.PID))
		switch {
		case t.PID == 0 && t.Age > d.Transaction:
			f.add("prepared-transaction", Warning, sql("ROLLBACK PREPARED "+quote(t.Name))+" in database "+t.Database+", or COMMIT PREPARED",
				"a prepared transaction of %s is %s old: nobody will end it by himself", t.User, human.Span(t.Age))
		case t.PID != 0 && t.Idle > d.Idle:
			f.add("idle-in-transaction", Warning, end+" and set idle_in_transaction_session_timeout",
				"session %d of %s in database %s does nothing since %s, within a transaction that is %s old", t.PID, t.User, t.Database, human.Span(t.Idle), human.Span(t.Age))
		case t.PID != 0 && t.Age > d.Transaction:
			f.add("long-transaction", Warning, end+" if it hangs", "a transaction of %s in database %s is %s old: rows that it might see are kept", t.User, t.Database, human.Span(t.Age))
		}
	}
	for _, slot := range s.Slots {
		fix := "let its reader go on, or: " + sql("SELECT pg_drop_replication_slot("+quote(slot.Name)+")")
		switch {
		case slot.State == "lost":
			f.add("slot-lost", Warning, sql("SELECT pg_drop_replication_slot("+quote(slot.Name)+")"), "replication slot %s has lost its log: who reads from it must begin anew", slot.Name)
		case slot.Holds > d.Slot && !slot.Active:
			f.add("slot-holds-wal", severe(slot.Holds > 10*d.Slot), fix, "replication slot %s holds %s of log, and nobody reads from it", slot.Name, human.Size(slot.Holds))
		case slot.Holds > 10*d.Slot:
			f.add("slot-holds-wal", Warning, fix, "replication slot %s holds %s of log: its reader is far behind", slot.Name, human.Size(slot.Holds))
		}
	}
}

// statistics names those that count checkpoints.
func (s Server) statistics() string {
	if s.Version.Major() >= 17 {
		return "checkpointer"
	}
	return "bgwriter"
}

// badMinor says why one should not stay on a version, and which is the first
// good one; "" for one that is not known to be bad. From the release notes:
// E.5 of 14.4, and those of 17.2 with its siblings.
func badMinor(v pg.Version) (why string, good pg.Version) {
	for _, bad := range []struct {
		from, good pg.Version
		why        string
	}{
		{140000, 140004, "CREATE INDEX CONCURRENTLY and REINDEX CONCURRENTLY make indexes that miss rows"},
		{140014, 140015, "it broke extensions and ALTER ROLE … SET ROLE"},
		{150009, 150010, "it broke extensions and ALTER ROLE … SET ROLE"},
		{160005, 160006, "it broke extensions and ALTER ROLE … SET ROLE"},
		{170001, 170002, "it broke extensions and ALTER ROLE … SET ROLE"},
	} {
		if bad.from <= v && v < bad.good {
			return bad.why, bad.good
		}
	}
	return "", 0
}

func severe(much bool) Severity {
	if much {
		return Critical
	}
	return Warning
}

// sql is what a superuser runs.
func sql(statements ...string) string {
	return "as a superuser: " + strings.Join(statements, "; ") + ";"
}

const reload = "SELECT pg_reload_conf()"

// quote writes s as a string constant of SQL.
func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// fixOf is the advice of an error.
func fixOf(err error) string {
	return orWord(fail.HintOf(err), "pgkeep config show prints the settings in force")
}

func orWord(s, word string) string {
	if s == "" {
		return word
	}
	return s
}
