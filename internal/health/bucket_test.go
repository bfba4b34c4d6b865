package health_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/aws/aws-sdk-go-v2/aws"
	awss3 "github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/pgkeep/pgkeep/internal/bucket"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/store/s3"
)

const probe = "clusters/main/wal/probe/db1"

var (
	writes = health.Part{Writes: true}
	cleans = health.Part{Writes: true, Deletes: true}
)

// A gate stands before a real S3 server, and answers in its place what that
// server has no settings for: refusals, and rules of the bucket.
type gate struct {
	*httptest.Server
	answer func(r *http.Request) (status int, body string) // 0: the server answers
	change func(body string) string                        // of what the server answers; nil: as it is
}

func newGate(t *testing.T, behind *lab.S3) *gate {
	t.Helper()
	authorities := x509.NewCertPool()
	text, err := os.ReadFile(behind.CAFile)
	if err != nil || !authorities.AppendCertsFromPEM(text) {
		t.Fatalf("certificates of the server: %v", err)
	}
	target, err := url.Parse(behind.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{answer: func(*http.Request) (int, string) { return 0, "" }}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { // the host stays: it is signed
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.Host = target.Scheme, target.Host, r.In.Host
		},
		Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: authorities}},
		ErrorLog:  log.New(io.Discard, "", 0),
		ModifyResponse: func(r *http.Response) error {
			if g.change == nil {
				return nil
			}
			body, err := io.ReadAll(r.Body)
			r.Body.Close()
			text := g.change(string(body))
			r.Body, r.ContentLength = io.NopCloser(strings.NewReader(text)), int64(len(text))
			r.Header.Set("Content-Length", strconv.Itoa(len(text)))
			return err
		},
	}
	t.Cleanup(proxy.Transport.(*http.Transport).CloseIdleConnections)
	g.Server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if status, body := g.answer(r); status != 0 {
			io.Copy(io.Discard, r.Body)
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(status)
			io.WriteString(w, body)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(g.Close)
	return g
}

