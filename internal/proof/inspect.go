package proof

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/cluster"
)

// inspect checks what is in the open cluster, one database after another and in
// each several tables at a time.
func (t Test) inspect(ctx context.Context, r *Report) {
	in := inspection{Test: t, report: r, checks: make(map[string]*Check), troubles: make(map[string]trouble), wrong: make(map[string]bool)}
	names := []string{CheckCollations, CheckHeap, CheckBTree, CheckRead, CheckRows, CheckAssertions}
	if t.Recovery != nil && t.Rows == nil { // they were counted on the way
		names = slices.DeleteFunc(names, func(name string) bool { return name == CheckRows })
	}
	for _, name := range names {
		in.checks[name] = &Check{Name: name, Verdict: Passed}
		if !t.wants(name) {
			in.skip(name, "it was not asked for")
		}
	}
	databases, err := in.databases(ctx)
	if err != nil {
		r.Checks = append(r.Checks, failed(CheckOpen, err))
		return
	}
	for _, db := range databases {
		in.database(ctx, db)
	}
	in.compareRows()
	in.assert(ctx)
	for _, name := range names {
		r.Checks = append(r.Checks, in.done(name))
	}
}

// An inspection is what several goroutines come to know of one cluster.
type inspection struct {
	Test
	mu     sync.Mutex
	report *Report
	checks map[string]*Check
	counts map[string]map[string]int64 // rows, by database and table
	major  int

	troubles map[string]trouble // the first of each check
	wrong    map[string]bool    // checks that found something wrong
}

// update changes what is known of a check.
func (in *inspection) update(name string, change func(c *Check)) {
	in.mu.Lock()
	defer in.mu.Unlock()
	if c := in.checks[name]; c.Verdict != Skipped {
		change(c)
	}
}

func (in *inspection) skip(name, why string) {
	in.checks[name].Verdict, in.checks[name].Message = Skipped, why
}

// looked records that a thing was checked, how long that took, and what is wrong
// with it.
func (in *inspection) looked(name, what string, took time.Duration, errs ...error) {
	ask := troubleOf
	if name == CheckAssertions {
		ask = assertionTrouble
	}
	in.update(name, func(c *Check) {
		c.Items++
		c.Seconds += took.Seconds()
		bad := slices.DeleteFunc(slices.Clone(errs), func(err error) bool { return err == nil })
		if len(bad) == 0 {
			return
		}
		c.Failed++
		for _, err := range bad {
			c.note("%s: %s", what, describe(err))
			t := ask(err)
			if t == (trouble{}) && lost(err) && in.Sandbox.Killed() {
				t = killed
			}
			in.troubles[name] = cmp.Or(in.troubles[name], t)
			in.wrong[name] = in.wrong[name] || t == (trouble{})
		}
	})
}

// done gives a check its message, and its kind if all that it found may be no
// fault of the backup.
func (in *inspection) done(name string) Check {
	c := in.checks[name]
	if c.Verdict == Passed && c.Items == 0 {
		c.Verdict, c.Message = Skipped, "there is nothing to look at"
	}
	if t := in.troubles[name]; c.Verdict == Failed && t != (trouble{}) && !in.wrong[name] {
		c.Kind, c.Message = t.kind, fmt.Sprintf("%s (%d of %d)", t.why, c.Failed, c.Items)
	} else if c.Verdict == Failed {
		c.Message = map[string]string{
			CheckCollations: "collations cannot be looked at",
			CheckHeap:       "tables are damaged",
			CheckBTree:      "indexes are damaged, or do not fit their tables",
			CheckRead:       "tables cannot be read",
			CheckRows:       "tables do not have the rows that were counted at the source",
			CheckAssertions: "assertions do not hold",
		}[c.Name] + fmt.Sprintf(" (%d of %d)", c.Failed, c.Items)
	}
	return *c
}

