// Command benchphysical measures physical backups beside pgBackRest in one run,
// of the same server and with the same S3 server over TLS, and prints tables.
//
// Who is compared takes turns, so that a machine that slows down slows all of
// them. Seconds belong to the machine; the ratios of medians are the result. The
// files of the cluster are in the page cache.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/compare"
	"github.com/pgkeep/pgkeep/internal/lab"
)

func main() {
	var o options
	flag.IntVar(&o.scale, "scale", 130, "of pgbench; 1 is 17 MB")
	flag.IntVar(&o.rounds, "rounds", 5, "times that everything is measured")
	flag.IntVar(&o.temporal, "temporal", 5, "pairs of backups through Temporal and without; 0: do not measure this")
	flag.Float64Var(&o.churn, "churn", 0.01, "share of the pages that change, anywhere")
	flag.BoolVar(&o.noise, "noise", false, "rows that compress to a fifth, not to a twentieth")
	flag.BoolVar(&o.strict, "strict", false, "fail if a target is missed")
	flag.Parse()
	compare.Main("benchphysical", func(ctx context.Context) error { return run(ctx, o) })
}

type options struct {
	scale, rounds, temporal int
	churn                   float64
	noise, strict           bool
}

type bench struct {
	options
	*compare.Site
	pg      *lab.Postgres
	dir     string // of the server
	program string // pgkeep
	archive string // what archive_command runs
	missed  []string
}

func run(ctx context.Context, o options) (err error) {
	site, err := compare.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, site.Close()) }()
	b := &bench{options: o, Site: site}
	if b.program, err = b.Build(ctx, "pgkeep"); err != nil {
		return err
	}
	if err := b.fill(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.pg.Stop()) }()
	size, err := sizeOf(b.pg.DataDir, "pg_wal")
	if err != nil {
		return err
	}
	fmt.Printf("%d MB of cluster (pgbench, scale %d), page checksums, in the page cache; %d processors (%s), the S3 server (versitygw, TLS) on the same ones\n",
		size>>20, o.scale, runtime.NumCPU(), processor())
	if err := compare.Versions(ctx, os.Stdout); err != nil {
		return err
	}
	if o.rounds > 0 {
		if err := b.compare(ctx); err != nil {
			return err
		}
	}
	if o.temporal > 0 {
		if err := b.throughTemporal(ctx); err != nil {
			return err
		}
	}
	for _, m := range b.missed {
		fmt.Println("\nmissed:", m)
	}
	if o.strict && len(b.missed) > 0 {
		return fmt.Errorf("%d targets missed", len(b.missed))
	}
	return nil
}

func (b *bench) want(ok bool, format string, args ...any) {
	if !ok {
		b.missed = append(b.missed, fmt.Sprintf(format, args...))
	}
}

// fill makes the server. Its pages have room, so that a row that changes stays
// where it is.
func (b *bench) fill(ctx context.Context) (err error) {
	if b.dir, err = b.Mkdir("source"); err != nil {
		return err
	}
	b.archive = filepath.Join(b.Dir, archiveScript)
	if err := b.archiver("exit 0"); err != nil {
		return err
	}
	b.pg, err = lab.StartPostgres(ctx, lab.PostgresOptions{Dir: b.dir, Settings: map[string]string{"shared_buffers": "256MB", "max_wal_size": "2GB",
		"archive_mode": "on", "archive_command": "sh " + b.archive + " %p", "autovacuum": "off", "synchronous_commit": "off"}})
	if err != nil {
		return err
	}
	args := []string{"-h", filepath.Join(b.dir, "run"), "-U", "postgres", "-i", "-q", "-F", "90", "-s", fmt.Sprint(b.scale), "postgres"}
	if out, err := b.pg.Command(ctx, "pgbench", args...).CombinedOutput(); err != nil {
		return fmt.Errorf("pgbench: %w\n%s", err, out)
	}
	if b.noise {
		err = b.pg.Exec(ctx, "postgres", "CREATE TABLE noise WITH (fillfactor = 90) AS SELECT aid, bid, 0 AS abalance, (md5(aid::text) || repeat(chr(97 + aid % 26), 20))::char(84) AS filler FROM pgbench_accounts",
			"DROP TABLE pgbench_accounts", "ALTER TABLE noise RENAME TO pgbench_accounts", "ALTER TABLE pgbench_accounts ADD PRIMARY KEY (aid)", "VACUUM ANALYZE pgbench_accounts")
		if err != nil {
			return err
		}
	}
	return b.settle(ctx)
}

