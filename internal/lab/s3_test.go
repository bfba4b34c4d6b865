package lab_test

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/lab"
)

func TestS3Restarts(t *testing.T) {
	s := lab.S3ForTest(t)
	dir := s.Dir
	for range 2 {
		if _, err := net.Dial("tcp", s.Addr); err != nil {
			t.Errorf("running: %v", err)
		}
		s.Kill()
		if _, err := net.Dial("tcp", s.Addr); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("killed: err = %v, want %v", err, syscall.ECONNREFUSED)
		}
		if err := s.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Stop(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("stopped: its directory is still there (%v)", err)
	}
}

func TestProxyModes(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() { // an echo, ended by closing the listener
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	p := lab.ProxyForTest(t, l.Addr().String())
	dial := func() net.Conn {
		t.Helper()
		c, err := net.Dial("tcp", p.Addr)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c
	}
	set := func(m lab.ProxyMode) {
		t.Helper()
		if err := p.Set(m); err != nil {
			t.Fatal(err)
		}
	}
	echo := func(c net.Conn) error {
		buf := make([]byte, 2)
		if _, err := c.Write([]byte("hi")); err != nil {
			return err
		}
		c.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
		_, err := io.ReadFull(c, buf)
		if err == nil && !bytes.Equal(buf, []byte("hi")) {
			t.Errorf("echo = %q", buf)
		}
		return err
	}

	c := dial()
	if err := echo(c); err != nil || p.Sent.Load() != 2 || p.Received.Load() != 2 {
		t.Errorf("pass: %v, %d bytes sent, %d received, want nil, 2, 2", err, p.Sent.Load(), p.Received.Load())
	}
	set(lab.BlackHole)
	if err := echo(c); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("black hole: err = %v, want a deadline exceeded", err)
	}
	set(lab.Pass)
	c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.ReadFull(c, make([]byte, 2)); err != nil {
		t.Errorf("after the black hole: %v", err)
	}
	set(lab.Reset)
	if err := echo(c); !isReset(err) {
		t.Errorf("reset: err = %v, want a reset", err)
	}
	c, err = net.Dial("tcp", p.Addr)
	if err == nil { // the reset may come even sooner
		defer c.Close()
		err = echo(c)
	}
	if !isReset(err) {
		t.Errorf("reset, new connection: err = %v, want a reset", err)
	}
	set(lab.Refuse)
	if _, err := net.Dial("tcp", p.Addr); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("refuse: err = %v, want %v", err, syscall.ECONNREFUSED)
	}
	set(lab.Pass)
	if err := echo(dial()); err != nil {
		t.Errorf("pass again: %v", err)
	}
}

func isReset(err error) bool {
	return errors.Is(err, syscall.ECONNRESET) || errors.Is(err, syscall.EPIPE) || errors.Is(err, io.EOF)
}
