package cluster

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// A BackupSession is a physical backup in progress: while it lasts, the server
// writes into its log what a copy of its files needs to become whole. It lives
// in one connection. When that ends, however it ends, the server forgets the
// backup, and what was copied is worth nothing.
//
// Its methods may be called from several goroutines at once.
type BackupSession struct {
	Start Started

	mu   sync.Mutex // of conn
	conn *pgx.Conn
}

// Started is what is known when the copying may begin.
type Started struct {
	System      pg.SystemID
	Version     pg.Version
	LSN         pg.LSN // recovery of the copy begins here
	Timeline    pg.Timeline
	Checkpoint  pg.LSN    // a checkpoint that wrote all from before LSN; it may be a later one
	Time        time.Time // of the server, in UTC
	SegmentSize pg.SegmentSize
	InRecovery  bool   // it is a standby
	PID         uint32 // of the server's process
	FirstWAL    string // the segment with LSN

	DataDirectory string
	Config        []string          // the files the configuration is read from, wherever they are
	Tablespaces   map[uint32]string // names, by OID
	LogDirectory  string            // of the server's own log: absolute, or below DataDirectory
}

// Stopped is what makes the copied files a backup. Label and TablespaceMap
// become the files backup_label and tablespace_map, byte for byte; an empty
// TablespaceMap becomes none.
type Stopped struct {
	LSN           pg.LSN // recovery of the copy is consistent from here on
	Timeline      pg.Timeline
	Time          time.Time // of the server, in UTC
	Label         string
	TablespaceMap string
	LastWAL       string // the last segment that the copy needs
}

// backupFunctions are the names of start and stop with the types of their
// arguments. PostgreSQL 15 renamed them and dropped the exclusive way.
func backupFunctions(v pg.Version) (start, stop string) {
	if v.Major() < 15 {
		return "pg_start_backup(text,boolean,boolean)", "pg_stop_backup(boolean,boolean)"
	}
	return "pg_backup_start(text,boolean)", "pg_backup_stop(boolean)"
}

// CheckBackupRights finds out whether the role may take a physical backup: start
// and stop one, and see where the files are. A missing right is fail.PGDenied,
// and its hint is the SQL that grants it.
func (c Cluster) CheckBackupRights(ctx context.Context) error {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return err
	}
	defer hangUp(conn)
	var role, database string
	var settings bool
	var functions []string
	start, stop := backupFunctions(server(conn))
	err = conn.QueryRow(ctx, `
		SELECT current_user::text, current_database()::text, pg_has_role('pg_read_all_settings', 'USAGE'),
		       ARRAY(SELECT f FROM unnest($1::text[]) f WHERE NOT has_function_privilege(f, 'EXECUTE'))`,
		[]string{start, stop}).Scan(&role, &database, &settings, &functions)
	if err != nil {
		return queryError("check rights", err)
	}
	name := pgx.Identifier{role}.Sanitize()
	var lacks, sql []string
	if len(functions) > 0 {
		lacks = append(lacks, "EXECUTE on "+strings.Join(functions, " and "))
		sql = append(sql, fmt.Sprintf("in database %q, GRANT EXECUTE ON FUNCTION %s TO %s;", database, strings.Join(functions, ", "), name))
	}
	if !settings {
		lacks = append(lacks, "pg_read_all_settings")
		sql = append(sql, "GRANT pg_read_all_settings TO "+name+";")
	}
	if len(lacks) == 0 {
		return nil
	}
	return denied(fmt.Sprintf("role %q lacks %s", role, strings.Join(lacks, " and ")), strings.Join(sql, " "))
}

// StartBackup begins a physical backup on PostgreSQL 13 or newer. The label is
// one line for people, and stands in backup_label. Fast means that the
// checkpoint which comes first is written at once, else it is spread, and takes
// minutes. It fails with fail.PGDenied, fail.BadConfig or fail.PGDown.
func (c Cluster) StartBackup(ctx context.Context, label string, fast bool) (*BackupSession, error) {
	conn, err := c.Connect(ctx, "")
	if err != nil {
		return nil, err
	}
	s := &BackupSession{conn: conn}
	if s.Start, err = startBackup(ctx, conn, label, fast); err != nil {
		s.Abort()
		return nil, err
	}
	return s, nil
}

