// Command benchwal measures pgkeep-wal beside pgBackRest and cp in one run, on
// the same segments and the same S3 server over TLS, and prints a table.
//
// Who is compared takes turns, so that a machine that slows down slows all of
// them. Seconds belong to the machine; the ratios of medians are the result.
package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/compare"
	"github.com/pgkeep/pgkeep/internal/lab"
)

func main() {
	var o options
	flag.IntVar(&o.pairs, "pairs", 15, "segments pushed one by one; 0: do not measure this")
	flag.DurationVar(&o.delay, "delay", 5*time.Millisecond, "pushed one by one a second time, with a network that takes so long each way; 0: not")
	flag.IntVar(&o.rounds, "rounds", 3, "times that the queue is drained, and that the log is replayed")
	flag.IntVar(&o.queue, "queue", 64, "segments that wait; 0: do not measure this")
	flag.IntVar(&o.replay, "replay", 200, "segments to replay; 0: do not measure this")
	flag.BoolVar(&o.strict, "strict", false, "fail if a target is missed")
	flag.Parse()
	compare.Main("benchwal", func(ctx context.Context) error { return run(ctx, o) })
}

type options struct {
	pairs, rounds, queue, replay int
	delay                        time.Duration
	strict                       bool
}

// A bench is a stopped server whose pg_wal holds the segments to measure with.
type bench struct {
	options
	*compare.Site
	base     string // a base backup from before all segments
	data     string
	segments []string
	missed   []string // targets
}

