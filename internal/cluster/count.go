package cluster

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// TableRows is how many rows a table has of its own, without those of its
// partitions and of tables that inherit from it.
type TableRows struct {
	Schema string `json:"schema"`
	Table  string `json:"table"`
	Rows   int64  `json:"rows"`
}

var plainName = regexp.MustCompile(`^[a-z_][a-z0-9_$]*$`)

// String is the name, quoted where SQL wants it quoted, so that no two tables
// have the same.
func (t TableRows) String() string {
	name := func(s string) string {
		if plainName.MatchString(s) {
			return s
		}
		return pgx.Identifier{s}.Sanitize()
	}
	return name(t.Schema) + "." + name(t.Table)
}

func (t TableRows) quoted() string { return pgx.Identifier{t.Schema, t.Table}.Sanitize() }

// Counted are the rows of tables of one database, all in one snapshot.
type Counted struct {
	Database string `json:"database"`
	Snapshot string `json:"snapshot"` // pg_current_snapshot: whose rows are counted
	// After was read when the snapshot was taken already: a transaction that it
	// sees has its commit record before that.
	After  pg.LSN      `json:"after"`
	Role   string      `json:"role"` // who may read them
	Tables []TableRows `json:"tables"`
}

// CountRows counts the rows of the tables that are named, in one snapshot for
// each database, while nobody can truncate or rewrite them. What cannot be
// counted is no error: missing says which and why, with the SQL that helps. Both
// name what is in the cluster.
func (c Cluster) CountRows(ctx context.Context, tables []pg.TablePattern) (counted []Counted, missing []string, err error) {
	facts, err := c.Facts(ctx)
	if err != nil {
		return nil, nil, err
	}
	if facts.InRecovery {
		return nil, []string{"the server is a standby: rows are counted on a primary"}, nil
	}
	found := make([]bool, len(tables))
	for _, db := range facts.Databases {
		if !db.AllowConn || db.ConnLimit == -2 || !slices.ContainsFunc(tables, func(p pg.TablePattern) bool { return p.MatchDatabase(db.Name) }) {
			continue
		}
		one, lacks, err := c.countDatabase(ctx, db.Name, tables, found)
		if ctx.Err() != nil {
			return counted, missing, ctx.Err()
		}
		if err != nil {
			lacks = append(lacks, err.Error())
		}
		for _, lack := range lacks {
			missing = append(missing, fmt.Sprintf("database %s: %s", db.Name, lack))
		}
		if len(one.Tables) > 0 {
			counted = append(counted, one)
		}
	}
	for i, p := range tables {
		if !found[i] {
			missing = append(missing, fmt.Sprintf("%s: there is no such table", p))
		}
	}
	return counted, missing, nil
}

// countDatabase is CountRows for one database. It notes which patterns name a
// table there.
func (c Cluster) countDatabase(ctx context.Context, db string, tables []pg.TablePattern, found []bool) (counted Counted, missing []string, err error) {
	conn, err := c.Connect(ctx, db)
	if err != nil {
		return counted, nil, err
	}
	defer hangUp(conn)
	counted = Counted{Database: db}
	wanted, missing, err := countable(ctx, conn, db, tables, found)
	if err != nil || len(wanted) == 0 {
		return counted, missing, queryError("list tables", err)
	}
	// The snapshot comes after the locks: who truncates or rewrites a table leaves
	// none of its rows to older snapshots.
	var names []string
	for _, t := range wanted {
		names = append(names, "ONLY "+t.quoted())
	}
	begin := "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL lock_timeout = '10s'; SET LOCAL row_security = off; LOCK TABLE " +
		strings.Join(names, ", ") + " IN ACCESS SHARE MODE"
	for try := 1; ; try++ {
		if _, err := conn.Exec(ctx, begin, pgx.QueryExecModeSimpleProtocol); err != nil {
			return counted, missing, queryError("lock the tables against TRUNCATE", err)
		}
		if err := conn.QueryRow(ctx, "SELECT pg_current_snapshot()::text, session_user::text").Scan(&counted.Snapshot, &counted.Role); err != nil {
			return counted, missing, queryError("take a snapshot", err)
		}
		if counted.After, _, err = position(ctx, conn); err != nil {
			return counted, missing, queryError("take a snapshot", err)
		}
		calm, err := calm(ctx, conn, counted.Snapshot)
		if err != nil {
			return counted, missing, queryError("take a snapshot", err)
		}
		if calm || try == mostSnapshots {
			break
		}
		if _, err := conn.Exec(ctx, "ROLLBACK"); err != nil {
			return counted, missing, queryError("take a snapshot", err)
		}
	}
	for _, t := range wanted {
		err := countOne(ctx, conn, &t)
		if conn.IsClosed() || ctx.Err() != nil {
			return counted, missing, queryError("count rows", cmp.Or(err, ctx.Err()))
		}
		if err != nil {
			missing = append(missing, fmt.Sprintf("table %s: %v", t, err))
			continue
		}
		counted.Tables = append(counted.Tables, t)
	}
	return counted, missing, nil
}

