package seal_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"testing"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
)

func noise(n int) []byte {
	b := make([]byte, n)
	r := rand.New(rand.NewPCG(1, uint64(n)))
	for i := range b {
		b[i] = byte(r.Uint32() >> (r.Uint32() % 8)) // compressible, a little
	}
	return b
}

func TestCRCOfPartsIsThatOfTheWhole(t *testing.T) {
	whole := noise(100_003)
	clear(whole[40_000:60_001]) // a run of zeros, known only by its length
	for _, cut := range []int{0, 1, 8191, 8192, 39_999, 100_002, 100_003} {
		a, b := whole[:cut], whole[cut:]
		if got := seal.ShiftCRC(seal.CRC(a), int64(len(b))) ^ seal.CRC(b); got != seal.CRC(whole) {
			t.Errorf("cut at %d: %08x, want %08x", cut, got, seal.CRC(whole))
		}
	}
	got := seal.ShiftCRC(seal.CRC(whole[60_001:]), 0) ^ seal.ShiftCRC(seal.CRC(whole[:40_000]), 60_003) ^ seal.ShiftCRC(seal.ZeroCRC(20_001), 40_002)
	if got != seal.CRC(whole) {
		t.Errorf("in another order, with a run of zeros: %08x, want %08x", got, seal.CRC(whole))
	}
}

func TestEncryption(t *testing.T) {
	mine, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	other, _ := age.GenerateX25519Identity()
	plain := noise(200_000)
	sealed, err := seal.Encrypt(plain, mine.Recipient())
	if err != nil {
		t.Fatal(err)
	}
	if max := len(plain) + seal.Overhead(len(plain), 1); len(sealed) > max {
		t.Errorf("%d bytes sealed, Overhead promised %d", len(sealed), max)
	}
	if got, err := seal.Decrypt(sealed, mine); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("round trip: %v", err)
	}
	if _, err := seal.Decrypt(sealed, other); !errors.Is(err, fail.NoKey) {
		t.Errorf("another identity: err = %v, want no-key", err)
	}
	if _, err := seal.Decrypt(sealed); !errors.Is(err, fail.NoKey) {
		t.Errorf("no identity: err = %v, want no-key", err)
	}
	for _, at := range []int{3, len(sealed) / 2, len(sealed) - 1} {
		bad := bytes.Clone(sealed)
		bad[at] ^= 1
		if _, err := seal.Decrypt(bad, mine); err == nil {
			t.Errorf("a bit flipped at %d was not noticed", at)
		}
	}
	if _, err := seal.Decrypt(sealed[:len(sealed)-1], mine); !errors.Is(err, fail.Corrupt) {
		t.Errorf("cut: err = %v, want corrupt", err)
	}
	if got, err := seal.Encrypt(plain); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("without recipients the section is not itself: %v", err)
	}
}

func TestCompression(t *testing.T) {
	c, err := seal.NewCompressor()
	if err != nil {
		t.Fatal(err)
	}
	d, err := seal.NewDecompressor(1 << 20)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	for _, n := range []int{0, 1, 8192, 128 << 10, 1 << 20} {
		plain := noise(n)
		got, err := d.Append(nil, c.Append(nil, plain))
		if err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
	bomb := c.Append(nil, make([]byte, 4<<20))
	if _, err := d.Append(nil, bomb); !errors.Is(err, fail.Corrupt) {
		t.Errorf("a frame over the limit: err = %v, want corrupt", err)
	}
	var stream bytes.Buffer
	w, _ := seal.CompressTo(&stream)
	plain := noise(3 << 20)
	w.Write(plain)
	w.Close()
	r, _ := seal.DecompressFrom(&stream)
	defer r.Close()
	if got, err := io.ReadAll(r); err != nil || !bytes.Equal(got, plain) {
		t.Errorf("stream: %v", err)
	}
}

func TestSignedDocument(t *testing.T) {
	s, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	again, err := seal.ParseSigner("# a comment\n" + s.Secret() + "\n")
	if err != nil || again.Public() != s.Public() {
		t.Fatalf("ParseSigner: %v", err)
	}
	doc, err := s.Sign(map[string]int{"answer": 42})
	if err != nil {
		t.Fatal(err)
	}
	mine := func(k seal.PublicKey) bool { return k == s.Public() }
	if line, err := seal.Verify(doc, mine); err != nil || string(line) != `{"answer":42}` {
		t.Errorf("Verify = %s, %v", line, err)
	}
	if _, err := seal.Verify(doc, func(seal.PublicKey) bool { return false }); !errors.Is(err, fail.Untrusted) {
		t.Errorf("unknown signer: err = %v, want untrusted", err)
	}
	for at := range doc {
		bad := bytes.Clone(doc)
		bad[at] ^= 0x20 // turns the case of letters
		if _, err := seal.Verify(bad, mine); err == nil {
			t.Errorf("flip at %d was not noticed", at)
		}
	}
}

func TestSecretTextIsNotShown(t *testing.T) {
	_, err := seal.ParseSigner("PGKEEP-SIGNING-KEY:hunter2")
	if !errors.Is(err, fail.BadConfig) || bytes.Contains([]byte(err.Error()), []byte("hunter2")) {
		t.Errorf("err = %v", err)
	}
}

func FuzzVerify(f *testing.F) {
	s, _ := seal.NewSigner()
	doc, _ := s.Sign("x")
	f.Add(doc)
	f.Add([]byte("{}\n{}\n"))
	f.Fuzz(func(t *testing.T, doc []byte) {
		if line, err := seal.Verify(doc, func(seal.PublicKey) bool { return true }); err != nil && line != nil {
			t.Error("content with an error")
		}
	})
}

func FuzzParsePublicKey(f *testing.F) {
	s, _ := seal.NewSigner()
	f.Add(string(s.Public()))
	f.Fuzz(func(t *testing.T, text string) {
		if k, err := seal.ParsePublicKey(text); err == nil && string(k) != text {
			t.Errorf("%q became %q", text, k)
		}
	})
}
