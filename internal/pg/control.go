package pg

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math"
)

// ControlSize is the length of global/pg_control; only its beginning means
// anything.
const ControlSize = 8192

// ErrTorn says that the checksum of pg_control is wrong: the server may be
// writing it at this moment, so that reading it again helps.
var ErrTorn = errors.New("its checksum is wrong")

// A ControlState is what pg_control says of the server's life (DBState in
// catalog/pg_control.h).
type ControlState uint32

const (
	ShutDown           ControlState = 1 // after a clean end
	ShutDownInRecovery ControlState = 2 // the same, of a standby
	InArchiveRecovery  ControlState = 5 // a standby, or a restore that replays the archive
	InProduction       ControlState = 6
)

// A Control is what pgkeep reads in global/pg_control (ControlFileData in
// catalog/pg_control.h).
type Control struct {
	System  SystemID
	Version int // PG_CONTROL_VERSION: 1300 for PostgreSQL 13 to 16
	Catalog int // CATALOG_VERSION_NO, part of the name of every tablespace's directory
	State   ControlState

	Checkpoint LSN // the record of the last checkpoint
	Redo       LSN // where recovery from it begins
	Timeline   Timeline

	MinRecovery         LSN // recovery is not consistent before it; 0 but for standbys
	MinRecoveryTimeline Timeline

	BlockSize    int // of a page, in bytes
	RelSegBlocks int // pages in one file of a relation
	SegmentSize  SegmentSize
	Checksums    bool // every page carries one
}

// ParseControl reads global/pg_control of PostgreSQL 13 to 18 on a little-endian
// machine. A constant that PostgreSQL keeps there tells whether the fields stand
// where they should. A wrong checksum is ErrTorn.
func ParseControl(b []byte) (Control, error) {
	const float, least = 208, 296
	if len(b) < least {
		return Control{}, fmt.Errorf("pg_control: %d bytes are too few", len(b))
	}
	le := binary.LittleEndian
	u32 := func(at int) uint32 { return le.Uint32(b[at:]) }
	u64 := func(at int) uint64 { return le.Uint64(b[at:]) }
	c := Control{
		System: SystemID(u64(0)), Version: int(u32(8)), Catalog: int(u32(12)), State: ControlState(u32(16)),
		Checkpoint: LSN(u64(32)), Redo: LSN(u64(40)), Timeline: Timeline(u32(48)),
		MinRecovery: LSN(u64(136)), MinRecoveryTimeline: Timeline(u32(144)),
		BlockSize: int(u32(216)), RelSegBlocks: int(u32(220)), SegmentSize: SegmentSize(u32(228)),
		Checksums: u32(252) == 1,
	}
	if c.Version < 1300 || c.Version >= 1900 || math.Float64frombits(u64(float)) != 1234567 {
		return Control{}, fmt.Errorf("pg_control: of no PostgreSQL that is known here (version %d)", c.Version)
	}
	crc := controlCRC(c)
	if crc32.Checksum(b[:crc], castagnoli) != u32(crc) {
		return Control{}, fmt.Errorf("pg_control: %w", ErrTorn)
	}
	if c.System == 0 || c.Timeline == 0 || !c.SegmentSize.Valid() || c.RelSegBlocks <= 0 ||
		c.BlockSize < 1<<10 || c.BlockSize > 32<<10 || c.BlockSize&(c.BlockSize-1) != 0 {
		return Control{}, errors.New("pg_control: its checksum is right, what it says is impossible")
	}
	return c, nil
}

// controlCRC is where the checksum stands: PostgreSQL 18 has a field more
// before it.
func controlCRC(c Control) int {
	if c.Version < 1800 {
		return 288
	}
	return 292
}
