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
	done, err := wal.Fill(ctx, r, "main", dir, func(n pg.WALName) bool { return n.Kind == pg.Segment && n.String() != names[0] })
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{names[1], names[8], names[9]}; !slices.Equal(done.Files, want) {
		t.Errorf("filled %v, want %v", done.Files, want)
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
	if err != nil || len(done.Files) > 0 || len(done.Refused) > 0 {
		t.Errorf("of a timeline that nobody left: %+v, %v", done, err)
	}
}

// A history counts if others go on from it, or if it is the server's own: two
// timelines can have one number.
func TestFillBringsHistoriesBack(t *testing.T) {
	const second, third = "00000002.history", "00000003.history"
	const own, rogue = "1\t0/4A0B0C0\tx\n", "1\t0/4B0B0C0\tx\n"
	const next = own + "2\t0/4C0B0C0\tx\n"
	type files map[string]string
	for what, tt := range map[string]struct {
		archived files
		local    files
		timeline uint32
		other    bool // another copy of the data directory
		want     string
	}{
		"named in the archive":              {files{third: next}, files{second: own}, 3, true, "filled"},
		"named in pg_wal":                   {files{seg + "41": ""}, files{second: own, third: next}, 3, true, "filled"},
		"another's, by the archive":         {files{third: next}, files{second: rogue}, 3, true, "another timeline of that number"},
		"another's, by pg_wal":              {files{seg + "41": ""}, files{second: rogue, third: next}, 3, true, "another timeline of that number"},
		"the server's own":                  {files{"00000002000000000000004B": ""}, files{second: own}, 2, false, "filled"},
		"the number of one that is another": {files{"00000002000000000000004B": ""}, files{second: own}, 2, true, "nothing shows"},
		"of an older timeline, and alone":   {files{"00000002000000000000004B": ""}, files{second: own}, 4, false, "nothing shows"},
		"unlike what is archived":           {files{second: rogue, third: next}, files{second: own}, 3, true, "under this name"},
		"not to be read":                    {files{third: next}, files{second: "x"}, 3, true, "corrupt"},
	} {
		t.Run(what, func(t *testing.T) {
			r := archiveIn(t, new(store.Mem))
			for name, text := range tt.archived {
				b := []byte(text)
				if text == "" {
					b = content(t, name)
				}
				if err := push(t, r, name, b); err != nil {
					t.Fatal(err)
				}
			}
			dir := serverDir(t)
			if tt.other {
				dir = filepath.Join(t.TempDir(), "other")
				makeServer(t, dir)
			}
			control(t, dir, tt.timeline, pg.InProduction)
			for name, text := range tt.local {
				if err := os.WriteFile(filepath.Join(dir, "pg_wal", name), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			done, err := wal.Fill(ctx, r, "main", dir, func(n pg.WALName) bool { return n.String() == second })
			got := fmt.Sprint(done.Refused, err)
			if slices.Equal(done.Files, []string{second}) && len(done.Refused) == 0 && err == nil {
				got = "filled"
			}
			if !strings.Contains(got, tt.want) {
				t.Errorf("%+v, %v; want %q", done, err, tt.want)
			}
		})
	}
}