// mostSnapshots is how many are taken at most, to get one for which there is a
// place in the log.
const mostSnapshots = 40

// calm reports whether no transaction was about to commit when a snapshot was
// taken: its record could be in the log before that of one that the snapshot sees.
// One that was is at its end by now.
func calm(ctx context.Context, conn *pgx.Conn, snapshot string) (yes bool, err error) {
	seen, err := pg.ParseSnapshot(snapshot)
	if err != nil || len(seen.Running) == 0 {
		return err == nil, err
	}
	select {
	case <-time.After(10 * time.Millisecond): // as long as a flush takes
	case <-ctx.Done():
		return false, ctx.Err()
	}
	var running []string
	for _, xid := range seen.Running {
		running = append(running, strconv.FormatUint(xid, 10))
	}
	// This function knows what is so now, whatever the transaction's snapshot.
	err = conn.QueryRow(ctx, "SELECT bool_and(pg_xact_status(x::xid8) IS NOT DISTINCT FROM 'in progress') FROM unnest($1::text[]) x", pgx.QueryExecModeExec, running).Scan(&yes)
	return yes, err
}

// countOne leaves the transaction as it was, also where it fails.
func countOne(ctx context.Context, conn *pgx.Conn, t *TableRows) error {
	if _, err := conn.Exec(ctx, "SAVEPOINT one"); err != nil {
		return err
	}
	err := conn.QueryRow(ctx, "SELECT count(*) FROM ONLY "+t.quoted(), pgx.QueryExecModeExec).Scan(&t.Rows)
	if err != nil {
		_, rerr := conn.Exec(ctx, "ROLLBACK TO SAVEPOINT one")
		if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
			err = errors.New(pgErr.Message)
		}
		return errors.Join(err, rerr)
	}
	_, err = conn.Exec(ctx, "RELEASE SAVEPOINT one")
	return err
}

// countable lists the tables that are named and may be read. Rows of unlogged and
// temporary ones are not in the log.
func countable(ctx context.Context, conn *pgx.Conn, db string, tables []pg.TablePattern, found []bool) (wanted []TableRows, missing []string, err error) {
	rows, err := conn.Query(ctx, `
		SELECT n.nspname::text, c.relname::text, coalesce(has_schema_privilege(n.oid, 'USAGE'), false),
		       coalesce(has_table_privilege(c.oid, 'SELECT'), false), current_user::text
		  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		 WHERE c.relkind = 'r' AND c.relpersistence = 'p' AND n.nspname NOT IN ('pg_catalog', 'information_schema')
		 ORDER BY 1, 2`)
	if err != nil {
		return nil, nil, err
	}
	var t TableRows
	var usage, read bool
	var role string
	var denied, grants []string
	_, err = pgx.ForEachRow(rows, []any{&t.Schema, &t.Table, &usage, &read, &role}, func() error {
		named := false
		for i, p := range tables {
			if p.Match(db, t.Schema, t.Table) {
				named, found[i] = true, true
			}
		}
		to := " TO " + pgx.Identifier{role}.Sanitize() + ";"
		switch {
		case !named:
		case usage && read:
			wanted = append(wanted, t)
		default:
			denied = append(denied, t.String())
			schema := "GRANT USAGE ON SCHEMA " + pgx.Identifier{t.Schema}.Sanitize() + to
			if !usage && !slices.Contains(grants, schema) {
				grants = append(grants, schema)
			}
			if !read {
				grants = append(grants, "GRANT SELECT ON "+t.quoted()+to)
			}
		}
		return nil
	})
	if len(denied) > 0 {
		missing = append(missing, fmt.Sprintf("role %s may not read %s; %s", role, strings.Join(denied, ", "), hintAs+strings.Join(grants, " ")))
	}
	return wanted, missing, err
}

