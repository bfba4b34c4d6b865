package restore_test

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

// A standby that archives nothing itself, as most do, is backed up as well as
// one that archives beside its primary. Of its backup everything is restored that
// the primary has archived.
func TestABackupOfAStandbyIsRestored(t *testing.T) {
	s := newSite(t)
	s.rows(5)
	dir, space := s.mkdir("standby"), s.mkdir("standby/space")
	if out, err := s.pg.Command(t.Context(), "pg_basebackup", "-d", s.pg.Conninfo(), "-D", filepath.Join(dir, "data"), "-R", "-c", "fast",
		"-T", filepath.Join(s.dir, "space")+"="+space).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	// It has been there for a while: that it got its tablespace just now is another
	// test's story.
	if out, err := exec.Command("sh", "-c", "touch -h -d '1 hour ago' "+filepath.Join(dir, "data/pg_tblspc")+"/*").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, mode := range []string{"on", "always"} {
		set := settings(s.archiving())
		set["archive_mode"], set["hot_standby"] = mode, "on"
		standby, err := lab.StartPostgres(t.Context(), lab.PostgresOptions{Dir: dir, Settings: set})
		if err != nil {
			t.Fatal(err)
		}
		s.rows(10)
		s.exec("CHECKPOINT") // what a restartpoint can be made of
		s.caughtUp(standby)
		if err := standby.Exec(t.Context(), "postgres", "CHECKPOINT"); err != nil {
			t.Fatal(err)
		}
		s.rows(10)
		s.caughtUp(standby)
		ctx, stop := context.WithCancel(t.Context())
		moved := make(chan struct{})
		go func() { // a standby's last segment is archived when the primary begins another
			defer close(moved)
			for ctx.Err() == nil {
				s.pg.Exec(ctx, "postgres", "INSERT INTO far VALUES (0)", "SELECT pg_switch_wal()")
				select {
				case <-time.After(200 * time.Millisecond):
				case <-ctx.Done():
				}
			}
		}()
		id, c := s.takeWith(s.physicalOf(standby))
		stop()
		<-moved
		if err := standby.Stop(); err != nil {
			t.Fatal(err)
		}
		if !c.InRecovery {
			t.Errorf("archive_mode=%s: the backup says that it is not one of a standby", mode)
		}
		s.rows(5)
		s.archived()
		for _, target := range []restore.Target{{Kind: restore.Immediate}, {Kind: restore.Latest}} {
			p := s.physical(mode+"-"+string(target.Kind), target)
			p.Backup = id
			s.restored(p)
			s.verifyBackup(p.Dir)
			server, err := s.start(p, nil)
			if err != nil {
				t.Fatalf("archive_mode=%s, %v: %v", mode, target, err)
			}
			got, want := seqs(t, server), seqs(t, s.pg)
			if target.Kind == restore.Immediate { // those that were there when it ended
				want = want[:min(len(got), len(want))]
				if n := len(seqs(t, s.pg)) - 5; len(got) < n {
					t.Errorf("archive_mode=%s, %v: %d rows, want at least %d", mode, target, len(got), n)
				}
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("archive_mode=%s, %v: %s", mode, target, diff)
			}
			server.Kill()
		}
	}
}

// caughtUp waits until a standby has replayed what was written so far.
func (s *site) caughtUp(standby *lab.Postgres) {
	s.t.Helper()
	at := query[string](s.t, s.pg, "SELECT pg_current_wal_flush_lsn()::text")
	s.until("the standby has "+at, func() bool {
		return query[bool](s.t, standby, "SELECT coalesce(pg_last_wal_replay_lsn() >= '"+at+"', false)")
	})
}

// A copy took hours, and then waited an hour for a segment that archive_command
// had been failing on since the day before.
func TestABackupDoesNotBeginWhileArchivingFails(t *testing.T) {
	s := newSite(t)
	s.rows(3)
	s.archived()
	broken, mended := s.archiving(), filepath.Join(s.dir, "mended")
	broken["archive_command"] = "test -e " + mended + " && " + broken["archive_command"]
	if err := s.pg.Restart(t.Context(), broken); err != nil {
		t.Fatal(err)
	}
	s.exec("SELECT pg_switch_wal()")
	s.until("archiving has failed so often that it rests for a minute", func() bool {
		return query[bool](t, s.pg, "SELECT failed_count >= 3 FROM pg_stat_archiver")
	})
	if err := os.WriteFile(mended, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	b := s.physicalOf(s.pg)
	b.WALWait = 20 * time.Second // the archiver is woken
	s.takeWith(b)

	if err := os.Remove(mended); err != nil {
		t.Fatal(err)
	}
	s.exec("INSERT INTO ledger VALUES (9000, 'one more')", "SELECT pg_switch_wal()")
	s.until("archiving fails", func() bool {
		return query[bool](t, s.pg, "SELECT last_failed_time > last_archived_time FROM pg_stat_archiver")
	})
	b = s.physicalOf(s.pg)
	b.WALWait = time.Second
	before := query[string](t, s.pg, "SELECT redo_lsn::text FROM pg_control_checkpoint()")
	_, err := b.Preflight(t.Context(), repo.NewID(time.Now(), "00000001"), time.Now(), backup.Owner{})
	if !errors.Is(err, fail.NotArchiving) || !strings.Contains(err.Error(), "archive_command fails on 0000") || !strings.Contains(fail.HintOf(err), "log says why") {
		t.Errorf("while it fails: %v; hint: %s", err, fail.HintOf(err))
	}
	if after := query[string](t, s.pg, "SELECT redo_lsn::text FROM pg_control_checkpoint()"); after != before {
		t.Errorf("a backup began at %s", after)
	}
}
