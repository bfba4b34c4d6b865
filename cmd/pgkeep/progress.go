package main

import (
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/schollz/progressbar/v3"
	"golang.org/x/term"
)

// A progress shows how far a long work has come: a bar on a terminal, elsewhere
// a line now and then. It may be used from several goroutines.
type progress struct {
	what  string
	w     io.Writer
	began time.Time
	bar   *progressbar.ProgressBar // nil if w is not a terminal

	mu          sync.Mutex
	done, total int64
	said        time.Time // when the last line was written
	ended       bool
}

// lineEvery is how often a line is written where there is no terminal.
const lineEvery = 5 * time.Second

// progress begins to show a work of total bytes, 0 if that is not known yet.
func (e *env) progress(what string, total int64) *progress {
	p := &progress{what: what, w: e.errw, began: time.Now(), total: total}
	p.said = p.began
	if f, ok := e.errw.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		p.bar = progressbar.NewOptions64(barTotal(total),
			progressbar.OptionSetWriter(f),
			progressbar.OptionSetDescription(what),
			progressbar.OptionShowBytes(true),
			progressbar.OptionShowCount(),
			progressbar.OptionUseIECUnits(true),
			progressbar.OptionThrottle(100*time.Millisecond),
			progressbar.OptionSetWidth(30),
			progressbar.OptionSetPredictTime(true),
			progressbar.OptionSetElapsedTime(false),
			progressbar.OptionClearOnFinish(),
			progressbar.OptionSpinnerType(14),
		)
	}
	return p
}

// barTotal is total for the bar, which shows a spinner for -1.
func barTotal(total int64) int64 {
	if total <= 0 {
		return -1
	}
	return total
}

// Set says that done bytes of total are done, counted from the beginning. Its
// form is that of the callbacks that verbs take.
func (p *progress) Set(done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return
	}
	if p.bar != nil && total != p.total {
		p.bar.ChangeMax64(barTotal(total))
	}
	p.done, p.total = done, total
	if p.bar != nil {
		_ = p.bar.Set64(done) // a terminal that went away stops no work
		return
	}
	if now := time.Now(); now.Sub(p.said) >= lineEvery {
		p.said = now
		fmt.Fprintf(p.w, "pgkeep: %s: %s, %s/s\n", p.what, share(p.done, p.total), p.rate(now))
	}
}

// End takes the bar away and says what was done, in what time.
func (p *progress) End() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ended {
		return
	}
	p.ended = true
	if p.bar != nil {
		_ = p.bar.Finish()
	}
	if p.done == 0 { // over before it told anything
		return
	}
	now := time.Now()
	fmt.Fprintf(p.w, "pgkeep: %s: %s in %s, %s/s\n", p.what, size(p.done), span(now.Sub(p.began)), p.rate(now))
}

func (p *progress) rate(now time.Time) string {
	seconds := max(now.Sub(p.began).Seconds(), 0.001)
	return size(int64(float64(p.done) / seconds))
}

// stages shows the progress of a work that has several, one after the other. It
// may be used from several goroutines.
type stages struct {
	e *env

	mu   sync.Mutex
	name string
	bar  *progress // nil: none has begun
}

// Set is Set of the stage's progress; another name ends the one before.
func (s *stages) Set(name string, done, total int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.bar == nil || name != s.name {
		s.end()
		s.name, s.bar = name, s.e.progress(name, total)
	}
	s.bar.Set(done, total)
}

// End ends the last stage.
func (s *stages) End() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.end()
}

func (s *stages) end() {
	if s.bar != nil {
		s.bar.End()
	}
	s.bar = nil
}
