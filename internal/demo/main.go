// Command demo shows pgkeep's main job on real parts, all of them on this
// machine: a PostgreSQL with a small shop, an S3 server over TLS, a Temporal
// with its Web UI, a pgkeep worker. It dumps the shop, verifies and restores it.
// Then it takes a physical backup, loses a table, and brings back the moment
// before. Each time it compares. All runs as PostgreSQL's OS user.
package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/term"

	"github.com/pgkeep/pgkeep/internal/lab"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil && ctx.Err() == nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "pgkeep-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	d := demo{dir: dir, program: filepath.Join(dir, "pgkeep"), config: filepath.Join(dir, "pgkeep.yaml")}
	fmt.Println("Building pgkeep, an S3 server (versitygw) and Temporal; the first time takes some minutes.")
	if err := lab.Build(ctx, dir, "pgkeep", "pgkeep-wal"); err != nil {
		return err
	}
	s3, err := lab.StartS3(ctx, lab.S3Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s3.Stop()) }()
	temporal, err := lab.StartTemporal(ctx, lab.TemporalOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, temporal.Stop()) }()
	pg, err := lab.StartPostgres(ctx, lab.PostgresOptions{Settings: map[string]string{
		"archive_mode": "on", "archive_command": dir + "/pgkeep-wal push --config " + d.config + " %p"}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, pg.Stop()) }()
	fmt.Printf("\n  PostgreSQL   %s\n  S3           %s, bucket %s\n  Temporal     %s\n  Web UI       %s\n\n", pg.Conninfo(), s3.Endpoint, s3.Bucket, temporal.Address, temporal.UIURL)

	if err := pg.Exec(ctx, "postgres", "CREATE DATABASE shop"); err != nil {
		return err
	}
	if err := pg.Exec(ctx, "shop", shop...); err != nil {
		return err
	}
	if err := d.configure(s3, temporal, pg); err != nil {
		return err
	}
	return d.story(ctx, pg, temporal)
}

// shop is a database with something of everything that people have.
var shop = []string{
	"CREATE TABLE customers (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL, joined date NOT NULL)",
	"CREATE TABLE articles (id int PRIMARY KEY, title text NOT NULL, price numeric(10,2) CHECK (price > 0), tags text[], data jsonb)",
	"CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer int REFERENCES customers, article int REFERENCES articles, at timestamptz NOT NULL, note text)",
	"INSERT INTO customers (name, joined) SELECT 'customer ' || i, date '2020-01-01' + i % 2000 FROM generate_series(1, 20000) i",
	`INSERT INTO articles SELECT i, 'article ' || md5(i::text), 1 + i % 500, ARRAY['a' || i % 7, 'Ümläut'], jsonb_build_object('weight', i % 31) FROM generate_series(1, 5000) i`,
	"INSERT INTO orders (customer, article, at, note) SELECT 1 + i % 20000, 1 + i % 5000, timestamptz '2026-01-01 00:00+00' + i * interval '1 minute', repeat(md5(i::text), 3) FROM generate_series(1, 400000) i",
	"CREATE INDEX ON orders (at)",
	"CREATE VIEW turnover AS SELECT date_trunc('month', o.at) AS month, sum(a.price) FROM orders o JOIN articles a ON a.id = o.article GROUP BY 1",
}

type demo struct {
	dir, program, config string
}

