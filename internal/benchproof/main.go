// Command benchproof measures a restore test beside the same work by hand: a
// restore, the replay of the log, and pg_amcheck. Both take turns; the ratio of
// their medians is the result.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
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
	flag.IntVar(&o.scale, "scale", 130, "of pgbench; 1 is 15 MB")
	flag.IntVar(&o.segments, "segments", 64, "of log that are replayed")
	flag.IntVar(&o.rounds, "rounds", 3, "times that everything is measured")
	flag.BoolVar(&o.thorough, "thorough", false, "every row is looked for in every index: restore-test --thorough, pg_amcheck --heapallindexed")
	flag.Parse()
	compare.Main("benchproof", func(ctx context.Context) error { return run(ctx, o) })
}

type options struct {
	scale, segments, rounds int
	thorough                bool
}

type bench struct {
	options
	*compare.Site
	pg      *lab.Postgres
	archive string // the script that archive_command runs
	line    string // pgkeep with its configuration
}

func run(ctx context.Context, o options) (err error) {
	site, err := compare.Open(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, site.Close()) }()
	b := &bench{options: o, Site: site}
	program, err := b.Build(ctx, "pgkeep")
	if err != nil {
		return err
	}
	if err := b.fill(ctx, program); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.pg.Stop()) }()
	var hand, test []time.Duration
	for round := range o.rounds {
		if round%2 == 0 {
			hand, err = add(hand, func() (time.Duration, error) { return b.byHand(ctx, round) })
		}
		if err == nil {
			test, err = add(test, func() (time.Duration, error) { return b.test(ctx) })
		}
		if err == nil && round%2 == 1 {
			hand, err = add(hand, func() (time.Duration, error) { return b.byHand(ctx, round) })
		}
		if err != nil {
			return err
		}
	}
	fmt.Printf("%d processors; median of %d: by hand %.1f s, restore test %.1f s, ratio %.2f\n", runtime.NumCPU(), o.rounds,
		median(hand).Seconds(), median(test).Seconds(), median(test).Seconds()/median(hand).Seconds())
	return nil
}

func add(all []time.Duration, measure func() (time.Duration, error)) ([]time.Duration, error) {
	syscall.Sync() // nobody pays for what others wrote
	d, err := measure()
	return append(all, d), err
}

func median(all []time.Duration) time.Duration {
	all = slices.Sorted(slices.Values(all))
	return all[len(all)/2]
}

// fill makes a cluster, a backup of it, and the log behind that.
func (b *bench) fill(ctx context.Context, program string) error {
	dir, err := b.Mkdir("source")
	if err != nil {
		return err
	}
	b.archive = filepath.Join(b.Dir, "archive")
	if _, err := b.Write("archive", "exit 0\n"); err != nil {
		return err
	}
	b.pg, err = lab.StartPostgres(ctx, lab.PostgresOptions{Dir: dir, Settings: map[string]string{"shared_buffers": "256MB", "max_wal_size": "4GB",
		"archive_mode": "on", "archive_command": "sh " + b.archive + " %p", "autovacuum": "off", "synchronous_commit": "off", "full_page_writes": "off"}})
	if err != nil {
		return err
	}
	if out, err := b.pg.Command(ctx, "pgbench", "-h", filepath.Join(dir, "run"), "-U", "postgres", "-i", "-q", "-s", fmt.Sprint(b.scale), "postgres").CombinedOutput(); err != nil {
		return fmt.Errorf("pgbench: %w\n%s", err, out)
	}
	to, err := b.PgKeep(ctx, "repository", compare.Options{Conninfo: b.pg.Conninfo()})
	if err != nil {
		return err
	}
	tests, err := b.Mkdir("t")
	if err != nil {
		return err
	}
	b.line = "PGKEEP_RESTORE_TEST_DIRECTORY=" + tests + " " + program + " --config " + to.Config
	if _, err := b.Write("archive", strings.ReplaceAll(to.Archive, "%p", `"$1"`)+"\n"); err != nil {
		return err
	}
	if err := b.Run(ctx, b.Dir, b.line+" backup --direct main"); err != nil {
		return err
	}
	for n := 0; n < b.segments; n++ {
		sql := fmt.Sprintf(`DO $$ DECLARE at pg_lsn := pg_current_wal_lsn(); i int := %d; BEGIN
			WHILE pg_current_wal_lsn() - at < 16000000 LOOP
				UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid BETWEEN i AND i + 999; i := i + 1000;
			END LOOP; END $$`, 1+n*50_000%(b.scale*100_000))
		if err := b.pg.Exec(ctx, "postgres", sql); err != nil {
			return err
		}
	}
	if err := b.pg.Exec(ctx, "postgres", "SELECT pg_switch_wal()"); err != nil {
		return err
	}
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		left, err := filepath.Glob(filepath.Join(b.pg.DataDir, "pg_wal/archive_status/*.ready"))
		if err != nil || len(left) == 0 {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d segments are still to be archived", len(left))
		}
	}
}

