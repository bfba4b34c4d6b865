// Package pg holds the small PostgreSQL values that every other package speaks
// in: log positions, timelines, system identifiers, version numbers. It does no
// I/O and imports only the standard library.
package pg

import (
	"fmt"
	"strconv"
)

// A SystemID names a cluster for life: initdb makes it, every WAL file and the
// control file carry it. Its text form is decimal, as pg_controldata prints it.
type SystemID uint64

// ParseSystemID parses the decimal text form.
func ParseSystemID(s string) (SystemID, error) {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("parse system identifier %q: %w", s, err)
	}
	return SystemID(n), nil
}

func (s SystemID) String() string { return strconv.FormatUint(uint64(s), 10) }

// MarshalText and UnmarshalText keep all 64 bits through JSON readers that
// know only floating point numbers.
func (s SystemID) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (s *SystemID) UnmarshalText(b []byte) (err error) {
	*s, err = ParseSystemID(string(b))
	return err
}

// A Timeline is one history of a cluster. Promotion begins a new one. In file
// names it is eight hexadecimal digits, in JSON a number.
type Timeline uint32

func (t Timeline) String() string { return fmt.Sprintf("%08X", uint32(t)) }

// A Version is PostgreSQL's server_version_num, for example 150020 for 15.20.
// The zero Version means unknown.
type Version int

// Major returns the major version, for example 15.
func (v Version) Major() int { return int(v) / 10000 }

// String returns the version as PostgreSQL prints it, for example "15.20".
func (v Version) String() string {
	return fmt.Sprintf("%d.%d", v.Major(), int(v)%10000)
}
