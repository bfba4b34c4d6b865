package pg_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// scan reads all there is, in reads of uneven lengths.
func scan(r io.Reader) (*pg.WALScanner, []pg.WALRecord, error) {
	s := pg.NewWALScanner(r)
	var all []pg.WALRecord
	for {
		rec, err := s.Next()
		if err == io.EOF {
			return s, all, nil
		}
		if err != nil {
			return s, all, err
		}
		all = append(all, rec)
	}
}

// realWAL makes a server write all that the scanner knows, and much else, and
// returns its segments and what pg_waldump finds in them.
func realWAL(t *testing.T) (segments []string, dump string) {
	t.Helper()
	p := lab.PostgresForTest(t, lab.PostgresOptions{WALSegmentMB: 1, Settings: map[string]string{
		"max_prepared_transactions": "10", "wal_keep_size": "1GB", "max_wal_size": "4GB", "track_commit_timestamp": "on"}})
	if err := p.Exec(t.Context(), "postgres",
		"CREATE TABLE t (i int PRIMARY KEY, x text)",
		"INSERT INTO t SELECT i, repeat(md5(i::text), 40) FROM generate_series(1, 3000) i",
		"SELECT pg_create_restore_point('before')",
		"BEGIN; INSERT INTO t VALUES (-1); ROLLBACK",
		"BEGIN; INSERT INTO t VALUES (-2); SAVEPOINT a; INSERT INTO t VALUES (-3); SAVEPOINT b; INSERT INTO t VALUES (-4); COMMIT",
		"BEGIN; CREATE TABLE dropped (i int); INSERT INTO t VALUES (-5); SAVEPOINT a; INSERT INTO t VALUES (-6); PREPARE TRANSACTION 'yes'",
		"BEGIN; INSERT INTO t VALUES (-7); PREPARE TRANSACTION 'no'",
		"COMMIT PREPARED 'yes'",
		"ROLLBACK PREPARED 'no'",
		"BEGIN; DROP TABLE dropped; SAVEPOINT a; PREPARE TRANSACTION 'drop'", "COMMIT PREPARED 'drop'",
		"SELECT pg_switch_wal()",
		"SELECT pg_logical_emit_message(false, 'large', repeat('x', 3000000))", // over several segments
		"SELECT pg_create_restore_point(repeat('n', 63))",
		"CHECKPOINT",
	); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{{"-i", "-s", "1", "-q"}, {"-c", "4", "-t", "250"}} {
		cmd := p.Command(t.Context(), "pgbench", append(args, "-h", filepath.Join(filepath.Dir(p.DataDir), "run"), "-U", "postgres", "postgres")...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("pgbench: %v\n%s", err, out)
		}
	}
	if err := p.Exec(t.Context(), "postgres", "SELECT pg_backup_start('x', true); SELECT pg_backup_stop(false)", "INSERT INTO t VALUES (-8)"); err != nil {
		t.Fatal(err)
	}
	all, err := filepath.Glob(filepath.Join(p.DataDir, "pg_wal", "0000000100000000*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range all {
		if len(filepath.Base(f)) == 24 {
			segments = append(segments, f)
		}
	}
	cmd := p.Command(t.Context(), "pg_waldump", segments[0], segments[len(segments)-1])
	cmd.Env = append(cmd.Env, "TZ=UTC")
	out, err := cmd.Output() // it ends with an error: there is no more valid log
	if len(out) == 0 {
		t.Fatal(err)
	}
	return segments, string(out)
}

var (
	dumpLine = regexp.MustCompile(`^rmgr: (\S+) .*, tx: +(\d+), lsn: (\S+), prev \S+, desc: (\S+) ?(.*)$`)
	dumpTime = regexp.MustCompile(`(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+) UTC`)
)

// parseDump reads pg_waldump's lines. It does not tell the time of restore
// points and checkpoints.
func parseDump(t *testing.T, dump string) (all []pg.WALRecord, last pg.LSN) {
	t.Helper()
	lsn := func(s string) pg.LSN {
		l, err := pg.ParseLSN(strings.TrimRight(s, ",;"))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	for line := range strings.Lines(dump) {
		m := dumpLine.FindStringSubmatch(strings.TrimSpace(line))
		if m == nil {
			t.Fatalf("pg_waldump says %q", line)
		}
		xid, err := strconv.ParseUint(m[2], 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		rec := pg.WALRecord{At: lsn(m[3]), XID: uint32(xid)}
		last = rec.At
		switch m[1] + " " + m[4] {
		case "Transaction COMMIT", "Transaction COMMIT_PREPARED":
			rec.Kind = pg.Commit
		case "Transaction ABORT", "Transaction ABORT_PREPARED":
			rec.Kind = pg.Abort
		case "XLOG RESTORE_POINT":
			rec.Kind, rec.Name = pg.RestorePoint, m[5]
		case "XLOG BACKUP_END":
			rec.Kind, rec.From = pg.BackupEnd, lsn(m[5])
		case "XLOG CHECKPOINT_ONLINE", "XLOG CHECKPOINT_SHUTDOWN":
			rec.Kind, rec.From = pg.Checkpoint, lsn(strings.Fields(m[5])[1])
		default:
			continue
		}
		if m[1] == "Transaction" {
			if prepared, _, ok := strings.Cut(m[5], ":"); ok && strings.HasSuffix(m[4], "_PREPARED") {
				xid, err := strconv.ParseUint(prepared, 10, 32)
				if err != nil {
					t.Fatal(err)
				}
				rec.XID = uint32(xid)
			}
			if rec.Time, err = time.Parse("2006-01-02 15:04:05", dumpTime.FindStringSubmatch(m[5])[1]); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, rec)
	}
	return all, last
}

func TestTheScannerFindsWhatPgWaldumpDoes(t *testing.T) {
	segments, dump := realWAL(t)
	want, last := parseDump(t, dump)
	var log bytes.Buffer
	for _, f := range segments {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		log.Write(b)
	}
	began := time.Now()
	s, got, err := scan(bytes.NewReader(log.Bytes()))
	t.Logf("%d MB with %d records of interest in %v; ends at %v, as %v", log.Len()>>20, len(got), time.Since(began), s.End(), s.Why())
	if err != nil {
		t.Fatal(err)
	}
	kinds := make(map[pg.RecordKind]int)
	ours := false // what comes before may be as old as the template of the cluster
	for i := range got {
		ours = ours || got[i].Name == "before"
		kinds[got[i].Kind]++
		if got[i].End <= got[i].At {
			t.Errorf("%+v ends before it begins", got[i])
		}
		if age := time.Since(got[i].Time); got[i].Kind != pg.BackupEnd && (age < -time.Second || ours && age > 5*time.Minute) {
			t.Errorf("%+v has a strange time", got[i])
		}
		got[i].End = 0
		if k := got[i].Kind; k == pg.RestorePoint || k == pg.Checkpoint {
			got[i].Time = time.Time{}
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for k := pg.Commit; k <= pg.Checkpoint; k++ {
		if kinds[k] == 0 {
			t.Errorf("no record of kind %d: the test has lost its point", k)
		}
	}
	if s.End() <= last || s.End() > last+8192 || s.Why() == nil {
		t.Errorf("the log ends at %v (%v), its last record begins at %v", s.End(), s.Why(), last)
	}
	t.Run("from any segment on", func(t *testing.T) { fromAnySegment(t, log.Bytes(), got) })
	t.Run("whatever is broken ends the log", func(t *testing.T) { brokenAnywhere(t, log.Bytes()[:4<<20], got) })
}

// A scan that begins later finds what begins later, although a record may have
// begun before.
func fromAnySegment(t *testing.T, log []byte, all []pg.WALRecord) {
	for at := 1 << 20; at < len(log); at += 1 << 20 {
		_, got, err := scan(bytes.NewReader(log[at:]))
		if err != nil {
			t.Fatal(err)
		}
		h, err := pg.ParsePageHeader(log[at:])
		if err != nil {
			break // a segment that is kept for later
		}
		first := slices.IndexFunc(all, func(r pg.WALRecord) bool { return r.At >= h.Address })
		if first < 0 {
			first = len(all)
		}
		if len(got) != len(all[first:]) || len(got) > 0 && got[0].At != all[first].At {
			t.Errorf("from segment %d: %d records, want %d", at>>20, len(got), len(all[first:]))
		}
	}
}

// No bit of the log can be another one without ending it there, but behind a
// switch.
func brokenAnywhere(t *testing.T, log []byte, all []pg.WALRecord) {
	sound, _, err := scan(bytes.NewReader(log))
	if err != nil {
		t.Fatal(err)
	}
	h, err := pg.ParsePageHeader(log)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 500 {
		at := (i*7919*13 + i) % len(log)
		if rec := all[i%len(all)]; i%2 == 0 && rec.At+40 < h.Address+pg.LSN(len(log)) {
			at = int(rec.At-h.Address) + i%40 // within a record that is looked into
		}
		b := bytes.Clone(log)
		b[at] ^= 1 << (i % 8)
		s, got, err := scan(bytes.NewReader(b))
		if err != nil {
			t.Fatal(err)
		}
		for j := range got {
			got[j].End = 0
			if k := got[j].Kind; k == pg.RestorePoint || k == pg.Checkpoint {
				got[j].Time = time.Time{}
			}
			if !cmp.Equal(got[j], all[j]) {
				t.Fatalf("byte %d: found %+v, which is %+v", at, got[j], all[j])
			}
		}
		if pos := h.Address + pg.LSN(at); at >= pg.PageHeaderSize && (s.End() > sound.End() || s.End() < pos-min(pos, 4<<20)) {
			t.Errorf("byte %d, at %v: the log ends at %v", at, pos, s.End())
		}
	}
}

// A record that a crash cut off is passed by, as the server's next life says.
func TestARecordThatWasGivenUpIsPassedBy(t *testing.T) {
	le := binary.LittleEndian
	log := make([]byte, 1<<20)
	page := func(n int, flags uint16, rest uint32) {
		b := log[n*8192:]
		le.PutUint16(b, 0xD110)
		le.PutUint16(b[2:], flags)
		le.PutUint32(b[4:], 1)
		le.PutUint64(b[8:], 0x100000+uint64(n)*8192)
		le.PutUint32(b[16:], rest)
		if n == 0 {
			le.PutUint16(b[2:], flags|2)
			le.PutUint64(b[24:], 42)
			le.PutUint32(b[32:], 1<<20)
			le.PutUint32(b[36:], 8192)
		}
	}
	page(0, 0, 0)
	le.PutUint32(log[40:], 20_000) // goes on for two pages more, of which one was written
	le.PutUint64(log[48:], 0x0FFFF0)
	log[57] = 10 // of a table
	page(1, 1, 20_000-(8192-40))
	page(2, 8, 0)
	restorePoint(log[2*8192+24:], 0x100028, "after")
	s, got, err := scan(bytes.NewReader(log))
	if err != nil || len(got) != 1 || got[0].Name != "after" || got[0].At != 0x104018 {
		t.Errorf("found %+v (%v, ends as %v)", got, err, s.Why())
	}
}

// restorePoint writes such a record.
func restorePoint(b []byte, prev pg.LSN, name string) {
	le := binary.LittleEndian
	le.PutUint32(b, 24+2+72)
	le.PutUint64(b[8:], uint64(prev))
	b[16] = 0x70
	b[24], b[25] = 255, 72
	copy(b[34:], name)
	le.PutUint32(b[20:], checksum(b[24:24+2+72], b[:20]))
}

// An error of the reader is one, and not the end of the log.
func TestTheEndOfTheLogIsNotAnError(t *testing.T) {
	broken := errors.New("broken")
	if _, _, err := scan(io.MultiReader(strings.NewReader("short"), errReader{broken})); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	if s, all, err := scan(strings.NewReader("")); err != nil || len(all) > 0 || s.End() != 0 || s.Why() != nil {
		t.Errorf("of nothing: %v, %v, %v", all, err, s.Why())
	}
}

type errReader struct{ error }

func (e errReader) Read([]byte) (int, error) { return 0, e.error }

func FuzzWALScanner(f *testing.F) {
	log := make([]byte, 3*8192)
	le := binary.LittleEndian
	for n := range 3 {
		b := log[n*8192:]
		le.PutUint16(b, 0xD110)
		le.PutUint32(b[4:], 1)
		le.PutUint64(b[8:], 0x100000+uint64(n)*8192)
	}
	le.PutUint16(log[2:], 2)
	le.PutUint64(log[24:], 42)
	le.PutUint32(log[32:], 1<<20)
	le.PutUint32(log[36:], 8192)
	restorePoint(log[40:], 1, "name")
	f.Add(log, 0, []byte{1})
	f.Add(log, 8194, []byte{1, 0, 0, 0})
	f.Add(log[:100], 50, []byte{255, 255})
	f.Fuzz(func(t *testing.T, log []byte, at int, put []byte) {
		if len(log) > 0 {
			copy(log[uint(at)%uint(len(log)):], put)
		}
		s := pg.NewWALScanner(bytes.NewReader(log))
		for n := 0; ; n++ {
			rec, err := s.Next()
			if err != nil {
				if err != io.EOF {
					t.Fatal(err)
				}
				return
			}
			if n > len(log)/24+1 || rec.End <= rec.At {
				t.Fatalf("record %d: %+v", n, rec)
			}
		}
	})
}

// checksum is a record's: of its data first.
func checksum(parts ...[]byte) uint32 {
	var crc uint32
	for _, p := range parts {
		crc = crc32.Update(crc, crc32.MakeTable(crc32.Castagnoli), p)
	}
	return crc
}
