package seal

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// A Signer makes signatures with a host's Ed25519 key.
type Signer struct{ key ed25519.PrivateKey }

// A PublicKey names a signer. Its text form begins with "pgkeep-signer:".
type PublicKey string

const (
	publicPrefix = "pgkeep-signer:"
	secretPrefix = "PGKEEP-SIGNING-KEY:"
)

// NewSigner makes a new key.
func NewSigner() (*Signer, error) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return &Signer{key}, nil
}

// ParseSigner reads the text of a signing key file: one line, comments with #.
func ParseSigner(text string) (*Signer, error) {
	for line := range strings.Lines(text) {
		if line = strings.TrimSpace(line); line == "" || line[0] == '#' {
			continue
		}
		b64, ok := strings.CutPrefix(line, secretPrefix)
		seed, err := base64.RawStdEncoding.DecodeString(b64)
		if !ok || err != nil || len(seed) != ed25519.SeedSize {
			break // without showing the text: it is a secret
		}
		return &Signer{ed25519.NewKeyFromSeed(seed)}, nil
	}
	return nil, fmt.Errorf("not a pgkeep signing key: %w", fail.BadConfig)
}

// Secret returns the text to keep in the signing key file.
func (s *Signer) Secret() string {
	return secretPrefix + base64.RawStdEncoding.EncodeToString(s.key.Seed())
}

// Public names the signer, for others to pin.
func (s *Signer) Public() PublicKey {
	return PublicKey(publicPrefix + base64.RawStdEncoding.EncodeToString(s.key.Public().(ed25519.PublicKey)))
}

// ParsePublicKey parses the text form.
func ParsePublicKey(s string) (PublicKey, error) {
	if _, err := PublicKey(s).key(); err != nil {
		return "", err
	}
	return PublicKey(s), nil
}

func (k PublicKey) key() (ed25519.PublicKey, error) {
	b64, ok := strings.CutPrefix(string(k), publicPrefix)
	b, err := base64.RawStdEncoding.DecodeString(b64)
	if !ok || err != nil || len(b) != ed25519.PublicKeySize {
		return nil, fmt.Errorf("parse signer %q: want %s and 43 characters: %w", string(k), publicPrefix, fail.BadConfig)
	}
	return b, nil
}

// signature is the second line of a signed document.
type signature struct {
	Signer    PublicKey `json:"signer"`
	Signature []byte    `json:"signature"` // over signedPrefix and the first line, without its newline
}

const signedPrefix = "pgkeep signed document v1\n"

// Sign encodes v as a signed document: two lines of JSON, the value and the
// signature. The value says itself what it is and where it belongs.
func (s *Signer) Sign(v any) ([]byte, error) {
	line, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	sig, err := json.Marshal(signature{s.Public(), ed25519.Sign(s.key, append([]byte(signedPrefix), line...))})
	if err != nil {
		return nil, err
	}
	return append(append(append(line, '\n'), sig...), '\n'), nil
}

// Verify returns the first line of a signed document when its signature is
// good and its signer trusted; otherwise it fails with fail.Corrupt or
// fail.Untrusted, and returns nothing.
func Verify(doc []byte, trusted func(PublicKey) bool) ([]byte, error) {
	line, rest, ok := bytes.Cut(doc, []byte{'\n'})
	var sig signature
	if !ok || json.Unmarshal(rest, &sig) != nil {
		return nil, fmt.Errorf("not a signed document: %w", fail.Corrupt)
	}
	// One signature has one spelling: what was changed without changing the
	// meaning was changed all the same.
	if spelt, err := json.Marshal(sig); err != nil || !bytes.Equal(append(spelt, '\n'), rest) {
		return nil, fmt.Errorf("signature is not as it was written: %w", fail.Corrupt)
	}
	key, err := sig.Signer.key()
	if err != nil {
		return nil, fmt.Errorf("not a signed document: bad signer: %w", fail.Corrupt)
	}
	if !ed25519.Verify(key, append([]byte(signedPrefix), line...), sig.Signature) {
		return nil, fmt.Errorf("signature does not match the content: %w", fail.Corrupt)
	}
	if !trusted(sig.Signer) {
		return nil, fmt.Errorf("signed by %s, which is not trusted here: %w", sig.Signer, fail.Untrusted)
	}
	return line, nil
}
