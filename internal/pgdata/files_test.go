package pgdata_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/pgdata"
)

// version is the directory of a forged cluster in its tablespaces.
const version = "PG_15_202209061"

// relSeg is how many pages one file of a relation has in a forged cluster.
const relSeg = 16

// forge makes a data directory that no server has seen.
func forge(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "pgdata")
	put(t, dir, "PG_VERSION", "15\n")
	put(t, dir, "global/pg_control", string(control(t)))
	if err := os.Mkdir(filepath.Join(dir, "pg_tblspc"), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func control(t *testing.T) []byte {
	t.Helper()
	b := make([]byte, pg.ControlSize)
	le := binary.LittleEndian
	le.PutUint64(b, 7_300_000_000_000_000_001)
	le.PutUint32(b[8:], 1300)
	le.PutUint32(b[12:], 202209061)
	le.PutUint32(b[48:], 1)
	le.PutUint64(b[208:], math.Float64bits(1234567))
	le.PutUint32(b[216:], 8192)
	le.PutUint32(b[220:], relSeg)
	le.PutUint32(b[228:], 16<<20)
	le.PutUint32(b[252:], 1)
	le.PutUint32(b[288:], crc32.Checksum(b[:288], crc32.MakeTable(crc32.Castagnoli)))
	if _, err := pg.ParseControl(b); err != nil {
		t.Fatal(err)
	}
	return b
}

// put makes a file, and the directories it is in; with a slash at the end, a
// directory.
func put(t *testing.T, dir, name, content string) {
	t.Helper()
	to := filepath.Join(dir, name)
	if strings.HasSuffix(name, "/") {
		if err := os.MkdirAll(to, 0o700); err != nil {
			t.Fatal(err)
		}
		return
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o700), os.WriteFile(to, []byte(content), 0o600)); err != nil {
		t.Fatal(err)
	}
}

func link(t *testing.T, target, name string) {
	t.Helper()
	if err := os.Symlink(target, name); err != nil {
		t.Fatal(err)
	}
}