func run(ctx context.Context, o options) (err error) {
	site, err := compare.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, site.Close()) }()
	b := &bench{options: o, Site: site}
	if err := b.fill(ctx); err != nil {
		return err
	}
	fmt.Printf("%d processors (%s), the S3 server (versitygw, TLS) on the same ones; segments of 16 MiB that pgbench made\n", runtime.NumCPU(), processor())
	if err := compare.Versions(ctx, os.Stdout); err != nil {
		return err
	}
	for _, part := range []struct {
		wanted int
		do     func(context.Context) error
	}{{o.pairs, b.push}, {o.queue, b.drain}, {o.replay, b.fetch}} {
		if part.wanted > 0 {
			if err := part.do(ctx); err != nil {
				return err
			}
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

// want notes a ratio that is not what it should be.
func (b *bench) want(ok bool, format string, args ...any) {
	if !ok {
		b.missed = append(b.missed, fmt.Sprintf(format, args...))
	}
}

// fill makes the segments: a load and then transactions, with so many
// checkpoints that there are full pages in all of them.
func (b *bench) fill(ctx context.Context) error {
	dir, err := b.Mkdir("source")
	if err != nil {
		return err
	}
	pg, err := lab.StartPostgres(ctx, lab.PostgresOptions{Dir: dir, Settings: map[string]string{"wal_keep_size": "100GB", "max_wal_size": "8GB",
		"checkpoint_timeout": "30s", "synchronous_commit": "off", "shared_buffers": "256MB", "archive_mode": "off", "max_wal_senders": "4"}})
	if err != nil {
		return err
	}
	defer pg.Stop()
	b.base, b.data = filepath.Join(b.Dir, "base"), pg.DataDir
	if out, err := pg.Command(ctx, "pg_basebackup", "-d", pg.Conninfo(), "-D", b.base, "-X", "none", "-c", "fast", "--no-sync").CombinedOutput(); err != nil {
		return fmt.Errorf("pg_basebackup: %w\n%s", err, out)
	}
	begin, err := b.segmentsOf(b.data)
	if err != nil {
		return err
	}
	for step := 0; ; step++ {
		args := []string{"-h", filepath.Join(dir, "run"), "-U", "postgres", "-n", "-M", "prepared", "-c", "4", "-j", "2", "-T", "5", "postgres"}
		if step == 0 {
			args = []string{"-h", filepath.Join(dir, "run"), "-U", "postgres", "-i", "-q", "-s", "30", "postgres"}
		}
		if out, err := pg.Command(ctx, "pgbench", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("pgbench: %w\n%s", err, out)
		}
		all, err := b.segmentsOf(b.data)
		if err != nil {
			return err
		}
		b.segments = all[len(begin)-1 : len(all)-1] // the last is not complete
		if step > 0 && len(b.segments) >= max(b.pairs+warm+50, b.queue+50, b.replay) {
			break
		}
		if err := pg.Exec(ctx, "postgres", "CHECKPOINT"); err != nil {
			return err
		}
	}
	return pg.Exec(ctx, "postgres", "SELECT pg_switch_wal()")
}

// segmentsOf lists what was written, without what lies there for later use.
func (b *bench) segmentsOf(pgdata string) ([]string, error) {
	dir := os.DirFS(filepath.Join(pgdata, "pg_wal"))
	names, err := fs.Glob(dir, "????????????????????????")
	if err != nil {
		return nil, err
	}
	var written []string
	for _, name := range names {
		f, err := dir.Open(name)
		if err != nil {
			return nil, err
		}
		head := make([]byte, 16)
		_, err = f.Read(head)
		f.Close()
		if err != nil {
			return nil, err
		}
		// A recycled file still has the address of what it was before.
		log, _ := strconv.ParseUint(name[8:16], 16, 32)
		seg, _ := strconv.ParseUint(name[16:], 16, 32)
		if addr := uint64(head[8]) | uint64(head[9])<<8 | uint64(head[10])<<16 | uint64(head[11])<<24 | uint64(head[12])<<32; addr == log<<32|seg<<24 {
			written = append(written, name)
		}
	}
	return written, nil
}

// A cluster is a data directory with what an archive_command looks at.
func (b *bench) cluster(ctx context.Context, name string, segments []string) (pgdata string, err error) {
	dir, err := b.Mkdir(name)
	if err != nil {
		return "", err
	}
	pgdata = filepath.Join(dir, "data")
	line := fmt.Sprintf("mkdir -p -m 700 %[1]s/pg_wal/archive_status && cp -a PG_VERSION global %[1]s && cd pg_wal && ln %[2]s %[1]s/pg_wal", pgdata, strings.Join(segments, " "))
	return pgdata, b.Run(ctx, b.data, line)
}

// warm is the number of pushes before those that count.
const warm = 2

// push compares one segment after the other.
func (b *bench) push(ctx context.Context) error {
	if err := b.pushed(ctx, "push", b.S3.Endpoint, ""); err != nil || b.delay == 0 {
		return err
	}
	u, err := url.Parse(b.S3.Endpoint)
	if err != nil {
		return err
	}
	far, err := lab.StartProxy(u.Host)
	if err != nil {
		return err
	}
	defer far.Close()
	far.Delay.Store(int64(b.delay))
	_, port, err := net.SplitHostPort(far.Addr)
	if err != nil {
		return err
	}
	return b.pushed(ctx, "far", "https://localhost:"+port, fmt.Sprintf(", %v each way to the S3 server", b.delay))
}

func (b *bench) pushed(ctx context.Context, name, endpoint, how string) error {
	segments := b.segments[len(b.segments)-b.pairs-warm:]
	pgdata, err := b.cluster(ctx, name, segments)
	if err != nil {
		return err
	}
	plain, err := b.PgKeep(ctx, name+"-plain", compare.Options{Endpoint: endpoint})
	if err != nil {
		return err
	}
	sealed, err := b.PgKeep(ctx, name+"-age", compare.Options{Endpoint: endpoint, Encrypted: true})
	if err != nil {
		return err
	}
	other, err := b.PgBackRest(ctx, name+"-pgbackrest", pgdata, compare.Options{Endpoint: endpoint})
	if err != nil {
		return err
	}
	level3, err := b.PgBackRest(ctx, name+"-pgbackrest-3", pgdata, compare.Options{Endpoint: endpoint, Level: 3})
	if err != nil {
		return err
	}
	cipher, err := b.PgBackRest(ctx, name+"-pgbackrest-aes", pgdata, compare.Options{Endpoint: endpoint, Encrypted: true})
	if err != nil {
		return err
	}
	arms := []*arm{{title: "pgkeep-wal push, `encryption: none`", Archiver: plain}, {title: "pgkeep-wal push, age", Archiver: sealed},
		{title: "A: pgbackrest archive-push, zstd level 1", Archiver: other}, {title: "B: pgbackrest archive-push, zstd level 3, its default", Archiver: level3},
		{title: "C: pgbackrest archive-push, zstd level 1, aes-256-cbc", Archiver: cipher}}
	for i, s := range segments {
		for j := range arms {
			a := arms[(i+j)%len(arms)]
			if err := a.once(ctx, b.Site, pgdata, s, i >= warm); err != nil {
				return err
			}
		}
	}
	print(fmt.Sprintf("One segment at a time, %d of them%s", b.pairs, how), "ms for a segment", 1000, arms, arms[2], arms[3], arms[4])
	r := arms[0].median() / arms[2].median()
	b.want(r <= 0.6, "pushing takes %.2f of pgBackRest's time%s; at most 0.60", r, how)
	b.want(max(arms[0].memory, arms[1].memory) <= 80<<20, "pushing takes %d MB", max(arms[0].memory, arms[1].memory)>>20)
	return nil
}

// An arm is one of those that are compared, and what it took.
type arm struct {
	compare.Archiver
	title   string
	seconds []float64
	cpu     []float64 // seconds of processors, of what can be counted
	memory  int64     // most at any time, bytes
}

func (a *arm) median() float64 { return median(a.seconds) }

func median(values []float64) float64 {
	sorted, n := slices.Sorted(slices.Values(values)), len(values)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// once archives a segment as PostgreSQL does.
func (a *arm) once(ctx context.Context, site *compare.Site, pgdata, segment string, counts bool) error {
	cmd := site.Command(ctx, pgdata, strings.ReplaceAll(a.Archive, "%p", "pg_wal/"+segment))
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	began := time.Now()
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s: archive %s: %w\n%s", a.title, segment, err, said.Bytes())
	}
	if counts {
		a.seconds = append(a.seconds, time.Since(began).Seconds())
		a.cpu = append(a.cpu, (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds())
	}
	a.memory = max(a.memory, cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss<<10)
	return nil
}

// drain compares how fast a queue becomes empty.
func (b *bench) drain(ctx context.Context) error {
	segments := b.segments[len(b.segments)-b.queue:]
	arms := []*arm{{title: "pgkeep-wal push, `encryption: none`"}, {title: "pgkeep-wal push, age"}, {title: "A: pgbackrest archive-push, zstd level 1"},
		{title: "B: the same, archive-async=y, process-max=2"}}
	for round := range b.rounds {
		for j := range arms {
			which := (round + j) % len(arms)
			a, name := arms[which], fmt.Sprintf("queue-%d-%d", round, which)
			pgdata, err := b.cluster(ctx, name+"-server", segments)
			if err != nil {
				return err
			}
			switch which {
			case 0, 1:
				a.Archiver, err = b.PgKeep(ctx, name, compare.Options{Encrypted: which == 1})
			case 2:
				a.Archiver, err = b.PgBackRest(ctx, name, pgdata, compare.Options{})
			case 3:
				a.Archiver, err = b.PgBackRest(ctx, name, pgdata, compare.Options{Settings: []string{"archive-async=y", "process-max=2"}})
			}
			if err != nil {
				return err
			}
			if err := a.empty(ctx, b.Site, pgdata, segments); err != nil {
				return err
			}
			if err := os.RemoveAll(a.Root); err != nil {
				return err
			}
		}
	}
	print(fmt.Sprintf("A queue of %d segments, drained %d times as PostgreSQL's archiver does it", b.queue, b.rounds), "ms for a segment", 1000/float64(b.queue), arms, arms[2], arms[3])
	sync, async := arms[2].median()/arms[0].median(), arms[3].median()/arms[0].median()
	b.want(sync >= 2, "a queue drains %.2f times as fast as pgBackRest's; at least 2", sync)
	b.want(async >= 1, "a queue drains %.2f times as fast as pgBackRest's asynchronous one; at least 1", async)
	b.want(max(arms[0].memory, arms[1].memory) <= 80<<20, "a queue takes %d MB", max(arms[0].memory, arms[1].memory)>>20)
	return nil
}

// empty does as PostgreSQL's archiver: oldest first, one command at a time, and
// .ready becomes .done (pgarch.c).
func (a *arm) empty(ctx context.Context, site *compare.Site, pgdata string, segments []string) error {
	status := filepath.Join(pgdata, "pg_wal", "archive_status")
	for _, s := range segments {
		if err := site.Run(ctx, status, "touch "+s+".ready"); err != nil {
			return err
		}
	}
	// Files that wait were complete a while ago.
	select {
	case <-time.After(aged):
	case <-ctx.Done():
		return ctx.Err()
	}
	watched, stop := context.WithCancel(ctx)
	peak := make(chan int64)
	go func() { peak <- watch(watched, filepath.Base(strings.Fields(a.Archive)[0])) }()
	began := time.Now()
	var err error
	for _, s := range segments {
		if err = a.once(ctx, site, pgdata, s, false); err != nil {
			break
		}
		if err = os.Rename(filepath.Join(status, s+".ready"), filepath.Join(status, s+".done")); err != nil {
			break
		}
	}
	a.seconds = append(a.seconds, time.Since(began).Seconds())
	stop()
	a.memory = max(a.memory, <-peak)
	return err
}

const (
	aged    = 5 * time.Second       // the files of a queue, at least
	looking = 50 * time.Millisecond // between looks, which take processors too
)

// watch returns the most memory that the processes of a program had together.
func watch(ctx context.Context, program string) (peak int64) {
	others := make(map[string]bool)
	tick := time.NewTicker(looking)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return peak
		case <-tick.C:
			peak = max(peak, resident(program, others))
		}
	}
}

// resident is what the processes of a program hold now: of what they share, once.
// others are those known to be of another.
func resident(program string, others map[string]bool) int64 {
	var own, shared int64 // pages
	dir, err := os.Open("/proc")
	if err != nil {
		return 0
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1) // one call for each of them would be too dear
	for _, pid := range names {
		if pid[0] < '0' || pid[0] > '9' || others[pid] {
			continue
		}
		comm, err := os.ReadFile(filepath.Join("/proc", pid, "comm"))
		if err != nil {
			continue // it has ended
		}
		if name := strings.TrimSpace(string(comm)); name != program {
			others[pid] = name != "sh" && name != "benchwal" // which become the program
			continue
		}
		statm, err := os.ReadFile(filepath.Join("/proc", pid, "statm"))
		if fields := strings.Fields(string(statm)); err == nil && len(fields) > 2 {
			all, _ := strconv.ParseInt(fields[1], 10, 64)
			files, _ := strconv.ParseInt(fields[2], 10, 64)
			own, shared = own+all-files, max(shared, files)
		}
	}
	return (own + shared) * int64(os.Getpagesize())
}

// fetch compares how long a server replays what restore_command brings.
func (b *bench) fetch(ctx context.Context) error {
	segments := b.segments[:b.replay]
	pgdata, err := b.cluster(ctx, "replay", segments)
	if err != nil {
		return err
	}
	local, err := b.Mkdir("local")
	if err != nil {
		return err
	}
	if err := b.Run(ctx, filepath.Join(pgdata, "pg_wal"), "cp "+strings.Join(segments, " ")+" "+local); err != nil {
		return err
	}
	sealed, err := b.PgKeep(ctx, "replay-age", compare.Options{Encrypted: true})
	if err != nil {
		return err
	}
	arms := []*arm{{title: "pgkeep-wal fetch, age", Archiver: sealed}, {title: "A: cp from a local directory", Archiver: compare.Archiver{Restore: "cp " + local + "/%f %p"}}}
	if err := (&arm{title: "fill", Archiver: sealed}).empty(ctx, b.Site, pgdata, segments); err != nil {
		return err
	}
	for round := range b.rounds {
		for j := range arms {
			if err := arms[(round+j)%len(arms)].recover(ctx, b, segments[len(segments)-1]); err != nil {
				return err
			}
		}
	}
	print(fmt.Sprintf("Replay of %d segments, %d times", b.replay, b.rounds), "s for all", 1, arms, arms[1])
	r := arms[0].median() / arms[1].median()
	b.want(r <= 1.2, "replay takes %.2f of the time of a local directory; at most 1.20", r)
	return nil
}

var redo = regexp.MustCompile(`redo done at \S+ system usage: .* elapsed: ([0-9.]+) s`)

// recover replays to the end, and takes the server's word for how long it took.
func (a *arm) recover(ctx context.Context, b *bench, last string) error {
	dir, err := b.Mkdir("recovered")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if _, err := b.Copy(ctx, b.base, "recovered/data"); err != nil {
		return err
	}
	if _, err := b.Write("recovered/data/recovery.signal", ""); err != nil {
		return err
	}
	program := filepath.Base(strings.Fields(a.Restore)[0])
	watched, stop := context.WithCancel(ctx)
	peak := make(chan int64)
	go func() { peak <- watch(watched, program) }()
	began := time.Now()
	pg, err := lab.StartPostgres(ctx, lab.PostgresOptions{Dir: dir, Settings: map[string]string{
		"hot_standby": "off", "restore_command": a.Restore, "shared_buffers": "256MB", "max_wal_size": "8GB"}})
	took := time.Since(began)
	stop()
	if program != "cp" {
		a.memory = max(a.memory, <-peak)
	} else {
		<-peak
	}
	if err != nil {
		return fmt.Errorf("%s: %w", a.title, err)
	}
	defer pg.Stop()
	log, err := os.ReadFile(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	m := redo.FindSubmatch(log)
	if m == nil || !bytes.Contains(log, []byte(`restored log file "`+last+`"`)) {
		return fmt.Errorf("%s: did not replay to %s within %v:\n%s", a.title, last, took, log)
	}
	s, err := strconv.ParseFloat(string(m[1]), 64)
	a.seconds = append(a.seconds, s)
	return err
}

// print writes a table, with ratios of medians to those of some arms.
func print(title, unit string, scale float64, arms []*arm, to ...*arm) {
	fmt.Printf("\n%s:\n\n| | %s, median | least | most | CPU | peak MB |", title, unit)
	for _, t := range to {
		fmt.Printf(" time, %.1s = 1 |", t.title)
	}
	fmt.Printf("\n| --- |%s\n", strings.Repeat(" ---: |", 5+len(to)))
	for _, a := range arms {
		memory, cpu := "-", "-"
		if a.memory > 0 {
			memory = strconv.FormatInt(a.memory>>20, 10)
		}
		if len(a.cpu) > 0 {
			cpu = fmt.Sprintf("%.4g", scale*median(a.cpu))
		}
		fmt.Printf("| %s | %.4g | %.4g | %.4g | %s | %s |", a.title, scale*a.median(), scale*slices.Min(a.seconds), scale*slices.Max(a.seconds), cpu, memory)
		for _, t := range to {
			fmt.Printf(" %.2f |", a.median()/t.median())
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
