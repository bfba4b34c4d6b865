package repo

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// An Epoch is one key of an encrypted repository and who may open it. Data is
// encrypted to the recipient of the newest epoch; its private identity stands
// in the epoch's own object, wrapped for each operator. A database host needs
// no private key to write.
//
// An epoch object is never changed: adding a recipient writes the next version.
type Epoch struct {
	Header
	Repository string    `json:"repository"` // Marker.ID
	Number     int       `json:"epoch"`      // from 1
	Version    int       `json:"version"`    // from 1; the highest counts
	CreatedAt  time.Time `json:"created_at"` // UTC
	Recipient  string    `json:"recipient"`  // age1…: data of this epoch is encrypted to it
	Wraps      []Wrap    `json:"wraps"`
	Canary     []byte    `json:"canary"` // the text "pgkeep canary <repository>", encrypted to Recipient
}

// A Wrap is the epoch's private identity, encrypted to one operator.
type Wrap struct {
	Recipient string `json:"recipient"`
	Identity  []byte `json:"identity"` // an age file that holds AGE-SECRET-KEY-1…
}

func epochKey(number, version int) string {
	return fmt.Sprintf("keys/%04d.%04d.json", number, version)
}

// canary is what proves that an identity opens data of an epoch.
func (r *Repo) canary() []byte { return []byte("pgkeep canary " + r.Marker.ID) }

// Epochs returns the keys of the repository, oldest first; none where it is
// not encrypted.
func (r *Repo) Epochs() []Epoch { return r.epochs }

// loadEpochs reads the newest version of every epoch. One that is not signed
// by a trusted key fails the whole: encrypting to a planted recipient would
// give the data away.
func (r *Repo) loadEpochs(ctx context.Context) ([]Epoch, error) {
	var epochs []Epoch
	for o, err := range r.st.List(ctx, "keys/", "") {
		if err != nil {
			return nil, wrap("list", "keys/", err)
		}
		var number, version int
		if _, err := fmt.Sscanf(path.Base(o.Key), "%d.%d.json", &number, &version); err != nil || o.Key != epochKey(number, version) {
			continue // not ours
		}
		var e Epoch
		if err := r.getSigned(ctx, o.Key, "epoch", &e); err != nil {
			return nil, err
		}
		if e.Number != number || e.Version != version {
			return nil, fmt.Errorf("%s: belongs to epoch %d.%d: %w", o.Key, e.Number, e.Version, fail.Corrupt)
		}
		if n := len(epochs); n > 0 && epochs[n-1].Number == number {
			epochs = epochs[:n-1] // keys are listed in order: this version is newer
		}
		epochs = append(epochs, e)
	}
	return epochs, nil
}

// NewEpoch makes a new key for what is written from now on, for these
// recipients. What older epochs hold stays readable by their own.
func (r *Repo) NewEpoch(ctx context.Context, recipients []string, now time.Time) (Epoch, error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return Epoch{}, err
	}
	return r.writeEpoch(ctx, id, len(r.epochs)+1, 1, recipients, now)
}

// AddRecipients lets more operators open every epoch. It needs an identity that
// opens them now. It returns how many epochs were written anew; one whose
// recipients are all there already is left alone.
func (r *Repo) AddRecipients(ctx context.Context, recipients []string, now time.Time) (int, error) {
	written := 0
	for _, e := range r.epochs {
		all := e.recipients()
		for _, rec := range recipients {
			if !slices.Contains(all, rec) {
				all = append(all, rec)
			}
		}
		if len(all) == len(e.Wraps) {
			continue
		}
		id, err := e.open(r.access.Identities)
		if err != nil {
			return written, fmt.Errorf("epoch %d: %w", e.Number, err)
		}
		if _, err := r.writeEpoch(ctx, id, e.Number, e.Version+1, all, now); err != nil {
			return written, err
		}
		written++
	}
	return written, nil
}

func (r *Repo) writeEpoch(ctx context.Context, id *age.X25519Identity, number, version int, recipients []string, now time.Time) (Epoch, error) {
	if err := checkRecipients(recipients); err != nil {
		return Epoch{}, err
	}
	e := Epoch{Header: r.access.header("epoch"), Repository: r.Marker.ID, Number: number, Version: version,
		CreatedAt: now.UTC().Truncate(time.Second), Recipient: id.Recipient().String()}
	var err error
	if e.Canary, err = seal.Encrypt(r.canary(), id.Recipient()); err != nil {
		return Epoch{}, err
	}
	for _, text := range recipients {
		to, err := ParseRecipient(text)
		if err != nil {
			return Epoch{}, err
		}
		blob, err := seal.Encrypt([]byte(id.String()+"\n"), to)
		if err != nil {
			return Epoch{}, err
		}
		e.Wraps = append(e.Wraps, Wrap{Recipient: text, Identity: blob})
	}
	key := epochKey(number, version)
	err = putSigned(ctx, r.st, r.access, key, e)
	if errors.Is(err, store.ErrExist) {
		return Epoch{}, fmt.Errorf("%s was written by somebody else just now: %w", key, fail.AlreadyRunning)
	}
	return e, err
}

