// Package seal turns bytes into what is stored and back: it compresses (zstd),
// encrypts (age), identifies blocks, and signs (Ed25519). It does no I/O of its
// own and knows nothing of the repository's layout.
package seal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"filippo.io/age"
	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// A Compressor makes zstd frames. It is for one goroutine at a time.
type Compressor struct{ enc *zstd.Encoder }

// frameSize is the most content of a frame, in bytes. What fits the nearer caches
// of a processor is compressed a fifth faster than twice or four times as much. Of
// PostgreSQL's log it makes no more; of pages that compress 20 to 1, 4 % more.
const frameSize = 64 << 10

// NewCompressor returns a Compressor at zstd's fastest level.
func NewCompressor() (*Compressor, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithLowerEncoderMem(true), zstd.WithWindowSize(frameSize), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, fmt.Errorf("zstd encoder: %w", err)
	}
	return &Compressor{enc}, nil
}

// Append compresses src into frames and appends them to dst: one for each 64 KiB,
// none for nothing.
func (c *Compressor) Append(dst, src []byte) []byte {
	out := dst
	for part := range slices.Chunk(src, frameSize) {
		out = c.enc.EncodeAll(part, out)
	}
	used(c, src, out[len(dst):])
	return out
}

// A Decompressor reads zstd frames. It is for one goroutine at a time.
type Decompressor struct{ dec *zstd.Decoder }

// NewDecompressor returns a Decompressor that refuses frames of more than limit
// bytes of content, so that a hostile one cannot fill the memory.
func NewDecompressor(limit int64) (*Decompressor, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(uint64(max(limit, 1<<10))))
	if err != nil {
		return nil, fmt.Errorf("zstd decoder: %w", err)
	}
	return &Decompressor{dec}, nil
}

// Append decompresses src and appends the content to dst. Damage is fail.Corrupt.
func (d *Decompressor) Append(dst, src []byte) ([]byte, error) {
	out, err := d.dec.DecodeAll(src, dst)
	used(d, src, out[min(len(dst), len(out)):])
	if err != nil {
		return nil, fmt.Errorf("zstd: %w: %w", err, fail.Corrupt)
	}
	return out, nil
}

// Close frees what the Decompressor holds.
func (d *Decompressor) Close() { d.dec.Close() }

// CompressTo returns a writer that compresses a stream of any length into w.
// Closing it completes the stream and leaves w open.
func CompressTo(w io.Writer) (io.WriteCloser, error) {
	return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1))
}

// DecompressFrom returns a reader of the content of a stream. Close frees it.
func DecompressFrom(r io.Reader) (io.ReadCloser, error) {
	dec, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(64<<20), zstd.WithDecoderMaxWindow(64<<20))
	if err != nil {
		return nil, fmt.Errorf("zstd: %w: %w", err, fail.Corrupt)
	}
	return dec.IOReadCloser(), nil
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC is the CRC-32C of b, the checksum of PostgreSQL's backup_manifest.
func CRC(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// A BlockID identifies the content of a block: XXH3-64, seeded with a secret of
// the cluster, and CRC-32C, both little-endian.
type BlockID [12]byte

// Identify returns the identity of a block under a seed.
func Identify(block []byte, seed uint64) (id BlockID) {
	binary.LittleEndian.PutUint64(id[:8], xxh3.HashSeed(block, seed))
	binary.LittleEndian.PutUint32(id[8:], CRC(block))
	return id
}

// CRC returns the CRC-32C part of the identity.
func (id BlockID) CRC() uint32 { return binary.LittleEndian.Uint32(id[8:]) }

// Overhead is an upper bound of what encryption to n recipients adds to a
// section of size bytes: age's header, nonce and a tag for every 64 KiB.
func Overhead(size, n int) int { return 512 + 256*n + (size/(64<<10)+1)*16 }

// EncryptTo returns a writer that encrypts to the recipients into w. Closing it
// completes the stream. Without recipients nothing is encrypted.
func EncryptTo(w io.Writer, recipients ...age.Recipient) (io.WriteCloser, error) {
	if len(recipients) == 0 {
		return nopCloser{w}, nil
	}
	ew, err := age.Encrypt(w, recipients...)
	if err != nil {
		return nil, fmt.Errorf("age: %w", err)
	}
	return ew, nil
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

// Encrypt encrypts a small section to the recipients; without any it returns
// plain itself.
func Encrypt(plain []byte, recipients ...age.Recipient) ([]byte, error) {
	if len(recipients) == 0 {
		return plain, nil
	}
	var out bytes.Buffer
	w, err := EncryptTo(&out, recipients...)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(plain); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

// DecryptFrom returns a reader of what was encrypted. It fails with fail.NoKey
// when none of the identities opens it, and while reading with an error when
// the section was changed or cut.
func DecryptFrom(r io.Reader, identities ...age.Identity) (io.Reader, error) {
	if len(identities) == 0 {
		return nil, fmt.Errorf("encrypted, and no identity at hand: %w", fail.NoKey)
	}
	plain, err := age.Decrypt(r, identities...)
	return plain, decryptError(err)
}

// DecryptAt returns a reader of parts of what was encrypted, in a section of
// size bytes, and the length of the content. Errors are as with DecryptFrom.
func DecryptAt(section io.ReaderAt, size int64, identities ...age.Identity) (io.ReaderAt, int64, error) {
	if len(identities) == 0 {
		return nil, 0, fmt.Errorf("encrypted, and no identity at hand: %w", fail.NoKey)
	}
	plain, n, err := age.DecryptReaderAt(section, size, identities...)
	return plain, n, decryptError(err)
}

// Sealed returns where bytes from:to of a content of n bytes stand, encrypted,
// in a section of size bytes: age encrypts 64 KiB at a time, and says before
// them to whom.
func Sealed(from, to, n, size int64) (first, last int64) {
	const chunk, tag = 64 << 10, 16
	chunks := max(1, (n+chunk-1)/chunk)
	head := size - n - chunks*tag
	return head + from/chunk*(chunk+tag), min(size, head+(to+chunk-1)/chunk*(chunk+tag))
}

// Decrypt decrypts a whole section held in memory.
func Decrypt(sealed []byte, identities ...age.Identity) ([]byte, error) {
	r, err := DecryptFrom(bytes.NewReader(sealed), identities...)
	if err != nil {
		return nil, err
	}
	plain := bytes.NewBuffer(make([]byte, 0, len(sealed)))
	if _, err := plain.ReadFrom(r); err != nil {
		return nil, fmt.Errorf("age: %w: %w", err, fail.Corrupt)
	}
	return plain.Bytes(), nil
}

// decryptError tells a missing key from a damaged section.
func decryptError(err error) error {
	if err == nil {
		return nil
	}
	var none *age.NoIdentityMatchError
	if errors.As(err, &none) {
		return fmt.Errorf("age: no identity at hand opens this: %w", fail.NoKey)
	}
	return fmt.Errorf("age: %w: %w", err, fail.Corrupt)
}
