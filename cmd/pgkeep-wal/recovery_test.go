package main

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/lab"
)

// start starts a copy of the base backup, as what the signal file says, with a
// restore_command.
func (w *world) start(base, name, signal, command string, settings map[string]string) (p *lab.Postgres, dir string, err error) {
	w.t.Helper()
	dir = filepath.Join(w.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", base, filepath.Join(dir, "data")).CombinedOutput(); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	w.write(filepath.Join(name, "data", signal), "")
	all := map[string]string{"hot_standby": "on", "wal_retrieve_retry_interval": "200ms", "restore_command": command}
	for k, v := range settings {
		all[k] = v
	}
	p, err = lab.StartPostgres(w.t.Context(), lab.PostgresOptions{Dir: dir, Settings: all})
	if err == nil {
		w.t.Cleanup(func() { p.Stop() })
	}
	return p, dir, err
}

// fetch is a restore_command.
func (w *world) fetch(timeout, config string) string {
	return fmt.Sprintf("%s fetch --timeout %s --config %s %%f %%p", w.program, timeout, config)
}

func (w *world) wantRows(p *lab.Postgres, want int) {
	w.t.Helper()
	if got := w.query(p, "SELECT count(*)::text FROM t"); got != strconv.Itoa(want) {
		w.t.Errorf("%s rows, want %d", got, want)
	}
}

// until waits for something for at most half a minute.
func until(t testing.TB, what string, holds func() bool) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("after half a minute not yet: %s", what)
		}
		<-time.After(20 * time.Millisecond)
	}
}

func contains(path, text string) bool {
	b, err := os.ReadFile(path)
	return err == nil && bytes.Contains(b, []byte(text))
}

// insert adds rows, each in a segment of its own, and waits until p has archived
// them.
func (w *world) insert(p *lab.Postgres, from, count int) {
	w.t.Helper()
	last := ""
	for i := range count {
		if err := p.Exec(w.t.Context(), "postgres", fmt.Sprintf("INSERT INTO t SELECT %d, string_agg(md5(random()::text), '') FROM generate_series(1, 1000)", from+i)); err != nil {
			w.t.Fatal(err)
		}
		last = w.query(p, "SELECT pg_walfile_name(pg_switch_wal())")
	}
	until(w.t, last+" is archived", func() bool {
		return w.query(p, "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver") >= last
	})
}

