package lab

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// A ProxyMode says what a Proxy does with connections.
type ProxyMode int

const (
	Pass      ProxyMode = iota
	BlackHole           // connections stay open and are taken, no byte moves; Pass lets them go on
	Reset               // those open are reset, so is each new one
	Refuse              // those open are reset, nobody listens
)

// A Proxy stands between a client and a server and can have an outage. Its
// methods may be called concurrently.
type Proxy struct {
	Addr string // host:port where it listens

	// Sent and Received count the bytes passed on to the server and from it.
	Sent, Received atomic.Int64
	// Rate is how many bytes a second pass in each direction of a connection.
	// 0: as many as come.
	Rate atomic.Int64
	// Delay is how much later bytes arrive, in nanoseconds, each way: half of a
	// round trip. New connections heed it. To connect takes no time.
	Delay atomic.Int64

	target string
	wg     sync.WaitGroup

	mu       sync.Mutex
	mode     ProxyMode
	changed  chan struct{} // closed when mode does
	listener net.Listener  // nil while refusing
	conns    map[*net.TCPConn]bool
	closed   bool
}

// StartProxy listens on a loopback port for target, a host:port.
func StartProxy(target string) (*Proxy, error) {
	p := &Proxy{target: target, Addr: "127.0.0.1:0", changed: make(chan struct{}), conns: make(map[*net.TCPConn]bool)}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err := p.listen(); err != nil {
		return nil, fmt.Errorf("start proxy: %w", err)
	}
	p.Addr = p.listener.Addr().String()
	return p, nil
}

// ProxyForTest starts a proxy for the time of the test.
func ProxyForTest(t testing.TB, target string) *Proxy {
	t.Helper()
	p, err := StartProxy(target)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}

// Set changes the mode.
func (p *Proxy) Set(mode ProxyMode) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.set(mode)
	if mode != Refuse && p.listener == nil && !p.closed {
		if err := p.listen(); err != nil {
			return fmt.Errorf("proxy: %w", err)
		}
	}
	return nil
}

// Close ends the proxy and all connections through it.
func (p *Proxy) Close() {
	p.mu.Lock()
	p.closed = true
	p.set(Refuse)
	p.mu.Unlock()
	p.wg.Wait()
}

func (p *Proxy) set(mode ProxyMode) {
	p.mode = mode
	close(p.changed)
	p.changed = make(chan struct{})
	if mode == Reset || mode == Refuse {
		for c := range p.conns {
			c.SetLinger(0) // a reset, not an orderly end
			c.Close()
		}
	}
	if mode == Refuse && p.listener != nil {
		p.listener.Close()
		p.listener = nil
	}
}

func (p *Proxy) listen() error {
	l, err := net.Listen("tcp", p.Addr)
	if err != nil {
		return err
	}
	p.listener = l
	p.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			p.wg.Go(func() { p.serve(c.(*net.TCPConn)) })
		}
	})
	return nil
}

func (p *Proxy) serve(client *net.TCPConn) {
	defer p.forget(client)
	if !p.keep(client) || p.wait() != nil {
		return
	}
	c, err := net.Dial("tcp", p.target)
	if err != nil {
		client.SetLinger(0)
		return
	}
	server := c.(*net.TCPConn)
	defer p.forget(server)
	if !p.keep(server) {
		return
	}
	var wg sync.WaitGroup
	wg.Go(func() { p.pump(server, client, &p.Sent) })
	p.pump(client, server, &p.Received)
	wg.Wait()
}

// pump moves bytes until one side ends, and then ends the other's input.
func (p *Proxy) pump(dst, src *net.TCPConn, count *atomic.Int64) {
	var from io.Reader = src
	if delay := time.Duration(p.Delay.Load()); delay > 0 {
		done := make(chan struct{})
		defer close(done)
		l := &line{arriving: make(chan arrival, 256)}
		p.wg.Go(func() { l.carry(src, delay, done) })
		from = l
	}
	buf := make([]byte, 64<<10)
	for {
		rate := p.Rate.Load()
		some := buf
		if rate > 0 {
			some = buf[:min(int64(len(buf)), max(1, rate/20))]
		}
		n, err := from.Read(some)
		if rate > 0 {
			time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
		}
		if werr := p.wait(); werr != nil {
			return
		}
		if n > 0 {
			count.Add(int64(n)) // before they can be seen to have passed
			if _, werr := dst.Write(buf[:n]); werr != nil {
				src.Close()
				return
			}
		}
		if errors.Is(err, io.EOF) {
			dst.CloseWrite()
			return
		}
		if err != nil {
			dst.SetLinger(0)
			dst.Close()
			return
		}
	}
}

// A line yields what was read from a connection a while ago.
type line struct {
	arriving chan arrival
	arrival
}

type arrival struct {
	b   []byte
	err error // after b
	due time.Time
}

// carry reads src until it ends or nobody wants to know.
func (l *line) carry(src io.Reader, delay time.Duration, done <-chan struct{}) {
	for {
		b := make([]byte, 64<<10)
		n, err := src.Read(b)
		select {
		case l.arriving <- arrival{b[:n], err, time.Now().Add(delay)}:
		case <-done:
			return
		}
		if err != nil {
			return
		}
	}
}

func (l *line) Read(p []byte) (int, error) {
	if len(l.b) == 0 {
		if l.err != nil {
			return 0, l.err
		}
		l.arrival = <-l.arriving
		time.Sleep(time.Until(l.due))
	}
	n := copy(p, l.b)
	if l.b = l.b[n:]; len(l.b) > 0 {
		return n, nil
	}
	return n, l.err
}

// keep notes a connection, or resets it if this is not the time for one.
func (p *Proxy) keep(c *net.TCPConn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns[c] = true
	if p.mode == Reset || p.mode == Refuse {
		c.SetLinger(0)
		return false
	}
	return true
}

func (p *Proxy) forget(c *net.TCPConn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	c.Close()
}

// wait returns nil as soon as bytes may pass.
func (p *Proxy) wait() error {
	for {
		p.mu.Lock()
		mode, changed := p.mode, p.changed
		p.mu.Unlock()
		switch mode {
		case Pass:
			return nil
		case BlackHole:
			<-changed
		default:
			return errors.New("no connections")
		}
	}
}
