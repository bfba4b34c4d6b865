package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/lab"
)

// Every command of docs/OPERATIONS.md is run, in the order in which it stands
// there, after what it is for has happened to a real cluster. Only paths and the
// moment of the mistake differ, and systemctl is one that knows this server.
func TestRunbooks(t *testing.T) {
	t.Parallel()
	d := newDesk(t)
	scenes := map[string]scene{
		"The database is gone: do this":             {d.theDatabaseIsLost, d.nothingIsMissing},
		"The host is gone too":                      {d.theHostIsLost, d.nothingIsMissing},
		"Somebody deleted the wrong rows":           {d.rowsAreDeleted, d.nothingIsMissing},
		"Somebody dropped a table":                  {d.aTableIsDropped, d.nothingIsMissing},
		"archive_command fails, and the disk fills": {d.archivingFails, d.nothingIsMissing},
		"A hole in the archive":                     {d.aSegmentIsLost, d.nothingIsMissing},
		"A backup expired, and is needed":           {d.aBackupExpires, d.itIsThereAgain},
		"Failover":                                  {d.thePrimaryIsLost, d.nothingIsMissing},
		"Keys":                                      {func() {}, d.nothingIsMissing},
		"The host's signing key is lost":            {d.theSigningKeyIsLost, d.nothingIsMissing},
		"Temporal is gone":                          {d.temporalIsNew, d.nothingIsMissing},
		"The bucket gets new credentials":           {d.credentialsChange, d.nothingIsMissing},
		"The bucket is gone, and there is a copy":   {d.theBucketIsLost, d.nothingIsMissing},
	}
	for _, book := range runbooks(t) {
		s, ok := scenes[book.title]
		if !ok {
			t.Fatalf("docs/OPERATIONS.md has commands under %q, and no test makes what they are for", book.title)
		}
		delete(scenes, book.title)
		began := time.Now()
		s.before()
		d.do(book)
		s.after()
		t.Logf("%s: %.1f s", book.title, time.Since(began).Seconds())
	}
	for title := range scenes {
		t.Errorf("docs/OPERATIONS.md has no commands under %q", title)
	}
}

// A scene is what happens before a runbook is used, and what must hold then.
type scene struct{ before, after func() }

type runbook struct{ title, script string }

var fence = regexp.MustCompile("^ *```")

// runbooks reads the blocks of shell commands, those under one heading as one.
func runbooks(t *testing.T) (books []runbook) {
	t.Helper()
	text, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	title, inside := "", false
	for line := range strings.Lines(string(text)) {
		switch {
		case fence.MatchString(line):
			if inside = !inside; inside && strings.TrimSpace(line) != "```sh" {
				t.Fatalf("under %q: %s is no block of commands", title, line)
			}
		case inside && (len(books) == 0 || books[len(books)-1].title != title):
			books = append(books, runbook{title, line})
		case inside:
			books[len(books)-1].script += line
		case strings.HasPrefix(line, "## "):
			title = strings.TrimSpace(line[3:])
		}
	}
	return books
}

// A desk is where somebody on duty sits: one cluster, whose server comes and goes
// under systemctl, its bucket, Temporal, a worker and a safe.
type desk struct {
	t        *testing.T
	dir      string // of all that the server's OS user may read
	s3       *lab.S3
	temporal *lab.Temporal
	conf     string    // directory with the configuration in use
	moment   time.Time // before the mistake
	lost     string    // segment that is not in the archive
	expired  string    // backup that was let go
	orders   int       // that were committed

	mu     sync.Mutex // of what systemctl changes
	pg     *lab.Postgres
	worker *exec.Cmd
}