// describe is an error of the server in one line, with its detail: the functions
// that check tell there where they found it.
func describe(err error) string {
	pgErr, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return err.Error()
	}
	text := pgErr.Message
	if pgErr.Detail != "" {
		text += " (" + pgErr.Detail + ")"
	}
	if pgErr.Hint != "" && strings.Contains(pgErr.Message, "could not") {
		text += " (" + pgErr.Hint + ")"
	}
	return strings.Join(strings.Fields(text), " ")
}

// databases lists those that take connections. template0 does not, and nor does
// one whose DROP DATABASE was interrupted; their pages are checked all the same,
// by their checksums.
func (in *inspection) databases(ctx context.Context) (names []string, err error) {
	conn, err := in.Sandbox.Connect(ctx, "template1")
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if err := conn.QueryRow(ctx, "SELECT current_setting('server_version_num')::int / 10000").Scan(&in.major); err != nil {
		return nil, err
	}
	err = conn.QueryRow(ctx, "SELECT count(*), sum(pg_database_size(oid))::bigint FROM pg_database").Scan(&in.report.Databases, &in.report.Bytes)
	if err != nil {
		// The files of one are not there; the tables in it will tell.
		in.report.Databases, in.report.Bytes = 0, 0
	}
	rows, err := conn.Query(ctx, "SELECT datname::text FROM pg_database WHERE datallowconn AND datconnlimit <> -2 ORDER BY datname")
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowTo[string])
}

// A relation is a table or an index to check.
type relation struct {
	OID    uint32
	Schema string
	Name   string
	Index  bool
	Toast  bool
	Heap   bool  // a table of PostgreSQL's own kind
	Pages  int64 // when it was analyzed last
	// Otherwise: an index by a collation that sorts otherwise here.
	Otherwise bool
	// Columns whose values can be damaged though the row is sound: those of any
	// length, which are put together from pieces, and those that name a label.
	Columns string
}

func (r relation) String() string { return cluster.TableRows{Schema: r.Schema, Table: r.Name}.String() }

func (r relation) quoted() string { return pgx.Identifier{r.Schema, r.Name}.Sanitize() }

// database checks all there is in one.
func (in *inspection) database(ctx context.Context, db string) {
	begun := time.Now()
	conn, err := in.Sandbox.Connect(ctx, db)
	if err != nil {
		in.looked(CheckRead, "database "+db, time.Since(begun), err)
		return
	}
	defer conn.Close(context.WithoutCancel(ctx))
	in.collations(ctx, conn, db)
	amcheck, err := in.amcheck(ctx, conn)
	if err != nil {
		for _, check := range []string{CheckHeap, CheckBTree} {
			in.looked(check, "amcheck in database "+db, time.Since(begun), err)
		}
	}
	all, err := relations(ctx, conn, in.major)
	if err != nil {
		in.looked(CheckRead, "catalog of database "+db, time.Since(begun), err)
		return
	}
	in.mu.Lock()
	for _, r := range all {
		if r.Index {
			in.report.Indexes++
		} else if !r.Toast {
			in.report.Tables++
		}
	}
	in.mu.Unlock()

	work := make(chan part)
	var group errgroup.Group
	for range max(1, cmp.Or(in.Jobs, 2)) {
		group.Go(func() error {
			w := worker{inspection: in, db: db, amcheck: amcheck}
			defer w.close(ctx)
			for p := range work {
				w.check(ctx, p)
			}
			return nil
		})
	}
	for _, p := range in.parts(db, all, amcheck != "") {
		if ctx.Err() != nil {
			break
		}
		work <- p
	}
	close(work)
	group.Wait()
}

// amcheck returns the schema with the functions of the extension, which it
// installs if need be.
func (in *inspection) amcheck(ctx context.Context, conn *pgx.Conn) (schema string, err error) {
	const where = "SELECT n.nspname::text FROM pg_extension e JOIN pg_namespace n ON n.oid = e.extnamespace WHERE e.extname = 'amcheck'"
	err = conn.QueryRow(ctx, where).Scan(&schema)
	if errors.Is(err, pgx.ErrNoRows) {
		schema = "pgkeep_amcheck"
		_, err = conn.Exec(ctx, "CREATE SCHEMA pgkeep_amcheck; CREATE EXTENSION amcheck SCHEMA pgkeep_amcheck", pgx.QueryExecModeSimpleProtocol)
	} else if err == nil {
		_, err = conn.Exec(ctx, "ALTER EXTENSION amcheck UPDATE")
	}
	if err != nil {
		return "", err
	}
	return schema, nil
}

