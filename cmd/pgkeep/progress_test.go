package main

import (
	"bytes"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestProgressIsALineNowAndThenWhereThereIsNoTerminal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var errw bytes.Buffer
		p := (&env{errw: &errw}).progress("upload", 0)
		p.Set(1<<20, 0)
		time.Sleep(6 * time.Second) // nobody waits: the clock is the bubble's
		p.Set(6<<20, 12<<20)
		p.Set(7<<20, 12<<20)
		time.Sleep(6 * time.Second)
		p.Set(12<<20, 12<<20)
		p.End()
		p.Set(13<<20, 12<<20)
		p.End()
		want := `pgkeep: upload: 6.0 MiB of 12.0 MiB (50 %), 1.0 MiB/s
pgkeep: upload: 12.0 MiB of 12.0 MiB (100 %), 1.0 MiB/s
pgkeep: upload: 12.0 MiB in 12s, 1.0 MiB/s
`
		if errw.String() != want {
			t.Errorf("said\n%s, want\n%s", errw.String(), want)
		}
	})
}

func TestProgressFromSeveralGoroutines(t *testing.T) {
	var errw bytes.Buffer
	p := (&env{errw: &errw}).progress("verify", 100)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for n := range int64(100) {
				p.Set(n, 100)
			}
		})
	}
	wg.Wait()
	p.End()
}
