package lab

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// newCluster makes p's data directory as initdb does with these arguments. Of each
// version and arguments initdb makes one; all others are copies of that, and each
// has a system identifier of its own, as after initdb.
func (p *Postgres) newCluster(ctx context.Context, args []string) error {
	template, err := p.template(ctx, args)
	if err != nil {
		return err
	}
	if err := os.Remove(p.DataDir); err != nil && !errors.Is(err, fs.ErrNotExist) { // initdb takes an empty one too
		return err
	}
	if out, err := exec.CommandContext(ctx, "cp", "-aT", "--reflink=auto", template, p.DataDir).CombinedOutput(); err != nil {
		return fmt.Errorf("copy %s: %w: %s", template, err, bytes.TrimSpace(out))
	}
	return giveIdentity(p.DataDir)
}

// template is a data directory fresh from initdb that nothing changes. The first
// caller makes it, and the cache keeps it while it is used.
func (p *Postgres) template(ctx context.Context, args []string) (dir string, err error) {
	cache, err := serverCache()
	if err != nil {
		return "", err
	}
	version, err := p.Command(ctx, "postgres", "--version").Output()
	if err != nil {
		return "", fmt.Errorf("postgres --version: %w", err)
	}
	key := sha256.Sum256(fmt.Appendf(nil, "%q %q %q", version, p.BinDir, args))
	dir = filepath.Join(cache, fmt.Sprintf("cluster-%x", key[:8]))
	now := time.Now()
	if os.Chtimes(dir, now, now) == nil { // it was renamed to this when all was there
		return dir, nil
	}
	unlock, err := lockFile(ctx, dir+".lock")
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}
	work := dir + ".new"
	if err := errors.Join(os.RemoveAll(work), os.Mkdir(work, 0o700), p.own(work)); err != nil { // a killed test leaves one
		return "", err
	}
	defer os.RemoveAll(work)
	data := filepath.Join(work, "data")
	if out, err := p.Command(ctx, "initdb", append(args, "--pgdata="+data)...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("initdb in %s: %w: %s", data, err, bytes.TrimSpace(out))
	}
	if err := errors.Join(os.Rename(data, dir), os.Chtimes(dir, now, now)); err != nil {
		return "", err
	}
	return dir, prune(cache, "cluster-*", now.AddDate(0, 0, -7))
}

// giveIdentity gives the stopped cluster in dir a new system identifier, made of
// the time as initdb does. It stands in pg_control and in the first page of each
// WAL file.
func giveIdentity(dir string) error {
	var random [4]byte
	rand.Read(random[:])
	id := uint64(time.Now().Unix())<<32 | uint64(binary.LittleEndian.Uint32(random[:]))

	err := edit(filepath.Join(dir, "global", "pg_control"), pg.ControlSize, func(b []byte) error {
		c, err := pg.ParseControl(b)
		if err != nil {
			return err
		}
		crc := 288
		if c.Version >= 1800 {
			crc = 292
		}
		binary.LittleEndian.PutUint64(b, id)
		binary.LittleEndian.PutUint32(b[crc:], crc32.Checksum(b[:crc], crc32.MakeTable(crc32.Castagnoli)))
		_, err = pg.ParseControl(b)
		return err
	})
	if err != nil {
		return err
	}
	segments, err := filepath.Glob(filepath.Join(dir, "pg_wal", "0000*"))
	if err != nil || len(segments) == 0 {
		return errors.Join(fmt.Errorf("%s: no WAL file", dir), err)
	}
	for _, path := range segments {
		err := edit(path, pg.PageHeaderSize, func(b []byte) error {
			if _, err := pg.ParsePageHeader(b); err != nil {
				return err
			}
			binary.LittleEndian.PutUint64(b[24:], id)
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// edit changes the first n bytes of a file.
func edit(path string, n int, change func([]byte) error) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, 0); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if err := change(b); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	_, err = f.WriteAt(b, 0)
	return err
}

// scram is what PostgreSQL keeps of a password (RFC 5803), which must be of ASCII
// characters. A server that is told this never sees the password itself.
func scram(password string) (string, error) {
	const iterations = 4096
	salt := make([]byte, 16)
	rand.Read(salt)
	salted, err := pbkdf2.Key(sha256.New, password, salt, iterations, sha256.Size)
	if err != nil {
		return "", err
	}
	sign := func(text string) []byte {
		h := hmac.New(sha256.New, salted)
		h.Write([]byte(text))
		return h.Sum(nil)
	}
	stored := sha256.Sum256(sign("Client Key"))
	text := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", iterations, text(salt), text(stored[:]), text(sign("Server Key"))), nil
}
