package pgdata_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/pgdata"
)

// read returns a whole file of the tree.
func read(t *testing.T, d *pgdata.Dir, path string) string {
	t.Helper()
	b, _ := readFile(t, d, path, pgdata.PageCheck{})
	return string(b)
}

// readFile returns a whole file as it is now, and the blocks that are damaged.
func readFile(t *testing.T, d *pgdata.Dir, path string, check pgdata.PageCheck) ([]byte, []int64) {
	t.Helper()
	size := int64(1)
	if info, err := os.Stat(filepath.Join(d.Path(), strings.TrimPrefix(path, "data"))); err == nil {
		size = info.Size()
	}
	s, err := d.OpenFile(t.Context(), pgdata.File{Path: path, Size: size}, check)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	b := make([]byte, s.Size()+1)
	n, err := s.ReadAt(b, 0)
	if err != io.EOF {
		t.Fatalf("%s: %d bytes, %v", path, n, err)
	}
	return b[:n], s.Damaged()
}

const (
	start pg.LSN = 0x1_0000_0000 // of the backups here
	now   pg.LSN = 0x1_4000_0000
)

var check = pgdata.PageCheck{Start: start, Now: func() (pg.LSN, error) { return now, nil }}

// page makes a page as the server writes it.
func page(block uint32, lsn pg.LSN, fill byte) []byte {
	b := bytes.Repeat([]byte{fill}, 8192)
	le := binary.LittleEndian
	le.PutUint32(b, uint32(lsn>>32))
	le.PutUint32(b[4:], uint32(lsn))
	le.PutUint16(b[14:], 4096)
	le.PutUint16(b[8:], pg.PageChecksum(b, block))
	return b
}

// broken changes a page so that its checksum is wrong.
func broken(page []byte) []byte {
	page = bytes.Clone(page)
	page[5000] ^= 1
	return page
}

func TestPagesAreJudged(t *testing.T) {
	zero := make([]byte, 8192)
	old := start - 1000
	for name, tt := range map[string]struct {
		page []byte
		bad  bool
	}{
		"right":                       {page(0, old, 7), false},
		"never filled":                {zero, false},
		"never filled, but not empty": {append(bytes.Clone(zero[:100]), append([]byte{1}, zero[101:]...)...), true},
		"damaged":                     {broken(page(0, old, 7)), true},
		"of another block":            {page(1, old, 7), true},
		"changed since the start":     {broken(page(0, start, 7)), false},
		"changed just now":            {broken(page(0, now, 7)), false},
		"changed in the future: PostgreSQL's own rule lets it pass": {broken(page(0, now<<8, 7)), true},
	} {
		dir := forge(t)
		put(t, dir, "base/1/16384", string(page(0, old, 1))+string(page(1, old, 2)))
		put(t, dir, "base/1/16385", string(tt.page)+string(page(1, old, 2)))
		d := open(t, dir, pgdata.Options{})
		b, damaged := readFile(t, d, "data/base/1/16385", check)
		want := []int64(nil)
		if tt.bad {
			want = []int64{0}
		}
		if !slices.Equal(damaged, want) {
			t.Errorf("%s: damaged %v, want %v", name, damaged, want)
		}
		if !bytes.Equal(b[:8192], tt.page) {
			t.Errorf("%s: the page is not read as it is", name)
		}
		if _, damaged := readFile(t, d, "data/base/1/16385", pgdata.PageCheck{}); damaged != nil {
			t.Errorf("%s: judged, though nobody asked", name)
		}
		if _, damaged := readFile(t, d, "data/base/1/16384", check); damaged != nil {
			t.Errorf("%s: the file before it is damaged: %v", name, damaged)
		}
	}
}

// The second file of a relation begins where the first one ended. The forged
// cluster has 16 pages to a file, for PostgreSQL's 131072 would be 1 GB.
func TestBlocksAreNumberedThroughAllFilesOfARelation(t *testing.T) {
	for _, dir := range []string{"base/5", "global", "pg_tblspc/17/" + version + "/5"} {
		for _, fork := range []string{"", "_fsm", "_vm", "_init"} {
			root := forge(t)
			name := dir + "/16384" + fork + ".3"
			put(t, root, name, string(page(3*relSeg, 1, 1))+string(page(3*relSeg+1, 1, 2))+string(page(2, 1, 3)))
			_, damaged := readFile(t, open(t, root, pgdata.Options{}), "data/"+name, check)
			if !slices.Equal(damaged, []int64{2}) {
				t.Errorf("%s: damaged %v, want the third", name, damaged)
			}
		}
	}
}

