package restore_test

import (
	"errors"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/restore"
)

func TestParseTime(t *testing.T) {
	for s, want := range map[string]string{ // "" for what is refused
		"2026-11-22T10:00:00Z":                 "2026-11-22T10:00:00Z",
		"2026-11-22T10:00:00+01:00":            "2026-11-22T09:00:00Z",
		"2026-11-22T10:00:00.123456-0530":      "2026-11-22T15:30:00.123456Z",
		"2026-11-22 10:00:00+01":               "2026-11-22T09:00:00Z",
		"2026-11-22 10:00+01":                  "2026-11-22T09:00:00Z",
		"2026-11-22 10:00:00 +01":              "2026-11-22T09:00:00Z",
		"2026-11-22 10:00:00 UTC":              "2026-11-22T10:00:00Z",
		"2026-11-22 10:00:00 Europe/Berlin":    "2026-11-22T09:00:00Z",
		"2026-07-22 10:00:00 Europe/Berlin":    "2026-07-22T08:00:00Z",
		"2026-07-22 10:00:00 Asia/Kathmandu":   "2026-07-22T04:15:00Z",
		"2026-10-25 02:30:00 Europe/Berlin":    "", // twice
		"2026-10-25 02:30:00+02":               "2026-10-25T00:30:00Z",
		"2026-10-25 01:59:59.9 Europe/Berlin":  "2026-10-24T23:59:59.9Z",
		"2026-10-25 03:00:00 Europe/Berlin":    "2026-10-25T02:00:00Z",
		"2026-03-29 02:30:00 Europe/Berlin":    "", // never
		"2026-03-29 03:00:00 Europe/Berlin":    "2026-03-29T01:00:00Z",
		"2026-10-04 02:15:00 Australia/Sydney": "", // never
		"2026-11-22 10:00:00":                  "",
		"2026-11-22T10:00:00":                  "",
		"2026-11-22":                           "",
		"2026-11-22Z":                          "",
		"2026-11-22 13am UTC":                  "",
		"2026-11-22 10:00:00am UTC":            "",
		"2026-11-22 25:00:00 UTC":              "",
		"2026-02-30 10:00:00 UTC":              "",
		"2026-11-22 10:00:00 Local":            "",
		"2026-11-22 10:00:00 GMT":              "2026-11-22T10:00:00Z",
		"2026-07-22 10:00:00 CET":              "", // in summer, CEST is meant or CET
		"2026-07-22 10:00:00 EST":              "",
		"2026-07-22 10:00:00 MST7MDT":          "",
		"2026-11-22 10:00:00 ../../etc/passwd": "",
		"2026-11-22 10:00:00 Nowhere/City":     "",
		"2026-11-22 10:00:00+99":               "",
		"yesterday":                            "",
		"":                                     "",
	} {
		got, err := restore.ParseTime(s)
		switch {
		case want == "" && !errors.Is(err, fail.BadConfig):
			t.Errorf("ParseTime(%q) = %v, %v, want it refused", s, got, err)
		case want != "" && (err != nil || got.Format(time.RFC3339Nano) != want):
			t.Errorf("ParseTime(%q) = %v, %v, want %v", s, got, err, want)
		}
	}
}

func TestParseTimeline(t *testing.T) {
	for s, want := range map[string]restore.TargetTimeline{
		"latest": restore.LatestTimeline, "current": restore.CurrentTimeline, "2": 2, "10": 10, "0x0A": 10, "0000000A": 10, "00000010": 16, "4294967295": 1<<32 - 1,
	} {
		if got, err := restore.ParseTimeline(s); err != nil || got != want {
			t.Errorf("ParseTimeline(%q) = %v, %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"0", "A", "-1", "0x", "4294967296", "newest", "1.5"} {
		if got, err := restore.ParseTimeline(s); !errors.Is(err, fail.BadConfig) {
			t.Errorf("ParseTimeline(%q) = %v, %v, want it refused", s, got, err)
		}
	}
}

func TestParseXID(t *testing.T) {
	for s, want := range map[string]uint32{"3": 3, "740": 740, "4294967295": 1<<32 - 1, "4294968036": 740} {
		if got, err := restore.ParseXID(s); err != nil || got != want {
			t.Errorf("ParseXID(%q) = %v, %v, want %v", s, got, err, want)
		}
	}
	for _, s := range []string{"", "0", "2", "-3", "0x10", "4294967296", "7 "} {
		if got, err := restore.ParseXID(s); !errors.Is(err, fail.BadConfig) {
			t.Errorf("ParseXID(%q) = %v, %v, want it refused", s, got, err)
		}
	}
}