// TestRecovery tells what a server does whose archive is not well.
func TestRecovery(t *testing.T) {
	w := newWorld(t, 1)
	base, segments := w.fill()
	middle := segments[rows/2]
	proxy := lab.ProxyForTest(t, w.s3.Addr)
	slow := w.configure("slow.yaml", "operator.key", "https://"+proxy.Addr, w.s3.AccessKeyID)
	refused := func(t *testing.T, name, command string) {
		t.Helper()
		p, dir, err := w.start(base, name, "recovery.signal", command, map[string]string{"hot_standby": "off"})
		if err == nil {
			t.Errorf("it opened, with %s of %d rows", w.query(p, "SELECT count(*)::text FROM t"), rows)
		}
		if !contains(filepath.Join(dir, "log"), "from archive: child process exited with exit code 2") {
			t.Errorf("it did not stop for a status of 200 and more: %s", read(t, filepath.Join(dir, "log")))
		}
	}

	t.Run("S3 is slow", func(t *testing.T) {
		proxy.Rate.Store(200_000)
		p, dir, err := w.start(base, "slow", "recovery.signal", w.fetch("30s", slow), nil)
		if err != nil {
			t.Fatal(err)
		}
		until(t, "it is open for writing", func() bool { return w.query(p, "SELECT pg_is_in_recovery()::text") == "false" })
		w.wantRows(p, rows)
		if _, err := os.Stat(filepath.Join(dir, "data/pg_wal/pgkeep/prefetch/lock")); err != nil {
			t.Errorf("nothing was fetched ahead: %v", err)
		}
	})
	t.Run("S3 is slower than anybody waits", func(t *testing.T) {
		proxy.Rate.Store(2_000)
		defer proxy.Rate.Store(0)
		refused(t, "slower", w.fetch("2s", slow))
	})

	object := w.object(middle)
	sound := read(t, object)
	takeAway := func(t *testing.T) (bringBack func()) { // with what the server keeps beside the content
		away := filepath.Join(w.dir, "away")
		if err := os.Rename(object, away); err != nil {
			t.Fatal(err)
		}
		return func() {
			if err := os.Rename(away, object); err != nil {
				t.Fatal(err)
			}
		}
	}
	t.Run("another cluster's segment under the name", func(t *testing.T) {
		other := lab.PostgresForTest(t, lab.PostgresOptions{WALSegmentMB: 1, Settings: map[string]string{
			"archive_mode": "on", "archive_command": w.program + " push --config " + w.host + " %p"}})
		var foreign []string
		until(t, "the other one archived that segment", func() bool {
			if err := other.Exec(t.Context(), "postgres", "SELECT pg_logical_emit_message(false, '', 'x')", "SELECT pg_switch_wal()"); err != nil {
				t.Fatal(err)
			}
			all, err := filepath.Glob(filepath.Join(w.s3.Data, "prod/clusters/main/wal/*-*/00000001", middle+".zst"))
			if err != nil {
				t.Fatal(err)
			}
			foreign = slices.DeleteFunc(all, func(name string) bool { return name == object })
			return len(foreign) == 1
		})
		if err := os.WriteFile(object, read(t, foreign[0]), 0o600); err != nil {
			t.Fatal(err)
		}
		defer os.WriteFile(object, sound, 0o600)
		w.wal(210, "holds a file of system", base, "fetch", "--timeout", "1s", "--config", w.restore, middle, filepath.Join(w.dir, "x"))
		refused(t, "foreign", w.fetch("2s", w.restore))
	})
	t.Run("an object that cannot be read", func(t *testing.T) {
		defer takeAway(t)()
		if err := os.Symlink(object, object); err != nil { // the server's open fails
			t.Fatal(err)
		}
		refused(t, "unreadable", w.fetch("2s", w.restore))
	})
	t.Run("403 in the middle", func(t *testing.T) {
		p := struct {
			*lab.Postgres
			err error
		}{}
		reached, proceed := filepath.Join(w.dir, "reached"), filepath.Join(w.dir, "proceed")
		command := w.write("restore-command", fmt.Sprintf(`#!/bin/sh
if [ "$1" = %s ]; then
  touch %s
  while [ ! -e %s ]; do sleep 0.05; done
fi
exec %s fetch --timeout 2s --config %s "$1" "$2"
`, segments[3], reached, proceed, w.program, w.restore))
		if err := os.Chmod(command, 0o700); err != nil {
			t.Fatal(err)
		}
		done := make(chan bool)
		go func() {
			defer close(done)
			p.Postgres, _, p.err = w.start(base, "middle", "recovery.signal", command+" %f %p", map[string]string{"hot_standby": "off"})
		}()
		until(t, "recovery reached the middle", func() bool { _, err := os.Stat(reached); return err == nil })
		secret := w.s3.SecretAccessKey
		w.s3.SecretAccessKey = rand.Text() + rand.Text()
		if err := w.s3.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
		w.write("proceed", "")
		<-done
		if p.err == nil {
			t.Errorf("it opened, with %s of %d rows", w.query(p.Postgres, "SELECT count(*)::text FROM t"), rows)
		}
		if log := filepath.Join(w.dir, "middle/log"); !contains(log, "store-denied") || !contains(log, "exit code 221") {
			t.Errorf("not for want of a right: %s", read(t, log))
		}
		w.s3.SecretAccessKey = secret
		if err := w.s3.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("a standby waits while S3 is down", func(t *testing.T) {
		p, dir, err := w.start(base, "standby", "standby.signal", w.fetch("2s", slow), nil)
		if err != nil {
			t.Fatal(err)
		}
		log := filepath.Join(dir, "log")
		until(t, "it has all rows", func() bool { return w.query(p, "SELECT count(*)::text FROM t") == strconv.Itoa(rows) })
		if err := proxy.Set(lab.Refuse); err != nil {
			t.Fatal(err)
		}
		w.insert(w.pg, rows, 2)
		waits := func() int { return bytes.Count(read(t, log), []byte("a standby waits for the answer")) }
		until(t, "it waits for a history, longer than one try", func() bool { return waits() >= 2 })
		if got := w.query(p, "SELECT pg_is_in_recovery()::text"); got != "true" {
			t.Error("it opened")
		}
		w.wantRows(p, rows)
		if err := proxy.Set(lab.Pass); err != nil {
			t.Fatal(err)
		}
		until(t, "it has the new rows", func() bool { return w.query(p, "SELECT count(*)::text FROM t") == strconv.Itoa(rows+2) })
	})
	t.Run("a hole stops a standby", func(t *testing.T) {
		defer takeAway(t)()
		p, dir, err := w.start(base, "hole", "standby.signal", w.fetch("2s", w.restore), nil)
		log := filepath.Join(dir, "log")
		until(t, "it stopped", func() bool { return contains(log, "exit code 214") })
		if !contains(log, middle+": it is missing, though the archive holds") {
			t.Errorf("it does not say what is missing: %s", read(t, log))
		}
		if err == nil {
			until(t, "it is down", func() bool {
				conn, err := p.Connect(t.Context(), "postgres")
				if err == nil {
					conn.Close(t.Context())
				}
				return err != nil
			})
		}
	})
	t.Run("a timeline switch is followed", func(t *testing.T) {
		push := map[string]string{"archive_mode": "on", "archive_command": w.program + " push --config " + w.host + " %p"}
		p, _, err := w.start(base, "second", "recovery.signal", w.fetch("10s", w.restore), push)
		if err != nil {
			t.Fatal(err)
		}
		until(t, "it is open for writing", func() bool { return w.query(p, "SELECT pg_is_in_recovery()::text") == "false" })
		w.insert(p, 1000, 12)
		if err := p.Stop(); err != nil {
			t.Fatal(err)
		}
		q, dir, err := w.start(base, "third", "recovery.signal", w.fetch("10s", w.restore), nil)
		if err != nil {
			t.Fatal(err)
		}
		until(t, "it is open for writing", func() bool { return w.query(q, "SELECT pg_is_in_recovery()::text") == "false" })
		w.wantRows(q, rows+2+12)
		if got := w.query(q, "SELECT pg_walfile_name(pg_current_wal_lsn())"); !strings.HasPrefix(got, "00000003") {
			t.Errorf("it writes %s, not timeline 3", got)
		}
		if _, err := os.Stat(filepath.Join(dir, "data/pg_wal/pgkeep/prefetch/lock")); err != nil {
			t.Errorf("nothing was fetched ahead: %v", err)
		}
	})
}
