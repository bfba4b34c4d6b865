package seal

import "sync"

// ShiftCRC returns what the CRC-32C a contributes to that of a message in
// which n bytes follow: the CRC of the whole is the exclusive or of the shifted
// CRCs of its parts, in any order. So the checksum of a file is known from
// those of its blocks, whichever way they come in, and also when a block was
// not read again.
//
// Appending zero bits to a message is a linear map of its CRC register; the map
// for 2^k bytes is squared out of that for 2^(k-1).
func ShiftCRC(a uint32, n int64) uint32 {
	for k, m := 0, shifts(); n > 0; k, n = k+1, n>>1 {
		if n&1 != 0 {
			a = m[k].times(a)
		}
	}
	return a
}

// ZeroCRC returns the CRC-32C of n zero bytes.
func ZeroCRC(n int64) (sum uint32) {
	if n <= 0 {
		return 0
	}
	one, done := CRC([]byte{0}), int64(0) // one is the CRC of 2^k zero bytes
	for k := int64(1); ; k <<= 1 {
		if n&k != 0 {
			sum = ShiftCRC(sum, k) ^ one
			done |= k
		}
		if done == n {
			return sum
		}
		one = ShiftCRC(one, k) ^ one
	}
}

// shifts holds, at k, the map for 2^k zero bytes. It never changes.
var shifts = sync.OnceValue(func() *[63]gf2 {
	var m [63]gf2
	var bit gf2
	bit[0] = 0x82f63b78 // the CRC-32C polynomial, bit-reversed: one zero bit
	for i := 1; i < 32; i++ {
		bit[i] = 1 << (i - 1)
	}
	m[0] = *bit.square().square().square() // eight bits
	for k := 1; k < len(m); k++ {
		m[k] = *m[k-1].square()
	}
	return &m
})

// A gf2 is a 32×32 matrix over GF(2), a column each.
type gf2 [32]uint32

func (m *gf2) times(v uint32) (sum uint32) {
	for i := 0; v != 0; i, v = i+1, v>>1 {
		if v&1 != 0 {
			sum ^= m[i]
		}
	}
	return sum
}

func (m *gf2) square() *gf2 {
	sq := new(gf2)
	for i := range m {
		sq[i] = m.times(m[i])
	}
	return sq
}
