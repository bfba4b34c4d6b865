package cluster

import (
	"github.com/jackc/pgx/v5"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// For tests of what has no door of its own.
var (
	RolesIn         = rolesIn
	ArchivedThrough = archivedThrough
	LastWAL         = lastWAL
)

// Pooled puts another connection in the place of the session's, as a pooler
// does between two transactions.
func (s *BackupSession) Pooled(conn *pgx.Conn) { s.conn = conn }

// Summary is what an error says of lines that a program wrote.
func Summary(lines ...string) string {
	var s speech
	for _, line := range lines {
		s.hear(line)
	}
	return s.summary()
}

// AheadOf reports whether the one snapshot takes a transaction for ended that
// runs for the other; both in PostgreSQL's text form.
func AheadOf(seen, now string) (bool, error) {
	a, err := pg.ParseSnapshot(seen)
	if err != nil {
		return false, err
	}
	b, err := pg.ParseSnapshot(now)
	return aheadOf(a, b), err
}