// relations lists tables with rows of their own and B-tree indexes, the largest
// first. Temporary ones are of sessions that have gone; a materialized view that was
// never filled refuses to be read.
func relations(ctx context.Context, conn *pgx.Conn, major int) ([]relation, error) {
	ofDatabase := "false"
	if major >= 15 {
		ofDatabase = "(l.oid = 'pg_catalog.default'::regcollation AND (SELECT datcollversion IS DISTINCT FROM pg_database_collation_actual_version(oid) AND datcollversion IS NOT NULL FROM pg_database WHERE datname = current_database()))"
	}
	rows, err := conn.Query(ctx, `
		SELECT c.oid, n.nspname::text, c.relname::text, c.relkind = 'i', c.relkind = 't', a.amname = 'heap', c.relpages::bigint,
		       c.relkind = 'i' AND EXISTS (SELECT FROM pg_index i CROSS JOIN LATERAL unnest(i.indcollation) u(oid) JOIN pg_collation l ON l.oid = u.oid
		         WHERE i.indexrelid = c.oid AND (l.collversion IS NOT NULL AND l.collversion IS DISTINCT FROM pg_collation_actual_version(l.oid) OR `+ofDatabase+`)),
		       coalesce((SELECT string_agg(quote_ident(t.attname), ', ' ORDER BY t.attnum)
		                   FROM pg_attribute t JOIN pg_type y ON y.oid = t.atttypid
		                  WHERE t.attrelid = c.oid AND t.attnum > 0 AND NOT t.attisdropped AND t.attgenerated <> 'v'
		                    AND c.relkind IN ('r', 'm') AND (t.attlen < 0 OR y.typtype = 'e')), '')
		  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace JOIN pg_am a ON a.oid = c.relam
		 WHERE c.relpersistence <> 't' AND c.relispopulated AND n.nspname <> 'pgkeep_amcheck'
		   AND (c.relkind IN ('r', 'm', 't')
		     OR c.relkind = 'i' AND a.amname = 'btree' AND (SELECT indisvalid AND indisready FROM pg_index WHERE indexrelid = c.oid))
		 ORDER BY c.relpages DESC, c.oid`)
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, pgx.RowToStructByPos[relation])
}

// A worker checks one relation after another in a session of its own.
type worker struct {
	*inspection
	db      string
	amcheck string // schema; "": there is none
	conn    *pgx.Conn
}

func (w *worker) close(ctx context.Context) {
	if w.conn != nil {
		w.conn.Close(context.WithoutCancel(ctx))
	}
}

// A part is a check of a relation, or of some of its pages.
type part struct {
	relation
	check string
	from  int64 // page
	to    int64 // the page behind the last; 0: to the end
	whole *whole
}

// A whole is what the parts of one check of one relation find.
type whole struct {
	mu   sync.Mutex
	left int // parts
	took time.Duration
	rows int64
	told bool // that something is wrong: what is left is not looked at
}

// partPages is how much of a large table is read by one session at once, in pages:
// the largest table is not to keep one session busy when all others are done.
const partPages = 16 << 10

