package lab

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/sys/unix"
)

// S3Options describe an S3 server. The zero value is an empty one in a
// directory of its own, which Stop removes.
type S3Options struct {
	// Dir holds the objects, the certificates and the log. Objects that are
	// there already are kept. Empty: a new directory under os.TempDir,
	// removed by Stop.
	Dir string
	// Bucket is made if it is not there. Empty: "pgkeep".
	Bucket string
	// Users are the secrets of more access keys. What they may do, a policy of
	// the bucket says.
	Users map[string]string
	// Versions lets the bucket keep older versions, and those that were deleted.
	Versions bool
	// Log gets what the server prints. Nil: the file s3.log in Dir.
	Log io.Writer
}

// S3 is a running S3 server: versitygw on a loopback port, over TLS with a
// certificate of its own authority. It dies with this process, also when that
// is killed. Its methods are not to be called from several goroutines at once.
type S3 struct {
	Endpoint        string // https://127.0.0.1:port
	Addr            string // 127.0.0.1:port, for a Proxy
	Region          string
	Bucket          string
	CAFile          string
	AccessKeyID     string
	SecretAccessKey string
	Dir             string
	Data            string // the directory of the bucket: a file for each object

	program string
	opt     S3Options
	args    []string
	log     io.Writer
	logFile *os.File // nil: the caller's writer
	ownDir  bool

	process *os.Process
	exited  <-chan struct{} // closed when the server has gone
}

// StartS3 builds the server, if need be, starts it and waits until its bucket
// is there.
func StartS3(ctx context.Context, opt S3Options) (*S3, error) {
	program, err := buildTool(ctx, "versitygw", "tools", "github.com/versity/versitygw/cmd/versitygw")
	if err != nil {
		return nil, fmt.Errorf("start S3: %w", err)
	}
	s := &S3{program: program, opt: opt, Bucket: opt.Bucket, Dir: opt.Dir, log: opt.Log, Region: "us-east-1",
		AccessKeyID: rand.Text(), SecretAccessKey: rand.Text() + rand.Text()}
	if s.Bucket == "" {
		s.Bucket = "pgkeep"
	}
	if err := s.prepare(); err != nil {
		return nil, errors.Join(fmt.Errorf("start S3: %w", err), s.clean())
	}
	if err := s.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start S3: %w", err), s.clean())
	}
	return s, nil
}

// S3ForTest starts a server for the time of the test.
func S3ForTest(t testing.TB) *S3 {
	t.Helper()
	s, err := StartS3(t.Context(), S3Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// prepare makes the directories, the certificate and the command line.
func (s *S3) prepare() error {
	if s.Dir == "" {
		dir, err := os.MkdirTemp("", "pgkeep-s3-")
		if err != nil {
			return err
		}
		s.Dir, s.ownDir = dir, true
	}
	root := filepath.Join(s.Dir, "data")
	s.Data = filepath.Join(root, s.Bucket)
	if err := os.MkdirAll(root, 0o700); err != nil {
		return err
	}
	if s.log == nil {
		f, err := os.OpenFile(s.logPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
		if err != nil {
			return err
		}
		s.log, s.logFile = f, f
	}
	ca, err := NewCA(s.Dir)
	if err != nil {
		return err
	}
	s.CAFile = ca.File
	cert, key, err := ca.Issue("server", "127.0.0.1", "localhost")
	if err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	s.Addr = fmt.Sprintf("127.0.0.1:%d", port)
	s.Endpoint = "https://" + s.Addr
	// Without keep-alive the server closes each connection after one answer.
	s.args = []string{"--port", s.Addr, "--cert", cert, "--key", key, "--region", s.Region, "--quiet", "--keep-alive"}
	if len(s.opt.Users) > 0 {
		dir, err := s.users()
		if err != nil {
			return err
		}
		s.args = append(s.args, "--iam-dir", dir)
	}
	s.args = append(s.args, "posix")
	if s.opt.Versions {
		old := filepath.Join(s.Dir, "versions")
		if err := os.MkdirAll(old, 0o700); err != nil {
			return err
		}
		s.args = append(s.args, "--versioning-dir", old)
	}
	if !keepsAttributes(root) || len(s.opt.Users) > 0 { // a policy for many is more than a file system keeps as one
		side := filepath.Join(s.Dir, "attributes")
		if err := os.MkdirAll(side, 0o700); err != nil {
			return err
		}
		s.args = append(s.args, "--sidecar", side)
	}
	s.args = append(s.args, root)
	return nil
}

// users writes the access keys as versitygw keeps them itself.
func (s *S3) users() (dir string, err error) {
	type account struct {
		Access string `json:"access"`
		Secret string `json:"secret"`
		Role   string `json:"role"`
	}
	all := make(map[string]account)
	for key, secret := range s.opt.Users {
		all[key] = account{key, secret, "user"}
	}
	text, err := json.Marshal(map[string]any{"accessAccounts": all})
	if err != nil {
		return "", err
	}
	dir = filepath.Join(s.Dir, "iam")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "users.json"), text, 0o600)
}

// keepsAttributes reports whether the file system keeps extended attributes,
// where the server has an object's metadata.
func keepsAttributes(dir string) bool {
	return unix.Setxattr(dir, "user.pgkeep", []byte("x"), 0) == nil
}

func (s *S3) logPath() string { return filepath.Join(s.Dir, "s3.log") }

// start runs the server and waits until it answers.
func (s *S3) start(ctx context.Context) error {
	cmd := exec.Command(s.program, s.args...) // without ctx: it lives until Stop
	cmd.Env = append(os.Environ(), "ROOT_ACCESS_KEY="+s.AccessKeyID, "ROOT_SECRET_KEY="+s.SecretAccessKey)
	cmd.Stdout, cmd.Stderr = s.log, s.log
	exited, err := startChild(cmd, syscall.SIGKILL)
	if err != nil {
		return err
	}
	s.process, s.exited = cmd.Process, exited
	if err := s.waitReady(ctx); err != nil {
		s.Kill()
		return err
	}
	return nil
}

// waitReady makes the bucket, which also shows that the server is up.
func (s *S3) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	api, done, err := s.API(s.AccessKeyID, s.SecretAccessKey)
	if err != nil {
		return err
	}
	defer done()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := api.HeadBucket(ctx, &s3.HeadBucketInput{Bucket: &s.Bucket})
		if err != nil {
			_, err = api.CreateBucket(ctx, &s3.CreateBucketInput{Bucket: &s.Bucket, ObjectLockEnabledForBucket: &s.opt.Versions})
		}
		if err == nil {
			return nil
		}
		select {
		case <-s.exited:
			return fmt.Errorf("the server ended at once: %s", s.logTail())
		case <-ctx.Done():
			return fmt.Errorf("make bucket %s: %w: %s", s.Bucket, err, s.logTail())
		case <-tick.C:
		}
	}
}

