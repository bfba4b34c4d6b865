package restore

import (
	"context"
	"fmt"
	"io"
	"iter"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// ScanArchive is the Scan of a real archive. It reads one segment at a time, and
// no more than is asked for.
func ScanArchive(r *repo.Repo, l audit.Ledger) Scan {
	return func(ctx context.Context, w audit.Window, from, to pg.LSN, every bool) iter.Seq2[pg.WALRecord, error] {
		return func(yield func(pg.WALRecord, error) bool) {
			pr, pw := io.Pipe()
			done := make(chan struct{})
			defer func() { // whoever reads may stop early; whoever writes is waited for
				pr.Close()
				<-done
			}()
			go func() {
				defer close(done)
				for n := range w.Segments(l.SegmentSize, from, to) {
					if err := r.ReadWAL(ctx, l.Archive, n, pw); err != nil {
						pw.CloseWithError(err)
						return
					}
				}
				pw.Close()
			}()
			s := pg.NewWALScanner(pr)
			s.Every = every
			for {
				rec, err := s.Next()
				if err == io.EOF {
					break
				}
				if !yield(rec, err) || err != nil {
					return
				}
			}
			if err := s.Why(); err != nil { // archived segments are full to their end
				yield(pg.WALRecord{}, fmt.Errorf("read the archived log: %w: %w", err, fail.Corrupt))
			}
		}
	}
}
