package restore_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/sandbox"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// program is pgkeep-wal, built once for the package.
var program string

func TestMain(m *testing.M) {
	sandbox.Enter()
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "pgkeep-restore-")
		if err == nil {
			err = os.Chmod(dir, 0o755)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		program = filepath.Join(dir, "pgkeep-wal")
		if err := lab.Build(context.Background(), dir, "pgkeep-wal"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}())
}

// A site is a cluster that archives small segments into a repository, and what
// it did.
type site struct {
	t      testing.TB
	dir    string // all below belongs to PostgreSQL's OS user
	config string
	repo   *repo.Repo
	store  store.Store
	access repo.Access
	major  int           // version of its servers; 0: the newest installed
	pg     *lab.Postgres // the primary of the moment
	seq    int           // rows written so far
	backup int
	space  string // OID of the tablespace
}

// newSite makes a cluster with a tablespace and a table, the ledger.
func newSite(t testing.TB) *site {
	t.Helper()
	return newSiteOf(t, 0)
}

func newSiteOf(t testing.TB, major int, env ...string) *site {
	t.Helper()
	s := &site{t: t, dir: lab.DirForTest(t), major: major}
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	s.write("signing.key", signer.Secret())
	s.config = s.write("pgkeep.yaml", fmt.Sprintf(`
repository: {url: 'file://%[1]s/repository', encryption: none}
keys: {signing_key: %[1]s/signing.key}
clusters: {main: {conninfo: "host=/nowhere"}}
`, s.dir))
	cfg, err := config.Load(config.Options{File: s.config, Hostname: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(s.dir, "repository"), 0o700); err != nil {
		t.Fatal(err)
	}
	if s.store, err = open.Store(t.Context(), cfg.Repository); err != nil {
		t.Fatal(err)
	}
	if s.access, err = open.Access(cfg, "test"); err != nil {
		t.Fatal(err)
	}
	if s.repo, _, err = repo.Init(t.Context(), s.store, s.access, nil, time.Now()); err != nil {
		t.Fatal(err)
	}
	s.own()
	s.pg = lab.PostgresForTest(t, lab.PostgresOptions{Version: major, WALSegmentMB: 1, Settings: settings(s.archiving()), Env: env})
	space := s.mkdir("space")
	s.exec("CREATE TABLE ledger (seq int PRIMARY KEY, x text)",
		"ALTER TABLE ledger ALTER x SET STORAGE external",
		"CREATE TABLESPACE elsewhere LOCATION '"+space+"'",
		"CREATE TABLE far (i int) TABLESPACE elsewhere",
		"INSERT INTO far SELECT generate_series(1, 1000)")
	s.space = query[string](t, s.pg, "SELECT oid::text FROM pg_tablespace WHERE spcname = 'elsewhere'")
	return s
}

func settings(more map[string]string) map[string]string {
	set := map[string]string{"autovacuum": "off", "max_prepared_transactions": "5", "wal_keep_size": "1GB", "max_wal_size": "4GB"}
	for k, v := range more {
		set[k] = v
	}
	return set
}

func (s *site) archiving() map[string]string {
	return map[string]string{"archive_mode": "on", "archive_command": program + " push --config " + s.config + " %p"}
}

func (s *site) write(name, text string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := errors.Join(os.WriteFile(path, []byte(text), 0o600), lab.Own(path)); err != nil {
		s.t.Fatal(err)
	}
	return path
}

func (s *site) mkdir(name string) string {
	s.t.Helper()
	path := filepath.Join(s.dir, name)
	if err := errors.Join(os.MkdirAll(path, 0o700), lab.Own(path)); err != nil {
		s.t.Fatal(err)
	}
	return path
}

// own gives what we wrote into the repository to PostgreSQL's OS user.
func (s *site) own() {
	s.t.Helper()
	if err := lab.Own(filepath.Join(s.dir, "repository")); err != nil {
		s.t.Fatal(err)
	}
}

func (s *site) exec(sql ...string) {
	s.t.Helper()
	if err := s.pg.Exec(s.t.Context(), "postgres", sql...); err != nil {
		s.t.Fatal(err)
	}
}

func query[T any](t testing.TB, p *lab.Postgres, sql string) (v T) {
	t.Helper()
	conn, err := p.Connect(t.Context(), "postgres")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(t.Context()))
	if err := conn.QueryRow(t.Context(), sql).Scan(&v); err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return v
}

// rows commits rows one by one, in all the ways there are: some rolled back,
// some prepared first, some in subtransactions.
func (s *site) rows(n int) {
	s.t.Helper()
	var sql []string
	for range n {
		s.seq++
		insert := fmt.Sprintf("INSERT INTO ledger SELECT %d, string_agg(md5(random()::text), '') FROM generate_series(1, %d)", s.seq, 1+s.seq*37%150)
		switch s.seq % 10 {
		case 3:
			sql = append(sql, "BEGIN; "+insert+"; ROLLBACK", "BEGIN; SAVEPOINT a; "+insert+"; SAVEPOINT b; COMMIT")
		case 5:
			sql = append(sql, "BEGIN; "+insert+"; PREPARE TRANSACTION 'x'", "COMMIT PREPARED 'x'")
		case 7:
			sql = append(sql, insert, fmt.Sprintf("SELECT pg_create_restore_point('after %d')", s.seq))
		case 8:
			sql = append(sql, insert, "BEGIN; DELETE FROM ledger; PREPARE TRANSACTION 'y'", "ROLLBACK PREPARED 'y'")
		default:
			sql = append(sql, insert)
		}
	}
	s.exec(sql...)
}

