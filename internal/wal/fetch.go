package wal

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

var (
	// ErrAbsent means that a file is proved not to be in the archive, and that
	// nothing there shows that it should be.
	ErrAbsent = errors.New("not in the archive")
	// ErrLater means that the store could not be asked for a segment, and that
	// the server is a standby, which asks again and opens for nobody meanwhile.
	ErrLater = errors.New("a standby asks again")
	// ErrWait means that the store could not be asked for a history, and that
	// the server is a standby. It must not be told that there is none: a server
	// that is being promoted takes the number of the first history that is not
	// there. But it can wait, and whoever serves it should ask again.
	ErrWait = errors.New("a standby waits for the answer")
)

// A Fetcher delivers files of the archive to the PostgreSQL of one data
// directory.
type Fetcher struct {
	Cluster string
	DataDir string
	// Open opens the repository. Every attempt opens it anew: a key or a right
	// that was missing can be there by then.
	Open func(context.Context) (*repo.Repo, error)
	// HoleGrace is how long a missing segment is waited for once a later one is
	// there. 0: not at all. Push archives several at a time, in any order.
	HoleGrace time.Duration
	// Expect, if not zero, is a segment that the archive is known to have held.
	// It and those before it are never ErrAbsent.
	Expect pg.WALName
	// Judge is for a test of what the archive holds: a file that two attempts in a
	// row find damaged, or gone though it is expected, is not tried again. Where a
	// server is to be saved, somebody may bring it back in time.
	Judge bool
	// Timeline is the one that the server recovers along; zero: not known. Of a
	// timeline that it comes from, the segments from where it was left are not
	// its log, and ErrAbsent.
	Timeline pg.Timeline

	// Ahead is how many segments Prefetch keeps ready. 0: none.
	Ahead int
	// Place says where the repository is and whom to believe there. What was
	// fetched ahead under another Place is not used.
	Place string
	// Spawn starts a process that calls Prefetch, without waiting for it. It is
	// called where there seems to be none. Nil: nobody fetches ahead.
	Spawn func()
}

// Fetch puts the file that PostgreSQL calls name at path. It returns nil when it
// is there, whole, durable and verified. What may pass is tried again until ctx
// ends, and nearly everything may: the error is that of the last attempt that
// had one of its own. It is ErrAbsent or ErrLater only where PostgreSQL may
// take the answer for the end of the log as it stands. ErrWait is for the caller
// alone: PostgreSQL may not.
func (f Fetcher) Fetch(ctx context.Context, name, path string) error {
	n, err := pg.ParseWALName(name)
	if err != nil {
		return fail.With(fail.BadConfig, err)
	}
	p := patience{holeGrace: f.HoleGrace}
	for {
		err := f.attempt(ctx, n, path)
		if err == nil {
			return nil
		}
		wait, again := p.after(err, time.Now())
		_, unreadable := errors.AsType[*unreadableError](err)
		if !again || (f.Judge || unreadable) && p.proved >= 2 && !f.mayFill(n, err) {
			break
		}
		select {
		case <-time.After(wait):
			continue
		case <-ctx.Done():
		}
		break
	}
	if _, ok := errors.AsType[*unreadableError](p.last); ok {
		return placeholder(n, path)
	}
	if transient(p.last) && f.standby() {
		switch n.Kind {
		case pg.Segment:
			return fmt.Errorf("%w; %w", p.last, ErrLater)
		case pg.History:
			return fmt.Errorf("%w; %w", p.last, ErrWait)
		}
	}
	return p.last
}

// An unreadableError says that a history is damaged in the archive, and that the
// server will not read it.
type unreadableError struct{ error }

func (e *unreadableError) Unwrap() error { return e.error }

// unread returns err, or an unreadableError: that a history is damaged which the
// server does not recover along. A standby may yet follow it.
func (f Fetcher) unread(n pg.WALName, err error) error {
	_, hole := errors.AsType[*holeError](err)
	damaged := errors.Is(err, fail.Corrupt) || errors.Is(err, fail.Untrusted)
	if n.Kind != pg.History || f.Timeline == 0 || n.Timeline <= f.Timeline || hole || !damaged || f.standby() {
		return err
	}
	return &unreadableError{err}
}

