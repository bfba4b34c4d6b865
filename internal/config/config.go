package config

import (
	"cmp"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/suggest"
)

// DefaultFile is where the configuration is looked for if nobody says where.
const DefaultFile = "/etc/pgkeep/pgkeep.yaml"

// Config is the whole configuration of pgkeep on one host. Load makes one that
// is complete and checked; its zero value is neither. The comments of the
// fields are the text of docs/CONFIG.md.
type Config struct {
	// Where backups are kept.
	Repository Repository `yaml:"repository"`
	// The keys that sign, encrypt and open backups.
	Keys Keys `yaml:"keys"`
	// The Temporal server that runs the workflows. What is not set here comes from Temporal's own environment configuration: `TEMPORAL_ADDRESS`, `TEMPORAL_API_KEY`, `TEMPORAL_TLS_…`, or its file `temporal.toml`.
	Temporal Temporal `yaml:"temporal"`
	// The name of this host, and of its task queue `pgkeep-host-<host>`. If not set, the name that the operating system gives.
	Host Host `yaml:"host"`
	// The directory for what is on its way to the repository: dumps, and packs not yet sent. It needs room for the largest dump.
	Spool Path `yaml:"spool" default:"/var/lib/pgkeep/spool"`
	// The directories below which `pgkeep restore --host` may have data directories made on this host. If none is given, it may nowhere: whoever starts workflows does not choose where this host writes.
	RestoreDirs []Path `yaml:"restore_dirs"`
	// How backups are tested on this host, by restoring them: `pgkeep restore-test`, and schedules of that kind.
	RestoreTest RestoreTest `yaml:"restore_test"`
	// What pgkeep says while it works, on standard error.
	Log Log `yaml:"log"`
	// What `pgkeep worker` tells Prometheus.
	Metrics Metrics `yaml:"metrics"`
	// Who is told how the runs of this host's clusters end, and of other hosts' when their workers do not answer.
	Notify Notify `yaml:"notify"`
	// The PostgreSQL clusters to back up, by name. The name stands in object keys and workflow ids: lower-case letters, digits, `_` and `-`, at most 63 bytes.
	Clusters map[Name]Cluster `yaml:"clusters"`
	// What Temporal starts by itself; `pgkeep schedule apply` makes the server follow this list. At most one for each cluster and kind.
	Schedules []Schedule `yaml:"schedules"`

	file    string
	sources map[string]Source
}

// Repository says where the repository is, and how to get in.
type Repository struct {
	// A bucket with a prefix, `s3://bucket/prefix`, or a directory, `file:///srv/backup`.
	URL Location `yaml:"url"`
	// The S3 service. If not set, the one of Amazon in `region`.
	Endpoint WebURL `yaml:"endpoint"`
	// The region to sign requests for.
	Region string `yaml:"region" default:"us-east-1"`
	// Whether the bucket's name stands in the path (`always`) or in the host name (`never`) of a request; `auto` is `always` where `endpoint` is set.
	PathStyle PathStyle `yaml:"path_style" default:"auto"`
	// A file of PEM certificates to trust for `endpoint`, in place of the system's.
	CAFile Path `yaml:"ca_file"`
	// The S3 access key. If not set, the AWS SDK looks for credentials in its usual places.
	AccessKeyID string `yaml:"access_key_id"`
	// A file that holds the secret of `access_key_id`, and nothing else. Others must not be able to read it.
	SecretAccessKeyFile Path `yaml:"secret_access_key_file"`
	// The secret itself, in place of the file.
	SecretAccessKey Secret `yaml:"secret_access_key"`
	// How backups are encrypted: `age`, or `none` for no encryption at all.
	Encryption Encryption `yaml:"encryption" default:"age"`
}

