package s3

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/aws/smithy-go"
	smithyhttp "github.com/aws/smithy-go/transport/http"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

type apiError = smithy.APIError

// A right is what a policy must allow for a request.
type right string

const (
	putObject   right = "s3:PutObject"
	getObject   right = "s3:GetObject"
	listBucket  right = "s3:ListBucket"
	listUploads right = "s3:ListBucketMultipartUploads"
	delObject   right = "s3:DeleteObject"
	abortUpload right = "s3:AbortMultipartUpload"
)

var (
	errStalled = errors.New("no progress")
	errSource  = errors.New("read what is to be stored")
	// What the service stored is not what it was sent. It is not tried again:
	// the wrong object stands there.
	errWrongSum = fmt.Errorf("the store answers with another checksum than that of what was sent: %w", fail.Corrupt)
	errChanged  = errors.New("the object was replaced while it was read")
	// A login page of some network can say 200 too.
	errStrange = errors.New("the answer is none of S3")
)

// try calls request until it succeeds, is refused, the context ends or patience
// runs out. What it returns names the kind of failure, not the operation. A
// request gets a context that ends when its watch does.
func (b *Bucket) try(ctx context.Context, needs right, request func() error) error {
	var giveUp time.Time
	var last error // why it is tried again
	for n := 0; ; n++ {
		err := request()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ended(ctx, last)
		}
		v := judge(err)
		if !v.retry {
			return b.explain(v, needs)
		}
		last = fmt.Errorf("%w: %w", fail.StoreDown, v.err)
		if n == 0 {
			giveUp = time.Now().Add(b.patience)
		}
		wait := max(v.after, backOff(n))
		if time.Now().Add(wait).After(giveUp) {
			return last
		}
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ended(ctx, last)
		}
	}
}

// ended returns the error of a context that ended before the store did what it
// should. A deadline that passes while it says nothing is trouble of its own.
func ended(ctx context.Context, last error) error {
	if last == nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		last = fail.StoreDown
	}
	if last == nil {
		return ctx.Err()
	}
	return fmt.Errorf("%w: %w", last, ctx.Err())
}

// backOff returns how long to wait after failure n, from 0: anything up to a
// bound that doubles, so that many clients do not come back together.
func backOff(n int) time.Duration {
	const least, most = 100 * time.Millisecond, 10 * time.Second
	return rand.N(min(most, least<<min(n, 10)))
}

// A verdict is what an error means.
type verdict struct {
	err   error // short, without URL, with its kind unless retry
	retry bool
	after time.Duration // not sooner, says the service
	hint  string
	right bool // a right may be missing
}

// judge decides what a failed request means. S3 API Reference, "Error
// responses". What it does not know is refused, not absent.
func judge(err error) verdict {
	for _, known := range []error{errSource, errWrongSum, errChanged, errBeyond, store.ErrNotExist, store.ErrExist, errNoLock} {
		if errors.Is(err, known) {
			return verdict{err: err}
		}
	}
	for _, known := range []error{errStalled, errStrange} {
		if errors.Is(err, known) {
			return verdict{err: known, retry: true}
		}
	}
	if v, ok := judgeTLS(err); ok {
		return v
	}
	status := 0
	var header http.Header
	if r, ok := errors.AsType[*smithyhttp.ResponseError](err); ok && r.Response != nil && r.Response.Response != nil {
		status, header = r.HTTPStatusCode(), r.Response.Header
	}
	if api, ok := errors.AsType[smithy.APIError](err); ok {
		return judgeAnswer(status, api.ErrorCode(), api.ErrorMessage(), header)
	}
	if status >= 300 {
		return judgeAnswer(status, "", "", header) // from a proxy, or whatever listens there
	}
	if _, ok := errors.AsType[*smithy.DeserializationError](err); ok {
		return verdict{err: errors.New("the answer cannot be read"), retry: true}
	}
	if send, ok := errors.AsType[*smithyhttp.RequestSendError](err); ok {
		return verdict{err: cause(send.Err), retry: true}
	}
	if status != 0 || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, errBody) {
		return verdict{err: cause(err), retry: true}
	}
	return verdict{err: cause(err)} // never sent
}

