package e2e

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/client"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/workflows"
)

// A fleet is hosts that share a repository and a Temporal server. All have the
// same list of clusters and schedules, as whoever looks after a fleet gives them.
type fleet struct {
	t        *testing.T
	temporal *lab.Temporal
	s3       *lab.S3
	client   client.Client
	hosts    map[string]*host
	clusters map[string]*member
}

// A host is a machine: what is on it, no other may touch.
type host struct {
	rig
	name    string
	scratch string // directory of its sandboxes
	worker  *process
}

// A member is one of the clusters.
type member struct {
	*lab.Postgres
	name, host string
	system     string
}

// fleetKinds are what is scheduled for each cluster.
var fleetKinds = []string{workflows.Physical, workflows.Logical, workflows.KindWALAudit, workflows.KindRestoreTest}

// newFleet starts the clusters of on, which says whose worker backs each up, and
// makes the repository. No worker runs.
func newFleet(t *testing.T, on map[string]string) *fleet {
	t.Helper()
	t.Parallel()
	f := &fleet{t: t, temporal: lab.TemporalForTest(t), s3: lab.S3ForTest(t), hosts: make(map[string]*host), clusters: make(map[string]*member)}
	var err error
	f.client, err = client.Dial(client.Options{HostPort: f.temporal.Address, Namespace: f.temporal.Namespace, Logger: quiet{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(f.client.Close)
	var list, schedules []string
	for _, name := range slices.Sorted(maps.Keys(on)) {
		m := f.start(name, on[name])
		f.clusters[name] = m
		list = append(list, fmt.Sprintf(`  %s: {host: %s, conninfo: "%s", password_file: HOSTDIR/password, logical: {lock_wait: 3m}}`,
			name, m.host, strings.Replace(m.TCPConninfo(), "user=postgres", "user=keeper_HOSTNAME", 1)))
		for _, kind := range fleetKinds {
			schedules = append(schedules, fmt.Sprintf(`  - {cluster: %s, kind: %s, cron: "@every 1m", jitter: 0s}`, name, kind))
		}
	}
	text := fmt.Sprintf(`
repository: {url: "s3://%s/fleet", endpoint: "%s", ca_file: HOSTDIR/ca.pem, access_key_id: %s, secret_access_key_file: HOSTDIR/secret}
keys: {signing_key: HOSTDIR/signing.key, metadata_identity: HOSTDIR/metadata.key, identity: HOSTDIR/operator.key, trusted_signers: [SIGNERS]}
temporal: {address: "%s", namespace: %s}
host: HOSTNAME
spool: HOSTDIR/spool
restore_test: {directory: HOSTDIR/s, memory: 256MB}
clusters:
%s
schedules:
%s
`, f.s3.Bucket, f.s3.Endpoint, f.s3.AccessKeyID, f.temporal.Address, f.temporal.Namespace, strings.Join(list, "\n"), strings.Join(schedules, "\n"))

	// Each host makes keys of its own; the first also makes the repository, for an
	// operator whose key both then have, to read back and to test.
	var signers []string
	var operator []byte
	names := slices.Compact(slices.Sorted(maps.Values(on)))
	for i, name := range names {
		dir := lab.DirForTest(t) // PostgreSQL's user reads it
		h := &host{rig: rig{t: t, s3: f.s3, temporal: f.temporal, client: f.client, dir: dir, config: filepath.Join(dir, "pgkeep.yaml")}, name: name, scratch: filepath.Join(dir, "s")}
		f.hosts[name] = h
		ca, err := os.ReadFile(f.s3.CAFile)
		if err != nil {
			t.Fatal(err)
		}
		h.write("ca.pem", string(ca))
		h.write("secret", f.s3.SecretAccessKey)
		h.write("password", canary)
		h.write("pgkeep.yaml", h.filled(text, signers))
		args := []string{"key", "init"}
		if i == 0 {
			args = []string{"init", "--new-identity", filepath.Join(dir, "operator.key")}
		} else {
			h.write("operator.key", string(operator))
		}
		res := h.run(args...)
		signer := regexp.MustCompile(`pgkeep-signer:\S+`).FindString(res.err)
		if res.status != 0 || signer == "" {
			t.Fatalf("pgkeep %s on %s: status %d\n%s%s", strings.Join(args, " "), name, res.status, res.out, res.err)
		}
		signers = append(signers, strconv.Quote(signer))
		if operator, err = os.ReadFile(filepath.Join(dir, "operator.key")); err != nil {
			t.Fatal(err)
		}
	}
	archiver, err := os.ReadFile(filepath.Join(filepath.Dir(program), "pgkeep-wal"))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range f.hosts {
		h.write("pgkeep.yaml", h.filled(text, signers))
		h.walProgram = h.write("pgkeep-wal", string(archiver))
		if err := cmp.Or(os.Chmod(h.walProgram, 0o700), lab.Own(h.dir)); err != nil {
			t.Fatal(err)
		}
	}
	f.each(func(m *member) error {
		h := f.hosts[m.host]
		return m.Exec(t.Context(), "postgres", "ALTER SYSTEM SET archive_command = '"+h.walProgram+" push --config "+h.config+" --cluster "+m.name+" %p'", "SELECT pg_reload_conf()")
	})
	return f
}

// filled is text as it stands on the host.
func (h *host) filled(text string, signers []string) string {
	return strings.NewReplacer("HOSTDIR", h.dir, "HOSTNAME", h.name, "SIGNERS", strings.Join(signers, ", ")).Replace(text)
}

// start starts a cluster. A role for each host may get in: none is kept out by
// PostgreSQL.
func (f *fleet) start(name, host string) *member {
	f.t.Helper()
	m := &member{Postgres: lab.PostgresForTest(f.t, lab.PostgresOptions{Password: canary, WALSegmentMB: 1,
		Settings: map[string]string{"archive_mode": "on", "log_connections": "on"}}), name: name, host: host}
	err := m.Exec(f.t.Context(), "postgres", "CREATE ROLE keeper_db1 LOGIN SUPERUSER PASSWORD '"+canary+"'", "CREATE ROLE keeper_db2 LOGIN SUPERUSER PASSWORD '"+canary+"'",
		"CREATE TABLE whose AS SELECT '"+name+"' AS name, i FROM generate_series(1, 1000) i")
	if err != nil {
		f.t.Fatal(err)
	}
	conn, err := m.Connect(f.t.Context(), "postgres")
	if err == nil {
		defer conn.Close(f.t.Context())
		err = conn.QueryRow(f.t.Context(), "SELECT system_identifier::text FROM pg_control_system()").Scan(&m.system)
	}
	if err != nil {
		f.t.Fatal(err)
	}
	return m
}

// each does something for each cluster, all at once.
func (f *fleet) each(do func(m *member) error) {
	f.t.Helper()
	var wg sync.WaitGroup
	for _, m := range f.clusters {
		wg.Go(func() {
			if err := do(m); err != nil {
				f.t.Errorf("%s: %v", m.name, err)
			}
		})
	}
	if wg.Wait(); f.t.Failed() {
		f.t.FailNow()
	}
}

// A fleetRun is a run of a workflow, and of what cluster it is.
type fleetRun struct {
	client.WorkflowRun
	cluster, kind string
	scheduled     bool // a schedule started it
	status        enumspb.WorkflowExecutionStatus
}

// runs are all that there ever were.
func (f *fleet) runs() (all []fleetRun) {
	f.t.Helper()
	res, err := f.client.ListWorkflow(f.t.Context(), &workflowservice.ListWorkflowExecutionsRequest{PageSize: 1000})
	if err != nil {
		f.t.Fatal(err)
	}
	for _, e := range res.Executions {
		parts := strings.Split(e.Execution.WorkflowId, "/")
		if len(parts) < 3 || parts[0] != "pgkeep" || f.clusters[parts[1]] == nil {
			continue // Temporal's own, which keep schedules
		}
		all = append(all, fleetRun{f.client.GetWorkflow(f.t.Context(), e.Execution.WorkflowId, e.Execution.RunId), parts[1], parts[2], len(parts) > 3, e.Status})
	}
	return all
}

// ended counts the scheduled runs of a cluster and kind that are over.
func (f *fleet) ended(cluster, kind string) (n int) {
	for _, r := range f.runs() {
		if r.scheduled && r.cluster == cluster && r.kind == kind && r.status != enumspb.WORKFLOW_EXECUTION_STATUS_RUNNING {
			n++
		}
	}
	return n
}

// Two hosts with three clusters: everything there is runs side by side, started by
// schedules, and nothing crosses over. A worker that is gone stops its own work
// only.
func TestHostsAndClustersSideBySide(t *testing.T) {
	f := newFleet(t, map[string]string{"alpha": "db1", "beta": "db1", "gamma": "db2"})
	db1, db2 := f.hosts["db1"], f.hosts["db2"]
	for _, h := range f.hosts {
		h.worker = h.rig.worker()
	}
	f.each(func(m *member) error { // something to test; by the other host's hand
		h := db1
		if m.host == h.name {
			h = db2
		}
		if res := h.run("backup", "--kind", "physical", m.name); res.status != 0 {
			return fmt.Errorf("status %d\n%s%s", res.status, res.out, res.err)
		}
		return nil
	})

	// A dump that waits for a lock, until everything else is over.
	lock, err := f.clusters["alpha"].Connect(t.Context(), "postgres")
	if err == nil {
		_, err = lock.Exec(t.Context(), "BEGIN; LOCK TABLE whose")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close(context.Background())
	if said := db1.must("schedule", "apply"); strings.Count(said, "create ") != 12 {
		t.Errorf("applied:\n%s", said)
	}
	if said := db2.must("schedule", "apply", "--prune"); strings.Count(said, "unchanged ") != 12 {
		t.Errorf("the other host wants something else:\n%s", said)
	}
	sandboxes := map[string]map[string]bool{"db1": {}, "db2": {}} // names of those that were seen
	look := func() {
		for name, h := range f.hosts {
			seen, _ := os.ReadDir(h.scratch)
			for _, s := range seen {
				sandboxes[name][s.Name()] = true
			}
		}
	}
	fired := make(map[string]bool)
	db1.until("every schedule has fired", func() bool {
		look()
		for _, r := range f.runs() {
			if r.scheduled {
				fired[r.cluster+"/"+r.kind] = true
			}
		}
		return len(fired) == 12
	})
	for name := range fired {
		db1.must("schedule", "pause", name)
	}
	db1.until("all is over but the dump that waits", func() bool {
		look()
		over := 0
		for name := range fired {
			cluster, kind, _ := strings.Cut(name, "/")
			over += min(1, f.ended(cluster, kind))
		}
		return over == 11
	})
	if n := f.ended("alpha", workflows.Logical); n != 0 {
		t.Errorf("%d dumps of alpha are over", n)
	}
	if left, _ := os.ReadDir(filepath.Join(db1.dir, "spool", "alpha")); len(left) != 1 {
		t.Errorf("the dump that waits has %v in the spool", left)
	}
	// The mutex is the cluster's, whoever asks.
	if res := db2.run("backup", "--kind", "logical", "alpha"); res.status != 19 {
		t.Errorf("a second dump of alpha: status %d\n%s%s", res.status, res.out, res.err)
	}
	lock.Close(t.Context())
	db1.until("the last dump is over", func() bool { return f.ended("alpha", workflows.Logical) >= 1 })

	// db1 is gone. What is db2's goes on; what is db1's waits for it.
	db1.worker.signal(syscall.SIGKILL)
	before := make(map[string]int)
	again := []string{"alpha/logical", "beta/wal-audit", "gamma/logical", "gamma/restore-test"}
	over := func(name string) bool {
		cluster, kind, _ := strings.Cut(name, "/")
		return f.ended(cluster, kind) > before[name]
	}
	for _, name := range again {
		cluster, kind, _ := strings.Cut(name, "/")
		before[name] = f.ended(cluster, kind)
		db2.must("schedule", "trigger", name)
	}
	db2.until("what is db2's is over", func() bool { return over("gamma/logical") && over("gamma/restore-test") })
	if over("alpha/logical") || over("beta/wal-audit") {
		t.Error("somebody did the work of a worker that is gone")
	}
	db1.worker = db1.rig.worker()
	db1.until("what is db1's is over", func() bool { return over("alpha/logical") && over("beta/wal-audit") })

	for _, h := range f.hosts {
		h.nothingLeft(h.scratch)
		for _, m := range f.clusters {
			if left, err := os.ReadDir(filepath.Join(h.dir, "spool", m.name)); len(left) > 0 || m.host != h.name && !os.IsNotExist(err) {
				t.Errorf("spool of %s for %s: %v, %v", h.name, m.name, left, err)
			}
		}
	}
	f.nobodyCrossed(sandboxes)
	f.objectsAreWhereTheyBelong()
	f.each(func(m *member) error {
		h := f.hosts[m.host]
		if res := h.run("verify", "--cluster", m.name, "--all"); res.status != 0 {
			return fmt.Errorf("status %d\n%s%s", res.status, res.out, res.err)
		}
		return nil
	})
}

// nobodyCrossed looks at every history, and at the servers' logs: each step was
// on the queue of the cluster's host, and done there.
func (f *fleet) nobodyCrossed(sandboxes map[string]map[string]bool) {
	f.t.Helper()
	tested := make(map[string]map[string]bool) // names of sandboxes that there were, by host
	for _, r := range f.runs() {
		want := f.clusters[r.cluster].host
		what := r.GetID() + " " + r.GetRunID()
		if r.status != enumspb.WORKFLOW_EXECUTION_STATUS_COMPLETED {
			f.t.Errorf("%s: %v: %v", what, r.status, r.Get(f.t.Context(), nil))
			continue
		}
		anywhere := make(map[int64]bool) // news of a host that is busy or gone, which any worker tells
		for _, e := range f.hosts[want].history(r).Events {
			if a := e.GetActivityTaskScheduledEventAttributes(); a != nil && a.ActivityType.GetName() == "Notify" && a.TaskQueue.GetName() == workflows.Queue {
				anywhere[e.EventId] = true
			} else if a != nil && a.TaskQueue.GetName() != "pgkeep-host-"+want {
				f.t.Errorf("%s: %s was on queue %s", what, a.ActivityType.GetName(), a.TaskQueue.GetName())
			}
			if a := e.GetActivityTaskStartedEventAttributes(); a != nil && a.Identity != "pgkeep@"+want && !anywhere[a.ScheduledEventId] {
				f.t.Errorf("%s: an activity was done by %s", what, a.Identity)
			}
		}
		if r.kind == workflows.KindRestoreTest && !r.scheduled {
			var res workflows.RestoreTestResult
			if err := r.Get(f.t.Context(), &res); err != nil {
				f.t.Fatal(err)
			}
			if tested[want] == nil {
				tested[want] = make(map[string]bool)
			}
			tested[want]["pgkeep-sandbox-"+string(res.Subject.Test)] = true
			if res.Subject.Cluster != r.cluster {
				f.t.Errorf("%s: tested a backup of %s", what, res.Subject.Cluster)
			}
		}
	}
	for name := range f.hosts {
		if len(sandboxes[name]) == 0 || len(tested[name]) < 2 {
			f.t.Errorf("on %s: sandboxes %v, tests %v", name, sandboxes[name], tested[name])
		}
		for sandbox := range sandboxes[name] {
			if !tested[name][sandbox] {
				f.t.Errorf("%s was on %s, whose tests were %v", sandbox, name, tested[name])
			}
		}
	}
	for _, m := range f.clusters {
		log, err := os.ReadFile(filepath.Join(filepath.Dir(m.DataDir), "log"))
		if err != nil {
			f.t.Fatal(err)
		}
		for name := range f.hosts {
			if came := bytes.Contains(log, []byte("user=keeper_"+name+" ")); came != (name == m.host) {
				f.t.Errorf("the worker of %s asked %s, which is of %s: %v", name, m.name, m.host, came)
			}
		}
	}
}

// objectsAreWhereTheyBelong looks at every object of the bucket.
func (f *fleet) objectsAreWhereTheyBelong() {
	f.t.Helper()
	root := filepath.Join(f.s3.Data, "fleet")
	backups, segments := make(map[string]int), make(map[string]int)
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		key := strings.TrimPrefix(path, root+"/")
		parts := strings.Split(key, "/")
		switch {
		case key == "PGKEEP" || parts[0] == "keys":
			return nil
		case parts[0] == "names" && len(parts) == 2 && f.clusters[parts[1]] != nil:
			return nil
		case parts[0] != "clusters" || len(parts) < 3 || f.clusters[parts[1]] == nil:
			f.t.Errorf("whose is %s?", key)
			return nil
		}
		m := f.clusters[parts[1]]
		switch parts[2] {
		case "wal":
			if !strings.HasPrefix(parts[3], m.system+"-") {
				f.t.Errorf("%s is not of the system %s of %s", key, m.system, m.name)
			}
			segments[m.name]++
		case "backups":
			text, err := os.ReadFile(path)
			if err != nil || parts[len(parts)-1] != "manifest.json" {
				return err
			}
			line, _, _ := bytes.Cut(text, []byte("\n"))
			var manifest struct {
				Cluster, Host, Kind string
				System              json.Number `json:"system_id"`
			}
			d := json.NewDecoder(bytes.NewReader(line))
			d.UseNumber()
			if err := d.Decode(&manifest); err != nil {
				return err
			}
			if manifest.Cluster != m.name || manifest.Host != m.host || strings.Trim(manifest.System.String(), `"`) != m.system {
				f.t.Errorf("%s is of %+v, want cluster %s, host %s, system %s", key, manifest, m.name, m.host, m.system)
			}
			backups[m.name+" "+manifest.Kind]++
		}
		return nil
	})
	if err != nil {
		f.t.Fatal(err)
	}
	for name := range f.clusters {
		if backups[name+" physical"] < 2 || backups[name+" logical"] < 1 || segments[name] < 3 {
			f.t.Errorf("objects of %s: %v backups, %d of log", name, backups, segments[name])
		}
	}
}