// placeholder stands for a history that is damaged in the archive, of a timeline
// that the server does not recover along. Of those PostgreSQL wants to know which
// numbers are taken, when it opens, and reads none (findNewestTimeLine in
// access/transam/timeline.c). If it did, it would stop at this line.
func placeholder(n pg.WALName, path string) error {
	err := durable.WriteFile(path, 0o600, func(w io.Writer) error {
		_, err := fmt.Fprintf(w, "damaged: %v is, in the archive; there is such a timeline, and no more is known of it\n", n)
		return err
	})
	if err != nil {
		return fmt.Errorf("fetch %v: %w", n, err)
	}
	return nil
}

// attempt tries to deliver once. A segment for PostgreSQL itself is looked for
// among those that were fetched ahead.
func (f Fetcher) attempt(ctx context.Context, n pg.WALName, path string) error {
	s, err := ReadServer(f.DataDir)
	if err != nil {
		return err
	}
	left, err := f.left(ctx, n, s)
	if err != nil {
		return fmt.Errorf("fetch %v: %w", n, err)
	}
	if left != (pg.Fork{}) {
		return f.unexpected(n, fmt.Errorf("fetch %v: on the way to timeline %d, its own was left before, at %v: %w", n, f.Timeline, left.At, ErrAbsent))
	}
	ahead := f.follow(n, s, path)
	defer ahead.close()
	if ahead.deliver(ctx, n, s, filepath.Base(path)) {
		f.keepAhead(ahead)
		return nil
	}
	if f.inWAL(path) {
		if err := sweep(filepath.Dir(path), time.Now().Add(-staleAfter)); err != nil {
			return fmt.Errorf("fetch %v: %w", n, err)
		}
	}
	r, err := f.Open(ctx)
	if err != nil {
		return fmt.Errorf("fetch %v: %w", n, err)
	}
	if err := Fetch(ctx, r, f.Cluster, s, n.String(), path); err != nil {
		return f.unread(n, f.unexpected(n, err))
	}
	f.keepAhead(ahead)
	return nil
}

// mayFill reports whether err is a hole that archiving may just be filling.
func (f Fetcher) mayFill(n pg.WALName, err error) bool {
	_, hole := errors.AsType[*holeError](err)
	return hole && !f.expected(n)
}

// unexpected returns err, unless that is absence of what the archive is known to
// have held.
func (f Fetcher) unexpected(n pg.WALName, err error) error {
	if !errors.Is(err, ErrAbsent) || !f.expected(n) {
		return err
	}
	return fail.Hint(fmt.Errorf("fetch %v: it is missing, and when the restore was planned the archive held the log up to %v: %w", n, f.Expect, fail.Corrupt),
		"what was deleted since? PostgreSQL must not open with fewer rows; plan the restore again, or bring the file back")
}

// left finds out whether segment n lies behind where its timeline was left for the
// one that the server recovers along. PostgreSQL asks for it all the same, as long
// as that of the newer one is not archived, and would go on with what the newer
// one had undone (XLogFileReadAnyTLI in access/transam/xlogrecovery.c).
func (f Fetcher) left(ctx context.Context, n pg.WALName, s Server) (fork pg.Fork, err error) {
	if n.Kind != pg.Segment || n.Timeline >= f.Timeline {
		return fork, nil
	}
	history := pg.HistoryName(f.Timeline)
	text, err := readFile(filepath.Join(f.DataDir, "pg_wal", history.String()), maxText) // PostgreSQL keeps it there
	if errors.Is(err, fs.ErrNotExist) {
		var r *repo.Repo
		if r, err = f.Open(ctx); err != nil {
			return fork, err
		}
		var b bytes.Buffer
		if err = r.ReadWAL(ctx, s.archive(f.Cluster), history, &b); errors.Is(err, store.ErrNotExist) {
			return fork, nil
		}
		text = b.Bytes()
	}
	if err != nil {
		return fork, err
	}
	forks, err := pg.ParseHistory(f.Timeline, string(text))
	if err != nil {
		return fork, err
	}
	for _, left := range forks {
		at, err := pg.SegmentName(left.Timeline, left.At, s.SegmentSize)
		if err != nil {
			return fork, err
		}
		if left.Timeline == n.Timeline && n.Segment() >= at { // the segment of the fork itself goes on in the newer timeline
			return left, nil
		}
	}
	return fork, nil
}

