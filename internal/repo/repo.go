// Package repo is the repository format: which objects there are, what they are
// called, what is in them, and when a backup counts as taken. docs/FORMAT.md
// describes every object; the two change together.
//
// Two rules carry it. Data first, the object that makes it count last: a backup
// exists from the moment its manifest does. And nothing is replaced: every
// object that matters is written with IfAbsent.
package repo

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"time"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// format is the version of every object this code writes, and the newest it reads.
const format = 1

// A Header begins every JSON object in a repository. It says what the object
// is, so that one can never be taken for another.
type Header struct {
	Type     string   `json:"pgkeep"`
	Format   int      `json:"format"`
	Features []string `json:"features,omitempty"` // a reader that does not know one refuses the object
	Writer   string   `json:"writer"`             // version of the pgkeep that wrote it
}

// check refuses what this code cannot read with certainty.
func (h Header) check(want string) error {
	switch {
	case h.Type != want:
		return fmt.Errorf("this is a %q, not a %s: %w", h.Type, want, fail.Corrupt)
	case h.Format < 1:
		return fmt.Errorf("format %d: %w", h.Format, fail.Corrupt)
	case h.Format > format || len(h.Features) > 0:
		return fail.Hint(fmt.Errorf("%s of format %d with features %q, written by pgkeep %s: %w", want, h.Format, h.Features, h.Writer, fail.Unsupported),
			fmt.Sprintf("install pgkeep %s or newer", h.Writer))
	}
	return nil
}

// A Marker is the object PGKEEP at the root: it tells a repository from an
// empty place, and what may be written there.
type Marker struct {
	Header
	ID        string    `json:"id"`         // random, for life
	Encrypted bool      `json:"encrypted"`  // nothing but signed documents is ever written in plain
	CreatedAt time.Time `json:"created_at"` // UTC
}

// Access is what this host may do with a repository, and whom it believes.
type Access struct {
	// Encrypted is what the configuration demands. A repository that says
	// otherwise is refused: nothing leaves the host in plain by accident.
	Encrypted bool
	// Signer signs what this host writes. Nil: the repository is read only.
	Signer *seal.Signer
	// Trusted signers, beside Signer's own key.
	Trusted []seal.PublicKey
	// Metadata opens lists of files and block ids that this cluster's hosts
	// wrote, and nothing else. Needed to write to an encrypted repository.
	Metadata *age.X25519Identity
	// Identities are operators': they open everything. None on a host that
	// only writes.
	Identities []age.Identity
	// Version of this program, written into every object.
	Version string
}

func (a Access) trusts(k seal.PublicKey) bool {
	return a.Signer != nil && k == a.Signer.Public() || slices.Contains(a.Trusted, k)
}

func (a Access) header(kind string) Header {
	return Header{Type: kind, Format: format, Writer: a.Version}
}

// A Repo is an opened repository. Its methods may be called concurrently.
type Repo struct {
	Marker Marker
	st     store.Store
	access Access

	epochs []Epoch // the valid ones, oldest first
	opened func() []age.Identity
}

const markerKey = "PGKEEP"

// Init makes an empty place a repository, or finds that it is one already of
// the wanted kind. It probes first that the store keeps what is asked of one.
// The first epoch of an encrypted repository is written for the recipients.
func Init(ctx context.Context, st store.Store, a Access, recipients []string, now time.Time) (*Repo, bool, error) {
	if a.Signer == nil {
		return nil, false, fmt.Errorf("init: no signing key: %w", fail.BadConfig)
	}
	r, err := Open(ctx, st, a)
	created := false
	if errors.Is(err, errNoRepository) {
		if a.Encrypted {
			if err := checkRecipients(recipients); err != nil { // before anything is written
				return nil, false, err
			}
		}
		if err := store.Probe(ctx, st, "probe/"+randomHex(8)); err != nil {
			return nil, false, err
		}
		m := Marker{Header: a.header("repository"), ID: randomHex(16), Encrypted: a.Encrypted, CreatedAt: now.UTC().Truncate(time.Second)}
		if err := putSigned(ctx, st, a, markerKey, m); err != nil && !errors.Is(err, store.ErrExist) {
			return nil, false, err
		}
		created = true
		r, err = Open(ctx, st, a)
	}
	if err != nil {
		return nil, false, err
	}
	if r.Marker.Encrypted && len(r.epochs) == 0 {
		if _, err := r.NewEpoch(ctx, recipients, now); err != nil {
			return nil, false, err
		}
		r, err = Open(ctx, st, a)
	}
	return r, created, err
}

// errNoRepository: the place can be read, and there is no marker.
var errNoRepository = fail.With(fail.BadConfig, errors.New("no repository here"))

