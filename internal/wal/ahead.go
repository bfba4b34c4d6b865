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
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/pg"
)

const (
	pushedDir  = "pushed"     // local records, in an instance's directory
	aheadLock  = "ahead.lock" // of the one process that looks ahead
	batch      = 16           // files that one call of archive_command sends at most
	maxRecord  = 16 << 10
	aheadBytes = 48 << 20 // of files that go up at a time, unless someone says how many
)

// A record says that a file of the data directory is durable in the repository.
// It counts only while everything in it is still so.
type record struct {
	Place    string      `json:"repository"`
	Cluster  string      `json:"cluster"`
	System   pg.SystemID `json:"system_id"`
	Instance string      `json:"instance"`
	Name     string      `json:"name"`
	Size     int64       `json:"size"` // bytes
	Modified int64       `json:"modified_ns"`
	Inode    uint64      `json:"inode"`
	Sum      string      `json:"sha256"` // hexadecimal, as the repository has it
	Check    string      `json:"xxh3"`   // hexadecimal, 128 bits: what the file is compared by when its turn comes
}

func (p *push) record(n pg.WALName, info fs.FileInfo, sum, check []byte) record {
	return record{p.Place, p.Cluster, p.server.System, p.instance.ID, n.String(), info.Size(), info.ModTime().UnixNano(),
		info.Sys().(*syscall.Stat_t).Ino, hex.EncodeToString(sum), hex.EncodeToString(check)}
}

// recorded reports whether a record proves that the file is archived: it is read
// again, and has the content that it had when it was sent. The record goes.
func (p *push) recorded(n pg.WALName) bool {
	root, err := os.OpenRoot(filepath.Join(p.instance.Dir, pushedDir))
	if err != nil {
		return false
	}
	defer root.Close()
	defer root.Remove(recordName(n)) // what stays behind is swept
	have, ok := readRecord(root, recordName(n))
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
	want := p.record(n, info, nil, nil)
	want.Sum, want.Check = have.Sum, have.Check
	if have != want { // before reading the file
		return false
	}
	check := xxh3.New()
	size, err := io.CopyBuffer(check, io.LimitReader(f, info.Size()+1), make([]byte, 256<<10))
	return err == nil && size == have.Size && hex.EncodeToString(digest(check)) == have.Check
}

func recordName(n pg.WALName) string { return n.String() + ".json" }

func readRecord(root *os.Root, name string) (record, bool) {
	f, err := root.Open(name)
	if err != nil {
		return record{}, false
	}
	defer f.Close()
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
	return r, err == nil && r.Name != "" && len(r.Sum) == 2*sha256.Size && r.Check != ""
}

// lookAhead sends files that wait behind n, and leaves a record of each for the
// call that will ask for it. It begins none after a third of the time there is,
// and ends after half of it: PostgreSQL waits for n.
//
// Each file on its way holds one of slots.
func (p *push) lookAhead(ctx context.Context, n pg.WALName, slots chan struct{}) {
	if cap(slots) < 2 || len(p.waiting(n, 1)) == 0 {
		return
	}
	begun := time.Now()
	given := time.Minute
	if end, ok := ctx.Deadline(); ok {
		given = time.Until(end)
	}
	ctx, cancel := context.WithTimeout(ctx, given/2)
	defer cancel()
	if p.archiver.Open(ctx) != nil {
		return
	}
	instance, err := os.OpenRoot(p.instance.Dir)
	if err != nil {
		return
	}
	defer instance.Close()
	lock, err := instance.OpenFile(aheadLock, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return
	}
	defer lock.Close() // and with it the lock
	if flock(lock, syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		return // another process is at it
	}
	if durable.MkdirAll(instance, pushedDir, 0o700) != nil {
		return
	}
	records, err := instance.OpenRoot(pushedDir)
	if err != nil {
		return
	}
	defer records.Close()
	p.sweep(records)

	var g sync.WaitGroup
	defer g.Wait()
	for _, next := range p.waiting(n, batch-1) {
		if _, err := records.Stat(recordName(next)); err == nil {
			continue // its turn will check it
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		if time.Since(begun) > given/3 {
			return
		}
		g.Go(func() {
			defer func() { <-slots }()
			if r, err := p.push(ctx, next, p.path(next)); err == nil { // else its own turn will tell
				r.write(records, recordName(next))
			}
		})
	}
}

// waiting returns the files that PostgreSQL will ask for after n: as far as one
// follows on the other, but not more than limit. It looks for names that it
// knows, and lists no directory: there may be a hundred thousand of them.
func (p *push) waiting(n pg.WALName, limit int) (names []pg.WALName) {
	if n.Kind != pg.Segment && n.Kind != pg.BackupHistory {
		return nil
	}
	for len(names) < limit {
		next, err := n.Next(p.server.SegmentSize)
		if err != nil || !p.ready(next.String()) {
			break
		}
		names = append(names, next)
		n = next
	}
	return names
}

// ready reports whether PostgreSQL wants a file archived.
func (p *push) ready(name string) bool {
	_, err := os.Stat(filepath.Join(p.DataDir, "pg_wal", "archive_status", name+".ready"))
	return err == nil
}

// parallel is how many files go up at a time.
func (p *push) parallel() int {
	if p.Parallel > 0 {
		return p.Parallel
	}
	return max(1, min(max(2, runtime.GOMAXPROCS(0)), aheadBytes/int(p.server.SegmentSize)))
}

// sweep removes what calls that were killed left behind, and records that
// nobody will ask for.
func (p *push) sweep(records *os.Root) {
	entries, err := fs.ReadDir(records.FS(), ".")
	if err != nil {
		return
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || durable.IsTemp(e.Name()) || !p.ready(name) {
			records.Remove(e.Name())
		}
	}
}

func (r record) write(records *os.Root, name string) error {
	return durable.Replace(records, name, 0o600, func(w io.Writer) error { return json.NewEncoder(w).Encode(r) })
}