// archived waits until all that was written so far is in the archive, and
// returns the last segment of it.
func (s *site) archived() string {
	s.t.Helper()
	segment := query[string](s.t, s.pg, "SELECT pg_walfile_name(pg_switch_wal())")
	// Several go up at a time, in any order; PostgreSQL is told in theirs.
	s.until(segment+" is archived", func() bool {
		return query[bool](s.t, s.pg, "SELECT coalesce(last_archived_wal >= '"+segment+"', false) FROM pg_stat_archiver")
	})
	return segment
}

// take takes a physical backup.
func (s *site) take() repo.ID {
	s.t.Helper()
	id, _ := s.takeWith(s.physicalOf(s.pg))
	return id
}

// physicalOf is what takes physical backups of a server of the site.
func (s *site) physicalOf(server *lab.Postgres) backup.Physical {
	return backup.Physical{Name: "main", Host: "db1", Cluster: cluster.Cluster{Conninfo: server.Conninfo() + " dbname=postgres"}, Spool: s.t.TempDir(),
		Open: func(context.Context) (*repo.Repo, error) { return s.repo, nil }, Log: slog.New(slog.DiscardHandler), WALWait: time.Minute}
}

func (s *site) takeWith(b backup.Physical) (repo.ID, backup.Copied) {
	s.t.Helper()
	ctx := s.t.Context()
	s.backup++
	id, began := repo.NewID(time.Now(), fmt.Sprintf("%08x", s.backup)), time.Now().UTC()
	var c backup.Copied
	_, err := b.Preflight(ctx, id, began, backup.Owner{})
	if err == nil {
		c, err = b.Copy(ctx, id, func(repo.Progress) {})
		s.own()
	}
	if err == nil {
		_, err = b.WaitWAL(ctx, id, func(int64, int64) {})
	}
	if err == nil {
		_, err = b.Publish(ctx, id, backup.Published{Started: began, Verified: repo.VerifiedContent})
	}
	if err != nil {
		s.t.Fatalf("%v; %s", err, fail.HintOf(err))
	}
	s.own()
	return id, c
}

// physical is a restore into a directory of the site that is not there yet; its
// server's data directory is <name>/data.
func (s *site) physical(name string, target restore.Target) restore.Physical {
	s.t.Helper()
	dir := s.mkdir(name)
	return restore.Physical{Repo: s.repo, Cluster: "main", Target: target, Action: restore.Promote, Dir: filepath.Join(dir, "data"),
		Tablespaces: map[string]string{s.space: filepath.Join(dir, "space")},
		Fetch:       []string{program, "fetch", "--timeout", "5s", "--config", s.config, "--cluster", "main"}}
}

// restored plans and runs it.
func (s *site) restored(p restore.Physical) restore.PhysicalPlan {
	s.t.Helper()
	plan, err := p.Plan(s.t.Context())
	if err != nil {
		s.t.Fatalf("%v; %s", err, fail.HintOf(err))
	}
	if _, err := p.Run(s.t.Context(), plan); err != nil {
		s.t.Fatal(err)
	}
	return plan
}

// start starts a server on what was restored.
func (s *site) start(p restore.Physical, more map[string]string) (*lab.Postgres, error) {
	set := settings(map[string]string{"hot_standby": "off"})
	for k, v := range more {
		set[k] = v
	}
	return lab.StartPostgres(s.t.Context(), lab.PostgresOptions{Version: s.major, Dir: filepath.Dir(p.Dir), Settings: set})
}

// seqs is what the ledger holds.
func seqs(t testing.TB, p *lab.Postgres) []int32 {
	t.Helper()
	return query[[]int32](t, p, "SELECT coalesce(array_agg(seq ORDER BY seq), '{}') FROM ledger")
}

// A backup is restored, to the latest moment, and is the cluster that it was:
// PostgreSQL's own pg_verifybackup finds nothing.
func TestARestoredClusterIsWhole(t *testing.T) {
	s := newSite(t)
	s.exec("SET allow_in_place_tablespaces = on", "CREATE TABLESPACE inside LOCATION ''", "CREATE TABLE near TABLESPACE inside AS SELECT generate_series(1, 10)")
	s.rows(30)
	s.take()
	s.rows(30)
	s.archived()
	p := s.physical("whole", restore.Target{Kind: restore.Latest})
	plan := s.restored(p)
	if plan.Last == nil || plan.State != restore.New || plan.Segments < 2 || len(plan.Tablespaces) != 1 {
		t.Errorf("the plan is %+v", plan)
	}
	s.sound(p)
	server, err := s.start(p, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer server.Stop()
	if diff := cmp.Diff(seqs(t, s.pg), seqs(t, server)); diff != "" {
		t.Error(diff)
	}
	if n := query[int](t, server, "SELECT count(*) FROM far"); n != 1000 {
		t.Errorf("%d rows in the other tablespace", n)
	}
	if n := query[int](t, server, "SELECT count(*) FROM near"); n != 10 {
		t.Errorf("%d rows in the tablespace inside of the data directory", n)
	}
	if dir := query[string](t, server, "SELECT pg_tablespace_location(oid) FROM pg_tablespace WHERE spcname = 'elsewhere'"); dir != filepath.Join(s.dir, "whole/space") {
		t.Errorf("the tablespace is at %s", dir)
	}
	if mode := query[string](t, server, "SHOW archive_mode"); mode != "off" {
		t.Errorf("archive_mode is %s", mode)
	}
}
