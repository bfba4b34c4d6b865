package restore_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

// A backup began while a database was being made, and before its directory was
// copied the database was dropped. Replay then began behind the record that makes
// the directory and before one that writes a file into it: "could not open file
// base/16385/pg_filenode.map.tmp", and no server.
func TestADatabaseMadeAcrossTheStartAndDroppedIsReplayed(t *testing.T) {
	s := newSite(t)
	s.rows(3)
	// A template whose map is a pipe holds CREATE DATABASE where it reads the map:
	// the directory is there and logged, the copy of the map is not yet.
	s.exec("CREATE DATABASE mould", "CHECKPOINT")
	dir := filepath.Join(s.pg.DataDir, "base", query[string](t, s.pg, "SELECT oid::text FROM pg_database WHERE datname = 'mould'"))
	name := filepath.Join(dir, "pg_filenode.map")
	content, err := os.ReadFile(name)
	if err == nil {
		err = errors.Join(os.Rename(name, name+".real"), unix.Mkfifo(name, 0o600), lab.Own(name))
	}
	if err != nil {
		t.Fatal(err)
	}
	created := make(chan error, 1)
	go func() {
		created <- s.pg.Exec(context.WithoutCancel(t.Context()), "postgres", "CREATE DATABASE victim TEMPLATE mould")
	}()
	pipe, err := os.OpenFile(name, os.O_WRONLY, 0) // waits for who reads
	if err != nil {
		t.Fatal(err)
	}
	defer pipe.Close()

	var once sync.Once
	var victim string
	r, err := repo.Open(t.Context(), &fault.Store{Store: s.store, Before: func(op, key string) error {
		if op != "list" || !strings.Contains(key, "/packs/") {
			return nil
		}
		once.Do(func() { // the backup has begun at the server, and nothing is copied
			// It reads the map again, and must not meet the pipe a second time.
			err := os.Rename(name+".real", name)
			_, e := pipe.Write(content)
			err = errors.Join(err, e, pipe.Close(), <-created)
			if err != nil {
				t.Error(err)
			}
			victim = query[string](t, s.pg, "SELECT oid::text FROM pg_database WHERE datname = 'victim'")
			s.exec("DROP DATABASE victim")
		})
		return nil
	}}, s.access)
	if err != nil {
		t.Fatal(err)
	}
	b := s.physicalOf(s.pg)
	b.Open = func(context.Context) (*repo.Repo, error) { return r, nil }
	s.takeWith(b)
	if victim == "" {
		t.Fatal("nothing was dropped")
	}
	s.rows(2)
	s.archived()
	p := s.physical("again", restore.Target{Kind: restore.Latest})
	s.restored(p)
	s.verifyBackup(p.Dir)
	server, err := s.start(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Kill()
	if got, want := len(seqs(t, server)), len(seqs(t, s.pg)); got != want {
		t.Errorf("%d rows, want %d", got, want)
	}
	if _, err := os.Stat(filepath.Join(server.DataDir, "base", victim)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the directory of the database that was dropped: %v", err)
	}
}

// Whoever begins to list databases after the next checkpoint may have missed one.
func TestABackupThatACheckpointOvertookBeginsAgain(t *testing.T) {
	s := newSite(t)
	s.rows(3)
	more := settings(s.archiving())
	more["listen_addresses"] = "127.0.0.1"
	if err := s.pg.Restart(t.Context(), more); err != nil {
		t.Fatal(err)
	}
	s.exec("ALTER ROLE postgres PASSWORD 'secret'")
	port := fmt.Sprintf("port=%d ", s.pg.Port)
	slow := lab.ProxyForTest(t, fmt.Sprintf("127.0.0.1:%d", s.pg.Port))
	slow.Delay.Store(100e6) // between the start and what comes next lie many checkpoints
	ctx, enough := context.WithCancel(t.Context())
	defer enough()
	var g sync.WaitGroup
	g.Go(func() {
		for ctx.Err() == nil {
			s.exec("CHECKPOINT")
		}
	})
	b := s.physicalOf(s.pg)
	_, slowly, _ := strings.Cut(slow.Addr, ":")
	b.Cluster.Conninfo = strings.Replace(s.pg.TCPConninfo(), port, "port="+slowly+" ", 1) + " dbname=postgres password=secret"
	again := &notes{seen: enough}
	b.Log = slog.New(again)
	id, _ := s.takeWith(b)
	enough()
	g.Wait()
	if len(again.all) != 1 || !strings.Contains(again.all[0], "a checkpoint overtook the start of the backup") {
		t.Errorf("logged %q", again.all)
	}
	s.archived()
	p := s.physical("again", restore.Target{Kind: restore.Latest})
	plan := s.restored(p)
	if plan.Backup.ID != id {
		t.Errorf("restored %v, want %v", plan.Backup.ID, id)
	}
}

// notes are what was logged.
type notes struct {
	all  []string
	seen func()
}

func (n *notes) Enabled(context.Context, slog.Level) bool { return true }
func (n *notes) WithAttrs([]slog.Attr) slog.Handler       { return n }
func (n *notes) WithGroup(string) slog.Handler            { return n }
func (n *notes) Handle(_ context.Context, r slog.Record) error {
	text := r.Message
	r.Attrs(func(a slog.Attr) bool { text += " " + a.String(); return true })
	n.all = append(n.all, text)
	n.seen()
	return nil
}