// parts are all there is to do in a database, what takes longest first.
func (in *inspection) parts(db string, all []relation, amcheck bool) (parts []part) {
	for _, r := range all {
		whole := &whole{left: 1}
		switch {
		case r.Index && amcheck && in.wants(CheckBTree):
			parts = append(parts, part{relation: r, check: CheckBTree, whole: whole})
		case !r.Index && !r.Toast && (in.wants(CheckRead) || in.Rows[db] != nil):
			next := part{relation: r, check: CheckRead, whole: whole}
			for r.Heap && in.major >= 14 && next.from+2*partPages <= r.Pages { // 13 would read all for each
				next.to = next.from + partPages
				parts = append(parts, next)
				next.from, next.to = next.to, 0
				whole.left++
			}
			parts = append(parts, next)
		}
	}
	for _, r := range all {
		if !r.Index && amcheck && in.major >= 14 && in.wants(CheckHeap) {
			parts = append(parts, part{relation: r, check: CheckHeap, whole: &whole{left: 1}})
		}
	}
	return parts
}

func (w *worker) check(ctx context.Context, p part) {
	w.tell("checking tables and indexes")
	whole := p.whole
	whole.mu.Lock()
	told := whole.told
	whole.mu.Unlock()
	if told {
		return
	}
	begun := time.Now()
	var rows int64
	errs := make([]error, 1)
	if w.conn == nil || w.conn.IsClosed() { // a damaged page may have killed the session, and all others
		w.conn, errs[0] = w.reconnect(ctx)
	}
	if errs[0] == nil {
		switch p.check {
		case CheckBTree:
			errs[0] = w.btree(ctx, p.relation)
		case CheckHeap:
			errs = w.heap(ctx, p.relation)
		case CheckRead:
			rows, errs[0] = w.read(ctx, p)
		}
	}
	whole.mu.Lock()
	defer whole.mu.Unlock()
	whole.left--
	whole.took += time.Since(begun)
	whole.rows += rows
	wrong := errors.Join(errs...) != nil
	if whole.told || !wrong && whole.left > 0 {
		return
	}
	whole.told = wrong // at once: the test may be ended before the other parts are read
	w.looked(p.check, w.named(p.relation), whole.took, errs...)
	if p.check == CheckRead && !wrong {
		w.counted(p.relation, whole.rows)
	}
}

func (w *worker) named(r relation) string { return w.db + ": " + r.String() }

