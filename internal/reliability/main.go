// Command reliability damages an archive in eight ways and recovers from it to
// the end, without a target, with pgkeep and with pgBackRest: on a real
// PostgreSQL and a real S3 server over TLS. It prints for each whether
// PostgreSQL opens, with how many of the rows that were acknowledged and
// archived, and what the log says.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/compare"
	"github.com/pgkeep/pgkeep/internal/lab"
)

func main() {
	file := flag.String("write", "", "a file of which all below the mark is replaced by what is printed")
	only := flag.String("only", "", "one of pgkeep, pgbackrest-aes, pgbackrest-plain, and nothing is written; empty: all")
	flag.Parse()
	compare.Main("reliability", func(ctx context.Context) error {
		var printed bytes.Buffer
		err := run(ctx, io.MultiWriter(os.Stdout, &printed), *only)
		if *file != "" && *only == "" && err == nil {
			err = write(*file, printed.String())
		}
		return err
	})
}

const mark = "<!-- What follows is written by: make reliability -->\n"

func write(file, text string) error {
	b, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	head, _, ok := strings.Cut(string(b), mark)
	if !ok {
		return fmt.Errorf("%s: has no line %q", file, strings.TrimSpace(mark))
	}
	return os.WriteFile(file, []byte(head+mark+"\n"+text), 0o644)
}

const (
	rows     = 20
	timeout  = 5 * time.Second // of both programs
	patience = 5 * time.Minute // with a server that recovers
)

// A side is one of the programs, with a server that has archived its rows.
type side struct {
	*compare.Site
	compare.Archiver
	name     string // of its files
	title    string
	gate     *gate
	other    string // an object with another cluster's segment of the same name
	segments []string

	// restore makes a data directory that will recover; settings are the
	// server's.
	restore  func(ctx context.Context, pgdata string) error
	settings map[string]string
}

// middle is the segment that is damaged: it holds one of the rows.
func (s *side) middle() string { return s.segments[rows/2] }

func run(ctx context.Context, w io.Writer, only string) (err error) {
	site, err := compare.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, site.Close()) }()
	dir, err := site.Mkdir("gate")
	if err != nil {
		return err
	}
	g, err := openGate(dir, site.S3)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, g.close()) }()
	opt := compare.Options{Endpoint: g.endpoint, CAFile: g.caFile, Encrypted: true, Timeout: timeout}
	if err := compare.Versions(ctx, w); err != nil {
		return err
	}
	var lost error
	plain := opt
	plain.Encrypted = false
	for _, p := range []struct {
		name, title string
		prepare     func(context.Context, *side, compare.Options) error
		opt         compare.Options
	}{
		{"pgkeep", "pgkeep, encrypted", pgkeep, opt},
		{"pgbackrest-aes", "pgBackRest, repo1-cipher-type=aes-256-cbc", pgBackRest, opt},
		{"pgbackrest-plain", "pgBackRest, repo1-cipher-type=none", pgBackRest, plain},
	} {
		if only != "" && only != p.name {
			continue
		}
		s := &side{Site: site, gate: g, name: p.name, title: p.title}
		if err := p.prepare(ctx, s, p.opt); err != nil {
			return err
		}
		if err := s.table(ctx, w); err != nil {
			lost = errors.Join(lost, err)
		}
	}
	return lost
}

