package lab_test

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/lab"
)

func TestProxyDelaysEachWay(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		if c, err := l.Accept(); err == nil {
			io.Copy(c, c)
			c.Close()
		}
	}()
	p := lab.ProxyForTest(t, l.Addr().String())
	const delay = 30 * time.Millisecond
	p.Delay.Store(int64(delay))
	c, err := net.Dial("tcp", p.Addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	sent := bytes.Repeat([]byte("round and round "), 1<<16)
	began := time.Now()
	go func() {
		c.Write(sent)
		c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if took := time.Since(began); took < 2*delay {
		t.Errorf("back after %v", took)
	}
	if err != nil || !bytes.Equal(got, sent) {
		t.Errorf("%d bytes came back of %d: %v", len(got), len(sent), err)
	}
}