// byHand does what an administrator would.
func (b *bench) byHand(ctx context.Context, round int) (took time.Duration, err error) {
	at, err := b.Mkdir(fmt.Sprintf("hand-%d", round))
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(at)
	data := filepath.Join(at, "data")
	bin := filepath.Dir(b.pg.Command(ctx, "pg_ctl").Path)
	deep := ""
	if b.thorough {
		deep = " --heapallindexed"
	}
	var parts []string
	for _, step := range []struct{ name, line string }{
		{"restore", b.line + " restore --target-dir " + data},
		{"replay", fmt.Sprintf("%s/pg_ctl -D %s -w -t 600 -l %s/log -o \"-c unix_socket_directories=%[3]s -c listen_addresses= -c port=6000 -c shared_buffers=256MB -c max_wal_size=4GB\" start >/dev/null && until [ \"$(%[1]s/psql -h %[3]s -p 6000 -U postgres -Atc 'select pg_is_in_recovery()' postgres)\" = f ]; do sleep 0.1; done", bin, data, at)},
		{"pg_amcheck", fmt.Sprintf("%s/pg_amcheck -h %s -p 6000 -U postgres --all --install-missing --jobs=2%s", bin, at, deep)},
	} {
		begun := time.Now()
		if err := b.Run(ctx, b.Dir, step.line); err != nil {
			return 0, err
		}
		took += time.Since(begun)
		parts = append(parts, fmt.Sprintf("%s %.1f", step.name, time.Since(begun).Seconds()))
	}
	fmt.Printf("by hand      %5.1f s: %s\n", took.Seconds(), strings.Join(parts, ", "))
	return took, b.Run(ctx, b.Dir, fmt.Sprintf("%s/pg_ctl -D %s -w -m immediate stop >/dev/null", bin, data))
}

// test makes a restore test. The time ends with the proof: what comes then is to
// remove the files, which is not in the time by hand.
func (b *bench) test(ctx context.Context) (took time.Duration, err error) {
	begun := time.Now()
	line := b.line + " restore-test --direct --json"
	if b.thorough {
		line += " --thorough"
	}
	out, err := b.Command(ctx, b.Dir, line).Output()
	if err != nil {
		return 0, fmt.Errorf("restore test: %w\n%s", err, out)
	}
	var res struct {
		Report struct {
			Finished time.Time `json:"finished_at"`
			Segments int
			Bytes    int64
			Indexes  int
			Compared int `json:"indexes_compared"`
			Phases   []struct {
				Name    string
				Seconds float64
			}
			Checks []struct {
				Name    string
				Seconds float64
			}
		}
	}
	if err := json.Unmarshal(out, &res); err != nil {
		return 0, err
	}
	took = res.Report.Finished.Sub(begun)
	var parts []string
	for _, p := range res.Report.Phases {
		parts = append(parts, fmt.Sprintf("%s %.1f", p.Name, p.Seconds))
	}
	for _, c := range res.Report.Checks {
		if c.Seconds >= 0.5 {
			parts = append(parts, fmt.Sprintf("(%s %.1f)", c.Name, c.Seconds))
		}
	}
	fmt.Printf("restore test %5.1f s: %s; %d segments, %d MB, %d of %d indexes compared\n", took.Seconds(), strings.Join(parts, ", "), res.Report.Segments, res.Report.Bytes>>20,
		res.Report.Compared, res.Report.Indexes)
	return took, nil
}
