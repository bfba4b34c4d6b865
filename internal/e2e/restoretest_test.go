package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"go.temporal.io/sdk/client"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/workflows"
)

// tested sets up for restore tests: the log is archived, and PostgreSQL's user
// may read what the worker reads. It returns the directory of sandboxes.
func (r *rig) tested(more string) (dir string) {
	r.t.Helper()
	r.archive()
	dir = filepath.Join(lab.DirForTest(r.t), "s")
	for _, name := range []string{r.config, r.wal} {
		text, err := os.ReadFile(name)
		if err != nil {
			r.t.Fatal(err)
		}
		text = append(text, "restore_test: {directory: "+dir+", memory: 256MB"+more+"}\n"...)
		if err := os.WriteFile(name, text, 0o600); err != nil {
			r.t.Fatal(err)
		}
	}
	r.config = r.wal // what the server in the sandbox may read
	return dir
}

// nothingLeft wants neither sandboxes nor servers in them.
func (r *rig) nothingLeft(dir string) {
	r.t.Helper()
	r.until("nothing is left in "+dir, func() bool {
		left, _ := os.ReadDir(dir)
		return len(left) == 0
	})
	procs, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, p := range procs {
		if cwd, err := os.Readlink(p); err == nil && strings.HasPrefix(cwd, dir) {
			r.t.Errorf("%s is in %s", p, cwd)
		}
	}
}

// A backup is taken, tested, and shown as proven; so is a logical one.
func TestABackupIsProven(t *testing.T) {
	r := setup(t, 500)
	dir := r.tested(`, assertions: [{name: small is whole, database: app, query: "SELECT count(*), 'canary-literal' FROM small", want: "5000 | canary-literal"}]`)
	r.put(r.config, bytes.Replace(r.bytes(r.config), []byte("physical: {rate: 0}"), []byte("physical: {rate: 0, count_rows: [app.public.*, postgres.public.lost]}"), 1))
	r.worker()
	var taken workflows.PhysicalBackupResult
	var res workflows.RestoreTestResult
	backups := 0
	for { // once, as a rule: while so much is written, there may be no place in the log to compare rows at
		backups++
		stop := r.busy()
		r.decode(r.must("backup", "--json"), &taken)
		stop()
		if err := r.pg.Exec(t.Context(), "app", "DELETE FROM big WHERE i % 3 = 0", "SELECT pg_switch_wal()"); err != nil {
			t.Fatal(err)
		}
		r.archived()
		r.decode(r.must("restore-test", "--json"), &res)
		if backups == 5 || !strings.Contains(checkOf(res.Report, proof.CheckRows).Message, "another order") {
			break
		}
	}
	if taken.Copy.Uncounted != 1 { // there is no table of that name
		t.Errorf("taken: %+v", taken)
	}
	r.clean(r.client.GetWorkflow(t.Context(), workflows.BackupWorkflowID("main", string(repo.Physical)), ""), dir, "small", "turned", "lost")
	rep := res.Report
	if string(res.Subject.ID) != taken.ID || rep.Verdict != proof.Passed || rep.Rows < 5000 || rep.RTO == 0 || rep.Segments == 0 || rep.Lag == nil || len(rep.Phases) < 6 {
		t.Errorf("tested: %+v", res)
	}
	t.Logf("rows: %+v, after %d backups; %+v", checkOf(rep, proof.CheckRows), backups, rep.Phases)
	if rows := checkOf(rep, proof.CheckRows); rows.Verdict != proof.Passed || rows.Items != 3 || !strings.Contains(rows.Message, "not all rows could be counted") {
		t.Errorf("rows: %+v", rows)
	}
	r.nothingLeft(dir)
	type listed struct {
		ID    string
		Proof *struct {
			State proof.State
			RTO   float64 `json:"rto_seconds"`
		}
	}
	var list struct{ Backups []listed }
	r.decode(r.must("list", "--json"), &list)
	if b := slices.DeleteFunc(list.Backups, func(b listed) bool { return b.ID != taken.ID }); len(b) != 1 || b[0].Proof == nil || b[0].Proof.State != proof.Proven || b[0].Proof.RTO != rep.RTO {
		t.Errorf("listed: %+v", list)
	}
	if said := r.must("list"); !strings.Contains(said, "PROVEN") || !strings.Contains(said, "s ago") {
		t.Errorf("list says\n%s", said)
	}
	if said := r.must("show", "latest"); !strings.Contains(said, "assertions") || !strings.Contains(said, "replay ") || !strings.Contains(said, "without a network") {
		t.Errorf("show says\n%s", said)
	}
	run := r.client.GetWorkflow(t.Context(), workflows.RestoreTestWorkflowID("main"), "")
	if said := r.must("show", "latest"); !strings.Contains(said, "of 3 tables in database app") || !strings.Contains(said, "postgres.public.lost: there is no such table") {
		t.Errorf("show says\n%s", said)
	}
	about, err := r.client.DescribeWorkflow(t.Context(), run.GetID(), "")
	if err != nil {
		t.Fatal(err)
	}
	if n, ok := about.TypedSearchAttributes.GetInt64(workflows.PgkeepBytes); !ok || n != res.Subject.Bytes || n == 0 {
		t.Errorf("PgkeepBytes = %d, %v, want %d", n, ok, res.Subject.Bytes)
	}
	r.record(run, "restore-test")
	r.clean(run, dir, "small")

	again, _ := strconv.Atoi(os.Getenv("PGKEEP_TEST_GREEN")) // so often in a row
	for i := range again {
		r.must("restore-test")
		t.Logf("green %d times more", i+1)
	}

	r.must("backup", "--kind", "logical")
	r.decode(r.must("restore-test", "--json", "latest"), &res)
	if rows := checkOf(res.Report, proof.CheckRows); res.Subject.Kind != "logical" || res.Report.Verdict != proof.Passed || res.Report.Rows < 5000 || rows.Verdict != proof.Passed || rows.Items < 3 {
		t.Errorf("tested: %+v", res)
	}
	r.nothingLeft(dir)
}