// Keys names the files with keys that this host has. A host that only takes
// backups has no Identity.
type Keys struct {
	// The file with this host's Ed25519 key, which signs what the host writes.
	SigningKey Path `yaml:"signing_key"`
	// The file with the age identity that opens block ids and file lists, and no data.
	MetadataIdentity Path `yaml:"metadata_identity"`
	// The file with an operator's age identity, which opens backups. Only where they are restored or verified.
	Identity Path `yaml:"identity"`
	// The age recipients of the operators: whoever has the identity of one can open backups.
	Recipients []string `yaml:"recipients"`
	// The public keys of the hosts whose backups may be restored, as `pgkeep key check` prints them.
	TrustedSigners []string `yaml:"trusted_signers"`
}

// Temporal says which Temporal server to talk to.
type Temporal struct {
	// The server, `host:port`. If not set here nor in Temporal's configuration, `localhost:7233`.
	Address HostPort `yaml:"address"`
	// The namespace. If not set here nor in Temporal's configuration, `pgkeep`.
	Namespace string `yaml:"namespace"`
	// The profile of `temporal.toml` to use.
	Profile string `yaml:"profile"`
	// The Temporal Web UI, for the links that pgkeep prints. If not set, port 8233 of a server on this host, or Temporal Cloud's for a server there.
	UIURL WebURL `yaml:"ui_url"`
}

// RestoreTest says how backups are tested on a host. What is asserted never
// leaves the host.
type RestoreTest struct {
	// The directory in which sandboxes are made, on a file system with room for the largest cluster. Its path must be short: a socket stands below it.
	Directory Path `yaml:"directory" default:"/var/lib/pgkeep/restore-test"`
	// The directory of the server's programs. If not set, where Debian's and the PGDG's packages put those of the major version of the backup.
	BinDir Path `yaml:"bin_dir"`
	// The user that the server in a sandbox runs as, if pgkeep is root: best one who owns nothing else, and may read this configuration and its keys. If pgkeep is not root, the server runs as pgkeep does.
	User string `yaml:"user" default:"postgres"`
	// What if the kernel, or the rights of pgkeep, do not allow all that keeps restored data apart from this host: `required` ends the test with an error, `best-effort` goes on. What there was stands in the report, under `isolation`. Without it, a superuser of the source could reach whatever the user that the server runs as can.
	Isolation Isolation `yaml:"isolation" default:"required"`
	// How much memory the server may take, as `1GB`: a quarter is shared buffers, and none of its processes may have more of its own than all of it.
	Memory Bytes `yaml:"memory" default:"1GB"`
	// Libraries to load into the server that are no part of PostgreSQL, because data cannot be replayed or read without them. Nothing else is preloaded.
	Preload []string `yaml:"preload"`
	// Which backup is tested if nobody names one: the `newest`, a `random` one, the `oldest-unproven`, or a `random-moment` of all that can be recovered. Where there are physical and logical backups, the first and the last take the kinds in turn.
	Policy TestPolicy `yaml:"policy" default:"newest"`
	// How long a test may take in all. 0s: as long as it needs.
	Limit time.Duration `yaml:"limit" default:"12h"`
	// How long a proof counts: a backup that passed no test since is shown as `unproven`, and of each kind of backup a moment that is no older must have come back in a test. 0s: for ever.
	Within time.Duration `yaml:"within" default:"7d"`
	// Whether every row is looked for in every B-tree, in each test. That takes ten times as long as a look at the index alone: if not set, those above 16 MB take turns, and each is compared in about every seventh test.
	Thorough bool `yaml:"thorough" default:"false"`
	// How many tables and indexes are checked at once.
	Jobs int `yaml:"jobs" default:"2"`
	// Queries with the answers that they must have in the restored cluster. They run as a role that may read everything and change nothing.
	Assertions []Assertion `yaml:"assertions"`
}

// Assertion is a query with the answer that it must have.
type Assertion struct {
	// What is asserted, for people.
	Name string `yaml:"name" required:"true"`
	// Only of this cluster. If not set, of every cluster that is tested here.
	Cluster Name `yaml:"cluster"`
	// The database to ask.
	Database string `yaml:"database" required:"true"`
	// One statement.
	Query string `yaml:"query" required:"true"`
	// The answer: a line for each row, values as PostgreSQL writes them, with a vertical bar and a blank on each of its sides between them; NULL is `\N`. If not set, one row of one value, `t`.
	Want Rows `yaml:"want"`
	// How long the query may take.
	Timeout time.Duration `yaml:"timeout" default:"1m"`
}