// archiveScript is what archive_command runs. pgBackRest wants to see its own
// name there.
const archiveScript = "pgkeep-or-pgbackrest"

// archiver says what is done with segments from now on.
func (b *bench) archiver(line string) error {
	_, err := b.Write(archiveScript, strings.ReplaceAll(line, "%p", `"$1"`)+"\n")
	return err
}

// settle waits until the server has nothing left to write or to archive.
func (b *bench) settle(ctx context.Context) error {
	if err := b.pg.Exec(ctx, "postgres", "CHECKPOINT"); err != nil {
		return err
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		left, err := filepath.Glob(filepath.Join(b.pg.DataDir, "pg_wal/archive_status/*.ready"))
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d segments are still to be archived", len(left))
		}
	}
}

// An arm is one of those that are compared.
type arm struct {
	title       string
	make        func(ctx context.Context, name string) (compare.Archiver, error)
	full, again string // command lines, behind that of the program
	restore     func(dir string, delta bool) string

	compare.Archiver
	line    string
	root    string // where the server keeps its backups
	results map[step][]measure
}

// A step is what is measured.
type step int

const (
	full step = iota
	incremental
	unchanged
	restored
	delta
	steps
)

func (b *bench) arms() []*arm {
	pgkeep := func(encrypted bool) *arm {
		return &arm{
			make: func(ctx context.Context, name string) (compare.Archiver, error) {
				return b.PgKeep(ctx, name, compare.Options{Encrypted: encrypted, Conninfo: b.pg.Conninfo()})
			},
			full: "backup --direct main", again: "backup --direct main",
			restore: func(dir string, delta bool) string {
				line := "restore --immediate --target-dir " + dir
				if delta {
					line += " --delta"
				}
				return line
			},
		}
	}
	other := func(settings ...string) *arm {
		return &arm{
			make: func(ctx context.Context, name string) (compare.Archiver, error) {
				return b.PgBackRest(ctx, name, b.pg.DataDir, compare.Options{Settings: append(settings, "process-max=2")})
			},
			full: "--type=full backup", again: "--type=incr backup",
			restore: func(dir string, delta bool) string {
				line := "--pg1-path=" + dir + " --type=immediate restore"
				if delta {
					line = "--delta " + line
				}
				return line
			},
		}
	}
	plain, sealed, block, simple := pgkeep(false), pgkeep(true), other("repo1-bundle=y", "repo1-block=y", "beta=y"), other()
	plain.title, sealed.title = "pgkeep, `encryption: none`", "pgkeep, age"
	block.title, simple.title = "A: pgBackRest, process-max=2, repo-bundle, repo-block (beta)", "B: pgBackRest, process-max=2"
	return []*arm{plain, sealed, block, simple}
}

