package config_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
)

const whole = `
repository:
  url: s3://backups/prod/eu
  endpoint: https://s3.example:9000/
  ca_file: /etc/pgkeep/ca.pem
  access_key_id: AKIA
  secret_access_key_file: /etc/pgkeep/s3.secret
keys:
  signing_key: /etc/pgkeep/sign.key
  recipients:
    - age1aaa
    - age1bbb
temporal:
  address: temporal.example:7233
  namespace: backups
  ui_url: https://temporal.example
spool: /srv/spool
restore_test:
  directory: /srv/tests
  memory: 2GB
  policy: random
  assertions:
    - {name: orders, database: shop, query: SELECT count(*) FROM orders, want: "6000 | \\N", cluster: main}
    - name: fresh
      database: shop
      query: SELECT max(day) FROM orders
log: {level: debug, format: json}
clusters:
  main:
    conninfo: host=/run/postgresql user=backup
    logical:
      databases: [shop, 2024]
      jobs: 4
      role_passwords: true
      stall_timeout: 90s
    physical:
      readers: 3
      rate: 100MB
      max_standby_lag: 1GB
      max_read_latency: 50ms
      spread_checkpoint: true
      wal_wait: 20m
      count_rows: [shop.public.*, "*.audit.log_?"]
  other:
    conninfo: postgresql://backup@db2/postgres
    host: db2
schedules:
  - cluster: main
    cron: "30  1 * * mon-fri"
    time_zone: Europe/Berlin
    catchup_window: 1d
`

func parse(t *testing.T, text string, environ ...string) (*config.Config, error) {
	t.Helper()
	return config.Parse("pgkeep.yaml", []byte(text), config.Options{Environ: environ, Hostname: "db1"})
}

func TestEveryKindOfValueIsRead(t *testing.T) {
	got, err := parse(t, whole)
	if err != nil {
		t.Fatal(err)
	}
	logical := config.Logical{Jobs: 2, StallTimeout: 10 * time.Minute, LockWait: 5 * time.Minute}
	keep := config.Retention{Min: 2, Grace: 7 * 24 * time.Hour, LockMode: config.LockGovernance}
	archive := config.WAL{Prefetch: 8, HoleGrace: 30 * time.Second}
	big := logical
	big.Databases, big.Jobs, big.RolePasswords, big.StallTimeout = []string{"shop", "2024"}, 4, true, 90*time.Second
	physical := config.Physical{WALWait: time.Hour}
	gentle := config.Physical{Readers: 3, Rate: 100 << 20, MaxStandbyLag: 1 << 30, MaxReadLatency: 50 * time.Millisecond, SpreadCheckpoint: true, WALWait: 20 * time.Minute, CountRows: []config.Tables{"shop.public.*", "*.audit.log_?"}}
	want := &config.Config{
		Repository: config.Repository{
			URL:      config.Location{Bucket: "backups", Prefix: "prod/eu"},
			Endpoint: "https://s3.example:9000", Region: "us-east-1", PathStyle: config.PathStyleAuto,
			CAFile: "/etc/pgkeep/ca.pem", AccessKeyID: "AKIA", SecretAccessKeyFile: "/etc/pgkeep/s3.secret",
			Encryption: config.EncryptionAge,
		},
		Keys:     config.Keys{SigningKey: "/etc/pgkeep/sign.key", Recipients: []string{"age1aaa", "age1bbb"}},
		Temporal: config.Temporal{Address: "temporal.example:7233", Namespace: "backups", UIURL: "https://temporal.example"},
		Host:     "db1",
		Spool:    "/srv/spool",
		RestoreTest: config.RestoreTest{Directory: "/srv/tests", User: "postgres", Isolation: "required", Memory: 2 << 30, Policy: "random", Limit: 12 * time.Hour, Within: 7 * 24 * time.Hour, Jobs: 2,
			Assertions: []config.Assertion{
				{Name: "orders", Cluster: "main", Database: "shop", Query: "SELECT count(*) FROM orders", Want: config.Rows{{"6000", `\N`}}, Timeout: time.Minute},
				{Name: "fresh", Database: "shop", Query: "SELECT max(day) FROM orders", Timeout: time.Minute},
			}},
		Log: config.Log{Level: config.LogDebug, Format: config.LogJSON},
		Clusters: map[config.Name]config.Cluster{
			"main":  {Conninfo: "host=/run/postgresql user=backup", Host: "db1", Logical: big, Physical: gentle, WAL: archive, Retention: keep},
			"other": {Conninfo: "postgresql://backup@db2/postgres", Host: "db2", Logical: logical, Physical: physical, WAL: archive, Retention: keep},
		},
		Schedules: []config.Schedule{{
			Cluster: "main", Kind: config.KindLogical, Cron: "30 1 * * mon-fri", TimeZone: "Europe/Berlin",
			Jitter: 10 * time.Minute, CatchupWindow: 24 * time.Hour, RunTimeout: 24 * time.Hour,
		}},
	}
	if diff := cmp.Diff(want, got, cmpopts.IgnoreUnexported(config.Config{}), cmp.AllowUnexported(config.Secret{})); diff != "" {
		t.Errorf("configuration differs (-want +got):\n%s", diff)
	}
}

