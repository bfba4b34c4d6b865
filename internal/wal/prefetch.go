package wal

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/zeebo/xxh3"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

const (
	parallel  = 4                     // downloads at once
	maxAhead  = 256 << 20             // bytes of segments that wait, unless that is less than one
	idleAfter = 30 * time.Second      // without a request, nobody recovers
	lookAt    = 20 * time.Millisecond // between looks at what is asked for
	lookAbout = time.Second           // between looks at whether all is as it was
	pollEvery = 2 * time.Millisecond  // while a segment is on its way
	maxWait   = 10 * time.Second      // for a segment that is on its way
)

// Prefetch fetches the segments behind the one that PostgreSQL asked for last,
// so that they are there when it asks for them, and follows it from timeline to
// timeline. It returns when it is not needed: another process does the same,
// nobody asked for half a minute, the data directory is gone or not the same
// any more, or a segment could not be fetched and all others are used. Why it
// could not, Fetch finds out for itself. It leaves no file behind.
func (f Fetcher) Prefetch(ctx context.Context) error {
	s, err := ReadServer(f.DataDir)
	if err != nil {
		return fmt.Errorf("fetch ahead: %w", err)
	}
	sh, err := f.open(s)
	if err != nil {
		return fmt.Errorf("fetch ahead: %w", err)
	}
	defer sh.close()
	lock, err := sh.lock()
	if err != nil {
		return fmt.Errorf("fetch ahead: %w", err)
	}
	if lock == nil {
		return nil
	}
	defer lock.Close()
	defer sh.keep(nil)
	if err := sh.sweep(); err != nil {
		return fmt.Errorf("fetch ahead: %w", err)
	}
	r, err := f.Open(ctx)
	if err != nil {
		return fmt.Errorf("fetch ahead: %w", err)
	}
	if err := sh.prefetch(ctx, f, r, s, lock); err != nil {
		return fmt.Errorf("fetch ahead: %w", err)
	}
	return nil
}

