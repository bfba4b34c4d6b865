package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
)

func startBackup(t *testing.T, c cluster.Cluster) *cluster.BackupSession {
	t.Helper()
	s, err := c.StartBackup(t.Context(), "a test", true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Abort)
	return s
}

func TestBackupSessionTellsWhatTheCopyNeeds(t *testing.T) {
	ctx := t.Context()
	// An archiver that never succeeds is not waited for.
	p, c := start(t, lab.PostgresOptions{WALSegmentMB: 1, Settings: map[string]string{"archive_mode": "on", "archive_command": "false"}})
	exec(t, p, "postgres", "CREATE ROLE hasty SUPERUSER LOGIN", "ALTER ROLE hasty SET statement_timeout = '1ms'")
	c = as(c, "hasty")
	before := time.Now()
	s := startBackup(t, c)
	st := s.Start
	facts, err := c.Facts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if st.System != facts.System || st.Timeline != 1 || st.Version != facts.Version || st.SegmentSize != 1<<20 || st.InRecovery ||
		st.DataDirectory != p.DataDir || st.LSN == 0 || st.Checkpoint < st.LSN || st.Time.Sub(before).Abs() > time.Minute || st.Time.Location() != time.UTC {
		t.Errorf("%+v", st)
	}
	for _, name := range []string{"postgresql.conf", "pg_hba.conf", "pg_ident.conf"} {
		if !slices.Contains(st.Config, filepath.Join(p.DataDir, name)) {
			t.Errorf("%s is not among the configuration: %q", name, st.Config)
		}
	}
	b, err := os.ReadFile(filepath.Join(p.DataDir, "global/pg_control"))
	if err != nil {
		t.Fatal(err)
	}
	control, err := pg.ParseControl(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.Check(control); err != nil {
		t.Error(err)
	}
	if err := s.Check(ctx); err != nil {
		t.Error(err)
	}
	exec(t, p, "postgres", "CREATE TABLE t AS SELECT generate_series(1, 100000) AS n")
	at, err := s.Position(ctx)
	if err != nil || at <= st.LSN {
		t.Errorf("position %v, %v; the backup began at %v", at, err, st.LSN)
	}
	stop, err := s.Stop(ctx)
	if err != nil {
		t.Fatal(err)
	}
	first := fmt.Sprintf("START WAL LOCATION: %v (file %s)\n", st.LSN, st.FirstWAL)
	if stop.LSN <= at || stop.Timeline != 1 || stop.LastWAL <= st.FirstWAL || !strings.HasPrefix(stop.Label, first) ||
		!strings.Contains(stop.Label, "LABEL: a test\n") || stop.TablespaceMap != "" || stop.Time.Before(st.Time) {
		t.Errorf("%+v", stop)
	}
	if _, err := os.Stat(filepath.Join(p.DataDir, "pg_wal", stop.LastWAL)); err != nil {
		t.Error(err)
	}
	if _, err := s.Stop(ctx); err == nil {
		t.Error("a backup ends twice")
	}
}

// When a backup began is asked before the checkpoint that its log begins with,
// however long that takes: what was made in between is made again by recovery.
func TestABackupBeganBeforeItsCheckpoint(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{})
	exec(t, p, "postgres", "CREATE TABLE t AS SELECT generate_series(1, 20000) AS n") // dirty pages, one of which is written in 100 ms
	conn, err := p.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	var later time.Time
	var looking sync.WaitGroup
	looking.Go(func() {
		for waits := false; !waits && t.Context().Err() == nil; {
			err := conn.QueryRow(t.Context(), `SELECT clock_timestamp(), EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'CheckpointDone')`).Scan(&later, &waits)
			if err == nil && waits {
				_, err = conn.Exec(t.Context(), "CHECKPOINT") // and it hurries
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	s, err := c.StartBackup(t.Context(), "spread", false)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Abort()
	looking.Wait()
	if !s.Start.Time.Before(later) {
		t.Errorf("it began at %v, and at %v its checkpoint had begun", s.Start.Time, later)
	}
}

// Class C7: the last segment, where the log ends exactly with one. A backup that
// waits for the next one waits for ever on an idle server (PostgreSQL 17 changed
// what pg_walfile_name says of it).
func TestC7LastSegmentAtABoundary(t *testing.T) {
	for _, tt := range []struct {
		tli  pg.Timeline
		end  pg.LSN
		size pg.SegmentSize
		want string
	}{
		{1, 0x3000000, 16 << 20, "000000010000000000000002"},
		{1, 0x3000001, 16 << 20, "000000010000000000000003"},
		{1, 0x2ffffff, 16 << 20, "000000010000000000000002"},
		{10, 0x1_0000_0000, 16 << 20, "0000000A00000000000000FF"},
		{16, 0x1_0000_0000, 1 << 20, "000000100000000000000FFF"},
		{1, 0x1_4000_0000, 1 << 30, "000000010000000100000000"},
	} {
		if got, err := cluster.LastWAL(tt.tli, tt.end, tt.size); err != nil || got != tt.want {
			t.Errorf("the log to %v ends in %s, %v; want %s", tt.end, got, err, tt.want)
		}
	}
}

// Class C7: a copy without its end is no backup, and no label of another
// session makes it one.
func TestC7LostConnectionEndsTheBackup(t *testing.T) {
	ctx := t.Context()
	p, c := start(t, lab.PostgresOptions{})
	s := startBackup(t, c)
	if err := s.Check(ctx); err != nil {
		t.Fatal(err)
	}
	exec(t, p, "postgres", fmt.Sprintf("SELECT pg_terminate_backend(%d)", s.Start.PID))
	if err := s.Check(ctx); !errors.Is(err, fail.PGDown) {
		t.Errorf("Check: %v, want %v", err, fail.PGDown)
	}
	if _, err := s.Position(ctx); !errors.Is(err, fail.PGDown) {
		t.Errorf("Position: %v, want %v", err, fail.PGDown)
	}
	if _, err := s.Stop(ctx); !errors.Is(err, fail.PGDown) {
		t.Errorf("Stop: %v, want %v", err, fail.PGDown)
	}
	again := startBackup(t, c) // nothing is left of the first
	if _, err := again.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func TestC7OnlyTheSessionThatBeganABackupEndsIt(t *testing.T) {
	ctx := t.Context()
	_, c := start(t, lab.PostgresOptions{})
	s := startBackup(t, c)
	other, err := c.Connect(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	s.Pooled(other)
	if err := s.Check(ctx); !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "pool") {
		t.Errorf("Check: %v (%s)", err, fail.HintOf(err))
	}
	if _, err := s.Stop(ctx); !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "pool") {
		t.Errorf("Stop: %v (%s)", err, fail.HintOf(err))
	}
	// One that has a backup of its own has not this one.
	s, second := startBackup(t, c), startBackup(t, c)
	theirs, err := c.Connect(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := theirs.Exec(ctx, "SELECT pg_backup_start('theirs', true)"); err != nil {
		t.Fatal(err)
	}
	s.Pooled(theirs)
	if st, err := s.Stop(ctx); !errors.Is(err, fail.BadConfig) {
		t.Errorf("Stop: %+v, %v", st, err)
	}
	if _, err := second.Stop(ctx); err != nil {
		t.Errorf("a backup beside it: %v", err)
	}
}

func TestBackupSessionEndsWithItsContext(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{Settings: map[string]string{"checkpoint_timeout": "1h", "checkpoint_completion_target": "0.99"}})
	exec(t, p, "postgres", "CREATE TABLE t AS SELECT generate_series(1, 300000) AS n")
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	s, err := c.StartBackup(ctx, "spread", false) // the checkpoint takes its time
	if err == nil {
		s.Abort()
		t.Fatal("a spread checkpoint was over at once")
	}
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want %v", err, context.DeadlineExceeded)
	}
}

func TestBackupRightsAreNamed(t *testing.T) {
	for _, major := range []int{14, 15} {
		t.Run(fmt.Sprint(major), func(t *testing.T) {
			ctx := t.Context()
			p, c := start(t, lab.PostgresOptions{Version: major})
			exec(t, p, "postgres", `CREATE ROLE "Bob's" LOGIN`)
			bob := as(c, `Bob\'s`)
			err := bob.CheckBackupRights(ctx)
			if !errors.Is(err, fail.PGDenied) {
				t.Fatalf("got %v, want %v", err, fail.PGDenied)
			}
			if _, err := bob.StartBackup(ctx, "x", true); !errors.Is(err, fail.PGDenied) {
				t.Errorf("StartBackup: %v, want %v", err, fail.PGDenied)
			}
			hint := strings.TrimPrefix(fail.HintOf(err), "as a superuser: ")
			hint = strings.TrimPrefix(hint, `in database "postgres", `)
			exec(t, p, "postgres", hint)
			if err := bob.CheckBackupRights(ctx); err != nil {
				t.Errorf("after %s: %v", hint, err)
			}
			s := startBackup(t, bob)
			if len(s.Start.Config) < 3 {
				t.Errorf("the configuration is %q", s.Start.Config)
			}
			if err := s.Check(ctx); err != nil {
				t.Error(err)
			}
			if _, err := s.Position(ctx); err != nil {
				t.Error(err)
			}
			if _, err := s.Stop(ctx); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestBackupNeedsALogThatHoldsEverything(t *testing.T) {
	_, c := start(t, lab.PostgresOptions{Settings: map[string]string{"wal_level": "minimal", "max_wal_senders": "0"}})
	_, err := c.StartBackup(t.Context(), "x", true)
	if !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "wal_level = replica") {
		t.Errorf("%v (%s)", err, fail.HintOf(err))
	}
}

func TestFilesOfAnotherServerAreRefused(t *testing.T) {
	s := cluster.Started{System: 7, LSN: 1000, Timeline: 3, SegmentSize: 1 << 24}
	right := pg.Control{System: 7, Redo: 1000, Checkpoint: 1100, Timeline: 3, SegmentSize: 1 << 24}
	later := right
	later.Redo = 2000
	standby := s
	standby.InRecovery = true
	older := right
	older.Timeline = 2
	for name, err := range map[string]error{"right": s.Check(right), "later": s.Check(later), "standby": standby.Check(older)} {
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, change := range map[string]func(c *pg.Control){
		"system":       func(c *pg.Control) { c.System = 8 },
		"old":          func(c *pg.Control) { c.Redo = 999 },
		"timeline":     func(c *pg.Control) { c.Timeline = 2 },
		"segment size": func(c *pg.Control) { c.SegmentSize = 1 << 20 },
	} {
		c := right
		change(&c)
		if err := s.Check(c); !errors.Is(err, fail.WrongSystem) || fail.HintOf(err) == "" {
			t.Errorf("%s: %v, want %v", name, err, fail.WrongSystem)
		}
	}
}

// standby makes a replica of p that streams from it.
func standby(t *testing.T, p *lab.Postgres) (*lab.Postgres, cluster.Cluster) {
	t.Helper()
	dir := lab.DirForTest(t)
	out, err := p.Command(t.Context(), "pg_basebackup", "-d", p.Conninfo(), "-D", filepath.Join(dir, "data"), "-c", "fast", "-X", "stream", "-R").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return start(t, lab.PostgresOptions{Dir: dir})
}

func TestBackupOfAStandby(t *testing.T) {
	ctx := t.Context()
	p, _ := start(t, lab.PostgresOptions{WALSegmentMB: 1})
	r, c := standby(t, p)
	s := startBackup(t, c)
	if !s.Start.InRecovery || s.Start.Timeline != 1 || s.Start.DataDirectory != r.DataDir {
		t.Errorf("%+v", s.Start)
	}
	b, err := os.ReadFile(filepath.Join(r.DataDir, "global/pg_control"))
	if err != nil {
		t.Fatal(err)
	}
	control, err := pg.ParseControl(b)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start.Check(control); err != nil {
		t.Error(err)
	}
	if at, err := s.Position(ctx); err != nil || at < s.Start.LSN {
		t.Errorf("position %v, %v", at, err)
	}
	if err := s.Check(ctx); err != nil {
		t.Error(err)
	}
	stop, err := s.Stop(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if stop.LSN < s.Start.LSN || stop.Timeline != 1 || stop.LastWAL < s.Start.FirstWAL || !strings.Contains(stop.Label, "BACKUP FROM: standby") {
		t.Errorf("%+v", stop)
	}

	t.Run("that is promoted", func(t *testing.T) {
		checked, stopped := startBackup(t, c), startBackup(t, c)
		exec(t, r, "postgres", "SELECT pg_promote()")
		if err := checked.Check(ctx); !errors.Is(err, fail.Promoted) {
			t.Errorf("Check: %v, want %v", err, fail.Promoted)
		}
		if _, err := stopped.Stop(ctx); !errors.Is(err, fail.Promoted) {
			t.Errorf("Stop: %v, want %v", err, fail.Promoted)
		}
		// The new primary is on a timeline of its own, and so is its next backup.
		s := startBackup(t, c)
		if s.Start.Timeline != 2 || s.Start.InRecovery || !strings.HasPrefix(s.Start.FirstWAL, "00000002") {
			t.Errorf("%+v", s.Start)
		}
		if stop, err := s.Stop(ctx); err != nil || !strings.HasPrefix(stop.LastWAL, "00000002") {
			t.Errorf("%+v, %v", stop, err)
		}
	})
}

func TestBackupOfAStandbyNeedsFullPagesFromThePrimary(t *testing.T) {
	ctx := t.Context()
	p, _ := start(t, lab.PostgresOptions{})
	r, c := standby(t, p)
	if err := p.Restart(ctx, map[string]string{"full_page_writes": "off"}); err != nil {
		t.Fatal(err)
	}
	exec(t, p, "postgres", "CREATE TABLE t(n int)", "CHECKPOINT")
	conn, err := r.Connect(ctx, "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	eventually(t, "the standby follows", func() bool {
		var there bool
		return conn.QueryRow(ctx, "SELECT to_regclass('t') IS NOT NULL").Scan(&there) == nil && there
	})
	exec(t, r, "postgres", "CHECKPOINT")
	_, err = c.StartBackup(ctx, "x", true)
	if !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "full_page_writes") {
		t.Errorf("%v (%s)", err, fail.HintOf(err))
	}
}

// A configuration is all files that are read, not three.
func TestConfigurationIncludesWhatItIncludes(t *testing.T) {
	p, c := start(t, lab.PostgresOptions{Version: 16})
	etc := lab.DirForTest(t)
	add := func(name, content string) {
		t.Helper()
		f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			t.Fatal(err)
		}
		_, err = f.WriteString(content)
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	conf, hba := filepath.Join(etc, "more.conf"), filepath.Join(etc, "hba.conf")
	add(conf, "work_mem = '5MB'\n")
	add(hba, "local all all trust\n")
	add(filepath.Join(p.DataDir, "postgresql.conf"), "include '"+conf+"'\n")
	add(filepath.Join(p.DataDir, "pg_hba.conf"), "include "+hba+"\n")
	s := startBackup(t, c)
	for _, name := range []string{conf, hba, filepath.Join(p.DataDir, "pg_ident.conf")} {
		if !slices.Contains(s.Start.Config, name) {
			t.Errorf("%s is not among %q", name, s.Start.Config)
		}
	}
}