func TestNothingGivenIsAConfiguration(t *testing.T) {
	for _, text := range []string{"", "# nothing\n", "---\n", "clusters:\nschedules:\nrepository:\n"} {
		c, err := parse(t, text)
		if err != nil {
			t.Errorf("%q: %v", text, err)
		} else if c.Spool != "/var/lib/pgkeep/spool" || c.Host != "db1" || c.Repository.Encryption != config.EncryptionAge {
			t.Errorf("%q: defaults are missing: %+v", text, c)
		}
	}
}

// A restore may know nothing of the cluster but its name.
func TestAClusterThatIsNotThereIsArchivedByTheDefaults(t *testing.T) {
	c, err := parse(t, `clusters: {main: {conninfo: "host=/x", wal: {prefetch: 3}}}`)
	if err != nil {
		t.Fatal(err)
	}
	if got, want := c.WAL("main"), (config.WAL{Prefetch: 3, HoleGrace: 30 * time.Second}); got != want {
		t.Errorf("main: %+v, want %+v", got, want)
	}
	if got, want := c.WAL("other"), (config.WAL{Prefetch: 8, HoleGrace: 30 * time.Second}); got != want {
		t.Errorf("other: %+v, want %+v", got, want)
	}
}

func TestEveryProblemIsToldAtOnceWithItsLine(t *testing.T) {
	_, err := parse(t, `repository:
  url: ftp://x
  encryption: rot13
clsuters: {}
spool: var/spool
spool: /var/spool
clusters:
  Main:
    conninfo: host=x
  main:
    logical:
      jbos: 3
      jobs: many
      role_passwords: yes
      stall_timeout: 10
schedules:
  - cron: "61 1 * * *"
    cluster: main
    time_zone: Berlin
  - kind: logical
`, "PGKEEP_SPOOOL=/x", "PGKEEP_REPOSITORY_PATH_STYLE=sometimes", "PGKEEP_CLUSTERS=1", "PGKEEP_REGION=")
	want := `pgkeep.yaml:2: repository.url: "ftp://x": want s3://bucket/prefix or file:///directory
pgkeep.yaml:3: repository.encryption: "rot13": want age or none
pgkeep.yaml:4: unknown key "clsuters" (did you mean "clusters"?)
pgkeep.yaml:5: spool: "var/spool": want an absolute path
pgkeep.yaml:6: spool is given twice, the first time in line 5
pgkeep.yaml:8: clusters: "Main": want lower-case letters, digits, _ and -, at most 63, beginning with a letter or a digit
pgkeep.yaml:10: clusters.main has no conninfo
pgkeep.yaml:12: unknown key "jbos" in clusters.main.logical (did you mean "jobs"?)
pgkeep.yaml:13: clusters.main.logical.jobs: "many": want a whole number
pgkeep.yaml:14: clusters.main.logical.role_passwords: "yes": want true or false
pgkeep.yaml:15: clusters.main.logical.stall_timeout: "10": want a duration, as 90s, 10m, 6h or 7d
pgkeep.yaml:17: schedules[0].cron: "61 1 * * *": minute: "61" is not between 0 and 59
pgkeep.yaml:19: schedules[0].time_zone: "Berlin": want the name of a time zone, as UTC or Europe/Berlin
pgkeep.yaml:20: schedules[1] has no cluster
pgkeep.yaml:20: schedules[1] has no cron
PGKEEP_CLUSTERS: no such setting
PGKEEP_REPOSITORY_PATH_STYLE: want auto, always or never
PGKEEP_SPOOOL: no such setting (did you mean "PGKEEP_SPOOL"?)`
	if err == nil {
		t.Fatal("no error")
	}
	if diff := cmp.Diff(want, err.Error()); diff != "" {
		t.Errorf("error differs (-want +got):\n%s", diff)
	}
	if !errors.Is(err, fail.BadConfig) {
		t.Error("the error is not of kind bad-config")
	}
}