// prefetch is Prefetch for the one who holds the lock.
func (sh *shelf) prefetch(ctx context.Context, f Fetcher, r *repo.Repo, s Server, lock *os.File) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	type result struct {
		n   pg.WALName
		err error
	}
	results := make(chan result, parallel)
	running := make(map[pg.WALName]context.CancelFunc)
	start := func(n pg.WALName) {
		ctx, cancel := context.WithCancel(ctx)
		running[n] = cancel
		wg.Go(func() { results <- result{n, sh.fetch(ctx, f, r, s, n)} })
	}
	tick := time.NewTicker(lookAt)
	defer tick.Stop()
	about := time.NewTicker(lookAbout)
	defer about.Stop()

	var noted time.Time // by the file system's clock
	asked := time.Now() // by ours
	failed := false
	for {
		wanted, at, err := sh.wanted()
		if err != nil {
			return err
		}
		if !at.Equal(noted) {
			noted, asked = at, time.Now()
		}
		plan := following(wanted, f.Ahead, s.SegmentSize)
		have, err := sh.keep(append(plan, wanted))
		if err != nil {
			return err
		}
		if now, _, err := sh.wanted(); err != nil {
			return err
		} else if now != wanted {
			continue // what is not there may have been used
		}
		needed := make(map[pg.WALName]bool)
		for _, n := range plan {
			needed[n] = true
			if !failed && !have[n] && running[n] == nil && len(running) < parallel {
				start(n)
			}
		}
		for n, cancel := range running {
			if !needed[n] && n != wanted { // wanted: somebody waits for it
				cancel()
			}
		}
		if failed && len(running) == 0 && len(have) == 0 || time.Since(asked) > idleAfter {
			return nil
		}
		select {
		case r := <-results:
			running[r.n]()
			delete(running, r.n)
			failed = failed || r.err != nil && needed[r.n]
		case <-about.C:
			if !f.unchanged(sh, lock) {
				return nil
			}
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// following returns the segments of a timeline behind n, count of them at most.
func following(n pg.WALName, count int, size pg.SegmentSize) (names []pg.WALName) {
	for range min(count, max(1, int(maxAhead/size))) {
		next, err := n.Next(size)
		if err != nil {
			break
		}
		names = append(names, next)
		n = next
	}
	return names
}

// fetch puts a segment on the shelf.
func (sh *shelf) fetch(ctx context.Context, f Fetcher, r *repo.Repo, s Server, n pg.WALName) error {
	part := path.Join(shelfDir, n.String()+partSuffix)
	file, err := sh.wal.OpenFile(part, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer sh.wal.Remove(part) // gone already, once renamed
	have := xxh3.New()
	err = read(ctx, r, s.archive(f.Cluster), n, s, io.MultiWriter(file, have))
	if err == nil {
		err = file.Sync() // before it gets its label
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	return sh.wal.Rename(part, path.Join(shelfDir, sh.label(n, digest(have))))
}

// unchanged reports whether the shelf is still that of the data directory, and
// the data directory whose it was.
func (f Fetcher) unchanged(sh *shelf, lock *os.File) bool {
	s, err := ReadServer(f.DataDir)
	if err != nil {
		return false
	}
	owner, err := f.owner(s)
	if err != nil || owner != sh.owner {
		return false
	}
	mine, err := lock.Stat()
	if err != nil {
		return false
	}
	now, err := os.Stat(filepath.Join(f.DataDir, "pg_wal", shelfDir, lockName))
	return err == nil && os.SameFile(mine, now)
}

// A shelf holds segments that were fetched ahead. Each is a file whose name
// says what it is: the segment, its digest, and whose it is and from where (see
// owner). Nothing on it is believed: a file is
// compared with its name when it is used.
type shelf struct {
	wal   *os.Root // pg_wal
	owner string
}

// In pg_wal, which no base backup copies.
const (
	shelfDir   = "pgkeep/prefetch"
	lockName   = "lock"   // locked by who fills the shelf
	wantedName = "wanted" // holds the segment that was asked for last
	partSuffix = ".part"  // of a segment that is being fetched
)

// open returns the shelf of a data directory, and makes one if there is none.
func (f Fetcher) open(s Server) (*shelf, error) {
	owner, err := f.owner(s)
	if err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(filepath.Join(f.DataDir, "pg_wal"))
	if err != nil {
		return nil, err
	}
	if err := durable.MkdirAll(root, shelfDir, 0o700); err != nil {
		root.Close()
		return nil, err
	}
	return &shelf{root, owner}, nil
}

// owner identifies for whom and from where segments are fetched ahead. What has
// another owner is of no use: a restored copy of the data directory is another,
// and so is another repository.
func (f Fetcher) owner(s Server) (string, error) {
	i, err := OpenInstance(f.DataDir)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%q %q %v %d %d %q", f.Place, f.Cluster, s.System, s.Major, s.SegmentSize, i.ID))
	return hex.EncodeToString(sum[:16]), nil
}

// label is the name of a segment's file on the shelf.
func (sh *shelf) label(n pg.WALName, sum []byte) string {
	return fmt.Sprintf("%v-%x-%s", n, sum, sh.owner)
}

// digest is XXH3-128: the SHA-256 was compared at the download, and takes ten
// times as long. What is looked for between then and the use is damage.
func digest(h *xxh3.Hasher) []byte {
	sum := h.Sum128().Bytes()
	return sum[:]
}

// unlabel is the reverse of label. It is false for other files, and for those of
// another owner.
func (sh *shelf) unlabel(name string) (n pg.WALName, sum []byte, ok bool) {
	part := strings.Split(name, "-")
	if len(part) != 3 || part[2] != sh.owner {
		return n, nil, false
	}
	n, err := pg.ParseWALName(part[0])
	if err != nil || n.Kind != pg.Segment {
		return n, nil, false
	}
	sum, err = hex.DecodeString(part[1])
	return n, sum, err == nil
}

// follow notes that PostgreSQL asks for a segment, and returns the shelf to look
// for it on. That is nil where nothing is fetched ahead: for other files, and
// other places than pg_wal. Trouble with the shelf is none with the archive, and
// only means that there is no shelf.
func (f Fetcher) follow(n pg.WALName, s Server, target string) *shelf {
	if f.Ahead <= 0 || n.Kind != pg.Segment || !f.inWAL(target) {
		return nil
	}
	sh, err := f.open(s)
	if err != nil {
		return nil
	}
	if err := sh.want(n); err != nil {
		sh.close()
		return nil
	}
	return sh
}

// inWAL reports whether a file is to stand in pg_wal itself.
func (f Fetcher) inWAL(target string) bool {
	dir, err := os.Stat(filepath.Dir(target))
	if err != nil {
		return false
	}
	wal, err := os.Stat(filepath.Join(f.DataDir, "pg_wal"))
	return err == nil && os.SameFile(dir, wal)
}

func (sh *shelf) close() {
	if sh != nil {
		sh.wal.Close()
	}
}

// keepAhead has the shelf filled, if nobody does.
func (f Fetcher) keepAhead(sh *shelf) {
	if sh != nil && f.Spawn != nil && !sh.busy() {
		f.Spawn()
	}
}

// want notes what is asked for, and by whom. All notes have one length: no reader
// sees half of one.
func (sh *shelf) want(n pg.WALName) error {
	file, err := sh.wal.OpenFile(path.Join(shelfDir, wantedName), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(file, "%v-%s", n, sh.owner)
	return errors.Join(err, file.Close())
}

// wanted returns the segment that was asked for last, and when. It fails if
// another owner has asked since: the configuration is another one by now.
func (sh *shelf) wanted() (n pg.WALName, at time.Time, err error) {
	name := path.Join(shelfDir, wantedName)
	info, err := sh.wal.Stat(name)
	if err != nil {
		return n, at, err
	}
	b, err := sh.wal.ReadFile(name)
	if err != nil {
		return n, at, err
	}
	segment, owner, _ := strings.Cut(string(b), "-")
	if owner != sh.owner {
		return n, at, fmt.Errorf("%q is not asked for by %s", b, sh.owner)
	}
	n, err = pg.ParseWALName(segment)
	return n, info.ModTime(), err
}

// lock makes the caller the one who fills the shelf, until the file is closed. It
// returns nil if there is one already.
func (sh *shelf) lock() (*os.File, error) {
	file, err := sh.wal.OpenFile(path.Join(shelfDir, lockName), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	err = syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if err == nil {
		return file, nil
	}
	file.Close()
	if errors.Is(err, syscall.EWOULDBLOCK) {
		err = nil
	}
	return nil, err
}

// busy reports whether somebody fills the shelf.
func (sh *shelf) busy() bool {
	file, err := sh.wal.Open(path.Join(shelfDir, lockName))
	if err != nil {
		return false
	}
	defer file.Close()
	return errors.Is(syscall.Flock(int(file.Fd()), syscall.LOCK_SH|syscall.LOCK_NB), syscall.EWOULDBLOCK)
}

// sweep removes what one who was killed had begun to fetch. Who calls it holds
// the lock, and fetches nothing yet.
func (sh *shelf) sweep() error {
	parts, err := fs.Glob(sh.wal.FS(), path.Join(shelfDir, "*"+partSuffix))
	for _, name := range parts {
		err = errors.Join(err, sh.wal.Remove(name))
	}
	return err
}

// keep removes what is on the shelf, unless it is one of names, and returns which
// of them are there. Who calls it holds the lock.
func (sh *shelf) keep(names []pg.WALName) (map[pg.WALName]bool, error) {
	entries, err := fs.ReadDir(sh.wal.FS(), shelfDir)
	if err != nil {
		return nil, err
	}
	wanted := make(map[string]pg.WALName)
	for _, n := range names {
		wanted[n.String()] = n
	}
	have := make(map[pg.WALName]bool)
	for _, e := range entries {
		if e.Name() == lockName || e.Name() == wantedName {
			continue
		}
		segment, isPart := strings.CutSuffix(e.Name(), partSuffix)
		n, _, ok := sh.unlabel(e.Name())
		switch {
		case isPart && wanted[segment] != pg.WALName{}:
			continue
		case ok && wanted[n.String()] != pg.WALName{}:
			have[n] = true
			continue
		}
		if err := sh.wal.RemoveAll(path.Join(shelfDir, e.Name())); err != nil {
			return nil, err
		}
	}
	return have, nil
}

// deliver moves a segment from the shelf to the file called name in pg_wal. It
// reports whether it is there, verified; its content is on disk. A segment that is on its
// way is waited for.
func (sh *shelf) deliver(ctx context.Context, n pg.WALName, s Server, name string) bool {
	if sh == nil {
		return false
	}
	from, sum := sh.await(ctx, n)
	if from == "" {
		return false
	}
	if err := sh.verify(from, n, s, sum); err != nil {
		sh.wal.Remove(from)
		return false
	}
	// PostgreSQL moves the file at once, and syncs the directory then
	// (KeepFileRestoredFromArchive in access/transam/xlogarchive.c).
	return sh.wal.Rename(from, name) == nil
}

// await returns the file of a segment and the SHA-256 that it ought to have, or
// "" if there is none.
func (sh *shelf) await(ctx context.Context, n pg.WALName) (name string, sum []byte) {
	poll := time.NewTicker(pollEvery)
	defer poll.Stop()
	wait := maxWait
	if deadline, ok := ctx.Deadline(); ok { // the other half is for finding out what is the matter
		wait = min(wait, time.Until(deadline)/2)
	}
	giveUp := time.After(wait)
	for {
		_, err := sh.wal.Lstat(path.Join(shelfDir, n.String()+partSuffix))
		coming := err == nil // looked at first: what is finished now is found below
		entries, err := fs.ReadDir(sh.wal.FS(), shelfDir)
		if err != nil {
			return "", nil
		}
		for _, e := range entries {
			if have, sum, ok := sh.unlabel(e.Name()); ok && have == n {
				return path.Join(shelfDir, e.Name()), sum
			}
		}
		if !coming || !sh.busy() {
			return "", nil
		}
		select {
		case <-poll.C:
		case <-giveUp:
			return "", nil
		case <-ctx.Done():
			return "", nil
		}
	}
}

// verify compares a file on the shelf with what it is said to be.
func (sh *shelf) verify(name string, n pg.WALName, s Server, sum []byte) error {
	file, err := sh.wal.Open(name)
	if err != nil {
		return err
	}
	defer file.Close()
	have := xxh3.New()
	p := &peek{w: have}
	if _, err := io.CopyBuffer(p, io.LimitReader(file, int64(s.SegmentSize)+1), make([]byte, 256<<10)); err != nil {
		return err
	}
	if err := checkHead(n, s, p.head, p.size); err != nil {
		return err
	}
	if !bytes.Equal(digest(have), sum) {
		return fmt.Errorf("%s: not what was fetched", name)
	}
	return nil
}
