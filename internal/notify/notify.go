// Package notify tells people how runs end: a webhook of theirs, and a watch
// that raises the alarm when it hears nothing. The URLs are secrets, and stand in
// no error.
package notify

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// A Notice is what there is to tell about a run. As JSON it is the body that a
// webhook gets, with "text" and "schema" beside it; "text" is a line that Slack
// shows.
type Notice struct {
	Cluster string    `json:"cluster"`
	Kind    string    `json:"kind"` // physical, logical, restore-test, wal-audit or expire
	Host    string    `json:"host"`
	Backup  string    `json:"backup,omitempty"`
	Outcome Outcome   `json:"outcome"`
	Stage   string    `json:"stage,omitempty"`   // during which it failed
	Failure string    `json:"failure,omitempty"` // what happened, and its kind
	Reason  fail.Kind `json:"reason,omitempty"`
	Run     string    `json:"run"` // workflow id and run id, with a slash between
	Ended   time.Time `json:"ended"`
}

// An Outcome is how a run ended.
type Outcome string

const (
	Done      Outcome = "done"
	Failed    Outcome = "failed"
	Cancelled Outcome = "cancelled"
)

// Text is the notice for people: one line.
func (n Notice) Text() string {
	var b strings.Builder
	fmt.Fprintf(&b, "pgkeep: %s of %s on %s %s", what(n.Kind), n.Cluster, n.Host, n.Outcome)
	if n.Stage != "" && n.Outcome != Done {
		fmt.Fprintf(&b, " during %s", n.Stage)
	}
	if n.Failure != "" {
		b.WriteString(": " + strings.ReplaceAll(n.Failure, "\n", "; "))
	}
	if n.Backup != "" {
		fmt.Fprintf(&b, " (%s)", n.Backup)
	}
	return b.String()
}

func what(kind string) string {
	switch kind {
	case "physical", "logical":
		return kind + " backup"
	case "wal-audit":
		return "audit of the archive"
	}
	return kind
}

// marked writes text as Slack and its like read it: what happened may hold a <, and
// must not become a link or call a whole channel. See
// https://docs.slack.dev/messaging/formatting-message-text, "Escaping text".
var marked = strings.NewReplacer("&", "&amp;", "<", "&lt;", ">", "&gt;")

// A Notifier knows whom to tell. Nil tells nobody.
type Notifier struct {
	webhook, ping string
	all           bool
	client        *http.Client
}

// New makes a Notifier. The webhook, if it is not "", hears of every run that
// does not end well; with all, of the others too. The ping, if it is not "", is
// asked for after every run that ends well, with its {cluster} and {kind} filled
// in. An address that is none is fail.BadConfig.
func New(webhook, ping string, all bool) (*Notifier, error) {
	for what, address := range map[string]string{"webhook": webhook, "ping": ping} {
		u, err := url.Parse(strings.NewReplacer("{cluster}", "c", "{kind}", "k").Replace(address))
		if address != "" && (err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "") {
			return nil, fmt.Errorf("the %s is no http or https URL: %w", what, fail.BadConfig) // which is not shown
		}
	}
	return &Notifier{webhook: webhook, ping: ping, all: all, client: &http.Client{
		Timeout:       15 * time.Second,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }, // the address is for nobody else
	}}, nil
}

// GoString hides the addresses, as String does.
func (n *Notifier) GoString() string { return "notify.Notifier" }

// String hides the addresses.
func (n *Notifier) String() string { return "notify.Notifier" }

// Call calls the webhook, if there is one that is to hear of it. An error that
// another try does not mend is of kind fail.BadConfig.
func (n *Notifier) Call(ctx context.Context, about Notice) error {
	if n == nil || n.webhook == "" || about.Outcome == Done && !n.all {
		return nil
	}
	body, err := json.Marshal(struct {
		Text   string `json:"text"`
		Schema string `json:"schema"`
		Notice
	}{marked.Replace(about.Text()), "pgkeep.notice/1", about})
	if err == nil {
		err = n.send(ctx, http.MethodPost, n.webhook, body)
	}
	if err != nil {
		return fmt.Errorf("call the webhook: %w", err)
	}
	return nil
}

// Ping tells the watch, if there is one, of a run that ended well. Its errors are
// as those of Call.
func (n *Notifier) Ping(ctx context.Context, about Notice) error {
	if n == nil || n.ping == "" || about.Outcome != Done {
		return nil
	}
	address := strings.NewReplacer("{cluster}", url.PathEscape(about.Cluster), "{kind}", url.PathEscape(about.Kind)).Replace(n.ping)
	if err := n.send(ctx, http.MethodGet, address, nil); err != nil {
		return fmt.Errorf("ping the watch: %w", err)
	}
	return nil
}

func (n *Notifier) send(ctx context.Context, method, address string, body []byte) error {
	req, err := http.NewRequestWithContext(ctx, method, address, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("the address is no URL: %w", fail.BadConfig)
	}
	req.Header.Set("User-Agent", "pgkeep")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := n.client.Do(req)
	if wrapped, ok := errors.AsType[*url.Error](err); ok {
		err = wrapped.Err // the rest is the address
	}
	if err != nil {
		return hidden(err)
	}
	defer resp.Body.Close()
	io.Copy(io.Discard, io.LimitReader(resp.Body, 64<<10)) // so that the connection can be used again
	switch code := resp.StatusCode; {
	case code >= 200 && code < 300:
		return nil
	case code >= 500, code == http.StatusRequestTimeout, code == http.StatusTooManyRequests:
		return fmt.Errorf("status %d", code)
	default:
		return fmt.Errorf("status %d: %w", code, fail.BadConfig)
	}
}

// hidden says what went wrong on the way without the name of who was called.
func hidden(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return err
	}
	if dns, ok := errors.AsType[*net.DNSError](err); ok {
		if dns.IsNotFound {
			return errors.New("its name is not known to DNS")
		}
		return errors.New("DNS does not answer")
	}
	if _, ok := errors.AsType[*tls.CertificateVerificationError](err); ok {
		return errors.New("its certificate is not to be trusted")
	}
	if errors.Is(err, http.ErrSchemeMismatch) {
		return errors.New("it does not speak TLS")
	}
	if t, ok := errors.AsType[net.Error](err); ok && t.Timeout() {
		return errors.New("no answer in time")
	}
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return errors.New("the connection was refused")
	case errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.ENETUNREACH):
		return errors.New("there is no way to its host")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		return errors.New("the connection was cut")
	}
	return errors.New("no connection")
}
