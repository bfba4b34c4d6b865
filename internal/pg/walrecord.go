package pg

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"time"
)

// A RecordKind says what a record of the log is about, as far as recovery may
// be told to stop at it.
type RecordKind int

const (
	Commit        RecordKind = iota + 1 // of a transaction, prepared or not
	Abort                               // of a transaction, prepared or not
	RestorePoint                        // pg_create_restore_point
	BackupEnd                           // a base backup is consistent from here
	Checkpoint                          // of any kind
	EndOfRecovery                       // a timeline begins
)

// A WALRecord is one record of the log.
type WALRecord struct {
	Kind RecordKind
	At   LSN       // its first byte
	End  LSN       // where the next record may begin
	XID  uint32    // the transaction that ended; of a prepared one its own, not that of COMMIT PREPARED
	Time time.Time // by the server's clock, UTC; of a checkpoint to the second; a backup's end has none
	Name string    // of a restore point
	From LSN       // where the base backup that ends here began, or the checkpoint's redo point
}

// A WALScanner reads a piece of the log, and finds in it what recovery may be
// told to stop at. It takes as much memory for a log of any size, and for
// records of any size: what is read counts only when the record's checksum is
// right (access/transam/xlogreader.c is what it has to agree with).
type WALScanner struct {
	// Every lets Next return also records of no kind, of which only At, End and
	// XID are known.
	Every bool

	r io.Reader

	magic   uint16
	system  SystemID
	size    SegmentSize
	block   int
	page    []byte // of the log, whole
	addr    LSN    // of page
	off     int    // of the next byte in page that was not taken
	tli     Timeline
	skipped LSN // the rest of the segment before it is empty

	prev LSN // the last record's first byte; 0: none was read yet
	end  LSN
	why  error

	// of the record that is being read
	left uint32 // bytes that belong to it still
	crc  uint32
}

// NewWALScanner reads the log from r: one segment from its beginning, and
// then any number of those that follow it, which may be those of a timeline
// that left the first one's on the way.
func NewWALScanner(r io.Reader) *WALScanner { return &WALScanner{r: r} }

// End is where the valid log read so far ends: the position at which the next
// record would begin. Zero before the first record.
func (s *WALScanner) End() LSN { return s.end }

// Why says what ended the log, after Next has returned io.EOF: nil if r ended
// where a page does, else what is wrong with the bytes behind End. That is
// normal where a server has stopped writing.
func (s *WALScanner) Why() error {
	if errors.Is(s.why, io.EOF) {
		return nil
	}
	return s.why
}

// Timeline is that of the last page that was read.
func (s *WALScanner) Timeline() Timeline { return s.tli }

// Next returns the next record of one of the kinds above, io.EOF at the end of
// the valid log, and the error of r if that fails. It is not to be called again
// after an error.
func (s *WALScanner) Next() (WALRecord, error) {
	for {
		rec, err := s.record()
		var broken *brokenLog
		switch {
		case err == nil && (rec.Kind != 0 || s.Every && rec.End != 0):
			return rec, nil
		case err == nil:
		case err == io.EOF, errors.As(err, &broken):
			s.why = err
			return WALRecord{}, io.EOF
		default:
			return WALRecord{}, err
		}
	}
}

// A brokenLog is what ends the valid log.
type brokenLog struct {
	at   LSN
	what string
}

func (b *brokenLog) Error() string { return fmt.Sprintf("log at %v: %s", b.at, b.what) }

func (s *WALScanner) broken(format string, args ...any) error {
	return &brokenLog{s.pos(), fmt.Sprintf(format, args...)}
}

func (s *WALScanner) pos() LSN { return s.addr + LSN(s.off) }

// Page flags, and the lengths of page and record headers.
const (
	pageContinues  = 0x0001
	pageLong       = 0x0002
	pageOverwrites = 0x0008 // the record that did not fit was given up
	pageFlags      = 0x000f

	pageShort    = 24
	recordHeader = 24
)

// nextPage reads a page and checks its header. The header is taken.
func (s *WALScanner) nextPage() error {
	if s.page == nil {
		return s.firstPage()
	}
	s.addr += LSN(s.block)
	s.off = 0
	return s.readPage(0)
}

