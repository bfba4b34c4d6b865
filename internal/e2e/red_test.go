package e2e

import (
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/workflows"
)

// A defect is something wrong with the source, the bucket, or what is expected.
// seed returns what puts it right again.
type defect struct {
	name   string
	seed   func(r *rig, b *ground) (undo func())
	config string // of restore_test, in place of the usual
	count  string // the tables whose rows are counted
	args   []string
	slow   bool // the store, as good as hanging
	backup bool // one is taken after seed, else the one that is there is tested
	check  string
	says   string
	status int // 0: that of fail.ProofFailed
	always bool
}

// ground is what defects are seeded into.
type ground struct {
	id       string
	segments []string // in the bucket, after the backup, oldest first
	needed   string   // in the bucket, by the backup itself
	packs    []string
	paths    map[string]string // of relations, in the data directory of the source
}

func (r *rig) bytes(path string) []byte {
	r.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	return b
}

func (r *rig) put(path string, b []byte) {
	r.t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err == nil {
		_, err = f.Write(b)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		r.t.Fatal(err)
	}
}

// changed changes a file in place.
func changed(path func(b *ground) string, change func([]byte) []byte) func(*rig, *ground) func() {
	return func(r *rig, b *ground) func() {
		name := path(b)
		was := r.bytes(name)
		r.put(name, change(append([]byte(nil), was...)))
		return func() { r.put(name, was) }
	}
}

// away takes a file away.
func away(path func(b *ground) string) func(*rig, *ground) func() {
	return func(r *rig, b *ground) func() {
		name := path(b)
		if err := os.Rename(name, name+".away"); err != nil {
			r.t.Fatal(err)
		}
		return func() { os.Rename(name+".away", name) }
	}
}

// swapped exchanges the content of two files.
func swapped(paths func(b *ground) (string, string)) func(*rig, *ground) func() {
	return func(r *rig, b *ground) func() {
		one, two := paths(b)
		was1, was2 := r.bytes(one), r.bytes(two)
		r.put(one, was2)
		r.put(two, was1)
		return func() { r.put(one, was1); r.put(two, was2) }
	}
}

func flip(b []byte) []byte { b[len(b)/2] ^= 1; return b }

// page changes block n of a relation, under a right checksum.
func page(relation string, n int, change func(p []byte)) func(*rig, *ground) func() {
	return changed(func(b *ground) string { return b.paths[relation] }, func(b []byte) []byte {
		p := b[n*8192 : (n+1)*8192]
		change(p)
		binary.LittleEndian.PutUint16(p[8:], pg.PageChecksum(p, uint32(n)))
		return b
	})
}

// Of a page (storage/bufpage.h): where its n-th line begins, and what that points
// to.
func lineOf(p []byte, n int) []byte { return p[24+4*(n-1):][:4] }

func sql(do, undo string) func(*rig, *ground) func() {
	return func(r *rig, _ *ground) func() {
		if err := r.pg.Exec(r.t.Context(), "app", do); err != nil {
			r.t.Fatal(err)
		}
		return func() {
			if err := r.pg.Exec(r.t.Context(), "app", undo); err != nil {
				r.t.Fatal(err)
			}
			r.archived() // else later tests of the backup that was there replay what was done, and not this
		}
	}
}

func (b *ground) wal(n int) func(*ground) string {
	return func(b *ground) string { return b.segments[n] }
}

func assertion(text string) string { return ", assertions: [{name: mine, " + text + "}]" }

