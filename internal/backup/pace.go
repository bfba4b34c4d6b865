package backup

import (
	"context"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Pace says how hard a physical backup may read. The zero Pace is as fast as
// it goes.
type Pace struct {
	Rate       int64         // bytes a second; 0: no limit
	MaxLag     int64         // bytes that a streaming standby may be behind; beyond, reading pauses. 0: not looked at
	MaxLatency time.Duration // that 1 MiB may take to read; beyond, reading slows down. 0: not looked at
}

// A governor holds readers to a Pace.
type governor struct {
	pace   Pace
	rate   *rate.Limiter // nil: no limit
	paused atomic.Bool   // a standby is too far behind
	slow   atomic.Int64  // nanoseconds to rest after each MiB: the disk is busy with others
}

func newGovernor(p Pace) *governor {
	g := &governor{pace: p}
	if p.Rate > 0 {
		g.rate = rate.NewLimiter(rate.Limit(p.Rate), int(max(p.Rate/4, 1<<20)))
	}
	return g
}

// timed is src, and tells how long each read took.
func (g *governor) timed(src repo.Source) repo.Source {
	if g.pace.MaxLatency == 0 {
		return src
	}
	return timedSource{src, g}
}

type timedSource struct {
	repo.Source
	governor *governor
}

func (s timedSource) ReadAt(b []byte, off int64) (int, error) {
	begun := time.Now()
	n, err := s.Source.ReadAt(b, off)
	s.governor.took(int64(n), time.Since(begun))
	return n, err
}

// Damaged passes on what the source knows.
func (s timedSource) Damaged() []int64 {
	if src, ok := s.Source.(interface{ Damaged() []int64 }); ok {
		return src.Damaged()
	}
	return nil
}

// wait returns when n more bytes may be read, or with the error of ctx.
func (g *governor) wait(ctx context.Context, n int64) error {
	if g.rate != nil {
		for n > 0 {
			part := min(n, int64(g.rate.Burst()))
			if err := g.rate.WaitN(ctx, int(part)); err != nil {
				return err
			}
			n -= part
		}
	}
	for g.paused.Load() {
		if err := rest(ctx, 200*time.Millisecond); err != nil {
			return err
		}
	}
	return rest(ctx, time.Duration(g.slow.Load()*n>>20))
}

// lagging notes how far the standby that is most behind is, and reports whether
// reading pauses for that.
func (g *governor) lagging(bytes int64) bool {
	pauses := g.pace.MaxLag > 0 && bytes > g.pace.MaxLag
	g.paused.Store(pauses)
	return pauses
}

// took notes how long reading took. The rest after each MiB grows while reads
// are slower than they may be, and shrinks while they are not.
func (g *governor) took(n int64, d time.Duration) {
	if g.pace.MaxLatency == 0 || n == 0 {
		return
	}
	g.slow.Store(nextRest(time.Duration(g.slow.Load()), time.Duration(int64(d)*(1<<20)/n), g.pace.MaxLatency))
}

// nextRest is the pure part of took: in nanoseconds.
func nextRest(rest, latency, limit time.Duration) int64 {
	if latency > limit {
		return int64(min(max(2*rest, limit/4), 10*limit))
	}
	return int64(rest * 7 / 8)
}

func rest(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return ctx.Err()
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
