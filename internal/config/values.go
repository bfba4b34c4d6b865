package config

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/url"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	_ "time/tzdata" // time zones are checked the same way on every host

	"github.com/pgkeep/pgkeep/internal/pg"
)

// A privateError says what is wrong with a text that may hold a secret: the
// text is not to stand beside it.
type privateError struct{ error }

// A Name is the name of a cluster. It stands in object keys and workflow ids.
type Name string

// only reports whether s has at least one byte and at most that many, each of
// them a letter, a digit or one of others. It stands for regular expressions:
// pgkeep-wal starts once for every segment, and would compile them each time.
func only(s string, most int, others string) bool {
	for _, c := range []byte(s) {
		if !isAlphanumeric(c) && strings.IndexByte(others, c) < 0 {
			return false
		}
	}
	return s != "" && len(s) <= most
}

func isAlphanumeric(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9'
}

func (n *Name) UnmarshalText(b []byte) error {
	if s := string(b); !only(s, 63, "_-") || !isAlphanumeric(s[0]) || strings.ToLower(s) != s {
		return errors.New("want lower-case letters, digits, _ and -, at most 63, beginning with a letter or a digit")
	}
	*n = Name(b)
	return nil
}

// A Host is the name of a host, as it stands in the name of its task queue.
type Host string

func (h *Host) UnmarshalText(b []byte) error {
	if s := string(b); !only(s, 253, "._-") || !isAlphanumeric(s[0]) {
		return errors.New("want letters, digits, '.', '_' and '-'")
	}
	*h = Host(b)
	return nil
}

// A Path is the absolute path of a file or directory.
type Path string

func (p *Path) UnmarshalText(b []byte) error {
	if !filepath.IsAbs(string(b)) || strings.ContainsRune(string(b), 0) {
		return errors.New("want an absolute path")
	}
	*p = Path(filepath.Clean(string(b)))
	return nil
}

// A WebURL is an http or https URL without user, query and fragment, and
// without a slash at its end.
type WebURL string

func (u *WebURL) UnmarshalText(b []byte) error {
	parsed, err := url.Parse(string(b))
	if err != nil || (parsed.Scheme != "https" && parsed.Scheme != "http") || parsed.Host == "" {
		return errors.New("want https://host[:port]")
	}
	if parsed.User != nil || parsed.RawQuery != "" || parsed.Fragment != "" {
		return privateError{errors.New("want https://host[:port], without user, query and fragment")}
	}
	*u = WebURL(strings.TrimRight(string(b), "/"))
	return nil
}

// A HostPort is the address of a server.
type HostPort string

func (a *HostPort) UnmarshalText(b []byte) error {
	host, port, err := net.SplitHostPort(string(b))
	if n, perr := strconv.ParseUint(port, 10, 16); err != nil || perr != nil || n == 0 || host == "" || strings.ContainsAny(host, "/ ") {
		return errors.New("want host:port")
	}
	*a = HostPort(b)
	return nil
}

// A Location is where a repository is: under Prefix in Bucket, or in the
// directory Dir. The zero Location is none.
type Location struct {
	Bucket string
	Prefix string // without slashes at its ends; "" is the whole bucket
	Dir    string // absolute; set if and only if Bucket is not
}

// IsZero reports whether no place is named.
func (l Location) IsZero() bool { return l == Location{} }

// String is the URL of l.
func (l Location) String() string {
	switch {
	case l.IsZero():
		return ""
	case l.Dir != "":
		return (&url.URL{Scheme: "file", Path: l.Dir}).String()
	case l.Prefix == "":
		return "s3://" + l.Bucket
	}
	return "s3://" + l.Bucket + "/" + l.Prefix
}

func (l Location) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// isBucket is as S3 User Guide, "General purpose bucket naming rules". Other
// services allow upper case and underscores, so these pass too.
func isBucket(s string) bool {
	return only(s, 63, "._-") && len(s) > 1 && isAlphanumeric(s[0])
}

