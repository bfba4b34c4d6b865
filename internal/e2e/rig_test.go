// Package e2e tells whole stories with the real programs: pgkeep as a process,
// PostgreSQL, S3 over TLS, Temporal.
package e2e

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	commonpb "go.temporal.io/api/common/v1"
	enumspb "go.temporal.io/api/enums/v1"
	historypb "go.temporal.io/api/history/v1"
	workflowpb "go.temporal.io/api/workflow/v1"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/converter"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/workflows"
)

// program is pgkeep, built once for the package; pgkeep-wal lies beside it.
var program string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "pgkeep-e2e-")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		os.Chmod(dir, 0o755) // PostgreSQL runs what is in it
		program = filepath.Join(dir, "pgkeep")
		if err := lab.Build(context.Background(), dir, "pgkeep", "pgkeep-wal"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		// Most of the time they wait, for a worker that was killed to be missed.
		flag.Parse()
		if err := flag.Set("test.parallel", "16"); err != nil {
			panic(err)
		}
		return m.Run()
	}())
}

// canary is the password of the backup role. It must turn up nowhere.
var canary = "canary" + rand.Text()

// A rig is everything a backup needs, of its own.
type rig struct {
	t        *testing.T
	pg       *lab.Postgres
	s3       *lab.S3
	proxy    *lab.Proxy // between pgkeep and S3
	temporal *lab.Temporal
	client   client.Client
	dir      string
	config   string
	logs     []*os.File

	wal, walProgram string // configuration and program for archive_command, if it archives
}

