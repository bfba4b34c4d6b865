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

// maxOdd is how many odd objects a survey tells of.
const maxOdd = 100

// leap is how many segments that are known already are worth another request:
// a request lists a thousand objects anyway.
const leap = 1000

// Survey lists an archive. Long ranges of known, the ledger of an earlier
// survey, are taken as they were: to list an archive of years costs little, and
// a segment that was lost in the middle of such a range is not noticed. The
// zero ledger lists everything. It reads the histories that are not known, and of
// the segments the first. One that is damaged is odd, and the survey goes on; bad is the
// error of the first of them. Nothing may be let go on such a ledger.
func Survey(ctx context.Context, r *repo.Repo, a repo.Archive, known Ledger) (l Ledger, odd []Odd, bad, err error) {
	l = Ledger{Archive: a}
	gone, err := r.Expiry(ctx, a)
	if err != nil {
		return l, odd, bad, err
	}
	var after pg.WALName
	for again := true; again; {
		again = false
		for o, err := range r.WALObjects(ctx, a, after) {
			if err != nil {
				return l, odd, bad, err
			}
			if over, to, ok := known.over(o.Name, gone); ok {
				l.SegmentSize = known.SegmentSize
				t := l.timeline(o.Name.Timeline)
				t.add(over)
				after, again = to, true
				break
			}
			why, err := l.enter(ctx, r, o, known)
			if Damaged(err) && len(odd) < maxOdd { // so many are no accident: nobody is to read them all
				bad = cmp.Or(bad, err)
				why, err = err.Error(), nil
				if o.Name.Kind == pg.History {
					t := l.timeline(o.Name.Timeline)
					t.Lost, t.LostKey = o.Modified, o.Key
				}
			}
			if err != nil {
				return l, odd, bad, err
			}
			if why != "" && len(odd) < maxOdd {
				odd = append(odd, Odd{o.Key, why})
			}
		}
	}
	if gone, err = r.Expiry(ctx, a); err != nil { // what went while it was listed is no hole
		return l, odd, bad, err
	}
	for _, f := range gone.Floors {
		l.timeline(f.Timeline).Floor = f.From
	}
	return l, odd, bad, nil
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
