package pgdata_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/pgdata"
)

func TestManifestIsWrittenAsPostgreSQLDoes(t *testing.T) {
	modified := time.Date(2026, 3, 4, 5, 6, 7, 8, time.FixedZone("", 3600))
	for _, tt := range []struct {
		major int
		head  string
	}{
		{16, "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n"},
		{17, "{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 7300000000000000001,\n"},
	} {
		var b strings.Builder
		m := pgdata.NewManifest(&b, tt.major, 7_300_000_000_000_000_001)
		for _, path := range []string{"config/000/pg_hba.conf", "data/PG_VERSION", "data/pg_wal/000000010000000000000001",
			"data/<\"\\\n\u00e9>", "tablespaces/16399/PG_15_202209061/5/16400"} {
			if err := m.Add(path, 3, modified, 0x01020304); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.Finish(pgdata.WALRange{Timeline: 2, Start: 0x1_00000028, End: 0x1_00000100}, pgdata.WALRange{Timeline: 1, Start: 0x28, End: 0x1_00000028}); err != nil {
			t.Fatal(err)
		}
		rest := `", "Size": 3, "Last-Modified": "2026-03-04 04:06:07 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "04030201" }`
		want := tt.head + `"Files": [
{ "Path": "PG_VERSION` + rest + `,
{ "Path": "<\"\\\n` + "\u00e9" + `>` + rest + `,
{ "Path": "pg_tblspc/16399/PG_15_202209061/5/16400` + rest + `
],
"WAL-Ranges": [
{ "Timeline": 2, "Start-LSN": "1/28", "End-LSN": "1/100" },
{ "Timeline": 1, "Start-LSN": "0/28", "End-LSN": "1/28" }
],
"Manifest-Checksum": "`
		got, sum, _ := strings.Cut(b.String(), `"Manifest-Checksum": "`)
		if diff := cmp.Diff(want, got+`"Manifest-Checksum": "`); diff != "" {
			t.Errorf("version %d: %s", tt.major, diff)
		}
		if len(sum) != 64+3 || !strings.HasSuffix(sum, "\"}\n") {
			t.Errorf("version %d ends in %q", tt.major, sum)
		}
	}
}

// No file is lost to a manifest unnoticed.
func TestManifestTellsOfEveryError(t *testing.T) {
	var b strings.Builder
	m := pgdata.NewManifest(&b, 15, 1)
	for _, path := range []string{"", "data", "data/", "data/../x", "/data/x", "other/x", "tablespaces/x/y", "tablespaces/1", "config/x/y"} {
		if err := m.Add(path, 0, time.Time{}, 0); err == nil {
			t.Errorf("%q is taken", path)
		}
	}
	full := errors.New("disk full")
	m = pgdata.NewManifest(failing{full}, 15, 1)
	if err := m.Add("data/x", 0, time.Time{}, 0); !errors.Is(err, full) {
		t.Errorf("Add: %v", err)
	}
	if err := m.Finish(); !errors.Is(err, full) {
		t.Errorf("Finish: %v", err)
	}
}

type failing struct{ err error }

func (f failing) Write([]byte) (int, error) { return 0, f.err }
