package e2e

import (
	"bytes"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/lab"
)

// The main story: back up, list, verify, restore, compare; and nowhere on the
// way does the password turn up.
func TestBackupAndRestore(t *testing.T) {
	r := setup(t, 2000)
	w := r.worker()
	var done struct {
		ID, Verified string
		Databases    int
		Stored       int64
	}
	r.decode(r.must("backup", "--kind", "logical", "--json"), &done)
	if done.Databases != 2 || done.Verified != "content" || done.Stored == 0 {
		t.Errorf("backup said %+v", done)
	}
	if got := r.listed(); !slices.Equal(got, []string{done.ID}) {
		t.Errorf("listed %v, want %v", got, done.ID)
	}
	r.must("verify", done.ID)
	r.restored()

	history, err := r.history(r.client.GetWorkflow(t.Context(), "pgkeep/main/logical", "")).Marshal() // payloads stand in it as they are
	if err != nil {
		t.Fatal(err)
	}
	if status := w.signal(syscall.SIGTERM); status != 0 {
		t.Errorf("worker ended with status %d", status)
	}
	if !bytes.Contains(history, []byte(done.ID)) {
		t.Error("the history was not seen")
	}
	r.noCanary("the history", history)
	for _, log := range r.logs {
		text, err := os.ReadFile(log.Name())
		if err != nil || len(text) == 0 {
			t.Errorf("%s: %d bytes, %v", log.Name(), len(text), err)
		}
		r.noCanary("the worker's log", text)
	}
	objects := 0
	err = filepath.WalkDir(r.s3.Data, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		objects++
		b, err := os.ReadFile(path)
		r.noCanary(path, b)
		return err
	})
	if err != nil || objects < 5 {
		t.Errorf("%d objects, %v", objects, err)
	}
	r.exitDoor(done.ID)
	r.must("delete", "--yes", done.ID)
	if got := r.listed(); len(got) != 0 {
		t.Errorf("listed %v after it was deleted", got)
	}
}

// exitDoor reads the backup without pgkeep, by the commands that docs/FORMAT.md
// gives.
func (r *rig) exitDoor(id string) {
	r.t.Helper()
	doc, err := os.ReadFile("../../docs/FORMAT.md")
	if err != nil {
		r.t.Fatal(err)
	}
	_, script, ok := strings.Cut(string(doc), "```sh\n")
	script, _, _ = strings.Cut(script, "```")
	dir := filepath.Join(r.dir, "bucket")
	key, err := os.ReadFile(filepath.Join(r.dir, "keys/operator.key"))
	if err == nil {
		err = os.CopyFS(dir, os.DirFS(filepath.Join(r.s3.Data, "test")))
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(dir, "operator.key"), key, 0o600)
	}
	if err != nil || !ok {
		r.t.Fatal(ok, err)
	}
	cmd := exec.Command("bash", "-euo", "pipefail", "-c", script)
	cmd.Dir, cmd.Env = dir, append(os.Environ(), "id="+id)
	if out, err := cmd.CombinedOutput(); err != nil {
		r.t.Fatalf("%v\n%s", err, out)
	}
	sql, err := os.ReadFile(filepath.Join(dir, "globals.sql"))
	if err != nil || !bytes.Contains(sql, []byte("CREATE ROLE keeper")) || bytes.Contains(sql, []byte("SCRAM-SHA-256")) {
		r.t.Errorf("globals.sql: %v\n%s", err, sql)
	}
}

func (r *rig) noCanary(where string, text []byte) {
	r.t.Helper()
	if bytes.Contains(text, []byte(canary)) || bytes.Contains(text, []byte(r.s3.SecretAccessKey)) {
		r.t.Errorf("%s holds a secret", where)
	}
}

// once checks what must be true however a backup came about: it is listed, the
// only one, restores, and left nothing in the spool.
func (r *rig) once(id string) {
	r.t.Helper()
	if got := r.listed(); !slices.Equal(got, []string{id}) {
		r.t.Errorf("listed %v, want %v only", got, id)
	}
	if left := r.spool(); len(left) > 0 {
		r.t.Errorf("spool still holds %v", left)
	}
	r.restored()
}

func TestKillDuringDump(t *testing.T) {
	r := setup(t, 1000)
	w := r.worker()
	release := r.hold()
	run := r.start()
	r.until("pg_dump waits for a lock", r.dumping)
	w.signal(syscall.SIGKILL)
	r.until("pg_dump ends with its worker", func() bool { return !r.dumping() })
	release()
	r.worker()
	r.once(r.finish(run).ID)
	if got := r.attempts(run)["Dump"]; got != 2 {
		t.Errorf("%d attempts to dump, want 2", got)
	}
}