// compare measures all steps, round after round. In each, all begin with an
// empty repository.
func (b *bench) compare(ctx context.Context) error {
	arms := b.arms()
	for _, a := range arms {
		a.results = make(map[step][]measure)
	}
	var share []float64
	for round := range b.rounds {
		var err error
		turns := append(slices.Clone(arms[round%len(arms):]), arms[:round%len(arms)]...)
		for _, a := range turns {
			if err := a.begin(ctx, b, fmt.Sprintf("round-%d-%d", round, slices.Index(arms, a))); err != nil {
				return err
			}
			if err := a.backup(ctx, b, full, a.full); err != nil {
				return err
			}
		}
		before, err := pages(b.pg.DataDir)
		if err != nil {
			return err
		}
		if err := b.change(ctx); err != nil {
			return err
		}
		changed, err := before.compressed(ctx, b.pg.DataDir)
		if err != nil {
			return err
		}
		for _, s := range []step{incremental, unchanged} {
			for _, a := range turns {
				if err := a.backup(ctx, b, s, a.again); err != nil {
					return err
				}
			}
		}
		for _, a := range turns {
			if err := a.restores(ctx, b, round == 0); err != nil {
				return err
			}
			if err := os.RemoveAll(filepath.Dir(a.root)); err != nil {
				return err
			}
		}
		stored := last(arms[0].results[incremental]).stored
		fmt.Printf("\nround %d: %d pages changed, %.1f MB as zstd -1 compresses them together; pgkeep stored %.1f MB, %.2f of that\n",
			round+1, changed.pages, mb(changed.bytes), mb(stored), float64(stored)/float64(changed.bytes))
		share = append(share, float64(stored)/float64(changed.bytes))
	}
	a, sealed, other := arms[0], arms[1], arms[2]
	for _, s := range []struct {
		step
		title  string
		target float64
	}{
		{full, "Full backup into an empty repository", 0.7},
		{incremental, fmt.Sprintf("Backup after %.2g %% of the pages changed, anywhere", 100*b.churn), 0.6},
		{unchanged, "Backup with nothing changed", 0}, // pgBackRest believes file times, and reads nothing
		{restored, "Restore into an empty directory", 1},
		{delta, fmt.Sprintf("Restore over a data directory of which %.2g %% of the pages are wrong, anywhere (delta)", 100*b.churn), 1},
	} {
		print(fmt.Sprintf("%s, %d times", s.title, b.rounds), s.step, arms, other, arms[3])
		r := seconds(a.results[s.step]) / seconds(other.results[s.step])
		b.want(s.target == 0 || r <= s.target, "%s: %.2f of pgBackRest's time; at most %.2f", s.title, r, s.target)
		m := max(memory(a.results[s.step]), memory(sealed.results[s.step]))
		b.want(m <= 200<<20, "%s: %d MB of memory; at most 200", s.title, m>>20)
	}
	b.want(median(share) <= 1.3, "an incremental backup stores %.2f of what changed; at most 1.30", median(share))
	return nil
}

func (a *arm) begin(ctx context.Context, b *bench, name string) (err error) {
	if a.Archiver, err = a.make(ctx, name); err != nil {
		return err
	}
	a.line, a.root = a.Line, filepath.Join(b.S3.Data, name, "backup")
	if a.Name == "pgkeep" {
		a.line, a.root = b.program+" --config "+a.Config, filepath.Join(b.S3.Data, name, "clusters")
	}
	return nil
}

// backup takes a backup; its own archiver is at work.
func (a *arm) backup(ctx context.Context, b *bench, s step, line string) error {
	if err := errors.Join(b.settle(ctx), b.archiver(a.Archive)); err != nil {
		return err
	}
	had, err := sizeOf(a.root, "wal")
	if err != nil {
		return err
	}
	m, err := b.timed(ctx, a.line+" "+line)
	if err != nil {
		return err
	}
	have, err := sizeOf(a.root, "wal")
	m.stored = have - had
	a.results[s] = append(a.results[s], m)
	return errors.Join(err, b.settle(ctx), b.archiver("exit 0"))
}

// restores restores into an empty directory, and then once more over what has
// been damaged there.
func (a *arm) restores(ctx context.Context, b *bench, checked bool) error {
	dir, err := b.Mkdir("restored")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	for _, s := range []step{restored, delta} {
		if s == delta {
			if err := b.damage(dir); err != nil {
				return err
			}
		}
		m, err := b.timed(ctx, a.line+" "+a.restore(dir, s == delta))
		if err != nil {
			return err
		}
		a.results[s] = append(a.results[s], m)
		if checked {
			if err := b.Run(ctx, b.Dir, "diff -rq -x pg_internal.init -x pgsql_tmp "+filepath.Join(dir, "base")+" "+filepath.Join(b.pg.DataDir, "base")); err != nil {
				return fmt.Errorf("%s: %w", a.title, err)
			}
		}
	}
	return nil
}

// change changes a row on some pages, chosen at random.
func (b *bench) change(ctx context.Context) error {
	err := b.pg.Exec(ctx, "postgres", fmt.Sprintf(`UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid = ANY (ARRAY(
		SELECT 1 + (random() * 99999 * %d)::int FROM generate_series(1, (SELECT (pg_relation_size('pgbench_accounts') / 8192 * %f)::int))))`, b.scale, b.churn))
	return errors.Join(err, b.settle(ctx))
}

