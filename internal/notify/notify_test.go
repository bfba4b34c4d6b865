package notify_test

import (
	"encoding/json"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/notify"
)

// Slack takes a POST of a JSON object with one line of text, in which three
// characters are escaped, and everything else in it is for other programs. It
// answers "ok", in plain text.
func TestAWebhookGetsWhatSlackShows(t *testing.T) {
	var method, kind, got string
	slack := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		method, kind, got = r.Method, r.Header.Get("Content-Type"), string(body)
		io.WriteString(w, "ok")
	}))
	defer slack.Close()
	n, err := notify.New(slack.URL+"/services/T/B/secret", "", false)
	if err != nil {
		t.Fatal(err)
	}
	err = n.Call(t.Context(), notify.Notice{Cluster: "main", Kind: "physical", Host: "db1", Outcome: notify.Failed, Stage: "copy", Reason: fail.StoreDown,
		Failure: "put <!channel> & more:\n503: store-down", Run: "pgkeep/main/physical/1", Ended: time.Date(2026, 11, 22, 1, 30, 0, 0, time.UTC)})
	if err != nil {
		t.Fatal(err)
	}
	if method != http.MethodPost || kind != "application/json" {
		t.Errorf("asked with %s, %s", method, kind)
	}
	var body map[string]any
	if err := json.Unmarshal([]byte(got), &body); err != nil {
		t.Fatalf("%v in %s", err, got)
	}
	want := map[string]any{
		"text":   "pgkeep: physical backup of main on db1 failed during copy: put &lt;!channel&gt; &amp; more:; 503: store-down",
		"schema": "pgkeep.notice/1", "cluster": "main", "kind": "physical", "host": "db1", "outcome": "failed", "stage": "copy", "reason": "store-down",
		"failure": "put <!channel> & more:\n503: store-down", "run": "pgkeep/main/physical/1", "ended": "2026-11-22T01:30:00Z",
	}
	if diff := cmp.Diff(want, body); diff != "" {
		t.Errorf("the body differs (-want +got):\n%s", diff)
	}
}

// What went wrong on the way is named, and the address is not.
func TestTheFaultIsNamedAndTheAddressIsNot(t *testing.T) {
	closed := httptest.NewServer(nil)
	closed.Close()
	untrusted := httptest.NewTLSServer(nil)
	defer untrusted.Close()
	untrusted.Config.ErrorLog = log.New(io.Discard, "", 0)
	plain := httptest.NewServer(nil)
	defer plain.Close()
	cut := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }))
	defer cut.Close()
	for address, want := range map[string]string{
		"http://t0ps3cr3t.invalid/T0pS3cr3t":                           "DNS",
		closed.URL + "/T0pS3cr3t":                                      "refused",
		untrusted.URL + "/T0pS3cr3t":                                   "certificate",
		"https" + strings.TrimPrefix(plain.URL, "http") + "/T0pS3cr3t": "TLS",
		cut.URL + "/T0pS3cr3t":                                         "cut",
	} {
		n, err := notify.New(address, address, true)
		if err != nil {
			t.Fatal(err)
		}
		for what, err := range map[string]error{"call the webhook": n.Call(t.Context(), notify.Notice{Outcome: notify.Done}), "ping the watch": n.Ping(t.Context(), notify.Notice{Outcome: notify.Done})} {
			if err == nil || !strings.Contains(err.Error(), what) || !strings.Contains(err.Error(), want) || strings.Contains(strings.ToLower(err.Error()), "s3cr3t") || strings.Contains(err.Error(), "127.0.0.1") {
				t.Errorf("%s: got %v", want, err)
			}
		}
	}
}
