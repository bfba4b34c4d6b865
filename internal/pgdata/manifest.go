package pgdata

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// A Manifest writes a backup_manifest, as PostgreSQL's own base backups come
// with, so that pg_verifybackup can judge a restored directory and pg_basebackup
// --incremental can build on it (documentation, "Backup Manifest Format"). It is
// of version 1, or of version 2 from PostgreSQL 17 on.
type Manifest struct {
	w     io.Writer
	sum   hash.Hash
	files int
	err   error
}

// A WALRange is a part of one timeline that a backup needs.
type WALRange struct {
	Timeline   pg.Timeline
	Start, End pg.LSN
}

// NewManifest begins the manifest of a cluster of a major version.
func NewManifest(w io.Writer, major int, system pg.SystemID) *Manifest {
	sum := sha256.New()
	m := &Manifest{w: io.MultiWriter(w, sum), sum: sum}
	if major < 17 {
		m.printf("{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n")
	} else {
		m.printf("{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": %v,\n", system)
	}
	m.printf("\"Files\": [")
	return m
}

// printf remembers the first error; Add and Finish return it.
func (m *Manifest) printf(format string, args ...any) {
	if m.err == nil {
		_, m.err = fmt.Fprintf(m.w, format, args...)
	}
}

// Add adds a file of the tree with the CRC-32C of its content. What PostgreSQL
// lists in no manifest is ignored: the log, and the configuration that stands
// outside of the data directory. Of directories and links nothing is said.
func (m *Manifest) Add(path string, size int64, modified time.Time, crc uint32) error {
	p, ok := parsePath(path)
	if !ok || p.rest == "." {
		return errors.Join(m.err, fmt.Errorf("manifest: %q is not the path of a file in a backup", path))
	}
	below := p.below()
	if p.rest == "" || strings.HasPrefix(below, "pg_wal/") || below == "backup_manifest" {
		return m.err
	}
	separator := ","
	if m.files == 0 {
		separator = ""
	}
	m.files++
	// The four bytes of the sum stand in the order they have in memory.
	m.printf("%s\n{ \"Path\": %s, \"Size\": %d, \"Last-Modified\": \"%s GMT\", \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"%x\" }",
		separator, quote(below), size, modified.UTC().Format(time.DateTime), binary.LittleEndian.AppendUint32(nil, crc))
	return m.err
}

// Finish ends the manifest. The ranges are the log from the start of the backup
// to its stop: one for each timeline, the newest first.
func (m *Manifest) Finish(ranges ...WALRange) error {
	m.printf("\n],\n\"WAL-Ranges\": [")
	for i, r := range ranges {
		separator := ","
		if i == 0 {
			separator = ""
		}
		m.printf("%s\n{ \"Timeline\": %d, \"Start-LSN\": \"%v\", \"End-LSN\": \"%v\" }", separator, uint32(r.Timeline), r.Start, r.End)
	}
	m.printf("\n],\n")
	m.printf("\"Manifest-Checksum\": \"%x\"}\n", m.sum.Sum(nil))
	return m.err
}

// quote writes valid UTF-8 as JSON does.
func quote(s string) string {
	var b strings.Builder
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.Encode(s) // of a string into memory: it cannot fail
	return strings.TrimSuffix(b.String(), "\n")
}