// startBackup uses no prepared statement: a pooler may hand each transaction to
// another process, and the first one must be known before anything else can fail.
func startBackup(ctx context.Context, conn *pgx.Conn, label string, fast bool) (Started, error) {
	s := Started{Version: server(conn)}
	if s.Version.Major() < 13 {
		return Started{}, fmt.Errorf("start a backup: PostgreSQL %v is too old, 13 is the oldest: %w", s.Version, fail.BadConfig)
	}
	f, err := readFacts(ctx, conn)
	if err != nil {
		return Started{}, queryError("start a backup", err)
	}
	if f.WALLevel == "minimal" {
		return Started{}, fail.Hint(fmt.Errorf("start a backup: wal_level is minimal: %w", fail.BadConfig),
			"the log then lacks what a copy needs: set wal_level = replica and restart PostgreSQL")
	}
	if f.DataDirectory == "" {
		return Started{}, fail.Hint(fmt.Errorf("start a backup: the role may not see where the data directory is: %w", fail.PGDenied),
			hintAs+"GRANT pg_read_all_settings TO the role")
	}
	s.System, s.InRecovery, s.SegmentSize, s.DataDirectory = f.System, f.InRecovery, f.SegmentSize, f.DataDirectory
	if s.Config, s.LogDirectory, err = configFiles(ctx, conn); err != nil {
		return Started{}, queryError("start a backup: find the configuration files", err)
	}
	if s.Tablespaces, err = tablespaces(ctx, conn); err != nil {
		return Started{}, queryError("start a backup: list tablespaces", err)
	}

	call := "pg_backup_start($1, $2)"
	if s.Version.Major() < 15 {
		call = "pg_start_backup($1, $2, false)"
	}
	// The log of the backup begins with the checkpoint that the server makes for
	// it; on a standby, not before the last one that the primary has made.
	began := "statement_timestamp()"
	if s.InRecovery {
		began = "(SELECT checkpoint_time FROM pg_control_checkpoint())"
	}
	var lsn, checkpoint string
	err = conn.QueryRow(ctx, "SELECT "+began+", "+call+"::text, pg_backend_pid()", pgx.QueryExecModeExec, label, fast).
		Scan(&s.Time, &lsn, &s.PID)
	if err != nil {
		return Started{}, startError(queryError("start a backup", err), s.InRecovery)
	}
	if s.LSN, err = pg.ParseLSN(lsn); err != nil {
		return Started{}, fmt.Errorf("start a backup: %w", err)
	}
	var pid uint32
	err = conn.QueryRow(ctx, "SELECT checkpoint_lsn::text, timeline_id, pg_backend_pid() FROM pg_control_checkpoint()",
		pgx.QueryExecModeExec).Scan(&checkpoint, &s.Timeline, &pid)
	if err != nil {
		return Started{}, queryError("start a backup", err)
	}
	if pid != s.PID {
		return Started{}, pooled()
	}
	if s.Checkpoint, err = pg.ParseLSN(checkpoint); err != nil {
		return Started{}, fmt.Errorf("start a backup: %w", err)
	}
	s.Time = s.Time.UTC()
	s.FirstWAL, err = pg.SegmentName(s.Timeline, s.LSN, s.SegmentSize)
	return s, err
}

// tablespaces returns their names by OID.
func tablespaces(ctx context.Context, conn *pgx.Conn) (map[uint32]string, error) {
	rows, err := conn.Query(ctx, "SELECT oid, spcname::text FROM pg_tablespace", pgx.QueryExecModeExec)
	if err != nil {
		return nil, err
	}
	names := make(map[uint32]string)
	var oid uint32
	var name string
	_, err = pgx.ForEachRow(rows, []any{&oid, &name}, func() error {
		names[oid] = name
		return nil
	})
	return names, err
}

// startError adds what an operator can do, where the server's words do not say it.
func startError(err error, inRecovery bool) error {
	switch {
	case fail.KindOf(err) == fail.PGDenied:
		return fail.Hint(err, "pgkeep needs EXECUTE on the functions that start and stop a backup, granted in the database it connects to")
	case inRecovery && strings.Contains(err.Error(), "full_page_writes"):
		return fail.Hint(fail.With(fail.BadConfig, err), "set full_page_writes = on on the primary, and let it make a checkpoint")
	}
	return err
}

// pooled says that one connection leads to several processes of the server.
func pooled() error {
	return fail.Hint(fmt.Errorf("the connection leads to another process of the server than before: %w", fail.BadConfig),
		"a physical backup needs a connection of its own: connect to PostgreSQL itself, or let the pooler keep sessions (pool_mode = session)")
}

