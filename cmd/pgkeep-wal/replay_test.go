package main

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/lab"
)

var replaySegments = flag.Int("replay-segments", 40, "segments of 16 MiB that BenchmarkReplay replays")

// BenchmarkReplay compares the time that PostgreSQL takes to replay the log of
// pgbench with restore_command = cp from a local directory, and with fetch from
// an S3 server on the same machine, in turns.
func BenchmarkReplay(b *testing.B) {
	w := newWorld(b, 16)
	local := filepath.Join(w.dir, "local")
	if err := os.Mkdir(local, 0o700); err != nil {
		b.Fatal(err)
	}
	w.own(local)
	must := func(cmd *exec.Cmd) {
		b.Helper()
		if out, err := cmd.CombinedOutput(); err != nil {
			b.Fatalf("%v: %v\n%s", cmd, err, out)
		}
	}
	must(w.pg.Command(b.Context(), "pgbench", "-i", "-q", "-s", "30", "-d", w.pg.Conninfo()))
	base := filepath.Join(w.dir, "base")
	must(w.pg.Command(b.Context(), "pg_basebackup", "-d", w.pg.Conninfo(), "-D", base, "-X", "none", "-c", "fast", "--no-sync"))
	first := w.query(w.pg, "SELECT pg_walfile_name(pg_current_wal_lsn())")
	done := func() int {
		n, err := strconv.Atoi(w.query(w.pg, "SELECT (pg_current_wal_lsn() - '0/0' )::bigint / (16 << 20) || ''"))
		if err != nil {
			b.Fatal(err)
		}
		return n
	}
	start := done()
	for done() < start+*replaySegments {
		must(w.pg.Command(b.Context(), "pgbench", "-n", "-T", "5", "-c", "4", "-d", w.pg.Conninfo()))
	}
	last := w.query(w.pg, "SELECT pg_walfile_name(pg_switch_wal())")
	deadline := time.Now().Add(5 * time.Minute)
	for w.query(w.pg, "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver") < last {
		if time.Now().After(deadline) {
			b.Fatal("not archived")
		}
		<-time.After(100 * time.Millisecond)
	}
	b.Logf("%s to %s", first, last)
	segments, err := filepath.Glob(filepath.Join(w.pg.DataDir, "pg_wal", "0*"))
	if err != nil {
		b.Fatal(err)
	}
	for _, s := range segments {
		if n := filepath.Base(s); n >= first && n <= last && len(n) == 24 {
			must(exec.Command("cp", "-p", s, local))
		}
	}
	if err := w.pg.Stop(); err != nil {
		b.Fatal(err)
	}

	turn := 0
	replay := func(command string) float64 {
		turn++
		name := fmt.Sprintf("replay%d", turn)
		dir := filepath.Join(w.dir, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			b.Fatal(err)
		}
		must(exec.Command("cp", "-a", base, filepath.Join(dir, "data")))
		must(exec.Command("sync"))
		w.write(filepath.Join(name, "data", "recovery.signal"), "")
		began := time.Now()
		p, err := lab.StartPostgres(b.Context(), lab.PostgresOptions{Dir: dir, Settings: map[string]string{
			"hot_standby": "off", "shared_buffers": "512MB", "restore_command": command, "max_wal_size": "8GB", "archive_mode": "off"}})
		if err != nil {
			b.Fatal(err)
		}
		whole := time.Since(began)
		log := read(b, filepath.Join(dir, "log"))
		m := regexp.MustCompile(`redo done at .* elapsed: ([0-9.]+) s`).FindSubmatch(log)
		if m == nil {
			b.Fatalf("no redo in %s", log)
		}
		redo, _ := strconv.ParseFloat(string(m[1]), 64)
		b.Logf("%s: redo %.2fs, to open %v", command[:12], redo, whole.Round(10*time.Millisecond))
		p.Kill()
		os.RemoveAll(dir)
		return redo
	}
	var cp, fetched []float64
	for b.Loop() {
		for range 3 {
			cp = append(cp, replay("cp "+local+"/%f %p"))
			fetched = append(fetched, replay(w.program+" fetch --config "+w.restore+" %f %p"))
		}
	}
	slices.Sort(cp)
	slices.Sort(fetched)
	b.ReportMetric(cp[len(cp)/2], "s-local")
	b.ReportMetric(fetched[len(fetched)/2], "s-fetch")
	b.ReportMetric(fetched[len(fetched)/2]/cp[len(cp)/2], "ratio")
}