// API speaks to the server with an access key, without trying anything again.
// Done closes its connections.
func (s *S3) API(accessKeyID, secretAccessKey string) (api *s3.Client, done func(), err error) {
	client, err := s.client()
	if err != nil {
		return nil, nil, err
	}
	return s3.New(s3.Options{
		BaseEndpoint: &s.Endpoint,
		Region:       s.Region,
		UsePathStyle: true,
		Credentials:  credentials.NewStaticCredentialsProvider(accessKeyID, secretAccessKey, ""),
		HTTPClient:   client,
		Retryer:      aws.NopRetryer{},
	}), client.CloseIdleConnections, nil
}

// client trusts the server's authority and nothing else.
func (s *S3) client() (*http.Client, error) {
	pem, err := os.ReadFile(s.CAFile)
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}, nil
}

func (s *S3) logTail() string {
	if s.logFile == nil {
		return "see its log"
	}
	b, err := os.ReadFile(s.logPath())
	if err != nil {
		return err.Error()
	}
	return string(bytes.TrimSpace(b[max(0, len(b)-2000):]))
}

// Stop ends the server and removes its directory, unless it was given one. A
// server whose directory goes is killed: else it waits for the connections that
// its clients keep. A stopped server can be stopped again.
func (s *S3) Stop() error {
	if s.ownDir {
		s.Kill()
	}
	s.end(syscall.SIGTERM)
	return s.clean()
}

// Kill ends the server at once, as a crash does. Restart brings it back.
func (s *S3) Kill() { s.end(syscall.SIGKILL) }

// end sends the signal and waits. A server that does not listen to SIGTERM
// within ten seconds is killed.
func (s *S3) end(sig syscall.Signal) {
	if s.process == nil {
		return
	}
	s.process.Signal(sig) // an error means that it has gone
	select {
	case <-s.exited:
	case <-time.After(10 * time.Second):
		s.process.Kill()
		<-s.exited
	}
	s.process = nil
}

// Restart starts a server that was killed, with the same port, keys and
// objects. One that runs is killed first.
func (s *S3) Restart(ctx context.Context) error {
	s.Kill()
	if err := s.start(ctx); err != nil {
		return fmt.Errorf("restart S3: %w", err)
	}
	return nil
}

// Pause freezes the server: connections stay open and nothing answers.
func (s *S3) Pause() error { return s.process.Signal(syscall.SIGSTOP) }

// Resume ends Pause.
func (s *S3) Resume() error { return s.process.Signal(syscall.SIGCONT) }

func (s *S3) clean() error {
	var err error
	if s.logFile != nil {
		err = s.logFile.Close()
		s.logFile = nil
	}
	if s.ownDir {
		err = errors.Join(err, os.RemoveAll(s.Dir))
		s.ownDir = false
	}
	return err
}