func (s *WALScanner) firstPage() error {
	var head [PageHeaderSize]byte
	if _, err := io.ReadFull(s.r, head[:]); err != nil {
		return s.short(err)
	}
	h, err := ParsePageHeader(head[:])
	if err != nil {
		return s.broken("%v", err)
	}
	s.magic = binary.LittleEndian.Uint16(head[:])
	s.system, s.size, s.addr = h.System, h.SegmentSize, h.Address
	s.block = int(binary.LittleEndian.Uint32(head[36:]))
	if uint64(s.addr)%uint64(s.size) != 0 {
		return s.broken("not the beginning of a segment")
	}
	s.page = make([]byte, s.block)
	copy(s.page, head[:])
	return s.readPage(len(head))
}

// readPage reads what is missing of the page behind have bytes.
func (s *WALScanner) readPage(have int) error {
	if _, err := io.ReadFull(s.r, s.page[have:]); err != nil {
		return s.short(err)
	}
	le := binary.LittleEndian
	magic, info, tli := le.Uint16(s.page), le.Uint16(s.page[2:]), Timeline(le.Uint32(s.page[4:]))
	first := uint64(s.addr)%uint64(s.size) == 0
	switch {
	case magic != s.magic:
		return s.broken("magic number %04X, was %04X", magic, s.magic)
	case info&^pageFlags != 0 || first != (info&pageLong != 0):
		return s.broken("flags %04X do not fit the page", info)
	case LSN(le.Uint64(s.page[8:])) != s.addr:
		return s.broken("the page says that it is at %v", LSN(le.Uint64(s.page[8:])))
	case tli < s.tli || tli == 0:
		return s.broken("timeline %v after %v", tli, s.tli)
	case first && (SystemID(le.Uint64(s.page[24:])) != s.system || SegmentSize(le.Uint32(s.page[32:])) != s.size || le.Uint32(s.page[36:]) != uint32(s.block)):
		return s.broken("a segment of another server")
	}
	s.tli = tli
	s.off = pageShort
	if first {
		s.off = PageHeaderSize
	}
	return nil
}

// short is what it means that r gave less than a page.
func (s *WALScanner) short(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return s.broken("ends within a page")
	}
	return err
}

// pageInfo returns the flags of the page and what of a record is to come on it
// and behind it.
func (s *WALScanner) pageInfo() (flags uint16, rest uint32) {
	return binary.LittleEndian.Uint16(s.page[2:]), binary.LittleEndian.Uint32(s.page[16:])
}

// errGivenUp means that a record was not finished, and that the page at hand
// begins with one that says so.
var errGivenUp = errors.New("the record was given up")

// record reads one record. Its kind is zero if it is of none of those known.
func (s *WALScanner) record() (WALRecord, error) {
	if err := s.toRecord(); err != nil {
		return WALRecord{}, err
	}
	rec, err := s.readRecord()
	if err == errGivenUp {
		return WALRecord{}, nil
	}
	return rec, err
}

// toRecord moves to where the next record begins.
func (s *WALScanner) toRecord() error {
	if s.page != nil && s.skipped > s.addr {
		for s.skipped > s.addr+LSN(s.block) { // what is behind a switch is zeros, or older
			if _, err := io.ReadFull(s.r, s.page); err != nil {
				return s.short(err)
			}
			s.addr += LSN(s.block)
		}
		s.off = s.block
	}
	s.off = (s.off + 7) &^ 7
	for s.page == nil || s.off >= s.block {
		if err := s.nextPage(); err != nil {
			return err
		}
		flags, rest := s.pageInfo()
		switch {
		case flags&pageContinues == 0:
		case s.prev != 0:
			return s.broken("the page goes on with a record that has ended")
		default: // it began before the first segment
			if err := s.skipForeign(rest); err != nil {
				return err
			}
		}
	}
	return nil
}

