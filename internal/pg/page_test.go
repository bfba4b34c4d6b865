package pg_test

import (
	"encoding/binary"
	"testing"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// pageOf makes a page whose bytes follow from a number.
func pageOf(seed int) []byte {
	page := make([]byte, 8192)
	for i := range page {
		page[i] = byte(i*seed + i>>8)
	}
	return page
}

// The answers are those of page_checksum in PostgreSQL's extension pageinspect.
func TestPageChecksumIsThatOfPostgreSQL(t *testing.T) {
	for _, tt := range []struct {
		seed  int
		block uint32
		want  uint16
	}{
		{1, 1, 48513},
		{7, 131072, 15925},
		{251, 4294967294, 19291},
	} {
		page := pageOf(tt.seed)
		for _, stored := range []uint16{0, 0xffff} { // what stands in its place does not matter
			binary.LittleEndian.PutUint16(page[8:], stored)
			if got := pg.PageChecksum(page, tt.block); got != tt.want {
				t.Errorf("page %d as block %d: %d, want %d", tt.seed, tt.block, got, tt.want)
			}
		}
	}
}

// Every byte counts, but for the two of the checksum itself.
func TestPageChecksumSeesEveryByte(t *testing.T) {
	page := pageOf(7)
	want := pg.PageChecksum(page, 3)
	for i := range page {
		page[i] ^= 0x10
		got := pg.PageChecksum(page, 3)
		page[i] ^= 0x10
		if own := i == 8 || i == 9; (got == want) != own {
			t.Fatalf("byte %d: changed %v, want %v", i, got != want, !own)
		}
	}
}

func TestPageHeaderFields(t *testing.T) {
	page := make([]byte, 8192)
	if !pg.PageIsNew(page) {
		t.Error("a page of zeros is not new")
	}
	copy(page, []byte{0x16, 0, 0, 0, 0x48, 0xd8, 0x74, 0xb3, 0x34, 0x12})
	page[14] = 1
	if lsn, sum := pg.PageLSN(page), pg.StoredChecksum(page); lsn != 0x16_B374D848 || sum != 0x1234 || pg.PageIsNew(page) {
		t.Errorf("LSN %v, checksum %x, new %v", lsn, sum, pg.PageIsNew(page))
	}
}

func BenchmarkPageChecksum(b *testing.B) {
	page := pageOf(7)
	b.SetBytes(int64(len(page)))
	for b.Loop() {
		pg.PageChecksum(page, 77)
	}
}
