package s3_test

import (
	"context"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/store/s3"
)

// A script is a service that gives one answer after the other, the last one
// for ever. No real service gives these on demand.
type script struct {
	mu      sync.Mutex
	answers []answer
	asked   []string // "PUT /bucket/key?query"
	bodies  int64
}

type answer func(w http.ResponseWriter, r *http.Request)

func (s *script) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	n, _ := io.Copy(io.Discard, r.Body)
	s.mu.Lock()
	s.asked = append(s.asked, r.Method+" "+r.URL.Path)
	s.bodies += n
	a := s.answers[0]
	if len(s.answers) > 1 {
		s.answers = s.answers[1:]
	}
	s.mu.Unlock()
	a(w, r)
}

func (s *script) times() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.asked)
}

// play starts a service and opens its bucket with little patience.
func play(t *testing.T, answers ...answer) (*s3.Bucket, *script) {
	t.Helper()
	sc := &script{answers: answers}
	srv := httptest.NewTLSServer(sc)
	t.Cleanup(srv.Close)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
	if err := os.WriteFile(ca, block, 0o600); err != nil {
		t.Fatal(err)
	}
	return open(t, s3.Options{
		Bucket: "bucket", Endpoint: srv.URL, PathStyle: true, CAFile: ca,
		AccessKeyID: "AKIA", SecretAccessKey: "canary", Patience: 5 * time.Second, Stall: 2 * time.Second,
	}), sc
}

// says answers with an S3 error.
func says(status int, code string, header ...string) answer {
	return func(w http.ResponseWriter, r *http.Request) {
		for i := 0; i < len(header); i += 2 {
			w.Header().Set(header[i], header[i+1])
		}
		w.Header().Set("Content-Type", "application/xml")
		w.WriteHeader(status)
		fmt.Fprintf(w, `<?xml version="1.0"?><Error><Code>%s</Code><Message>a message</Message></Error>`, code)
	}
}

// page answers as a proxy does that knows nothing of S3.
func page(status int) answer {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/html")
		w.WriteHeader(status)
		fmt.Fprint(w, "<html><body>nginx</body></html>")
	}
}

// xml answers 200 with a document.
func xml(text string) answer {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/xml")
		fmt.Fprint(w, `<?xml version="1.0"?>`, text)
	}
}

func ok(w http.ResponseWriter, r *http.Request) { w.Header().Set("ETag", `"e"`) }

// hang answers when the client has gone.
func hang(w http.ResponseWriter, r *http.Request) { <-r.Context().Done() }

// serves answers as S3 does, but for at most limit bytes of the body a time.
func serves(content string, limit int) answer {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("ETag", `"e"`)
		off, last, status := 0, len(content)-1, http.StatusOK
		if s, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
			a, b, _ := strings.Cut(s, "-")
			off, _ = strconv.Atoi(a)
			if b != "" {
				last, _ = strconv.Atoi(b)
			}
			last, status = min(last, len(content)-1), http.StatusPartialContent
			w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", off, last, len(content)))
		}
		w.Header().Set("Content-Length", strconv.Itoa(last+1-off))
		w.WriteHeader(status)
		io.WriteString(w, content[off:min(last+1, off+limit)])
	}
}