// Notify says who is told how backups, restore tests, audits and expiries end.
// The addresses are secrets: whoever has one can speak in our name.
type Notify struct {
	// A file that holds the URL of a webhook, and nothing else. Others must not be able to read it. It gets a JSON object for each run, with a line of text that Slack and its like show.
	WebhookFile Path `yaml:"webhook_file"`
	// The URL itself, in place of the file.
	Webhook Secret `yaml:"webhook"`
	// Whether the webhook hears of runs that end well too, and not only of the others.
	All bool `yaml:"all" default:"false"`
	// A file that holds a URL that is asked for after each run that ends well, for a watch that raises the alarm when it hears nothing. In it, `{cluster}` and `{kind}` stand for those of the run: `https://watch.example/KEY/{cluster}-{kind}`.
	PingFile Path `yaml:"ping_file"`
	// The URL itself, in place of the file.
	Ping Secret `yaml:"ping"`
}

// Addresses returns the URLs; empty ones are not set.
func (n Notify) Addresses() (webhook, ping Secret, err error) {
	webhook, ping = n.Webhook, n.Ping
	if webhook.value == "" && n.WebhookFile != "" {
		webhook, err = ReadSecret(string(n.WebhookFile))
	}
	if err == nil && ping.value == "" && n.PingFile != "" {
		ping, err = ReadSecret(string(n.PingFile))
	}
	return webhook, ping, err
}

// Log says how much to log, and how it looks.
type Log struct {
	// The least level that is shown: `debug`, `info`, `warn` or `error`.
	Level LogLevel `yaml:"level" default:"info"`
	// `text` for people, `json` for machines.
	Format LogFormat `yaml:"format" default:"text"`
}

// Metrics says where Prometheus finds what docs/METRICS.md describes.
type Metrics struct {
	// Where `pgkeep worker` serves `/metrics`, as `127.0.0.1:9788`. If not set, nowhere. It has no login and no TLS, and names clusters: keep it on loopback, or where only Prometheus comes.
	Listen HostPort `yaml:"listen"`
}

// Cluster is one PostgreSQL cluster.
type Cluster struct {
	// How to connect, as libpq takes it: `host=/run/postgresql user=backup`, or a `postgresql://` URL. No password: that belongs into `password_file`.
	Conninfo Conninfo `yaml:"conninfo" required:"true"`
	// A file that holds the password of the user in `conninfo`, and nothing else. Others must not be able to read it.
	PasswordFile Path `yaml:"password_file"`
	// The directory of `pg_dump` and its like. If not set, the newest that is installed and fits the server.
	BinDir Path `yaml:"bin_dir"`
	// The host whose worker backs this cluster up. If not set, this one.
	Host Host `yaml:"host"`
	// How logical backups are taken.
	Logical Logical `yaml:"logical"`
	// How physical backups are taken. They are taken on the host of the data directory, by a user who may read it.
	Physical Physical `yaml:"physical"`
	// How the write-ahead log is archived and brought back.
	WAL WAL `yaml:"wal"`
	// What is kept of this cluster. Without `window`, `daily`, `weekly` and `monthly` everything is: nothing is ever removed.
	Retention Retention `yaml:"retention"`
}

