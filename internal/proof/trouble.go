package proof

import (
	"context"
	"errors"
	"os/exec"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// A trouble is why something could not be checked, though the backup may be sound.
// The zero trouble is none: what was found is wrong with the backup.
type trouble struct {
	kind fail.Kind
	why  string // without names or values of the source's data
}

var (
	outOfTime = trouble{fail.Stalled, "it was ended before it was done"}
	missing   = trouble{fail.PGVersion, "an extension or a library is not installed on this host: install for this PostgreSQL what the source has, contrib among it"}
	diskFull  = trouble{fail.NoSpace, "the disk of this host is full"}
	tooLittle = trouble{fail.BadConfig, "it takes more than restore_test.memory, or temporary space, allows"}
	killed    = trouble{fail.BadConfig, "it was killed: is the memory of this host short?"}
	forbidden = trouble{fail.BadConfig, "assertions are to be one statement that reads"}
	collates  = trouble{fail.PGVersion, "collations sort otherwise here than at the source: install the same version of the C library and of ICU, or rebuild indexes after a restore"}
)

// otherwise is an error that comes of collations that sort otherwise here.
type otherwise struct{ error }

func (o otherwise) Unwrap() error { return o.error }

// troubleOf reads an error of a check.
func troubleOf(err error) trouble {
	if _, ok := errors.AsType[otherwise](err); ok {
		return collates
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || pgconn.Timeout(err) {
		return outOfTime
	}
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && !exit.Exited() {
		return killed
	}
	// https://www.postgresql.org/docs/current/errcodes-appendix.html. What misses a
	// library or an extension shares its code with a file that is lost; only the
	// place in PostgreSQL's source tells.
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch {
		case e.File == "dfmgr.c", e.File == "extension.c":
			return missing
		case e.Code == "57014":
			return outOfTime
		case e.Code == "53100":
			return diskFull
		case strings.HasPrefix(e.Code, "53"):
			return tooLittle
		}
		return trouble{}
	}
	if k := troubles(err); k != fail.Unknown {
		return trouble{k, k.Meaning()}
	}
	return trouble{}
}

// assertionTrouble is troubleOf for what the user asks: that may be wrong, too.
func assertionTrouble(err error) trouble {
	if e, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch e.Code {
		case "42601", "25006", "42501": // a syntax error; it writes; it wants more rights
			return forbidden
		}
	}
	return troubleOf(err)
}

// lost reports whether an error is that of a session which has ended, or cannot begin.
func lost(err error) bool {
	e, ok := errors.AsType[*pgconn.PgError](err)
	return !ok || strings.HasPrefix(e.Code, "57P")
}
