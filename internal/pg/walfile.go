package pg

import (
	"encoding/binary"
	"fmt"
	"strconv"
	"strings"
)

// A WALKind says which kind of file PostgreSQL hands to its archiver.
type WALKind int

const (
	Segment       WALKind = iota + 1 // a piece of the log
	Partial                          // the last piece of a timeline that ended within it
	History                          // where a timeline comes from
	BackupHistory                    // a note that a base backup was taken
)

// A WALName is the name of a file in the archive, taken apart. Only
// ParseWALName makes one that is not zero.
type WALName struct {
	Kind     WALKind
	Timeline Timeline
	text     string
}

// ParseWALName accepts the four forms that PostgreSQL uses, in its own spelling,
// and nothing else (access/xlog_internal.h: XLogFileName, TLHistoryFileName,
// BackupHistoryFileName). It does not know the segment size, so a number that
// the size rules out passes: see Start.
func ParseWALName(s string) (WALName, error) {
	bad := func(why string) (WALName, error) { return WALName{}, fmt.Errorf("WAL file name %.80q: %s", s, why) }
	stem, rest, _ := strings.Cut(s, ".")
	n := WALName{text: s}
	switch {
	case len(stem) == 8 && rest == "history":
		n.Kind = History
	case len(stem) == 24 && s == stem:
		n.Kind = Segment
	case len(stem) == 24 && rest == "partial":
		n.Kind = Partial
	case len(stem) == 24 && len(rest) == 15 && rest[8:] == ".backup" && isHex(rest[:8]):
		n.Kind = BackupHistory
	default:
		return bad("want a segment, or one that ends in .partial, .backup or .history")
	}
	if !isHex(stem) {
		return bad("want hexadecimal digits in capital letters")
	}
	tli, err := strconv.ParseUint(stem[:8], 16, 32)
	if err != nil || tli == 0 {
		return bad("there is no timeline 0")
	}
	n.Timeline = Timeline(tli)
	return n, nil
}

func isHex(s string) bool {
	return strings.Trim(s, "0123456789ABCDEF") == ""
}

func (n WALName) String() string { return n.text }

// Segment is the name of the segment that a file belongs to, "" for a history.
func (n WALName) Segment() string {
	if n.Kind == History || n.text == "" {
		return ""
	}
	return n.text[:24]
}

// Start is the position of the first byte of the segment that a file belongs to.
func (n WALName) Start(size SegmentSize) (LSN, error) {
	_, lsn, err := ParseSegmentName(n.Segment(), size)
	return lsn, err
}

// Next is the segment after that of n on the same timeline. The last there can
// be has none.
func (n WALName) Next(size SegmentSize) (WALName, error) {
	start, err := n.Start(size)
	if err != nil {
		return WALName{}, err
	}
	next := start + LSN(size)
	if next < start {
		return WALName{}, fmt.Errorf("no WAL segment follows %s", n)
	}
	text, err := SegmentName(n.Timeline, next, size)
	return WALName{Segment, n.Timeline, text}, err
}

// HistoryName is the name of the history file of a timeline.
func HistoryName(t Timeline) WALName {
	return WALName{History, t, t.String() + ".history"}
}

// A Fork says where a timeline was left for another one.
type Fork struct {
	Timeline Timeline `json:"timeline"` // the one that was left
	At       LSN      `json:"at"`       // the first position that the other one does not share
}

// ParseHistory reads the history file of timeline t, oldest fork first. It
// accepts what PostgreSQL does (readTimeLineHistory in access/transam/timeline.c),
// and wants positions that do not fall.
func ParseHistory(t Timeline, text string) ([]Fork, error) {
	bad := func(line, why string) ([]Fork, error) {
		return nil, fmt.Errorf("history of timeline %v: line %.80q: %s", t, line, why)
	}
	var forks []Fork
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\r\n")
		fields := strings.Fields(line)
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if len(fields) < 2 {
			return bad(line, "want a timeline and a position")
		}
		n, err := strconv.ParseUint(fields[0], 10, 32)
		if err != nil || n == 0 {
			return bad(line, "want the number of a timeline")
		}
		at, err := ParseLSN(fields[1])
		if err != nil {
			return bad(line, err.Error())
		}
		f := Fork{Timeline(n), at}
		if last := len(forks) - 1; last >= 0 && (f.Timeline <= forks[last].Timeline || f.At < forks[last].At) {
			return bad(line, "timelines and positions must ascend")
		}
		if f.Timeline >= t {
			return bad(line, "a timeline comes from an older one")
		}
		forks = append(forks, f)
	}
	if len(forks) == 0 {
		return nil, fmt.Errorf("history of timeline %v: holds no line", t)
	}
	return forks, nil
}

// PageHeaderSize is how many bytes of a segment ParsePageHeader reads.
const PageHeaderSize = 40

// A PageHeader is what the first page of a segment says of it
// (XLogLongPageHeaderData in access/xlog_internal.h).
type PageHeader struct {
	Major       int      // of the server that wrote it
	Timeline    Timeline // of the page: after a fork it may be older than the segment's
	Address     LSN      // of the page
	System      SystemID
	SegmentSize SegmentSize
}

// ParsePageHeader reads the first page header of a segment, of PostgreSQL 13 to
// 18 on a little-endian machine.
func ParsePageHeader(b []byte) (PageHeader, error) {
	const long, flags = 0x0002, 0x000f
	le := binary.LittleEndian
	if len(b) < PageHeaderSize {
		return PageHeader{}, fmt.Errorf("WAL page header: %d bytes, want %d", len(b), PageHeaderSize)
	}
	magic, info := le.Uint16(b), le.Uint16(b[2:])
	h := PageHeader{Major: majorOf(magic), Timeline: Timeline(le.Uint32(b[4:])), Address: LSN(le.Uint64(b[8:])),
		System: SystemID(le.Uint64(b[24:])), SegmentSize: SegmentSize(le.Uint32(b[32:]))}
	switch blk := le.Uint32(b[36:]); {
	case h.Major == 0:
		return PageHeader{}, fmt.Errorf("WAL page header: magic number %04X is of no known PostgreSQL", magic)
	case info&long == 0 || info&^uint16(flags) != 0:
		return PageHeader{}, fmt.Errorf("WAL page header: flags %04X are not those of a first page", info)
	case !h.SegmentSize.Valid():
		return PageHeader{}, fmt.Errorf("WAL page header: %d is not a segment size", h.SegmentSize)
	case blk < 1<<10 || blk > 1<<16 || blk&(blk-1) != 0:
		return PageHeader{}, fmt.Errorf("WAL page header: %d is not a block size", blk)
	case h.Timeline == 0:
		return PageHeader{}, fmt.Errorf("WAL page header: there is no timeline 0")
	}
	return h, nil
}

// majorOf knows XLOG_PAGE_MAGIC of each major version; 0 means another.
func majorOf(magic uint16) int {
	switch magic {
	case 0xD106:
		return 13
	case 0xD10D:
		return 14
	case 0xD110:
		return 15
	case 0xD113:
		return 16
	case 0xD116:
		return 17
	case 0xD118:
		return 18
	}
	return 0
}
