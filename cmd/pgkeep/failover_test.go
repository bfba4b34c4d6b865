package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// A pair is a primary that archives segments of 1 MiB to a real S3 server with
// the program as it is shipped, and a standby that streams from it and will
// archive when it is promoted.
type pair struct {
	*world          // its pg is the primary
	standby         *lab.Postgres
	archive, shared string // configuration of pgkeep-wal, directory of PostgreSQL's OS user
	rows            int
}

func newPair(t *testing.T) *pair {
	t.Helper()
	shared, err := os.MkdirTemp("", "pgkeep-pair-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(shared) })
	p := &pair{world: &world{t: t, s3: lab.S3ForTest(t), dir: shared}, shared: shared}
	program := filepath.Join(shared, "pgkeep-wal")
	if err := lab.Build(t.Context(), shared, "pgkeep-wal"); err != nil {
		t.Fatal(err)
	}
	ca, err := os.ReadFile(p.s3.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	p.write("ca.pem", string(ca))
	p.write("s3.secret", p.s3.SecretAccessKey)
	text := fmt.Sprintf(`
repository: {url: 's3://%s/prod', endpoint: '%s', ca_file: %[3]s/ca.pem, access_key_id: %s, secret_access_key_file: %[3]s/s3.secret}
clusters: {main: {conninfo: "host=%[3]s/standby/run user=postgres"}, idle: {conninfo: "host=/nowhere"}}
spool: %[3]s/spool
keys:
  signing_key: %[3]s/signing.key
  metadata_identity: %[3]s/metadata.key
`, p.s3.Bucket, p.s3.Endpoint, shared, p.s3.AccessKeyID)
	p.archive = p.write("archive.yaml", text) // what archives opens no data
	p.config = p.write("pgkeep.yaml", text+"  identity: "+shared+"/operator.key\n")
	p.operator = filepath.Join(shared, "operator.key")
	p.ok("key", "init", "--new-identity", p.operator)
	p.own()

	settings := map[string]string{"archive_mode": "on", "archive_command": program + " push --cluster main --config " + p.archive + " %p", "wal_keep_size": "200MB"}
	p.pg = lab.PostgresForTest(t, lab.PostgresOptions{WALSegmentMB: 1, Settings: settings})
	p.exec("postgres", "CREATE TABLE t (id int, noise text)")
	for _, to := range [][]string{{"base/data", "none"}, {"standby/data", "stream"}} {
		dir := filepath.Join(shared, to[0])
		if err := os.Mkdir(filepath.Dir(dir), 0o700); err != nil {
			t.Fatal(err)
		}
		p.own()
		args := []string{"-d", p.pg.Conninfo(), "-D", dir, "-X", to[1], "-c", "fast", "--no-sync"}
		if to[1] == "stream" {
			args = append(args, "--write-recovery-conf")
		}
		if out, err := p.pg.Command(t.Context(), "pg_basebackup", args...).CombinedOutput(); err != nil {
			t.Fatalf("pg_basebackup: %v\n%s", err, out)
		}
	}
	if err := os.Mkdir(filepath.Join(shared, "spool"), 0o700); err != nil {
		t.Fatal(err)
	}
	p.own()
	// What backs up the primary. In its place, the standby will be what is called main.
	primary := p.write("primary.yaml", strings.Replace(text, "host="+shared+"/standby/run", p.pg.Conninfo(), 1))
	if status, out, said := p.with(t.Context(), primary, "backup", "--direct", "--kind", "physical", "main"); status != 0 {
		t.Fatalf("backup = %d\n%s%s", status, out, said)
	}
	p.standby = p.start("standby", settings)
	return p
}

// own gives what is in the shared directory to PostgreSQL's OS user.
func (p *pair) own() {
	p.t.Helper()
	if os.Getuid() != 0 {
		return
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		p.t.Fatal(err)
	}
	if out, err := exec.Command("chown", "-R", u.Uid+":"+u.Gid, p.shared).CombinedOutput(); err != nil {
		p.t.Fatalf("%v: %s", err, out)
	}
}

func (p *pair) start(name string, settings map[string]string) *lab.Postgres {
	p.t.Helper()
	return lab.PostgresForTest(p.t, lab.PostgresOptions{Dir: filepath.Join(p.shared, name), Settings: settings})
}

func (p *pair) query(on *lab.Postgres, sql string) (text string) {
	p.t.Helper()
	conn, err := on.Connect(p.t.Context(), "postgres")
	if err != nil {
		p.t.Fatal(err)
	}
	defer conn.Close(p.t.Context())
	if err := conn.QueryRow(p.t.Context(), sql).Scan(&text); err != nil {
		p.t.Fatalf("%s: %v", sql, err)
	}
	return text
}

// until waits for a query to say t.
func (p *pair) until(on *lab.Postgres, sql string) {
	p.t.Helper()
	for deadline := time.Now().Add(time.Minute); p.query(on, "SELECT coalesce(("+sql+"), false)::text") != "true"; {
		if time.Now().After(deadline) {
			p.t.Fatalf("waited a minute for %s; archiver: %s", sql, p.query(on, "SELECT row_to_json(a)::text FROM pg_stat_archiver a"))
		}
		<-time.After(20 * time.Millisecond)
	}
}

// insert writes rows, each into a segment of its own, and returns the last of
// these.
func (p *pair) insert(into *lab.Postgres, rows int) (last string) {
	p.t.Helper()
	for range rows {
		p.rows++
		err := into.Exec(p.t.Context(), "postgres", fmt.Sprintf("INSERT INTO t SELECT %d, string_agg(md5(random()::text), '') FROM generate_series(1, 1000)", p.rows))
		if err != nil {
			p.t.Fatal(err)
		}
		last = p.query(into, "SELECT pg_walfile_name(pg_switch_wal())")
	}
	return last
}

// later makes what is archived an hour older.
func (p *pair) later() {
	p.t.Helper()
	ago := time.Now().Add(-time.Hour)
	for key, path := range p.objects() {
		if strings.Contains(key, "/wal/") {
			if err := os.Chtimes(path, ago, ago); err != nil {
				p.t.Fatal(err)
			}
		}
	}
}

// failOver writes segments that only the standby gets, kills the primary, and
// lets the standby go on.
func (p *pair) failOver() {
	p.t.Helper()
	last := p.insert(p.pg, 3)
	p.until(p.pg, "SELECT last_archived_wal >= '"+last+"' FROM pg_stat_archiver")
	if err := os.Rename(p.archive, p.archive+".away"); err != nil { // archiving fails from now on
		p.t.Fatal(err)
	}
	p.insert(p.pg, 5)
	p.rows++
	p.exec("postgres", fmt.Sprintf("INSERT INTO t VALUES (%d, 'in the segment of the fork')", p.rows))
	at := p.query(p.pg, "SELECT pg_current_wal_flush_lsn()::text")
	p.until(p.standby, "SELECT pg_last_wal_replay_lsn() >= '"+at+"'")
	p.pg.Kill()
	if err := os.Rename(p.archive+".away", p.archive); err != nil {
		p.t.Fatal(err)
	}
	p.until(p.standby, "SELECT pg_promote()")
	last = p.insert(p.standby, 3)
	p.until(p.standby, "SELECT last_archived_wal >= '"+last+"' FROM pg_stat_archiver")
}

// After a failover, the segments that the dead primary had not archived are
// missing for ever, unless somebody looks into the new one's pg_wal.
func TestFailoverHoleIsFilled(t *testing.T) {
	p := newPair(t)
	p.fails(13, []string{"no archived WAL"}, "wal", "list", "--cluster", "idle")
	p.failOver()
	p.ok("wal", "audit", "--cluster", "main") // what it finds is too new to be sure of
	p.later()
	before := p.windows()
	p.fails(23, []string{"1 HOLE", "5 WAL files are missing", "wal-hole", "hint: ", "--fill"}, "wal", "audit", "--cluster", "main")
	list := p.shown("wal", "list", "--cluster", "main")
	p.shown("windows", "--cluster", "main")
	p.shown("doctor", "--cluster", "main", "| head -6")
	p.shown("check", "--nagios", "--cluster", "main")
	for _, want := range []string{"HOLE ", "00000002.history", "partial ", "timeline 1 left"} {
		if !strings.Contains(list, want) {
			t.Errorf("wal list does not say %q:\n%s", want, list)
		}
	}
	p.fails(51, []string{"critical  wal-hole", "main: 5 files missing from the archive", "fix: pgkeep wal audit --fill --cluster main"}, "check", "--cluster", "main")
	if page := p.ok("report", "--cluster", "main"); !strings.Contains(page, `<rect class="hole"`) {
		t.Error("the report shows no hole")
	}
	out := p.shown("wal", "audit", "--fill", "--cluster", "main")
	if n := strings.Count(out, "filled 00000001"); n != 5 || !strings.Contains(out, "no hole") {
		t.Errorf("filled %d of 5:\n%s", n, out)
	}
	p.shown("windows", "--cluster", "main")
	p.ok("wal", "audit", "--cluster", "main")
	p.fails(0, []string{"warning   never-tested"}, "check", "--cluster", "main")
	if page := p.ok("report", "--cluster", "main"); !strings.Contains(page, `<rect class="reach"`) || strings.Contains(page, `<rect class="hole"`) {
		t.Error("the report does not show one window without a hole")
	}
	after := p.windows()
	if before.Path != "[1]" || after.Path != "[1 2]" || before.From != after.From || before.To >= after.To || after.Archived == nil {
		t.Errorf("windows were %+v, and are %+v", before, after)
	}
	restored := p.restore("base")
	if got := p.query(restored, "SELECT count(*)::text FROM t"); got != strconv.Itoa(p.rows) {
		t.Errorf("%s rows were restored along timeline 2, want %d", got, p.rows)
	}
}

var (
	numbers = regexp.MustCompile(`[0-9A-Fa-f]*[0-9][0-9A-Fa-f]*`)
	blanks  = regexp.MustCompile(` +`)
)

// shown runs a command, and wants the README to show what it says, but for
// numbers, which differ from run to run. The last argument may cut lines.
func (p *pair) shown(args ...string) string {
	p.t.Helper()
	command := "pgkeep " + strings.Join(args, " ")
	pipe, lines := args[len(args)-1], 0
	if _, err := fmt.Sscanf(pipe, "| head -%d", &lines); err == nil {
		args = args[:len(args)-1]
	}
	_, out, said := p.pgkeep(args...)
	said = out + said
	if lines > 0 {
		said = strings.Join(strings.SplitAfter(out, "\n")[:lines], "")
	}
	page, err := os.ReadFile("../../README.md")
	if err != nil {
		p.t.Fatal(err)
	}
	form := func(text string) string { return blanks.ReplaceAllString(numbers.ReplaceAllString(text, "#"), " ") }
	if !strings.Contains(form(string(page)), form("$ "+command+"\n"+said)) {
		p.t.Errorf("the README does not show\n$ %s\n%s", command, said)
	}
	return out
}

type window struct {
	ID, Path string
	From, To pg.LSN
	Archived *time.Time
}

// windows returns the only one there is.
func (p *pair) windows() window {
	p.t.Helper()
	var answer struct {
		Windows []struct {
			Base      struct{ ID string }
			Timelines []int
			From, To  pg.LSN
			Archived  *time.Time
		}
	}
	text := p.ok("windows", "--cluster", "main", "--json")
	if err := json.Unmarshal([]byte(text), &answer); err != nil || len(answer.Windows) != 1 {
		p.t.Fatalf("%v in %s", err, text)
	}
	w := answer.Windows[0]
	if table := p.ok("windows", "--cluster", "main"); !strings.Contains(table, w.Base.ID) || !strings.Contains(table, w.To.String()) {
		p.t.Errorf("as JSON\n%s\nand as a table\n%s", text, table)
	}
	return window{w.Base.ID, fmt.Sprint(w.Timelines), w.From, w.To, w.Archived}
}

// restore starts a base backup, which replays all that is archived.
func (p *pair) restore(name string) *lab.Postgres {
	p.t.Helper()
	data := filepath.Join(p.shared, name, "data")
	if err := os.WriteFile(filepath.Join(data, "recovery.signal"), nil, 0o600); err != nil {
		p.t.Fatal(err)
	}
	p.own()
	return p.start(name, map[string]string{"hot_standby": "off", "recovery_target_timeline": "latest",
		"restore_command": filepath.Join(p.shared, "pgkeep-wal") + " fetch --cluster main --config " + p.config + " %f %p"})
}