// setup starts the parts and initializes a repository. rows is how many rows of
// a kilobyte of noise the database has.
func setup(t *testing.T, rows int) *rig {
	t.Helper()
	t.Parallel()
	r := &rig{t: t, dir: t.TempDir()}
	r.pg = lab.PostgresForTest(t, lab.PostgresOptions{Password: canary})
	r.s3 = lab.S3ForTest(t)
	r.proxy = lab.ProxyForTest(t, r.s3.Addr)
	r.temporal = lab.TemporalForTest(t)
	var err error
	r.client, err = client.Dial(client.Options{HostPort: r.temporal.Address, Namespace: r.temporal.Namespace, Logger: quiet{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.client.Close)
	err = r.pg.Exec(t.Context(), "postgres", "CREATE ROLE keeper LOGIN SUPERUSER PASSWORD '"+canary+"'", "CREATE DATABASE app")
	if err == nil {
		err = r.pg.Exec(t.Context(), "app",
			"CREATE TABLE small AS SELECT i, md5(i::text) AS m FROM generate_series(1, 5000) i",
			"CREATE TABLE big (i int, noise text)",
			"CREATE EXTENSION pgcrypto",
			fmt.Sprintf("INSERT INTO big SELECT i, encode(gen_random_bytes(750), 'base64') FROM generate_series(1, %d) i", rows),
			"CREATE INDEX ON big (i)")
	}
	if err != nil {
		t.Fatal(err)
	}
	r.config = r.write("pgkeep.yaml", fmt.Sprintf(`
repository: {url: "s3://%s/test", endpoint: "https://%s", ca_file: %s, access_key_id: %s, secret_access_key_file: %s}
keys: {signing_key: %[6]s/keys/signing.key, metadata_identity: %[6]s/keys/metadata.key, identity: %[6]s/keys/operator.key}
temporal: {address: "%[7]s", namespace: %[8]s, ui_url: "%[9]s"}
host: db1
spool: %[6]s/spool
restore_dirs: [%[12]s]
log: {level: info, format: json}
clusters: {main: {conninfo: "%[10]s", password_file: %[11]s, logical: {lock_wait: 3m}, physical: {rate: 0}}}
schedules: [{cluster: main, cron: "30 1 * * *", jitter: 0s}]
`, r.s3.Bucket, r.proxy.Addr, r.s3.CAFile, r.s3.AccessKeyID, r.write("secret", r.s3.SecretAccessKey),
		r.dir, r.temporal.Address, r.temporal.Namespace, r.temporal.UIURL, strings.Replace(r.pg.TCPConninfo(), "user=postgres", "user=keeper", 1), r.write("password", canary), os.TempDir()))
	r.must("init", "--new-identity", filepath.Join(r.dir, "keys/operator.key"))
	return r
}

func (r *rig) write(name, text string) string {
	r.t.Helper()
	path := filepath.Join(r.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
	return path
}

type result struct {
	out, err string
	status   int
}

// run runs pgkeep.
func (r *rig) run(args ...string) result {
	r.t.Helper()
	var out, errw bytes.Buffer
	cmd := r.command(args...)
	cmd.Stdout, cmd.Stderr = &out, &errw
	defer time.AfterFunc(3*time.Minute, func() { cmd.Process.Signal(syscall.SIGQUIT) }).Stop() // tells where it hangs
	if err := cmd.Run(); cmd.ProcessState == nil {
		r.t.Fatal(err)
	}
	return result{out.String(), errw.String(), cmd.ProcessState.ExitCode()}
}

// must runs pgkeep, which must succeed, and returns what it says.
func (r *rig) must(args ...string) string {
	r.t.Helper()
	res := r.run(args...)
	if res.status != 0 {
		r.t.Fatalf("pgkeep %s: status %d\n%s%s", strings.Join(args, " "), res.status, res.out, res.err)
	}
	return res.out
}

func (r *rig) command(args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + r.dir, "PGKEEP_CONFIG=" + r.config}
	return cmd
}

// A process is a worker that runs.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
}

// worker starts pgkeep worker; its log is kept for the canary.
func (r *rig) worker() *process {
	r.t.Helper()
	log, err := os.CreateTemp(r.dir, "worker-*.log")
	if err != nil {
		r.t.Fatal(err)
	}
	r.logs = append(r.logs, log)
	p := &process{r.command("worker", "--grace", "2s"), make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	go func() { p.cmd.Wait(); close(p.done) }()
	r.t.Cleanup(func() { p.signal(syscall.SIGKILL) })
	r.t.Cleanup(func() {
		if text, _ := os.ReadFile(log.Name()); r.t.Failed() {
			r.t.Logf("%s:\n%s", filepath.Base(log.Name()), text)
		}
	})
	return p
}

// signal sends a signal and waits until the worker has gone.
func (p *process) signal(s syscall.Signal) int {
	p.cmd.Process.Signal(s)
	<-p.done
	return p.cmd.ProcessState.ExitCode()
}

// start begins a backup and does not wait for it.
func (r *rig) start() client.WorkflowRun {
	r.t.Helper()
	var started struct{ Workflow, Run string }
	r.decode(r.must("backup", "--kind", "logical", "--detach", "--json", "main"), &started)
	return r.client.GetWorkflow(r.t.Context(), started.Workflow, started.Run)
}

func (r *rig) decode(text string, v any) {
	r.t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		r.t.Fatalf("%v in:\n%s", err, text)
	}
}

// finish waits for a backup that is to succeed.
func (r *rig) finish(run client.WorkflowRun) (res workflows.LogicalBackupResult) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Minute)
	defer cancel()
	if err := run.Get(ctx, &res); err != nil {
		r.t.Fatal(err)
	}
	return res
}

// step waits until the run is at an activity that a worker has begun.
func (r *rig) step(run client.WorkflowRun, name string) *workflowpb.PendingActivityInfo {
	r.t.Helper()
	var found *workflowpb.PendingActivityInfo
	r.until(name+" begins", func() bool {
		d, err := r.client.DescribeWorkflowExecution(r.t.Context(), run.GetID(), run.GetRunID())
		if err != nil {
			r.t.Fatal(err)
		}
		for _, a := range d.PendingActivities {
			if a.ActivityType.GetName() == name && a.State == enumspb.PENDING_ACTIVITY_STATE_STARTED {
				found = a
			}
		}
		return found != nil
	})
	return found
}

func (r *rig) until(what string, ok func() bool) {
	r.t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); !ok(); {
		if time.Now().After(deadline) {
			r.t.Fatalf("waited five minutes for: %s", what)
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-r.t.Context().Done():
			r.t.Fatal(r.t.Context().Err())
		}
	}
}

// attempts returns, from the history, how often each activity was tried until
// it succeeded.
func (r *rig) attempts(run client.WorkflowRun) map[string]int32 {
	r.t.Helper()
	tries, names := make(map[string]int32), make(map[int64]string)
	for _, e := range r.history(run).Events {
		switch {
		case e.GetActivityTaskScheduledEventAttributes() != nil:
			names[e.EventId] = e.GetActivityTaskScheduledEventAttributes().ActivityType.GetName()
		case e.GetActivityTaskStartedEventAttributes() != nil:
			a := e.GetActivityTaskStartedEventAttributes()
			tries[names[a.ScheduledEventId]] += a.Attempt
		}
	}
	return tries
}