// bucket opens the server's bucket through the gate.
func (g *gate) bucket(t *testing.T, behind *lab.S3) *s3.Bucket {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: g.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	b, err := s3.Open(t.Context(), s3.Options{Bucket: behind.Bucket, Prefix: "prod", Endpoint: g.URL, Region: behind.Region, PathStyle: true, CAFile: file,
		AccessKeyID: behind.AccessKeyID, SecretAccessKey: behind.SecretAccessKey, Patience: time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return b
}

func access(t *testing.T) repo.Access {
	t.Helper()
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	a := repo.Access{Encrypted: true, Signer: signer, Metadata: identity(t), Version: "test"}
	return a
}

func identity(t *testing.T) *age.X25519Identity {
	t.Helper()
	id, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

const (
	denied    = `<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>`
	versioned = `<VersioningConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Status>Enabled</Status></VersioningConfiguration>`
)

func lifecycle(rules ...string) string {
	return `<LifecycleConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">` + strings.Join(rules, "") + `</LifecycleConfiguration>`
}

func rule(id, prefix, status, does string) string {
	return fmt.Sprintf(`<Rule><ID>%s</ID><Filter><Prefix>%s</Prefix></Filter><Status>%s</Status>%s</Rule>`, id, prefix, status, does)
}

func TestBucketFindings(t *testing.T) {
	t.Parallel()
	behind := lab.S3ForTest(t)
	t.Cleanup(behind.Kill) // stopping politely, it would wait for the connections that this process keeps
	g := newGate(t, behind)
	st := g.bucket(t, behind)
	a, second := access(t), identity(t)
	ask := func() []health.Finding { return health.AskBucket(t.Context(), st, a, probe).Findings(writes) }

	sick(t, "repository", health.Critical, ask, func(string) { // of an empty bucket
		if _, _, err := repo.Init(t.Context(), st, a, []string{identity(t).Recipient().String(), second.Recipient().String()}, time.Now()); err != nil {
			t.Fatal(err)
		}
	})
	well := []string{"versioning-off"} // which is true of this server
	if got := names(ask()); !slices.Equal(got, well) {
		t.Fatalf("of a bucket that is well: %q", got)
	}
	if left, err := store.ReadAll(t.Context(), st, probe, store.Range{}); err == nil {
		t.Errorf("left behind: %s", left)
	}

	has := func(r *http.Request, method, query string) bool {
		_, ok := r.URL.Query()[query]
		return r.Method == method && (query == "" || ok)
	}
	refuse := func(of func(r *http.Request) bool) {
		g.answer = func(r *http.Request) (int, string) {
			if of(r) {
				return http.StatusForbidden, denied
			}
			return 0, ""
		}
	}
	allow := func(fix string) {
		t.Helper()
		if !strings.Contains(fix, "must be allowed s3:") {
			t.Errorf("fix: %s", fix)
		}
		g.answer = func(*http.Request) (int, string) { return 0, "" }
	}
	refuse(func(r *http.Request) bool { return has(r, "PUT", "") })
	sick(t, "store-write", health.Critical, ask, allow)
	refuse(func(r *http.Request) bool { return has(r, "GET", "") && strings.Contains(r.URL.Path, "/probe/") })
	sick(t, "store-read", health.Critical, ask, allow)
	refuse(func(r *http.Request) bool { return has(r, "GET", "list-type") })
	sick(t, "store-list", health.Critical, ask, allow)
	// Who takes backups need not delete; who lets them expire must.
	refuse(func(r *http.Request) bool { return has(r, "POST", "delete") || r.Method == "DELETE" })
	for range 2 { // the object stays, and is found the next time
		if got := names(ask()); !slices.Equal(got, well) {
			t.Errorf("of a bucket that does not let us delete: %q", got)
		}
	}
	sick(t, "store-delete", health.Critical, func() []health.Finding { return health.AskBucket(t.Context(), st, a, probe).Findings(cleans) }, allow)
	refuse(func(r *http.Request) bool { return has(r, "GET", "lifecycle") })
	f := sick(t, "rules-unknown", health.Notice, ask, func(fix string) {
		if !strings.Contains(fix, "pgkeep bucket show") {
			t.Errorf("fix: %s", fix)
		}
		g.answer = func(*http.Request) (int, string) { return 0, "" }
	})
	if !strings.Contains(f.What, "lifecycle") {
		t.Errorf("%+v", f)
	}
	if got := names(ask()); !slices.Equal(got, well) {
		t.Errorf("of a bucket that lets us do everything again: %q", got)
	}

	for _, c := range []struct {
		hours    float64
		severity health.Severity
	}{{0.02, health.Warning}, {-1, health.Critical}} { // a store whose clock is wrong
		g.change = func(body string) string {
			return modified.ReplaceAllStringFunc(body, func(tag string) string {
				at, err := time.Parse("<LastModified>"+time.RFC3339, strings.TrimSuffix(tag, "</LastModified>"))
				if err != nil {
					t.Errorf("%s: %v", tag, err)
				}
				return at.Add(time.Duration(c.hours * float64(time.Hour))).Format("<LastModified>" + time.RFC3339 + "</LastModified>")
			})
		}
		f := sick(t, "clock-skew", c.severity, ask, func(string) { g.change = nil }) // chrony did it
		if !strings.Contains(f.What, "the clock of the store is") || !strings.Contains(f.Fix, "chrony") {
			t.Errorf("%+v", f)
		}
	}

	const removes, freezes = `<Expiration><Days>30</Days></Expiration>`, `<Transition><Days>7</Days><StorageClass>DEEP_ARCHIVE</StorageClass></Transition>`
	for _, c := range []struct {
		rules string
		want  []string
	}{
		{lifecycle(rule("old", "", "Enabled", removes)), []string{"lifecycle-removes"}},
		{lifecycle(rule("wal", "prod/clusters/", "Enabled", removes), rule("cold", "prod/", "Enabled", freezes)), []string{"lifecycle-removes", "lifecycle-freezes"}},
		{lifecycle(rule("off", "", "Disabled", removes), rule("logs", "other/", "Enabled", removes),
			rule("marks", "", "Enabled", `<Expiration><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration>`),
			rule("versions", "", "Enabled", `<NoncurrentVersionExpiration><NoncurrentDays>30</NoncurrentDays></NoncurrentVersionExpiration>`),
			rule("parts", "", "Enabled", `<AbortIncompleteMultipartUpload><DaysAfterInitiation>2</DaysAfterInitiation></AbortIncompleteMultipartUpload>`),
			rule("warm", "", "Enabled", `<Transition><Days>30</Days><StorageClass>STANDARD_IA</StorageClass></Transition>`)), nil},
		{"", nil}, // none
	} {
		g.answer = func(r *http.Request) (int, string) {
			switch {
			case has(r, "GET", "versioning"):
				return http.StatusOK, versioned
			case has(r, "GET", "lifecycle") && c.rules == "":
				return http.StatusNotFound, `<Error><Code>NoSuchLifecycleConfiguration</Code><Message>none</Message></Error>`
			case has(r, "GET", "lifecycle"):
				return http.StatusOK, c.rules
			}
			return 0, ""
		}
		found := ask()
		if got := names(found); !slices.Equal(got, c.want) {
			t.Errorf("with %s: found %q, want %q", c.rules, got, c.want)
		}
		for _, f := range found {
			if f.Severity != health.Critical || !strings.Contains(f.Fix, "delete the lifecycle rule") {
				t.Errorf("%+v", f)
			}
		}
	}

	// The rules of a bucket, which this store has not: the gate keeps them.
	var rules string
	g.answer = func(r *http.Request) (int, string) {
		switch {
		case has(r, "GET", "versioning"):
			return http.StatusOK, versioned
		case has(r, "GET", "lifecycle") && rules == "":
			return http.StatusNotFound, `<Error><Code>NoSuchLifecycleConfiguration</Code><Message>none</Message></Error>`
		case has(r, "GET", "lifecycle"):
			return http.StatusOK, lifecycle(rules)
		}
		return 0, ""
	}
	deletes := func(id string) func(string) {
		return func(fix string) {
			t.Helper()
			if !strings.Contains(fix, "delete the lifecycle rule "+id) {
				t.Errorf("fix: %s", fix)
			}
			rules = ""
		}
	}
	rules = rule("old", "", "Enabled", removes)
	sick(t, "lifecycle-removes", health.Critical, ask, deletes("old"))
	rules = rule("cold", "prod/", "Enabled", freezes)
	sick(t, "lifecycle-freezes", health.Critical, ask, deletes("cold"))
	if found := ask(); len(found) > 0 {
		t.Errorf("without rules: %+v", found)
	}

	behind.Kill()
	if got := names(ask()); !slices.Equal(got, []string{"store-down"}) {
		t.Errorf("of a store that is down: %q", got)
	}
	sick(t, "store-down", health.Critical, ask, func(string) {
		if err := behind.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}

var modified = regexp.MustCompile(`<LastModified>[^<]+</LastModified>`)

// The policies that pgkeep bucket suggest prints are what each role needs, in a
// real store that keeps versions; what another role lacks is found.
func TestFindingsOfRoles(t *testing.T) {
	t.Parallel()
	users := make(map[string]string)
	for _, r := range bucket.Roles() {
		users[string(r)] = "secret of " + string(r)
	}
	server, err := lab.StartS3(t.Context(), lab.S3Options{Users: users, Versions: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Stop() })
	root, done, err := server.API(server.AccessKeyID, server.SecretAccessKey)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(done)
	layout := bucket.Layout{Bucket: server.Bucket, Prefix: "prod", Clusters: []string{"main"}, Basic: true}
	var policy bucket.Policy
	for _, r := range bucket.Roles() {
		one := layout.Role(r, string(r))
		policy.Version = one.Version
		policy.Statement = append(policy.Statement, one.Statement...)
	}
	text, err := json.Marshal(policy)
	if err == nil {
		_, err = root.PutBucketPolicy(t.Context(), &awss3.PutBucketPolicyInput{Bucket: &server.Bucket, Policy: aws.String(string(text))})
	}
	if err != nil {
		t.Fatal(err)
	}
	a := access(t)
	as := func(key, secret string) store.Store {
		t.Helper()
		b, err := s3.Open(t.Context(), s3.Options{Bucket: server.Bucket, Prefix: "prod", Endpoint: server.Endpoint, Region: server.Region, PathStyle: true, CAFile: server.CAFile,
			AccessKeyID: key, SecretAccessKey: secret})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { b.Close() })
		return b
	}
	owner := as(server.AccessKeyID, server.SecretAccessKey)
	if _, _, err := repo.Init(t.Context(), owner, a, []string{identity(t).Recipient().String(), identity(t).Recipient().String()}, time.Now()); err != nil {
		t.Fatal(err)
	}
	const pack = "clusters/main/packs/probe/db1"
	for _, c := range []struct {
		role bucket.Role
		part health.Part
		keys []string
		want []string
	}{
		{bucket.Archiver, writes, []string{probe}, []string{"rules-unknown"}},
		{bucket.Archiver, writes, []string{probe, pack}, []string{"store-write", "store-read", "store-list", "rules-unknown"}},
		{bucket.Backup, writes, []string{probe, pack}, []string{"rules-unknown"}},
		{bucket.Backup, cleans, []string{probe, pack}, []string{"store-delete", "rules-unknown"}},
		{bucket.Restore, health.Part{}, []string{probe, pack}, []string{"rules-unknown"}},
		{bucket.Restore, writes, []string{probe, pack}, []string{"store-write", "rules-unknown"}},
		{bucket.Expirer, health.Part{Deletes: true}, []string{probe, pack}, []string{"rules-unknown"}},
	} {
		found := health.AskBucket(t.Context(), as(string(c.role), users[string(c.role)]), a, c.keys...).Findings(c.part)
		if got := names(found); !slices.Equal(got, c.want) {
			t.Errorf("as %s, for %+v: found %q, want %q:\n%+v", c.role, c.part, got, c.want, found)
		}
	}
	asOwner := func() []health.Finding { return health.AskBucket(t.Context(), owner, a, probe, pack).Findings(cleans) }
	if found := asOwner(); len(found) > 0 {
		t.Errorf("as the owner: %+v", found)
	}
	plain := aws.String("plain") // without Object Lock, which takes versions
	if _, err := root.CreateBucket(t.Context(), &awss3.CreateBucketInput{Bucket: plain}); err != nil {
		t.Fatal(err)
	}
	server.Bucket = *plain
	owner = as(server.AccessKeyID, server.SecretAccessKey)
	if _, _, err := repo.Init(t.Context(), owner, a, []string{identity(t).Recipient().String(), identity(t).Recipient().String()}, time.Now()); err != nil {
		t.Fatal(err)
	}
	sick(t, "versioning-off", health.Notice, asOwner, func(string) {
		on := &types.VersioningConfiguration{Status: types.BucketVersioningStatusEnabled}
		if _, err := root.PutBucketVersioning(t.Context(), &awss3.PutBucketVersioningInput{Bucket: plain, VersioningConfiguration: on}); err != nil {
			t.Fatal(err)
		}
	})
}

// A forgetful store replaces objects.
type forgetful struct{ *store.Mem }

func (s forgetful) Put(ctx context.Context, key string, r io.Reader, _ store.PutOptions) error {
	return s.Mem.Put(ctx, key, r, store.PutOptions{})
}

func TestFindingsOfAnUnfitStore(t *testing.T) {
	mem, plain, secret := new(store.Mem), access(t), access(t)
	plain.Encrypted = false
	recipients := []string{identity(t).Recipient().String(), identity(t).Recipient().String()}
	if _, _, err := repo.Init(t.Context(), mem, plain, nil, time.Now()); err != nil {
		t.Fatal(err)
	}
	var st store.Store = forgetful{mem}
	a := plain
	ask := func() []health.Finding { return health.AskBucket(t.Context(), st, a, probe).Findings(cleans) }
	sick(t, "store-unfit", health.Critical, ask, func(string) { st = mem }) // a newer version of it
	sick(t, "encryption-off", health.Warning, ask, func(fix string) {
		if !strings.Contains(fix, "repository.encryption to age") {
			t.Errorf("fix: %s", fix)
		}
		st, a = new(store.Mem), secret
		if _, _, err := repo.Init(t.Context(), st, a, recipients, time.Now()); err != nil {
			t.Fatal(err)
		}
	})
	if found := ask(); len(found) > 0 {
		t.Errorf("of a good one: %+v", found)
	}
}

func TestKeyFindings(t *testing.T) {
	mem, a := new(store.Mem), access(t)
	first, second := identity(t), identity(t)
	if _, _, err := repo.Init(t.Context(), mem, a, []string{first.Recipient().String()}, time.Now()); err != nil {
		t.Fatal(err)
	}
	ask := func() []health.Finding {
		b := health.AskBucket(t.Context(), mem, a, probe)
		b.Wanted = []string{first.Recipient().String(), second.Recipient().String()}
		return b.Findings(writes)
	}
	a.Identities = []age.Identity{identity(t)} // of somebody else
	found := ask()
	if got := names(found); !slices.Equal(got, []string{"key-closed", "key-single", "key-recipient"}) {
		t.Fatalf("found %+v", found)
	}
	sick(t, "key-closed", health.Critical, ask, func(string) { a.Identities = []age.Identity{first} })
	open := func() *repo.Repo {
		t.Helper()
		r, err := repo.Open(t.Context(), mem, a)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	sick(t, "key-recipient", health.Warning, ask, func(fix string) {
		if _, err := open().AddRecipients(t.Context(), []string{strings.TrimPrefix(fix, "pgkeep key add-recipient ")}, time.Now()); err != nil {
			t.Fatal(err)
		}
	})
	if found := ask(); len(found) > 0 {
		t.Errorf("found %+v", found)
	}
	one := []string{first.Recipient().String()}
	if _, err := open().NewEpoch(t.Context(), one, time.Now()); err != nil {
		t.Fatal(err)
	}
	sick(t, "key-single", health.Warning, ask, func(string) {
		if _, err := open().AddRecipients(t.Context(), []string{second.Recipient().String()}, time.Now()); err != nil {
			t.Fatal(err)
		}
	})

	// pgkeep makes no key that nobody opens; somebody else did.
	text, err := store.ReadAll(t.Context(), mem, "keys/0002.0002.json", store.Range{})
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := bytes.Cut(text, []byte("\n"))
	epoch := make(map[string]any)
	if err := json.Unmarshal(line, &epoch); err != nil {
		t.Fatal(err)
	}
	epoch["epoch"], epoch["version"], epoch["wraps"] = 3, 1, []any{}
	signed, err := a.Signer.Sign(epoch)
	if err == nil {
		err = mem.Put(t.Context(), "keys/0003.0001.json", bytes.NewReader(signed), store.PutOptions{})
	}
	if err != nil {
		t.Fatal(err)
	}
	a.Identities = nil // as on the host of a database
	sick(t, "key-nobody", health.Critical, ask, func(fix string) {
		if fix != "pgkeep key rotate" {
			t.Errorf("fix: %s", fix)
		}
		if _, err := open().NewEpoch(t.Context(), append(one, second.Recipient().String()), time.Now()); err != nil {
			t.Fatal(err)
		}
	})
}

// A store that does not answer is told of once, however that shows.
func TestASilentStoreIsToldOfOnce(t *testing.T) {
	late := fmt.Errorf("open repository: %w", context.DeadlineExceeded)
	b := health.Bucket{Rights: store.Rights{Put: fail.StoreDown, Get: late, List: late, Delete: late}, Ruled: true, RulesErr: late, Err: late}
	if got := names(b.Findings(cleans)); !slices.Equal(got, []string{"store-down"}) {
		t.Errorf("found %v", got)
	}
}
