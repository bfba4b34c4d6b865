package e2e

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"

	commonpb "go.temporal.io/api/common/v1"
	"go.temporal.io/api/temporalproto"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/converter"
	"go.temporal.io/sdk/worker"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/workflows"
)

// archive lets PostgreSQL archive with pgkeep-wal, past the proxy. Extra is more
// of the configuration of the cluster.
func (r *rig) archive() {
	r.t.Helper()
	dir := lab.DirForTest(r.t) // PostgreSQL's user reads it
	text, err := os.ReadFile(r.config)
	if err != nil {
		r.t.Fatal(err)
	}
	r.wal = filepath.Join(dir, "pgkeep.yaml")
	config := strings.NewReplacer(r.proxy.Addr, r.s3.Addr, r.dir, dir, r.s3.CAFile, dir+"/ca.pem").Replace(string(text))
	files := map[string]string{"pgkeep-wal": filepath.Join(filepath.Dir(program), "pgkeep-wal"), "pgkeep.yaml": "", "ca.pem": r.s3.CAFile, "secret": "", "password": "",
		"keys/signing.key": "", "keys/metadata.key": "", "keys/operator.key": ""}
	if err := os.MkdirAll(filepath.Join(dir, "keys"), 0o700); err != nil {
		r.t.Fatal(err)
	}
	for name, from := range files {
		if from == "" {
			from = filepath.Join(r.dir, name)
		}
		b, err := os.ReadFile(from)
		if name == "pgkeep.yaml" {
			b = []byte(config)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), b, 0o700)
		}
		if err != nil {
			r.t.Fatal(err)
		}
	}
	for _, name := range append([]string{"", "keys"}, slices.Collect(maps.Keys(files))...) {
		if err := lab.Own(filepath.Join(dir, name)); err != nil {
			r.t.Fatal(err)
		}
	}
	r.walProgram = filepath.Join(dir, "pgkeep-wal")
	err = r.pg.Restart(r.t.Context(), map[string]string{"archive_mode": "on", "archive_command": r.walProgram + " push --config " + r.wal + " %p"})
	if err != nil {
		r.t.Fatal(err)
	}
}

// physical starts a physical backup and does not wait for it.
func (r *rig) physical() client.WorkflowRun {
	r.t.Helper()
	var started struct{ Workflow, Run string }
	r.decode(r.must("backup", "--kind", "physical", "--detach", "--json", "main"), &started)
	return r.client.GetWorkflow(r.t.Context(), started.Workflow, started.Run)
}