func TestProblems(t *testing.T) {
	const cluster = "clusters: {main: {conninfo: host=x}}\n"
	for _, tc := range []struct{ name, text, want string }{
		{"not YAML", "a: [\n", "pgkeep.yaml:1: not YAML: did not find expected node content"},
		{"not YAML at all", "\x00", "pgkeep.yaml:1: not YAML: control characters are not allowed"},
		{"a list for the file", "- a\n", "pgkeep.yaml:1: the file: want keys with values"},
		{"a word for the file", "a\n", "pgkeep.yaml:1: the file: want keys with values"},
		{"two documents", "log:\n---\nlog:\n", "pgkeep.yaml:2: a second document begins here; want one"},
		{"a list for a value", "spool: [/x]\n", "pgkeep.yaml:1: spool: want one value"},
		{"a value for a list", "keys:\n  recipients: age1x\n", "pgkeep.yaml:2: keys.recipients: want a list"},
		{"a value for keys", "clusters: main\n", "pgkeep.yaml:1: clusters: want keys with values"},
		{"no value", "spool:\n", "pgkeep.yaml:1: spool has no value"},
		{"an alias", "log: &x {}\nkeys: *x\n", "pgkeep.yaml:1: anchors and aliases are not for this file: write the value out\npgkeep.yaml:2: anchors and aliases are not for this file: write the value out"},
		{"a key that is no word", "[a]: b\n", "pgkeep.yaml:1: want a plain word for a key"},
		{"a secret", "repository:\n  secret_access_key: hunter2\n", "pgkeep.yaml:2: repository.secret_access_key is a secret and does not belong here: set PGKEEP_REPOSITORY_SECRET_ACCESS_KEY, or put it into a file and name that as repository.secret_access_key_file"},
		{"half of a key", "repository:\n  url: s3://bucket\n  access_key_id: A\n", "pgkeep.yaml:3: access_key_id and its secret belong together: set both or neither"},
		{"a password", "clusters:\n  m:\n    conninfo: host=x password=hunter2\n", `pgkeep.yaml:3: clusters.m.conninfo: a password does not belong here: put it into a file, and name that as password_file`},
		{"a password in a URL", "repository:\n  endpoint: https://x:hunter2@s3\n", `pgkeep.yaml:2: repository.endpoint: want https://host[:port], without user, query and fragment`},
		{"a schedule for an unknown cluster", cluster + "schedules:\n- cluster: mian\n  cron: '@daily'\n", `pgkeep.yaml:3: no cluster "mian" in the configuration (did you mean "main"?)`},
		{"two schedules for one cluster", cluster + "schedules:\n- {cluster: main, cron: '@daily'}\n- {cluster: main, cron: '@hourly'}\n", `pgkeep.yaml:4: cluster "main" has two schedules of kind "logical"`},
		{"a window the server does not take", cluster + "schedules:\n- cluster: main\n  cron: '@daily'\n  catchup_window: 5s\n", "pgkeep.yaml:5: catchup_window is 5s, and must be 10s at least"},
		{"no time to run", cluster + "schedules:\n- cluster: main\n  cron: '@daily'\n  run_timeout: 0s\n", "pgkeep.yaml:5: run_timeout is 0s, and must be 1m at least"},
		{"nobody to work", "clusters:\n  m:\n    conninfo: host=x\n    logical:\n      jobs: 0\n", "pgkeep.yaml:5: jobs is 0, and must be 1 at least"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := parse(t, tc.text)
			if err == nil || err.Error() != tc.want {
				t.Errorf("error is\n%v, want\n%s", err, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Error("the error shows a secret")
			}
		})
	}
}

