// Package open opens what the configuration names: the store, the keys, the
// repository, a cluster. It is the only way from settings to things.
package open

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/notify"
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

// Cluster returns how to reach a cluster.
func Cluster(c config.Cluster) (cluster.Cluster, error) {
	password, err := c.Password()
	return cluster.Cluster{Conninfo: string(c.Conninfo), Password: password.Reveal(), BinDir: string(c.BinDir)}, err
}

// Logical returns who takes the logical backups of a cluster on this host.
func Logical(c *config.Config, name string, st store.Store, a repo.Access, log *slog.Logger) (*backup.Logical, error) {
	settings, err := c.Cluster(name)
	if err != nil {
		return nil, err
	}
	at, err := Cluster(settings)
	if err != nil {
		return nil, err
	}
	s := settings.Logical
	return &backup.Logical{Name: name, Host: string(c.Host), Cluster: at, Spool: string(c.Spool), Log: log,
		Open:      func(ctx context.Context) (*repo.Repo, error) { return repo.Open(ctx, st, a) },
		Databases: s.Databases, Exclude: s.Exclude, Jobs: s.Jobs, RolePasswords: s.RolePasswords,
		StallAfter: s.StallTimeout, LockWait: s.LockWait}, nil
}

// Physical returns who takes the physical backups of a cluster on this host.
func Physical(c *config.Config, name string, st store.Store, a repo.Access, log *slog.Logger) (*backup.Physical, error) {
	settings, err := c.Cluster(name)
	if err != nil {
		return nil, err
	}
	at, err := Cluster(settings)
	if err != nil {
		return nil, err
	}
	s := settings.Physical
	return &backup.Physical{Name: name, Host: string(c.Host), Cluster: at, Spool: string(c.Spool), Log: log,
		Open:    func(ctx context.Context) (*repo.Repo, error) { return repo.Open(ctx, st, a) },
		Readers: s.Readers, SpreadCheckpoint: s.SpreadCheckpoint, WALWait: s.WALWait,
		Pace: backup.Pace{Rate: int64(s.Rate), MaxLag: int64(s.MaxStandbyLag), MaxLatency: s.MaxReadLatency}}, nil
}

// Notifier returns who tells people how runs end; nil if there is nobody to tell.
func Notifier(c config.Notify) (*notify.Notifier, error) {
	webhook, ping, err := c.Addresses()
	if err != nil {
		return nil, fmt.Errorf("notify: %w", err)
	}
	if webhook.Reveal() == "" && ping.Reveal() == "" {
		return nil, nil
	}
	n, err := notify.New(webhook.Reveal(), ping.Reveal(), c.All)
	if err != nil {
		return nil, fmt.Errorf("notify: %w", err)
	}
	return n, nil
}