func (r *rig) history(run client.WorkflowRun) *historypb.History {
	r.t.Helper()
	h := new(historypb.History)
	for events := r.client.GetWorkflowHistory(r.t.Context(), run.GetID(), run.GetRunID(), false, enumspb.HISTORY_EVENT_FILTER_TYPE_ALL_EVENT); events.HasNext(); {
		e, err := events.Next()
		if err != nil {
			r.t.Fatal(err)
		}
		h.Events = append(h.Events, e)
	}
	return h
}

// result of an activity, decoded from the history.
func (r *rig) resultOf(run client.WorkflowRun, activity string, v any) {
	r.t.Helper()
	names := make(map[int64]string)
	var payloads *commonpb.Payloads
	for _, e := range r.history(run).Events {
		if a := e.GetActivityTaskScheduledEventAttributes(); a != nil {
			names[e.EventId] = a.ActivityType.GetName()
		}
		if a := e.GetActivityTaskCompletedEventAttributes(); a != nil && names[a.ScheduledEventId] == activity {
			payloads = a.Result
		}
	}
	if err := converter.GetDefaultDataConverter().FromPayloads(payloads, v); err != nil {
		r.t.Fatal(err)
	}
}

// packs returns the packs in the bucket and their sizes.
func (r *rig) packs() map[string]int64 {
	r.t.Helper()
	sizes := make(map[string]int64)
	files, err := filepath.Glob(filepath.Join(r.s3.Data, "test/clusters/main/packs/*/*.pack"))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range files {
		if info, err := os.Stat(f); err == nil {
			sizes[f] = info.Size()
		}
	}
	return sizes
}

// listed returns the ids of what pgkeep list shows as backups.
func (r *rig) listed() (ids []string) {
	r.t.Helper()
	var list struct{ Backups []struct{ ID string } }
	r.decode(r.must("list", "--json"), &list)
	for _, b := range list.Backups {
		ids = append(ids, b.ID)
	}
	return ids
}

// restored restores the newest backup and compares it with the source.
func (r *rig) restored() {
	r.t.Helper()
	name := fmt.Sprintf("restored_%d", time.Now().UnixNano())
	r.must("restore", "--database", "app", "--to", name, "latest")
	want, err := lab.Fingerprint(r.t.Context(), r.pg.Conninfo()+" dbname=app")
	if err != nil {
		r.t.Fatal(err)
	}
	got, err := lab.Fingerprint(r.t.Context(), r.pg.Conninfo()+" dbname="+name)
	if err != nil {
		r.t.Fatal(err)
	}
	if len(want) == 0 || fmt.Sprint(want) != fmt.Sprint(got) {
		r.t.Errorf("restored\n%v\nwant\n%v", got, want)
	}
}

// hold takes a table away from pg_dump until the returned function is called.
func (r *rig) hold() (release func()) {
	r.t.Helper()
	conn, err := r.pg.Connect(r.t.Context(), "app")
	if err == nil {
		_, err = conn.Exec(r.t.Context(), "BEGIN; LOCK TABLE small")
	}
	if err != nil {
		r.t.Fatal(err)
	}
	closed := false
	release = func() {
		if !closed {
			closed = true
			conn.Close(context.WithoutCancel(r.t.Context()))
		}
	}
	r.t.Cleanup(release)
	return release
}

// dumping reports whether a session of pg_dump is there.
func (r *rig) dumping() bool {
	r.t.Helper()
	conn, err := r.pg.Connect(r.t.Context(), "postgres")
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close(r.t.Context())
	var n int
	if err := conn.QueryRow(r.t.Context(), "SELECT count(*) FROM pg_stat_activity WHERE datname = 'app' AND wait_event_type = 'Lock'").Scan(&n); err != nil {
		r.t.Fatal(err)
	}
	return n > 0
}

func (r *rig) spool() []string {
	r.t.Helper()
	left, err := filepath.Glob(filepath.Join(r.dir, "spool/main/*"))
	if err != nil {
		r.t.Fatal(err)
	}
	return left
}

type quiet struct{}

func (quiet) Debug(string, ...any) {}
func (quiet) Info(string, ...any)  {}
func (quiet) Warn(string, ...any)  {}
func (quiet) Error(string, ...any) {}