// expected reports whether the archive is known to have held a segment. On which
// timeline does not matter: PostgreSQL asks for the newest that can have it, and
// goes on to an older one only if that is absent.
func (f Fetcher) expected(n pg.WALName) bool {
	const timeline = 8 // digits
	return n.Kind == pg.Segment && f.Expect.Kind == pg.Segment && n.Segment()[timeline:] <= f.Expect.Segment()[timeline:]
}

// patience decides whether what failed is tried again.
type patience struct {
	holeGrace time.Duration

	failures int
	proved   int       // of them, those in a row that the archive, and not the way to it, is to blame for
	hole     time.Time // when a hole was seen first, and ever since
	last     error     // the one to report
}

// after takes note that an attempt ended with err at now. It returns how long to
// wait for the next one, or false: then there is none, and last says why.
func (p *patience) after(err error, now time.Time) (wait time.Duration, again bool) {
	_, proved := errors.AsType[*holeError](p.last)
	if p.last == nil || !errors.Is(err, context.DeadlineExceeded) && !(proved && transient(err)) {
		p.last = err // that time ran out says less than what came before; and silence does not fill a hole
	}
	switch fail.KindOf(err) {
	case fail.Corrupt, fail.Untrusted, fail.WrongSystem, fail.Unsupported:
		p.proved++
	default:
		p.proved = 0
	}
	if _, ok := errors.AsType[*holeError](err); !ok {
		p.hole = time.Time{}
	} else if p.hole.IsZero() {
		p.hole = now
	}
	switch {
	case errors.Is(err, ErrAbsent), errors.Is(err, errLetGo), errors.Is(err, fail.BadConfig), errors.Is(err, context.Canceled):
		return 0, false
	case !p.hole.IsZero() && now.Sub(p.hole) >= p.holeGrace:
		return 0, false
	}
	const least, most = 100 * time.Millisecond, 5 * time.Second
	wait = min(most, least<<min(p.failures, 10))
	p.failures++
	return wait/2 + rand.N(wait/2), true
}

// transient reports whether err says nothing about the archive: the store did
// not answer in time. That it denies access is not of this kind. Nothing here
// makes that pass, and a standby that quietly falls behind, for want of a
// right, is found out when it is needed.
func transient(err error) bool {
	return errors.Is(err, fail.StoreDown) || errors.Is(err, context.DeadlineExceeded)
}

// standby reports whether PostgreSQL takes the end of the log for a reason to
// ask again, not to open: PostgreSQL's documentation, "Standby Server Operation".
// It does open if somebody promotes it meanwhile.
func (f Fetcher) standby() bool {
	_, err := os.Lstat(filepath.Join(f.DataDir, "standby.signal"))
	return err == nil
}

// staleAfter is how long nobody wrote to an unfinished file that is removed. No
// write to one that is still being fetched takes that long.
const staleAfter = 10 * time.Minute