func (d demo) configure(s3 *lab.S3, temporal *lab.Temporal, pg *lab.Postgres) error {
	ca, err := os.ReadFile(s3.CAFile)
	if err == nil {
		err = os.WriteFile(filepath.Join(d.dir, "ca.pem"), ca, 0o600)
	}
	if err != nil {
		return err
	}
	secret := filepath.Join(d.dir, "s3.secret")
	if err := os.WriteFile(secret, []byte(s3.SecretAccessKey), 0o600); err != nil {
		return err
	}
	text := fmt.Sprintf(`repository:
  url: s3://%s/demo
  endpoint: %s
  ca_file: %s
  access_key_id: %s
  secret_access_key_file: %s
keys:
  signing_key: %[6]s/keys/signing.key
  metadata_identity: %[6]s/keys/metadata.key
  identity: %[6]s/keys/operator.key
temporal:
  address: %[7]s
  namespace: %[8]s
  ui_url: %[9]s
spool: %[6]s/spool
restore_test: {directory: %[6]s/t, memory: 256MB}
log: {level: warn}
clusters:
  main:
    conninfo: %[10]s
schedules:
  - {cluster: main, kind: physical, cron: "30 1 * * *"}
  - {cluster: main, kind: logical, cron: "30 3 * * 0"}
`, s3.Bucket, s3.Endpoint, filepath.Join(d.dir, "ca.pem"), s3.AccessKeyID, secret, d.dir, temporal.Address, temporal.Namespace, temporal.UIURL, pg.Conninfo())
	if err := os.WriteFile(d.config, []byte(text), 0o600); err != nil {
		return err
	}
	return lab.Own(d.dir)
}

// story is what a person would type.
func (d demo) story(ctx context.Context, pg *lab.Postgres, temporal *lab.Temporal) error {
	if err := d.pgkeep(ctx, "init", "--new-identity", filepath.Join(d.dir, "keys/operator.key")); err != nil {
		return err
	}
	fmt.Println("\n$ pgkeep worker &")
	worker, err := d.command(ctx, "worker")
	if err != nil {
		return err
	}
	worker.Cancel = func() error { return worker.Process.Signal(syscall.SIGTERM) }
	if err := worker.Start(); err != nil {
		return err
	}
	defer func() {
		worker.Process.Signal(syscall.SIGTERM)
		worker.Wait()
	}()
	for _, args := range [][]string{
		{"schedule", "apply"},
		{"backup", "--database", "shop", "main"},
		{"list"},
		{"verify", "latest"},
		{"restore", "--database", "shop", "--to", "shop_restored", "latest"},
	} {
		if err := d.pgkeep(ctx, args...); err != nil {
			return err
		}
	}
	if err := compare(ctx, pg.Conninfo()+" dbname=shop", pg.Conninfo()+" dbname=shop_restored"); err != nil {
		return err
	}
	if err := d.backInTime(ctx, pg); err != nil {
		return err
	}
	fmt.Printf("\nThe runs in the Web UI:  %s/namespaces/%s/workflows\n", temporal.UIURL, temporal.Namespace)
	if !term.IsTerminal(int(os.Stdin.Fd())) || !term.IsTerminal(int(os.Stdout.Fd())) {
		return nil
	}
	fmt.Printf("Try it:                 export PGKEEP_CONFIG=%s PATH=%s:$PATH\nEverything stays up until you press Ctrl-C.\n", d.config, d.dir)
	<-ctx.Done()
	return nil
}