func newDesk(t *testing.T) *desk {
	t.Helper()
	d := &desk{t: t, dir: lab.DirForTest(t), s3: lab.S3ForTest(t), temporal: lab.TemporalForTest(t)}
	d.conf = d.path("etc")
	for _, dir := range []string{"etc", "safe/etc-pgkeep", "bin", "spool", "large", "primary"} {
		if err := os.MkdirAll(d.path(dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"pgkeep", "pgkeep-wal"} {
		d.copy(filepath.Join(filepath.Dir(program), name), d.path("bin", name))
	}
	d.copy(d.s3.CAFile, d.path("ca.pem"))
	d.write("etc/s3.secret", d.s3.SecretAccessKey)
	d.write("safe/s3.secret.new", "new"+d.s3.SecretAccessKey)
	d.configure("primary")
	d.systemctl()
	d.pg = lab.PostgresForTest(t, lab.PostgresOptions{Dir: d.path("primary"), WALSegmentMB: 1, Settings: d.settings()})
	d.exec("postgres", cluster.RoleSQL("pgkeep_backup", cluster.Duties{Physical: true}), "CREATE DATABASE shop")
	d.exec("shop", "CREATE TABLE orders (id int PRIMARY KEY, what text)")
	d.order(1000)
	d.run("pgkeep init --new-identity /mnt/safe/operator.key\npgkeep key check | sed -n 's/^signer *//p' >/mnt/safe/signer.pub\npgkeep backup --direct main\ncp -r /etc/pgkeep/. /mnt/safe/etc-pgkeep")
	return d
}

func (d *desk) settings() map[string]string {
	return map[string]string{"archive_mode": "on", "wal_keep_size": "200MB", "hot_standby": "on",
		"archive_command": fmt.Sprintf("%s/bin/pgkeep-wal push --config %s/pgkeep.yaml %%p", d.dir, d.conf)}
}

// configure writes the configuration of the host whose server is in that
// directory.
func (d *desk) configure(server string) {
	d.t.Helper()
	d.write(filepath.Base(d.conf)+"/pgkeep.yaml", fmt.Sprintf(`repository:
  url: s3://%[1]s/prod
  endpoint: %[2]s
  ca_file: %[3]s/ca.pem
  access_key_id: %[4]s
  secret_access_key_file: %[5]s/s3.secret
keys:
  signing_key: %[5]s/signing.key
  metadata_identity: %[5]s/metadata.key
temporal: {address: "%[6]s", namespace: %[7]s}
host: db1
spool: %[3]s/spool
clusters:
  main: {conninfo: "host=%[3]s/%[8]s/run user=pgkeep_backup"}
schedules:
  - {cluster: main, kind: physical, cron: "30 1 * * *"}
`, d.s3.Bucket, d.s3.Endpoint, d.dir, d.s3.AccessKeyID, d.conf, d.temporal.Address, d.temporal.Namespace, server))
	d.own()
}

func (d *desk) path(names ...string) string {
	return filepath.Join(append([]string{d.dir}, names...)...)
}

// own gives everything to the OS user that runs the server and the commands.
func (d *desk) own() {
	d.t.Helper()
	for _, dir := range []string{"etc", "etc-standby", "safe", "bin", "spool", "large", "ca.pem"} {
		if err := lab.Own(d.path(dir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			d.t.Fatal(err)
		}
	}
}

func (d *desk) write(name, text string) {
	d.t.Helper()
	if err := os.WriteFile(d.path(name), []byte(text), 0o600); err != nil {
		d.t.Fatal(err)
	}
	d.own()
}

func (d *desk) copy(from, to string) {
	d.t.Helper()
	b, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, b, 0o755)
	}
	if err != nil {
		d.t.Fatal(err)
	}
}

// do runs the commands of a runbook, each of which must succeed.
func (d *desk) do(book runbook) {
	d.t.Helper()
	d.t.Logf("%s:\n%s", book.title, d.run(book.script))
}

// run runs commands as somebody at the host does, and returns what they print.
func (d *desk) run(script string) string {
	d.t.Helper()
	script = strings.NewReplacer(
		"/etc/pgkeep", d.conf,
		"/mnt/safe", d.path("safe"),
		"/srv/large", d.path("large"),
		"/var/lib/postgresql/15/main", d.path("primary/data"),
		"/var/lib/postgresql/15/beside", d.path("beside/data"),
		"/var/lib/postgresql/15/standby", d.path("standby/data"),
		"2026-11-22 10:14:00 Europe/Berlin", d.moment.UTC().Format("2006-01-02 15:04:05.000000 UTC"),
		"000000010000000000000042", d.lost,
		"20261122T013000Z-4f2a9c01", d.expired,
		"'-p 5433'", "'-p 5433 -c unix_socket_directories="+d.sockets()+"'",
	).Replace(script)
	ctx, cancel := context.WithTimeout(d.t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-euo", "pipefail", "-x", "-c", script)
	cmd.Dir, cmd.WaitDelay = d.dir, 10*time.Second
	cmd.Env = []string{"PATH=" + d.path("bin") + ":" + filepath.Dir(d.pg.Bin("psql")) + ":/usr/sbin:" + os.Getenv("PATH"), "HOME=" + d.dir,
		"PGHOST=" + d.sockets(), "PGUSER=postgres", "PGKEEP_CONFIG=" + filepath.Join(d.conf, "pgkeep.yaml"), "LC_ALL=C.UTF-8"}
	if err := lab.AsServer(cmd); err != nil {
		d.t.Fatal(err)
	}
	cmd.SysProcAttr.Setpgid = true
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	out, err := cmd.CombinedOutput()
	if err != nil {
		d.t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

func (d *desk) sockets() string { return filepath.Join(filepath.Dir(d.pg.DataDir), "run") }

// systemctl makes the program of that name, which asks this process.
func (d *desk) systemctl() {
	d.t.Helper()
	pipes := make(map[string]*os.File)
	for _, name := range []string{"ask", "answer"} {
		err := unix.Mkfifo(d.path(name), 0o600)
		if err == nil {
			pipes[name], err = os.OpenFile(d.path(name), os.O_RDWR, 0)
		}
		if err == nil {
			err = lab.Own(d.path(name))
		}
		if err != nil {
			d.t.Fatal(err)
		}
	}
	script := "#!/bin/sh\necho \"$*\" >'%[1]s/ask'\nread answer <'%[1]s/answer'\n[ \"$answer\" = ok ] || { echo \"$answer\" >&2; exit 1; }\n"
	if err := os.WriteFile(d.path("bin/systemctl"), fmt.Appendf(nil, script, d.dir), 0o755); err != nil {
		d.t.Fatal(err)
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		for asked := bufio.NewScanner(pipes["ask"]); asked.Scan(); {
			answer := "ok"
			if err := d.manage(asked.Text()); err != nil {
				answer = strings.ReplaceAll(err.Error(), "\n", " ")
			}
			fmt.Fprintln(pipes["answer"], answer)
		}
	}()
	d.t.Cleanup(func() {
		pipes["ask"].Close()
		<-served
		pipes["answer"].Close()
		d.stopWorker()
	})
}

// manage does what systemctl is asked for.
func (d *desk) manage(what string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	ctx := context.WithoutCancel(d.t.Context())
	switch what {
	case "stop postgresql@15-main":
		return d.pg.Stop()
	case "start postgresql@15-main":
		return d.pg.Restart(ctx, nil)
	case "restart pgkeep-worker":
		d.stopWorker()
		d.worker = exec.Command(d.path("bin/pgkeep"), "worker", "--grace", "1s")
		d.worker.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + d.dir, "PGKEEP_CONFIG=" + filepath.Join(d.conf, "pgkeep.yaml")}
		if err := lab.AsServer(d.worker); err != nil {
			return err
		}
		return d.worker.Start()
	}
	return fmt.Errorf("systemctl %s: not known here", what)
}

func (d *desk) stopWorker() {
	if d.worker != nil {
		d.worker.Process.Kill()
		d.worker.Wait()
		d.worker = nil
	}
}

func (d *desk) exec(database string, sql ...string) {
	d.t.Helper()
	if err := d.pg.Exec(d.t.Context(), database, sql...); err != nil {
		d.t.Fatal(err)
	}
}

// query asks the server for one value.
func (d *desk) query(on *lab.Postgres, database, sql string) (text string) {
	d.t.Helper()
	conn, err := on.Connect(d.t.Context(), database)
	if err != nil {
		d.t.Fatal(err)
	}
	defer conn.Close(context.WithoutCancel(d.t.Context()))
	if err := conn.QueryRow(d.t.Context(), "SELECT ("+sql+")::text").Scan(&text); err != nil {
		d.t.Fatalf("%s: %v", sql, err)
	}
	return text
}

func (d *desk) until(on *lab.Postgres, sql string) {
	d.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); d.query(on, "postgres", "coalesce(("+sql+"), false)") != "true"; {
		if time.Now().After(deadline) {
			d.t.Fatalf("waited two minutes for %s; archiver: %s", sql, d.query(on, "postgres", "SELECT row_to_json(a) FROM pg_stat_archiver a"))
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-d.t.Context().Done():
			d.t.Fatal(d.t.Context().Err())
		}
	}
}

// order commits rows.
func (d *desk) order(rows int) {
	d.t.Helper()
	d.exec("shop", fmt.Sprintf("INSERT INTO orders SELECT i, md5(i::text) FROM generate_series(%d, %d) i", d.orders+1, d.orders+rows))
	d.orders += rows
}

// archived waits until all that was written until now is.
func (d *desk) archived() {
	d.t.Helper()
	last := d.query(d.pg, "postgres", "pg_walfile_name(pg_switch_wal())")
	d.until(d.pg, "SELECT last_archived_wal >= '"+last+"' FROM pg_stat_archiver")
}

// nothingIsMissing holds after every runbook: all rows that were ever committed
// are there, more can be, and are archived.
func (d *desk) nothingIsMissing() {
	d.t.Helper()
	d.order(10)
	want := fmt.Sprint(d.orders)
	if got := d.query(d.pg, "shop", "SELECT count(*) FROM orders"); got != want {
		d.t.Fatalf("%s orders are there, want %s", got, want)
	}
	d.archived()
	if out := d.run("pgkeep config show"); strings.Contains(out, "identity: "+d.conf+"/operator.key") {
		d.t.Errorf("the operator's key was left on the host:\n%s", out)
	}
}

func (d *desk) theDatabaseIsLost() {
	d.order(100)
	d.archived()
	d.order(10) // in no segment that is archived
	d.pg.Kill()
	if err := os.RemoveAll(d.path("primary/data/base")); err != nil {
		d.t.Fatal(err)
	}
}

func (d *desk) theHostIsLost() {
	d.order(100)
	d.archived()
	d.pg.Kill()
	for _, dir := range []string{"primary/data", "etc", "spool"} {
		if err := os.RemoveAll(d.path(dir)); err != nil {
			d.t.Fatal(err)
		}
	}
	for _, dir := range []string{"etc", "spool"} {
		if err := os.Mkdir(d.path(dir), 0o700); err != nil {
			d.t.Fatal(err)
		}
	}
	d.own()
}

// now notes the moment before a mistake, by the server's clock.
func (d *desk) now() {
	d.t.Helper()
	text := d.query(d.pg, "postgres", "to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI:SS.US')")
	var err error
	if d.moment, err = time.Parse("2006-01-02 15:04:05.000000", text); err != nil {
		d.t.Fatal(err)
	}
}

func (d *desk) rowsAreDeleted() {
	d.order(100)
	d.now()
	d.exec("shop", "DELETE FROM orders WHERE id % 7 = 0")
	d.order(50)
	d.archived()
	if err := os.MkdirAll(d.path("beside"), 0o700); err != nil {
		d.t.Fatal(err)
	}
	if err := lab.Own(d.path("beside")); err != nil {
		d.t.Fatal(err)
	}
}

func (d *desk) aTableIsDropped() {
	d.order(100)
	d.now()
	d.exec("shop", "DROP TABLE orders")
	d.archived()
}

// aBackupExpires lets all but the newest go, of which the oldest is needed.
func (d *desk) aBackupExpires() {
	d.order(100)
	d.archived()
	text, err := os.ReadFile(filepath.Join(d.conf, "pgkeep.yaml"))
	if err != nil {
		d.t.Fatal(err)
	}
	kept := strings.Replace(string(text), "user=pgkeep_backup\"}", "user=pgkeep_backup\", retention: {daily: 1, min: 1}}", 1)
	if kept == string(text) {
		d.t.Fatalf("no cluster in\n%s", text)
	}
	d.write(filepath.Base(d.conf)+"/pgkeep.yaml", kept)
	d.expired = regexp.MustCompile(`\d{8}T\d{6}Z-[0-9a-f]{8}`).FindString(d.run("pgkeep list"))
	d.run("pgkeep expire --apply --yes --confirm 100")
	if out := d.run("pgkeep list"); d.expired == "" || strings.Contains(out, d.expired) {
		d.t.Fatalf("%q has not expired:\n%s", d.expired, out)
	}
}

func (d *desk) itIsThereAgain() {
	d.run("pgkeep expire --apply --yes --confirm 100")
	if out := d.run("pgkeep list"); !strings.Contains(out, d.expired) {
		d.t.Errorf("%s is not there again:\n%s", d.expired, out)
	}
	d.nothingIsMissing()
}

// theBucketIsLost leaves a copy of it.
func (d *desk) theBucketIsLost() {
	d.order(100)
	d.archived()
	api, done, err := d.s3.API(d.s3.AccessKeyID, d.s3.SecretAccessKey)
	if err != nil {
		d.t.Fatal(err)
	}
	defer done()
	ctx, elsewhere := d.t.Context(), "pgkeep-copy"
	if _, err := api.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &elsewhere}); err != nil {
		d.t.Fatal(err)
	}
	for pages := s3.NewListObjectsV2Paginator(api, &s3.ListObjectsV2Input{Bucket: &d.s3.Bucket}); pages.HasMorePages(); {
		page, err := pages.NextPage(ctx)
		if err != nil {
			d.t.Fatal(err)
		}
		for _, o := range page.Contents {
			if _, err := api.CopyObject(ctx, &s3.CopyObjectInput{Bucket: &elsewhere, Key: o.Key, CopySource: aws.String(d.s3.Bucket + "/" + *o.Key)}); err != nil {
				d.t.Fatal(err)
			}
		}
	}
	if err := os.Rename(d.s3.Data, d.path("gone")); err != nil {
		d.t.Fatal(err)
	}
	d.s3.Bucket, d.s3.Data = elsewhere, filepath.Join(filepath.Dir(d.s3.Data), elsewhere)
}