// checkRecipients refuses a list that would lock everybody out, now or later.
func checkRecipients(recipients []string) error {
	if len(recipients) == 0 {
		return fail.Hint(fmt.Errorf("no recipients: nobody could ever open the backups: %w", fail.BadConfig),
			"put age recipients under keys.recipients, at least two of them, one kept offline; or pgkeep init --new-identity operator.key makes an identity")
	}
	for _, text := range recipients {
		if _, err := ParseRecipient(text); err != nil {
			return err
		}
	}
	return nil
}

// ParseRecipient parses an age recipient, classic (age1…) or hybrid (age1pq1…).
func ParseRecipient(text string) (age.Recipient, error) {
	rs, err := age.ParseRecipients(strings.NewReader(text))
	if err != nil || len(rs) != 1 {
		return nil, fmt.Errorf("recipient %q is not an age recipient (age1…): %w", text, fail.BadConfig)
	}
	return rs[0], nil
}

func (e Epoch) recipients() []string {
	var all []string
	for _, w := range e.Wraps {
		all = append(all, w.Recipient)
	}
	return all
}

// open unwraps the private identity of the epoch.
func (e Epoch) open(identities []age.Identity) (*age.X25519Identity, error) {
	for _, w := range e.Wraps {
		text, err := seal.Decrypt(w.Identity, identities...)
		if errors.Is(err, fail.NoKey) {
			continue
		}
		if err != nil {
			return nil, err
		}
		id, err := age.ParseX25519Identity(strings.TrimSpace(string(text)))
		if err != nil || id.Recipient().String() != e.Recipient {
			return nil, fmt.Errorf("the wrapped identity is not that of %s: %w", e.Recipient, fail.Corrupt)
		}
		return id, nil
	}
	return nil, fmt.Errorf("no identity at hand is among its recipients: %w", fail.NoKey)
}

// A KeyCheck tells what the keys at hand can do with one epoch.
type KeyCheck struct {
	Epoch      int      `json:"epoch"`
	Recipients []string `json:"recipients"`
	Opens      bool     `json:"opens"`            // an identity at hand opened it, and with it the canary
	Reason     string   `json:"reason,omitempty"` // why not
}

// CheckKeys tries, for each epoch, to open what was encrypted to it.
func (r *Repo) CheckKeys() []KeyCheck {
	var checks []KeyCheck
	for _, e := range r.epochs {
		c := KeyCheck{Epoch: e.Number, Recipients: e.recipients()}
		if err := r.tryCanary(e); err != nil {
			c.Reason = err.Error()
		} else {
			c.Opens = true
		}
		checks = append(checks, c)
	}
	return checks
}

func (r *Repo) tryCanary(e Epoch) error {
	id, err := e.open(r.access.Identities)
	if err != nil {
		return err
	}
	text, err := seal.Decrypt(e.Canary, id)
	if err != nil {
		return err
	}
	if string(text) != string(r.canary()) {
		return fmt.Errorf("the canary says something else: %w", fail.Corrupt)
	}
	return nil
}

// openEpochs returns the identities that open data here: one for each epoch
// that an operator's identity at hand unwraps.
func (r *Repo) openEpochs() (ids []age.Identity) {
	for _, e := range r.epochs {
		if id, err := e.open(r.access.Identities); err == nil {
			ids = append(ids, id)
		}
	}
	return ids
}

// OpensData reports whether this host can read the content of backups that are
// written now, not only their lists of files.
func (r *Repo) OpensData() bool {
	if !r.Marker.Encrypted {
		return true
	}
	if len(r.epochs) == 0 {
		return false
	}
	_, err := r.epochs[len(r.epochs)-1].open(r.access.Identities)
	return err == nil
}

// data returns whom content is encrypted to; nobody where the repository is plain.
func (r *Repo) data() ([]age.Recipient, error) {
	if !r.Marker.Encrypted {
		return nil, nil
	}
	if len(r.epochs) == 0 {
		return nil, fail.Hint(fmt.Errorf("encrypted repository without a key: %w", fail.NoKey), "pgkeep key init writes the first one")
	}
	to, err := age.ParseX25519Recipient(r.epochs[len(r.epochs)-1].Recipient)
	if err != nil {
		return nil, fmt.Errorf("epoch %d: %w: %w", len(r.epochs), err, fail.Corrupt)
	}
	return []age.Recipient{to}, nil
}

// metadata returns whom lists of files and block ids are encrypted to: those
// who open the data, and the hosts of this cluster.
func (r *Repo) metadata() ([]age.Recipient, error) {
	to, err := r.data()
	if err != nil || len(to) == 0 {
		return to, err
	}
	if r.access.Metadata == nil {
		return nil, fail.Hint(fmt.Errorf("writing needs the metadata identity: %w", fail.NoKey), "name its file under keys.metadata_identity; pgkeep key init makes one")
	}
	return append(to, r.access.Metadata.Recipient()), nil
}

// openMetadata decrypts a metadata section.
func (r *Repo) openMetadata(sealed []byte) ([]byte, error) {
	if !r.Marker.Encrypted {
		return sealed, nil
	}
	return seal.Decrypt(sealed, r.metadataIdentities()...)
}

func (r *Repo) metadataIdentities() []age.Identity {
	if r.access.Metadata == nil {
		return r.opened()
	}
	return append([]age.Identity{r.access.Metadata}, r.opened()...)
}