// reconnect waits out a server that starts again after a crash.
func (w *worker) reconnect(ctx context.Context) (conn *pgx.Conn, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if conn, err = w.Sandbox.Connect(ctx, w.db); err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (w *worker) function(name string) string { return pgx.Identifier{w.amcheck, name}.Sanitize() }

// btree checks an index in itself, and that every row of the table is in it, if it
// is its turn.
func (w *worker) btree(ctx context.Context, r relation) error {
	compare := w.Thorough || inTurn(r, w.db, w.Day)
	_, err := w.conn.Exec(ctx, "SELECT "+w.function("bt_index_check")+"($1::oid::regclass, $2)", r.OID, compare)
	if err != nil && r.Otherwise {
		return otherwise{err}
	}
	if compare {
		w.mu.Lock()
		defer w.mu.Unlock()
		w.report.Compared++
	}
	return err
}

const (
	smallIndex = 2 << 10 // pages: compared each time
	turns      = 7       // among which the others are divided
)

// inTurn reports whether an index is compared with its table on a day. That takes
// ten times as long as the index alone, and may take longer than all the rest of a
// restore test. A large one has its turn on one day in seven.
func inTurn(r relation, db string, day time.Time) bool {
	h := fnv.New32a()
	fmt.Fprint(h, db, "/", r) // never fails
	// Whatever the days between tests, all have their turn within 17 of them.
	n := day.Unix() / (24 * 60 * 60) * 18 % 59 * turns / 59
	return r.Pages <= smallIndex || int64(h.Sum32()%turns) == n
}

// heap checks a table page by page, row by row.
func (w *worker) heap(ctx context.Context, r relation) []error {
	rows, err := w.conn.Query(ctx, "SELECT blkno, offnum, msg FROM "+w.function("verify_heapam")+"($1::oid::regclass, check_toast => true) LIMIT 1000", r.OID)
	if err != nil {
		return []error{err}
	}
	var found []error
	var block, offset *int64
	var message string
	_, err = pgx.ForEachRow(rows, []any{&block, &offset, &message}, func() error {
		if len(found) < maxFindings {
			found = append(found, fmt.Errorf("block %s, line %s: %s", show(block), show(offset), message))
		}
		return nil
	})
	if err != nil {
		found = append(found, err)
	}
	return found
}

func show(n *int64) string {
	if n == nil {
		return "?"
	}
	return fmt.Sprint(*n)
}

// read has the server put together rows, with their long values, and counts them.
// It throws them away itself: nobody has to carry them. As text it would take
// twice as long; but some types have no other form.
func (w *worker) read(ctx context.Context, p part) (int64, error) {
	where := ""
	if p.from > 0 || p.to > 0 {
		where = fmt.Sprintf(" WHERE ctid >= '(%d,0)'", p.from)
	}
	if p.to > 0 {
		where += fmt.Sprintf(" AND ctid < '(%d,0)'", p.to)
	}
	rows := "COPY (SELECT " + p.Columns + " FROM ONLY " + p.quoted() + where + ") TO '/dev/null'"
	tag, err := w.conn.Exec(ctx, rows+" (FORMAT binary)")
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok && pgErr.Code == "42883" { // undefined_function
		tag, err = w.conn.Exec(ctx, rows)
	}
	return tag.RowsAffected(), err
}

func (w *worker) counted(r relation, rows int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report.Rows += rows
	if w.counts == nil {
		w.counts = make(map[string]map[string]int64)
	}
	if w.counts[w.db] == nil {
		w.counts[w.db] = make(map[string]int64)
	}
	w.counts[w.db][r.String()] = rows
}

// compareRows compares what was read with what was counted at the source.
func (in *inspection) compareRows() {
	if in.Rows == nil {
		if in.checks[CheckRows] != nil && in.wants(CheckRows) {
			in.skip(CheckRows, in.Unknown)
		}
		return
	}
	for db, tables := range in.Rows {
		for table, want := range tables {
			in.update(CheckRows, func(c *Check) {
				c.Items++
				switch got, ok := in.counts[db][table]; {
				case !ok:
					c.find("%s: %s was not read, and should have %d rows", db, table, want)
				case got != want:
					c.find("%s: %s has %d rows, and should have %d", db, table, got, want)
				}
			})
		}
	}
	slices.Sort(in.checks[CheckRows].Findings) // maps have no order
}

// collations compares the versions that indexes and databases were made with
// and those that the libraries of this host have.
func (in *inspection) collations(ctx context.Context, conn *pgx.Conn, db string) {
	if !in.wants(CheckCollations) {
		return
	}
	begun := time.Now()
	query := `
		SELECT DISTINCT format('collation %s of indexes', c.oid::regcollation), c.collversion, coalesce(pg_collation_actual_version(c.oid), 'none')
		  FROM pg_index i CROSS JOIN LATERAL unnest(i.indcollation) u(oid) JOIN pg_collation c ON c.oid = u.oid
		 WHERE c.collversion IS DISTINCT FROM pg_collation_actual_version(c.oid) AND c.collversion IS NOT NULL`
	if in.major >= 15 {
		query += `
		UNION ALL
		SELECT format('the collation of the database, %s', datcollate), datcollversion, coalesce(pg_database_collation_actual_version(oid), 'none')
		  FROM pg_database WHERE datname = current_database() AND datcollversion IS NOT NULL
		   AND datcollversion IS DISTINCT FROM pg_database_collation_actual_version(oid)`
	}
	rows, err := conn.Query(ctx, query)
	if err != nil {
		in.looked(CheckCollations, "database "+db, time.Since(begun), err)
		return
	}
	var errs []error
	var what, had, has string
	_, err = pgx.ForEachRow(rows, []any{&what, &had, &has}, func() error {
		errs = append(errs, otherwise{fmt.Errorf("%s: version %s at the source, %s here", what, had, has)})
		return nil
	})
	in.looked(CheckCollations, "database "+db, time.Since(begun), append(errs, err)...)
}