// pgkeep archives with pgkeep-wal, beside a base backup of PostgreSQL's own.
func pgkeep(ctx context.Context, s *side, opt compare.Options) error {
	pg, err := s.server(ctx, s.name+"-server")
	if err != nil {
		return err
	}
	defer pg.Stop()
	if s.Archiver, err = s.PgKeep(ctx, s.name, opt); err != nil {
		return err
	}
	s.settings = map[string]string{"restore_command": s.Restore}
	base := filepath.Join(s.Dir, s.name+"-base")
	s.restore = func(ctx context.Context, pgdata string) error {
		return s.Run(ctx, s.Dir, "cp -a "+base+" "+pgdata+" && touch "+pgdata+"/recovery.signal")
	}
	err = s.fill(ctx, pg, func() error {
		out, err := pg.Command(ctx, "pg_basebackup", "-d", pg.Conninfo(), "-D", base, "-X", "none", "-c", "fast", "--no-sync").CombinedOutput()
		if err != nil {
			return fmt.Errorf("pg_basebackup: %w\n%s", err, out)
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.another(ctx, func(string) (compare.Archiver, error) { return s.Archiver, nil })
}

// pgBackRest archives, backs up and restores with pgBackRest.
func pgBackRest(ctx context.Context, s *side, opt compare.Options) error {
	pg, err := s.server(ctx, s.name+"-server")
	if err != nil {
		return err
	}
	defer pg.Stop()
	if s.Archiver, err = s.PgBackRest(ctx, s.name, pg.DataDir, opt); err != nil {
		return err
	}
	s.restore = func(ctx context.Context, pgdata string) error { // it writes restore_command itself
		return s.Run(ctx, s.Dir, "mkdir -m 700 "+pgdata+" && "+s.Line+" --pg1-path="+pgdata+" restore")
	}
	if err := s.fill(ctx, pg, func() error { return s.Run(ctx, pg.DataDir, s.Line+" --type=full backup") }); err != nil {
		return err
	}
	return s.another(ctx, func(pgdata string) (compare.Archiver, error) {
		return s.PgBackRest(ctx, s.name+"-other", pgdata, compare.Options{Encrypted: opt.Encrypted})
	})
}

// server starts a PostgreSQL with segments of 1 MiB.
func (s *side) server(ctx context.Context, name string) (*lab.Postgres, error) {
	dir, err := s.Mkdir(name)
	if err != nil {
		return nil, err
	}
	return lab.StartPostgres(ctx, lab.PostgresOptions{Dir: dir, WALSegmentMB: 1, Settings: map[string]string{"wal_keep_size": "500MB"}})
}

// fill takes a backup and then inserts rows, each in a segment of its own, and
// waits until the last of them is archived.
func (s *side) fill(ctx context.Context, pg *lab.Postgres, backup func() error) error {
	if err := pg.Restart(ctx, map[string]string{"archive_mode": "on", "archive_command": s.Archive}); err != nil {
		return err
	}
	if err := pg.Exec(ctx, "postgres", "CREATE TABLE t (id int, noise text)"); err != nil {
		return err
	}
	if err := backup(); err != nil {
		return err
	}
	for range rows {
		name, err := insert(ctx, pg)
		if err != nil {
			return err
		}
		s.segments = append(s.segments, name)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		archived, err := ask(ctx, pg, "SELECT coalesce(max(last_archived_wal), '') FROM pg_stat_archiver")
		if err != nil {
			return fmt.Errorf("%s is not archived: %w", s.segments[rows-1], err)
		}
		if archived >= s.segments[rows-1] {
			return nil
		}
	}
}

func insert(ctx context.Context, pg *lab.Postgres) (segment string, err error) {
	if err := pg.Exec(ctx, "postgres", "INSERT INTO t SELECT count(*), (SELECT string_agg(md5(random()::text), '') FROM generate_series(1, 1000)) FROM t"); err != nil {
		return "", err
	}
	return ask(ctx, pg, "SELECT pg_walfile_name(pg_switch_wal())")
}

func ask(ctx context.Context, pg *lab.Postgres, sql string) (text string, err error) {
	conn, err := pg.Connect(ctx, "postgres")
	if err != nil {
		return "", err
	}
	defer conn.Close(ctx)
	return text, conn.QueryRow(ctx, sql).Scan(&text)
}

// another archives another cluster's segment with the name of the middle one.
func (s *side) another(ctx context.Context, archiver func(pgdata string) (compare.Archiver, error)) error {
	pg, err := s.server(ctx, s.name+"-other-server")
	if err != nil {
		return err
	}
	defer pg.Stop()
	if err := pg.Exec(ctx, "postgres", "CREATE TABLE t (id int, noise text)"); err != nil {
		return err
	}
	for name := ""; name <= s.middle(); {
		if name, err = insert(ctx, pg); err != nil {
			return err
		}
	}
	a, err := archiver(pg.DataDir)
	if err != nil {
		return err
	}
	own, err := s.Objects(s.middle())
	if err != nil {
		return err
	}
	if err := s.Run(ctx, pg.DataDir, strings.ReplaceAll(a.Archive, "%p", "pg_wal/"+s.middle())); err != nil {
		return err
	}
	all, err := a.Objects(s.middle())
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(path string) bool { return slices.Contains(own, path) })
	if len(own) != 1 || len(all) != 1 {
		return fmt.Errorf("objects of %s: %q, another cluster's: %q", s.middle(), own, all)
	}
	s.other = all[0]
	// It must not be in the way: only its content is wanted.
	aside := filepath.Join(s.Dir, s.name+"-other-object")
	return errors.Join(os.Rename(s.other, aside), func() error { s.other = aside; return nil }())
}

// A damage is one row of the table. Either the object is changed, or what the
// server says of it.
type damage struct {
	name   string
	change func(s *side, object []byte) ([]byte, error) // to nil: it is removed
	fault  handler
}

var damages = []damage{
	{name: "nothing"},
	{name: "segment missing", change: func(*side, []byte) ([]byte, error) { return nil, nil }},
	{name: "one flipped bit", change: func(_ *side, b []byte) ([]byte, error) {
		b[len(b)*3/4] ^= 1
		return b, nil
	}},
	{name: "unreadable: S3 says 500 for it", fault: broken},
	{name: "truncated", change: func(_ *side, b []byte) ([]byte, error) { return b[:len(b)/2], nil }},
	{name: "another cluster's", change: func(s *side, _ []byte) ([]byte, error) { return os.ReadFile(s.other) }},
	{name: "S3 down from there on", fault: down},
	{name: "S3 says 403 from there on", fault: denied},
	{name: "S3 slower than the timeout from there on", fault: slow(4 * timeout)},
}

// table recovers once for each damage. It fails if a server opened with fewer
// rows.
func (s *side) table(ctx context.Context, w io.Writer) error {
	fmt.Fprintf(w, "\n%s:\n\n| damage | PostgreSQL opens | rows of %d | the program says | PostgreSQL says | started again without the damage |\n| --- | --- | ---: | --- | --- | --- |\n", s.title, rows)
	var lost []string
	for i, d := range damages {
		r, err := s.suffer(ctx, fmt.Sprintf("%s-%d", s.name, i), d)
		if err != nil {
			return fmt.Errorf("%s: %s: %w", s.title, d.name, err)
		}
		fmt.Fprintf(w, "| %s | %s | %s | %s | %s | %s |\n", d.name, r.opens, r.rows, r.program, r.server, r.again)
		if r.opens == yes && r.rows != fmt.Sprint(rows) {
			lost = append(lost, d.name)
		}
		if i == 0 && r.rows != fmt.Sprint(rows) {
			return fmt.Errorf("%s: without any damage it does not recover", s.title)
		}
	}
	if s.Name == "pgkeep" && len(lost) > 0 { // what the other one does is told, not judged
		return fmt.Errorf("PostgreSQL opened with fewer rows: %s", strings.Join(lost, ", "))
	}
	return nil
}

const (
	yes = "yes"
	no  = "no"
)

// A result is the rest of a row of the table.
type result struct{ opens, rows, program, server, again string }

// suffer recovers from a damaged archive, repairs it, and recovers again.
func (s *side) suffer(ctx context.Context, name string, d damage) (r result, err error) {
	dir, err := s.Mkdir(name)
	if err != nil {
		return r, err
	}
	defer os.RemoveAll(dir)
	if err := s.restore(ctx, filepath.Join(dir, "data")); err != nil {
		return r, err
	}
	repair, err := s.damage(d)
	if err != nil {
		return r, err
	}
	s.gate.set(s.middle(), d.fault)
	r.opens, r.rows, err = s.start(ctx, dir)
	asked := s.gate.asked()
	s.gate.set("", nil)
	if err := errors.Join(err, repair()); err != nil {
		return r, err
	}
	if !asked {
		return r, fmt.Errorf("nobody asked for %s", s.middle())
	}
	log, err := os.ReadFile(filepath.Join(dir, "log"))
	if err != nil {
		return r, err
	}
	r.program, r.server = s.decisive(string(log))
	r.again = "-"
	if r.opens != yes {
		opens, rows, err := s.start(ctx, dir)
		if err != nil {
			return r, err
		}
		r.again = "does not open"
		if opens == yes {
			r.again = "opens, " + rows + " rows"
		}
	}
	return r, nil
}

// start runs a server that recovers, and counts.
func (s *side) start(ctx context.Context, dir string) (opens, count string, err error) {
	settings := map[string]string{"hot_standby": "off", "archive_mode": "off"}
	for k, v := range s.settings {
		settings[k] = v
	}
	pg, err := lab.StartPostgres(ctx, lab.PostgresOptions{Dir: dir, Settings: settings, Patience: patience})
	if err != nil {
		if ctx.Err() != nil {
			return "", "", err
		}
		if errors.Is(err, context.DeadlineExceeded) {
			return fmt.Sprintf("not within %v", patience), "-", nil
		}
		return no, "-", nil
	}
	defer pg.Stop()
	count, err = ask(ctx, pg, "SELECT count(*)::text FROM t")
	return yes, count, err
}

// damage changes the object of the middle segment.
func (s *side) damage(d damage) (repair func() error, err error) {
	if d.change == nil {
		return func() error { return nil }, nil
	}
	found, err := s.Objects(s.middle())
	if err != nil {
		return nil, err
	}
	if len(found) != 1 {
		return nil, fmt.Errorf("objects of %s: %q", s.middle(), found)
	}
	sound, err := os.ReadFile(found[0])
	if err != nil {
		return nil, err
	}
	content, err := d.change(s, slices.Clone(sound))
	if err != nil {
		return nil, err
	}
	if content == nil {
		aside := filepath.Join(s.Dir, "aside")
		return func() error { return os.Rename(aside, found[0]) }, os.Rename(found[0], aside)
	}
	// In place: the server keeps beside the file what else it knows of it.
	return func() error { return os.WriteFile(found[0], sound, 0o600) }, os.WriteFile(found[0], content, 0o600)
}

var (
	prefix = regexp.MustCompile(`^\d{4}-\d\d-\d\d [0-9:.]+ (UTC \[\d+\] |P\d\d +)`)
	// What ends a recovery, beside a file that is not there, is told as LOG.
	ends = regexp.MustCompile(`^(LOG: +(archive recovery complete|WAL file is from|.*checksum|.*pageaddr|invalid (record|magic|info|resource)|record with)|FATAL: +could not)`)
)

// decisive finds in the server's log what the program said first, and what
// PostgreSQL made of it.
func (s *side) decisive(log string) (program, server string) {
	for line := range strings.Lines(log) {
		line = prefix.ReplaceAllString(strings.TrimSpace(line), "")
		switch {
		case program == "" && (strings.HasPrefix(line, "pgkeep-wal: ") || strings.HasPrefix(line, "ERROR: [") || strings.HasPrefix(line, "WARN: ")):
			program, _, _ = strings.Cut(line, " (hint: ")
		case ends.MatchString(line) && !strings.Contains(server, line):
			server += line + " "
		}
	}
	tidy := func(text string) string {
		text = strings.Join(strings.Fields(strings.NewReplacer(s.Dir, "…", "|", `\|`, "<", `\<`).Replace(text)), " ")
		if len(text) > longest {
			text = strings.ToValidUTF8(text[:longest], "") + " …"
		}
		return cmp.Or(text, "nothing")
	}
	return tidy(program), tidy(server)
}

const longest = 300