// backInTime takes a physical backup, lets somebody drop a table, and restores
// the moment before.
func (d demo) backInTime(ctx context.Context, pg *lab.Postgres) error {
	if err := d.pgkeep(ctx, "backup", "main"); err != nil {
		return err
	}
	if err := pg.Exec(ctx, "shop", "INSERT INTO customers (name, joined) VALUES ('the last one', '2026-11-22')"); err != nil {
		return err
	}
	before, err := lab.Fingerprint(ctx, pg.Conninfo()+" dbname=shop")
	if err != nil {
		return err
	}
	conn, err := pg.Connect(ctx, "shop")
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	var moment string
	if err := conn.QueryRow(ctx, "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US') || ' UTC'").Scan(&moment); err != nil {
		return err
	}
	fmt.Printf("\n%s: all is well.\n\nshop=# DROP TABLE orders CASCADE;\n", moment)
	if err := pg.Exec(ctx, "shop", "DROP TABLE orders CASCADE"); err != nil {
		return err
	}
	if _, err := conn.Exec(ctx, "SELECT pg_switch_wal()"); err != nil {
		return err
	}
	if err := waitArchived(ctx, conn); err != nil {
		return err
	}
	if err := errors.Join(os.Mkdir(filepath.Join(d.dir, "back"), 0o700), lab.Own(filepath.Join(d.dir, "back"))); err != nil {
		return err
	}
	for _, args := range [][]string{
		{"list"},
		{"windows"},
		{"restore", "--target-dir", filepath.Join(d.dir, "back", "data"), "--to-time", moment, "--target-action", "promote"},
	} {
		if err := d.pgkeep(ctx, args...); err != nil {
			return err
		}
	}
	fmt.Println("\n$ pg_ctl start -D back/data")
	back, err := lab.StartPostgres(ctx, lab.PostgresOptions{Dir: filepath.Join(d.dir, "back")})
	if err != nil {
		return err
	}
	defer back.Stop()
	if err := recovered(ctx, back); err != nil {
		return err
	}
	after, err := lab.Fingerprint(ctx, back.Conninfo()+" dbname=shop")
	if err != nil {
		return err
	}
	for _, sums := range []map[string]lab.TableSum{before, after} {
		// Recovery may leave a sequence a little ahead: its values are logged 32 at a time.
		maps.DeleteFunc(sums, func(name string, _ lab.TableSum) bool { return strings.HasSuffix(name, "_seq") })
	}
	return show("The shop as it was at "+moment+", and as restored:", before, after)
}

// waitArchived waits until the log is archived up to now.
func waitArchived(ctx context.Context, conn *pgx.Conn) error {
	for {
		var done bool
		err := conn.QueryRow(ctx, "SELECT coalesce(last_archived_wal >= pg_walfile_name(pg_current_wal_lsn() - 1), false) FROM pg_stat_archiver").Scan(&done)
		if err != nil || done {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// recovered waits until a server has reached its target, and is open.
func recovered(ctx context.Context, pg *lab.Postgres) error {
	conn, err := pg.Connect(ctx, "postgres")
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	for recovering := true; recovering; {
		if err := conn.QueryRow(ctx, "SELECT pg_is_in_recovery()").Scan(&recovering); err != nil {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

func (d demo) command(ctx context.Context, args ...string) (*exec.Cmd, error) {
	cmd := exec.CommandContext(ctx, d.program, args...)
	cmd.Dir, cmd.Env = d.dir, append(os.Environ(), "PGKEEP_CONFIG="+d.config, "HOME="+d.dir, "PATH="+d.dir+":"+os.Getenv("PATH"))
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd, lab.AsServer(cmd)
}

// pgkeep shows a command and runs it.
func (d demo) pgkeep(ctx context.Context, args ...string) error {
	fmt.Println("\n$ pgkeep", strings.ReplaceAll(strings.Join(args, " "), d.dir+"/", ""))
	cmd, err := d.command(ctx, args...)
	if err == nil {
		err = cmd.Run()
	}
	if err != nil {
		return fmt.Errorf("pgkeep %s: %w", args[0], err)
	}
	return nil
}

// compare prints two databases side by side; a difference is an error.
func compare(ctx context.Context, source, restored string) error {
	want, err := lab.Fingerprint(ctx, source)
	if err != nil {
		return err
	}
	got, err := lab.Fingerprint(ctx, restored)
	if err != nil {
		return err
	}
	return show("The shop and the restored shop, table by table:", want, got)
}

func show(title string, want, got map[string]lab.TableSum) error {
	fmt.Println("\n" + title)
	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "TABLE\tROWS\tRESTORED\tCHECKSUM\tRESTORED\t")
	same := len(want) == len(got) && len(want) > 0
	for _, name := range slices.Sorted(maps.Keys(want)) {
		verdict := "equal"
		if want[name] != got[name] {
			same, verdict = false, "DIFFERENT"
		}
		fmt.Fprintf(w, "%s\t%d\t%d\t%.12s\t%.12s\t%s\n", name, want[name].Rows, got[name].Rows, want[name].Sum, got[name].Sum, verdict)
	}
	if err := w.Flush(); err != nil {
		return err
	}
	if !same {
		return errors.New("the restored database differs from its source")
	}
	return nil
}
