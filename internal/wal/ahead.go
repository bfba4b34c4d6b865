package wal

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/pg"
)

const (
	aheadLock  = "ahead.lock" // of the one process that looks ahead
	batch      = 16           // files that PostgreSQL is behind who looks ahead, at most
	aheadBytes = 48 << 20     // of files that go up at a time, unless someone says how many

	stint     = 10 * time.Second      // of a process that looks ahead, in which it begins files
	lastFiles = time.Minute           // for those it has begun
	lookEvery = 10 * time.Millisecond // between looks at how far PostgreSQL is
	waitEvery = 5 * time.Millisecond  // between looks at whether a file is sent
)

// PushAhead archives the files that wait behind one, and leaves a record of each
// for the Push that will ask for it. It returns when there are none, or after a
// few seconds: the next Push starts another process, which sees what is new in
// the configuration and the repository. It also returns if another process does
// the same, or if the data directory or its server is not the same any more. What
// goes wrong with a file, Push finds out for itself.
func (p Pusher) PushAhead(ctx context.Context, after pg.WALName) error {
	begun := time.Now()
	j, err := p.begin()
	if err != nil {
		return fmt.Errorf("push ahead: %w", err)
	}
	l, err := j.openLedger()
	if l == nil || err != nil {
		return err
	}
	defer l.close()
	ctx, cancel := context.WithTimeout(ctx, stint+lastFiles)
	var g sync.WaitGroup
	defer g.Wait()
	defer cancel()
	server := postmaster(p.DataDir)
	g.Go(func() {
		tick := time.NewTicker(lookAbout)
		defer tick.Stop()
		for ctx.Err() == nil && j.unchanged(l) && postmaster(p.DataDir) == server {
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
		cancel()
	})
	if err := j.connect(ctx); err != nil {
		return fmt.Errorf("push ahead: %w", err)
	}
	if err := j.archiver.Open(ctx); err != nil {
		return fmt.Errorf("push ahead: %w", err)
	}
	j.send(ctx, l, after, math.MaxInt, make(chan struct{}, j.parallel()), begun.Add(stint))
	return nil
}

// keepAhead has what waits behind n sent by a process of its own, if that is worth
// starting one. It is false if nobody is at it.
func (p *push) keepAhead(n pg.WALName) bool {
	if p.Spawn == nil || p.parallel() < 2 {
		return false
	}
	if p.busy() {
		return true
	}
	unsent := 0
	for _, next := range p.waiting(n, batch) {
		if !p.sent(next) {
			unsent++
		}
	}
	return unsent > 1 && p.Spawn(n) == nil
}

// following is where others may begin after PostgreSQL has had n archived: behind
// the next file if nobody has sent it, for that is what PostgreSQL asks for now,
// and its own call sends it.
func (p *push) following(n pg.WALName) pg.WALName {
	for _, next := range p.waiting(n, 1) {
		if !p.sent(next) {
			return next
		}
	}
	return n
}

// sent reports whether there is a record of a file.
func (p *push) sent(n pg.WALName) bool {
	_, err := os.Stat(filepath.Join(p.instance.Dir, pushedDir, recordName(n)))
	return err == nil
}

// archived reports whether a file is archived already: whether there is a record.
// For one that another process is sending, it waits, for half of the time there
// is: the other half is for sending it after all.
func (p *push) archived(ctx context.Context, n pg.WALName) bool {
	if deadline, ok := ctx.Deadline(); ok {
		half, cancel := context.WithTimeout(ctx, time.Until(deadline)/2)
		defer cancel()
		p.awaitSent(half, n)
	} else {
		p.awaitSent(ctx, n)
	}
	return p.recorded(ctx, n)
}

// awaitSent waits while another process is sending a file. That has ended when
// its mark has gone, or the process.
func (p *push) awaitSent(ctx context.Context, n pg.WALName) {
	for {
		if _, err := os.Stat(filepath.Join(p.instance.Dir, pushedDir, sendingName(n))); err != nil || !p.busy() {
			return
		}
		select {
		case <-time.After(waitEvery):
		case <-ctx.Done():
			return
		}
	}
}

// lookAhead sends some of the files that wait behind n: PostgreSQL waits for n, and
// for those begun. It begins none after a third of the time there is, and ends
// after half of it. Each file on its way holds one of slots.
func (p *push) lookAhead(ctx context.Context, n pg.WALName, slots chan struct{}) {
	if cap(slots) < 2 || len(p.waiting(n, 1)) == 0 {
		return
	}
	given := time.Minute
	if end, ok := ctx.Deadline(); ok {
		given = time.Until(end)
	}
	end := time.Now().Add(given / 3)
	ctx, cancel := context.WithTimeout(ctx, given/2)
	defer cancel()
	if p.archiver.Open(ctx) != nil {
		return
	}
	l, err := p.openLedger()
	if l == nil || err != nil {
		return
	}
	defer l.close()
	p.send(ctx, l, n, batch-1, slots, end)
}

// send archives the files that wait behind n, count of them at most. It begins
// none after end, and is never more than a batch ahead of PostgreSQL.
func (p *push) send(ctx context.Context, l *ledger, n pg.WALName, count int, slots chan struct{}, end time.Time) {
	var g sync.WaitGroup
	defer g.Wait()
	begins, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	var ahead []pg.WALName // of PostgreSQL
	for range count {
		next, err := n.Next(p.server.SegmentSize)
		if err != nil || !p.ready(next.String()) {
			return
		}
		n = next
		if len(ahead) == batch {
			if !p.passed(begins, ahead[0]) {
				return
			}
			ahead = ahead[1:]
		}
		ahead = append(ahead, n)
		if p.sent(n) {
			continue // its turn will check it
		}
		select {
		case slots <- struct{}{}:
		case <-begins.Done():
			return
		}
		g.Go(func() {
			defer func() { <-slots }()
			p.sendOne(ctx, l, next)
		})
	}
}

// sendOne archives a file and leaves a record of it.
func (p *push) sendOne(ctx context.Context, l *ledger, n pg.WALName) {
	if ctx.Err() != nil {
		return
	}
	mark, err := l.records.Create(sendingName(n))
	if err != nil {
		return
	}
	defer l.records.Remove(sendingName(n)) // when there is a record
	defer mark.Close()
	begun := time.Now()
	info, sum, err := p.push(ctx, n, p.path(n))
	if err != nil {
		return // its own turn will tell
	}
	r := p.record(n, info)
	r.Sum, r.Begun, r.Archived = hex.EncodeToString(sum), begun.UnixNano(), time.Now().UnixNano()
	if r.Repository, err = p.archiver.Repository(ctx); err == nil {
		r.write(l.records, recordName(n))
	}
}

// passed waits until PostgreSQL has had a file archived. It is false if that took
// too long.
func (p *push) passed(ctx context.Context, n pg.WALName) bool {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for p.ready(n.String()) {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
	return true
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

// A ledger is the directory of an instance's records, for the one process that
// writes them.
type ledger struct {
	lock    *os.File // held until it is closed
	records *os.Root
}

// openLedger returns nil if another process has it.
func (p *push) openLedger() (*ledger, error) {
	dir, err := os.OpenRoot(p.instance.Dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	lock, err := dir.OpenFile(aheadLock, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	l := &ledger{lock: lock}
	if err := flock(lock, syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		lock.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, nil
		}
		return nil, err
	}
	if err = durable.MkdirAll(dir, pushedDir, 0o700); err == nil {
		l.records, err = dir.OpenRoot(pushedDir)
	}
	if err == nil {
		err = p.sweep(l.records)
	}
	if err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *ledger) close() {
	if l.records != nil {
		l.records.Close()
	}
	l.lock.Close()
}

// sweep removes what calls that were killed left behind, and records that
// nobody will ask for.
func (p *push) sweep(records *os.Root) error {
	entries, err := fs.ReadDir(records.FS(), ".")
	if err != nil {
		return err
	}
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), ".json")
		if !ok || durable.IsTemp(e.Name()) || !p.ready(name) {
			if err := records.RemoveAll(e.Name()); err != nil {
				return err
			}
		}
	}
	return nil
}

// busy reports whether another process looks ahead.
func (p *push) busy() bool {
	lock, err := os.Open(filepath.Join(p.instance.Dir, aheadLock))
	if err != nil {
		return false
	}
	defer lock.Close()
	return errors.Is(flock(lock, syscall.LOCK_SH|syscall.LOCK_NB), syscall.EWOULDBLOCK)
}

// unchanged reports whether the data directory, and the ledger in it, are still
// those that they were.
func (p *push) unchanged(l *ledger) bool {
	s, err := ReadServer(p.DataDir)
	if err != nil || s != p.server || !p.instance.exists() {
		return false
	}
	mine, err := l.lock.Stat()
	if err != nil {
		return false
	}
	now, err := os.Stat(filepath.Join(p.DataDir, instanceDir, aheadLock))
	return err == nil && os.SameFile(mine, now)
}

// postmaster identifies the server that runs on a data directory: its process,
// and when it was started; "" if none does (miscinit.c, CreateLockFile).
func postmaster(pgdata string) string {
	text, err := readFile(filepath.Join(pgdata, "postmaster.pid"), maxText)
	if err != nil {
		return ""
	}
	lines := strings.SplitN(string(text), "\n", 4)
	pid, err := strconv.Atoi(strings.TrimSpace(lines[0]))
	if err != nil || pid <= 0 || errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) {
		return ""
	}
	return strings.Join(lines[:min(3, len(lines))], " ")
}
