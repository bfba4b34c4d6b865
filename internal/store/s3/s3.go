// Package s3 is a store.Store in a bucket of Amazon S3, or of a service that
// speaks its protocol: with conditional writes, CRC32C checksums and
// ListObjectsV2 in key order.
//
// The SDK signs and encodes. Retries, time-outs and the meaning of an answer
// are here, in one place (see judge): the SDK's own retries are off.
package s3

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
	"github.com/aws/aws-sdk-go-v2/config"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

// Options say where the bucket is and how to get in. Only Bucket is required.
type Options struct {
	Bucket string
	Prefix string // of all keys, with or without slashes around; empty: none

	// Endpoint is the service's URL. Empty: Amazon's in Region.
	Endpoint string
	// Region is the one to sign for. Empty: what the AWS SDK finds if it looks
	// for credentials too, else us-east-1.
	Region string
	// PathStyle puts the bucket into the path of a URL rather than its host.
	PathStyle bool
	// CAFile holds the authorities, PEM, that alone may vouch for the service.
	// Empty: the system's.
	CAFile string

	// The keys. If both are empty the AWS SDK looks for credentials in its
	// usual places: environment, shared files, the machine's role.
	AccessKeyID, SecretAccessKey string
	SessionToken                 string // only of temporary keys

	// Patience is how long a request is tried again, from its first failure.
	// 0: two minutes.
	Patience time.Duration
	// Stall is how long a request may make no progress: no byte taken, no
	// answer, no byte given. 0: one minute. To complete an upload of many
	// parts may take ten times as long.
	Stall time.Duration
	// MaxPut is the largest object, in bytes, that is sent in one request.
	// 0: 5 GiB, the most that S3 takes.
	MaxPut int64
}

// String leaves the keys out, so that they are not printed by accident.
func (o Options) String() string { return "s3://" + o.Bucket + "/" + o.Prefix }

// GoString does as String.
func (o Options) GoString() string { return o.String() }

// S3 User Guide, "Amazon S3 multipart upload limits".
const (
	maxPut   = 5 << 30 // bytes in one request
	maxParts = 10_000
	partSize = 16 << 20 // ours, the least one
)

// A Bucket keeps objects in a bucket, below a prefix. Use Open.
type Bucket struct {
	api      *s3.Client
	http     *http.Client
	bucket   string
	prefix   string // empty, or ends with a slash
	patience time.Duration
	stall    time.Duration
	maxPut   int64
}

var (
	_ store.Store   = (*Bucket)(nil)
	_ store.Sweeper = (*Bucket)(nil)
)

// Open prepares the use of a bucket. It sends no request to it; if no keys are
// given it looks for credentials, and fails with fail.StoreDenied if there are
// none.
func Open(ctx context.Context, opt Options) (*Bucket, error) {
	client, err := httpClient(opt.CAFile)
	if err != nil {
		return nil, fmt.Errorf("open %v: %w", opt, err)
	}
	api := s3.Options{
		AppID:                      "pgkeep",
		Region:                     opt.Region,
		UsePathStyle:               opt.PathStyle,
		HTTPClient:                 client,
		Retryer:                    aws.NopRetryer{},
		DisableClockSkewCorrection: true, // a clock that is wrong is told, not hidden
		// Put computes its own checksum; more than what a request needs is
		// refused by services that are not Amazon's.
		RequestChecksumCalculation: aws.RequestChecksumCalculationWhenRequired,
		ResponseChecksumValidation: aws.ResponseChecksumValidationWhenRequired,
	}
	switch u, err := url.Parse(opt.Endpoint); {
	case opt.Bucket == "":
		return nil, fmt.Errorf("open %v: no bucket: %w", opt, fail.BadConfig)
	case opt.Endpoint == "":
	case err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http":
		return nil, fmt.Errorf("open %v: the endpoint is not a https URL: %w", opt, fail.BadConfig)
	default:
		api.BaseEndpoint = &opt.Endpoint
	}
	if !strings.HasPrefix(opt.Endpoint, "http://") {
		// TLS and the checksum cover the body already. Without this the SDK
		// would compute a SHA-256 of it, at a third of a core for each 100 MB/s.
		api.APIOptions = append(api.APIOptions, v4.SwapComputePayloadSHA256ForUnsignedPayloadMiddleware)
	}
	if err := credential(ctx, opt, &api); err != nil {
		return nil, fmt.Errorf("open %v: %w", opt, err)
	}
	b := &Bucket{
		api:      s3.New(api),
		http:     client,
		bucket:   opt.Bucket,
		patience: orElse(opt.Patience, 2*time.Minute),
		stall:    orElse(opt.Stall, time.Minute),
		maxPut:   orElse(opt.MaxPut, maxPut),
	}
	if p := strings.Trim(opt.Prefix, "/"); p != "" {
		b.prefix = p + "/"
	}
	return b, nil
}