func (d *desk) archivingFails() {
	d.write("etc/s3.secret", "not-it")
	d.order(100)
	d.exec("postgres", "SELECT pg_switch_wal()")
	d.until(d.pg, "SELECT failed_count > 0 FROM pg_stat_archiver")
}

func (d *desk) aSegmentIsLost() {
	d.order(100)
	d.lost = d.query(d.pg, "postgres", "pg_walfile_name(pg_current_wal_lsn())")
	d.archived()
	d.order(100)
	d.archived()
	var found []string
	ago := time.Now().Add(-time.Hour) // what shows a hole must have been there for a while
	err := filepath.WalkDir(d.s3.Data, func(path string, e os.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.Contains(path, "/wal/") {
			return err
		}
		if strings.Contains(filepath.Base(path), d.lost) {
			found = append(found, path)
			return os.Remove(path)
		}
		return os.Chtimes(path, ago, ago)
	})
	if err != nil || len(found) != 1 {
		d.t.Fatalf("%v; %s is in %v", err, d.lost, found)
	}
}

func (d *desk) thePrimaryIsLost() {
	old := d.pg
	d.order(100)
	d.archived()
	if err := os.Mkdir(d.path("standby"), 0o700); err != nil {
		d.t.Fatal(err)
	}
	if err := lab.Own(d.path("standby")); err != nil {
		d.t.Fatal(err)
	}
	d.run("pg_basebackup -D /var/lib/postgresql/15/standby -X stream -c fast --no-sync --write-recovery-conf\ncp -r /etc/pgkeep " + d.path("etc-standby"))
	d.conf = d.path("etc-standby")
	d.configure("standby")
	standby, err := lab.StartPostgres(d.t.Context(), lab.PostgresOptions{Dir: d.path("standby"), Settings: d.settings()})
	if err != nil {
		log, _ := os.ReadFile(d.path("standby/log"))
		d.t.Fatalf("%v\n%.4000s", err, log)
	}
	d.t.Cleanup(func() { standby.Stop() })
	d.write("etc/s3.secret", "not-it")
	for range 3 {
		d.order(100)
		d.exec("postgres", "SELECT pg_switch_wal()")
	}
	at := d.query(old, "postgres", "pg_current_wal_flush_lsn()")
	d.until(standby, "pg_last_wal_replay_lsn() >= '"+at+"'")
	old.Kill()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pg = standby
}

func (d *desk) theSigningKeyIsLost() {
	if err := os.Remove(filepath.Join(d.conf, "signing.key")); err != nil {
		d.t.Fatal(err)
	}
}

func (d *desk) temporalIsNew() {
	if got := d.run("pgkeep schedule list"); strings.Contains(got, "main") {
		d.t.Fatalf("Temporal knows schedules already:\n%s", got)
	}
}

func (d *desk) credentialsChange() {
	d.s3.SecretAccessKey = "new" + d.s3.SecretAccessKey
	if err := d.s3.Restart(d.t.Context()); err != nil {
		d.t.Fatal(err)
	}
}
