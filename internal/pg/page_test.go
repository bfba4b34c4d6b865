package pg_test

import (
	"testing"

	"github.com/pgkeep/pgkeep/internal/pg"
)

func BenchmarkPageChecksum(b *testing.B) {
	page := make([]byte, 8192)
	for i := range page {
		page[i] = byte(i * 7)
	}
	b.SetBytes(int64(len(page)))
	for b.Loop() {
		pg.PageChecksum(page, 77)
	}
}