var defects = []defect{
	{name: "a flipped bit in a page of the source", always: true, backup: true, check: "checksums", says: "checksum",
		seed: changed(func(b *ground) string { return b.paths["victim"] }, func(b []byte) []byte { b[8192+5000] ^= 4; return b })},
	{name: "an index of the source that lacks a row", always: true, backup: true, check: "btree", says: "lacks matching index tuple",
		seed: page("victim_pkey", 1, func(p []byte) { binary.LittleEndian.PutUint16(p[12:], binary.LittleEndian.Uint16(p[12:])-4) })},
	{name: "an index of the source out of order", backup: true, check: "btree", says: "item order invariant violated",
		seed: page("victim_name", 1, func(p []byte) {
			a, b := lineOf(p, 5), lineOf(p, 9)
			x := append([]byte(nil), a...)
			copy(a, b)
			copy(b, x)
		})},
	{name: "a table of the source with a row of the future", backup: true, check: "heap", says: "xmin",
		seed: page("loose", 0, func(p []byte) {
			at := binary.LittleEndian.Uint32(lineOf(p, 1)) & 0x7fff
			binary.LittleEndian.PutUint32(p[at:], 4_000_000_000)
			binary.LittleEndian.PutUint16(p[at+20:], binary.LittleEndian.Uint16(p[at+20:])&^0x0300) // not frozen, nor hinted
		})},
	{name: "long values of the source that are lost", backup: true, check: "read", says: "missing chunk number",
		seed: page("toast", 0, func(p []byte) { binary.LittleEndian.PutUint16(p[12:], 24) })},
	{name: "two tables of the source swapped", backup: true, check: "btree", says: "lacks matching index tuple",
		seed: swapped(func(b *ground) (string, string) { return b.paths["twin_a"], b.paths["twin_b"] })},
	{name: "a file of a table that is not there", backup: true, check: "read", says: "could not open file", seed: away(func(b *ground) string { return b.paths["loose"] })},
	{name: "a file of an index that is not there", backup: true, check: "btree", says: "lacks a main relation fork", seed: away(func(b *ground) string { return b.paths["victim_name"] })},
	{name: "an empty table that had rows", backup: true, check: "assertions", says: "- 5000", config: assertion(`database: app, query: "SELECT count(*) FROM loose", want: "5000"`),
		seed: changed(func(b *ground) string { return b.paths["loose"] }, func([]byte) []byte { return nil })},
	{name: "a row fewer than was counted", always: true, backup: true, count: "app.public.*", check: "rows", says: "app: public.loose has 4999 rows, and should have 5000",
		seed: page("loose", 0, func(p []byte) { binary.LittleEndian.PutUint16(p[12:], binary.LittleEndian.Uint16(p[12:])-4) })},

	{name: "two packs swapped", always: true, check: "files", says: "pack", seed: swapped(func(b *ground) (string, string) { return b.packs[0], b.packs[1] })},
	{name: "a pack with a flipped bit", check: "files", says: "pack", seed: changed(func(b *ground) string { return b.packs[0] }, flip)},
	{name: "a pack cut short", check: "files", says: "pack", seed: changed(func(b *ground) string { return b.packs[0] }, func(b []byte) []byte { return b[:len(b)/2] })},
	{name: "a pack that is not there", check: "files", says: "pack", seed: away(func(b *ground) string { return b.packs[0] })},
	{name: "a dropped segment that the backup needs", always: true, check: "files", says: "", seed: away(func(b *ground) string { return b.needed })},
	{name: "a dropped segment in the middle", check: "files", says: "", seed: away((*ground)(nil).wal(0))},
	{name: "a segment with a flipped bit", check: "replay", says: "what is stored is not what was written", seed: changed((*ground)(nil).wal(0), flip)},
	{name: "a segment cut short", check: "replay", says: "what is stored is not what was written", seed: changed((*ground)(nil).wal(0), func(b []byte) []byte { return b[:len(b)/2] })},
	{name: "two segments swapped", check: "replay", says: "what is stored is not what was written", seed: swapped(func(b *ground) (string, string) { return b.segments[0], b.segments[1] })},

	{name: "an assertion that fails", always: true, check: "assertions", says: "- 7", config: assertion(`database: app, query: "SELECT i FROM victim WHERE i < 4 ORDER BY 1", want: "1\n7\n3"`)},
	{name: "a row count off by one", check: "assertions", says: "- 4999", config: assertion(`database: app, query: "SELECT count(*) FROM victim", want: "4999"`)},
	{name: "an assertion in a database that is not there", check: "assertions", says: `database "gone" does not exist`, config: assertion(`database: gone, query: "SELECT true"`)},

	// Of these the backup is not to blame: the test fails as what it ran into.
	{name: "collations of another version", backup: true, check: "collations", says: "collations sort otherwise here", status: 32,
		seed: sql("UPDATE pg_collation SET collversion = '1.2' WHERE collname = 'en-x-icu'", "UPDATE pg_collation SET collversion = pg_collation_actual_version(oid) WHERE collname = 'en-x-icu'")},
	{name: "an assertion that writes", check: "assertions", says: "one statement that reads", status: 2, config: assertion(`database: app, query: DELETE FROM victim`)},
	{name: "an assertion that takes too long", check: "assertions", says: "ended before it was done", status: 36, config: assertion(`database: app, query: "SELECT pg_sleep(60)", timeout: 100ms`)},
	{name: "a test that takes too long", always: true, check: "time", says: "not done within 6s", status: 36, config: ", limit: 6s" + assertion(`database: app, query: "SELECT pg_sleep(60)"`)},
	{name: "a restore that hangs", check: "time", says: "not done within 6s", status: 36, config: ", limit: 6s", slow: true},
	{name: "a full scratch disk", always: true, check: "files", says: "free", status: 34, config: ", directory: SMALL"},
	{name: "no programs of that version", check: "pg-version", says: "no such file", status: 32, config: ", bin_dir: /nonexistent"},
	{name: "a target that cannot be reached", check: "-", says: "", status: 26, args: []string{"--to-lsn", "FF/0"}},
}

