package backup

import (
	"context"
	"testing"
	"testing/synctest"
	"time"
)

func TestReadersKeepToTheirPace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGovernor(Pace{Rate: 10 << 20})
		begun := time.Now()
		for range 100 {
			if err := g.wait(t.Context(), 1<<20); err != nil {
				t.Fatal(err)
			}
		}
		if took := time.Since(begun); took < 9*time.Second || took > 11*time.Second {
			t.Errorf("100 MiB at 10 MiB a second took %v", took)
		}
	})
}

func TestReadingPausesForAStandby(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGovernor(Pace{MaxLag: 100})
		g.lagging(101)
		done := make(chan error)
		go func() { done <- g.wait(t.Context(), 1) }()
		time.Sleep(time.Minute) // of the bubble's clock
		select {
		case err := <-done:
			t.Fatalf("it went on: %v", err)
		default:
		}
		g.lagging(99)
		if err := <-done; err != nil {
			t.Error(err)
		}
		g.lagging(101)
		ctx, cancel := context.WithCancel(t.Context())
		go func() { done <- g.wait(ctx, 1) }()
		cancel()
		if err := <-done; err == nil {
			t.Error("cancelled, and it went on")
		}
	})
}

func TestSlowDisksAreSpared(t *testing.T) {
	const limit = 40 * time.Millisecond
	rest := time.Duration(0)
	for range 10 {
		rest = time.Duration(nextRest(rest, 2*limit, limit))
	}
	if rest != 10*limit {
		t.Errorf("after ten slow reads it rests %v", rest)
	}
	for range 100 {
		rest = time.Duration(nextRest(rest, limit, limit))
	}
	if rest > time.Microsecond {
		t.Errorf("after a hundred fast ones it rests %v", rest)
	}
}
