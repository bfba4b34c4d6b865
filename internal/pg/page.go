package pg

import "encoding/binary"

// PageLSN is the end of the last WAL record that changed a page (pd_lsn in
// storage/bufpage.h).
func PageLSN(page []byte) LSN {
	le := binary.LittleEndian
	return LSN(le.Uint32(page))<<32 | LSN(le.Uint32(page[4:]))
}

// StoredChecksum is the checksum that a page carries.
func StoredChecksum(page []byte) uint16 { return binary.LittleEndian.Uint16(page[8:]) }

// PageIsNew reports whether a page claims never to have been filled: pd_upper
// is 0. Such a page carries no checksum; it is right if every byte is 0.
func PageIsNew(page []byte) bool { return binary.LittleEndian.Uint16(page[14:]) == 0 }

// PageChecksum computes the checksum of a page at a block number of its
// relation's fork, as if the field that holds it were 0 (pg_checksum_page in
// storage/checksum_impl.h). The length of the page must be a multiple of 128
// bytes.
//
// The page is a table of 32 columns of 32-bit numbers; every column gets a sum
// of the FNV-1a kind. Eight columns at a time fit the registers of the
// processor, and go through its multiplier without waiting for each other.
func PageChecksum(page []byte, block uint32) uint16 {
	const notChecksum = 0xffff_0000 // of the third number of a page, the other half
	all := block ^ columns(page, 0, notChecksum)
	for first := 8; first < len(columnSeeds); first += 8 {
		all ^= columns(page, first, ^uint32(0))
	}
	return uint16(all%65535 + 1)
}

// columns puts the sums of eight columns together, from the first one on. The
// mask is for the third number of the first row.
func columns(page []byte, first int, mask uint32) uint32 {
	seed := (*[8]uint32)(columnSeeds[first:])
	page = page[4*first:]
	s0, s1, s2, s3 := seed[0], seed[1], seed[2], seed[3]
	s4, s5, s6, s7 := seed[4], seed[5], seed[6], seed[7]
	for len(page) >= 32 {
		le, row := binary.LittleEndian, (*[32]byte)(page)
		s0 = mix(s0, le.Uint32(row[0:]))
		s1 = mix(s1, le.Uint32(row[4:]))
		s2 = mix(s2, le.Uint32(row[8:])&mask)
		s3 = mix(s3, le.Uint32(row[12:]))
		s4 = mix(s4, le.Uint32(row[16:]))
		s5 = mix(s5, le.Uint32(row[20:]))
		s6 = mix(s6, le.Uint32(row[24:]))
		s7 = mix(s7, le.Uint32(row[28:]))
		mask = ^uint32(0)
		page = page[min(4*len(columnSeeds), len(page)):]
	}
	for range 2 { // two rows of zeros, so that the last row is mixed too
		s0, s1, s2, s3 = mix(s0, 0), mix(s1, 0), mix(s2, 0), mix(s3, 0)
		s4, s5, s6, s7 = mix(s4, 0), mix(s5, 0), mix(s6, 0), mix(s7, 0)
	}
	return s0 ^ s1 ^ s2 ^ s3 ^ s4 ^ s5 ^ s6 ^ s7
}

func mix(sum, value uint32) uint32 {
	const prime = 16777619
	t := sum ^ value
	return t*prime ^ t>>17
}

// columnSeeds are what the sums begin with (checksumBaseOffsets).
var columnSeeds = [32]uint32{
	0x5B1F36E9, 0xB8525960, 0x02AB50AA, 0x1DE66D2A, 0x79FF467A, 0x9BB9F8A3, 0x217E7CD2, 0x83E13D2C,
	0xF8D4474F, 0xE39EB970, 0x42C6AE16, 0x993216FA, 0x7B093B5D, 0x98DAFF3C, 0xF718902A, 0x0B1C9CDB,
	0xE58F764B, 0x187636BC, 0x5D7B3BB1, 0xE73DE7DE, 0x92BEC979, 0xCCA6C0B2, 0x304A0979, 0x85AA43D4,
	0x783125BB, 0x6CA8EAA2, 0xE407EAC6, 0x4B5CFC3E, 0x9FBF8C76, 0x15CA20BE, 0xF2CA9FD3, 0x959BD756,
}
