package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// RestoreOptions say what to restore and into what.
type RestoreOptions struct {
	Tools    Tools
	Dir      string // of Dump
	Database string // exists already: see CreateDatabase
	Jobs     int    // tables and indexes made at a time; 0: one

	NoOwner       bool // everything belongs to the role that restores
	NoPrivileges  bool // nobody is granted anything
	NoTablespaces bool // everything goes to the database's own tablespace

	Lock       *os.File
	Log        *slog.Logger
	StallAfter time.Duration     // 0: 10 minutes
	Progress   func(bytes int64) // so many bytes of the dump are read; fewer are possible, when a worker ends
}

// Restore fills a database from a dump, and stops at the first error. It never
// goes through psql, which obeys commands in what it reads. It ends as Dump
// does, with fail.RestoreFailed where that says fail.DumpFailed; the database
// then holds a part.
func (c Cluster) Restore(ctx context.Context, opt RestoreOptions) error {
	args := []string{"--format=directory", "--exit-on-error", "--no-password", "--jobs=" + strconv.Itoa(max(1, opt.Jobs))}
	for flag, set := range map[string]bool{
		"--no-owner": opt.NoOwner, "--no-privileges": opt.NoPrivileges, "--no-tablespaces": opt.NoTablespaces,
	} {
		if set {
			args = append(args, flag)
		}
	}
	tag := newTag()
	ch, err := c.tool(opt.Tools, "pg_restore", opt.Database, tag, args)
	if err != nil {
		return err
	}
	ch.args = append(ch.args, "--", opt.Dir)
	ch.lock, ch.log = opt.Lock, opt.Log
	said, err := ch.run(ctx, watch{bytes: bytesRead, busy: c.busy(tag), progress: opt.Progress, after: opt.StallAfter})
	return explain(fmt.Sprintf("restore into database %q", opt.Database), said, err, fail.RestoreFailed)
}

// A TOC is what the table of contents of a dump tells.
type TOC struct {
	Entries int        // all there are
	Tables  int        // that have rows in the dump, or could have
	Server  pg.Version // of the dumped server; 0 if it does not say

	lines []string // of pg_restore --list, without comments
}

// ListTOC reads the table of contents of a dump; dir need hold no more than the
// file toc.dat. One that pg_restore cannot read is fail.Corrupt.
func ListTOC(ctx context.Context, t Tools, dir string) (TOC, error) {
	text, err := t.script(ctx, "--list", "--", dir)
	if err != nil {
		return TOC{}, fmt.Errorf("list %s: %w", dir, err)
	}
	toc := TOC{Entries: -1}
	for line := range strings.Lines(text) {
		line = strings.TrimSuffix(line, "\n")
		comment, isComment := strings.CutPrefix(line, ";")
		comment = strings.TrimSpace(comment)
		if n, ok := strings.CutPrefix(comment, "TOC Entries: "); isComment && ok && toc.Entries < 0 {
			if toc.Entries, err = strconv.Atoi(n); err != nil {
				return TOC{}, fmt.Errorf("list %s: %q: %w", dir, line, fail.Corrupt)
			}
		}
		if v, ok := strings.CutPrefix(comment, "Dumped from database version: "); isComment && ok && toc.Server == 0 {
			v, _, _ = strings.Cut(v, " ")
			toc.Server, _ = parseVersion(v)
		}
		if isComment || line == "" {
			continue
		}
		toc.lines = append(toc.lines, line)
		if strings.HasPrefix(entry(line), "TABLE DATA ") {
			toc.Tables++
		}
	}
	if toc.Entries < 0 {
		return TOC{}, fmt.Errorf("list %s: no number of entries: %w", dir, fail.Corrupt)
	}
	return toc, nil
}

// entry cuts the three numbers from a line of the list, "215; 1259 16388 TABLE
// public t owner".
func entry(line string) string {
	fields := strings.SplitN(line, " ", 4)
	return fields[len(fields)-1]
}

