package expire_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/retention"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A host is a PostgreSQL that somebody writes to all the time, and its repository.
type host struct {
	t       *testing.T
	dir     string // all below belongs to PostgreSQL's OS user
	program string // pgkeep-wal
	config  string
	repo    *repo.Repo
	store   later
	access  repo.Access
	pg      *lab.Postgres
	work

	mu    sync.Mutex // held while a row is being committed
	ticks int        // rows that were acknowledged, numbered from 1
	conn  *pgx.Conn
}

// work is what a host does beside its rows: with the n-th, those of so many others
// change of which the number is n, modulo groups, each on a page of its own. What they
// hold tells how often.
type work struct {
	rows, groups int
	pace         time.Duration // between two
}

// later is a store whose clock goes as ours does, which is ahead.
type later struct {
	store.Store
	by *time.Duration
}

func (l later) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		for o, err := range l.Store.List(ctx, prefix, after) {
			if strings.Contains(o.Key, "/clock-") {
				o.Modified = o.Modified.Add(*l.by)
			}
			if !yield(o, err) {
				return
			}
		}
	}
}

func newHost(t *testing.T, w work) *host {
	t.Helper()
	h := &host{t: t, dir: lab.DirForTest(t), work: w}
	h.program = filepath.Join(h.dir, "pgkeep-wal")
	h.must(lab.Build(t.Context(), h.dir, "pgkeep-wal"))
	signer, err := seal.NewSigner()
	h.must(err)
	h.config = filepath.Join(h.dir, "pgkeep.yaml")
	h.must(os.WriteFile(filepath.Join(h.dir, "signing.key"), []byte(signer.Secret()), 0o600))
	h.must(os.WriteFile(h.config, fmt.Appendf(nil, `
repository: {url: 'file://%[1]s/repository', encryption: none}
keys: {signing_key: %[1]s/signing.key}
clusters: {main: {conninfo: "host=/nowhere"}}
`, h.dir), 0o600))
	h.must(os.Mkdir(filepath.Join(h.dir, "repository"), 0o700))
	cfg, err := config.Load(config.Options{File: h.config, Hostname: "db1"})
	h.must(err)
	st, err := open.Store(t.Context(), cfg.Repository)
	h.must(err)
	h.store = later{st, new(time.Duration)}
	h.access, err = open.Access(cfg, "test")
	h.must(err)
	h.repo, _, err = repo.Init(t.Context(), h.store, h.access, nil, time.Now())
	h.must(err)
	h.must(lab.Own(h.dir))
	h.pg = lab.PostgresForTest(t, lab.PostgresOptions{WALSegmentMB: 1, Settings: map[string]string{"wal_keep_size": "200MB",
		"archive_mode": "on", "archive_command": h.program + " push --config " + h.config + " %p"}})
	h.must(h.pg.Exec(t.Context(), "postgres", "CREATE TABLE ticks (id int PRIMARY KEY)",
		fmt.Sprintf("CREATE TABLE work WITH (fillfactor = 80) AS SELECT i, 0 AS n, repeat(md5(i || ':0'), 20) AS x FROM generate_series(1, %d) i ORDER BY md5(i::text)", w.rows),
		fmt.Sprintf("CREATE INDEX ON work ((i %% %d))", w.groups), "ANALYZE work"))
	h.conn, err = h.pg.Connect(t.Context(), "postgres")
	h.must(err)
	return h
}

func (h *host) open(context.Context) (*repo.Repo, error) { return h.repo, nil }

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// load commits one row after the other, and other work, until stop is called.
func (h *host) load() (stop func()) {
	ctx, cancel := context.WithCancel(h.t.Context())
	failed := make(chan error, 1)
	go func() {
		var err error
		for last := false; err == nil && !last; { // one more after stop, so that the log goes on behind every mark
			last = ctx.Err() != nil
			h.mu.Lock()
			next := h.ticks + 1
			_, err = h.conn.Exec(context.WithoutCancel(ctx), fmt.Sprintf("INSERT INTO ticks VALUES (%d); UPDATE work SET n = n + 1, x = repeat(md5(i || ':' || n + 1), 20) WHERE i %% %d = %d", next, h.groups, next%h.groups))
			if err == nil {
				h.ticks = next
			}
			h.mu.Unlock()
			select {
			case <-time.After(h.pace):
			case <-ctx.Done():
			}
		}
		failed <- err
	}()
	return func() {
		cancel()
		h.must(<-failed)
	}
}

// A mark is a moment, and how many rows were committed by then.
type mark struct {
	at    time.Time
	ticks int
}

