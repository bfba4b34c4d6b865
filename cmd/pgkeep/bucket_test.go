package main

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"

	"github.com/pgkeep/pgkeep/internal/bucket"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/lab"
)

// A guarded is a repository in a bucket with versions, in which the documents of
// pgkeep bucket suggest are in force. Each role has an access key that is called
// like it.
//
// versitygw evaluates policies, and knows no condition about If-None-Match. So
// there are two judges, of which either may refuse: versitygw itself, with the
// documents of --basic, and in front of it a gate with the full ones.
type guarded struct {
	*world
	gate *gate
	root *s3.Client
}

func newGuarded(t *testing.T) *guarded {
	t.Helper()
	users := make(map[string]string)
	for _, r := range bucket.Roles() {
		users[string(r)] = rand.Text()
	}
	server, err := lab.StartS3(t.Context(), lab.S3Options{Users: users, Versions: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Stop() })
	g := &guarded{world: &world{t: t, s3: server, dir: lab.DirForTest(t)}}
	g.gate = newGate(t, server)
	g.operator = filepath.Join(g.dir, "operator.key")
	program := filepath.Join(g.dir, "pgkeep-wal")
	if err := lab.Build(t.Context(), g.dir, "pgkeep-wal"); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", g.dir+":"+os.Getenv("PATH")) // where a restore looks for it
	ca, err := os.ReadFile(g.gate.ca)
	if err != nil {
		t.Fatal(err)
	}
	g.write("ca.pem", string(ca))
	archive := fmt.Sprintf("%s push --config %s/archiver.yaml %%p", program, g.dir)
	g.pg = lab.PostgresForTest(t, lab.PostgresOptions{WALSegmentMB: 1, Settings: map[string]string{"archive_mode": "on", "archive_command": archive}})
	g.exec("postgres", cluster.RoleSQL("keeper", cluster.Duties{Physical: true, Logical: true}), "CREATE DATABASE shop")
	g.exec("shop", "CREATE TABLE orders AS SELECT i, md5(i::text) FROM generate_series(1, 5000) i")
	users["root"] = server.SecretAccessKey
	for role, secret := range users {
		g.write(role+".secret", secret)
		key := role
		if role == "root" {
			key = server.AccessKeyID
		}
		text := fmt.Sprintf(`
repository: {url: 's3://%[1]s/prod', endpoint: '%[2]s', ca_file: %[3]s/ca.pem, access_key_id: %[4]s, secret_access_key_file: %[3]s/%[5]s.secret}
keys: {signing_key: %[3]s/signing.key, metadata_identity: %[3]s/metadata.key%[6]s}
spool: %[3]s/spool
host: %[8]s
restore_test: {directory: %[3]s/s}
temporal: {address: "127.0.0.1:9"} # nobody is there
clusters: {main: {host: db1, conninfo: "%[7]s", retention: {daily: 1, lock: 2d, lock_mode: compliance, host: store1}}}
`, server.Bucket, g.gate.url, g.dir, key, role, map[bool]string{true: ", identity: " + g.operator}[role == "restore"],
			strings.Replace(g.pg.Conninfo(), "user=postgres", "user=keeper", 1), map[bool]string{true: "store1", false: "db1"}[role == "expirer"])
		file := g.write(role+".yaml", text)
		if role == "root" {
			g.config = file
		}
	}
	for _, dir := range []string{"spool", "sandbox"} {
		if err := os.Mkdir(filepath.Join(g.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	api, done, err := server.API(server.AccessKeyID, server.SecretAccessKey)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(done)
	g.root = api
	g.ok("key", "init", "--new-identity", g.operator)
	g.own()
	g.enforce()
	return g
}

func (g *guarded) own() {
	g.t.Helper()
	if err := lab.Own(g.dir); err != nil {
		g.t.Fatal(err)
	}
}

// enforce puts the documents in force.
func (g *guarded) enforce() {
	g.t.Helper()
	ctx := g.t.Context()
	var basic bucket.Policy
	for _, r := range bucket.Roles() {
		var full, one bucket.Policy
		g.decode(g.ok("bucket", "suggest", "--role", string(r)), &full)
		g.decode(g.ok("bucket", "suggest", "--basic", "--role", string(r), "--principal", string(r)), &one)
		g.gate.roles[string(r)] = full
		basic.Version, basic.Statement = one.Version, append(basic.Statement, one.Statement...)
	}
	var all bucket.Settings
	g.decode(g.ok("bucket", "suggest", "--days", "1"), &all)
	g.gate.bucket = all.Policy
	all = bucket.Settings{}
	g.decode(g.ok("bucket", "suggest", "--days", "1", "--basic"), &all)
	basic.Statement = append(basic.Statement, all.Policy.Statement...)
	text, err := json.Marshal(basic)
	if err == nil {
		_, err = g.root.PutBucketPolicy(ctx, &s3.PutBucketPolicyInput{Bucket: &g.s3.Bucket, Policy: aws.String(string(text))})
	}
	if err == nil {
		_, err = g.root.PutObjectLockConfiguration(ctx, &s3.PutObjectLockConfigurationInput{Bucket: &g.s3.Bucket, ObjectLockConfiguration: &types.ObjectLockConfiguration{
			ObjectLockEnabled: types.ObjectLockEnabled(all.Lock.ObjectLockEnabled),
			Rule: &types.ObjectLockRule{DefaultRetention: &types.DefaultRetention{
				Mode: types.ObjectLockRetentionMode(all.Lock.Rule.DefaultRetention.Mode), Days: aws.Int32(int32(all.Lock.Rule.DefaultRetention.Days))}}}})
	}
	if err != nil {
		g.t.Fatalf("%v; of this policy:\n%s", err, text)
	}
}

func (g *guarded) decode(text string, v any) {
	g.t.Helper()
	if err := json.Unmarshal([]byte(text), v); err != nil {
		g.t.Fatalf("%v in %s", err, text)
	}
}

// as runs pgkeep with the credentials of a role; it must succeed.
func (g *guarded) as(r bucket.Role, args ...string) string {
	g.t.Helper()
	status, out, said := g.with(g.t.Context(), filepath.Join(g.dir, string(r)+".yaml"), args...)
	g.own()
	if status != 0 {
		g.t.Fatalf("as %s: pgkeep %s = %d\n%s%s", r, strings.Join(args, " "), status, out, said)
	}
	return out
}

// With its policy each role does all of its work, and is denied nothing on the
// way; and whatever else it tries, nothing is lost.
func TestRolesDoTheirWorkAndNoHarm(t *testing.T) {
	g := newGuarded(t)
	g.as(bucket.Backup, "backup", "--direct", "--kind", "physical", "main") // waits for the archiver
	g.as(bucket.Backup, "backup", "--direct", "--kind", "logical", "main")
	g.as(bucket.Backup, "backup", "--direct", "--kind", "physical", "main")
	g.as(bucket.Backup, "wal", "audit", "--fill")
	g.examined(bucket.Backup)
	g.as(bucket.Backup, "verify", "--all")
	g.as(bucket.Restore, "verify", "--full", "--all")
	g.as(bucket.Restore, "windows")
	dir := filepath.Join(lab.DirForTest(t), "data")
	g.as(bucket.Restore, "restore", "--target-dir", dir)
	g.as(bucket.Restore, "restore", "--target", g.pg.Conninfo(), "--database", "shop", "--to", "copy", "latest")
	g.same("shop", "copy")
	g.as(bucket.Restore, "restore-test", "--direct", "--cluster", "main")
	g.fetch(dir)
	var list struct{ Backups []struct{ ID string } }
	g.decode(g.as(bucket.Expirer, "list", "--json"), &list)
	g.as(bucket.Expirer, "delete", "--yes", list.Backups[0].ID)
	g.as(bucket.Expirer, "hold", "add", "--reason", "a test", list.Backups[1].ID)
	g.as(bucket.Expirer, "hold", "remove", list.Backups[1].ID)
	if out := g.as(bucket.Expirer, "expire"); !regexp.MustCompile(`locked: \d+ objects, the first until .*: \d+ are due, until`).MatchString(out) {
		t.Errorf("planned:\n%s", out)
	}
	g.as(bucket.Expirer, "expire", "--apply", "--yes")
	if out := g.as(bucket.Expirer, "expire"); !strings.Contains(out, ": none is due") {
		t.Errorf("planned once more:\n%s", out)
	}
	g.locked(36 * time.Hour)
	g.examined(bucket.Expirer)
	g.as(bucket.Restore, "verify", "--all")
	if shown := g.as(bucket.Archiver, "bucket", "show"); strings.Count(shown, "not readable with these credentials") != 4 {
		t.Errorf("shown to the archiver:\n%s", shown)
	}
	if shown := g.ok("bucket", "show"); !strings.Contains(shown, `"COMPLIANCE"`) || !strings.Contains(shown, `"ArchiverReadArchive"`) || !strings.Contains(shown, "lifecycle: the service does not tell") {
		t.Errorf("shown to the administrator:\n%s", shown)
	}
	g.gate.mu.Lock()
	for _, what := range g.gate.denied {
		if !regexp.MustCompile(`: s3:(GetBucket|GetLifecycle)|: s3:(Delete|Put)Object on .*/probe/`).MatchString(what) { // doctor tries what it may
			t.Errorf("denied on the way: %s", what)
		}
	}
	g.gate.mu.Unlock()

	before, locks := g.versions(), make(map[string]time.Time)
	for version := range before {
		key, id, _ := strings.Cut(version, " ")
		locks[version] = g.lock(key, id)
	}
	tried := 0
	for _, r := range bucket.Roles() {
		for where, endpoint := range map[string]string{"the gate": g.gate.url, "versitygw": g.s3.Endpoint} {
			tried += g.attack(r, where, endpoint)
		}
	}
	after := g.versions()
	for version, object := range before {
		if after[version] != object {
			t.Errorf("version %s of %s is lost", version, object)
		}
		key, id, _ := strings.Cut(version, " ")
		if now := g.lock(key, id); now.Before(locks[version]) {
			t.Errorf("version %s was locked until %v, and is until %v", version, locks[version], now)
		}
	}
	if len(before) < 30 || tried < 500 {
		t.Errorf("%d attacks on %d versions: too few to tell", tried, len(before))
	}
	t.Logf("%d attacks on %d versions", tried, len(before))
}

// examined has doctor look at the host of a role: of the bucket it finds only that
// nobody there may read its settings.
func (g *guarded) examined(r bucket.Role) {
	g.t.Helper()
	var all struct{ Findings []health.Finding }
	_, out, said := g.with(g.t.Context(), filepath.Join(g.dir, string(r)+".yaml"), "doctor", "--json")
	g.own()
	if err := json.Unmarshal([]byte(out), &all); err != nil {
		g.t.Fatalf("doctor as %s: %v\n%s%s", r, err, out, said)
	}
	for _, f := range all.Findings {
		if name := f.Name; strings.HasPrefix(name, "store-") || strings.HasPrefix(name, "lock-") || name == "repository" {
			g.t.Errorf("doctor as %s: %s: %s", r, name, f.What)
		}
	}
}

// fetch brings back a segment as a recovery of a data directory does.
func (g *guarded) fetch(dir string) {
	g.t.Helper()
	var archived []string
	for version := range g.versions() {
		if name := regexp.MustCompile(`/wal/.*/([0-9A-F]{24})\.zst`).FindStringSubmatch(version); name != nil {
			archived = append(archived, name[1])
		}
	}
	to := filepath.Join(g.dir, "fetched")
	cmd := exec.Command(filepath.Join(g.dir, "pgkeep-wal"), "fetch", "--config", filepath.Join(g.dir, "restore.yaml"), "--pgdata", dir, slices.Max(archived), to)
	if err := lab.AsServer(cmd); err != nil {
		g.t.Fatal(err)
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		g.t.Errorf("fetch: %v\n%s", err, out)
	}
	if info, err := os.Stat(to); err != nil || info.Size() != 1<<20 {
		g.t.Errorf("fetched: %v, %v", info, err)
	}
}

// lock is when that of a version ends; zero: there is none.
func (g *guarded) lock(key, version string) time.Time {
	g.t.Helper()
	out, err := g.root.GetObjectRetention(g.t.Context(), &s3.GetObjectRetentionInput{Bucket: &g.s3.Bucket, Key: &key, VersionId: &version})
	if none, ok := errors.AsType[smithy.APIError](err); ok && none.ErrorCode() == "NoSuchObjectLockConfiguration" {
		return time.Time{}
	}
	if err != nil {
		g.t.Fatal(err)
	}
	return *out.Retention.RetainUntilDate
}

// locked looks whether everything is, for so long at least.
func (g *guarded) locked(atLeast time.Duration) {
	g.t.Helper()
	objects := 0
	for version := range g.versions() {
		key, id, _ := strings.Cut(version, " ")
		if _, err := g.root.HeadObject(g.t.Context(), &s3.HeadObjectInput{Bucket: &g.s3.Bucket, Key: &key}); err != nil || strings.Contains(key, "/latest-") || strings.Contains(key, "/probe/") {
			continue // deleted
		}
		if until := g.lock(key, id); time.Until(until) < atLeast {
			g.t.Errorf("%s is locked until %v", key, until)
		}
		objects++
	}
	if objects < 20 {
		g.t.Errorf("only %d objects stand", objects)
	}
}

// versions are the keys of all versions, with their content's tag.
func (g *guarded) versions() map[string]string {
	g.t.Helper()
	all := make(map[string]string)
	in := &s3.ListObjectVersionsInput{Bucket: &g.s3.Bucket}
	for {
		out, err := g.root.ListObjectVersions(g.t.Context(), in)
		if err != nil {
			g.t.Fatal(err)
		}
		for _, v := range out.Versions {
			all[*v.Key+" "+*v.VersionId] = *v.Key + " " + *v.ETag
		}
		if !aws.ToBool(out.IsTruncated) {
			return all
		}
		in.KeyMarker, in.VersionIdMarker = out.NextKeyMarker, out.NextVersionIdMarker
	}
}

// attack tries, with the access key of a role, whatever destroys, replaces or
// uncovers objects of each kind, and returns how much that was.
func (g *guarded) attack(r bucket.Role, where, endpoint string) (tried int) {
	g.t.Helper()
	ctx := g.t.Context()
	b := &g.s3.Bucket
	secret, err := os.ReadFile(filepath.Join(g.dir, string(r)+".secret"))
	if err != nil {
		g.t.Fatal(err)
	}
	api, done, err := g.s3.API(string(r), string(secret))
	if err != nil {
		g.t.Fatal(err)
	}
	defer done()
	if endpoint != g.s3.Endpoint {
		opt := api.Options()
		opt.BaseEndpoint, opt.HTTPClient = &endpoint, g.gate.client
		api = s3.New(opt)
	}
	try := func(what string, allowed bool, err error) {
		g.t.Helper()
		tried++
		if allowed != (err == nil) {
			g.t.Errorf("%s, at %s: %s: %v", r, where, what, err)
		}
	}
	for _, a := range []struct {
		what string
		do   func() error
	}{
		{"suspend versioning", func() error {
			_, err := api.PutBucketVersioning(ctx, &s3.PutBucketVersioningInput{Bucket: b, VersioningConfiguration: &types.VersioningConfiguration{Status: types.BucketVersioningStatusSuspended}})
			return err
		}},
		{"replace the policy", func() error {
			_, err := api.PutBucketPolicy(ctx, &s3.PutBucketPolicyInput{Bucket: b, Policy: aws.String(`{"Version":"2012-10-17","Statement":[]}`)})
			return err
		}},
		{"delete the policy", func() error {
			_, err := api.DeleteBucketPolicy(ctx, &s3.DeleteBucketPolicyInput{Bucket: b})
			return err
		}},
		{"let objects end", func() error {
			_, err := api.PutBucketLifecycleConfiguration(ctx, &s3.PutBucketLifecycleConfigurationInput{Bucket: b, LifecycleConfiguration: &types.BucketLifecycleConfiguration{
				Rules: []types.LifecycleRule{{ID: aws.String("x"), Status: types.ExpirationStatusEnabled, Filter: &types.LifecycleRuleFilter{Prefix: aws.String("")}, Expiration: &types.LifecycleExpiration{Days: aws.Int32(1)}}}}})
			return err
		}},
		{"end the lock", func() error {
			_, err := api.PutObjectLockConfiguration(ctx, &s3.PutObjectLockConfigurationInput{Bucket: b, ObjectLockConfiguration: &types.ObjectLockConfiguration{ObjectLockEnabled: types.ObjectLockEnabledEnabled}})
			return err
		}},
		{"open the bucket", func() error {
			_, err := api.PutBucketAcl(ctx, &s3.PutBucketAclInput{Bucket: b, ACL: types.BucketCannedACLPublicReadWrite})
			return err
		}},
		{"delete the bucket", func() error {
			_, err := api.DeleteBucket(ctx, &s3.DeleteBucketInput{Bucket: b})
			return err
		}},
		{"plant an object elsewhere", func() error {
			_, err := api.PutObject(ctx, &s3.PutObjectInput{Bucket: b, Key: aws.String("prod/clusters/other/wal/x"), Body: strings.NewReader("x"), IfNoneMatch: aws.String("*")})
			return err
		}},
		{"list another cluster", func() error {
			_, err := api.ListObjectsV2(ctx, &s3.ListObjectsV2Input{Bucket: b, Prefix: aws.String("prod/clusters/other/")})
			return err
		}},
	} {
		try(a.what, false, a.do())
	}
	if r != bucket.Expirer { // whose work it is
		_, err := api.PutObject(ctx, &s3.PutObjectInput{Bucket: b, Key: aws.String("prod/clusters/main/backups/x/deleted.json"), Body: strings.NewReader("x"), IfNoneMatch: aws.String("*")})
		try("plant a tombstone", false, err)
		_, err = api.PutObject(ctx, &s3.PutObjectInput{Bucket: b, Key: aws.String("prod/clusters/main/wal/7-15/expired/000001.json"), Body: strings.NewReader("x"), IfNoneMatch: aws.String("*")})
		try("hide every hole", false, err)
	}
	for _, v := range g.victims() {
		creates := map[bucket.Role]*regexp.Regexp{
			bucket.Archiver: regexp.MustCompile(`/wal/([^/]*/(........|claims)|probe)/`),
			bucket.Backup:   regexp.MustCompile(`/wal/([^/]*/(........|claims)|probe)/|/(intent|draft|manifest|proof)[^/]*$|/tree-|/packs/|/names/main|/latest-`),
			bucket.Restore:  regexp.MustCompile(`/proof-`),
			bucket.Expirer:  regexp.MustCompile(`/deleted\.json|/settled-|/hold-|/expired/|/latest-|/clock-`),
		}[r].MatchString("/" + v.key)
		advice := strings.Contains(v.key, "/latest-") // the only object that is replaced
		mayRemove := r == bucket.Expirer && strings.Contains(v.key, "/clusters/main/")
		for what, do := range map[string]func() error{
			"destroy a version of ": func() error {
				_, err := api.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: b, Key: &v.key, VersionId: &v.version})
				return err
			},
			"destroy, past the lock, a version of ": func() error {
				_, err := api.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: b, Key: &v.key, VersionId: &v.version, BypassGovernanceRetention: aws.Bool(true)})
				return err
			},
			"destroy, among others, a version of ": func() error {
				return first(api.DeleteObjects(ctx, &s3.DeleteObjectsInput{Bucket: b, Delete: &types.Delete{Objects: []types.ObjectIdentifier{{Key: &v.key, VersionId: &v.version}}}}))
			},
			"shorten the lock of ": func() error {
				_, err := api.PutObjectRetention(ctx, &s3.PutObjectRetentionInput{Bucket: b, Key: &v.key, VersionId: &v.version,
					Retention: &types.ObjectLockRetention{Mode: types.ObjectLockRetentionModeGovernance, RetainUntilDate: aws.Time(time.Now().Add(time.Minute))}})
				return err
			},
			"lock for a century ": func() error {
				if where == "versitygw" { // it evaluates no such condition
					return errors.New("not tried")
				}
				_, err := api.PutObjectRetention(ctx, &s3.PutObjectRetentionInput{Bucket: b, Key: &v.key, VersionId: &v.version,
					Retention: &types.ObjectLockRetention{Mode: types.ObjectLockRetentionModeCompliance, RetainUntilDate: aws.Time(time.Now().AddDate(100, 0, 0))}})
				return err
			},
			"take the hold off ": func() error {
				_, err := api.PutObjectLegalHold(ctx, &s3.PutObjectLegalHoldInput{Bucket: b, Key: &v.key, LegalHold: &types.ObjectLockLegalHold{Status: types.ObjectLockLegalHoldStatusOff}})
				return err
			},
			"open to everybody ": func() error {
				_, err := api.PutObjectAcl(ctx, &s3.PutObjectAclInput{Bucket: b, Key: &v.key, ACL: types.ObjectCannedACLPublicRead})
				return err
			},
		} {
			// An older version has no lock in versitygw: to give it one is the expirer's to do.
			try(what+v.key, mayRemove && !v.locked && strings.HasPrefix(what, "shorten"), do())
		}
		_, err := api.PutObject(ctx, &s3.PutObjectInput{Bucket: b, Key: &v.key, Body: strings.NewReader("ransom"), IfNoneMatch: aws.String("*")})
		try("create once more "+v.key, false, err)
		_, err = api.PutObject(ctx, &s3.PutObjectInput{Bucket: b, Key: &v.key, Body: strings.NewReader("ransom")})
		try("replace "+v.key, creates && (advice || where == "versitygw"), err)
		_, err = api.DeleteObject(ctx, &s3.DeleteObjectInput{Bucket: b, Key: &v.key})
		try("delete "+v.key, mayRemove, err)
	}
	return tried
}