func TestC6AnswersToPut(t *testing.T) {
	for name, c := range map[string]struct {
		answers []answer
		want    error // nil: success
		times   int
		hint    string
	}{
		"slow down twice":     {[]answer{says(503, "SlowDown"), says(503, "SlowDown"), ok}, nil, 3, ""},
		"internal error":      {[]answer{says(500, "InternalError"), ok}, nil, 2, ""},
		"too many requests":   {[]answer{says(429, "TooManyRequests", "Retry-After", "1"), ok}, nil, 2, ""},
		"request time-out":    {[]answer{says(400, "RequestTimeout"), ok}, nil, 2, ""},
		"408":                 {[]answer{page(408), ok}, nil, 2, ""},
		"page of a gateway":   {[]answer{page(502), page(504), ok}, nil, 3, ""},
		"damaged on the way":  {[]answer{says(400, "BadDigest"), ok}, nil, 2, ""},
		"two writers at once": {[]answer{says(409, "ConditionalRequestConflict"), ok}, nil, 2, ""},
		"no answer":           {[]answer{hang, ok}, nil, 2, ""},
		"connection cut":      {[]answer{func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, ok}, nil, 2, ""},
		"exists":              {[]answer{says(412, "PreconditionFailed")}, store.ErrExist, 1, ""},
		"lost answer":         {[]answer{hang, says(412, "PreconditionFailed")}, store.ErrExist, 2, ""},
		"access denied":       {[]answer{says(403, "AccessDenied")}, fail.StoreDenied, 1, "s3:PutObject"},
		"unauthorized":        {[]answer{page(401)}, fail.StoreDenied, 1, "s3:PutObject"},
		"no such key id":      {[]answer{says(403, "InvalidAccessKeyId")}, fail.StoreDenied, 1, "access key"},
		"expired":             {[]answer{says(400, "ExpiredToken")}, fail.StoreDenied, 1, "access key"},
		"signature":           {[]answer{says(403, "SignatureDoesNotMatch")}, fail.StoreDenied, 1, "secret"},
		"bad request":         {[]answer{says(400, "InvalidArgument")}, fail.StoreDenied, 1, ""},
		"clock":               {[]answer{says(403, "RequestTimeTooSkewed")}, fail.ClockSkew, 1, "clock"},
		"no bucket":           {[]answer{says(404, "NoSuchBucket")}, fail.BadConfig, 1, "bucket"},
		"not S3":              {[]answer{page(404)}, fail.BadConfig, 1, "endpoint"},
		"another region":      {[]answer{says(301, "PermanentRedirect", "X-Amz-Bucket-Region", "eu-west-9", "Location", "https://evil.invalid/")}, fail.BadConfig, 1, "eu-west-9"},
		"region of signature": {[]answer{says(400, "AuthorizationHeaderMalformed")}, fail.BadConfig, 1, "region"},
		"not implemented":     {[]answer{says(501, "NotImplemented")}, fail.StoreUnfit, 1, ""},
		"full":                {[]answer{page(507)}, fail.NoSpace, 1, "quota"},
		"a login page":        {[]answer{page(200), ok}, nil, 2, ""},
		"no end":              {[]answer{says(503, "ServiceUnavailable")}, fail.StoreDown, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, sc := play(t, c.answers...)
			err := b.Put(t.Context(), "k", strings.NewReader("content"), store.PutOptions{IfAbsent: true})
			if !errors.Is(err, c.want) {
				t.Errorf("err = %v, want %v", err, c.want)
			}
			if c.times != 0 && sc.times() != c.times {
				t.Errorf("asked %d times, want %d", sc.times(), c.times)
			}
			if hint := fail.HintOf(err); !strings.Contains(hint, c.hint) {
				t.Errorf("hint %q, want one with %q", hint, c.hint)
			}
			if c.want == fail.StoreDown && sc.times() < 3 {
				t.Errorf("asked %d times only", sc.times())
			}
			if err != nil && (strings.Contains(err.Error(), "https://") || strings.Contains(err.Error(), "canary")) {
				t.Errorf("the error says too much: %v", err)
			}
		})
	}
}

