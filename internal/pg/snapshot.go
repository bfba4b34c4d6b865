package pg

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// A Snapshot is what a snapshot of the server says of transactions, in the text
// form of PostgreSQL's type pg_snapshot: "xmin:xmax:xip,xip".
type Snapshot struct {
	Xmin, Xmax uint64   // all before Xmin have ended, none from Xmax on
	Running    []uint64 // of those between
}

// ParseSnapshot parses the text form.
func ParseSnapshot(text string) (Snapshot, error) {
	parts := strings.Split(text, ":")
	if len(parts) != 3 {
		return Snapshot{}, fmt.Errorf("parse snapshot %.100q", text)
	}
	var numbers []uint64
	for _, field := range append(parts[:2:2], strings.FieldsFunc(parts[2], func(r rune) bool { return r == ',' })...) {
		n, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return Snapshot{}, fmt.Errorf("parse snapshot %.100q: %w", text, err)
		}
		numbers = append(numbers, n)
	}
	return Snapshot{numbers[0], numbers[1], numbers[2:]}, nil
}

// Ended reports whether a transaction has ended for s. If it committed, s sees
// what it did.
func (s Snapshot) Ended(xid uint64) bool {
	return xid < s.Xmin || xid < s.Xmax && !slices.Contains(s.Running, xid)
}

// EndedInLog is Ended for a transaction as the log writes it, without its epoch:
// the one of that number that is nearest to s.
func (s Snapshot) EndedInLog(xid uint32) bool {
	return s.Ended(s.Xmax + uint64(int64(int32(xid-uint32(s.Xmax)))))
}