// Retention says what is kept of a cluster. A backup is kept if any of it says
// so; the newest one, the newest proven one and what is held are in any case.
type Retention struct {
	// How far back every moment stays reachable, as `14d`: younger backups of both kinds, the physical one before them, and the log since.
	Window time.Duration `yaml:"window"`
	// The newest backup of so many days on which there is one, of each kind. Days, weeks and months are those of UTC.
	Daily int `yaml:"daily"`
	// Likewise of so many weeks, from Monday on.
	Weekly int `yaml:"weekly"`
	// Likewise of so many months.
	Monthly int `yaml:"monthly"`
	// How many good backups of each kind stay in any case.
	Min int `yaml:"min" default:"2"`
	// For how long `pgkeep undelete` can bring back what was let go. Only then its space is freed. The log stays for as much longer than the window.
	Grace time.Duration `yaml:"grace" default:"7d"`
	// For how long every object of the cluster is locked in the bucket (S3 Object Lock), as `30d`: each run of `expire` locks anew what stands and has less than half of it left. What was let go stays for as much longer. If not set, locks are left as the bucket makes them.
	Lock time.Duration `yaml:"lock"`
	// Who may end such a lock early: in mode `governance` whoever has the right to bypass it, in `compliance` nobody. An object that is locked already stays in its mode.
	LockMode LockMode `yaml:"lock_mode" default:"governance"`
	// The host whose worker removes what goes: it needs the right to delete objects. If not set, that of the cluster.
	Host Host `yaml:"host"`
}

// IsZero reports whether nothing is ever removed.
func (r Retention) IsZero() bool {
	return r.Window == 0 && r.Daily == 0 && r.Weekly == 0 && r.Monthly == 0
}

// Logical says how logical backups of a cluster are taken.
type Logical struct {
	// The databases to dump. If empty, all that allow connections.
	Databases []string `yaml:"databases"`
	// Databases not to dump.
	Exclude []string `yaml:"exclude"`
	// How many tables of a database to dump at once.
	Jobs int `yaml:"jobs" default:"2"`
	// Whether to dump the password hashes of roles too. That needs a superuser.
	RolePasswords bool `yaml:"role_passwords" default:"false"`
	// After how long without progress a dump is ended and begun anew.
	StallTimeout time.Duration `yaml:"stall_timeout" default:"10m"`
	// How long to wait for the locks of a database's tables.
	LockWait time.Duration `yaml:"lock_wait" default:"5m"`
}

// WAL says how pgkeep-wal archives the write-ahead log of a cluster, and brings
// it back.
type WAL struct {
	// How many files `pgkeep-wal push` sends at a time, while others wait behind the one that PostgreSQL asks for. 1: only that one. 0: one for each core, two at least, as far as they take 48 MiB.
	Parallel int `yaml:"parallel" default:"0"`
	// How many segments a recovery has ready before PostgreSQL asks for them, in `pg_wal/pgkeep`; at most 256 MiB of them. 0: none.
	Prefetch int `yaml:"prefetch" default:"8"`
	// How long a recovery waits for a segment that is missing while a later one is there: several are archived at a time, and not always in order.
	HoleGrace time.Duration `yaml:"hole_grace" default:"30s"`
}

// Physical says how physical backups of a cluster are taken.
type Physical struct {
	// How many files to read at once. 0: one for each processor.
	Readers int `yaml:"readers"`
	// How much to read in a second, as `100MB`. 0: no limit.
	Rate Bytes `yaml:"rate"`
	// Reading pauses while a streaming standby is further behind than this, as `1GB`. 0: standbys are not looked at.
	MaxStandbyLag Bytes `yaml:"max_standby_lag"`
	// Reading slows down while reading 1 MiB takes longer than this, as `50ms`: the disk is needed by others. 0: not looked at.
	MaxReadLatency time.Duration `yaml:"max_read_latency"`
	// Whether the checkpoint at the beginning is spread over time like any other. If not, it is done at once, with a burst of writes.
	SpreadCheckpoint bool `yaml:"spread_checkpoint" default:"false"`
	// How long to wait at the end until the last segment of WAL is archived.
	WALWait time.Duration `yaml:"wal_wait" default:"1h"`
	// Tables whose rows are counted at the end of each backup, for restore tests to compare: `database.schema.table`, each with `*` for any characters and `?` for one. The role of `conninfo` must have the right to read them, which it needs for nothing else. Nobody can truncate or alter a table while it is counted. If empty, no table is read.
	CountRows []Tables `yaml:"count_rows"`
}

