package activities

import (
	"sync"

	"github.com/pgkeep/pgkeep/internal/repo"
)

// A counter holds the furthest progress that several goroutines told of.
type counter struct {
	mu sync.Mutex
	p  repo.Progress
}

func (c *counter) set(p repo.Progress) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.p = repo.Progress{Read: max(c.p.Read, p.Read), Total: p.Total, Kept: max(c.p.Kept, p.Kept), Sent: max(c.p.Sent, p.Sent)}
}

func (c *counter) get() repo.Progress {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.p
}