// configFiles returns the files the server reads its configuration from, in no
// special order, and its log_directory. Files that are included are left out
// where the role may not ask for them.
func configFiles(ctx context.Context, conn *pgx.Conn) (files []string, logs string, err error) {
	err = conn.QueryRow(ctx, `
		SELECT ARRAY(SELECT setting FROM pg_settings WHERE name IN ('config_file', 'hba_file', 'ident_file') AND setting <> '' ORDER BY name),
		       coalesce((SELECT setting FROM pg_settings WHERE name = 'log_directory'), '')`).Scan(&files, &logs)
	if err != nil {
		return nil, "", err
	}
	included := []string{"SELECT DISTINCT sourcefile FROM pg_file_settings WHERE sourcefile IS NOT NULL AND has_function_privilege('pg_show_all_file_settings()', 'EXECUTE')"}
	if server(conn).Major() >= 16 {
		included = append(included,
			"SELECT DISTINCT file_name FROM pg_hba_file_rules WHERE file_name IS NOT NULL AND has_function_privilege('pg_hba_file_rules()', 'EXECUTE')",
			"SELECT DISTINCT file_name FROM pg_ident_file_mappings WHERE file_name IS NOT NULL AND has_function_privilege('pg_ident_file_mappings()', 'EXECUTE')")
	}
	for _, query := range included {
		more, err := includedFiles(ctx, conn, query)
		if err != nil {
			return nil, "", err
		}
		files = append(files, more...)
	}
	slices.Sort(files)
	return slices.Compact(files), logs, nil
}

func includedFiles(ctx context.Context, conn *pgx.Conn, query string) ([]string, error) {
	rows, err := conn.Query(ctx, query)
	if err != nil {
		return nil, err
	}
	files, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if kindOf(err) == fail.PGDenied {
		return nil, nil
	}
	return files, err
}

// Check compares the files that are about to be copied with the server that
// started the backup: their pg_control must be that server's, and know of the
// checkpoint that came with the start. Else it is fail.WrongSystem.
func (s Started) Check(c pg.Control) error {
	var what string
	switch {
	case c.System != s.System:
		what = fmt.Sprintf("they belong to system %v, the server is %v", c.System, s.System)
	case c.Redo < s.LSN:
		what = fmt.Sprintf("their last checkpoint begins at %v, the backup at %v", c.Redo, s.LSN)
	case c.Timeline != s.Timeline && !s.InRecovery:
		what = fmt.Sprintf("they are on timeline %v, the server is on %v", c.Timeline, s.Timeline)
	case c.SegmentSize != s.SegmentSize:
		what = fmt.Sprintf("their WAL segments have %d bytes, the server's %d", c.SegmentSize, s.SegmentSize)
	default:
		return nil
	}
	return fail.Hint(fmt.Errorf("the files at %s are not those of the server: %s: %w", s.DataDirectory, what, fail.WrongSystem),
		"a physical backup is taken on the host of the data directory: does the conninfo lead to a server on another host, or in a container?")
}

// Check finds out whether the backup still goes on: the connection leads to the
// same process, and a standby is still one. A standby that was promoted is
// fail.Promoted.
func (s *BackupSession) Check(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var pid uint32
	var recovering bool
	err := s.conn.QueryRow(ctx, "SELECT pg_backend_pid(), pg_is_in_recovery()", pgx.QueryExecModeExec).Scan(&pid, &recovering)
	if err != nil {
		return s.lost(ctx, queryError("see whether the backup goes on", err))
	}
	return s.same(pid, recovering)
}

func (s *BackupSession) same(pid uint32, recovering bool) error {
	switch {
	case pid != s.Start.PID:
		return pooled()
	case recovering != s.Start.InRecovery:
		return fmt.Errorf("the standby was promoted during the backup: %w", fail.Promoted)
	}
	return nil
}

// lost makes an error of a connection that has gone fail.PGDown.
func (s *BackupSession) lost(ctx context.Context, err error) error {
	if ctx.Err() == nil && s.conn.IsClosed() && fail.KindOf(err) == fail.Unknown {
		return fmt.Errorf("%w: the backup has ended with it: %w", err, fail.PGDown)
	}
	return err
}

// Position returns a position in the log that no page of the cluster is ahead
// of at this moment. On a standby that is true only up to one WAL record, which
// is being replayed.
func (s *BackupSession) Position(ctx context.Context) (pg.LSN, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	position := "pg_current_wal_insert_lsn()"
	if s.Start.InRecovery {
		position = "pg_last_wal_replay_lsn()"
	}
	var text string
	if err := s.conn.QueryRow(ctx, "SELECT "+position+"::text", pgx.QueryExecModeExec).Scan(&text); err != nil {
		return 0, s.lost(ctx, queryError("ask for the position in the log", err))
	}
	return pg.ParseLSN(text)
}