// Schedule is one thing that Temporal starts at certain times.
type Schedule struct {
	// One of `clusters`.
	Cluster Name `yaml:"cluster" required:"true"`
	// What to start: a `physical` or a `logical` backup; `wal-audit`, which looks for holes in the archive of the write-ahead log, fills those it can, and fails if one is left or archiving has stopped; `expire`, which removes what the cluster's `retention` does not keep; or `restore-test`, which restores a backup into a sandbox and fails if it is not what it should be.
	Kind Kind `yaml:"kind" default:"logical"`
	// When to start, as five fields: minute, hour, day of month, month, day of week. If both days are restricted, both must match. Or `@hourly`, `@daily`, `@weekly`, `@monthly`, `@every 6h`.
	Cron Cron `yaml:"cron" required:"true"`
	// The time zone of `cron`, as `Europe/Berlin`. In most zones 02:30 is missing once a year, and occurs twice once a year.
	TimeZone TimeZone `yaml:"time_zone" default:"UTC"`
	// The start is delayed by a random part of this, so that many clusters do not start at one moment.
	Jitter time.Duration `yaml:"jitter" default:"10m"`
	// A start missed because the Temporal server was down is made up for, if it is not longer ago than this. At least 10s.
	CatchupWindow time.Duration `yaml:"catchup_window" default:"6h"`
	// A run that takes longer is ended, so that it does not stand in the way of the next for ever.
	RunTimeout time.Duration `yaml:"run_timeout" default:"24h"`
}

// File is the path of the file that was read, or "" if there was none.
func (c *Config) File() string { return c.file }

// Cluster returns the cluster called name, or an error that says which there
// are.
func (c *Config) Cluster(name string) (Cluster, error) {
	if cluster, ok := c.Clusters[Name(name)]; ok {
		return cluster, nil
	}
	var known []string
	for _, n := range slices.Sorted(maps.Keys(c.Clusters)) {
		known = append(known, string(n))
	}
	err := Errorf("no cluster %q in the configuration%s", name, suggest.DidYouMean(name, known))
	if len(known) == 0 {
		return Cluster{}, fail.Hint(err, "describe it under clusters in "+c.where())
	}
	return Cluster{}, err
}

// WAL returns how the write-ahead log of a cluster is archived and brought back.
// Of one that is not in the configuration, as where it is restored, that is by
// the defaults.
func (c *Config) WAL(name string) (w WAL) {
	if cluster, ok := c.Clusters[Name(name)]; ok {
		return cluster.WAL
	}
	new(loader).defaults(reflect.ValueOf(&w).Elem()) // which every Load sets too
	return w
}

func (c *Config) where() string {
	if c.file == "" {
		return DefaultFile
	}
	return c.file
}

// Require fails unless the repository's address is known, and tells how to
// give it.
func (r Repository) Require() error {
	if r.URL.IsZero() {
		return fail.Hint(Errorf("repository.url is not set"), "name a bucket or a directory in the configuration file, or as PGKEEP_REPOSITORY_URL")
	}
	return nil
}

// Secret returns the secret of AccessKeyID: the one given, or else the content
// of SecretAccessKeyFile. It is empty if neither is set.
func (r Repository) Secret() (Secret, error) {
	if r.SecretAccessKey.value != "" || r.SecretAccessKeyFile == "" {
		return r.SecretAccessKey, nil
	}
	return ReadSecret(string(r.SecretAccessKeyFile))
}

// UsePathStyle reports whether requests name the bucket in their path.
func (r Repository) UsePathStyle() bool {
	return r.PathStyle == PathStyleAlways || r.PathStyle == PathStyleAuto && r.Endpoint != ""
}

// Password returns the content of PasswordFile, or an empty Secret if it is not
// set.
func (c Cluster) Password() (Secret, error) {
	if c.PasswordFile == "" {
		return Secret{}, nil
	}
	return ReadSecret(string(c.PasswordFile))
}

// Expirer is the host whose worker removes what retention does not keep.
func (c Cluster) Expirer() Host { return cmp.Or(c.Retention.Host, c.Host) }