// skipForeign passes by the rest of a record that began before what is read.
func (s *WALScanner) skipForeign(rest uint32) error {
	for {
		n := min(int(rest), s.block-s.off)
		s.off += n
		if rest -= uint32(n); rest == 0 {
			s.off = (s.off + 7) &^ 7
			return nil
		}
		if err := s.nextPage(); err != nil {
			return err
		}
		switch flags, left := s.pageInfo(); {
		case flags&pageOverwrites != 0:
			return nil
		case flags&pageContinues == 0 || left != rest:
			return s.broken("%d bytes of a record are missing", rest)
		}
	}
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func (s *WALScanner) readRecord() (WALRecord, error) {
	le := binary.LittleEndian
	at := s.pos()
	total := le.Uint32(s.page[s.off:]) // never split: records begin at multiples of 8
	if total < recordHeader {
		return WALRecord{}, s.broken("a record of %d bytes", total)
	}
	s.left, s.crc = total, 0
	var head [recordHeader]byte
	if err := s.take(head[:]); err != nil {
		return WALRecord{}, err
	}
	s.crc = 0 // the header comes last
	prev, info, rmgr := LSN(le.Uint64(head[8:])), head[16], head[17]
	if s.prev != 0 && prev != s.prev || prev >= at {
		return WALRecord{}, s.broken("a record that follows one at %v", prev)
	}
	rec := WALRecord{At: at, XID: le.Uint32(head[4:])}
	err := s.body(&rec, rmgr, info)
	if err == nil {
		err = s.skip(s.left)
	}
	if err != nil {
		return WALRecord{}, err
	}
	if s.crc = crc32.Update(s.crc, castagnoli, head[:20]); s.crc != le.Uint32(head[20:]) {
		return WALRecord{}, s.broken("the record at %v has a wrong checksum", at)
	}
	s.prev = at
	s.end = (s.pos() + 7) &^ 7
	if rmgr == rmgrXLOG && info&0xf0 == xlogSwitch {
		s.end = (s.end + LSN(s.size) - 1) &^ (LSN(s.size) - 1)
		s.skipped = s.end
	}
	rec.End = s.end
	return rec, nil
}

// take reads bytes of the record; skip passes by them. A record that has fewer
// is broken.
func (s *WALScanner) take(b []byte) error {
	return s.each(uint32(len(b)), func(piece []byte) { b = b[copy(b, piece):] })
}

func (s *WALScanner) skip(n uint32) error { return s.each(n, func([]byte) {}) }

func (s *WALScanner) each(n uint32, use func([]byte)) error {
	if n > s.left {
		return s.broken("a record ends too early")
	}
	for n > 0 {
		if s.off == s.block {
			if err := s.continued(); err != nil {
				return err
			}
		}
		piece := s.page[s.off:min(s.block, s.off+int(n))]
		use(piece)
		s.crc = crc32.Update(s.crc, castagnoli, piece)
		s.off += len(piece)
		s.left -= uint32(len(piece))
		n -= uint32(len(piece))
	}
	return nil
}

// continued moves to the page on which a record goes on.
func (s *WALScanner) continued() error {
	if err := s.nextPage(); err != nil {
		return err
	}
	switch flags, rest := s.pageInfo(); {
	case flags&pageOverwrites != 0:
		s.prev = 0 // which record the next one follows is not known
		return errGivenUp
	case flags&pageContinues == 0 || rest != s.left:
		return s.broken("%d bytes of a record are missing", s.left)
	}
	return nil
}

// Resource managers and their records (access/rmgrlist.h, catalog/pg_control.h,
// access/xact.h).
const (
	rmgrXLOG, rmgrXact = 0, 1

	xlogShutdown, xlogOnline, xlogSwitch, xlogBackupEnd, xlogRestorePoint, xlogEndOfRecovery = 0x00, 0x10, 0x40, 0x50, 0x70, 0x90

	xactCommit, xactAbort, xactCommitPrepared, xactAbortPrepared = 0x00, 0x20, 0x30, 0x40
	xactHasInfo                                                  = 0x80
)

// body reads what is wanted of a record's data.
func (s *WALScanner) body(rec *WALRecord, rmgr, info byte) error {
	switch rmgr {
	case rmgrXLOG:
		switch info & 0xf0 {
		case xlogShutdown, xlogOnline:
			rec.Kind = Checkpoint
		case xlogBackupEnd:
			rec.Kind = BackupEnd
		case xlogRestorePoint:
			rec.Kind = RestorePoint
		case xlogEndOfRecovery:
			rec.Kind = EndOfRecovery
		}
	case rmgrXact:
		switch info & 0x70 {
		case xactCommit, xactCommitPrepared:
			rec.Kind = Commit
		case xactAbort, xactAbortPrepared:
			rec.Kind = Abort
		}
	}
	if rec.Kind == 0 {
		return nil
	}
	if err := s.toMainData(); err != nil {
		return err
	}
	switch rec.Kind {
	case Checkpoint:
		var b [72]byte
		err := s.take(b[:])
		rec.From, rec.Time = LSN(binary.LittleEndian.Uint64(b[:])), time.Unix(int64(binary.LittleEndian.Uint64(b[64:])), 0).UTC()
		return err
	case BackupEnd:
		from, err := s.uint64()
		rec.From = LSN(from)
		return err
	}
	micros, err := s.uint64()
	if err != nil {
		return err
	}
	rec.Time = timestamp(int64(micros))
	switch rec.Kind {
	case RestorePoint:
		var name [64]byte
		err = s.take(name[:])
		text, _, _ := bytes.Cut(name[:], []byte{0})
		rec.Name = string(text)
	case Commit, Abort:
		if op := info & 0x70; info&xactHasInfo != 0 && (op == xactCommitPrepared || op == xactAbortPrepared) {
			rec.XID, err = s.preparedXID()
		}
	}
	return err
}

// toMainData passes by the headers before a record's own data; the records of
// interest refer to no block (access/xlogrecord.h).
func (s *WALScanner) toMainData() error {
	const short, long, origin, toplevel = 255, 254, 253, 252
	for {
		var id [1]byte
		if err := s.take(id[:]); err != nil {
			return err
		}
		switch id[0] {
		case short:
			return s.skip(1)
		case long:
			return s.skip(4)
		case origin:
			if err := s.skip(2); err != nil {
				return err
			}
		case toplevel:
			if err := s.skip(4); err != nil {
				return err
			}
		default:
			return s.broken("a record with a block where none is known")
		}
	}
}

// preparedXID reads on to the transaction that a COMMIT PREPARED or ROLLBACK
// PREPARED is about (ParseCommitRecord in access/rmgrdesc/xactdesc.c).
func (s *WALScanner) preparedXID() (uint32, error) {
	const database, children, relations, messages, twophase, statistics = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 8
	info, err := s.uint32()
	if err != nil {
		return 0, err
	}
	if info&database != 0 {
		if err := s.skip(8); err != nil {
			return 0, err
		}
	}
	item := uint32(12) // of statistics that were dropped
	if majorOf(s.magic) >= 18 {
		item = 16
	}
	for _, list := range []struct{ flag, item uint32 }{{children, 4}, {relations, 12}, {statistics, item}, {messages, 16}} {
		if info&list.flag == 0 {
			continue
		}
		n, err := s.uint32()
		if err != nil {
			return 0, err
		}
		if n > s.left/list.item {
			return 0, s.broken("a list of %d items is longer than its record", n)
		}
		if err := s.skip(n * list.item); err != nil {
			return 0, err
		}
	}
	if info&twophase == 0 {
		return 0, s.broken("a prepared transaction without its number")
	}
	return s.uint32()
}

func (s *WALScanner) uint32() (uint32, error) {
	var b [4]byte
	err := s.take(b[:])
	return binary.LittleEndian.Uint32(b[:]), err
}

func (s *WALScanner) uint64() (uint64, error) {
	var b [8]byte
	err := s.take(b[:])
	return binary.LittleEndian.Uint64(b[:]), err
}

// timestamp is PostgreSQL's: microseconds since the year 2000.
func timestamp(micros int64) time.Time {
	const epoch = 946_684_800
	return time.Unix(epoch+micros/1e6, micros%1e6*1000).UTC()
}