// judgeAnswer decides by the service's own words.
func judgeAnswer(status int, code, message string, header http.Header) verdict {
	text := brief(message)
	if code == "UnknownError" || code == "NotFound" {
		code = "" // the SDK's, for an answer without one
	}
	switch {
	case code == "":
		text = fmt.Sprintf("status %d", status)
	case text == "":
		text = code
	default:
		text = code + ": " + text
	}
	refuse := func(kind fail.Kind, hint string) verdict {
		return verdict{err: fmt.Errorf("%w: %s", kind, text), hint: hint}
	}
	switch code {
	case "NoSuchKey":
		return verdict{err: store.ErrNotExist}
	case "NoSuchBucket":
		return refuse(fail.BadConfig, "make the bucket, or correct repository.url and endpoint")
	case "PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException", "IncorrectEndpoint":
		hint := "set repository.region to the region of the bucket"
		if region := header.Get("X-Amz-Bucket-Region"); region != "" {
			hint += ", " + brief(region)
		}
		return refuse(fail.BadConfig, hint)
	case "InvalidBucketName":
		return refuse(fail.BadConfig, "correct the bucket in repository.url")
	case "RequestTimeTooSkewed":
		return refuse(fail.ClockSkew, "")
	case "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken", "TokenRefreshRequired", "AuthFailure":
		return refuse(fail.StoreDenied, "check the access key and its secret, and that they are for this service")
	case "InvalidObjectState":
		return refuse(fail.StoreDenied, "the object is in an archive: bring it back with the service's own tools, and keep pgkeep's prefix out of rules that archive")
	case "QuotaExceeded", "InsufficientCapacity", "XMinioStorageFull":
		return refuse(fail.NoSpace, "free space in the bucket, or raise its quota")
	case "NotImplemented", "MethodNotAllowed":
		return refuse(fail.StoreUnfit, "")
	case "AccessDenied":
		v := refuse(fail.StoreDenied, "")
		v.right = true
		return v
	case "PreconditionFailed":
		return verdict{err: store.ErrExist}
	case "InvalidRange":
		return verdict{err: errOutside}
	case "ConditionalRequestConflict", "OperationAborted", // two writers of one key at once
		"BadDigest", "XAmzContentChecksumMismatch", "IncompleteBody", // damaged or cut on the way
		"RequestTimeout", "InternalError", "ServiceUnavailable", "SlowDown", "Throttling", "ThrottlingException", "RequestLimitExceeded":
		return verdict{err: errors.New(text), retry: true, after: retryAfter(header)}
	}
	switch {
	case status == http.StatusPreconditionFailed:
		return verdict{err: store.ErrExist}
	case status == http.StatusNotImplemented:
		return refuse(fail.StoreUnfit, "")
	case status == http.StatusInsufficientStorage:
		return refuse(fail.NoSpace, "free space in the bucket, or raise its quota")
	case status >= 500, status == http.StatusTooManyRequests, status == http.StatusRequestTimeout:
		return verdict{err: errors.New(text), retry: true, after: retryAfter(header)}
	case status >= 300 && status < 400:
		return refuse(fail.BadConfig, "set repository.region and endpoint to those of the bucket")
	case status == http.StatusNotFound && code == "":
		return refuse(fail.BadConfig, "does repository.endpoint lead to an S3 service?")
	}
	v := refuse(fail.StoreDenied, "")
	v.right = status == http.StatusForbidden || status == http.StatusUnauthorized
	return v
}

// judgeTLS finds trouble with certificates, and services without TLS: it stays
// until somebody acts, and nothing is ever tried without.
func judgeTLS(err error) (verdict, bool) {
	_, bad := errors.AsType[*tls.CertificateVerificationError](err)
	_, noTLS := errors.AsType[tls.RecordHeaderError](err)
	hint := "repository.ca_file names the authorities to trust; the certificate must be valid now, for the endpoint's name"
	if noTLS || errors.Is(err, http.ErrSchemeMismatch) {
		hint = "the service does not speak TLS there: check the port in repository.endpoint"
	} else if !bad {
		return verdict{}, false
	}
	return verdict{err: fmt.Errorf("%w: %w", fail.BadConfig, cause(err)), hint: hint}, true
}

// explain adds the hint of v to its error.
func (b *Bucket) explain(v verdict, needs right) error {
	hint := v.hint
	if v.right {
		hint = fmt.Sprintf("the access key must be allowed %s on arn:aws:s3:::%s/%s*", needs, b.bucket, b.prefix)
		switch needs {
		case listBucket, listUploads:
			hint = fmt.Sprintf("the access key must be allowed %s on arn:aws:s3:::%s", needs, b.bucket)
		case getObject:
			hint += ", and s3:ListBucket on the bucket: without it S3 refuses rather than say that an object does not exist"
		}
	}
	if hint == "" {
		return v.err
	}
	return fail.Hint(v.err, hint)
}

func retryAfter(h http.Header) time.Duration {
	n, err := strconv.Atoi(h.Get("Retry-After"))
	if err != nil || n < 0 {
		return 0
	}
	return min(time.Duration(n)*time.Second, 30*time.Second)
}

// cause strips what names the URL.
func cause(err error) error {
	if u, ok := errors.AsType[*url.Error](err); ok {
		return u.Err
	}
	return err
}

// brief makes one short line of what a stranger says.
func brief(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > 200 {
		s = strings.ToValidUTF8(s[:200], "") + "..."
	}
	return s
}

// A watch ends the context of a request that makes no progress.
type watch struct {
	context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	limit  time.Duration
}

func (b *Bucket) watch(ctx context.Context) *watch { return newWatch(ctx, b.stall) }

func newWatch(ctx context.Context, limit time.Duration) *watch {
	ctx, cancel := context.WithCancelCause(ctx)
	return &watch{ctx, cancel, time.AfterFunc(limit, func() { cancel(errStalled) }), limit}
}

// progress starts the time anew.
func (w *watch) progress() { w.timer.Reset(w.limit) }

// pause stops the time until the next progress.
func (w *watch) pause() { w.timer.Stop() }

func (w *watch) stop() { w.timer.Stop(); w.cancel(nil) }

// why returns err, or the reason for it if that is the watch.
func (w *watch) why(err error) error {
	if err != nil && context.Cause(w) == errStalled {
		return errStalled
	}
	return err
}