func TestAnswersToGet(t *testing.T) {
	for name, c := range map[string]struct {
		answers []answer
		part    store.Range
		want    error
		content string
	}{
		"whole":                 {[]answer{serves("0123456789", 10)}, store.Range{}, nil, "0123456789"},
		"cut again and again":   {[]answer{serves("0123456789", 3)}, store.Range{}, nil, "0123456789"},
		"cut part":              {[]answer{serves("0123456789", 2)}, store.Range{Off: 2, Len: 5}, nil, "23456"},
		"cut, then an outage":   {[]answer{serves("0123456789", 3), says(503, "SlowDown"), page(502), serves("0123456789", 10)}, store.Range{}, nil, "0123456789"},
		"no more":               {[]answer{serves("0123456789", 3), serves("0123456789", 0)}, store.Range{}, io.ErrUnexpectedEOF, "012"},
		"hangs midway":          {[]answer{serves("0123456789", 3), hang, serves("0123456789", 10)}, store.Range{}, nil, "0123456789"},
		"replaced midway":       {[]answer{serves("0123456789", 3), says(412, "PreconditionFailed")}, store.Range{}, errAny, "012"},
		"deleted midway":        {[]answer{serves("0123456789", 3), says(404, "NoSuchKey")}, store.Range{}, store.ErrNotExist, "012"},
		"missing":               {[]answer{says(404, "NoSuchKey")}, store.Range{}, store.ErrNotExist, ""},
		"missing bucket":        {[]answer{says(404, "NoSuchBucket")}, store.Range{}, fail.BadConfig, ""},
		"missing, says a proxy": {[]answer{page(404)}, store.Range{}, fail.BadConfig, ""},
		"denied":                {[]answer{says(403, "AccessDenied")}, store.Range{}, fail.StoreDenied, ""},
		"archived":              {[]answer{says(403, "InvalidObjectState")}, store.Range{}, fail.StoreDenied, ""},
		"outage, then missing":  {[]answer{says(500, "InternalError"), says(404, "NoSuchKey")}, store.Range{}, store.ErrNotExist, ""},
		"range ignored":         {[]answer{func(w http.ResponseWriter, r *http.Request) { ok(w, r); io.WriteString(w, "0123456789") }}, store.Range{Off: 3, Len: 2}, fail.StoreUnfit, ""},
		"another range": {[]answer{func(w http.ResponseWriter, r *http.Request) {
			ok(w, r)
			w.Header().Set("Content-Range", "bytes 0-1/10")
			w.WriteHeader(http.StatusPartialContent)
			io.WriteString(w, "01")
		}}, store.Range{Off: 3, Len: 2}, fail.StoreUnfit, ""},
		"hangs in the body": {[]answer{func(w http.ResponseWriter, r *http.Request) {
			ok(w, r)
			w.Header().Set("Content-Length", "10")
			io.WriteString(w, "012")
			w.(http.Flusher).Flush()
			hang(w, r)
		}, serves("0123456789", 10)}, store.Range{}, nil, "0123456789"},
		"shorter than asked for":   {[]answer{serves("01234", 10)}, store.Range{Off: 3, Len: 5}, io.ErrUnexpectedEOF, ""},
		"length not known at all":  {[]answer{func(w http.ResponseWriter, r *http.Request) { ok(w, r); w.(http.Flusher).Flush() }}, store.Range{}, fail.StoreUnfit, ""},
		"a login page":             {[]answer{page(200), serves("0123456789", 10)}, store.Range{}, nil, "0123456789"},
		"never anything but a 500": {[]answer{says(500, "InternalError")}, store.Range{}, fail.StoreDown, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, _ := play(t, c.answers...)
			r, err := b.Get(t.Context(), "k", c.part)
			var got []byte
			if err == nil {
				got, err = io.ReadAll(r)
				r.Close()
			}
			if c.want == errAny && err == nil || c.want != errAny && !errors.Is(err, c.want) {
				t.Errorf("err = %v, want %v", err, c.want)
			}
			if c.want != store.ErrNotExist && errors.Is(err, store.ErrNotExist) {
				t.Errorf("err = %v is taken for a missing object", err)
			}
			if string(got) != c.content {
				t.Errorf("read %q, want %q", got, c.content)
			}
		})
	}
}

var errAny = errors.New("any error")

// A store that stored something else must not be believed.
func TestAWrongChecksumInTheAnswerIsAFailure(t *testing.T) {
	const content = "content"
	for name, sum := range map[string]uint32{"right": crc32c(content), "wrong": crc32c(content) + 1} {
		b, sc := play(t, func(w http.ResponseWriter, r *http.Request) {
			ok(w, r)
			w.Header().Set("x-amz-checksum-crc32c", text(sum))
		})
		err := b.Put(t.Context(), "k", strings.NewReader(content), store.PutOptions{})
		if want := name == "wrong"; errors.Is(err, fail.Corrupt) != want {
			t.Errorf("%s checksum: err = %v", name, err)
		}
		if sc.times() != 1 {
			t.Errorf("%s checksum: asked %d times, want 1", name, sc.times())
		}
	}
}

// A right checksum goes with each request, so that the store can compare.
func TestPutSendsWhatTheStoreMustCheck(t *testing.T) {
	var got http.Header
	b, _ := play(t, func(w http.ResponseWriter, r *http.Request) { got = r.Header.Clone(); ok(w, r) })
	if err := b.Put(t.Context(), "k", strings.NewReader("content"), store.PutOptions{IfAbsent: true}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"X-Amz-Checksum-Crc32c": text(crc32c("content")),
		"X-Amz-Content-Sha256":  "UNSIGNED-PAYLOAD",
		"If-None-Match":         "*",
		"Content-Length":        "7",
	} {
		if got.Get(name) != want {
			t.Errorf("%s: %q, want %q", name, got.Get(name), want)
		}
	}
}

const (
	begun = `<InitiateMultipartUploadResult><UploadId>u</UploadId></InitiateMultipartUploadResult>`
	done  = `<CompleteMultipartUploadResult><ETag>"e"</ETag></CompleteMultipartUploadResult>`
)