// The files of pg_xact have names that relations could have.
func TestOnlyRelationsHavePages(t *testing.T) {
	dir := forge(t)
	for _, name := range []string{"pg_xact/1000", "pg_multixact/members/1000", "base/5/pg_filenode.map", "base/5/PG_VERSION", "base/16384", "base/5/16384/1", "unknown/16384", "base/5/016384", "base/5/16384_x"} {
		put(t, dir, strings.ReplaceAll(name, "16384/", "dir/"), strings.Repeat("garbage!", 2048))
	}
	d := open(t, dir, pgdata.Options{})
	for f, err := range d.Files(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if !f.Dir {
			if _, damaged := readFile(t, d, f.Path, check); damaged != nil {
				t.Errorf("%s is read as pages: %v", f.Path, damaged)
			}
		}
	}
}

func TestReadsOfAnySizeJudgeWholePages(t *testing.T) {
	dir := forge(t)
	var content []byte
	for i := range uint32(20) {
		p := page(i, 1, byte(i))
		if i == 3 || i == 11 {
			p = broken(p)
		}
		content = append(content, p...)
	}
	content = append(content, "half a page"...) // while the file grows
	put(t, dir, "base/5/16384", string(content))
	d := open(t, dir, pgdata.Options{})
	for _, size := range []int{1, 700, 8191, 8192, 8193, 24 << 10, 100_000, 1 << 20} {
		s, err := d.OpenFile(t.Context(), pgdata.File{Path: "data/base/5/16384", Size: int64(len(content))}, check)
		if err != nil {
			t.Fatal(err)
		}
		if size == 1 || size == 700 { // slow, and one page is enough
			b := make([]byte, size)
			if n, err := s.ReadAt(b, 3*8192+5000); n != size || err != nil || !bytes.Equal(b, content[3*8192+5000:][:size]) {
				t.Errorf("%d bytes: %d, %v", size, n, err)
			}
			if got := s.Damaged(); !slices.Equal(got, []int64{3}) {
				t.Errorf("%d bytes: damaged %v", size, got)
			}
			s.Close()
			continue
		}
		var got []byte
		for off := int64(0); ; {
			b := make([]byte, size)
			n, err := s.ReadAt(b, off)
			got, off = append(got, b[:n]...), off+int64(n)
			if err == io.EOF {
				break
			}
			if err != nil || n < size {
				t.Fatalf("read %d at %d: %d, %v", size, off, n, err)
			}
		}
		if !bytes.Equal(got, content) {
			t.Errorf("reads of %d: other content", size)
		}
		if got := s.Damaged(); !slices.Equal(got, []int64{3, 11}) {
			t.Errorf("reads of %d: damaged %v, want 3 and 11", size, got)
		}
		s.Close()
	}
}

func TestReadingStopsAtTheSizeThatWasListed(t *testing.T) {
	dir := forge(t)
	whole := slices.Concat(page(0, 1, 1), page(1, 1, 2), page(2, 1, 3))
	put(t, dir, "base/5/16384", string(whole))
	d := open(t, dir, pgdata.Options{})
	for _, tt := range []struct{ listed, now, want int64 }{
		{8192, 3 * 8192, 8192},             // grown
		{8192 + 10, 3 * 8192, 8192 + 10},   // grown, when a page was half there
		{3 * 8192, 8192, 8192},             // shrunk
		{3 * 8192, 8192 + 100, 8192 + 100}, // shrunk, not by whole pages
		{3 * 8192, 0, 0},                   // emptied
	} {
		for _, check := range []pgdata.PageCheck{check, {}} {
			s, err := d.OpenFile(t.Context(), pgdata.File{Path: "data/base/5/16384", Size: tt.listed}, check)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(filepath.Join(dir, "base/5/16384"), tt.now); err != nil {
				t.Fatal(err)
			}
			b := make([]byte, 3*8192)
			n, err := s.ReadAt(b, 0)
			if int64(n) != tt.want || n < len(b) && err != io.EOF || !bytes.Equal(b[:n], whole[:n]) || s.Damaged() != nil {
				t.Errorf("listed %d, now %d: %d bytes, %v, damaged %v; want %d", tt.listed, tt.now, n, err, s.Damaged(), tt.want)
			}
			s.Close()
			put(t, dir, "base/5/16384", string(whole))
		}
	}
}