// first is the failure of a request about one object.
func first(out *s3.DeleteObjectsOutput, err error) error {
	if err == nil && len(out.Errors) > 0 {
		return fmt.Errorf("%s", aws.ToString(out.Errors[0].Code))
	}
	return err
}

type victim struct {
	key, version string
	locked       bool // for longer than the attacks ask for
}

// victims are an object of each kind.
func (g *guarded) victims() (all []victim) {
	g.t.Helper()
	seen := make(map[string]bool)
	id := regexp.MustCompile(`[0-9A-F]{8,}[^/]*|[0-9a-f]{8}\b|\d+`)
	versions := g.versions()
	for _, v := range slices.Sorted(func(yield func(string) bool) {
		for name := range versions {
			if !yield(name) {
				return
			}
		}
	}) {
		key, version, _ := strings.Cut(v, " ")
		if kind := id.ReplaceAllString(key, "*"); !seen[kind] {
			seen[kind] = true
			all = append(all, victim{key, version, time.Until(g.lock(key, version)) > time.Hour})
		}
	}
	return all
}

// A gate evaluates policies in front of an S3 server, as "Policy evaluation
// logic" of the IAM User Guide describes: what a statement denies is denied, and
// so is what none allows.
type gate struct {
	url, ca string
	client  *http.Client
	root    string // access key that no policy is for
	roles   map[string]bucket.Policy
	bucket  bucket.Policy

	mu     sync.Mutex
	denied []string
}

