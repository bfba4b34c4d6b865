package pg_test

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math"
	"testing"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// controlOf makes a pg_control with a right checksum, which stands at crc.
func controlOf(version, catalog uint32, crc int) []byte {
	b := make([]byte, pg.ControlSize)
	le := binary.LittleEndian
	le.PutUint64(b, 7_300_000_000_000_000_001)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[12:], catalog)
	le.PutUint32(b[16:], 6)
	le.PutUint64(b[32:], 0x3000150)
	le.PutUint64(b[40:], 0x3000118)
	le.PutUint32(b[48:], 11)
	le.PutUint64(b[136:], 0x3000200)
	le.PutUint32(b[144:], 12)
	le.PutUint64(b[208:], math.Float64bits(1234567))
	le.PutUint32(b[216:], 8192)
	le.PutUint32(b[220:], 131072)
	le.PutUint32(b[228:], 16<<20)
	le.PutUint32(b[252:], 1)
	return signControl(b, crc)
}

func signControl(b []byte, crc int) []byte {
	binary.LittleEndian.PutUint32(b[crc:], crc32.Checksum(b[:crc], crc32.MakeTable(crc32.Castagnoli)))
	return b
}

// PostgreSQL 18 moved the checksum.
func TestControlFileIsRead(t *testing.T) {
	for _, tt := range []struct {
		version, catalog uint32
		crc              int
	}{
		{1300, 202007201, 288}, {1300, 202209061, 288}, {1300, 202307071, 288}, {1700, 202406281, 288}, {1800, 202506291, 292},
	} {
		want := pg.Control{
			System: 7_300_000_000_000_000_001, Version: int(tt.version), Catalog: int(tt.catalog), State: pg.InProduction,
			Checkpoint: 0x3000150, Redo: 0x3000118, Timeline: 11, MinRecovery: 0x3000200, MinRecoveryTimeline: 12,
			BlockSize: 8192, RelSegBlocks: 131072, SegmentSize: 16 << 20, Checksums: true,
		}
		if c, err := pg.ParseControl(controlOf(tt.version, tt.catalog, tt.crc)); err != nil || c != want {
			t.Errorf("catalog %d: %+v, %v", tt.catalog, c, err)
		}
	}
}

func TestControlFileThatChangesWhileItIsReadIsTorn(t *testing.T) {
	b := controlOf(1300, 202209061, 288)
	for i := range 288 {
		if i >= 8 && i < 16 || i >= 208 && i < 216 { // by these it is known at all
			continue
		}
		b[i] ^= 1
		_, err := pg.ParseControl(b)
		b[i] ^= 1
		if !errors.Is(err, pg.ErrTorn) {
			t.Fatalf("byte %d changed: %v, want %v", i, err, pg.ErrTorn)
		}
	}
}

func TestControlFileOfAnotherKindIsRefused(t *testing.T) {
	for name, change := range map[string]func(b []byte) []byte{
		"short":            func(b []byte) []byte { return b[:200] },
		"PostgreSQL 12":    func(b []byte) []byte { b[8], b[9] = 0xb1, 4; return signControl(b, 288) },
		"other endianness": func(b []byte) []byte { b[208]++; return signControl(b, 288) },
		"page size 8191":   func(b []byte) []byte { b[216], b[217] = 0xff, 0x1f; return signControl(b, 288) },
		"segments of 0":    func(b []byte) []byte { b[231] = 0; return signControl(b, 288) },
	} {
		if c, err := pg.ParseControl(change(controlOf(1300, 202209061, 288))); err == nil || errors.Is(err, pg.ErrTorn) {
			t.Errorf("%s: %+v, %v", name, c, err)
		}
	}
}

func FuzzControl(f *testing.F) {
	f.Add(controlOf(1300, 202209061, 288))
	f.Add(controlOf(1800, 202506291, 292))
	f.Fuzz(func(t *testing.T, b []byte) {
		if c, err := pg.ParseControl(b); err == nil && (c.System == 0 || c.Timeline == 0 || !c.SegmentSize.Valid()) {
			t.Fatalf("%+v", c)
		}
	})
}