func TestKillDuringUpload(t *testing.T) {
	r := setup(t, 300_000)
	w := r.worker()
	run := r.start()
	r.until("a third is stored", func() bool { return len(r.packs()) >= 5 })
	w.signal(syscall.SIGKILL)
	before := r.packs()
	if n := len(r.listed()); n != 0 {
		t.Errorf("%d backups listed before it is published", n)
	}
	r.worker()
	res := r.finish(run)
	var up activities.UploadResult
	r.resultOf(run, "Upload", &up)
	var stored, all int64
	for _, n := range before {
		stored += n
	}
	for _, n := range r.packs() {
		all += n
	}
	again := all - res.Stored // in the bucket, and not part of the backup
	t.Logf("stored %d bytes in %d packs before the kill; %d sent after it, %d of %d in all kept; %d sent again", stored, len(before), up.Sent, up.Kept, up.Bytes, again)
	if up.Kept == 0 || again*10 > stored || up.Sent+stored-again > res.Stored {
		t.Errorf("%d bytes sent again, of %d stored before", again, stored)
	}
	if got := r.attempts(run); got["Dump"] != 1 || got["Upload"] < 2 {
		t.Errorf("attempts: %v", got)
	}
	r.once(res.ID)
}

func TestKillDuringVerify(t *testing.T) {
	r := setup(t, 200_000)
	w := r.worker()
	run := r.start()
	r.step(run, "Verify")
	w.signal(syscall.SIGKILL)
	if n := len(r.listed()); n != 0 {
		t.Errorf("%d backups listed before it is published", n)
	}
	r.worker()
	res := r.finish(run)
	if got := r.attempts(run); got["Dump"] != 1 || got["Upload"] != 1 || got["Verify"] != 2 {
		t.Errorf("attempts: %v", got)
	}
	r.once(res.ID)
}

func TestStoreDownDuringUpload(t *testing.T) {
	r := setup(t, 200_000)
	r.worker()
	run := r.start()
	r.until("some is stored", func() bool { return len(r.packs()) >= 3 })
	if err := r.proxy.Set(lab.Refuse); err != nil {
		t.Fatal(err)
	}
	<-time.After(60 * time.Second) // the outage that is promised to be survived
	if err := r.proxy.Set(lab.Pass); err != nil {
		t.Fatal(err)
	}
	res := r.finish(run)
	if got := r.attempts(run); got["Dump"] != 1 {
		t.Errorf("attempts: %v", got)
	}
	r.once(res.ID)
}

func TestStoreDeniesCredentials(t *testing.T) {
	r := setup(t, 1)
	r.write("secret", "wrong")
	r.worker()
	began := time.Now()
	res := r.run("backup", "--kind", "logical")
	if res.status != 21 || !strings.Contains(res.err, "hint:") || !strings.Contains(res.err, "preflight") {
		t.Errorf("status %d\n%s", res.status, res.err)
	}
	if took := time.Since(began); took > 20*time.Second {
		t.Errorf("took %v", took)
	}
}

// Temporal goes away during the dump and comes back after it: the dump is not
// repeated. Meanwhile the repository can be used.
func TestTemporalDownDuringDump(t *testing.T) {
	r := setup(t, 1000)
	r.worker()
	r.must("backup", "--kind", "logical")
	first := r.listed()
	release := r.hold()
	run := r.start()
	r.until("pg_dump waits for a lock", r.dumping)
	r.temporal.Kill()
	away := time.Now()
	r.until("the worker has not come through for a while", func() bool {
		said, err := os.ReadFile(r.logs[0].Name())
		if err != nil {
			t.Fatal(err)
		}
		return bytes.Contains(said, []byte("RecordActivityHeartbeat with error"))
	})
	release()
	r.until("the dump is done", func() bool {
		done, _ := filepath.Glob(filepath.Join(r.dir, "spool/main/*/done.json"))
		return len(done) == 1
	})
	if got := r.listed(); !slices.Equal(got, first) {
		t.Errorf("listed %v, want %v", got, first)
	}
	r.restored()
	if res := r.run("backup", "--kind", "logical"); res.status != 40 || !strings.Contains(res.err, "hint:") {
		t.Errorf("backup without Temporal: status %d\n%s", res.status, res.err)
	}
	<-time.After(time.Until(away.Add(time.Minute)))
	if err := r.temporal.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	res := r.finish(run)
	// The worker may have given up telling Temporal that the dump is done. Then
	// there is another attempt, which finds it done.
	var shown struct {
		Databases []struct {
			Name    string
			TakenAt time.Time `json:"taken_at"`
		}
	}
	r.decode(r.must("show", "--json", res.ID), &shown)
	for _, db := range shown.Databases {
		if db.Name == "app" && db.TakenAt.After(away) {
			t.Errorf("dumped again at %v, after Temporal went away at %v", db.TakenAt, away)
		}
	}
	if len(shown.Databases) != 2 {
		t.Errorf("shown %+v", shown)
	}
	if got := r.listed(); len(got) != 2 || got[1] != res.ID {
		t.Errorf("listed %v, want %v and %s", got, first, res.ID)
	}
}