// multipart is a service of multipart uploads whose completion goes by the script.
func multipart(t *testing.T, heads answer, completes ...answer) (b *s3.Bucket, aborted func() bool) {
	var mu sync.Mutex
	aborts := 0
	b, _ = play(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		switch q := r.URL.Query(); {
		case r.Method == "POST" && q.Has("uploads"):
			xml(begun)(w, r)
		case r.Method == "PUT":
			w.Header().Set("ETag", `"e"`)
		case r.Method == "POST":
			a := completes[0]
			if len(completes) > 1 {
				completes = completes[1:]
			}
			a(w, r)
		case r.Method == "HEAD":
			heads(w, r)
		case r.Method == "DELETE":
			aborts++
			w.WriteHeader(http.StatusNoContent)
		}
	})
	return b, func() bool { mu.Lock(); defer mu.Unlock(); return aborts > 0 }
}

func TestC6AnswersToComplete(t *testing.T) {
	body := strings.Repeat("0123456789abcdef", 17<<20/16)
	is := func(size int, sum uint32) answer {
		return func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Length", strconv.Itoa(size))
			w.Header().Set("x-amz-checksum-crc32c", text(sum))
		}
	}
	ours, others := is(len(body), crc32c(body)), is(len(body), 1)
	broken := xml(`<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>`)
	for name, c := range map[string]struct {
		heads     answer
		completes []answer
		want      error
	}{
		"done":                                 {nil, []answer{xml(done)}, nil},
		"200 with an error, then done":         {nil, []answer{broken, xml(done)}, nil},
		"200 with an error, always":            {nil, []answer{broken}, fail.StoreDown},
		"200 with a denial":                    {nil, []answer{xml(`<Error><Code>AccessDenied</Code></Error>`)}, fail.StoreDenied},
		"200 with nothing but space":           {nil, []answer{xml("   "), xml(done)}, nil},
		"exists":                               {nil, []answer{says(412, "PreconditionFailed")}, store.ErrExist},
		"two writers at once":                  {nil, []answer{says(409, "ConditionalRequestConflict"), xml(done)}, nil},
		"lost answer, ours":                    {ours, []answer{says(500, "InternalError"), says(404, "NoSuchUpload")}, nil},
		"lost answer, another's":               {others, []answer{says(500, "InternalError"), says(404, "NoSuchUpload")}, store.ErrExist},
		"lost answer, nothing there":           {page(404), []answer{says(500, "InternalError"), says(404, "NoSuchUpload")}, fail.StoreDown},
		"no such upload, at once":              {ours, []answer{says(404, "NoSuchUpload")}, fail.StoreDenied},
		"done, says it, with a wrong checksum": {nil, []answer{xml(`<CompleteMultipartUploadResult><ETag>"e"</ETag><ChecksumCRC32C>AAAAAA==</ChecksumCRC32C></CompleteMultipartUploadResult>`)}, fail.Corrupt},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, aborted := multipart(t, c.heads, c.completes...)
			err := b.Put(t.Context(), "k", struct{ io.Reader }{strings.NewReader(body)}, store.PutOptions{IfAbsent: true})
			if !errors.Is(err, c.want) {
				t.Errorf("err = %v, want %v", err, c.want)
			}
			if aborted() != (c.want != nil) {
				t.Errorf("aborted: %v", aborted())
			}
		})
	}
}