// Errorf makes an error of kind fail.BadConfig whose text is only what is said.
func Errorf(format string, args ...any) error {
	return fail.With(fail.BadConfig, fmt.Errorf(format, args...))
}

// check says what is wrong with a configuration whose every value is right by
// itself.
func (c *Config) check(problem func(path, format string, args ...any)) {
	type run struct {
		cluster Name
		kind    Kind
	}
	seen := make(map[run]bool)
	for i, s := range c.Schedules {
		path := fmt.Sprintf("schedules[%d]", i)
		if _, err := c.Cluster(string(s.Cluster)); err != nil && s.Cluster != "" {
			problem(path+".cluster", "%w", err)
		}
		if s.Cluster != "" && seen[run{s.Cluster, s.Kind}] {
			problem(path, "cluster %q has two schedules of kind %q", s.Cluster, s.Kind)
		}
		seen[run{s.Cluster, s.Kind}] = true
		if cluster, ok := c.Clusters[s.Cluster]; ok && s.Kind == KindExpire && cluster.Retention.IsZero() {
			problem(path, "cluster %q has no retention: nothing would ever expire", s.Cluster)
		}
		if s.CatchupWindow < 10*time.Second {
			problem(path+".catchup_window", "catchup_window is %s, and must be 10s at least", FormatDuration(s.CatchupWindow))
		}
		if s.RunTimeout < time.Minute {
			problem(path+".run_timeout", "run_timeout is %s, and must be 1m at least", FormatDuration(s.RunTimeout))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Clusters)) {
		r := c.Clusters[name].Retention
		path := fmt.Sprintf("clusters.%s.retention", name)
		for _, n := range []struct {
			key string
			n   int
		}{{"daily", r.Daily}, {"weekly", r.Weekly}, {"monthly", r.Monthly}} {
			if n.n < 0 {
				problem(path+"."+n.key, "%s is %d, and must not be negative", n.key, n.n)
			}
		}
		if r.Min < 1 {
			problem(path+".min", "min is %d, and must be 1 at least", r.Min)
		}
		if r.Lock != 0 && r.Lock < 48*time.Hour {
			problem(path+".lock", "lock is %s, and must be 2d at least: what is left of it is looked at once a day or so", FormatDuration(r.Lock))
		}
		if r.Lock != 0 && r.IsZero() {
			problem(path+".lock", "lock is set, and nothing would look after it: set window, daily, weekly or monthly too, and a schedule of kind expire")
		}
		if r.Window > 0 && r.Window < time.Hour {
			problem(path+".window", "window is %s, and must be 1h at least", FormatDuration(r.Window))
		}
		if jobs := c.Clusters[name].Logical.Jobs; jobs < 1 {
			problem(fmt.Sprintf("clusters.%s.logical.jobs", name), "jobs is %d, and must be 1 at least", jobs)
		}
		if n := c.Clusters[name].WAL.Parallel; n < 0 {
			problem(fmt.Sprintf("clusters.%s.wal.parallel", name), "parallel is %d, and must not be negative", n)
		}
		if n := c.Clusters[name].WAL.Prefetch; n < 0 {
			problem(fmt.Sprintf("clusters.%s.wal.prefetch", name), "prefetch is %d, and must be 0 at least", n)
		}
		if readers := c.Clusters[name].Physical.Readers; readers < 0 {
			problem(fmt.Sprintf("clusters.%s.physical.readers", name), "readers is %d, and must not be negative", readers)
		}
	}
	if n := c.RestoreTest.Jobs; n < 1 {
		problem("restore_test.jobs", "jobs is %d, and must be 1 at least", n)
	}
	for i, a := range c.RestoreTest.Assertions {
		if a.Timeout == 0 {
			problem(fmt.Sprintf("restore_test.assertions[%d].timeout", i), "timeout is 0s, and must be more")
		}
	}
	r := c.Repository
	if r.URL.Dir == "" && (r.AccessKeyID == "") != (r.SecretAccessKey.value == "" && r.SecretAccessKeyFile == "") {
		problem("repository.access_key_id", "access_key_id and its secret belong together: set both or neither")
	}
}
