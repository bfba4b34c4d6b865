package pg_test

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/pg"
)

func TestParseWALName(t *testing.T) {
	for name, want := range map[string]struct {
		kind    pg.WALKind
		tli     pg.Timeline
		segment string
	}{
		"000000010000000000000042":                 {pg.Segment, 1, "000000010000000000000042"},
		"0000000A0000000000000042.partial":         {pg.Partial, 10, "0000000A0000000000000042"},
		"000000010000000000000042.00000028.backup": {pg.BackupHistory, 1, "000000010000000000000042"},
		"0000000B.history":                         {pg.History, 11, ""},
	} {
		n, err := pg.ParseWALName(name)
		if err != nil || n.Kind != want.kind || n.Timeline != want.tli || n.Segment() != want.segment || n.String() != name {
			t.Errorf("ParseWALName(%q) = %+v, %v", name, n, err)
		}
	}
	for _, name := range []string{
		"", ".", "..", "/etc/passwd", "../000000010000000000000042", "000000010000000000000042/", "000000010000000000000042.",
		"00000001000000000000004", "0000000100000000000000042", "00000001000000000000004a", "000000000000000000000042",
		"00000000.history", "0000000b.history", "00000001.history.gz", "000000010000000000000042.history",
		"000000010000000000000042.partial.partial", "000000010000000000000042.0000002.backup", "000000010000000000000042.0000002g.backup",
		"00000001.partial", "RECOVERYXLOG", "000000010000000000000042\n",
	} {
		if n, err := pg.ParseWALName(name); err == nil {
			t.Errorf("ParseWALName(%q) = %v, want an error", name, n)
		}
	}
}

func TestNextSegment(t *testing.T) {
	for _, tt := range []struct {
		name, want string
		size       pg.SegmentSize
	}{
		{"000000010000000000000042", "000000010000000000000043", 16 << 20},
		{"0000000100000000000000FF", "000000010000000100000000", 16 << 20},
		{"0000000100000000000000FF", "000000010000000000000100", 1 << 20},
		{"000000010000000000000042.partial", "000000010000000000000043", 16 << 20},
		{"00000001FFFFFFFF000000FF", "", 16 << 20},
		{"000000010000000000000100", "", 16 << 20},
		{"00000002.history", "", 16 << 20},
	} {
		n, err := pg.ParseWALName(tt.name)
		if err != nil {
			t.Fatal(err)
		}
		if next, err := n.Next(tt.size); next.String() != tt.want || (err == nil) != (tt.want != "") {
			t.Errorf("%s.Next(%d) = %q, %v, want %q", tt.name, tt.size, next, err, tt.want)
		}
	}
}

func TestParseHistory(t *testing.T) {
	text := "1\t0/3000158\tno recovery target specified\n\n# a comment\n2\t0/5000000\tat restore point \"x\"\n"
	got, err := pg.ParseHistory(3, text)
	want := []pg.Fork{{Timeline: 1, At: 0x3000158}, {Timeline: 2, At: 0x5000000}}
	if d := cmp.Diff(want, got); err != nil || d != "" {
		t.Errorf("%v, (-want +got):\n%s", err, d)
	}
	for _, bad := range []string{"", "# nothing\n", "1\n", "x\t0/1\n", "0\t0/1\n", "1\t0-1\n", "3\t0/1\n", "2\t0/2\n1\t0/3\n", "1\t0/2\n2\t0/1\n", "1\t0/2\n1\t0/2\n"} {
		if got, err := pg.ParseHistory(3, bad); err == nil {
			t.Errorf("ParseHistory(%q) = %v, want an error", bad, got)
		}
	}
}

// page makes the first page header of a segment.
func page(magic, info uint16, size uint32) []byte {
	b := make([]byte, pg.PageHeaderSize)
	le := binary.LittleEndian
	le.PutUint16(b, magic)
	le.PutUint16(b[2:], info)
	le.PutUint32(b[4:], 3)
	le.PutUint64(b[8:], 0x2A_000000)
	le.PutUint64(b[24:], 7_300_000_000_000_000_001)
	le.PutUint32(b[32:], size)
	le.PutUint32(b[36:], 8192)
	return b
}

func TestParsePageHeader(t *testing.T) {
	for magic, major := range map[uint16]int{0xD106: 13, 0xD10D: 14, 0xD110: 15, 0xD113: 16, 0xD116: 17, 0xD118: 18} {
		got, err := pg.ParsePageHeader(page(magic, 2, 16<<20))
		want := pg.PageHeader{Major: major, Timeline: 3, Address: 0x2A_000000, System: 7_300_000_000_000_000_001, SegmentSize: 16 << 20}
		if d := cmp.Diff(want, got); err != nil || d != "" {
			t.Errorf("%v, (-want +got):\n%s", err, d)
		}
	}
	for what, b := range map[string][]byte{
		"unknown magic":    page(0xD107, 2, 16<<20),
		"a short header":   page(0xD110, 0, 16<<20),
		"unknown flags":    page(0xD110, 0x12, 16<<20),
		"no segment size":  page(0xD110, 2, 3<<20),
		"too few bytes":    page(0xD110, 2, 16<<20)[:39],
		"nothing":          nil,
		"nothing but zero": make([]byte, 40),
	} {
		if h, err := pg.ParsePageHeader(b); err == nil {
			t.Errorf("%s: %+v, want an error", what, h)
		}
	}
}

func FuzzWALName(f *testing.F) {
	f.Add("000000010000000000000042.00000028.backup", uint8(4))
	f.Add("0000000B.history", uint8(0))
	f.Fuzz(func(t *testing.T, s string, power uint8) {
		n, err := pg.ParseWALName(s)
		if err != nil {
			return
		}
		if n.String() != s || len(s) > 64 || strings.ContainsAny(s, "/\\ \x00") || n.Timeline == 0 {
			t.Fatalf("%q became %+v", s, n)
		}
		size := pg.SegmentSize(1) << (20 + power%11)
		next, err := n.Next(size)
		if err != nil {
			return
		}
		if again, err := pg.ParseWALName(next.String()); err != nil || again != next || next.Segment() <= n.Segment() {
			t.Fatalf("after %v comes %v (%v)", n, next, err)
		}
	})
}

func FuzzHistory(f *testing.F) {
	f.Add(uint32(3), "1\t0/3000158\tno recovery target specified\n2\t0/5000000\t\n")
	f.Fuzz(func(t *testing.T, tli uint32, text string) {
		forks, err := pg.ParseHistory(pg.Timeline(tli), text)
		if err != nil {
			return
		}
		last := forks[len(forks)-1]
		if last.Timeline >= pg.Timeline(tli) || len(forks) == 0 {
			t.Fatalf("%d from %q: %v", tli, text, forks)
		}
	})
}

func FuzzPageHeader(f *testing.F) {
	f.Add(page(0xD110, 2, 16<<20))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := pg.ParsePageHeader(b)
		if err == nil && (h.Major < 13 || h.Major > 18 || !h.SegmentSize.Valid()) {
			t.Fatalf("%+v", h)
		}
	})
}
