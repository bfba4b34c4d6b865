package pg_test

import (
	"testing"

	"github.com/pgkeep/pgkeep/internal/pg"
)

func TestSegmentName(t *testing.T) {
	const mb = 1 << 20
	for _, tt := range []struct {
		tli  pg.Timeline
		lsn  string
		size pg.SegmentSize
		want string // as pg_walfile_name of a server with that segment size said
	}{
		{1, "0/0", 16 * mb, "000000010000000000000000"},
		{1, "0/FFFFFF", 16 * mb, "000000010000000000000000"},
		{1, "0/1000000", 16 * mb, "000000010000000000000001"},
		{1, "0/FFFFFFFF", 16 * mb, "0000000100000000000000FF"},
		{1, "1/0", 16 * mb, "000000010000000100000000"},
		{17, "16/B374D848", 16 * mb, "0000001100000016000000B3"},
		{1, "16/B374D848", mb, "000000010000001600000B37"},
		{1, "16/B374D848", 1024 * mb, "000000010000001600000002"},
	} {
		lsn, err := pg.ParseLSN(tt.lsn)
		if err != nil {
			t.Fatal(err)
		}
		got, err := pg.SegmentName(tt.tli, lsn, tt.size)
		if err != nil || got != tt.want {
			t.Errorf("SegmentName(%v, %v, %d) = %q, %v, want %q", tt.tli, lsn, tt.size, got, err, tt.want)
		}
	}
}

func TestParseSegmentNameRefusesWhatIsNoSegment(t *testing.T) {
	for _, name := range []string{
		"",
		"00000001",
		"00000001.history",
		"000000010000000000000042.partial",
		"000000010000000000000042.00000028.backup",
		"00000001000000000000004",
		"00000001000000000000004G",
		"0000000a0000000000000042",
		"000000010000000000000100", // 4 GiB hold 256 segments of 16 MiB
		"+00000010000000000000042",
		"0x0000010000000000000042",
	} {
		if tli, lsn, err := pg.ParseSegmentName(name, 16<<20); err == nil {
			t.Errorf("ParseSegmentName(%q) = %v, %v, want an error", name, tli, lsn)
		}
	}
	for _, size := range []pg.SegmentSize{0, -1 << 20, 1 << 19, 3 << 20, 1 << 31} {
		if _, _, err := pg.ParseSegmentName("000000010000000000000001", size); err == nil {
			t.Errorf("ParseSegmentName took %d for a segment size", size)
		}
		if _, err := pg.SegmentName(1, 0, size); err == nil {
			t.Errorf("SegmentName took %d for a segment size", size)
		}
	}
}

func FuzzSegmentName(f *testing.F) {
	f.Add("000000010000001600000B37", uint8(0))
	f.Add("0000001100000016000000B3", uint8(4))
	f.Fuzz(func(t *testing.T, name string, power uint8) {
		size := pg.SegmentSize(1) << (20 + power%11)
		tli, lsn, err := pg.ParseSegmentName(name, size)
		if err != nil {
			return
		}
		for _, at := range []pg.LSN{lsn, lsn + pg.LSN(size) - 1} {
			if back, err := pg.SegmentName(tli, at, size); err != nil || back != name {
				t.Fatalf("%q begins at %v, but the byte at %v is in %q (%v)", name, lsn, at, back, err)
			}
		}
	})
}
