package audit

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// An Odd object stands in an archive and can be no file of it. It counts as
// missing.
type Odd struct {
	Key string `json:"key"`
	Why string `json:"why"`
}

// Oddities are the odd objects of an archive.
type Oddities struct {
	Told  []Odd // the first of them, at most a hundred
	Count int   // of all
	Bad   error // of the first that is damaged; nil: none is
}

// maxOdd is how many odd objects a survey tells of.
const maxOdd = 100

func (o *Oddities) add(key, why string) {
	o.Count++
	if len(o.Told) < maxOdd {
		o.Told = append(o.Told, Odd{key, why})
	}
}

// leap is how many segments that are known already are worth another request:
// a request lists a thousand objects anyway.
const leap = 1000

// Survey lists an archive. Long ranges of known, the ledger of an earlier
// survey, are taken as they were: to list an archive of years costs little, and
// a segment that was lost in the middle of such a range is not noticed. The
// zero ledger lists everything. It reads the histories that are not known, and of
// the segments the first. One that is damaged is odd, and the survey goes on, however
// many there are. Nothing may be let go on a ledger with damage. It is an error if
// there are segments, and none says how long they are.
func Survey(ctx context.Context, r *repo.Repo, a repo.Archive, known Ledger) (l Ledger, odd Oddities, err error) {
	l = Ledger{Archive: a}
	gone, err := r.Expiry(ctx, a)
	if err != nil {
		return l, odd, err
	}
	var after pg.WALName
	var unread []repo.WALObject // behind many that are damaged
	var asked int               // how many were to say how long a segment is
	var mute error              // of the first that does not
	for again := true; again; {
		again = false
		for o, err := range r.WALObjects(ctx, a, after) {
			if err != nil {
				return l, odd, err
			}
			if over, to, ok := known.over(o.Name, gone); ok {
				l.SegmentSize = known.SegmentSize
				t := l.timeline(o.Name.Timeline)
				t.add(over)
				after, again = to, true
				break
			}
			sized := l.SegmentSize == 0 && o.Stored > 0 && (o.Name.Kind == pg.Segment || o.Name.Kind == pg.Partial)
			if sized && asked == maxOdd { // so many are no accident: nobody is to read them all
				unread = append(unread, o)
				continue
			}
			if sized {
				asked++
			}
			why, err := l.enter(ctx, r, o, known)
			if Damaged(err) {
				odd.Bad = cmp.Or(odd.Bad, err)
				if sized {
					mute = cmp.Or(mute, err)
				}
				why, err = err.Error(), nil
				if o.Name.Kind == pg.History {
					t := l.timeline(o.Name.Timeline)
					t.Lost, t.LostKey = o.Modified, o.Key
				}
			}
			if err != nil {
				return l, odd, err
			}
			if why != "" {
				odd.add(o.Key, why)
			}
		}
	}
	for asked = 0; l.SegmentSize == 0 && asked < maxOdd && len(unread) > 0; asked++ { // the newest are the most likely to be whole
		o := unread[len(unread)-1]
		why, err := l.enter(ctx, r, o, known)
		if err != nil && !Damaged(err) {
			return l, odd, err
		}
		if err != nil {
			why = err.Error()
		}
		if why != "" {
			odd.add(o.Key, why)
		}
		unread = unread[:len(unread)-1]
	}
	if l.SegmentSize == 0 && mute != nil {
		return l, odd, fail.Hint(fmt.Errorf("system %v, PostgreSQL %d: of no archived segment can it be read how long it is, such as %w", a.System, a.Major, mute),
			"something has damaged the archive in the bucket; if it keeps older versions, bring them back. What is archived from now on is good again with a new physical backup, once the damaged objects are gone")
	}
	for _, o := range unread { // taken by their names, like all that come after the first that can be read
		if err := l.add(o.Name, o.Modified, o.Stored); err != nil {
			odd.add(o.Key, err.Error())
		}
	}
	if gone, err = r.Expiry(ctx, a); err != nil { // what went while it was listed is no hole
		return l, odd, err
	}
	for _, f := range gone.Floors {
		l.timeline(f.Timeline).Floor = f.From
	}
	return l, odd, nil
}

// Damaged reports whether err says of one object that it is of no use, or gone
// since it was listed, and nothing of the store.
func Damaged(err error) bool {
	for _, k := range []error{fail.Corrupt, fail.WrongSystem, fail.Untrusted, store.ErrNotExist} {
		if errors.Is(err, k) {
			return true
		}
	}
	return false
}

// over finds the range of l in which a segment stands with many behind it, and
// the last of these. What was let go since is not over.
func (l Ledger) over(n pg.WALName, gone repo.Expiry) (over Range, last pg.WALName, ok bool) {
	if n.Kind != pg.Segment || l.SegmentSize == 0 {
		return Range{}, pg.WALName{}, false
	}
	start, err := n.Start(l.SegmentSize)
	if err != nil || start < gone.Floor(n.Timeline) {
		return Range{}, pg.WALName{}, false
	}
	for _, r := range l.of(n.Timeline).Ranges {
		if r.From <= start && start < r.To && (Range{From: start, To: r.To}).Segments(l.SegmentSize) > leap {
			name, _ := pg.SegmentName(n.Timeline, r.To-1, l.SegmentSize) // the size is valid
			last, err := pg.ParseWALName(name)
			r.Bytes = int64(float64(r.Bytes) * float64(r.To-start) / float64(r.To-r.From))
			r.From = start
			return r, last, err == nil
		}
	}
	return Range{}, pg.WALName{}, false
}

// enter adds an object to l, or says why it can be no file of the archive.
func (l *Ledger) enter(ctx context.Context, r *repo.Repo, o repo.WALObject, known Ledger) (why string, err error) {
	switch {
	case o.Name == (pg.WALName{}):
		return "PostgreSQL names no file so", nil
	case o.Stored == 0:
		return "nothing is in it", nil
	case o.Name.Kind == pg.History:
		forks := known.of(o.Name.Timeline).Forks
		if len(forks) == 0 {
			if forks, err = readHistory(ctx, r, l.Archive, o.Name); err != nil {
				return "", err
			}
		}
		l.AddHistory(o.Name.Timeline, forks, o.Modified)
		return "", nil
	case l.SegmentSize == 0 && o.Name.Kind == pg.BackupHistory:
		return "", nil // it comes before the first segment
	case l.SegmentSize == 0:
		size, err := r.WALSize(ctx, l.Archive, o)
		if err != nil {
			return "", err
		}
		if !pg.SegmentSize(size).Valid() {
			return "", fmt.Errorf("%v: %d bytes, and no segment has so many: %w", o.Name, size, fail.Corrupt)
		}
		l.SegmentSize = pg.SegmentSize(size)
	}
	if err := l.add(o.Name, o.Modified, o.Stored); err != nil {
		return err.Error(), nil
	}
	return "", nil
}

func readHistory(ctx context.Context, r *repo.Repo, a repo.Archive, n pg.WALName) ([]pg.Fork, error) {
	var text bytes.Buffer
	if err := r.ReadWAL(ctx, a, n, &text); err != nil {
		return nil, err
	}
	forks, err := pg.ParseHistory(n.Timeline, text.String())
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, fail.Corrupt)
	}
	return forks, nil
}
