package wal

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/pg"
)

const (
	pushedDir     = "pushed"   // local records, in an instance's directory
	sendingSuffix = ".sending" // of the mark of a file that is on its way
	maxRecord     = 16 << 10
	believed      = 10 * time.Second // that the repository is still the one it was
	settled       = 4 * time.Second  // more than any file system takes for the same moment: FAT's two seconds
)

// A record says that a file of the data directory is durable in the repository.
// It counts only while everything in it is still so.
type record struct {
	Place      string      `json:"place"`
	Repository string      `json:"repository"` // its id
	Cluster    string      `json:"cluster"`
	System     pg.SystemID `json:"system_id"`
	Instance   string      `json:"instance"`
	Name       string      `json:"name"`
	Size       int64       `json:"size"` // bytes
	Modified   int64       `json:"modified_ns"`
	Changed    int64       `json:"changed_ns"` // its status (ctime, inode(7)), which nobody can set
	Inode      uint64      `json:"inode"`
	Sum        string      `json:"sha256"`      // hexadecimal, as the repository has it
	Begun      int64       `json:"begun_ns"`    // when it began to be read, by the clock of this host
	Archived   int64       `json:"archived_ns"` // when it was durable, by the same clock
}

// record is what this process can say of a file by itself.
func (p *push) record(n pg.WALName, info fs.FileInfo) record {
	stat := info.Sys().(*syscall.Stat_t)
	return record{Place: p.Place, Cluster: p.Cluster, System: p.server.System, Instance: p.instance.ID, Name: n.String(),
		Size: info.Size(), Modified: info.ModTime().UnixNano(), Changed: stat.Ctim.Nano(), Inode: stat.Ino}
}

// untouched reports whether nobody can have written to a file of this status
// since it was read for the record. A write while it was read, or just before, may
// have left no trace in the times.
func (r record) untouched(changed int64) bool {
	return r.Changed == changed && r.Begun-changed > int64(settled)
}

// recorded reports whether a record proves that the file is archived: it is the
// file that was sent, and nobody can have written to it since. Where its times do
// not tell, it is read again, and has the content that it had. The record goes.
func (p *push) recorded(ctx context.Context, n pg.WALName) bool {
	root, err := os.OpenRoot(filepath.Join(p.instance.Dir, pushedDir))
	if err != nil {
		return false
	}
	defer root.Close()
	written, err := root.Open(recordName(n))
	if err != nil {
		return false
	}
	defer root.Remove(recordName(n)) // what stays behind is swept
	defer written.Close()
	have, ok := readRecord(written)
	if !ok {
		return false
	}
	f, err := os.Open(p.path(n))
	if err != nil {
		return false
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false
	}
	want := p.record(n, info)
	untouched := have.untouched(want.Changed)
	want.Repository, want.Sum, want.Changed, want.Begun, want.Archived = have.Repository, have.Sum, have.Changed, have.Begun, have.Archived
	if have != want { // before reading the file
		return false
	}
	return (untouched || have.holds(f)) && p.still(ctx, have)
}

// holds reports whether a file has the content that was sent.
func (r record) holds(f io.Reader) bool {
	sum := sha256.New()
	size, err := io.CopyBuffer(sum, io.LimitReader(f, r.Size+1), make([]byte, 256<<10))
	return err == nil && size == r.Size && hex.EncodeToString(sum.Sum(nil)) == r.Sum
}

// still reports whether the repository at the place of a record is the one that
// has the file, and not one that was made there since. Whoever wrote a record a
// moment ago has seen it.
func (p *push) still(ctx context.Context, have record) bool {
	if age := time.Since(time.Unix(0, have.Archived)); age >= 0 && age < believed {
		return true
	}
	if p.archiver == nil && p.connect(ctx) != nil {
		return false
	}
	now, err := p.archiver.Repository(ctx)
	return err == nil && now == have.Repository
}

func recordName(n pg.WALName) string { return n.String() + ".json" }

func sendingName(n pg.WALName) string { return n.String() + sendingSuffix }

func readRecord(f io.Reader) (record, bool) {
	b, err := io.ReadAll(io.LimitReader(f, maxRecord))
	if err != nil {
		return record{}, false
	}
	return parseRecord(b)
}

// parseRecord reads a record. What is damaged is none.
func parseRecord(b []byte) (r record, ok bool) {
	d := json.NewDecoder(bytes.NewReader(b))
	d.DisallowUnknownFields()
	err := d.Decode(&r)
	return r, err == nil && r.Name != "" && len(r.Sum) == 2*sha256.Size
}

func (r record) write(records *os.Root, name string) error {
	return durable.Replace(records, name, 0o600, func(w io.Writer) error { return json.NewEncoder(w).Encode(r) })
}
