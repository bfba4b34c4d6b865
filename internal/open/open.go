// Package open opens what the configuration names: the store, the keys, the
// repository. It is the only way from settings to those. It knows of no cluster:
// what archives starts for every segment, and is the smaller for it.
package open

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/store/dir"
	"github.com/pgkeep/pgkeep/internal/store/s3"
)

// Store opens the place of the repository, without asking it anything.
func Store(ctx context.Context, c config.Repository) (store.Store, error) {
	if err := c.Require(); err != nil {
		return nil, err
	}
	if c.URL.Dir != "" {
		return dir.Open(c.URL.Dir)
	}
	secret, err := c.Secret()
	if err != nil {
		return nil, err
	}
	return s3.Open(ctx, s3.Options{Bucket: c.URL.Bucket, Prefix: c.URL.Prefix, Endpoint: string(c.Endpoint), Region: c.Region,
		PathStyle: c.UsePathStyle(), CAFile: string(c.CAFile), AccessKeyID: c.AccessKeyID, SecretAccessKey: secret.Reveal()})
}

// Access reads the keys that the configuration names. A file that is named and
// not there is an error, except for what writing alone needs: pgkeep key init
// makes those.
func Access(c *config.Config, version string) (a repo.Access, err error) {
	a = repo.Access{Encrypted: c.Repository.Encryption != config.EncryptionNone, Version: version}
	if text, err := secretFile(c.Keys.SigningKey); err == nil {
		if a.Signer, err = seal.ParseSigner(text); err != nil {
			return a, fmt.Errorf("keys.signing_key: %s: %w", c.Keys.SigningKey, err)
		}
	} else if !errors.Is(err, os.ErrNotExist) {
		return a, fmt.Errorf("keys.signing_key: %w", err)
	}
	if text, err := secretFile(c.Keys.MetadataIdentity); err == nil {
		ids, err := identities(text)
		id, ok := first(ids).(*age.X25519Identity)
		if err != nil || !ok {
			return a, fmt.Errorf("keys.metadata_identity: %s holds no AGE-SECRET-KEY-1: %w", c.Keys.MetadataIdentity, fail.BadConfig)
		}
		a.Metadata = id
	} else if !errors.Is(err, os.ErrNotExist) {
		return a, fmt.Errorf("keys.metadata_identity: %w", err)
	}
	if c.Keys.Identity != "" {
		text, err := secretFile(c.Keys.Identity)
		if errors.Is(err, os.ErrNotExist) {
			return a, fail.Hint(fmt.Errorf("keys.identity: %w: %w", err, fail.BadConfig), "on a host that only takes backups, leave keys.identity out")
		}
		if err == nil {
			a.Identities, err = identities(text)
		}
		if err != nil {
			return a, fmt.Errorf("keys.identity: %s: %w", c.Keys.Identity, err)
		}
	}
	for _, text := range c.Keys.TrustedSigners {
		k, err := seal.ParsePublicKey(text)
		if err != nil {
			return a, fmt.Errorf("keys.trusted_signers: %w", err)
		}
		a.Trusted = append(a.Trusted, k)
	}
	return a, nil
}

// secretFile reads a file with a key; os.ErrNotExist when none is named.
func secretFile(path config.Path) (string, error) {
	if path == "" {
		return "", os.ErrNotExist
	}
	secret, err := config.ReadSecret(string(path))
	return secret.Reveal(), err
}

func identities(text string) ([]age.Identity, error) {
	ids, err := age.ParseIdentities(strings.NewReader(text))
	if err != nil { // its text may quote the file
		return nil, fmt.Errorf("not a file of age identities: %w", fail.BadConfig)
	}
	return ids, nil
}

func first(ids []age.Identity) age.Identity {
	if len(ids) == 0 {
		return nil
	}
	return ids[0]
}

// Repository opens the repository with the keys of this host.
func Repository(ctx context.Context, c *config.Config, version string) (*repo.Repo, error) {
	st, err := Store(ctx, c.Repository)
	if err != nil {
		return nil, err
	}
	a, err := Access(c, version)
	if err != nil {
		return nil, err
	}
	return repo.Open(ctx, st, a)
}