// script runs pg_restore without a database and returns what it prints.
func (t Tools) script(ctx context.Context, args ...string) (string, error) {
	var out bytes.Buffer
	ch := child{path: t.path("pg_restore"), args: args, env: []string{"LC_ALL=C", "LANG=C", "PATH=" + os.Getenv("PATH")}, stdout: &out}
	said, err := ch.run(ctx, watch{})
	if _, exited := errors.AsType[*exec.ExitError](err); exited {
		return "", fmt.Errorf("%s (%w): %w", said.summary(), err, fail.Corrupt)
	}
	return out.String(), err
}

// MissingRoles lists the roles that a dump names and the cluster lacks: owners,
// unless NoOwner; those granted something, unless NoPrivileges; and those in
// row-level security policies and user mappings. Restore would stop at the
// first of them.
func (c Cluster) MissingRoles(ctx context.Context, toc TOC, opt RestoreOptions) ([]string, error) {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return nil, err
	}
	defer hangUp(conn)
	rows, err := conn.Query(ctx, "SELECT rolname::text FROM pg_roles")
	if err != nil {
		return nil, queryError("list roles", err)
	}
	have, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, queryError("list roles", err)
	}
	var missing []string
	if !opt.NoOwner {
		missing = missingOwners(toc.lines, have)
	}
	named, err := namedRoles(ctx, toc, opt)
	if err != nil {
		return nil, fmt.Errorf("read the roles that %s names: %w", opt.Dir, err)
	}
	for _, role := range named {
		if !slices.Contains(have, role) {
			missing = append(missing, role)
		}
	}
	slices.Sort(missing)
	return slices.Compact(missing), nil
}

// missingOwners reads the owners at the ends of the list's lines. A name may
// hold blanks, so an owner is known if the line ends with a role we have; the
// last word stands for one we have not.
func missingOwners(lines, have []string) []string {
	var missing []string
	for _, line := range lines {
		if strings.HasSuffix(line, " ") { // it belongs to nobody
			continue
		}
		known := func(role string) bool { return strings.HasSuffix(line, " "+listed(role)) }
		if !slices.ContainsFunc(have, known) {
			missing = append(missing, line[strings.LastIndexByte(line, ' ')+1:])
		}
	}
	return missing
}

// listed is a name as pg_restore --list prints it (sanitize_line in PostgreSQL's
// pg_backup_archiver.c).
func listed(name string) string {
	return strings.NewReplacer("\n", " ", "\r", " ").Replace(name)
}

// namedRoles reads them from the statements themselves; the table of contents
// has no other form of them.
func namedRoles(ctx context.Context, toc TOC, opt RestoreOptions) ([]string, error) {
	kinds := []string{"POLICY ", "USER MAPPING "}
	if !opt.NoPrivileges {
		kinds = append(kinds, "ACL ", "DEFAULT ACL ")
	}
	var list strings.Builder
	for _, line := range toc.lines {
		if slices.ContainsFunc(kinds, func(k string) bool { return strings.HasPrefix(entry(line), k) }) {
			list.WriteString(line + "\n")
		}
	}
	if list.Len() == 0 {
		return nil, nil
	}
	f, err := os.CreateTemp("", "pgkeep-list-")
	if err != nil {
		return nil, err
	}
	defer os.Remove(f.Name())
	_, err = f.WriteString(list.String())
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, err
	}
	text, err := opt.Tools.script(ctx, "--use-list="+f.Name(), "--file=-", "--", opt.Dir)
	if err != nil {
		return nil, err
	}
	return rolesIn(text), nil
}

// CreateDatabase makes an empty database like another, which may be of another
// cluster: its encoding and collations, and its owner, if there is a role of
// that name. One that exists already is fail.NotEmpty.
func (c Cluster) CreateDatabase(ctx context.Context, name string, like Database) error {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return err
	}
	defer hangUp(conn)
	op := fmt.Sprintf("create database %q", name)
	options, err := localeOptions(like, server(conn))
	if err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	var owner bool
	err = conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", like.Owner).Scan(&owner)
	if err != nil {
		return queryError(op, err)
	}
	sql := "CREATE DATABASE " + pgx.Identifier{name}.Sanitize() + " TEMPLATE template0"
	if owner {
		sql += " OWNER " + pgx.Identifier{like.Owner}.Sanitize()
	}
	_, err = conn.Exec(ctx, sql+options, pgx.QueryExecModeSimpleProtocol)
	if pgErr, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch {
		case pgErr.Code == "42P04":
			return fmt.Errorf("%s: %w: %w", op, err, fail.NotEmpty)
		case strings.HasPrefix(pgErr.Code, "22"), pgErr.Code == "42809", pgErr.Code == "0A000":
			return fail.Hint(fmt.Errorf("%s: %w: %w", op, err, fail.BadConfig),
				"install the locale of the dumped database on this host, or create the database yourself and restore into it")
		}
	}
	return queryError(op, err)
}

