package main

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A world is a host with a real PostgreSQL, a real S3 server, keys and a
// configuration. There is no Temporal server in it: what is tested here works
// without.
type world struct {
	t        *testing.T
	pg       *lab.Postgres
	s3       *lab.S3
	dir      string
	config   string // file
	operator string // file with the identity that opens backups
	minute   int    // of the next backup
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, pg: lab.PostgresForTest(t, lab.PostgresOptions{}), s3: lab.S3ForTest(t), dir: t.TempDir()}
	w.operator = filepath.Join(w.dir, "operator.key")
	w.write("s3.secret", w.s3.SecretAccessKey)
	w.config = w.write("pgkeep.yaml", fmt.Sprintf(`
%s
keys:
  signing_key: %[2]s/keys/signing.key
  metadata_identity: %[2]s/keys/metadata.key
  identity: %[2]s/operator.key
spool: %[2]s/spool
temporal: {address: "127.0.0.1:9"} # nobody is there
clusters:
  main: {conninfo: "%[3]s", host: db1}
`, w.repository(), w.dir, w.pg.Conninfo()))
	if err := os.Mkdir(filepath.Join(w.dir, "spool"), 0o700); err != nil {
		t.Fatal(err)
	}
	w.ok("key", "init", "--new-identity", w.operator)
	w.exec("postgres", "CREATE ROLE clerk", "CREATE DATABASE shop")
	w.exec("shop", "CREATE TABLE orders (id bigint PRIMARY KEY, what text NOT NULL)",
		"INSERT INTO orders SELECT i, 'order ' || i FROM generate_series(1, 5000) i", "GRANT SELECT ON orders TO clerk",
		"CREATE TABLE customers (name text)", "INSERT INTO customers VALUES ('ada'), ('grace')")
	return w
}

// repository is the section of a configuration that reaches the bucket.
func (w *world) repository() string {
	return fmt.Sprintf("repository: {url: 's3://%s/prod', endpoint: '%s', ca_file: %s, access_key_id: %s, secret_access_key_file: %s/s3.secret}",
		w.s3.Bucket, w.s3.Endpoint, w.s3.CAFile, w.s3.AccessKeyID, w.dir)
}

func (w *world) write(name, text string) string {
	w.t.Helper()
	file := filepath.Join(w.dir, name)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return file
}

func (w *world) exec(database string, sql ...string) {
	w.t.Helper()
	if err := w.pg.Exec(w.t.Context(), database, sql...); err != nil {
		w.t.Fatal(err)
	}
}

// pgkeep runs the program with the world's configuration.
func (w *world) pgkeep(args ...string) (status int, out, said string) {
	return w.with(w.t.Context(), w.config, args...)
}

func (w *world) with(ctx context.Context, config string, args ...string) (status int, out, said string) {
	var o, e bytes.Buffer
	status = run(ctx, append([]string{"pgkeep", "--config", config}, args...), strings.NewReader(""), &o, &e)
	return status, o.String(), e.String()
}

// ok runs what must succeed, and returns what it printed.
func (w *world) ok(args ...string) string {
	w.t.Helper()
	status, out, said := w.pgkeep(args...)
	if status != 0 {
		w.t.Fatalf("pgkeep %s = %d\n%s%s", strings.Join(args, " "), status, out, said)
	}
	return out
}

// fails runs what must end with that status and say all of that.
func (w *world) fails(want int, says []string, args ...string) {
	w.t.Helper()
	status, out, said := w.pgkeep(args...)
	w.check(want, says, status, out, said, args)
}

func (w *world) check(want int, says []string, status int, out, said string, args []string) {
	w.t.Helper()
	var missing []string
	for _, text := range says {
		if !strings.Contains(out+said, text) {
			missing = append(missing, text)
		}
	}
	if status != want || len(missing) > 0 {
		w.t.Errorf("pgkeep %s = %d, want %d; not said: %q\n%s%s", strings.Join(args, " "), status, want, missing, out, said)
	}
}

// backup takes a backup of the cluster main, by the steps of the workflow.
func (w *world) backup() repo.ID {
	w.t.Helper()
	ctx := w.t.Context()
	l := w.logical()
	started := time.Date(2026, 11, 22, 1, w.minute, 0, 0, time.UTC)
	w.minute++
	id, by := repo.NewID(started, fmt.Sprintf("%08x", w.minute)), backup.Owner{Workflow: "pgkeep/main/logical", Run: "a-run"}
	fatal := func(err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	seen, err := l.Preflight(ctx, id, started, by)
	fatal(err)
	d, err := l.Dump(ctx, id, func(int64) {})
	fatal(err)
	_, err = l.Upload(ctx, id, nil)
	fatal(err)
	lsn, err := l.RecordLSN(ctx, d.Span())
	fatal(err)
	rep, err := l.Verify(ctx, id, nil)
	fatal(err)
	_, err = l.Publish(ctx, id, backup.Published{Seen: seen, LSN: lsn, Verified: rep.Verified, Started: started, By: by})
	fatal(err)
	fatal(l.CleanUp(ctx, id))
	return id
}

func (w *world) logical() *backup.Logical {
	w.t.Helper()
	cfg, err := config.Load(config.Options{File: w.config, Hostname: "db1"})
	if err != nil {
		w.t.Fatal(err)
	}
	st, err := open.Store(w.t.Context(), cfg.Repository)
	if err != nil {
		w.t.Fatal(err)
	}
	access, err := open.Access(cfg, "test")
	if err != nil {
		w.t.Fatal(err)
	}
	l, err := logicalOf(cfg, "main", st, access, slog.New(slog.DiscardHandler))
	if err != nil {
		w.t.Fatal(err)
	}
	return l
}

// objects are the keys of the repository with the files that hold them.
func (w *world) objects() map[string]string {
	w.t.Helper()
	root := filepath.Join(w.s3.Data, "prod")
	found := make(map[string]string)
	err := filepath.WalkDir(root, func(path string, d os.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() {
			found[strings.TrimPrefix(path, root+"/")] = path
		}
		return err
	})
	if err != nil || len(found) == 0 {
		w.t.Fatalf("%d objects in %s: %v", len(found), root, err)
	}
	return found
}

// same compares the content of two databases.
func (w *world) same(source, restored string) {
	w.t.Helper()
	want, err := lab.Fingerprint(w.t.Context(), w.pg.Conninfo()+" dbname="+source)
	if err != nil {
		w.t.Fatal(err)
	}
	got, err := lab.Fingerprint(w.t.Context(), w.pg.Conninfo()+" dbname="+restored)
	if err != nil {
		w.t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" || len(want) == 0 {
		w.t.Errorf("%s is not what %s is (-want +got):\n%s", restored, source, diff)
	}
}