// isPrefix holds prefixes to characters that no service and no shell treats in a
// way of its own, between single slashes.
func isPrefix(s string) bool {
	return only(s, 1<<10, "._=+-/") && path.Clean(s) == s && s[0] != '/' && !strings.HasPrefix(s, "..")
}

func (l *Location) UnmarshalText(b []byte) error {
	const want = "want s3://bucket/prefix or file:///directory"
	scheme, rest, ok := strings.Cut(string(b), "://")
	switch {
	case ok && scheme == "s3":
		bucket, prefix, _ := strings.Cut(rest, "/")
		prefix = strings.TrimRight(prefix, "/")
		if !isBucket(bucket) {
			return fmt.Errorf("%q is no name of a bucket: %s", bucket, want)
		}
		if prefix != "" && !isPrefix(prefix) {
			return fmt.Errorf("prefix %q: want letters, digits and . _ - = + between single slashes", prefix)
		}
		*l = Location{Bucket: bucket, Prefix: prefix}
		return nil
	case ok && scheme == "file":
		u, err := url.Parse(string(b))
		if err != nil || u.Host != "" || !filepath.IsAbs(u.Path) || u.RawQuery != "" || u.Fragment != "" || strings.ContainsRune(u.Path, 0) {
			return errors.New(want)
		}
		*l = Location{Dir: filepath.Clean(u.Path)}
		return nil
	}
	return errors.New(want)
}

// A Conninfo is a libpq connection string without a password.
type Conninfo string

var passwordInConninfo = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?i)(^|[\s?&])(ssl)?password\s*=`)
})

var errPassword = privateError{errors.New("a password does not belong here: put it into a file, and name that as password_file")}

func (c *Conninfo) UnmarshalText(b []byte) error {
	s := string(b)
	if u, err := url.Parse(s); err == nil && u.User != nil {
		if _, ok := u.User.Password(); ok {
			return errPassword
		}
	}
	if strings.Contains(strings.ToLower(s), "password") && passwordInConninfo().MatchString(s) {
		return errPassword
	}
	if !strings.ContainsRune(s, '=') && !strings.HasPrefix(s, "postgres://") && !strings.HasPrefix(s, "postgresql://") {
		return privateError{errors.New(`want "host=… user=…" or a postgresql:// URL`)}
	}
	*c = Conninfo(s)
	return nil
}

// IsLocal reports whether c leads to a server on this host: by a socket, or by
// the loopback address. Only the text is looked at.
func (c Conninfo) IsLocal() bool {
	host := ""
	if u, err := url.Parse(string(c)); err == nil && strings.HasPrefix(u.Scheme, "postgres") {
		if host = u.Query().Get("host"); host == "" {
			host = u.Hostname()
		}
	} else if found := hostInConninfo().FindStringSubmatch(string(c)); found != nil {
		host = found[1]
	}
	ip := net.ParseIP(host)
	return host == "" || strings.HasPrefix(host, "/") || strings.HasPrefix(host, "@") || host == "localhost" || ip != nil && ip.IsLoopback()
}