// localeOptions writes encoding and collations as CREATE DATABASE of that
// server takes them. Each version added some; none took any away.
func localeOptions(d Database, v pg.Version) (string, error) {
	var b strings.Builder
	set := func(key, value string) {
		if value != "" {
			b.WriteString(" " + key + " '" + strings.ReplaceAll(value, "'", "''") + "'")
		}
	}
	set("ENCODING", d.Encoding)
	set("LC_COLLATE", d.Collate)
	set("LC_CTYPE", d.CType)
	need := 0
	switch d.Provider {
	case "", Libc:
	case ICU:
		need = 15
		b.WriteString(" LOCALE_PROVIDER icu")
		set("ICU_LOCALE", d.Locale)
	case Builtin:
		need = 17
		b.WriteString(" LOCALE_PROVIDER builtin")
		set("BUILTIN_LOCALE", d.Locale)
	default:
		return "", fmt.Errorf("locale provider %q is of a PostgreSQL unknown to this pgkeep: %w", d.Provider, fail.Unsupported)
	}
	if d.ICURules != "" {
		need = 16
		set("ICU_RULES", d.ICURules)
	}
	if v.Major() < need {
		return "", fmt.Errorf("collations of database %q need PostgreSQL %d, the server is %v: %w", d.Name, need, v, fail.PGVersion)
	}
	return b.String(), nil
}

// IsEmpty reports whether a database holds nothing of a user's: no relation,
// function, type or schema, and no large object. What extensions brought does
// not count, nor does the schema public.
func (c Cluster) IsEmpty(ctx context.Context, database string) (bool, error) {
	conn, err := c.Connect(ctx, database)
	if err != nil {
		return false, err
	}
	defer hangUp(conn)
	found := []string{"EXISTS (SELECT FROM pg_largeobject_metadata)"}
	for _, catalog := range userObjects {
		found = append(found, fmt.Sprintf(`EXISTS (SELECT FROM %[1]s o WHERE o.oid >= 16384 AND %[2]s AND NOT EXISTS (
			SELECT FROM pg_depend d WHERE d.classid = '%[1]s'::regclass AND d.objid = o.oid AND d.deptype = 'e'))`, catalog.name, catalog.where))
	}
	var full bool
	if err := conn.QueryRow(ctx, "SELECT "+strings.Join(found, " OR ")).Scan(&full); err != nil {
		return false, queryError(fmt.Sprintf("look into database %q", database), err)
	}
	return !full, nil
}

// userObjects are the catalogs to look into for what users make: objects with
// numbers from 16384 (FirstNormalObjectId in PostgreSQL's access/transam.h),
// but for temporary ones and for what comes along with others.
var userObjects = []struct{ name, where string }{
	{"pg_namespace", "o.nspname !~ '^pg_' AND o.nspname <> 'public'"},
	{"pg_class", "o.relkind IN ('r', 'p', 'v', 'm', 'S', 'f') AND o.relpersistence <> 't'"},
	{"pg_type", `(o.typtype IN ('b', 'd', 'e', 'r') AND o.typcategory <> 'A'
		OR o.typtype = 'c' AND EXISTS (SELECT FROM pg_class r WHERE r.oid = o.typrelid AND r.relkind = 'c'))`},
	{"pg_proc", "true"},
	{"pg_operator", "true"},
	{"pg_foreign_server", "true"},
	{"pg_event_trigger", "true"},
	{"pg_publication", "true"},
}