// sweep removes unfinished files in dir that were left behind by a crash before
// a moment.
func sweep(dir string, before time.Time) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !durable.IsTemp(e.Name()) {
			continue
		}
		if info, err := e.Info(); err == nil && info.ModTime().Before(before) {
			if err := os.Remove(filepath.Join(dir, e.Name())); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// Fetch tries once to put the file that PostgreSQL calls name at path. It returns
// nil when it is there, whole, durable and verified. It fails with ErrAbsent when
// the store says that there is none and nothing in the archive shows that there
// should be; only then may PostgreSQL take this for the end of the log. Whatever
// else happens is another error.
func Fetch(ctx context.Context, r *repo.Repo, cluster string, s Server, name, path string) error {
	n, err := pg.ParseWALName(name)
	if err != nil {
		return fail.With(fail.BadConfig, err)
	}
	a := s.archive(cluster)
	err = durable.WriteFile(path, 0o600, func(w io.Writer) error {
		return read(ctx, r, a, n, s, w)
	})
	if errors.Is(err, store.ErrNotExist) {
		err = absent(ctx, r, a, n, s)
	}
	if err != nil {
		return fmt.Errorf("fetch %v: %w", n, err)
	}
	return nil
}

// read writes a verified file of the archive to w.
func read(ctx context.Context, r *repo.Repo, a repo.Archive, n pg.WALName, s Server, w io.Writer) error {
	if n.Kind == pg.History || n.Kind == pg.BackupHistory {
		var content bytes.Buffer
		if err := r.ReadWAL(ctx, a, n, &content); err != nil {
			return err
		}
		if err := check(n, s, content.Bytes(), int64(content.Len())); err != nil {
			return err
		}
		_, err := w.Write(content.Bytes())
		return err
	}
	p := &peek{w: w}
	if err := r.ReadWAL(ctx, a, n, p); err != nil {
		return err
	}
	return checkHead(n, s, p.head, p.size)
}

// A peek remembers the beginning of what passes.
type peek struct {
	w    io.Writer
	head []byte
	size int64
}

func (p *peek) Write(b []byte) (int, error) {
	if want := pg.PageHeaderSize - len(p.head); want > 0 {
		p.head = append(p.head, b[:min(want, len(b))]...)
	}
	n, err := p.w.Write(b)
	p.size += int64(n)
	return n, err
}

// absent decides what it means that the store has no object for n: ErrAbsent, or
// why it should have one.
func absent(ctx context.Context, r *repo.Repo, a repo.Archive, n pg.WALName, s Server) error {
	if err := known(ctx, r, a); err != nil {
		return err
	}
	if n.Kind == pg.History && n.Timeline <= s.Timeline {
		return ErrAbsent // the first has none; that of this server may have begun before it had an archive
	}
	if err := letGo(ctx, r, a, n, s); err != nil {
		return err
	}
	if err := overtaken(ctx, r, a, n); err != nil {
		return err
	}
	for h, err := range histories(ctx, r, a, n.Timeline) {
		if err != nil {
			return err
		}
		for _, f := range h.forks {
			if f.Timeline != n.Timeline {
				continue
			}
			if n.Kind == pg.History {
				return hole(h.name, h.name)
			}
			at, err := pg.SegmentName(f.Timeline, f.At, s.SegmentSize)
			if err != nil {
				return err
			}
			if n.Segment() < at { // the segment of the fork itself goes on in the new timeline
				return hole(h.name, h.name)
			}
		}
	}
	return ErrAbsent
}

// errLetGo means that retention let a segment go. It was there, and will not come
// back by itself.
var errLetGo = errors.New("retention let it go")

// letGo fails if n may be missing because nobody was to need it any more. It was
// written, all the same: PostgreSQL must not take this for the end of the log.
func letGo(ctx context.Context, r *repo.Repo, a repo.Archive, n pg.WALName, s Server) error {
	if n.Kind != pg.Segment && n.Kind != pg.Partial {
		return nil
	}
	e, err := r.Expiry(ctx, a)
	if err != nil || e.Number == 0 {
		return err
	}
	at, err := n.Start(s.SegmentSize)
	if err != nil || at >= e.Floor(n.Timeline) {
		return err
	}
	return fail.Hint(fmt.Errorf("%w; all segments of timeline %d from %v on are kept: %w", errLetGo, n.Timeline, e.Floor(n.Timeline), fail.Unreachable),
		"an older backup leads to its own end only: restore it with --immediate, or a newer one to the moment that is wanted; pgkeep windows shows what leads where")
}

// maxProof is how many files, at most, are listed to say how far the log goes on
// behind a hole: as many as come with one request.
const maxProof = 1000

// overtaken fails if the archive has something of n's timeline that shows that n
// was complete. The first such file is proof: what goes wrong afterwards, while
// others are listed for the message, changes nothing.
func overtaken(ctx context.Context, r *repo.Repo, a repo.Archive, n pg.WALName) error {
	var first, last pg.WALName
	count := 0
	for f, err := range r.ListWAL(ctx, a, n.Timeline, n) {
		if err != nil && count == 0 {
			return err
		}
		if err != nil || count == maxProof {
			break
		}
		if f.Kind != pg.History && (n.Kind == pg.History || f.Segment() > n.Segment()) {
			first, last = cmp.Or(first, f), f
			count++
		}
	}
	if count == 0 {
		return nil
	}
	return hole(first, last)
}

// A history says where a timeline comes from.
type history struct {
	name  pg.WALName
	forks []pg.Fork
}

// histories yields those that the archive has of timelines after t, in their
// order. It goes from timeline to timeline by listing: a history that is missing
// hides none behind it. After an error it yields nothing more.
func histories(ctx context.Context, r *repo.Repo, a repo.Archive, t pg.Timeline) iter.Seq2[history, error] {
	return func(yield func(history, error) bool) {
		for {
			n, err := beyond(ctx, r, a, t)
			if err != nil {
				yield(history{}, err)
				return
			}
			if n == (pg.WALName{}) {
				return
			}
			t = n.Timeline
			if n.Kind != pg.History { // it would come first
				continue
			}
			var text bytes.Buffer
			if err := r.ReadWAL(ctx, a, n, &text); err != nil {
				if errors.Is(err, store.ErrNotExist) { // it was listed just now
					err = fmt.Errorf("%v is listed, and cannot be read: %v: %w", n, err, fail.Corrupt)
				}
				yield(history{}, err)
				return
			}
			forks, err := pg.ParseHistory(t, text.String())
			if err != nil {
				yield(history{}, fmt.Errorf("%w: %w", err, fail.Corrupt))
				return
			}
			if !yield(history{n, forks}, nil) {
				return
			}
		}
	}
}

// beyond is the first file of the next timeline after t of which there is any;
// zero if there is none.
func beyond(ctx context.Context, r *repo.Repo, a repo.Archive, t pg.Timeline) (pg.WALName, error) {
	last, err := pg.ParseWALName(t.String() + "FFFFFFFFFFFFFFFF.partial") // no file of t sorts behind it
	if err != nil {
		return pg.WALName{}, err
	}
	for n, err := range r.ListWAL(ctx, a, 0, last) {
		return n, err
	}
	return pg.WALName{}, nil
}

// hole is the error that a file is missing which the archive must have had: it
// holds the files first and last, which come later.
func hole(first, last pg.WALName) error {
	return fail.Hint(&holeError{first, last},
		"bring the missing file back if a server or a copy of the bucket still has it; PostgreSQL must not open with fewer rows")
}

type holeError struct{ first, last pg.WALName }

func (h *holeError) Error() string {
	if h.first == h.last {
		return fmt.Sprintf("it is missing, though the archive holds %v: %v", h.last, fail.Corrupt)
	}
	return fmt.Sprintf("it is missing, though the archive holds %v, and after the hole %v first: %v", h.last, h.first, fail.Corrupt)
}

func (h *holeError) Unwrap() error { return fail.Corrupt }

// known fails when the archive holds nothing at all of this server: it is
// another's, or the configuration names another cluster.
func known(ctx context.Context, r *repo.Repo, a repo.Archive) error {
	for _, err := range r.ListWAL(ctx, a, 0, pg.WALName{}) {
		return err
	}
	return fail.Hint(fmt.Errorf("cluster %q has no WAL of system %v, PostgreSQL %d: %w", a.Cluster, a.System, a.Major, fail.WrongSystem),
		"is this the right cluster, and the right repository? Without any archive, leave restore_command out")
}