func newGate(t *testing.T, server *lab.S3) *gate {
	t.Helper()
	ca, err := lab.NewCA(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	cert, key, err := ca.Issue("gate", "127.0.0.1")
	if err != nil {
		t.Fatal(err)
	}
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	behind, err := url.Parse(server.Endpoint)
	if err != nil {
		t.Fatal(err)
	}
	g := &gate{ca: ca.File, client: trusting(t, ca.File), root: server.AccessKeyID, roles: make(map[string]bucket.Policy)}
	proxy := &httputil.ReverseProxy{
		Rewrite:   func(r *httputil.ProxyRequest) { r.Out.URL.Scheme, r.Out.URL.Host = behind.Scheme, behind.Host },
		Transport: trusting(t, server.CAFile).Transport,
	}
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if what, ok := g.allows(r); !ok {
			g.mu.Lock()
			g.denied = append(g.denied, what)
			g.mu.Unlock()
			w.Header().Set("Content-Type", "application/xml")
			w.WriteHeader(http.StatusForbidden)
			io.WriteString(w, "<Error><Code>AccessDenied</Code><Message>by the gate</Message></Error>")
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	s.Config.ErrorLog = log.New(io.Discard, "", 0) // of connections that are closed early
	s.TLS = &tls.Config{Certificates: []tls.Certificate{pair}}
	s.StartTLS()
	t.Cleanup(s.CloseClientConnections)
	g.url = s.URL
	return g
}

func trusting(t *testing.T, ca string) *http.Client {
	t.Helper()
	pem, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	tr := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr}
}

var credential = regexp.MustCompile(`Credential=([^/]+)/`)

// allows judges a request, and names it.
func (g *gate) allows(r *http.Request) (what string, ok bool) {
	match := credential.FindStringSubmatch(r.Header.Get("Authorization"))
	if match == nil {
		return "nobody", false
	}
	if match[1] == g.root {
		return "", true
	}
	for _, a := range asked(r) {
		what = fmt.Sprintf("%s: %s on %s", match[1], a.action, a.resource)
		if a.by(g.bucket, "Deny") || !a.by(g.roles[match[1]], "Allow") {
			return what, false
		}
	}
	return what, true
}

// An ask is an action on a thing, under circumstances.
type ask struct {
	action, resource string
	facts            map[string]string
}

// asked are the actions of a request: S3 API Reference, with "Actions defined by
// Amazon S3" of the Service Authorization Reference.
func asked(r *http.Request) []ask {
	name, key, inside := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/")
	q := r.URL.Query()
	facts := map[string]string{"aws:SecureTransport": "true"}
	if h := r.Header.Get("If-None-Match"); h != "" && r.Method != http.MethodGet {
		facts["s3:if-none-match"] = h
	}
	if h := r.Header.Get("X-Amz-Server-Side-Encryption-Customer-Algorithm"); h != "" {
		facts["s3:x-amz-server-side-encryption-customer-algorithm"] = h
	}
	if q.Has("prefix") {
		facts["s3:prefix"] = q.Get("prefix")
	}
	one := func(action string) []ask {
		resource := "arn:aws:s3:::" + name
		if inside && key != "" {
			resource += "/" + key
		}
		return []ask{{"s3:" + action, resource, facts}}
	}
	verb := map[string]string{"GET": "Get", "HEAD": "Get", "PUT": "Put", "DELETE": "Delete"}[r.Method]
	if key == "" {
		for param, thing := range map[string]string{"versioning": "BucketVersioning", "lifecycle": "LifecycleConfiguration", "policy": "BucketPolicy",
			"object-lock": "BucketObjectLockConfiguration", "acl": "BucketAcl"} {
			if q.Has(param) {
				return one(verb + thing)
			}
		}
		switch {
		case r.Method == http.MethodPost && q.Has("delete"):
			return deletes(r, name, facts)
		case q.Has("uploads"):
			return one("ListBucketMultipartUploads")
		case q.Has("versions"):
			return one("ListBucketVersions")
		case verb == "Get":
			return one("ListBucket")
		}
		return one(verb + "Bucket")
	}
	if verb == "Put" && q.Has("retention") {
		facts["s3:object-lock-remaining-retention-days"] = remaining(r)
	}
	for param, thing := range map[string]string{"acl": "ObjectAcl", "retention": "ObjectRetention", "legal-hold": "ObjectLegalHold", "tagging": "ObjectTagging"} {
		if q.Has(param) {
			return one(verb + thing)
		}
	}
	if verb == "Put" || r.Method == http.MethodPost {
		facts["s3:ObjectCreationOperation"] = fmt.Sprint(!q.Has("partNumber") && !q.Has("uploads"))
		return one("PutObject")
	}
	switch {
	case verb == "Delete" && q.Has("uploadId"):
		return one("AbortMultipartUpload")
	case q.Has("versionId"):
		return one(verb + "ObjectVersion")
	}
	return one(verb + "Object")
}

// remaining reads for how many days a lock is to be, and leaves the request as it was.
func remaining(r *http.Request) string {
	body, err := io.ReadAll(r.Body)
	r.Body = io.NopCloser(bytes.NewReader(body))
	var lock struct{ RetainUntilDate time.Time }
	if err == nil {
		err = xml.Unmarshal(body, &lock)
	}
	if err != nil {
		return "unreadable"
	}
	return strconv.Itoa(int((time.Until(lock.RetainUntilDate) + 24*time.Hour - 1) / (24 * time.Hour)))
}

// deletes reads which objects a request is about, and leaves it as it was.
func deletes(r *http.Request, name string, facts map[string]string) (all []ask) {
	body, err := io.ReadAll(r.Body)
	var list struct {
		Object []struct{ Key, VersionId string }
	}
	if err == nil {
		err = xml.Unmarshal(body, &list)
	}
	if err != nil {
		return []ask{{"unreadable", "", nil}}
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	for _, o := range list.Object {
		action := "s3:DeleteObject"
		if o.VersionId != "" {
			action += "Version"
		}
		all = append(all, ask{action, "arn:aws:s3:::" + name + "/" + o.Key, facts})
	}
	return all
}

// by reports whether a statement of a policy with that effect is about it.
func (a ask) by(p bucket.Policy, effect string) bool {
	return slices.ContainsFunc(p.Statement, func(s bucket.Statement) bool {
		about := func(patterns []string, text string) bool {
			return slices.ContainsFunc(patterns, func(pattern string) bool { return like(pattern, text) })
		}
		if s.Effect != effect || !about(s.Action, a.action) || !about(s.Resource, a.resource) {
			return false
		}
		for operator, keys := range s.Condition {
			for key, want := range keys {
				got, there := a.facts[key]
				var holds bool
				switch operator {
				case "Null":
					holds = want[0] == fmt.Sprint(!there)
				case "Bool":
					holds = there && want[0] == got
				case "NumericLessThanEqualsIfExists":
					limit, lerr := strconv.Atoi(want[0])
					have, herr := strconv.Atoi(got)
					holds = !there || lerr == nil && herr == nil && have <= limit
				case "StringLikeIfExists":
					holds = !there || about(want, got)
				default:
					panic("no such operator here: " + operator)
				}
				if !holds {
					return false
				}
			}
		}
		return true
	})
}

// like matches a text with a pattern in which * is any text, and ? one character.
func like(pattern, text string) bool {
	return regexp.MustCompile("^" + strings.NewReplacer(`\*`, ".*", `\?`, ".").Replace(regexp.QuoteMeta(pattern)) + "$").MatchString(text)
}
