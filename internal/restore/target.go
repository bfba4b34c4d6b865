package restore

import (
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // zone names mean the same on every host

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// A TargetKind says what a Target is given by.
type TargetKind string

const (
	Latest    TargetKind = "latest"    // all there is
	Immediate TargetKind = "immediate" // the backup as it was taken: the first consistent moment
	ToTime    TargetKind = "time"      // just before the first transaction that ended later
	ToLSN     TargetKind = "lsn"
	ToXID     TargetKind = "xid" // the end of a transaction
	ToName    TargetKind = "name"
)

// A Target is a moment to recover to. Only what its kind needs is set. The zero
// Target is not valid: see Latest.
type Target struct {
	Kind TargetKind `json:"kind"`
	Time time.Time  `json:"time,omitzero"` // UTC, to the microsecond
	LSN  pg.LSN     `json:"lsn,omitzero"`
	XID  uint32     `json:"xid,omitempty"`
	Name string     `json:"name,omitempty"` // of a restore point
	// Exclusive stops just before what the target names, not just after it
	// (recovery_target_inclusive). It is for time, LSN and XID only.
	Exclusive bool           `json:"exclusive,omitempty"`
	Timeline  TargetTimeline `json:"timeline"`
}

// A TargetTimeline says along which timeline to recover: the number of one, or
// one of the words below. The zero value is LatestTimeline.
type TargetTimeline uint64

const (
	LatestTimeline  TargetTimeline = 0       // the newest there is
	CurrentTimeline TargetTimeline = 1 << 32 // that of the backup
)

// ParseTimeline reads "latest", "current", or a number: decimal as PostgreSQL's
// settings have it, or hexadecimal after 0x, or eight digits as in the names of
// WAL files.
func ParseTimeline(s string) (TargetTimeline, error) {
	switch s {
	case "", "latest":
		return LatestTimeline, nil
	case "current":
		return CurrentTimeline, nil
	}
	digits, base := s, 10
	if hex, ok := strings.CutPrefix(s, "0x"); ok {
		digits, base = hex, 16
	} else if len(s) == 8 {
		base = 16
	}
	n, err := strconv.ParseUint(digits, base, 32)
	if err != nil || n == 0 {
		return 0, fail.Hint(fmt.Errorf("timeline %q: %w", s, fail.BadConfig), "latest, current, a number like 2, or 00000002 as in the names of WAL files")
	}
	return TargetTimeline(n), nil
}

func (t TargetTimeline) String() string {
	switch t {
	case LatestTimeline:
		return "latest"
	case CurrentTimeline:
		return "current"
	}
	return strconv.FormatUint(uint64(t), 10)
}

// MarshalText is for plans and requests; UnmarshalText is its reverse.
func (t TargetTimeline) MarshalText() ([]byte, error) { return []byte(t.String()), nil }

func (t *TargetTimeline) UnmarshalText(b []byte) (err error) {
	*t, err = ParseTimeline(string(b))
	return err
}

var (
	timeForm = regexp.MustCompile(`^(\d{4}-\d\d-\d\d)[T ](\d\d:\d\d(?::\d\d(?:\.\d{1,6})?)?) ?(\S*)$`)
	zoneForm = regexp.MustCompile(`^[+-](\d\d)(?::?(\d\d))?$`)
)

// ParseTime reads a moment. It wants a zone: an offset from UTC, or a name like
// UTC or Europe/Berlin. An hour that a zone had twice, or not at all, is
// refused with what it may mean.
func ParseTime(s string) (time.Time, error) {
	bad := func(why, hint string) (time.Time, error) {
		return time.Time{}, fail.Hint(fmt.Errorf("time %q: %s: %w", s, why, fail.BadConfig), hint)
	}
	const forms = "times look like 2026-11-22T10:00:00+01:00, '2026-11-22 10:00:00+01', '2026-11-22 10:00:00 UTC' or '2026-11-22 10:00:00 Europe/Berlin'"
	m := timeForm.FindStringSubmatch(s)
	if m == nil {
		return bad("not of a form that is known", forms)
	}
	if strings.Count(m[2], ":") == 1 {
		m[2] += ":00"
	}
	wall, err := time.Parse("2006-01-02 15:04:05", m[1]+" "+m[2])
	if err != nil {
		return bad("there is no such time", forms)
	}
	switch zone := zoneForm.FindStringSubmatch(m[3]); {
	case m[3] == "":
		return bad("which zone?", fmt.Sprintf("say which: %q is UTC, %q an hour earlier; a name like Europe/Berlin will do, too", s+"Z", s+"+01"))
	case m[3] == "Z":
		return wall, nil
	case zone != nil:
		hours, _ := strconv.Atoi(zone[1]) // digits
		minutes, _ := strconv.Atoi("0" + zone[2])
		if hours > 15 || minutes > 59 {
			return bad("there is no such offset from UTC", forms)
		}
		offset := time.Duration(hours)*time.Hour + time.Duration(minutes)*time.Minute
		if m[3][0] == '-' {
			offset = -offset
		}
		return wall.Add(-offset), nil
	case m[3] == "Local":
		return bad("which zone is local, nobody will know later", forms)
	}
	if !strings.Contains(m[3], "/") && m[3] != "UTC" && m[3] != "GMT" { // CET and EST are what people there call their winter, and say in summer
		return bad(fmt.Sprintf("%q stands for an offset that not everybody means by it", m[3]), "give the offset from UTC, as in +01, or the name of a place, as in Europe/Berlin")
	}
	place, err := time.LoadLocation(m[3])
	if err != nil {
		return bad(fmt.Sprintf("no zone %q is known", m[3]), forms)
	}
	found := moments(wall, place)
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return bad("the clocks there were put forward past it", "give it with an offset from UTC")
	}
	return bad("the clocks there showed it twice", fmt.Sprintf("say which: %s or %s", found[0].Format(time.RFC3339), found[1].Format(time.RFC3339)))
}

