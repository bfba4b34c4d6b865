package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/pgkeep/pgkeep/internal/lab"
)

// A gate stands between the programs and the S3 server. It passes every request
// on, until one asks for a certain file of the archive.
type gate struct {
	endpoint string
	caFile   string
	server   *http.Server
	done     chan error

	mu    sync.Mutex
	name  string // of the file
	fault handler
	hit   bool
}

// A handler answers a request in place of the server. named says that it asks
// for the file, and not for another one after that. It returns false for a
// request that is to pass.
type handler func(w http.ResponseWriter, r *http.Request, named bool) bool

func openGate(dir string, s3 *lab.S3) (*gate, error) {
	ca, err := lab.NewCA(dir)
	if err != nil {
		return nil, err
	}
	cert, key, err := ca.Issue("gate", "127.0.0.1", "localhost")
	if err != nil {
		return nil, err
	}
	target, err := url.Parse(s3.Endpoint)
	if err != nil {
		return nil, err
	}
	pem, err := os.ReadFile(s3.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	pass := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.SetURL(target)
			r.Out.Host = r.In.Host // which the client signed
		},
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}, DisableCompression: true},
		ErrorLog:  log.New(io.Discard, "", 0), // of clients that left
	}
	g := &gate{endpoint: "https://" + l.Addr().String(), caFile: ca.File, done: make(chan error, 1)}
	g.server = &http.Server{ErrorLog: pass.ErrorLog, TLSNextProto: map[string]func(*http.Server, *tls.Conn, http.Handler){}} // HTTP/1.1: a connection can be taken over
	g.server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !g.faulty(w, r) {
			pass.ServeHTTP(w, r)
		}
	})
	go func() { g.done <- g.server.ServeTLS(l, cert, key) }()
	return g, nil
}

func (g *gate) faulty(w http.ResponseWriter, r *http.Request) bool {
	g.mu.Lock()
	named := g.name != "" && strings.Contains(r.URL.Path+"?"+r.URL.RawQuery, g.name)
	g.hit = g.hit || named
	fault := g.fault
	if !g.hit {
		fault = nil
	}
	g.mu.Unlock()
	return fault != nil && fault(w, r, named)
}

// set gives the gate a fault that begins with the first request for a file.
func (g *gate) set(name string, fault handler) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.name, g.fault, g.hit = name, fault, false
}

// asked reports whether somebody asked for the file since then.
func (g *gate) asked() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.hit
}

func (g *gate) close() error {
	err := g.server.Close()
	if served := <-g.done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// down resets the connection.
func down(w http.ResponseWriter, _ *http.Request, _ bool) bool {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		w.WriteHeader(http.StatusInternalServerError)
		return true
	}
	if c, ok := conn.(*tls.Conn); ok {
		c.NetConn().(*net.TCPConn).SetLinger(0)
		c.NetConn().Close()
	}
	return true
}

// denied answers as S3 does when the keys are no longer good for anything.
func denied(w http.ResponseWriter, _ *http.Request, _ bool) bool {
	answer(w, http.StatusForbidden, "AccessDenied", "Access Denied")
	return true
}

// broken cannot read one object.
func broken(w http.ResponseWriter, _ *http.Request, named bool) bool {
	if named {
		answer(w, http.StatusInternalServerError, "InternalError", "We encountered an internal error. Please try again.")
	}
	return named
}

// slow lets everything wait for that long.
func slow(wait time.Duration) handler {
	return func(_ http.ResponseWriter, r *http.Request, _ bool) bool {
		ctx, cancel := context.WithTimeout(r.Context(), wait)
		defer cancel()
		<-ctx.Done()
		return false
	}
}

func answer(w http.ResponseWriter, status int, code, message string) {
	w.Header().Set("Content-Type", "application/xml")
	w.WriteHeader(status)
	fmt.Fprintf(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>%s</Code><Message>%s</Message></Error>`, code, message)
}
