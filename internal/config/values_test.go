package config_test

import (
	"encoding"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/config"
)

// A value is refused or taken, and what is taken is what was meant.
func TestValues(t *testing.T) {
	location := func() encoding.TextUnmarshaler { return new(config.Location) }
	conninfo := func() encoding.TextUnmarshaler { return new(config.Conninfo) }
	cron := func() encoding.TextUnmarshaler { return new(config.Cron) }
	web := func() encoding.TextUnmarshaler { return new(config.WebURL) }
	addr := func() encoding.TextUnmarshaler { return new(config.HostPort) }
	zone := func() encoding.TextUnmarshaler { return new(config.TimeZone) }
	name := func() encoding.TextUnmarshaler { return new(config.Name) }
	for _, tc := range []struct {
		of   func() encoding.TextUnmarshaler
		text string
		good bool
	}{
		{location, "s3://bucket", true},
		{location, "s3://bucket/a/b-c/d=e/", true},
		{location, "s3://", false},
		{location, "s3:///prefix", false},
		{location, "s3://b/a//b", false},
		{location, "s3://b/../x", false},
		{location, "s3://b/a/..", false},
		{location, "s3://b/..", false},
		{location, "s3://b/a b", false},
		{location, "s3://b/a?x", false},
		{location, "file:///srv/backup", true},
		{location, "file://host/srv", false},
		{location, "file://srv", false},
		{location, "/srv", false},
		{conninfo, "host=/run user=x", true},
		{conninfo, "postgres://x@h/db", true},
		{conninfo, "service=backup", true},
		{conninfo, "postgres://x:y@h/db", false},
		{conninfo, "postgres://h/db?password=y", false},
		{conninfo, "host=x PASSWORD = y", false},
		{conninfo, "host=x sslpassword=y", false},
		{conninfo, "host=x passfile=/y", true},
		{conninfo, "justaword", false},
		{cron, "0 0 1,15 * sun", true},
		{cron, "*/15 0-5 * jan-mar 1-5/2", true},
		{cron, "@daily", true},
		{cron, "@every 6h", true},
		{cron, "@every 6s", false},
		{cron, "@fortnightly", false},
		{cron, "0 0 * *", false},
		{cron, "0 0 * * * *", false},
		{cron, "0 24 * * *", false},
		{cron, "0 0 0 * *", false},
		{cron, "0 0 * 13 *", false},
		{cron, "0 0 * * 8", false},
		{cron, "5-1 0 * * *", false},
		{cron, "*/0 0 * * *", false},
		{cron, "1- 0 * * *", false},
		{cron, ", 0 * * *", false},
		{cron, "0 0 * * foo", false},
		{cron, "0 0 * * nmo", false},
		{cron, "TZ=UTC 0 0 * * *", false},
		{web, "https://x:9000", true},
		{web, "http://x/path", true},
		{web, "https://u:p@x", false},
		{web, "https://x?y", false},
		{web, "x:9000", false},
		{addr, "localhost:7233", true},
		{addr, "[::1]:7233", true},
		{addr, "localhost", false},
		{addr, ":7233", false},
		{addr, "http://x:80", false},
		{addr, "x:70000", false},
		{zone, "Europe/Berlin", true},
		{zone, "Local", false},
		{zone, "", false},
		{zone, "../etc/passwd", false},
		{name, "main-1_b", true},
		{name, "Main", false},
		{name, "-a", false},
		{name, "a/b", false},
		{name, "", false},
		{name, "a234567890123456789012345678901234567890123456789012345678901234", false},
	} {
		if err := tc.of().UnmarshalText([]byte(tc.text)); (err == nil) != tc.good {
			t.Errorf("%T %q: %v", tc.of(), tc.text, err)
		}
	}
}

func TestLocationRoundTrip(t *testing.T) {
	for _, text := range []string{"s3://bucket", "s3://bucket/a/b", "file:///srv/backup", "file:///srv/with%20blank"} {
		var l config.Location
		if err := l.UnmarshalText([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if l.String() != text || l.IsZero() {
			t.Errorf("%q became %q", text, l)
		}
	}
}

func TestAmounts(t *testing.T) {
	for text, want := range map[string]config.Bytes{"0": 0, "1023": 1023, "64kB": 64 << 10, "100MB": 100 << 20, "2GB": 2 << 30, "1TB": 1 << 40} {
		var n config.Bytes
		if err := n.UnmarshalText([]byte(text)); err != nil || n != want {
			t.Errorf("%q = %d, %v, want %d", text, n, err, want)
		}
		if back, err := n.MarshalText(); err != nil || string(back) != text {
			t.Errorf("%d is written %q, %v, want %q", n, back, err, text)
		}
	}
	for _, text := range []string{"", "MB", "-1MB", "1.5GB", "100 mb", "9223372036854775807kB", "1PB"} {
		var n config.Bytes
		if err := n.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q = %d, want an error", text, n)
		}
	}
}

func TestDurations(t *testing.T) {
	for text, want := range map[string]time.Duration{
		"90s": 90 * time.Second, "10m": 10 * time.Minute, "6h": 6 * time.Hour, "7d": 7 * 24 * time.Hour, "0s": 0, "1h30m": 90 * time.Minute,
	} {
		if got, err := config.ParseDuration(text); err != nil || got != want {
			t.Errorf("ParseDuration(%q) = %v, %v, want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"", "10", "-1s", "1w", "d", "-1d", "1.5d", "99999d"} {
		if got, err := config.ParseDuration(text); err == nil {
			t.Errorf("ParseDuration(%q) = %v, want an error", text, got)
		}
	}
	for d, want := range map[time.Duration]string{
		90 * time.Second: "1m30s", 10 * time.Minute: "10m", 24 * time.Hour: "24h", 90 * time.Minute: "1h30m", 0: "0s", 10 * time.Second: "10s",
		time.Hour + time.Second: "1h0m1s",
	} {
		if got := config.FormatDuration(d); got != want {
			t.Errorf("FormatDuration(%v) = %q, want %q", d, got, want)
		}
	}
}

func TestCronEvery(t *testing.T) {
	const day = 24 * time.Hour
	for text, want := range map[string]time.Duration{
		"@every 6h": 6 * time.Hour, "@hourly": time.Hour, "@daily": day, "@weekly": 7 * day, "@monthly": 31 * day, "@yearly": 366 * day,
		"30 1 * * *": day, "*/15 * * * *": 15 * time.Minute, "0 2,14 * * *": 12 * time.Hour, "0 8-18/2 * * *": 14 * time.Hour,
		"0 3 * * sun": 7 * day, "0 3 * * 7": 7 * day, "0 3 * * mon-fri": 3 * day, "0 0 29 2 *": (8*365 + 1) * day, "5/20 * * * *": 20 * time.Minute, "0 0 31 2 *": 0,
	} {
		var c config.Cron
		if err := c.UnmarshalText([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if got := c.Every(); got != want {
			t.Errorf("%s starts every %v at least, want %v", text, got, want)
		}
	}
}