// moments returns all at which a clock in that place showed what wall, taken
// as UTC, says.
func moments(wall time.Time, place *time.Location) (found []time.Time) {
	offsets := make(map[int]bool)
	for _, near := range []time.Duration{-26 * time.Hour, 26 * time.Hour} {
		_, offset := wall.Add(near).In(place).Zone()
		if offsets[offset] {
			continue
		}
		offsets[offset] = true
		at := wall.Add(-time.Duration(offset) * time.Second)
		if _, have := at.In(place).Zone(); have == offset {
			found = append(found, at)
		}
	}
	return found
}

// ParseLSN reads a position as PostgreSQL prints it, "16/B374D848".
func ParseLSN(s string) (pg.LSN, error) {
	l, err := pg.ParseLSN(s)
	if err == nil && l == 0 {
		err = fmt.Errorf("no position")
	}
	if err != nil {
		return 0, fail.Hint(fmt.Errorf("position %q: %w: %w", s, err, fail.BadConfig), "positions look like 16/B374D848, as pg_current_wal_lsn() shows them")
	}
	return l, nil
}

// ParseXID reads the number of a transaction as PostgreSQL's log and its
// functions print it. The epoch that some of them put above 32 bits is dropped.
func ParseXID(s string) (uint32, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || uint32(n) < 3 { // those are PostgreSQL's own
		return 0, fail.Hint(fmt.Errorf("transaction %q: %w", s, fail.BadConfig), "a decimal number, 3 or more, as pg_current_xact_id() shows it")
	}
	return uint32(n), nil
}

// check refuses a target that contradicts itself.
func (t Target) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("target: "+format+": %w", append(args, fail.BadConfig)...)
	}
	switch t.Kind {
	case Latest, Immediate:
	case ToTime:
		if t.Time.IsZero() {
			return bad("no time")
		}
	case ToLSN:
		if t.LSN == 0 {
			return bad("no position")
		}
	case ToXID:
		if t.XID < 3 {
			return bad("no transaction")
		}
	case ToName:
		if t.Name == "" || len(t.Name) > 63 || strings.ContainsRune(t.Name, 0) {
			return bad("%q cannot be the name of a restore point", t.Name)
		}
	default:
		return bad("there is no kind %q", t.Kind)
	}
	if t.Exclusive && t.Kind != ToTime && t.Kind != ToLSN && t.Kind != ToXID {
		return bad("just before %v: that goes with a time, a position or a transaction", t)
	}
	if t.Kind == Immediate && t.Timeline != LatestTimeline && t.Timeline != CurrentTimeline {
		return bad("the moment of the backup is on its own timeline")
	}
	return nil
}

func (t Target) String() string {
	before := ""
	if t.Exclusive {
		before = "just before "
	}
	switch t.Kind {
	case ToTime:
		return before + instant(t.Time)
	case ToLSN:
		return before + "position " + t.LSN.String()
	case ToXID:
		return fmt.Sprintf("%stransaction %d", before, t.XID)
	case ToName:
		return fmt.Sprintf("restore point %q", t.Name)
	case Immediate:
		return "the moment of the backup"
	}
	return "the latest moment"
}

// instant writes a moment so that ParseTime and PostgreSQL read it back, with
// no less than it has.
func instant(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05.999999") + "+00" }
