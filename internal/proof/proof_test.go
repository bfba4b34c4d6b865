package proof_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

func TestMain(m *testing.M) {
	sandbox.Enter()
	os.Exit(m.Run())
}

func run(t *testing.T, test proof.Test) proof.Report {
	t.Helper()
	rep, err := test.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

func TestGreen(t *testing.T) {
	r := newRig(t)
	for i := range 5 {
		s := r.sandbox(t, "green")
		test, compared := r.test(s), i != 1 // the one large index
		test.Thorough, test.Day = i == 0, time.Date(2026, 12, 1, 0, 0, 0, 0, time.UTC)
		for proof.InTurn("postgres", "public", "paged_i", test.Day) != (i > 1) {
			test.Day = test.Day.AddDate(0, 0, 1)
		}
		rep := run(t, test)
		if rep.Verdict != proof.Passed || rep.Err() != nil {
			t.Fatalf("run %d is red:\n%s", i, failures(rep))
		}
		for _, name := range []string{proof.CheckTablespaces, proof.CheckManifest, proof.CheckReplay, proof.CheckTarget, proof.CheckSystem, proof.CheckChecksums,
			proof.CheckOpen, proof.CheckCollations, proof.CheckHeap, proof.CheckBTree, proof.CheckRead, proof.CheckRows, proof.CheckAssertions} {
			if c := verdict(rep, name); c.Verdict != proof.Passed || c.Items == 0 {
				t.Errorf("check %s: %+v", name, c)
			}
		}
		if rep.Reached.LSN < r.end || rep.Reached.Timeline != 1 || rep.Reached.LastCommit.IsZero() || rep.Lag == nil || rep.Segments == 0 || rep.RTO <= 0 ||
			rep.Version.Major() < 13 || rep.System != r.system || rep.Rows < 15600 || rep.Tables == 0 || rep.Indexes == 0 || (rep.Compared == rep.Indexes) != compared || rep.Bytes == 0 {
			t.Errorf("report: %+v", rep)
		}
		if err := s.Remove(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestGreenAtOtherTargets(t *testing.T) {
	r := newRig(t)
	rows := map[string]map[string]int64{"postgres": {"public.orders": r.atFirst}}
	xid, err := strconv.ParseUint(r.xid, 10, 32)
	must(t, err)
	for name, target := range map[string]sandbox.Target{
		"xid":       {XID: uint32(xid)},
		"time":      {Time: r.middle},
		"name":      {Name: "half"},
		"immediate": {Immediate: true},
		"lsn":       {LSN: r.end},
	} {
		t.Run(name, func(t *testing.T) {
			test := r.test(r.sandbox(t, name))
			test.Recovery.Target, test.AtLeast, test.Assertions, test.Rows = target, 0, nil, rows
			if name == "immediate" || name == "lsn" {
				test.Rows = nil
			}
			if rep := run(t, test); rep.Verdict != proof.Passed || rep.Target != target {
				t.Errorf("%+v is red:\n%s", rep, failures(rep))
			}
		})
	}
}

// Rows are compared where they were counted, and replay goes on to the target all
// the same. A row too few at the one place or the other is found; what keeps from
// an answer is no failure.
func TestRowsAreComparedOnTheWay(t *testing.T) {
	r := newRig(t)
	s := r.sandbox(t, "halts")
	halts := func(change func(halts []restore.Halt)) []restore.Halt {
		var copied []restore.Halt
		text, err := json.Marshal(r.halts)
		must(t, err)
		must(t, json.Unmarshal(text, &copied))
		change(copied)
		return copied
	}
	for name, c := range map[string]struct {
		halts   []restore.Halt
		target  sandbox.Target
		verdict proof.Verdict
		says    string
	}{
		"equal":             {r.halts, sandbox.Target{}, proof.Passed, ""},
		"to the very place": {r.halts, sandbox.Target{LSN: r.halts[1].At, Exclusive: true}, proof.Passed, ""},
		"a row too few": {halts(func(h []restore.Halt) { h[0].Counted[0].Tables[0].Rows++ }), sandbox.Target{}, proof.Failed,
			"postgres: public.orders has 4000 rows, and should have 4001"},
		"a row too many, later": {halts(func(h []restore.Halt) { h[1].Counted[1].Tables[0].Rows-- }), sandbox.Target{}, proof.Failed,
			"shop: public.items has 2000 rows, and should have 1999"},
		"no table": {halts(func(h []restore.Halt) { h[0].Counted[0].Tables[0].Table = "gone" }), sandbox.Target{}, proof.Failed,
			"postgres: public.gone is not there, and should have 4000 rows"},
		"nobody to ask": {halts(func(h []restore.Halt) {
			for i := range h {
				for j := range h[i].Counted {
					h[i].Counted[j].Role = "nobody"
				}
			}
		}), sandbox.Target{}, proof.Skipped, "may not connect"},
		"not counted": {nil, sandbox.Target{}, proof.Skipped, "nobody counted"},
	} {
		must(t, s.Empty())
		r.restore(t, s)
		test := r.test(s)
		test.Rows, test.Halts, test.Recovery.Target = nil, c.halts, c.target
		test.Skip = []string{proof.CheckManifest, proof.CheckChecksums, proof.CheckHeap, proof.CheckBTree}
		if c.halts == nil {
			test.Unknown = "nobody counted"
		}
		if c.target != (sandbox.Target{}) {
			test.AtLeast, test.Assertions = 0, nil
		}
		rep := run(t, test)
		rows := verdict(rep, proof.CheckRows)
		if rows.Verdict != c.verdict || !strings.Contains(rows.Message+strings.Join(rows.Findings, "\n"), c.says) || (rep.Verdict == proof.Passed) != (c.verdict != proof.Failed) {
			t.Errorf("%s: %s, %+v\n%s", name, rep.Verdict, rows, failures(rep))
		}
		if c.target == (sandbox.Target{}) && (rep.Reached.LSN < r.end || rep.Segments == 0) {
			t.Errorf("%s: replay did not go on to the end: %+v", name, rep)
		}
		if !rep.Isolation.Network {
			t.Errorf("%s: %+v", name, rep.Isolation)
		}
		t.Logf("%s: %+v", name, rep.Phases)
	}
}

// Where a transaction has too many subtransactions for the log to tell of them all, a
// server in recovery takes no connections. It would open instead, and spoil the
// rest of the test: it must not.
func TestRowsThatCannotBeComparedOnTheWay(t *testing.T) {
	r := newRig(t)
	conn, err := r.pg.Connect(t.Context(), "postgres")
	must(t, err)
	defer conn.Close(context.Background())
	_, err = conn.Exec(t.Context(), "BEGIN; CREATE TABLE subs (i int); DO $$ BEGIN FOR i IN 1..100 LOOP BEGIN INSERT INTO subs VALUES (i); EXCEPTION WHEN OTHERS THEN RAISE; END; END LOOP; END $$")
	must(t, err)
	r.backup(t)
	r.halts = nil
	r.halt(t, "postgres.*.*") // the other database runs code of its own by now
	r.exec(t, "postgres", "DELETE FROM orders WHERE id = 1")
	end := r.text(t, "postgres", "SELECT pg_current_wal_lsn()::text")
	r.switchWAL(t)
	test := r.test(r.sandbox(t, "subtransactions"))
	test.Rows, test.Halts, test.Assertions = nil, r.halts, nil
	test.AtLeast, err = pg.ParseLSN(end)
	must(t, err)
	rep := run(t, test)
	if rows := verdict(rep, proof.CheckRows); rep.Verdict != proof.Passed || rows.Verdict != proof.Skipped || !strings.Contains(rows.Message, "could not be read") || rep.Reached.Timeline != 1 {
		t.Errorf("%+v\n%s", rep, failures(rep))
	}
}

// A defect is something wrong with what was restored, the archive, or what is
// expected.
type defect struct {
	seed  func(t *testing.T, r *rig, s *sandbox.Sandbox, test *proof.Test)
	check string // that must fail …
	says  string // … and name the cause
	kind  fail.Kind
}

func data(f func(t *testing.T, data string)) func(*testing.T, *rig, *sandbox.Sandbox, *proof.Test) {
	return func(t *testing.T, _ *rig, s *sandbox.Sandbox, _ *proof.Test) { f(t, s.Data()) }
}

func expect(f func(r *rig, test *proof.Test)) func(*testing.T, *rig, *sandbox.Sandbox, *proof.Test) {
	return func(_ *testing.T, r *rig, _ *sandbox.Sandbox, test *proof.Test) { f(r, test) }
}

// archive gives the test an archive of its own to damage.
func archive(f func(t *testing.T, dir string, segments []string)) func(*testing.T, *rig, *sandbox.Sandbox, *proof.Test) {
	return func(t *testing.T, r *rig, s *sandbox.Sandbox, test *proof.Test) {
		dir := s.Tablespaces() + "/archive"
		if out, err := exec.Command("cp", "-a", r.archive, dir).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		segments, _ := filepath.Glob(dir + "/0*[0-9A-F]")
		if len(segments) < 4 {
			t.Fatalf("archive holds %d segments", len(segments))
		}
		f(t, dir, segments)
		test.Recovery.Command = "cp " + dir + "/%f %p"
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestRed(t *testing.T) {
	r := newRig(t)
	for name, d := range map[string]defect{
		"flipped bit in a page": {data(func(t *testing.T, data string) {
			f, err := os.OpenFile(data+"/"+r.paths["parts_1"], os.O_RDWR, 0)
			must(t, err)
			defer f.Close()
			b := make([]byte, 1)
			f.ReadAt(b, 5000)
			b[0] ^= 4
			f.WriteAt(b, 5000)
		}), proof.CheckChecksums, r.paths["parts_1"] + `", block 0: calculated checksum`, ""},
		"flipped bit, seen before anything runs": {data(func(t *testing.T, data string) {
			f, err := os.OpenFile(data+"/"+r.paths["twin_a"], os.O_RDWR, 0)
			must(t, err)
			defer f.Close()
			f.WriteAt([]byte("?"), 8000)
		}), proof.CheckManifest, `checksum mismatch for file "` + r.paths["twin_a"], ""},
		"segment missing at the end": {archive(func(t *testing.T, dir string, segments []string) { must(t, os.Remove(segments[len(segments)-1])) }),
			proof.CheckTarget, "log is missing", ""},
		"segment missing in the middle": {archive(func(t *testing.T, dir string, segments []string) { must(t, os.Remove(segments[len(segments)-3])) }),
			proof.CheckTarget, "log is missing", ""},
		"segment missing that the backup needs": {archive(func(t *testing.T, dir string, segments []string) {
			for _, s := range segments[:len(segments)-3] {
				must(t, os.Remove(s))
			}
		}), proof.CheckReplay, "checkpoint", ""},
		"segment cut short": {archive(func(t *testing.T, dir string, segments []string) {
			must(t, os.Truncate(segments[len(segments)-2], 500000))
		}),
			proof.CheckReplay, "has wrong size", ""},
		"segment of zeros": {archive(func(t *testing.T, dir string, segments []string) {
			must(t, os.WriteFile(segments[len(segments)-2], make([]byte, 1<<20), 0o644))
		}), proof.CheckTarget, "log is missing", ""},
		"two segments swapped": {archive(func(t *testing.T, dir string, segments []string) {
			a, b := segments[len(segments)-2], segments[len(segments)-3]
			must(t, os.Rename(a, dir+"/x"))
			must(t, os.Rename(b, a))
			must(t, os.Rename(dir+"/x", b))
		}), proof.CheckTarget, "log is missing", ""},
		"index damaged under a right checksum": {data(func(t *testing.T, data string) {
			page(t, data+"/"+r.paths["orders_name"], 1, swapLines)
		}), proof.CheckBTree, "item order invariant violated", ""},
		"row lost from an index": {data(func(t *testing.T, data string) {
			page(t, data+"/"+r.paths["orders_pkey"], 1, dropLine)
		}), proof.CheckBTree, "lacks matching index tuple", ""},
		"row lost from a large index": {func(t *testing.T, r *rig, s *sandbox.Sandbox, test *proof.Test) {
			test.Thorough = true
			page(t, s.Data()+"/"+r.paths["paged_i"], 1, dropLine)
		}, proof.CheckBTree, "lacks matching index tuple", ""},
		"table damaged under a right checksum": {data(func(t *testing.T, data string) {
			page(t, data+"/"+r.paths["twin_a"], 0, func(p []byte) { binary.LittleEndian.PutUint32(p[tuple(p, 1):], 4_000_000_000) })
		}), proof.CheckHeap, "xmin", ""},
		"long values lost": {data(func(t *testing.T, data string) {
			page(t, data+"/"+r.paths["toast"], 0, func(p []byte) { binary.LittleEndian.PutUint16(p[12:], 24) })
		}), proof.CheckRead, "missing chunk number", ""},
		"page that reads as empty": {func(t *testing.T, r *rig, s *sandbox.Sandbox, test *proof.Test) {
			test.Skip = []string{proof.CheckManifest, proof.CheckChecksums} // as of a cluster without checksums, damaged before it was backed up
			page(t, s.Data()+"/"+r.paths["twin_b"], 1, func(p []byte) {
				for i := range p[:24] {
					p[i] = 0xff
				}
			})
		}, proof.CheckRead, "public.twin_b: invalid page in block 1", ""},
		"page of a table that is read in parts": {func(t *testing.T, r *rig, s *sandbox.Sandbox, test *proof.Test) {
			test.Skip = []string{proof.CheckManifest, proof.CheckChecksums}
			page(t, s.Data()+"/"+r.paths["paged"], 1, func(p []byte) {
				for i := range p[:24] {
					p[i] = 0xff
				}
			})
		}, proof.CheckRead, "public.paged: invalid page in block 1", ""},
		"two tables swapped": {data(func(t *testing.T, data string) {
			a, b := data+"/"+r.paths["twin_a"], data+"/"+r.paths["twin_b"]
			must(t, os.Rename(a, data+"/x"))
			must(t, os.Rename(b, a))
			must(t, os.Rename(data+"/x", b))
		}), proof.CheckBTree, "lacks matching index tuple", ""},
		"file of a table missing": {data(func(t *testing.T, data string) { must(t, os.Remove(data+"/"+r.paths["parts_1"])) }),
			proof.CheckRead, `public.parts_1: could not open file "` + r.paths["parts_1"], ""},
		"file of an index missing": {data(func(t *testing.T, data string) { must(t, os.Remove(data+"/"+r.paths["twin_a_i_idx"])) }),
			proof.CheckBTree, "public.twin_a_i_idx: index \"twin_a_i_idx\" lacks a main relation fork", ""},
		"file of a table empty": {data(func(t *testing.T, data string) { must(t, os.Truncate(data+"/"+r.paths["parts_1"], 0)) }),
			proof.CheckRows, "public.parts_1 has 0 rows, and should have 100", ""},
		"commit log missing": {data(func(t *testing.T, data string) {
			must(t, os.Truncate(data+"/pg_xact/0000", 0))
		}), proof.CheckReplay, "could not access status of transaction", ""},
		"pg_control missing": {data(func(t *testing.T, data string) { must(t, os.Remove(data+"/global/pg_control")) }),
			proof.CheckReplay, "pg_control", ""},
		"backup_label missing": {data(func(t *testing.T, data string) { must(t, os.Remove(data+"/backup_label")) }),
			proof.CheckManifest, "backup_label", ""},
		"no PostgreSQL of that version": {data(func(t *testing.T, data string) { must(t, os.WriteFile(data+"/PG_VERSION", []byte("9\n"), 0o600)) }),
			proof.CheckReplay, "no pg_controldata of PostgreSQL 9 on this host", fail.PGVersion},
		"tablespace missing": {func(t *testing.T, r *rig, s *sandbox.Sandbox, _ *proof.Test) {
			must(t, os.RemoveAll(s.Tablespaces()+"/"+r.oid))
		}, proof.CheckTablespaces, "which is missing", ""},
		"tablespace of the source": {func(t *testing.T, r *rig, s *sandbox.Sandbox, _ *proof.Test) {
			link := s.Data() + "/pg_tblspc/" + r.oid
			must(t, os.Remove(link))
			must(t, os.Symlink(r.dir+"/live", link))
		}, proof.CheckTablespaces, "out of the sandbox", fail.BadConfig},
		"tablespace map of the source": {func(t *testing.T, r *rig, s *sandbox.Sandbox, _ *proof.Test) {
			must(t, os.WriteFile(s.Data()+"/tablespace_map", []byte(r.oid+" "+r.dir+"/live\n"), 0o600))
		}, proof.CheckTablespaces, "out of the sandbox", fail.BadConfig},
		"one row too few": {expect(func(r *rig, test *proof.Test) {
			test.Rows = map[string]map[string]int64{"shop": {"public.items": 2501}}
		}), proof.CheckRows, "shop: public.items has 2500 rows, and should have 2501", ""},
		"table that is not there": {expect(func(r *rig, test *proof.Test) {
			test.Rows = map[string]map[string]int64{"shop": {"public.lost": 1}}
		}), proof.CheckRows, "public.lost was not read", ""},
		"assertion that fails": {expect(func(r *rig, test *proof.Test) {
			test.Assertions = []proof.Assertion{{Name: "ids", Database: "postgres", Query: "SELECT id FROM orders WHERE id < 4 ORDER BY 1", Want: [][]string{{"1"}, {"7"}, {"3"}}}}
		}), proof.CheckAssertions, "ids: wanted (-) and got (+):\n  … 1 rows as wanted\n- 7\n+ 2\n  … 1 rows as wanted", ""},
		"assertion that takes too long": {expect(func(r *rig, test *proof.Test) {
			test.Assertions = []proof.Assertion{{Name: "slow", Database: "postgres", Query: "SELECT pg_sleep(60)", Timeout: 100 * time.Millisecond}}
		}), proof.CheckAssertions, "statement timeout", fail.Stalled},
		"assertion that writes": {expect(func(r *rig, test *proof.Test) {
			test.Assertions = []proof.Assertion{{Name: "writes", Database: "postgres", Query: "DELETE FROM orders"}}
		}), proof.CheckAssertions, "read-only transaction", fail.BadConfig},
		"assertion that runs a program": {expect(func(r *rig, test *proof.Test) {
			test.Assertions = []proof.Assertion{{Name: "runs", Database: "postgres", Query: "COPY orders TO PROGRAM 'cat'"}}
		}), proof.CheckAssertions, "external program", fail.BadConfig},
		"assertion in no database": {expect(func(r *rig, test *proof.Test) {
			test.Assertions = []proof.Assertion{{Name: "nowhere", Database: "gone", Query: "SELECT true"}}
		}), proof.CheckAssertions, `database "gone" does not exist`, ""},
		"time that was not reached": {expect(func(r *rig, test *proof.Test) { test.Recovery.Target = sandbox.Target{Time: time.Now().Add(time.Hour)} }),
			proof.CheckReplay, "recovery ended before configured recovery target was reached", ""},
		"position that was not reached": {expect(func(r *rig, test *proof.Test) { test.Recovery.Target = sandbox.Target{LSN: r.end + 1<<30} }),
			proof.CheckReplay, "recovery ended before configured recovery target was reached", ""},
		"restore point that was not reached": {expect(func(r *rig, test *proof.Test) { test.Recovery.Target = sandbox.Target{Name: "never"} }),
			proof.CheckReplay, "recovery ended before configured recovery target was reached", ""},
		"time before the backup": {expect(func(r *rig, test *proof.Test) { test.Recovery.Target = sandbox.Target{LSN: 1} }),
			proof.CheckReplay, "before consistent recovery point", ""},
		"another timeline": {expect(func(r *rig, test *proof.Test) { test.Timeline = 2 }),
			proof.CheckTarget, "replay ended on timeline 1, not on 2", ""},
		"another cluster": {expect(func(r *rig, test *proof.Test) { test.System++ }),
			proof.CheckSystem, "the data is of system", ""},
		"restore command that hangs": {expect(func(r *rig, test *proof.Test) {
			test.Recovery.Command, test.Recovery.Limit = "sleep 1000", 3*time.Second
		}), proof.CheckReplay, "not done within 3s, in the restore command", fail.Stalled},
		"restore command that is not there": {expect(func(r *rig, test *proof.Test) { test.Recovery.Command = "/nonexistent %f %p" }),
			proof.CheckReplay, "could not restore file", ""},
		"restore command that delivers nothing": {expect(func(r *rig, test *proof.Test) { test.Recovery.Command = "false" }),
			proof.CheckReplay, "checkpoint", ""},
		"checks that take too long": {expect(func(r *rig, test *proof.Test) {
			test.Limit = 4 * time.Second
			test.Assertions = []proof.Assertion{{Name: "slow", Database: "postgres", Query: "SELECT pg_sleep(60)"}}
		}), proof.CheckTime, "not done within 4s", fail.Stalled},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := r.sandbox(t, strings.ReplaceAll(strings.ReplaceAll(name, " ", "-"), ",", ""))
			test := r.test(s)
			d.seed(t, r, s, &test)
			rep := run(t, test)
			c := verdict(rep, d.check)
			if rep.Verdict != proof.Failed || c.Verdict != proof.Failed || c.Kind != d.kind || !strings.Contains(c.Message+"\n"+strings.Join(c.Findings, "\n"), d.says) {
				t.Errorf("want %s to say %q, got %s:\n%s", d.check, d.says, rep.Verdict, failures(rep))
			}
			if err := rep.Err(); err == nil || d.kind != "" && !errors.Is(err, d.kind) || d.kind == "" && !errors.Is(err, fail.ProofFailed) {
				t.Errorf("error of the report: %v", err)
			}
			if pids := strays(r.dir + "/s/pgkeep-sandbox-" + strings.ReplaceAll(name, " ", "-")); len(pids) > 0 {
				t.Errorf("processes are left: %v", pids)
			}
		})
	}
}

// Of the page of a B-tree or a table (storage/bufpage.h): where a line begins.
func lineAt(p []byte, n int) []byte { return p[24+4*(n-1):] }

func tuple(p []byte, n int) int { return int(binary.LittleEndian.Uint32(lineAt(p, n)) & 0x7fff) }

// swapLines exchanges two entries of an index.
func swapLines(p []byte) {
	a, b := lineAt(p, 5)[:4], lineAt(p, 9)[:4]
	saved := bytes.Clone(a)
	copy(a, b)
	copy(b, saved)
}

// dropLine takes the last entry from a page.
func dropLine(p []byte) {
	lower := binary.LittleEndian.Uint16(p[12:])
	binary.LittleEndian.PutUint16(p[12:], lower-4)
}

func TestRedWithFullDisk(t *testing.T) {
	r := newRig(t)
	small := r.dir + "/small"
	must(t, os.Mkdir(small, 0o711))
	if err := syscall.Mount("none", small, "tmpfs", 0, "size=70m,mode=0711"); err != nil {
		t.Fatalf("mount a small file system (it takes root): %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	s, err := sandbox.Make(t.Context(), sandbox.Options{Parent: small, Name: "full", Memory: 128 << 20})
	must(t, err)
	defer s.Remove()
	r.restore(t, s)
	var fs syscall.Statfs_t
	must(t, syscall.Statfs(small, &fs))
	if room := int64(fs.Bavail)*fs.Bsize - 1<<20; room > 0 {
		must(t, os.WriteFile(small+"/fill", make([]byte, room), 0o600))
	}
	rep := run(t, r.test(s))
	c := verdict(rep, proof.CheckReplay)
	if c.Verdict != proof.Failed || c.Kind != fail.NoSpace || !strings.Contains(c.Message, "No space left on device") || !errors.Is(rep.Err(), fail.NoSpace) {
		t.Errorf("got %v:\n%s", rep.Err(), failures(rep))
	}
}

// A backup is not to blame for what the host of the test lacks. What is wrong with
// the backup itself is told all the same.
func TestWhatTheHostLacksRefutesNothing(t *testing.T) {
	r := newRig(t)
	r.exec(t, "postgres", "UPDATE pg_collation SET collversion = '1.2' WHERE collname = 'en-x-icu'", "UPDATE pg_database SET datcollversion = '2.31' WHERE datname = 'shop'",
		"CREATE EXTENSION citext", "CREATE TABLE words (w citext)", "INSERT INTO words VALUES ('a'), ('b')", "CREATE INDEX words_w ON words (w)",
		"UPDATE pg_proc SET probin = '$libdir/gone' WHERE probin LIKE '%citext'")
	r.exec(t, "template1", "CREATE EXTENSION amcheck", "UPDATE pg_extension SET extversion = '0.1' WHERE extname = 'amcheck'")
	r.switchWAL(t)
	for name, damaged := range map[string]bool{"sound": false, "damaged": true} {
		t.Run(name, func(t *testing.T) {
			s := r.sandbox(t, name)
			page(t, s.Data()+"/"+r.paths["orders_icu"], 1, swapLines) // as where en sorts otherwise
			if damaged {
				page(t, s.Data()+"/"+r.paths["orders_name"], 1, swapLines)
			}
			test := r.test(s)
			test.Skip = []string{proof.CheckManifest}
			rep := run(t, test)
			for check, says := range map[string]string{
				proof.CheckCollations: `postgres: collation "en-x-icu" of indexes: version 1.2 at the source`,
				proof.CheckHeap:       `amcheck in database template1: extension "amcheck" has no update path`,
				proof.CheckBTree:      `words_w: could not access file "$libdir/gone"`,
			} {
				c := verdict(rep, check)
				kind, message := fail.PGVersion, "install"
				if damaged && check == proof.CheckBTree {
					kind, message = fail.Unknown, "indexes are damaged"
				}
				found := strings.Join(c.Findings, "\n")
				if c.Verdict != proof.Failed || c.Kind != kind || !strings.Contains(c.Message, message) || !strings.Contains(found, says) {
					t.Errorf("%s: %s, kind %q\n%s", c.Name, c.Message, c.Kind, found)
				}
			}
			if c := verdict(rep, proof.CheckRead); c.Verdict != proof.Passed {
				t.Errorf("%+v", c)
			}
			wants := fail.PGVersion
			if damaged {
				wants = fail.ProofFailed
			}
			if err := rep.Err(); fail.KindOf(err) != wants || proof.Answered(repo.Proof{}, rep) != damaged {
				t.Errorf("the report says %v", err)
			}
		})
	}
}

func TestStopIsAnErrorNotAVerdict(t *testing.T) {
	r := newRig(t)
	s := r.sandbox(t, "stop")
	ctx, cancel := context.WithCancel(t.Context())
	test := r.test(s)
	test.Recovery.Command = "sleep 1000"
	test.Recovery.Progress = func(string) { cancel() }
	if _, err := test.Run(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Run = %v", err)
	}
	if pids := strays(r.dir + "/s"); len(pids) > 0 {
		t.Errorf("processes are left: %v", pids)
	}
}

func TestPublicReportHoldsNoNames(t *testing.T) {
	rep := proof.Report{Checks: []proof.Check{{Name: "rows", Verdict: proof.Failed, Message: "tables do not have the rows", Findings: []string{"shop: secret has 1 row"}}}}
	b, err := json.Marshal(rep.Public())
	if err != nil || bytes.Contains(b, []byte("secret")) || strings.Contains(rep.Err().Error(), "secret") {
		t.Errorf("%s, %v", b, rep.Err())
	}
	if len(rep.Checks[0].Findings) != 1 {
		t.Error("Public changed the report")
	}
}

// A logical backup is proven in a cluster that is made for it.
func TestLogical(t *testing.T) {
	r := newRig(t)
	dump := r.dir + "/dump"
	if out, err := r.pg.Command(t.Context(), "pg_dump", "--format=directory", "--file="+dump, "--dbname="+r.pg.Conninfo()+" dbname=postgres").CombinedOutput(); err != nil {
		t.Fatalf("pg_dump: %v: %s", err, out)
	}
	s, err := sandbox.Make(t.Context(), sandbox.Options{Parent: r.dir + "/s", Name: "logical"})
	must(t, err)
	defer s.Remove()
	major, err := strconv.Atoi(r.text(t, "postgres", "SELECT (current_setting('server_version_num')::int / 10000)::text"))
	must(t, err)
	must(t, s.Create(t.Context(), major))
	must(t, s.Open(t.Context()))
	conn, err := s.Connect(t.Context(), "template1")
	must(t, err)
	_, err = conn.Exec(t.Context(), "CREATE DATABASE back TEMPLATE template0")
	must(t, err)
	conn.Close(t.Context())
	restore := r.pg.Command(t.Context(), "pg_restore", "--dbname="+s.Conninfo()+" dbname=back", "--no-owner", "--no-tablespaces", "--exit-on-error", dump)
	if out, err := restore.CombinedOutput(); err != nil {
		t.Fatalf("pg_restore: %v: %s", err, out)
	}
	test := proof.Test{Sandbox: s, Rows: map[string]map[string]int64{"back": r.rows["postgres"]},
		Assertions: []proof.Assertion{{Name: "orders", Database: "back", Query: "SELECT count(*) = 6000 FROM orders"}}}
	if rep := run(t, test); rep.Verdict != proof.Passed || rep.Rows < 6000 {
		t.Errorf("%+v is red:\n%s", rep, failures(rep))
	}
	must(t, s.Open(t.Context()))
	test.Rows["back"]["public.orders"]--
	if rep := run(t, test); rep.Verdict != proof.Failed || verdict(rep, proof.CheckRows).Failed != 1 {
		t.Errorf("one row too many: %s\n%s", rep.Verdict, failures(rep))
	}
}