// Each defect turns the test red, with a message that names the cause; without
// any, it is green. PGKEEP_TEST_DEFECTS=all takes all of them, or what else it says
// those with that in their names.
func TestADefectIsFound(t *testing.T) {
	r := setup(t, 500)
	dir := r.tested("")
	err := r.pg.Exec(t.Context(), "app",
		"CREATE TABLE victim (i int PRIMARY KEY, name text, note text) WITH (autovacuum_enabled = off)",
		"ALTER TABLE victim ALTER note SET STORAGE EXTERNAL",
		"INSERT INTO victim SELECT i, 'name ' || i, CASE WHEN i < 100 THEN repeat(md5(i::text), 200) END FROM generate_series(1, 5000) i",
		"CREATE INDEX victim_name ON victim (name)", `CREATE INDEX victim_icu ON victim (name COLLATE "en-x-icu")`,
		"CREATE TABLE loose WITH (autovacuum_enabled = off) AS SELECT i FROM generate_series(1, 5000) i",
		"CREATE TABLE twin_a WITH (autovacuum_enabled = off) AS SELECT i FROM generate_series(1, 500) i",
		"CREATE TABLE twin_b WITH (autovacuum_enabled = off) AS SELECT i + 5 AS i FROM generate_series(1, 500) i",
		"CREATE INDEX ON twin_a (i)", "CREATE INDEX ON twin_b (i)", "VACUUM FREEZE", "CHECKPOINT")
	if err != nil {
		t.Fatal(err)
	}
	b := &ground{paths: make(map[string]string)}
	conn, err := r.pg.Connect(t.Context(), "app")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	for _, rel := range []string{"victim", "victim_pkey", "victim_name", "loose", "twin_a", "twin_b", "toast"} {
		query := "SELECT pg_relation_filepath('" + rel + "')"
		if rel == "toast" {
			query = "SELECT pg_relation_filepath(reltoastrelid) FROM pg_class WHERE relname = 'victim'"
		}
		var path string
		if err := conn.QueryRow(t.Context(), query).Scan(&path); err != nil {
			t.Fatal(err)
		}
		b.paths[rel] = filepath.Join(r.pg.DataDir, path)
	}
	w := r.worker()
	r.ground(b)
	usual := string(r.bytes(r.config))
	restart := func(config string) {
		w.signal(syscall.SIGTERM)
		r.put(r.config, []byte(config))
		sub := r.t
		r.t = t // it outlives the defect
		w = r.worker()
		r.t = sub
	}
	which := os.Getenv("PGKEEP_TEST_DEFECTS")
	for _, d := range defects {
		if which == "" && !d.always || which != "" && which != "all" && !strings.Contains(d.name, which) {
			continue
		}
		outer := r.t
		t.Run(d.name, func(t *testing.T) {
			r.t = t
			defer func() { r.t = outer }()
			undo := func() {}
			if d.seed != nil {
				undo = d.seed(r, b)
			}
			defer undo()
			if d.config != "" || d.count != "" {
				text := strings.ReplaceAll(usual, ", memory: 256MB", ", memory: 256MB"+d.config)
				if d.count != "" {
					text = strings.ReplaceAll(text, "physical: {rate: 0}", "physical: {rate: 0, count_rows: ["+d.count+"]}")
				}
				if strings.Contains(d.config, "SMALL") {
					small, unmount := r.small()
					defer unmount()
					text = strings.ReplaceAll(usual, dir, small)
				}
				if d.slow {
					text = strings.ReplaceAll(text, r.s3.Addr, r.proxy.Addr)
					r.proxy.Rate.Store(20_000)
					defer r.proxy.Rate.Store(0)
				}
				restart(text)
				defer restart(usual)
			}
			if d.backup {
				if res := r.run("backup", "--json"); res.status != 0 && res.status != 24 {
					t.Fatalf("backup: %d\n%s\n%s", res.status, res.err, r.run("ps").out)
				}
			}
			if d.count != "" { // PostgreSQL notes now and then what runs: the rows may have been counted behind that, in the next segment
				r.archived()
			}
			r.red(d, b, dir)
		})
	}
	var res workflows.RestoreTestResult
	r.must("backup")
	r.decode(r.must("restore-test", "--json"), &res)
	if res.Report.Verdict != proof.Passed {
		t.Errorf("put right again: %+v", res)
	}
	r.nothingLeft(dir)
}

