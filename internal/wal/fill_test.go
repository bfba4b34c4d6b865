package wal_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/wal"
)

// A primary that died left segments in a standby's pg_wal. Real ones, and what
// can have become of them.
func TestFill(t *testing.T) {
	p := lab.PostgresForTest(t, lab.PostgresOptions{WALSegmentMB: 1, Settings: map[string]string{"wal_keep_size": "500MB"}})
	var names []string
	for i := range 9 {
		sql := []string{fmt.Sprintf("CREATE TABLE t%d AS SELECT i, md5(i::text) FROM generate_series(1, %d) i", i, i*2000), "SELECT pg_switch_wal()"}
		if err := p.Exec(t.Context(), "postgres", sql...); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	if out, err := exec.Command("cp", "-r", p.DataDir, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	dir = filepath.Join(dir, "data")
	s, err := wal.ReadServer(dir)
	if err != nil {
		t.Fatal(err)
	}
	found, err := filepath.Glob(filepath.Join(dir, "pg_wal/00000001*"))
	if err != nil || len(found) < 12 {
		t.Fatalf("%d segments, %v", len(found), err)
	}
	for _, f := range found[:12] {
		names = append(names, filepath.Base(f))
	}
	file := func(i int) string { return filepath.Join(dir, "pg_wal", names[i]) }
	read := func(i int) []byte {
		b, err := os.ReadFile(file(i))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	write := func(i int, change func([]byte) []byte) {
		if err := os.WriteFile(file(i), change(read(i)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(2, func(b []byte) []byte { return b[:1<<19] })                           // truncated
	write(3, func([]byte) []byte { return read(1) })                               // recycled: renamed, not yet written over
	write(4, func(b []byte) []byte { b[5000] ^= 1; return b })                     // a bit flipped
	write(5, func(b []byte) []byte { b[24] ^= 1; return b })                       // another system's
	write(6, func(b []byte) []byte { clear(b[1<<13:]); return b })                 // received in part
	write(7, func(b []byte) []byte { copy(b[1<<14:], read(1)[1<<14:]); return b }) // written over in part
	last, _ := pg.ParseWALName(names[10])
	at, _ := last.Start(s.SegmentSize)
	if err := os.WriteFile(filepath.Join(dir, "pg_wal/00000002.history"), fmt.Appendf(nil, "1\t%v\tleft within segment 10\n", at+0x1000), 0o600); err != nil {
		t.Fatal(err)
	}
	r := archiveIn(t, new(store.Mem))
	done, err := wal.Fill(ctx, r, "main", dir, func(n pg.WALName) bool { return n.String() != names[0] })
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{names[1], names[8], names[9]}; !slices.Equal(done.Segments, want) {
		t.Errorf("filled %v, want %v", done.Segments, want)
	}
	var refused []string
	for _, why := range done.Refused {
		name, _, _ := strings.Cut(why, ":")
		refused = append(refused, name)
	}
	if !slices.Equal(refused, names[2:8]) {
		t.Errorf("refused %q, want %q", done.Refused, names[2:8])
	}
	if err := os.Remove(filepath.Join(dir, "pg_wal/00000002.history")); err != nil {
		t.Fatal(err)
	}
	done, err = wal.Fill(ctx, archiveIn(t, new(store.Mem)), "main", dir, func(pg.WALName) bool { return true })
	if err != nil || len(done.Segments) > 0 || len(done.Refused) > 0 {
		t.Errorf("of a timeline that nobody left: %+v, %v", done, err)
	}
}