// Open reads the marker and the keys of a repository.
func Open(ctx context.Context, st store.Store, a Access) (*Repo, error) {
	r := &Repo{st: st, access: a}
	var g sync.WaitGroup
	var kerr error
	if a.Encrypted { // the two do not wait for each other
		g.Go(func() { r.epochs, kerr = r.loadEpochs(ctx) })
	}
	err := r.getSigned(ctx, markerKey, "repository", &r.Marker)
	g.Wait()
	switch {
	case errors.Is(err, store.ErrNotExist):
		return nil, fail.Hint(errNoRepository, "pgkeep init makes one; or is the url of the repository mistyped?")
	case err != nil:
		return nil, fmt.Errorf("open repository: %w", err)
	case r.Marker.Encrypted && !a.Encrypted:
		return nil, fail.Hint(fmt.Errorf("the repository is encrypted, the configuration says it is not: %w", fail.BadConfig),
			"set repository.encryption: age")
	case !r.Marker.Encrypted && a.Encrypted:
		return nil, fail.Hint(fmt.Errorf("the repository is not encrypted, the configuration demands it: %w", fail.BadConfig),
			"use a new place and pgkeep init; or, if plain text in the bucket is meant, set repository.encryption: none")
	case kerr != nil:
		return nil, fmt.Errorf("open repository: %w", kerr)
	}
	for _, e := range r.epochs {
		if e.Repository != r.Marker.ID {
			return nil, fmt.Errorf("open repository: epoch %d belongs to repository %s: %w", e.Number, e.Repository, fail.Corrupt)
		}
	}
	r.opened = sync.OnceValue(r.openEpochs)
	return r, nil
}

// getSigned reads a signed document into doc, which embeds a Header.
func (r *Repo) getSigned(ctx context.Context, key, kind string, doc any) error {
	b, err := readAll(ctx, r.st, key, maxDocument)
	if err != nil {
		return err
	}
	return r.parseSigned(key, b, kind, doc)
}

func (r *Repo) parseSigned(key string, b []byte, kind string, doc any) error {
	line, err := seal.Verify(b, r.access.trusts)
	if err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	var h Header
	if err := json.Unmarshal(line, &h); err != nil {
		return fmt.Errorf("%s: %w: %w", key, err, fail.Corrupt)
	}
	if err := h.check(kind); err != nil {
		return fmt.Errorf("%s: %w", key, err)
	}
	if err := json.Unmarshal(line, doc); err != nil {
		return fmt.Errorf("%s: %w: %w", key, err, fail.Corrupt)
	}
	return nil
}

// putSigned signs doc and writes it under key, create-only. It fails with
// store.ErrExist when there is such an object with other content.
func putSigned(ctx context.Context, st store.Store, a Access, key string, doc any) error {
	if a.Signer == nil {
		return fail.Hint(fmt.Errorf("write %s: no signing key: %w", key, fail.BadConfig), "pgkeep key init makes one")
	}
	b, err := a.Signer.Sign(doc)
	if err != nil {
		return fmt.Errorf("sign %s: %w", key, err)
	}
	return putOnce(ctx, st, key, b)
}

// putOnce writes b under key, create-only. Finding the same bytes there is
// success: the answer of an earlier try was lost.
func putOnce(ctx context.Context, st store.Store, key string, b []byte) error {
	err := st.Put(ctx, key, bytes.NewReader(b), store.PutOptions{IfAbsent: true})
	if !errors.Is(err, store.ErrExist) {
		return wrap("write", key, err)
	}
	rc, rerr := st.Get(ctx, key, store.Range{})
	if rerr != nil {
		return wrap("compare", key, rerr)
	}
	defer rc.Close()
	have, rerr := io.ReadAll(io.LimitReader(rc, int64(len(b))+1)) // a longer one is another, not a damaged one
	if rerr != nil {
		return wrap("compare", key, rerr)
	}
	if !bytes.Equal(have, b) {
		return wrap("write", key, err)
	}
	return nil
}

const (
	maxDocument = 16 << 20  // a signed document; they hold counts and names, never lists of files
	maxFooter   = 256 << 20 // of a pack
)

// readAll reads a whole object of at most limit bytes.
func readAll(ctx context.Context, st store.Store, key string, limit int64) ([]byte, error) {
	return readPart(ctx, st, key, store.Range{}, limit)
}

func readPart(ctx context.Context, st store.Store, key string, part store.Range, limit int64) ([]byte, error) {
	rc, err := st.Get(ctx, key, part)
	if err != nil {
		return nil, wrap("read", key, err)
	}
	defer rc.Close()
	b, err := io.ReadAll(io.LimitReader(rc, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("more than %d bytes: %w", limit, fail.Corrupt)
	}
	return b, wrap("read", key, err)
}

func wrap(op, key string, err error) error {
	if err == nil {
		return nil
	}
	return fmt.Errorf("%s %s: %w", op, key, err)
}

func randomHex(n int) string {
	b := make([]byte, n)
	rand.Read(b) // never fails, by its documentation
	return hex.EncodeToString(b)
}