// Class C5: a page half old, half new is read while a server writes it. One
// writer rewrites one block all the time; whatever is read of it is not damaged,
// even as the page claims an age that the log would not heal.
func TestC5TornPagesAreNotDamaged(t *testing.T) {
	dir := forge(t)
	put(t, dir, "base/5/16384", string(page(0, 1, 0)))
	f, err := os.OpenFile(filepath.Join(dir, "base/5/16384"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	pages := make([][]byte, 256)
	for i := range pages {
		pages[i] = page(0, 1, byte(i))
	}
	var stop atomic.Bool
	done := make(chan error)
	go func() {
		var err error
		for i := 0; !stop.Load() && err == nil; i++ {
			// In two halves, so that there is something to see on file systems
			// that lock a file against reading while it is written.
			p := pages[i%len(pages)]
			_, err = f.WriteAt(p[:3000], 0)
			_, err2 := f.WriteAt(p[3000:], 3000)
			err = errors.Join(err, err2)
		}
		done <- err
	}()
	d := open(t, dir, pgdata.Options{})
	s, err := d.OpenFile(t.Context(), pgdata.File{Path: "data/base/5/16384", Size: 8192}, check)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	torn := 0
	b := make([]byte, 8192)
	for range 2000 {
		if raw, err := os.ReadFile(filepath.Join(dir, "base/5/16384")); err == nil && pg.StoredChecksum(raw) != pg.PageChecksum(raw, 0) {
			torn++
		}
		if _, err := s.ReadAt(b, 0); err != nil {
			t.Fatal(err)
		}
	}
	stop.Store(true)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if torn == 0 {
		t.Error("no torn page was met: the test shows nothing")
	}
	if d := s.Damaged(); d != nil {
		t.Errorf("a torn page is called damaged: %v", d)
	}
	t.Logf("%d of 2000 readings were torn", torn)
}

// Class C5: pg_control is written over in place, and torn at any offset.
func TestC5TornControlFileIsReadAgain(t *testing.T) {
	dir := forge(t)
	right := control(t)
	d := open(t, dir, pgdata.Options{})
	f, err := os.OpenFile(filepath.Join(dir, "global/pg_control"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	wrong := func(i int) error {
		b := bytes.Clone(right)
		binary.LittleEndian.PutUint64(b[32:], uint64(i))
		_, err := f.WriteAt(b, 0)
		return err
	}
	if err := wrong(1); err != nil {
		t.Fatal(err)
	}
	done := make(chan error)
	go func() {
		var err error
		for i := range 1000 {
			err = errors.Join(err, wrong(i))
		}
		_, last := f.WriteAt(right, 0)
		done <- errors.Join(err, last)
	}()
	if _, b, err := d.Control(t.Context()); err != nil || !bytes.Equal(b, right) {
		t.Errorf("torn: %v", err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := wrong(1); err != nil {
		t.Fatal(err)
	}
	if _, _, err := d.Control(t.Context()); !errors.Is(err, pg.ErrTorn) {
		t.Errorf("wrong, and standing still: %v, want %v", err, pg.ErrTorn)
	}
}

func TestSmallFilesAreReadWhole(t *testing.T) {
	dir := forge(t)
	put(t, dir, "postgresql.auto.conf", "a = 1\n")
	d := open(t, dir, pgdata.Options{})
	var stop atomic.Bool
	done := make(chan error)
	go func() { // as ALTER SYSTEM does, but also as an editor does, in place
		var err error
		for i := 0; !stop.Load() && err == nil; i++ {
			content := []byte(strings.Repeat("a = 1\n", 1+i%2*5000))
			temp := filepath.Join(dir, "postgresql.auto.conf.tmp")
			err = errors.Join(os.WriteFile(temp, content, 0o600), os.Rename(temp, filepath.Join(dir, "postgresql.auto.conf")))
		}
		done <- err
	}()
	for range 200 {
		s, err := d.OpenFile(t.Context(), pgdata.File{Path: "data/postgresql.auto.conf", Size: 6}, check)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, s.Size()+1)
		n, err := s.ReadAt(b, 0)
		if err != io.EOF || n != 6 && n != 6*5001 || strings.Trim(string(b[:n]), "a =1\n") != "" {
			t.Fatalf("%d bytes, %v", n, err)
		}
	}
	stop.Store(true)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// Class C5: what is still being written has the beginning of what it will be. The
// log does not heal the state of a prepared transaction, and a server does not
// start on half of one; an editor may write half of a configuration.
func TestC5HalfAFileIsReadAgain(t *testing.T) {
	state := make([]byte, 400)
	le := binary.LittleEndian
	le.PutUint32(state, 0x57F94534)
	le.PutUint32(state[4:], uint32(len(state)))
	le.PutUint32(state[396:], crc32.Checksum(state[:396], crc32.MakeTable(crc32.Castagnoli)))
	for name, whole := range map[string]string{"pg_twophase/000002F1": string(state), "extra.conf": "a = 1\nb = 2\nc = 3\n"} {
		dir := forge(t)
		var notes []string
		d := open(t, dir, pgdata.Options{Note: func(path, why string) { notes = append(notes, path+": "+why) }})
		half := whole[:len(whole)-4]
		put(t, dir, name, half)
		ctx := pausing{t.Context(), sync.OnceFunc(func() { put(t, dir, name, whole) })}
		src, err := d.OpenFile(ctx, pgdata.File{Path: "data/" + name, Size: 1}, pgdata.PageCheck{})
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(whole)+1)
		n, err := src.ReadAt(got, 0)
		if err != io.EOF || string(got[:n]) != whole || len(notes) > 0 {
			t.Errorf("%s: read %d bytes of %d, %v; %q", name, n, len(whole), err, notes)
		}
		put(t, dir, name, half)
		notes = nil
		if got := read(t, d, "data/"+name); got != half || (len(notes) == 1) != strings.HasPrefix(name, "pg_twophase/") {
			t.Errorf("%s, for ever half: %d bytes, %q", name, len(got), notes)
		}
	}
}

// A pausing context does something when somebody is about to wait for its end.
type pausing struct {
	context.Context
	do func()
}

func (p pausing) Done() <-chan struct{} {
	p.do()
	return p.Context.Done()
}

// Class C10: the source of a backup is only read.
func TestC10TheSourceStaysAsItWas(t *testing.T) {
	dir := forge(t)
	put(t, dir, "base/5/16384", string(broken(page(0, 1, 1))))
	put(t, dir, "pg_wal/000000010000000000000001", "x")
	put(t, dir, "postgresql.conf", "")
	snapshot := func() map[string]string {
		all := make(map[string]string)
		err := filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
			if err == nil {
				all[path] = info.Mode().String() + info.ModTime().String()
				if info.Mode().IsRegular() {
					b, rerr := os.ReadFile(path)
					all[path] += string(b)
					err = rerr
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		return all
	}
	before := snapshot()
	d := open(t, dir, pgdata.Options{})
	for f, err := range d.Files(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if !f.Dir {
			readFile(t, d, f.Path, check)
		}
	}
	for path, was := range snapshot() {
		if was != before[path] {
			t.Errorf("%s has changed", path)
		}
		delete(before, path)
	}
	if len(before) > 0 {
		t.Errorf("gone: %v", before)
	}
}

func BenchmarkReadPages(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "pgdata")
	t := new(testing.T)
	put(t, dir, "PG_VERSION", "15\n")
	put(t, dir, "global/pg_control", string(control(t)))
	var content []byte
	for i := range uint32(8192) {
		content = append(content, page(i, 1, byte(i))...)
	}
	put(t, dir, "base/5/16384", string(content))
	d, err := pgdata.Open(dir, pgdata.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer d.Close()
	buf := make([]byte, 1<<20)
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		s, err := d.OpenFile(b.Context(), pgdata.File{Path: "data/base/5/16384", Size: int64(len(content))}, check)
		if err != nil {
			b.Fatal(err)
		}
		for off := int64(0); off < int64(len(content)); off += int64(len(buf)) {
			if _, err := s.ReadAt(buf, off); err != nil {
				b.Fatal(err)
			}
		}
		s.Close()
	}
}

// What PostgreSQL works with stays in memory, and what nobody had there is not
// put there by a backup.
func TestReadingLeavesThePageCacheAsItWas(t *testing.T) {
	dir := forge(t)
	var content []byte
	for i := range uint32(160) { // ten times 128 KiB
		content = append(content, page(i, 1, byte(i))...)
	}
	put(t, dir, "base/5/16384", string(content))
	f, err := os.OpenFile(filepath.Join(dir, "base/5/16384"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(f.Sync(), unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)); err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(pgdata.Cold(f, int64(len(content))), true) {
		t.Log("files of this file system are always in memory")
		return
	}
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_RANDOM); err != nil { // no reading ahead
		t.Fatal(err)
	}
	if _, err := f.ReadAt(make([]byte, 8192), 4*128<<10); err != nil {
		t.Fatal(err)
	}
	before := pgdata.Cold(f, int64(len(content)))
	if _, damaged := readFile(t, open(t, dir, pgdata.Options{}), "data/base/5/16384", check); damaged != nil {
		t.Errorf("damaged: %v", damaged)
	}
	after := pgdata.Cold(f, int64(len(content)))
	if !slices.Equal(before, after) || before[4] || !before[5] {
		t.Errorf("not in memory before: %v\nafter: %v", before, after)
	}
}