func TestAnswersToList(t *testing.T) {
	item := func(key string) string { return "<Contents><Key>" + key + "</Key><Size>1</Size></Contents>" }
	list := func(more string, keys ...string) answer {
		text := "<ListBucketResult>" + more
		if more == "" {
			text += "<IsTruncated>false</IsTruncated>"
		}
		for _, k := range keys {
			text += item(k)
		}
		return xml(text + "</ListBucketResult>")
	}
	const more = "<IsTruncated>true</IsTruncated><NextContinuationToken>t</NextContinuationToken>"
	for name, c := range map[string]struct {
		answers []answer
		want    error
		keys    string
	}{
		"two pages":              {[]answer{list(more, "p/a"), list("", "p/b", "p/c")}, nil, "p/a p/b p/c"},
		"two pages, an outage":   {[]answer{list(more, "p/a"), says(503, "SlowDown"), list("", "p/b")}, nil, "p/a p/b"},
		"answer cut":             {[]answer{xml("<ListBucketResult><Contents><Key>p/"), list("", "p/a")}, nil, "p/a"},
		"others' keys":           {[]answer{list("", "a", "p/", "p//x", "p/a", "q")}, nil, "p/a"},
		"out of order":           {[]answer{list("", "p/b", "p/a")}, fail.StoreUnfit, "p/b"},
		"twice":                  {[]answer{list("", "p/a", "p/a")}, fail.StoreUnfit, "p/a"},
		"out of order in page 2": {[]answer{list(more, "p/b"), list("", "p/a")}, fail.StoreUnfit, "p/b"},
		"no way to page 2":       {[]answer{list("<IsTruncated>true</IsTruncated>", "p/a")}, fail.StoreUnfit, "p/a"},
		"denied":                 {[]answer{says(403, "AccessDenied")}, fail.StoreDenied, ""},
		"denied in page 2":       {[]answer{list(more, "p/a"), says(403, "AccessDenied")}, fail.StoreDenied, "p/a"},
		"no bucket":              {[]answer{says(404, "NoSuchBucket")}, fail.BadConfig, ""},
		"not S3":                 {[]answer{page(200)}, fail.StoreDown, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, _ := play(t, c.answers...)
			var keys []string
			var last error
			for o, err := range b.List(t.Context(), "p/", "") {
				if last != nil {
					t.Error("the list goes on after an error")
				}
				if last = err; err == nil {
					keys = append(keys, o.Key)
				}
			}
			if !errors.Is(last, c.want) || strings.Join(keys, " ") != c.keys {
				t.Errorf("list = %q, %v, want %q, %v", keys, last, c.keys, c.want)
			}
			if errors.Is(c.want, fail.StoreDenied) && !strings.Contains(fail.HintOf(last), "s3:ListBucket") {
				t.Errorf("hint %q, want one with s3:ListBucket", fail.HintOf(last))
			}
		})
	}
}

// An answer of 200 to a batch can hold failures.
func TestAnswersToDelete(t *testing.T) {
	none := xml("<DeleteResult><Deleted><Key>k1</Key></Deleted><Deleted><Key>k2</Key></Deleted><Deleted><Key>k3</Key></Deleted></DeleteResult>")
	result := func(code string) answer {
		return xml("<DeleteResult><Deleted><Key>k1</Key></Deleted><Deleted><Key>k3</Key></Deleted><Error><Key>k2</Key><Code>" + code + "</Code><Message>m</Message></Error></DeleteResult>")
	}
	for name, c := range map[string]struct {
		answers []answer
		want    error
		times   int
	}{
		"all":              {[]answer{none}, nil, 1},
		"one is gone":      {[]answer{result("NoSuchKey")}, nil, 1},
		"one is denied":    {[]answer{result("AccessDenied")}, fail.StoreDenied, 1},
		"one fails once":   {[]answer{result("InternalError"), none}, nil, 2},
		"one is not told":  {[]answer{xml("<DeleteResult><Deleted><Key>k1</Key></Deleted></DeleteResult>"), none}, nil, 2},
		"a login page":     {[]answer{page(200), none}, nil, 2},
		"one fails always": {[]answer{result("InternalError")}, fail.StoreDown, 0},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			b, sc := play(t, c.answers...)
			err := b.Delete(t.Context(), "k1", "k2", "k3")
			if !errors.Is(err, c.want) || c.times != 0 && sc.times() != c.times {
				t.Errorf("err = %v after %d requests, want %v after %d", err, sc.times(), c.want, c.times)
			}
			if errors.Is(c.want, fail.StoreDenied) && (!strings.Contains(err.Error(), "k2") || !strings.Contains(fail.HintOf(err), "s3:DeleteObject")) {
				t.Errorf("err = %v, hint %q, want the key and s3:DeleteObject", err, fail.HintOf(err))
			}
		})
	}
}

// Patience does not outlive the caller.
func TestRetriesEndWithTheContext(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	b, sc := play(t, says(503, "SlowDown"), func(w http.ResponseWriter, r *http.Request) {
		cancel()
		says(503, "SlowDown")(w, r)
	})
	err := b.Put(ctx, "k", strings.NewReader("x"), store.PutOptions{})
	if !errors.Is(err, context.Canceled) || !errors.Is(err, fail.StoreDown) {
		t.Errorf("err = %v, want store-down and the cancellation", err)
	}
	if sc.times() != 2 {
		t.Errorf("asked %d times, want 2", sc.times())
	}
}

func crc32c(s string) uint32 { return crc32.Checksum([]byte(s), crc32.MakeTable(crc32.Castagnoli)) }

func text(sum uint32) string {
	return base64.StdEncoding.EncodeToString([]byte{byte(sum >> 24), byte(sum >> 16), byte(sum >> 8), byte(sum)})
}