func open(t *testing.T, dir string, opt pgdata.Options) *pgdata.Dir {
	t.Helper()
	d, err := pgdata.Open(dir, opt)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

// list returns what is listed: directories with a slash, links with an arrow.
func list(t *testing.T, d *pgdata.Dir) ([]string, error) {
	t.Helper()
	var paths, all []string
	for f, err := range d.Files(t.Context()) {
		if err != nil {
			return all, err
		}
		paths = append(paths, f.Path)
		switch {
		case f.Dir:
			f.Path += "/"
		case f.Link != "":
			f.Path += " -> " + f.Link
		}
		all = append(all, f.Path)
	}
	if !slices.IsSorted(paths) || len(slices.Compact(paths)) < len(all) {
		t.Errorf("not in strict order: %q", paths)
	}
	return all, nil
}

// Class C7 of what went wrong elsewhere begins here: a stale backup_label, or a
// signal file, that comes along with the data.
func TestListingTakesWhatABackupNeeds(t *testing.T) {
	for _, tt := range []struct {
		name string // below PGDATA
		kept bool
	}{
		{"base/1/16384", true},
		{"base/1/16384_vm", true},
		{"base/1/16384.1", true},
		{"base/1/pg_filenode.map", true},
		{"base/1/PG_VERSION", true},
		{"global/1260", true},
		{"pg_xact/0000", true},
		{"pg_multixact/offsets/0000", true},
		{"pg_commit_ts/", true},
		{"pg_twophase/00000000000002F1", true},
		{"pg_logical/replorigin_checkpoint", true},
		{"pg_logical/mappings/", true},
		{"pg_stat/pgstat.stat", true},
		{"postgresql.auto.conf", true},
		{"current_logfiles", true},
		{"unknown/dir/file", true},
		{"-odd \\ name", true},
		{"caf\u00e9", true},

		{"global/pg_control", false},
		{"postmaster.pid", false},
		{"postmaster.opts", false},
		{"backup_label", false},
		{"backup_label.old", false},
		{"tablespace_map", false},
		{"tablespace_map.old", false},
		{"backup_manifest", false},
		{"backup_manifest.tmp", false},
		{"recovery.signal", false},
		{"standby.signal", false},
		{"postgresql.auto.conf.tmp", false},
		{"current_logfiles.tmp", false},
		{"base/pgsql_tmp/pgsql_tmp17.0", false},
		{"base/1/pg_internal.init", false},
		{"global/pg_internal.init.4711", false},
		{"base/1/.DS_Store", false},
		{"base/1/t3_16385", false},
		{"base/1/t3_16385_fsm.1", false},
		{"base/1/t12_16385_init", false},

		{"pg_wal/000000010000000000000001", false},
		{"pg_wal/archive_status/000000010000000000000001.ready", false},
		{"pg_replslot/slot/state", false},
		{"pg_dynshmem/mmap.1", false},
		{"pg_notify/0000", false},
		{"pg_serial/0000", false},
		{"pg_snapshots/1", false},
		{"pg_subtrans/0000", false},
		{"pg_stat_tmp/db_0.stat", false},
		{"log/postgresql-Mon.log", false},

		// The same names where they mean nothing.
		{"unknown/log/file", true},
		{"unknown/pg_wal/file", true},
		{"unknown/pg_notify/file", true},
		{"unknown/backup_label", true},
		{"unknown/t3_16385", true},
		{"base/t3_16385", true},
		{"base/1/t3_16385x", true},
		{"base/1/t3_", true},
		{"base/1/3_16385", true},
		{"logs/file", true},
	} {
		dir := forge(t)
		if tt.name != "global/pg_control" { // it is there
			put(t, dir, tt.name, "x")
		}
		got, err := list(t, open(t, dir, pgdata.Options{LogDirectory: "log"}))
		if err != nil {
			t.Fatal(err)
		}
		if kept := slices.Contains(got, "data/"+tt.name); kept != tt.kept {
			t.Errorf("%q: kept %v, want %v", tt.name, kept, tt.kept)
		}
		top, _, nested := strings.Cut(tt.name, "/")
		if nested && !slices.Contains(got, "data/"+top+"/") {
			t.Errorf("%q: its directory is not kept", tt.name)
		}
	}
}

func TestListingIsInTheOrderOfPaths(t *testing.T) {
	dir := forge(t)
	for _, name := range []string{"a/x", "a-b/y", "a.b", "a/-/z", "a0", "a-b.c/", "a/", "b"} {
		put(t, dir, name, "")
	}
	got, err := list(t, open(t, dir, pgdata.Options{}))
	want := []string{"data/", "data/PG_VERSION", "data/a/", "data/a-b/", "data/a-b.c/", "data/a-b/y", "data/a.b",
		"data/a/-/", "data/a/-/z", "data/a/x", "data/a0", "data/b", "data/global/", "data/pg_tblspc/"}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
}

func TestListingLeavesUnloggedRelationsToTheirInitFork(t *testing.T) {
	dir := forge(t)
	for _, name := range []string{"16384", "16384_fsm", "16384.1", "16384_init", "16385", "163840"} {
		put(t, dir, "base/1/"+name, "x")
	}
	put(t, dir, "pg_xact/0000", "x")
	d := open(t, dir, pgdata.Options{})
	got, err := list(t, d)
	if err != nil {
		t.Fatal(err)
	}
	got = slices.DeleteFunc(got, func(s string) bool { return !strings.HasPrefix(s, "data/base/1/") || strings.HasSuffix(s, "/") })
	want := []string{"data/base/1/163840", "data/base/1/16384_init", "data/base/1/16385"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	// One that became unlogged after the listing.
	put(t, dir, "base/1/16385_init", "x")
	if _, err := d.OpenFile(t.Context(), pgdata.File{Path: "data/base/1/16385", Size: 1}, pgdata.PageCheck{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("an unlogged relation is opened: %v", err)
	}
}

func TestListingFollowsTablespaces(t *testing.T) {
	dir := forge(t)
	away := t.TempDir()
	put(t, away, version+"/5/16400", "x")
	put(t, away, version+"/5/t1_16400", "x")
	put(t, away, version+"/pgsql_tmp/pgsql_tmp1.0", "x")
	put(t, away, "PG_14_202107181/5/16400", "of another cluster")
	put(t, away, "stranger", "x")
	link(t, away, filepath.Join(dir, "pg_tblspc/4294967295"))
	put(t, dir, "pg_tblspc/17/"+version+"/5/16401", "in place")
	put(t, dir, "pg_tblspc/stranger", "x")
	put(t, dir, "mine/"+version+"/5/16402", "inside of the data directory")
	link(t, filepath.Join(dir, "mine"), filepath.Join(dir, "pg_tblspc/100"))
	d := open(t, dir, pgdata.Options{})
	got, err := list(t, d)
	want := []string{"data/", "data/PG_VERSION", "data/global/", "data/mine/", "data/pg_tblspc/",
		"data/pg_tblspc/100 -> " + filepath.Join(dir, "mine"),
		"data/pg_tblspc/17/", "data/pg_tblspc/17/" + version + "/", "data/pg_tblspc/17/" + version + "/5/", "data/pg_tblspc/17/" + version + "/5/16401",
		"data/pg_tblspc/4294967295 -> " + away,
		"tablespaces/100/", "tablespaces/100/" + version + "/", "tablespaces/100/" + version + "/5/", "tablespaces/100/" + version + "/5/16402",
		"tablespaces/4294967295/", "tablespaces/4294967295/" + version + "/", "tablespaces/4294967295/" + version + "/5/",
		"tablespaces/4294967295/" + version + "/5/16400"}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	spaces, err := d.Tablespaces()
	wantSpaces := []pgdata.Tablespace{{OID: 17}, {OID: 100, Path: filepath.Join(dir, "mine")}, {OID: 4294967295, Path: away}}
	if diff := cmp.Diff(wantSpaces, spaces); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
}

func TestListingFollowsTheServersOwnLinksAndNoOthers(t *testing.T) {
	dir := forge(t)
	away := t.TempDir()
	put(t, away, "wal/000000010000000000000001", "x")
	put(t, away, "xact/0000", "x")
	put(t, away, "secret/key", "x")
	put(t, away, "postgresql.conf", "port = 1")
	link(t, filepath.Join(away, "wal"), filepath.Join(dir, "pg_wal"))
	link(t, filepath.Join(away, "xact"), filepath.Join(dir, "pg_xact"))
	link(t, filepath.Join(away, "secret"), filepath.Join(dir, "theirs"))
	link(t, filepath.Join(away, "secret/key"), filepath.Join(dir, "server.key"))
	link(t, filepath.Join(away, "postgresql.conf"), filepath.Join(dir, "postgresql.conf"))
	var notes []string
	outer := filepath.Join(filepath.Dir(dir), "link to pgdata")
	link(t, dir, outer)
	d := open(t, outer, pgdata.Options{Note: func(path, why string) { notes = append(notes, path) }})
	got, err := list(t, d)
	want := []string{"data/", "data/PG_VERSION", "data/global/", "data/pg_tblspc/", "data/pg_wal/", "data/pg_xact/", "data/pg_xact/0000",
		"data/postgresql.conf", "data/server.key -> " + filepath.Join(away, "secret/key"), "data/theirs -> " + filepath.Join(away, "secret")}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v\n%s", err, diff)
	}
	if diff := cmp.Diff([]string{"server.key", "theirs"}, notes); diff != "" {
		t.Errorf("notes: %s", diff)
	}
	for path, want := range map[string]string{"data/postgresql.conf": "port = 1", "data/pg_xact/0000": "x"} {
		if got := read(t, d, path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	for _, path := range []string{"data/server.key", "data/theirs/key", "data/../secret/key", "data/pg_xact/../../secret/key"} {
		if s, err := d.OpenFile(t.Context(), pgdata.File{Path: path, Size: 1}, pgdata.PageCheck{}); err == nil {
			s.Close()
			t.Errorf("%s can be read", path)
		}
	}
}

func TestListingRefusesLinksThatLoseData(t *testing.T) {
	away := t.TempDir()
	put(t, away, "dir/16384", "x")
	link(t, filepath.Join(away, "dir"), filepath.Join(away, "second"))
	for name, make := range map[string]func(dir string){
		"a database": func(dir string) {
			put(t, dir, "base/1/", "")
			link(t, filepath.Join(away, "dir"), filepath.Join(dir, "base/2"))
		},
		"a link to a link":      func(dir string) { link(t, filepath.Join(away, "second"), filepath.Join(dir, "pg_xact")) },
		"into the data":         func(dir string) { put(t, dir, "old/0000", "x"); link(t, "old", filepath.Join(dir, "pg_xact")) },
		"all tablespaces":       func(dir string) { replace(t, filepath.Join(dir, "pg_tblspc"), filepath.Join(away, "dir")) },
		"a tablespace, nowhere": func(dir string) { link(t, filepath.Join(away, "nowhere"), filepath.Join(dir, "pg_tblspc/16400")) },
		"a tablespace, empty":   func(dir string) { link(t, filepath.Join(away, "dir"), filepath.Join(dir, "pg_tblspc/16400")) },
	} {
		dir := forge(t)
		make(dir)
		got, err := list(t, open(t, dir, pgdata.Options{}))
		if kind := fail.KindOf(err); kind != fail.BadConfig && kind != fail.FilesLost || fail.HintOf(err) == "" {
			t.Errorf("%s: got %v, %q", name, err, got)
		}
	}
}

func replace(t *testing.T, name, target string) {
	t.Helper()
	if err := os.Remove(name); err != nil {
		t.Fatal(err)
	}
	link(t, target, name)
}

func TestListingSkipsSpecialFilesAndTellsOfThem(t *testing.T) {
	dir := forge(t)
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	var notes []string
	d := open(t, dir, pgdata.Options{Note: func(path, why string) { notes = append(notes, path+": "+why) }})
	got, err := list(t, d)
	if err != nil || slices.Contains(got, "data/fifo") || len(notes) != 1 || !strings.HasPrefix(notes[0], "data/fifo: ") {
		t.Errorf("%q, notes %q, %v", got, notes, err)
	}
	// One that comes in place of a file that was listed does not block its reader.
	if _, err := d.OpenFile(t.Context(), pgdata.File{Path: "data/fifo", Size: 5}, pgdata.PageCheck{}); err == nil {
		t.Error("a fifo is read")
	}
}

// A backup writes names as text. It ended at such a file, each time, with an error
// that said so to nobody.
func TestNamesThatAreNoTextAreRefused(t *testing.T) {
	for what, make := range map[string]func(dir string){
		"a file": func(dir string) { put(t, dir, "b\xe4ckup.conf", "x") },
		"a link": func(dir string) { link(t, "/b\xe4ckup", filepath.Join(dir, "far")) },
	} {
		dir := forge(t)
		make(dir)
		_, err := list(t, open(t, dir, pgdata.Options{}))
		if !errors.Is(err, fail.BadConfig) || !strings.Contains(fail.HintOf(err), "move it out") {
			t.Errorf("%s: %v; hint: %s", what, err, fail.HintOf(err))
		}
	}
}

// A database that was there when the backup began keeps its place.
func TestDatabasesThatWereKeptAreListedWithoutContent(t *testing.T) {
	dir, away := forge(t), t.TempDir()
	for _, name := range []string{"base/1/112", "base/5/112", "base/16400/112", "base/pgsql_tmp/x"} {
		put(t, dir, name, "x")
	}
	put(t, away, version+"/16401/112", "x")
	put(t, away, version+"/16402/112", "x")
	link(t, away, filepath.Join(dir, "pg_tblspc/16399"))
	d, err := pgdata.Open(dir, pgdata.Options{})
	if err == nil {
		err = d.KeepDatabases()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	err = errors.Join(os.RemoveAll(filepath.Join(dir, "base/16400")), os.RemoveAll(filepath.Join(dir, "base/5")), os.RemoveAll(filepath.Join(away, version, "16401")))
	if err != nil {
		t.Fatal(err)
	}
	put(t, dir, "base/16403/112", "x") // came later
	var got []string
	for f, err := range d.Files(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(f.Path, "/base/") || strings.Contains(f.Path, version+"/") {
			got = append(got, f.Path)
			if f.Dir && f.Mode != 0o700 {
				t.Errorf("%s: mode %v", f.Path, f.Mode)
			}
		}
	}
	space := "tablespaces/16399/" + version
	want := []string{"data/base/1", "data/base/1/112", "data/base/16400", "data/base/16403", "data/base/16403/112", "data/base/5", space + "/16401", space + "/16402", space + "/16402/112"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestConfigurationElsewhereIsListedFirst(t *testing.T) {
	dir := forge(t)
	etc := t.TempDir()
	put(t, dir, "postgresql.conf", "")
	put(t, etc, "pg_hba.conf", "local all all trust")
	put(t, etc, "conf.d/more.conf", "port = 1")
	put(t, etc, "tuned.conf", "work_mem = 1")
	put(t, dir, "own/real.conf", "")
	link(t, filepath.Join(etc, "tuned.conf"), filepath.Join(dir, "included.conf"))
	link(t, filepath.Join(etc, "conf.d"), filepath.Join(dir, "conf.d"))
	link(t, filepath.Join(etc, "pg_hba.conf"), filepath.Join(dir, "pg_hba.conf"))
	link(t, "own/real.conf", filepath.Join(dir, "here.conf"))
	var notes []string
	d := open(t, dir, pgdata.Options{
		Config: []string{filepath.Join(dir, "postgresql.conf"), filepath.Join(etc, "pg_hba.conf"), filepath.Join(etc, "gone.conf"), filepath.Join(etc, "conf.d/more.conf"),
			filepath.Join(dir, "included.conf"), filepath.Join(dir, "conf.d/more.conf"), filepath.Join(dir, "pg_hba.conf"), filepath.Join(dir, "here.conf")},
		Note: func(path, why string) { notes = append(notes, path) },
	})
	got, err := list(t, d)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"config/000/pg_hba.conf", "config/002/more.conf", "config/003/included.conf", "config/004/more.conf", "data/"}, got[:5]); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{filepath.Join(etc, "gone.conf"), "conf.d", "here.conf", "included.conf"}, notes); diff != "" {
		t.Error(diff)
	}
	if got := read(t, d, "config/003/included.conf"); got != "work_mem = 1" {
		t.Errorf("%q", got)
	}
	if got := read(t, d, "config/002/more.conf"); got != "port = 1" {
		t.Errorf("%q", got)
	}
}

func TestModesAndTimesAreListed(t *testing.T) {
	dir := forge(t)
	put(t, dir, "base/1/16384", "12345")
	if err := errors.Join(os.Chmod(filepath.Join(dir, "base/1"), 0o750), os.Chmod(filepath.Join(dir, "base/1/16384"), 0o640), os.Chmod(dir, 0o750)); err != nil {
		t.Fatal(err)
	}
	want := map[string]pgdata.File{
		"data":              {Dir: true, Mode: 0o750},
		"data/base/1":       {Dir: true, Mode: 0o750},
		"data/base/1/16384": {Mode: 0o640, Size: 5},
	}
	for f, err := range open(t, dir, pgdata.Options{}).Files(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if w, ok := want[f.Path]; ok {
			if f.Dir != w.Dir || f.Mode != w.Mode || !f.Dir && f.Size != w.Size || f.Modified.IsZero() {
				t.Errorf("%+v", f)
			}
			delete(want, f.Path)
		}
	}
	if len(want) > 0 {
		t.Errorf("not listed: %v", want)
	}
}

// What goes while it is listed was dropped, unless all that is around it has
// gone too.
func TestVanishedFilesAreLeftOut(t *testing.T) {
	dir := forge(t)
	for i := range 10 {
		put(t, dir, fmt.Sprintf("base/%d/16384", i+1), "x")
	}
	d := open(t, dir, pgdata.Options{})
	var got []string
	for f, err := range d.Files(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if f.Path == "data/base" {
			if err := os.RemoveAll(filepath.Join(dir, "base/5")); err != nil {
				t.Fatal(err)
			}
		}
		if strings.HasSuffix(f.Path, "16384") {
			got = append(got, f.Path)
		}
	}
	if len(got) != 9 || slices.Contains(got, "data/base/5/16384") {
		t.Errorf("%q", got)
	}
	if err := os.Remove(filepath.Join(dir, "base/6/16384")); err != nil {
		t.Fatal(err)
	}
	if _, err := d.OpenFile(t.Context(), pgdata.File{Path: "data/base/6/16384", Size: 1}, pgdata.PageCheck{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a dropped file: %v", err)
	}
	if got := read(t, d, "data/base/7/16384"); got != "x" {
		t.Errorf("the file after it is %q", got)
	}
}

func TestAFileSystemThatIsGoneIsNoDroppedTable(t *testing.T) {
	setup := func(t *testing.T) (dir, away string, d *pgdata.Dir) {
		dir, away = forge(t), filepath.Join(t.TempDir(), "away")
		put(t, dir, "base/1/16384", "x")
		put(t, away, version+"/5/16400", "x")
		link(t, away, filepath.Join(dir, "pg_tblspc/16399"))
		d = open(t, dir, pgdata.Options{})
		if _, err := list(t, d); err != nil {
			t.Fatal(err)
		}
		return dir, away, d
	}
	// unmount leaves the directory that the file system was mounted on.
	unmount := func(t *testing.T, dir string) {
		if err := errors.Join(os.Rename(dir, dir+".unmounted"), os.Mkdir(dir, 0o700)); err != nil {
			t.Fatal(err)
		}
	}
	for _, path := range []string{"data/base/1/16384", "tablespaces/16399/" + version + "/5/16400"} {
		t.Run(path, func(t *testing.T) {
			dir, away, d := setup(t)
			if strings.HasPrefix(path, "data") {
				unmount(t, dir)
			} else {
				unmount(t, away)
			}
			if err := d.Present(); !errors.Is(err, fail.FilesLost) || errors.Is(err, fs.ErrNotExist) {
				t.Errorf("Present: %v", err)
			}
			// The open directory still leads to the old files, or to none; never is
			// one of them taken for dropped.
			if _, err := d.OpenFile(t.Context(), pgdata.File{Path: path + "0", Size: 1}, pgdata.PageCheck{}); !errors.Is(err, fail.FilesLost) {
				t.Errorf("OpenFile: %v", err)
			}
			if dir, err := pgdata.Open(dir, pgdata.Options{}); err == nil {
				defer dir.Close()
				if _, err := list(t, dir); !errors.Is(err, fail.FilesLost) {
					t.Errorf("a new listing: %v", err)
				}
			}
		})
	}
	t.Run("another cluster in its place", func(t *testing.T) {
		dir, _, d := setup(t)
		unmount(t, dir)
		put(t, dir, "PG_VERSION", "15\n")
		put(t, dir, "global/pg_control", string(control(t)))
		if err := d.Present(); !errors.Is(err, fail.FilesLost) {
			t.Errorf("Present: %v", err)
		}
	})
	t.Run("emptied tablespace", func(t *testing.T) {
		_, away, d := setup(t)
		if err := os.RemoveAll(filepath.Join(away, version)); err != nil {
			t.Fatal(err)
		}
		_, err := d.OpenFile(t.Context(), pgdata.File{Path: "tablespaces/16399/" + version + "/5/16400", Size: 1}, pgdata.PageCheck{})
		if !errors.Is(err, fail.FilesLost) {
			t.Errorf("OpenFile: %v", err)
		}
	})
	t.Run("emptied while it is listed", func(t *testing.T) {
		dir, _, d := setup(t)
		put(t, dir, "base/1/16385", "x")
		var err error
		for f, ferr := range d.Files(t.Context()) {
			err = ferr
			if f.Path == "data/base/1/16384" {
				if err := errors.Join(os.RemoveAll(filepath.Join(dir, "base")), os.Remove(filepath.Join(dir, "PG_VERSION"))); err != nil {
					t.Fatal(err)
				}
			}
		}
		if !errors.Is(err, fail.FilesLost) {
			t.Errorf("Files: %v", err)
		}
	})
	t.Run("dropped tablespace", func(t *testing.T) {
		dir, away, d := setup(t)
		if err := errors.Join(os.RemoveAll(filepath.Join(away, version)), os.Remove(filepath.Join(dir, "pg_tblspc/16399"))); err != nil {
			t.Fatal(err)
		}
		if err := d.Present(); err != nil {
			t.Error(err)
		}
		_, err := d.OpenFile(t.Context(), pgdata.File{Path: "tablespaces/16399/" + version + "/5/16400", Size: 1}, pgdata.PageCheck{})
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("OpenFile: %v", err)
		}
	})
}

func TestOpenRefusesWhatIsNoDataDirectory(t *testing.T) {
	empty := t.TempDir()
	if _, err := pgdata.Open(empty, pgdata.Options{}); err == nil {
		t.Error("an empty directory opens")
	}
	dir := forge(t)
	put(t, dir, "global/pg_control", string(make([]byte, pg.ControlSize)))
	if _, err := pgdata.Open(dir, pgdata.Options{}); err == nil {
		t.Error("a pg_control of zeros opens")
	}
}

// A database directory with very many relations is listed in little memory, for
// only the names of one directory are held.
func TestListingHoldsOnlyNames(t *testing.T) {
	dir := forge(t)
	const dirs, files = 10, 400
	for i := range dirs {
		base := filepath.Join(dir, "base", fmt.Sprint(i+1))
		if err := os.MkdirAll(base, 0o700); err != nil {
			t.Fatal(err)
		}
		for j := range files {
			f, err := os.Create(filepath.Join(base, fmt.Sprint(16384+j)))
			if err != nil {
				t.Fatal(err)
			}
			f.Close()
		}
	}
	d := open(t, dir, pgdata.Options{})
	var before, now runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	n, most := 0, uint64(0)
	for _, err := range d.Files(t.Context()) {
		if err != nil {
			t.Fatal(err)
		}
		if n++; n%1000 == 0 {
			runtime.GC()
			runtime.ReadMemStats(&now)
			most = max(most, now.HeapAlloc-min(before.HeapAlloc, now.HeapAlloc))
		}
	}
	if n < dirs*files || most > 1<<20 {
		t.Errorf("%d files listed with %d bytes", n, most)
	}
}