var hostInConninfo = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?:^|\s)host(?:addr)?\s*=\s*'?([^\s',]+)`)
})

// An Encryption is a way to encrypt backups.
type Encryption string

// The encryptions there are.
const (
	EncryptionAge  Encryption = "age"
	EncryptionNone Encryption = "none"
)

func (e *Encryption) UnmarshalText(b []byte) error { return oneOf(e, b, EncryptionAge, EncryptionNone) }

// A PathStyle says where a request to S3 names the bucket.
type PathStyle string

// The path styles there are.
const (
	PathStyleAuto   PathStyle = "auto"
	PathStyleAlways PathStyle = "always"
	PathStyleNever  PathStyle = "never"
)

func (p *PathStyle) UnmarshalText(b []byte) error {
	return oneOf(p, b, PathStyleAuto, PathStyleAlways, PathStyleNever)
}

// A LockMode is one of Object Lock.
type LockMode string

// The modes there are.
const (
	LockGovernance LockMode = "governance"
	LockCompliance LockMode = "compliance"
)

func (m *LockMode) UnmarshalText(b []byte) error { return oneOf(m, b, LockGovernance, LockCompliance) }

// A Kind is what a schedule starts: a kind of backup, an audit of the archive, or
// a test.
type Kind string

// The kinds there are: made with pg_dump, or from the files of the cluster.
const (
	KindLogical  Kind = "logical"
	KindPhysical Kind = "physical"
	KindWALAudit Kind = "wal-audit" // is the archive of the write-ahead log whole?
	KindExpire   Kind = "expire"    // remove what retention does not keep
	// KindRestoreTest restores a backup, and looks whether it is what it should be.
	KindRestoreTest Kind = "restore-test"
)

func (k *Kind) UnmarshalText(b []byte) error {
	return oneOf(k, b, KindLogical, KindPhysical, KindWALAudit, KindExpire, KindRestoreTest)
}

// A TestPolicy says which backup is tested, as package proof has it.
type TestPolicy string

func (p *TestPolicy) UnmarshalText(b []byte) error {
	return oneOf(p, b, "newest", "random", "oldest-unproven", "random-moment")
}

// An Isolation says how much of it a restore test insists on.
type Isolation string

const (
	Required   Isolation = "required"
	BestEffort Isolation = "best-effort"
)

func (i *Isolation) UnmarshalText(b []byte) error { return oneOf(i, b, Required, BestEffort) }

// Tables is a pattern that names tables, as database.schema.table.
type Tables string

func (p *Tables) UnmarshalText(b []byte) error {
	if _, err := pg.ParseTablePattern(string(b)); err != nil {
		return errors.New("want database.schema.table, each with * and ? if need be")
	}
	*p = Tables(b)
	return nil
}

// Pattern is p taken apart.
func (p Tables) Pattern() pg.TablePattern {
	t, _ := pg.ParseTablePattern(string(p)) // checked at the door
	return t
}

// Rows are the answer to a query: a line for each row, " | " between values. nil
// is no answer, not that of no row.
type Rows [][]string

func (r *Rows) UnmarshalText(b []byte) error {
	*r = Rows{}
	for line := range strings.Lines(string(b)) {
		*r = append(*r, strings.Split(strings.TrimRight(line, "\r\n"), " | "))
	}
	return nil
}

// MarshalText writes r as UnmarshalText reads it.
func (r Rows) MarshalText() ([]byte, error) {
	var lines []string
	for _, row := range r {
		lines = append(lines, strings.Join(row, " | "))
	}
	return []byte(strings.Join(lines, "\n")), nil
}

// Bytes is an amount of data, as 64kB, 100MB or 2GB, in powers of 1024 as
// PostgreSQL counts. It is never negative.
type Bytes int64

var byteUnits = []struct {
	name string
	size int64
}{{"TB", 1 << 40}, {"GB", 1 << 30}, {"MB", 1 << 20}, {"kB", 1 << 10}}

func (n *Bytes) UnmarshalText(b []byte) error {
	number, unit := string(b), int64(1)
	for _, u := range byteUnits {
		if rest, ok := strings.CutSuffix(number, u.name); ok {
			number, unit = rest, u.size
			break
		}
	}
	v, err := strconv.ParseInt(strings.TrimSpace(number), 10, 64)
	if err != nil || v < 0 || v > math.MaxInt64/unit {
		return errors.New("want an amount, as 64kB, 100MB or 2GB")
	}
	*n = Bytes(v * unit)
	return nil
}

// MarshalText writes n with the largest unit that divides it.
func (n Bytes) MarshalText() ([]byte, error) {
	for _, u := range byteUnits {
		if n != 0 && int64(n)%u.size == 0 {
			return []byte(strconv.FormatInt(int64(n)/u.size, 10) + u.name), nil
		}
	}
	return []byte(strconv.FormatInt(int64(n), 10)), nil
}

// A LogFormat is how log lines look.
type LogFormat string

// The log formats there are.
const (
	LogText LogFormat = "text"
	LogJSON LogFormat = "json"
)

func (f *LogFormat) UnmarshalText(b []byte) error { return oneOf(f, b, LogText, LogJSON) }

// A LogLevel is the least level of log lines that are shown.
type LogLevel string

// The log levels there are.
const (
	LogDebug LogLevel = "debug"
	LogInfo  LogLevel = "info"
	LogWarn  LogLevel = "warn"
	LogError LogLevel = "error"
)

func (l *LogLevel) UnmarshalText(b []byte) error {
	return oneOf(l, b, LogDebug, LogInfo, LogWarn, LogError)
}

// Level is l for log/slog. The zero LogLevel is info.
func (l LogLevel) Level() slog.Level {
	switch l {
	case LogDebug:
		return slog.LevelDebug
	case LogWarn:
		return slog.LevelWarn
	case LogError:
		return slog.LevelError
	}
	return slog.LevelInfo
}

func oneOf[T ~string](to *T, b []byte, words ...T) error {
	if !slices.Contains(words, T(b)) {
		if len(words) == 1 {
			return fmt.Errorf("want %q", words[0])
		}
		var list []string
		for _, w := range words[:len(words)-1] {
			list = append(list, string(w))
		}
		return fmt.Errorf("want %s or %s", strings.Join(list, ", "), words[len(words)-1])
	}
	*to = T(b)
	return nil
}

// A TimeZone is the name of a time zone, as in the IANA time zone database.
type TimeZone string

func (z *TimeZone) UnmarshalText(b []byte) error {
	if _, err := time.LoadLocation(string(b)); err != nil || len(b) == 0 || string(b) == "Local" {
		return errors.New("want the name of a time zone, as UTC or Europe/Berlin")
	}
	*z = TimeZone(b)
	return nil
}

// A Cron says when a schedule starts: five fields, or a word that begins with
// "@". See https://docs.temporal.io/schedule about how Temporal reads it.
type Cron string

var (
	cronWords  = []string{"@yearly", "@annually", "@monthly", "@weekly", "@daily", "@midnight", "@hourly"}
	cronFields = []struct {
		name     string
		low, top int
		words    string // three letters each, in order from low
	}{
		{"minute", 0, 59, ""},
		{"hour", 0, 23, ""},
		{"day of month", 1, 31, ""},
		{"month", 1, 12, "janfebmaraprmayjunjulaugsepoctnovdec"},
		{"day of week", 0, 7, "sunmontuewedthufrisatsun"},
	}
)

func (c *Cron) UnmarshalText(b []byte) error {
	s := strings.Join(strings.Fields(string(b)), " ")
	if err := checkCron(s); err != nil {
		return err
	}
	*c = Cron(s)
	return nil
}

func checkCron(s string) error {
	if every, ok := strings.CutPrefix(s, "@every "); ok {
		if d, err := ParseDuration(every); err != nil || d < time.Minute {
			return errors.New("want @every with a duration of 1m at least, as @every 6h")
		}
		return nil
	}
	if strings.HasPrefix(s, "@") {
		if !slices.Contains(cronWords, s) {
			return fmt.Errorf("want one of %s, or @every 6h", strings.Join(cronWords, ", "))
		}
		return nil
	}
	if strings.Contains(s, "TZ=") {
		return errors.New("the time zone has a key of its own, time_zone")
	}
	fields := strings.Fields(s)
	if len(fields) != len(cronFields) {
		return fmt.Errorf(`want five fields (minute, hour, day of month, month, day of week), as "30 1 * * *"; there are %d`, len(fields))
	}
	for i, f := range fields {
		for part := range strings.SplitSeq(f, ",") {
			if !cronPart(i, part) {
				return fmt.Errorf("%s: %q is not between %d and %d", cronFields[i].name, part, cronFields[i].low, cronFields[i].top)
			}
		}
	}
	return nil
}

// Every is the longest time between two starts, but for changes of the clock.
// A Cron that never starts anything has none: 0.
func (c Cron) Every() time.Duration {
	s := string(c)
	if every, ok := strings.CutPrefix(s, "@every "); ok {
		d, _ := ParseDuration(every) // it was checked
		return d
	}
	words := map[string]string{"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0",
		"@daily": "0 0 * * *", "@midnight": "0 0 * * *", "@hourly": "0 * * * *"}
	if fields, ok := words[s]; ok {
		s = fields
	}
	f := strings.Fields(s)
	if len(f) != len(cronFields) {
		return 0
	}
	var minutes []int // of a day, at which it starts
	for n := range 24 * 60 {
		if cronHas(0, f[0], n%60) && cronHas(1, f[1], n/60) {
			minutes = append(minutes, n)
		}
	}
	if len(minutes) == 0 {
		return 0
	}
	first, last := minutes[0], minutes[len(minutes)-1]
	longest := 0
	for i, n := range minutes[1:] {
		longest = max(longest, n-minutes[i])
	}
	const years = 9 // there may be eight between two leap days
	before := -1    // day of the start before
	begin := time.Date(2096, 1, 1, 0, 0, 0, 0, time.UTC)
	for day := range years * 366 {
		t := begin.AddDate(0, 0, day)
		if !cronHas(2, f[2], t.Day()) || !cronHas(3, f[3], int(t.Month())) || !cronHas(4, f[4], int(t.Weekday())) && !(t.Weekday() == 0 && cronHas(4, f[4], 7)) {
			continue
		}
		if before >= 0 {
			longest = max(longest, (day-before)*24*60+first-last)
		}
		before = day
	}
	return time.Duration(longest) * time.Minute
}

// cronHas reports whether a field, which was checked, holds n.
func cronHas(field int, text string, n int) bool {
	for part := range strings.SplitSeq(text, ",") {
		part, step, stepped := strings.Cut(part, "/")
		low, top := cronFields[field].low, cronFields[field].top
		if part != "*" {
			from, to, ranged := strings.Cut(part, "-")
			low, _ = cronNumber(field, from)
			switch {
			case ranged:
				top, _ = cronNumber(field, to)
			case !stepped:
				top = low
			}
		}
		by, err := strconv.Atoi(step)
		if err != nil {
			by = 1
		}
		if low <= n && n <= top && (n-low)%by == 0 {
			return true
		}
	}
	return false
}

// cronPart reports whether part is "*", "n" or "n-m", with or without "/step".
func cronPart(field int, part string) bool {
	part, step, ok := strings.Cut(part, "/")
	if ok {
		if n, err := strconv.ParseUint(step, 10, 8); err != nil || n == 0 {
			return false
		}
	}
	if part == "*" {
		return true
	}
	from, to, ranged := strings.Cut(part, "-")
	low, ok := cronNumber(field, from)
	if !ok || !ranged {
		return ok
	}
	top, ok := cronNumber(field, to)
	return ok && low <= top
}

func cronNumber(field int, s string) (int, bool) {
	f := cronFields[field]
	if i := strings.Index(f.words, strings.ToLower(s)); len(s) == 3 && i >= 0 && i%3 == 0 {
		return f.low + i/3, true
	}
	n, err := strconv.ParseUint(s, 10, 8)
	return int(n), err == nil && int(n) >= f.low && int(n) <= f.top
}

// ParseDuration reads what time.ParseDuration does, and days: "90m", "36h",
// "7d". A duration is never negative.
func ParseDuration(s string) (time.Duration, error) {
	if days, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 16)
		if err != nil {
			return 0, errors.New("want a duration, as 90s, 10m, 6h or 7d")
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, errors.New("want a duration, as 90s, 10m, 6h or 7d")
	}
	return d, nil
}

// FormatDuration writes d as ParseDuration reads it, without zeros at its end:
// "10m", not "10m0s".
func FormatDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}