func orElse[T comparable](v, zero T) T {
	if v == *new(T) {
		return zero
	}
	return v
}

// Close lets go of connections that nobody uses.
func (b *Bucket) Close() error { b.http.CloseIdleConnections(); return nil }

// credential fills in the keys, and the region if there is none.
func credential(ctx context.Context, opt Options, api *s3.Options) error {
	defer func() { api.Region = orElse(api.Region, "us-east-1") }()
	if opt.AccessKeyID != "" && opt.SecretAccessKey != "" {
		api.Credentials = credentials.NewStaticCredentialsProvider(opt.AccessKeyID, opt.SecretAccessKey, opt.SessionToken)
		return nil
	}
	if opt.AccessKeyID != "" || opt.SecretAccessKey != "" {
		return fmt.Errorf("an access key has two halves, and one is missing: %w", fail.BadConfig)
	}
	// The SDK's own HTTP client, not ours: it is the one that heeds
	// AWS_CA_BUNDLE, and CAFile says nothing about Amazon's token services.
	cfg, err := config.LoadDefaultConfig(ctx)
	if err != nil {
		return fmt.Errorf("AWS configuration: %w: %w", fail.BadConfig, err)
	}
	if _, err := cfg.Credentials.Retrieve(ctx); err != nil {
		return fail.Hint(fmt.Errorf("no credentials: %w: %s", fail.StoreDenied, brief(err.Error())),
			"set repository.access_key_id and secret_access_key_file, or any of the places where the AWS SDK looks")
	}
	api.Credentials = cfg.Credentials
	api.Region = orElse(api.Region, cfg.Region)
	return nil
}

// httpClient returns one of our own: the SDK's would take the authorities of
// AWS_CA_BUNDLE in place of those in caFile.
func httpClient(caFile string) (*http.Client, error) {
	conf := &tls.Config{MinVersion: tls.VersionTLS12}
	if caFile != "" {
		pem, err := os.ReadFile(caFile)
		if err != nil {
			return nil, fmt.Errorf("read the CA file: %w: %w", fail.BadConfig, err)
		}
		conf.RootCAs = x509.NewCertPool()
		if !conf.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("CA file %s holds no PEM certificate: %w", caFile, fail.BadConfig)
		}
	}
	dial := &net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}
	return &http.Client{
		// One request goes to one host: a redirect would take the signature elsewhere.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		Transport: &http.Transport{ // HTTP/1.1: parallel requests should not share a connection
			Proxy:                 http.ProxyFromEnvironment,
			DialContext:           dial.DialContext,
			TLSClientConfig:       conf,
			TLSHandshakeTimeout:   10 * time.Second,
			ExpectContinueTimeout: time.Second,
			MaxIdleConnsPerHost:   64,
			IdleConnTimeout:       30 * time.Second,
			WriteBufferSize:       64 << 10,
			ReadBufferSize:        64 << 10,
			DisableCompression:    true,
		},
	}, nil
}

// name returns the key of key in the bucket.
func (b *Bucket) name(key string) *string { return aws.String(b.prefix + key) }

// check refuses what is no key, and to begin after ctx ended.
func check(ctx context.Context, key string) error {
	if err := store.CheckKey(key); err != nil {
		return err
	}
	return ctx.Err()
}

// isCode reports whether err is the service's answer with one of codes.
func isCode(err error, codes ...string) bool {
	api, ok := errors.AsType[apiError](err)
	if !ok {
		return false
	}
	for _, c := range codes {
		if api.ErrorCode() == c {
			return true
		}
	}
	return false
}