// mark waits for some rows more, and takes one when no commit is under way.
func (h *host) mark() (m mark) {
	h.t.Helper()
	for begun := h.count(); h.count() < begun+20; {
		select {
		case <-time.After(time.Millisecond):
		case <-h.t.Context().Done():
			h.t.Fatal(h.t.Context().Err())
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.must(h.conn.QueryRow(h.t.Context(), "SELECT clock_timestamp()").Scan(&m.at))
	m.ticks = h.ticks
	return m
}

func (h *host) count() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.ticks
}

// A taken backup, with how many rows were there before it and after.
type taken struct {
	id            repo.ID
	before, after int
}

func (h *host) take() (b taken) {
	h.t.Helper()
	ctx := h.t.Context()
	began := time.Now().UTC()
	b = taken{id: repo.NewID(began, fmt.Sprintf("%08x", began.Nanosecond())), before: h.count()}
	p := backup.Physical{Name: "main", Host: "db1", Cluster: cluster.Cluster{Conninfo: h.pg.Conninfo() + " dbname=postgres"}, Spool: h.t.TempDir(),
		Open: h.open, Log: slog.New(slog.DiscardHandler), WALWait: time.Minute}
	_, err := p.Preflight(ctx, b.id, began, backup.Owner{})
	h.must(err)
	_, err = p.Copy(ctx, b.id, func(repo.Progress) {})
	h.must(err)
	h.must(lab.Own(filepath.Join(h.dir, "repository")))
	_, err = p.WaitWAL(ctx, b.id, func(int64, int64) {})
	h.must(err)
	_, err = p.Publish(ctx, b.id, backup.Published{Started: began, Verified: repo.VerifiedContent})
	h.must(err)
	h.must(lab.Own(filepath.Join(h.dir, "repository")))
	b.after = h.count()
	return b
}

// archived waits until all that was written so far is in the archive.
func (h *host) archived() {
	h.t.Helper()
	var segment string
	h.must(h.conn.QueryRow(h.t.Context(), "SELECT pg_walfile_name(pg_switch_wal())").Scan(&segment))
	for deadline := time.Now().Add(time.Minute); ; {
		var done bool
		h.must(h.conn.QueryRow(h.t.Context(), "SELECT coalesce(last_archived_wal >= $1, false) FROM pg_stat_archiver", segment).Scan(&done))
		if done {
			return
		}
		if time.Now().After(deadline) {
			h.t.Fatalf("%s was not archived within a minute", segment)
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-h.t.Context().Done():
			h.t.Fatal(h.t.Context().Err())
		}
	}
}

// expire lets go, so long from now, what a policy does not keep whose window begins
// at that moment.
func (h *host) expire(in time.Duration, edge time.Time) expire.Done {
	h.t.Helper()
	now := time.Now().Add(in)
	*h.store.by = in
	x := &expire.Expirer{Name: "main", Policy: retention.Policy{Window: now.Sub(edge) - retention.Skew, Min: 1, Grace: time.Hour},
		Open: h.open}
	plan, err := x.PlanAt(h.t.Context(), now)
	h.must(err)
	done, err := x.ApplyAt(h.t.Context(), expire.Order{Backups: plan.Removals(), Confirm: plan.Confirm}, now)
	h.must(err)
	h.must(lab.Own(filepath.Join(h.dir, "repository")))
	return done
}

// restored restores, lets PostgreSQL judge the files, opens, and returns how many
// rows there are; they are the first ones, without a gap, and all others are what
// these have made of them.
func (h *host) restored(name string, p restore.Physical) (ticks int) {
	h.t.Helper()
	dir := filepath.Join(h.dir, name)
	h.must(os.Mkdir(dir, 0o700))
	h.must(lab.Own(dir))
	p.Repo, p.Cluster, p.Action, p.Dir = h.repo, "main", restore.Promote, filepath.Join(dir, "data")
	p.Fetch = []string{h.program, "fetch", "--timeout", "5s", "--config", h.config, "--cluster", "main"}
	plan, err := p.Plan(h.t.Context())
	if err != nil {
		h.t.Fatalf("%s: %v; %s", name, err, fail.HintOf(err))
	}
	_, err = p.Run(h.t.Context(), plan)
	h.must(err)
	if out, err := h.pg.Command(h.t.Context(), "pg_verifybackup", "--no-parse-wal", p.Dir).CombinedOutput(); err != nil {
		h.t.Errorf("%s: pg_verifybackup: %v\n%s", name, err, out)
	}
	server, err := lab.StartPostgres(h.t.Context(), lab.PostgresOptions{Dir: dir, Settings: map[string]string{"hot_standby": "off"}})
	if err != nil {
		log, _ := os.ReadFile(filepath.Join(dir, "log"))
		h.t.Fatalf("%s: %v\n%.4000s", name, err, log)
	}
	defer func() { h.must(server.Stop()) }()
	conn, err := server.Connect(h.t.Context(), "postgres")
	h.must(err)
	defer conn.Close(context.WithoutCancel(h.t.Context()))
	var last, right, all int
	h.must(conn.QueryRow(h.t.Context(), "SELECT count(*), coalesce(max(id), 0) FROM ticks").Scan(&ticks, &last))
	h.must(conn.QueryRow(h.t.Context(), fmt.Sprintf("SELECT count(*) FILTER (WHERE n = (%d + %[2]d - 1 - (i + %[2]d - 1) %% %[2]d) / %[2]d AND x = repeat(md5(i || ':' || n), 20)), count(*) FROM work", ticks, h.groups)).Scan(&right, &all))
	if ticks != last || right != h.rows || all != h.rows {
		h.t.Errorf("%s: %d rows up to %d, and of %d others, of which there are %d, %d are what these have made of them", name, ticks, last, h.rows, all, right)
	}
	return ticks
}

// Backups under load; then a window that shrinks to the middle of what there is, a
// grace, and one run more: what is listed restores, so do the edges of what is
// promised, and what is not promised any more is refused. PostgreSQL opens each with
// the rows of that moment.
func TestAWindowShrinksAndItsEdgesAreThere(t *testing.T) {
	h := newHost(t, work{rows: 8000, groups: 97})
	stop := h.load()
	var backups []taken
	var marks []mark
	for range 4 {
		backups = append(backups, h.take())
		marks = append(marks, h.mark(), h.mark())
	}
	stop()
	h.archived()
	edge, before := marks[3], marks[1] // the second after the second backup; one before that
	packs := func(b taken) (n int) {
		for _, err := range h.store.List(t.Context(), "clusters/main/packs/"+string(b.id)+"/", "") {
			h.must(err)
			n++
		}
		return n
	}
	if done := h.expire(time.Hour, backups[0].id.Time().Add(-time.Hour)); len(done.Marked) > 0 || len(done.WAL) > 0 {
		t.Errorf("while the window is wide: %+v", done)
	}
	if done := h.expire(2*time.Hour, edge.at); !slices.Equal(done.Marked, []repo.ID{backups[0].id}) || len(done.WAL) > 0 {
		t.Errorf("when it shrinks: %+v, want %s marked and nothing removed", done, backups[0].id)
	}
	shared := packs(backups[0])
	done := h.expire(3*time.Hour+time.Minute, edge.at)
	if !slices.Equal(done.Swept.Backups, []repo.ID{backups[0].id}) || len(done.WAL) != 1 || done.WAL[0].Objects == 0 {
		t.Errorf("when the grace has passed: %+v, want %s swept, and log removed", done, backups[0].id)
	}
	if left := packs(backups[0]); left == 0 || left > shared {
		t.Errorf("of %d packs of the backup that went %d are left, and others share some", shared, left)
	}

	list, err := h.repo.Backups(t.Context(), "main")
	h.must(err)
	if len(list) != 3 {
		t.Fatalf("%d backups are listed, want 3", len(list))
	}
	for i, b := range backups[1:] {
		got := h.restored(fmt.Sprintf("backup %d", i+1), restore.Physical{Backup: b.id, Target: restore.Target{Kind: restore.Immediate}})
		if list[i].ID != b.id || got < b.before || got > b.after {
			t.Errorf("backup %s: %d rows, want %d to %d", b.id, got, b.before, b.after)
		}
	}
	for name, m := range map[string]mark{"the edge": edge, "the last moment": marks[len(marks)-1]} {
		if got := h.restored(name, restore.Physical{Target: restore.Target{Kind: restore.ToTime, Time: m.at}}); got != m.ticks {
			t.Errorf("%s: %d rows, want %d", name, got, m.ticks)
		}
	}
	gone := restore.Physical{Repo: h.repo, Cluster: "main", Dir: filepath.Join(h.dir, "gone"), Fetch: []string{h.program, "fetch", "--config", h.config}, Target: restore.Target{Kind: restore.ToTime, Time: before.at}}
	if _, err := gone.Plan(t.Context()); !errors.Is(err, fail.Unreachable) {
		t.Errorf("a moment before the window: %v, want it refused", err)
	}
}