func TestEnvironmentWinsOverFile(t *testing.T) {
	c, err := parse(t, "spool: /from/file\nhost: file\n",
		"PGKEEP_SPOOL=/from/env", "PGKEEP_HOST=", "PGKEEP_REPOSITORY_ACCESS_KEY_ID=a", "PGKEEP_REPOSITORY_SECRET_ACCESS_KEY=hunter2", "PGKEEP_CONFIG=/x", "PGKEEP_TEST_X=left to the tests", "PATH=/bin")
	if err != nil {
		t.Fatal(err)
	}
	if c.Spool != "/from/env" || c.Host != "file" {
		t.Errorf("spool = %s, host = %s", c.Spool, c.Host)
	}
	secret, err := c.Repository.Secret()
	if err != nil || secret.Reveal() != "hunter2" {
		t.Errorf("secret = %q, %v", secret.Reveal(), err)
	}
}

func TestFileIsFound(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "a.yaml")
	if err := os.WriteFile(file, []byte("host: found\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, opt := range map[string]config.Options{
		"by option":           {File: file, Environ: []string{"PGKEEP_CONFIG=/nowhere"}},
		"by environment":      {Environ: []string{"PGKEEP_CONFIG=" + file}},
		"last variable wins":  {Environ: []string{"PGKEEP_CONFIG=/nowhere", "PGKEEP_CONFIG=" + file}},
		"no hostname to have": {File: file, Hostname: "not a name"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := config.Load(opt)
			if err != nil {
				t.Fatal(err)
			}
			if c.Host != "found" || c.File() != file {
				t.Errorf("host = %q of %q", c.Host, c.File())
			}
		})
	}
	if _, err := config.Load(config.Options{File: filepath.Join(dir, "none.yaml")}); !errors.Is(err, fail.BadConfig) {
		t.Errorf("a file that is named and missing: %v", err)
	}
}

func TestHostnameThatCannotBeUsedIsAProblem(t *testing.T) {
	_, err := config.Parse("", nil, config.Options{Hostname: "my host"})
	if err == nil || err.Error() != `configuration: the name of this host is "my host", and cannot be used: set host` {
		t.Errorf("error is %v", err)
	}
}