// CountDump counts the rows that a dump holds, by table. The tables are named as
// s sees them, of which it is the dump. Left out are those whose rows a restore
// finds elsewhere, or not for long: tables of extensions, which come with rows of
// their own; partitions that a value's hash chooses, where another server may hash
// it otherwise; and unlogged tables, which a crash empties. progress is called now
// and then.
func CountDump(ctx context.Context, t Tools, s *Snapshot, dir string, progress func()) ([]TableRows, error) {
	toc, err := ListTOC(ctx, t, dir)
	if err != nil {
		return nil, err
	}
	names, err := s.tables(ctx)
	if err != nil {
		return nil, queryError("list tables", err)
	}
	var counted []TableRows
	for _, line := range toc.lines {
		id, rest, _ := strings.Cut(line, "; ")
		fields := strings.SplitN(rest, " ", 3) // of the table: the OID of its catalog, or 0; its own OID; what follows
		if len(fields) < 3 || !strings.HasPrefix(fields[2], "TABLE DATA ") {
			continue
		}
		oid, err := strconv.ParseUint(fields[1], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("list %s: %.200q: %w", dir, line, err)
		}
		table, ok := names[uint32(oid)]
		if !ok {
			continue
		}
		table.Rows, err = countLines(ctx, filepath.Join(dir, id+".dat"), progress)
		if errors.Is(err, fs.ErrNotExist) { // of a foreign table, say
			continue
		}
		if err != nil {
			return nil, err
		}
		counted = append(counted, table)
	}
	return counted, nil
}

// tables names the ordinary tables that the snapshot sees, by OID.
func (s *Snapshot) tables(ctx context.Context) (map[uint32]TableRows, error) {
	rows, err := s.conn.Query(ctx, `
		SELECT c.oid, n.nspname::text, c.relname::text
		  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
		 WHERE c.relkind = 'r' AND c.relpersistence = 'p'
		   AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.classid = 'pg_class'::regclass AND d.objid = c.oid AND d.deptype = 'e')
		   AND NOT EXISTS (SELECT FROM pg_partition_ancestors(c.oid) a JOIN pg_partitioned_table p ON p.partrelid = a.relid WHERE p.partstrat = 'h')`,
		pgx.QueryExecModeExec)
	if err != nil {
		return nil, err
	}
	names := make(map[uint32]TableRows)
	var oid uint32
	var t TableRows
	_, err = pgx.ForEachRow(rows, []any{&oid, &t.Schema, &t.Table}, func() error {
		names[oid] = t
		return nil
	})
	return names, err
}

// endOfCopy is what pg_dump writes behind the rows of a table.
const endOfCopy = "\\.\n\n\n"

// countLines counts the rows in a file of a dump: each is a line. A file without
// the end that belongs there is an error.
func countLines(ctx context.Context, path string, progress func()) (rows int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	var tail []byte
	for told := time.Now(); ; {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		n, err := f.Read(b)
		rows += int64(bytes.Count(b[:n], []byte("\n")))
		tail = append(tail, b[max(0, n-len(endOfCopy)):n]...)
		tail = tail[max(0, len(tail)-len(endOfCopy)):]
		if time.Since(told) >= time.Second {
			told = time.Now()
			progress()
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return 0, err
		}
	}
	if string(tail) != endOfCopy {
		return 0, fmt.Errorf("%s does not end as a table of a dump does: %w", path, fail.DumpFailed)
	}
	return rows - int64(strings.Count(endOfCopy, "\n")), nil
}