// Redo returns where recovery begins by the newest checkpoint, or restartpoint of
// a standby. While it is Start.LSN, there was none since the one of the start.
func (s *BackupSession) Redo(ctx context.Context) (pg.LSN, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var text string
	if err := s.conn.QueryRow(ctx, "SELECT redo_lsn::text FROM pg_control_checkpoint()", pgx.QueryExecModeExec).Scan(&text); err != nil {
		return 0, s.lost(ctx, queryError("ask for the newest checkpoint", err))
	}
	return pg.ParseLSN(text)
}

// Stop ends the backup, and with it the session. It does not wait for the
// archiver. After an error the copy is worth nothing.
func (s *BackupSession) Stop(ctx context.Context) (Stopped, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer hangUp(s.conn)
	stop := "pg_backup_stop(false)"
	if s.Start.Version.Major() < 15 {
		stop = "pg_stop_backup(false, false)"
	}
	var st Stopped
	var lsn string
	var pid uint32
	var recovering bool
	// On a standby the copy is consistent at the end of recovery that
	// pg_control names once the backup has stopped, and on that end's timeline: a
	// subquery that depends on the stop's row is not evaluated before it.
	err := s.conn.QueryRow(ctx, `
		SELECT b.lsn::text, b.labelfile, coalesce(b.spcmapfile, ''), pg_backend_pid(), pg_is_in_recovery(), clock_timestamp(),
		       CASE WHEN pg_is_in_recovery() THEN (SELECT min_recovery_end_timeline FROM pg_control_recovery() WHERE b.lsn IS NOT NULL)
		            ELSE (SELECT timeline_id FROM pg_control_checkpoint() WHERE b.lsn IS NOT NULL) END
		  FROM `+stop+` b`, pgx.QueryExecModeExec).
		Scan(&lsn, &st.Label, &st.TablespaceMap, &pid, &recovering, &st.Time, &st.Timeline)
	if err != nil {
		return Stopped{}, s.lost(ctx, s.stopError(queryError("stop the backup", err)))
	}
	if err := s.same(pid, recovering); err != nil {
		return Stopped{}, fmt.Errorf("stop the backup: %w", err)
	}
	if st.LSN, err = pg.ParseLSN(lsn); err != nil {
		return Stopped{}, fmt.Errorf("stop the backup: %w", err)
	}
	if err := s.labelFits(st.Label); err != nil {
		return Stopped{}, fmt.Errorf("stop the backup: %w", err)
	}
	if st.LSN < s.Start.LSN {
		return Stopped{}, fmt.Errorf("stop the backup: it ends at %v, before it began at %v", st.LSN, s.Start.LSN)
	}
	if strings.TrimSpace(st.TablespaceMap) == "" {
		st.TablespaceMap = ""
	}
	st.Time = st.Time.UTC()
	st.LastWAL, err = lastWAL(st.Timeline, st.LSN, s.Start.SegmentSize)
	return st, err
}

// lastWAL names the last segment of a log that ends at a position. It holds the
// byte before. Where a segment ends at that position, pg_walfile_name names the
// next one since PostgreSQL 17, and that may never be archived.
func lastWAL(t pg.Timeline, end pg.LSN, size pg.SegmentSize) (string, error) {
	return pg.SegmentName(t, max(end, 1)-1, size)
}

// stopError gives what the server says of a backup that it cannot end its kind.
func (s *BackupSession) stopError(err error) error {
	switch text := err.Error(); {
	case s.Start.InRecovery && strings.Contains(text, "promoted"):
		return fail.With(fail.Promoted, err)
	case s.Start.InRecovery && strings.Contains(text, "full_page_writes"):
		return startError(err, true)
	case strings.Contains(text, "not in progress"):
		return fail.Hint(fail.With(fail.BadConfig, err), fail.HintOf(pooled()))
	}
	return err
}

// labelFits compares the label that the server wrote with what it said at the
// start.
func (s *BackupSession) labelFits(label string) error {
	first, _, _ := strings.Cut(label, "\n")
	at, rest, _ := strings.Cut(strings.TrimPrefix(first, "START WAL LOCATION: "), " ")
	lsn, err := pg.ParseLSN(at)
	if err != nil || lsn != s.Start.LSN || rest != "(file "+s.Start.FirstWAL+")" {
		return fmt.Errorf("the label begins with %.100q, the backup at %v in %s", first, s.Start.LSN, s.Start.FirstWAL)
	}
	return nil
}

// Abort ends the session, and with it the backup, unless Stop did.
func (s *BackupSession) Abort() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.conn.IsClosed() {
		hangUp(s.conn)
	}
}