func TestUnknownClusterIsAnErrorWithAHint(t *testing.T) {
	c, err := parse(t, whole)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Cluster("othre"); err == nil || err.Error() != `no cluster "othre" in the configuration (did you mean "other"?)` {
		t.Errorf("error is %v", err)
	}
	none, err := parse(t, "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = none.Cluster("main")
	if got, want := fail.HintOf(err), "describe it under clusters in pgkeep.yaml"; got != want {
		t.Errorf("hint is %q, want %q", got, want)
	}
}

func TestRepositoryIsRequiredOnlyWhereItIsUsed(t *testing.T) {
	c, err := parse(t, "")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Repository.Require(); !errors.Is(err, fail.BadConfig) {
		t.Errorf("Require = %v, want bad-config", err)
	}
	if c, err = parse(t, "repository: {url: 'file:///srv'}"); err != nil {
		t.Fatal(err)
	}
	if err := c.Repository.Require(); err != nil {
		t.Errorf("Require = %v", err)
	}
}

func TestShownConfigurationTellsSourcesAndNoSecret(t *testing.T) {
	c, err := parse(t, "# first\nhost: db7\nkeys:\n  recipients: [age1x]\nclusters:\n  '1': {conninfo: host=x}\n",
		"PGKEEP_REPOSITORY_ACCESS_KEY_ID=AKIA", "PGKEEP_REPOSITORY_SECRET_ACCESS_KEY=hunter2")
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := c.WriteYAML(&out); err != nil {
		t.Fatal(err)
	}
	want := `repository:
  region: us-east-1 # default
  path_style: auto # default
  access_key_id: AKIA # PGKEEP_REPOSITORY_ACCESS_KEY_ID
  secret_access_key: '[secret]' # PGKEEP_REPOSITORY_SECRET_ACCESS_KEY
  encryption: age # default
keys:
  recipients:
    - age1x # pgkeep.yaml:4
host: db7 # pgkeep.yaml:2
spool: /var/lib/pgkeep/spool # default
restore_test:
  directory: /var/lib/pgkeep/restore-test # default
  user: postgres # default
  isolation: required # default
  memory: 1GB # default
  policy: newest # default
  limit: 12h # default
  within: 168h # default
  thorough: false # default
  jobs: 2 # default
log:
  level: info # default
  format: text # default
notify:
  all: false # default
clusters:
  "1":
    conninfo: host=x # pgkeep.yaml:6
    host: db7 # default
    logical:
      jobs: 2 # default
      role_passwords: false # default
      stall_timeout: 10m # default
      lock_wait: 5m # default
    physical:
      spread_checkpoint: false # default
      wal_wait: 1h # default
    wal:
      prefetch: 8 # default
      hole_grace: 30s # default
    retention:
      min: 2 # default
      grace: 168h # default
      lock_mode: governance # default
`
	if diff := cmp.Diff(want, out.String()); diff != "" {
		t.Errorf("shown configuration differs (-want +got):\n%s", diff)
	}
	if got, want := c.Settings()[3], (config.Setting{Path: "repository.secret_access_key", Value: "[secret]", Source: "PGKEEP_REPOSITORY_SECRET_ACCESS_KEY"}); got != want {
		t.Errorf("setting is %+v, want %+v", got, want)
	}
}

func TestShownConfigurationReadsBack(t *testing.T) {
	c, err := parse(t, whole)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := c.WriteYAML(&out); err != nil {
		t.Fatal(err)
	}
	again, err := parse(t, out.String())
	if err != nil {
		t.Fatalf("%v in\n%s", err, out.String())
	}
	if diff := cmp.Diff(c, again, cmpopts.IgnoreUnexported(config.Config{}), cmp.AllowUnexported(config.Secret{})); diff != "" {
		t.Errorf("read back differs (-first +again):\n%s", diff)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(whole)
	f.Add("a: &a [*a]")
	f.Add("clusters: {a: {logical: [}}")
	f.Add("? {a: b}\n: c\n<<: {x: y}\n")
	f.Add("!!binary aGk=: x\nspool: !!binary aGk=\n")
	f.Fuzz(func(t *testing.T, text string) {
		c, err := parse(t, text)
		if err != nil {
			if !errors.Is(err, fail.BadConfig) {
				t.Errorf("error is not of kind bad-config: %v", err)
			}
			return
		}
		var out bytes.Buffer
		if err := c.WriteYAML(&out); err != nil {
			t.Fatal(err)
		}
		again, err := parse(t, out.String())
		if err != nil {
			t.Fatalf("%v in\n%s", err, out.String())
		}
		if diff := cmp.Diff(c, again, cmpopts.IgnoreUnexported(config.Config{}), cmpopts.EquateEmpty(), cmp.AllowUnexported(config.Secret{})); diff != "" {
			t.Errorf("read back differs (-first +again):\n%s", diff)
		}
	})
}