// opened restores a backup, recovers to the end of the log, and compares with
// the source.
func (r *rig) opened(args ...string) {
	r.t.Helper()
	dir := lab.DirForTest(r.t)
	args = append([]string{"restore", "--config", r.wal, "--target-dir", filepath.Join(dir, "data"), "--target-action", "promote"}, args...)
	cmd := r.command(args...)
	cmd.Env = append(cmd.Env, "PATH="+filepath.Dir(r.walProgram)+":"+os.Getenv("PATH"))
	if out, err := cmd.CombinedOutput(); err != nil {
		r.t.Fatalf("pgkeep %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	copied := lab.PostgresForTest(r.t, lab.PostgresOptions{Dir: dir})
	conn, err := copied.Connect(r.t.Context(), "postgres")
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close(r.t.Context())
	r.until("recovery ends", func() bool {
		var recovering bool
		if err := conn.QueryRow(r.t.Context(), "SELECT pg_is_in_recovery()").Scan(&recovering); err != nil {
			r.t.Fatal(err)
		}
		return !recovering
	})
	want, err := lab.Fingerprint(r.t.Context(), r.pg.Conninfo()+" dbname=app")
	if err != nil {
		r.t.Fatal(err)
	}
	got, err := lab.Fingerprint(r.t.Context(), copied.Conninfo()+" dbname=app")
	if err != nil {
		r.t.Fatal(err)
	}
	if len(want) == 0 || fmt.Sprint(want) != fmt.Sprint(got) {
		r.t.Errorf("restored\n%v\nwant\n%v", got, want)
	}
}

// A physical backup, and one more that sends only what changed; both restore,
// and no secret turns up on the way.
func TestPhysicalBackupAndRestore(t *testing.T) {
	r := setup(t, 5000)
	r.archive()
	w := r.worker()
	var full, next workflows.PhysicalBackupResult
	r.decode(r.must("backup", "--json"), &full) // physical, for the cluster is here
	if full.Verified != "content" || full.Copy.Sent == 0 || full.Copy.Stop <= full.Copy.Start {
		t.Errorf("backup said %+v", full)
	}
	if err := r.pg.Exec(t.Context(), "app", "UPDATE small SET m = 'changed' WHERE i = 77"); err != nil {
		t.Fatal(err)
	}
	r.decode(r.must("backup", "--json"), &next)
	if next.Copy.Sent > full.Copy.Sent/10 {
		t.Errorf("the second backup sent %d bytes, the first %d", next.Copy.Sent, full.Copy.Sent)
	}
	if err := r.pg.Exec(t.Context(), "app", "DELETE FROM big WHERE i % 3 = 0", "SELECT pg_switch_wal()"); err != nil {
		t.Fatal(err)
	}
	r.archived()
	if got := r.listed(); !slices.Equal(got, []string{full.ID, next.ID}) {
		t.Errorf("listed %v, want %v and %v", got, full.ID, next.ID)
	}
	r.must("verify", "--all")
	r.opened("latest")
	r.opened(full.ID)
	r.must("delete", "--yes", full.ID) // the next one keeps what it uses
	r.must("verify", next.ID)
	r.opened(next.ID)

	dir := lab.DirForTest(t)
	said := r.must("restore", "--host", "db1", "--target-dir", dir+"/data", "--to-lsn", next.Copy.Stop.String(), "latest")
	if _, err := os.Stat(dir + "/data/global/pg_control"); err != nil || !strings.Contains(said, next.ID) {
		t.Errorf("restored by the worker: %v\n%s", err, said)
	}
	if res := r.run("restore", "--host", "db1", "--target-dir", dir+"/data"); res.status != 18 {
		t.Errorf("restored over it: status %d\n%s", res.status, res.err)
	}
	r.record(r.client.GetWorkflow(t.Context(), workflows.RestoreWorkflowID("db1", dir+"/data"), ""), "restore-refused")

	run := r.client.GetWorkflow(t.Context(), "pgkeep/main/physical", "")
	r.record(run, "physical")
	h := r.history(run)
	if n := len(h.Events); n > 60 {
		t.Errorf("%d events", n)
	}
	history, err := h.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	r.noCanary("the history", history)
	w.signal(syscall.SIGTERM)
	for _, log := range r.logs {
		text, err := os.ReadFile(log.Name())
		if err != nil {
			t.Fatal(err)
		}
		r.noCanary("the worker's log", text)
	}
}

// archived waits until the newest complete segment is.
func (r *rig) archived() {
	r.t.Helper()
	conn, err := r.pg.Connect(r.t.Context(), "postgres")
	if err != nil {
		r.t.Fatal(err)
	}
	defer conn.Close(r.t.Context())
	var last string
	if err := conn.QueryRow(r.t.Context(), "SELECT pg_walfile_name(pg_switch_wal())").Scan(&last); err != nil {
		r.t.Fatal(err)
	}
	r.until(last+" is archived", func() bool {
		var have string
		if err := conn.QueryRow(r.t.Context(), "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver").Scan(&have); err != nil {
			r.t.Fatal(err)
		}
		return have >= last
	})
}

// The worker is killed in the middle of the copy; the next attempt finishes, and
// sends hardly anything again.
func TestPhysicalBackupSurvivesAKilledWorker(t *testing.T) {
	t.Parallel()
	percents := []int64{50}
	if os.Getenv("PGKEEP_TEST_KILLS") == "all" {
		percents = []int64{10, 50, 90}
	}
	for _, percent := range percents {
		t.Run(fmt.Sprintf("at %d%%", percent), func(t *testing.T) {
			r := setup(t, 60_000)
			r.slowly("2MB") // progress is told every three seconds
			r.archive()
			w := r.worker()
			run := r.physical()
			r.until(fmt.Sprintf("%d%% are copied", percent), func() bool {
				p := r.heartbeat(run, "CopyCluster")
				return p.Total > 0 && p.Done*100 >= p.Total*percent &&
					(percent == 10 || len(r.packs()) > 0) // each reader fills a pack of its own
			})
			w.signal(syscall.SIGKILL)
			before := int64(0)
			for _, size := range r.packs() {
				before += size
			}
			r.slowly("0")
			r.worker()
			var res workflows.PhysicalBackupResult
			if err := run.Get(t.Context(), &res); err != nil {
				t.Fatal(err)
			}
			after := int64(0)
			for _, size := range r.packs() {
				after += size
			}
			again := after - res.Copy.Stored
			t.Logf("stored before the kill: %d; the backup refers to %d; sent again: %d", before, res.Copy.Stored, again)
			if again*10 > before {
				t.Errorf("%d bytes were sent again, of %d stored before", again, before)
			}
			if got := r.attempts(run)["CopyCluster"]; got != 2 {
				t.Errorf("CopyCluster was tried %d times", got)
			}
			if n := len(r.history(run).Events); n > 200 {
				t.Errorf("%d events", n)
			}
			if got := r.listed(); !slices.Equal(got, []string{res.ID}) {
				t.Errorf("listed %v, want %v", got, res.ID)
			}
			r.opened("latest")
		})
	}
}

// slowly sets how much is read in a second.
func (r *rig) slowly(rate string) {
	r.t.Helper()
	text, err := os.ReadFile(r.config)
	if err != nil {
		r.t.Fatal(err)
	}
	r.config = r.write("pgkeep.yaml", rateSetting.ReplaceAllString(string(text), "rate: "+rate))
}

var rateSetting = regexp.MustCompile(`rate: \w+`)

// heartbeat returns what the activity told last.
func (r *rig) heartbeat(run client.WorkflowRun, name string) (p activities.Progress) {
	r.t.Helper()
	d, err := r.client.DescribeWorkflowExecution(r.t.Context(), run.GetID(), run.GetRunID())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, a := range d.PendingActivities {
		if a.ActivityType.GetName() == name && a.HeartbeatDetails != nil {
			if err := fromPayloads(a.HeartbeatDetails, &p); err != nil {
				r.t.Fatal(err)
			}
		}
	}
	return p
}

func fromPayloads(p *commonpb.Payloads, v any) error {
	return converter.GetDefaultDataConverter().FromPayloads(p, v)
}

// -record DIR keeps histories for the replay test of package workflows; see
// there.
var recordTo = flag.String("record", "", "write histories to this directory")

// record replays the history of a run, and keeps it if asked to.
func (r *rig) record(run client.WorkflowRun, scenario string) {
	r.t.Helper()
	h := r.history(run)
	replayer := worker.NewWorkflowReplayer()
	workflows.Register(replayer)
	if err := replayer.ReplayWorkflowHistory(nil, h); err != nil {
		r.t.Errorf("replay of %s: %v", scenario, err)
	}
	if *recordTo == "" {
		return
	}
	b, err := temporalproto.CustomJSONMarshalOptions{Indent: "  "}.Marshal(h)
	if err == nil {
		err = os.WriteFile(filepath.Join(*recordTo, scenario+".json"), append(b, '\n'), 0o644)
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// P20: a cluster with a page that the disk spoiled is backed up, and somebody is
// told; the backup counts for nothing, and the last clean one stays the newest.
func TestADamagedPageIsNamedAndTheCleanBackupKept(t *testing.T) {
	r := setup(t, 500)
	r.archive()
	r.worker()
	var clean workflows.PhysicalBackupResult
	r.decode(r.must("backup", "--json"), &clean)
	conn, err := r.pg.Connect(t.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	var relation string
	_, err = conn.Exec(t.Context(), "CHECKPOINT")
	if err == nil {
		err = conn.QueryRow(t.Context(), "SELECT pg_relation_filepath('small')").Scan(&relation)
	}
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.OpenFile(filepath.Join(r.pg.DataDir, relation), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	const at = 3*8192 + 5000
	b := make([]byte, 1)
	if _, err := file.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := file.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}

	for _, how := range [][]string{{"backup"}, {"backup", "--direct"}} {
		if res := r.run(how...); res.status != 24 || !strings.Contains(res.err, "1 damaged page") {
			t.Fatalf("pgkeep %v: status %d\n%s%s", how, res.status, res.out, res.err)
		}
	}
	ids := r.listed()
	if len(ids) != 3 || ids[0] != clean.ID {
		t.Fatalf("listed %v", ids)
	}
	if said := r.must("list"); strings.Count(said, "DAMAGED PAGES") != 2 {
		t.Errorf("list says\n%s", said)
	}
	if said := r.must("show", ids[2]); !strings.Contains(said, "data/"+relation+", blocks [3]") {
		t.Errorf("show says\n%s", said)
	}
	if res := r.run("verify", ids[2]); res.status != 24 {
		t.Errorf("verify: status %d\n%s%s", res.status, res.out, res.err)
	}
	pointer, err := os.ReadFile(filepath.Join(r.s3.Data, "test/clusters/main/latest-physical.json"))
	if err != nil || !strings.Contains(string(pointer), clean.ID) {
		t.Errorf("for scripts, the newest is not %s: %v\n%s", clean.ID, err, pointer)
	}
	dir := lab.DirForTest(t)
	if said := r.must("restore", "--dry-run", "--target-dir", dir+"/data"); !strings.Contains(said, "restore backup "+clean.ID) {
		t.Errorf("restore would take\n%s", said)
	}
	r.must("delete", "--yes", ids[1])
	if pointer, err := os.ReadFile(filepath.Join(r.s3.Data, "test/clusters/main/latest-physical.json")); err != nil || !strings.Contains(string(pointer), clean.ID) {
		t.Errorf("after a deletion, the newest is not %s: %v\n%s", clean.ID, err, pointer)
	}
}
