package pg

import (
	"fmt"
	"math/bits"
	"strconv"
)

// A SegmentSize is the number of bytes in one WAL file of a cluster, chosen by
// initdb --wal-segsize: a power of two from 1 MiB to 1 GiB, 16 MiB by default.
type SegmentSize int64

// Valid reports whether s is a size that PostgreSQL accepts.
func (s SegmentSize) Valid() bool {
	return s >= 1<<20 && s <= 1<<30 && bits.OnesCount64(uint64(s)) == 1
}

// SegmentName is the name of the WAL file of timeline tli that holds the byte at
// lsn: 24 hexadecimal digits, eight for the timeline and sixteen for the number
// of the segment, split at every 4 GiB of log (XLogFileName in PostgreSQL's
// access/xlog_internal.h). To name the last file needed to replay up to a
// position, ask for the byte before it.
func SegmentName(tli Timeline, lsn LSN, size SegmentSize) (string, error) {
	if !size.Valid() {
		return "", fmt.Errorf("name WAL segment: %d is not a segment size", int64(size))
	}
	log := uint64(lsn) >> 32
	seg := (uint64(lsn) & (1<<32 - 1)) / uint64(size)
	return fmt.Sprintf("%08X%08X%08X", uint32(tli), log, seg), nil
}

// ParseSegmentName returns the timeline in a WAL file's name and the position
// of the file's first byte. Only the plain form is accepted: not ".partial",
// ".backup" or ".history", no small letters, and no number that the segment
// size rules out.
func ParseSegmentName(name string, size SegmentSize) (Timeline, LSN, error) {
	if !size.Valid() {
		return 0, 0, fmt.Errorf("parse WAL segment name %q: %d is not a segment size", name, int64(size))
	}
	if len(name) != 24 {
		return 0, 0, fmt.Errorf("parse WAL segment name %q: not 24 digits", name)
	}
	var part [3]uint64
	for i := range part {
		n, err := strconv.ParseUint(name[i*8:i*8+8], 16, 32)
		if err != nil {
			return 0, 0, fmt.Errorf("parse WAL segment name %q: %w", name, err)
		}
		part[i] = n
	}
	if part[2] >= 1<<32/uint64(size) {
		return 0, 0, fmt.Errorf("parse WAL segment name %q: number too large for segments of %d bytes", name, int64(size))
	}
	tli, lsn := Timeline(part[0]), LSN(part[1]<<32|part[2]*uint64(size))
	if canonical, _ := SegmentName(tli, lsn, size); canonical != name {
		return 0, 0, fmt.Errorf("parse WAL segment name %q: not in capital letters", name)
	}
	return tli, lsn, nil
}