func checkOf(rep proof.Report, name string) proof.Check {
	for _, c := range rep.Checks {
		if c.Name == name {
			return c
		}
	}
	return proof.Check{}
}

// busy has several sessions write rows and empty a table, one transaction after
// another, until the function that it returns is called.
func (r *rig) busy() (stop func()) {
	r.t.Helper()
	if err := r.pg.Exec(r.t.Context(), "app", "CREATE TABLE IF NOT EXISTS turned (i int)"); err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(r.t.Context())
	var writers sync.WaitGroup
	for i := range 4 {
		conn, err := r.pg.Connect(ctx, "app")
		if err != nil {
			r.t.Fatal(err)
		}
		writers.Go(func() {
			defer conn.Close(context.Background())
			for n := 0; ctx.Err() == nil; n++ {
				sql := fmt.Sprintf("INSERT INTO big VALUES (%d, 'x'), (%d, 'y'); INSERT INTO turned VALUES (1)", n, n)
				if i == 0 {
					sql = "BEGIN; TRUNCATE turned; INSERT INTO turned SELECT generate_series(1, 5); COMMIT"
				}
				conn.Exec(ctx, sql)
			}
		})
	}
	return func() {
		cancel()
		writers.Wait()
	}
}

// clean wants a history without anything that is the user's: SQL, rows, names of
// tables, paths.
func (r *rig) clean(run client.WorkflowRun, more ...string) {
	r.t.Helper()
	text, err := r.history(run).Marshal() // payloads are in it as they are
	if err != nil {
		r.t.Fatal(err)
	}
	for _, secret := range append([]string{r.dir, filepath.Dir(r.wal), "SELECT", "canary-literal", canary, "signing.key"}, more...) {
		if i := strings.Index(string(text), secret); i >= 0 {
			r.t.Errorf("the history holds %q: %.200q", secret, text[max(0, i-100):])
		}
	}
}

// through lets the worker, and the server in a sandbox, reach S3 by way of the
// proxy.
func (r *rig) through() {
	r.t.Helper()
	text, err := os.ReadFile(r.wal)
	if err != nil {
		r.t.Fatal(err)
	}
	r.config = filepath.Join(filepath.Dir(r.wal), "proxied.yaml")
	if err := os.WriteFile(r.config, []byte(strings.ReplaceAll(string(text), r.s3.Addr, r.proxy.Addr)), 0o600); err != nil {
		r.t.Fatal(err)
	}
	if err := lab.Own(r.config); err != nil {
		r.t.Fatal(err)
	}
}

// The worker dies at each step of a test. The next one goes on, or starts over; the
// answer is the right one, and nothing is left. PGKEEP_TEST_KILLS=all takes every
// step.
func TestARestoreTestSurvivesAKilledWorker(t *testing.T) {
	t.Parallel()
	steps := []string{"RecoverTest", "CheckTest"}
	if os.Getenv("PGKEEP_TEST_KILLS") == "all" {
		steps = []string{"PlanTest", "RestoreTestFiles", "RecoverTest", "CheckTest", "ReportTest", "CleanUpTest"}
	}
	for _, step := range steps {
		t.Run(step, func(t *testing.T) {
			r := setup(t, 500)
			dir := r.tested(`, assertions: [{name: slow, database: app, query: "SELECT pg_sleep(5)::text = ''"}]`)
			r.through()
			w := r.worker()
			r.must("backup")
			if err := r.pg.Exec(t.Context(), "app", "DELETE FROM big WHERE i % 3 = 0"); err != nil {
				t.Fatal(err)
			}
			r.archived()
			if step == "PlanTest" {
				r.set(lab.BlackHole)
			}
			run, err := r.client.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{ID: workflows.RestoreTestWorkflowID("main"), TaskQueue: workflows.Queue},
				workflows.RestoreTestName, workflows.RestoreTestRequest{Host: "db1", Request: proof.Request{Cluster: "main"}})
			if err != nil {
				t.Fatal(err)
			}
			r.step(run, step)
			r.set(lab.BlackHole) // so that it does not end before it is killed
			w.signal(syscall.SIGKILL)
			r.set(lab.Pass)
			r.worker()
			var res workflows.RestoreTestResult
			if err := run.Get(t.Context(), &res); err != nil {
				t.Fatal(err)
			}
			if res.Report.Verdict != proof.Passed {
				t.Errorf("%+v", res.Report)
			}
			t.Logf("attempts: %v", r.attempts(run))
			r.nothingLeft(dir)
		})
	}
}

func (r *rig) set(mode lab.ProxyMode) {
	r.t.Helper()
	if err := r.proxy.Set(mode); err != nil {
		r.t.Fatal(err)
	}
}