// damage makes pages of a data directory wrong, chosen at random.
func (b *bench) damage(dir string) error {
	return filepath.WalkDir(filepath.Join(dir, "base"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err != nil || info.Size() < 1<<20 {
			return err
		}
		f, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		for n := range info.Size() / pageSize {
			if rand.Float64() < b.churn {
				if _, err := f.WriteAt([]byte("not what was here"), n*pageSize+4000); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// A measure is what a run took.
type measure struct {
	seconds, cpu float64
	memory       int64 // peaks of the program's processes, together
	stored       int64 // bytes that are in the bucket now and were not
}

// timed runs a line as PostgreSQL's OS user.
func (b *bench) timed(ctx context.Context, line string) (m measure, err error) {
	syscall.Sync() // nobody pays for what others wrote
	cmd := b.Command(ctx, b.Dir, "exec "+line)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	began := time.Now()
	if err := cmd.Start(); err != nil {
		return m, err
	}
	stop, peak := make(chan struct{}), make(chan int64)
	go func() { peak <- watch(cmd.Process.Pid, stop) }()
	err = cmd.Wait()
	m.seconds = time.Since(began).Seconds()
	close(stop)
	m.memory = <-peak
	m.cpu = (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
	if err != nil {
		return m, fmt.Errorf("%s: %w\n%s", line, err, said.Bytes())
	}
	return m, nil
}

// watch adds up the peaks of a process and of those it started.
func watch(pid int, stop <-chan struct{}) (sum int64) {
	peaks := make(map[int]int64)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			for _, peak := range peaks {
				sum += peak
			}
			return sum
		case <-tick.C:
			look(pid, peaks)
		}
	}
}

func look(pid int, peaks map[int]int64) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return // it has ended
	}
	if _, after, ok := bytes.Cut(status, []byte("VmHWM:")); ok {
		var kb int64
		if _, err := fmt.Sscan(string(after), &kb); err == nil {
			peaks[pid] = max(peaks[pid], kb<<10)
		}
	}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, t := range tasks {
		children, err := os.ReadFile(t)
		if err != nil {
			continue
		}
		for _, c := range strings.Fields(string(children)) {
			var child int
			if _, err := fmt.Sscan(c, &child); err == nil {
				look(child, peaks)
			}
		}
	}
}

// sizeOf adds up the files below a directory, but for those in directories of
// one name. It may be absent.
func sizeOf(dir, without string) (size int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		if d.IsDir() && d.Name() == without {
			return fs.SkipDir
		}
		info, err := d.Info()
		if err == nil && d.Type().IsRegular() {
			size += info.Size()
		}
		return err
	})
	return size, err
}

func last[T any](all []T) T { return all[len(all)-1] }

func mb(bytes int64) float64 { return float64(bytes) / (1 << 20) }

func median(values []float64) float64 {
	sorted, n := slices.Sorted(slices.Values(values)), len(values)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// of takes one number of each measure.
func of(all []measure, what func(measure) float64) (values []float64) {
	for _, m := range all {
		values = append(values, what(m))
	}
	return values
}

func seconds(all []measure) float64 {
	return median(of(all, func(m measure) float64 { return m.seconds }))
}

func memory(all []measure) (peak int64) {
	for _, m := range all {
		peak = max(peak, m.memory)
	}
	return peak
}

// print writes a table, with ratios of medians to those of some arms.
func print(title string, s step, arms []*arm, to ...*arm) {
	fmt.Printf("\n%s:\n\n| | s, median | least | most | CPU s | peak MB | stored MB |", title)
	for _, t := range to {
		fmt.Printf(" time, %.1s = 1 |", t.title)
	}
	fmt.Printf("\n| --- |%s\n", strings.Repeat(" ---: |", 6+len(to)))
	for _, a := range arms {
		all := a.results[s]
		times := of(all, func(m measure) float64 { return m.seconds })
		stored := "-"
		if s < restored {
			stored = fmt.Sprintf("%.2f", median(of(all, func(m measure) float64 { return mb(m.stored) })))
		}
		fmt.Printf("| %s | %.2f | %.2f | %.2f | %.2f | %d | %s |", a.title, median(times), slices.Min(times), slices.Max(times),
			median(of(all, func(m measure) float64 { return m.cpu })), memory(all)>>20, stored)
		for _, t := range to {
			fmt.Printf(" %.2f |", median(times)/seconds(t.results[s]))
		}
		fmt.Println()
	}
}

// processor is the name of the machine's.
func processor() string {
	b, err := exec.Command("sh", "-c", "sed -n 's/^model name[^:]*: //p' /proc/cpuinfo | head -1").Output()
	if err != nil {
		return "?"
	}
	return cmp.Or(strings.TrimSpace(string(b)), "?")
}