// red tests a backup that is to fail.
func (r *rig) red(d defect, b *ground, dir string) {
	r.t.Helper()
	args := append([]string{"restore-test"}, d.args...)
	if !d.backup && len(d.args) == 0 {
		args = append(args, b.id)
	}
	res := r.run(args...)
	status := d.status
	if status == 0 {
		status = 50
	}
	if res.status != status || !strings.Contains(res.err, d.check) {
		r.t.Errorf("status %d, want %d and %q\n%s%s\n%s", res.status, status, d.check, res.out, res.err, r.run("ps").out)
	}
	r.nothingLeft(dir)
	run := r.client.GetWorkflow(r.t.Context(), workflows.RestoreTestWorkflowID("main"), "")
	r.clean(run, dir, "victim", "loose", "twin", "DELETE", "mine", "WHERE")
	if d.check == "-" {
		return
	}
	of := b.id
	if d.backup {
		of = "latest"
	}
	var shown struct {
		Proof struct {
			State   proof.State
			Failure string
			Trouble string
			Report  proof.Report
		}
	}
	r.decode(r.must("show", "--json", of), &shown)
	if d.status != 0 {
		if !strings.Contains(shown.Proof.Trouble, d.says) {
			r.t.Errorf("shown: %+v, want %q", shown.Proof, d.says)
		}
		return
	}
	var found []string
	for _, c := range shown.Proof.Report.Checks {
		if c.Verdict == proof.Failed {
			found = append(found, c.Name+": "+c.Message+"\n"+strings.Join(c.Findings, "\n"))
		}
	}
	if shown.Proof.State != proof.Refuted || !strings.Contains(strings.Join(found, "\n"), d.says) {
		r.t.Errorf("shown: %s, want %q in\n%s", shown.Proof.State, d.says, strings.Join(found, "\n"))
	}
	if d.name == "an assertion that fails" {
		r.record(run, "restore-test-refuted")
	}
	r.t.Logf("%s", strings.TrimSpace(res.err))
}

// ground takes the backup that defects in the bucket are seeded into, with some
// log behind it.
func (r *rig) ground(b *ground) {
	r.t.Helper()
	var taken workflows.PhysicalBackupResult
	r.decode(r.must("backup", "--json"), &taken)
	b.id = taken.ID
	for i := range 3 {
		if err := r.pg.Exec(r.t.Context(), "app", fmt.Sprintf("CREATE TABLE log_%d AS SELECT i FROM generate_series(1, 1000) i", i)); err != nil {
			r.t.Fatal(err)
		}
		r.archived()
	}
	all, err := filepath.Glob(filepath.Join(r.s3.Data, "test/clusters/main/wal/*/00000001/*"))
	if err != nil {
		r.t.Fatal(err)
	}
	for _, path := range all {
		name, _, _ := strings.Cut(filepath.Base(path), ".")
		switch {
		case len(name) != 24 || strings.Contains(filepath.Base(path), "backup"):
		case name == taken.LastWAL:
			b.needed = path
		case name > taken.LastWAL:
			b.segments = append(b.segments, path)
		}
	}
	b.packs, _ = filepath.Glob(filepath.Join(r.s3.Data, "test/clusters/main/packs/"+taken.ID+"/*.pack"))
	if b.needed == "" || len(b.segments) < 3 || len(b.packs) < 2 {
		r.t.Fatalf("ground: %+v of %v", b, all)
	}
}

// small is a directory on a file system with no room.
func (r *rig) small() (dir string, unmount func()) {
	r.t.Helper()
	dir, err := os.MkdirTemp("", "small")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err == nil {
		err = syscall.Mount("none", dir, "tmpfs", 0, "size=8m,mode=0755")
	}
	if err != nil {
		r.t.Fatalf("mount a small file system (it takes root): %v", err)
	}
	return dir, func() {
		if err := syscall.Unmount(dir, 0); err != nil {
			r.t.Error(err)
		}
		os.Remove(dir)
	}
}
