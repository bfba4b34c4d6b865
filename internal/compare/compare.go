// Package compare sets pgkeep-wal and pgBackRest up beside each other: the same
// PostgreSQL, the same S3 server over TLS, a repository for each. It is for the
// measurements that stand in the documentation.
package compare

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"os/exec"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
)

// Main runs a program of that name: until a signal ends its context, and with
// status 1 if it fails.
func Main(name string, run func(context.Context) error) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
		os.Exit(1)
	}
}

// A Site is a directory whose files belong to PostgreSQL's OS user, and an S3
// server with a bucket.
type Site struct {
	Dir string
	S3  *lab.S3

	cred    *syscall.Credential // nil: we are that user
	program string              // pgkeep-wal as it is shipped
}

// Open makes a site and builds pgkeep-wal for it. Close removes it.
func Open(ctx context.Context) (s *Site, err error) {
	dir, err := os.MkdirTemp("", "pgkeep-compare-")
	if err != nil {
		return nil, err
	}
	s = &Site{Dir: dir, program: filepath.Join(dir, "pgkeep-wal")}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			return s, err
		}
		uid, uerr := strconv.Atoi(u.Uid)
		gid, gerr := strconv.Atoi(u.Gid)
		if err := errors.Join(uerr, gerr); err != nil {
			return s, err
		}
		s.cred = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	if err := s.own(dir); err != nil {
		return s, err
	}
	if _, err := s.Build(ctx, "pgkeep-wal"); err != nil {
		return s, err
	}
	s.S3, err = lab.StartS3(ctx, lab.S3Options{})
	return s, err
}

// Close ends the server and removes all files.
func (s *Site) Close() error {
	err := os.RemoveAll(s.Dir)
	if s.S3 != nil {
		err = errors.Join(err, s.S3.Stop())
	}
	return err
}

// Build makes one of the programs, as it is shipped, and returns its path.
func (s *Site) Build(ctx context.Context, name string) (string, error) {
	path := filepath.Join(s.Dir, name)
	if err := lab.Build(ctx, s.Dir, name); err != nil {
		return "", err
	}
	return path, s.own(path)
}

func (s *Site) own(path string) error {
	if s.cred == nil {
		return nil
	}
	return os.Chown(path, int(s.cred.Uid), int(s.cred.Gid))
}

// Mkdir makes a directory below the site's.
func (s *Site) Mkdir(name string) (string, error) {
	path := filepath.Join(s.Dir, name)
	if err := os.Mkdir(path, 0o700); err != nil {
		return "", err
	}
	return path, s.own(path)
}

// Write makes a file below the site's directory. Only its OS user reads it.
func (s *Site) Write(name, text string) (string, error) {
	path := filepath.Join(s.Dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		return "", err
	}
	return path, s.own(path)
}

// Copy makes a directory below the site's out of another one.
func (s *Site) Copy(ctx context.Context, from, name string) (string, error) {
	path := filepath.Join(s.Dir, name)
	return path, s.Run(ctx, s.Dir, "cp -a "+from+" "+path)
}

// Command prepares a line for a shell, as PostgreSQL runs one: as its OS user, in
// a data directory.
func (s *Site) Command(ctx context.Context, pgdata, line string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "sh", "-c", line)
	cmd.Dir, cmd.Env = pgdata, []string{"PATH=/usr/bin:/bin", "HOME=" + s.Dir, "LC_ALL=C.UTF-8"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	return cmd
}

// Run runs such a line; if it fails, the error holds what it said.
func (s *Site) Run(ctx context.Context, pgdata, line string) error {
	if out, err := s.Command(ctx, pgdata, line).CombinedOutput(); err != nil {
		return fmt.Errorf("%s: %w\n%s", line, err, out)
	}
	return nil
}

// Options describe how a program reaches its repository. The zero value is the
// site's own server and no encryption.
type Options struct {
	// Endpoint and CAFile stand for those of the site's server, if a program is
	// to go another way. The host in it is "localhost".
	Endpoint, CAFile string
	// Encrypted says that what is stored is encrypted: with age, or by pgBackRest
	// with AES-256-CBC.
	Encrypted bool
	// Timeout is how long a call may take, for pgBackRest how long it waits for
	// an answer. 0: a minute, which is the default of both.
	Timeout time.Duration
	// Level is that of pgBackRest's zstd. 0: 1, the least.
	Level int
	// Settings are further lines of pgBackRest's configuration.
	Settings []string
	// Conninfo is how pgkeep reaches the server. "": not at all.
	Conninfo string
	// Temporal is the section of that name in pgkeep's configuration. "": none.
	Temporal string
}

// An Archiver is one of the programs, with a repository of its own.
type Archiver struct {
	Name    string
	Archive string // archive_command
	Restore string // restore_command

	// Root is where the server keeps what it has archived.
	Root string
	// Line runs another command of the program: "pgbackrest --config …".
	Line string
	// Config is the file that says all this.
	Config string
}

// PgKeep makes a repository called name and a configuration for pgkeep-wal.
func (s *Site) PgKeep(ctx context.Context, name string, opt Options) (Archiver, error) {
	fail := func(err error) (Archiver, error) { return Archiver{}, fmt.Errorf("set up pgkeep: %w", err) }
	signer, err := seal.NewSigner()
	if err != nil {
		return fail(err)
	}
	metadata, err := age.GenerateX25519Identity()
	if err != nil {
		return fail(err)
	}
	operator, err := age.GenerateX25519Identity()
	if err != nil {
		return fail(err)
	}
	files := map[string]string{"ca.pem": "", "s3.secret": s.S3.SecretAccessKey, "signing.key": signer.Secret(),
		"metadata.key": metadata.String(), "operator.key": operator.String()}
	if files["ca.pem"], err = s.authority(opt); err != nil {
		return fail(err)
	}
	dir, err := s.Mkdir(name)
	if err != nil {
		return fail(err)
	}
	for file, text := range files {
		if _, err := s.Write(filepath.Join(name, file), text); err != nil {
			return fail(err)
		}
	}
	text := func(endpoint, caFile string) string {
		text := fmt.Sprintf("repository: {url: 's3://%s/%s', endpoint: '%s', ca_file: %s, access_key_id: %s, secret_access_key_file: %s/s3.secret",
			s.S3.Bucket, name, endpoint, caFile, s.S3.AccessKeyID, dir)
		keys := fmt.Sprintf("keys: {signing_key: %[1]s/signing.key, metadata_identity: %[1]s/metadata.key, identity: %[1]s/operator.key}", dir)
		if !opt.Encrypted {
			text += ", encryption: none"
			keys = fmt.Sprintf("keys: {signing_key: %s/signing.key}", dir)
		}
		if opt.Temporal != "" {
			keys += "\ntemporal: " + opt.Temporal
		}
		return fmt.Sprintf("%s}\n%s\nspool: %s/spool\nclusters: {main: {conninfo: \"%s\"}}\n", text, keys, dir, cmp.Or(opt.Conninfo, "host=/nowhere"))
	}
	// The repository is made on the server itself, whatever stands in the way.
	direct, err := s.Write(filepath.Join(name, "direct.yaml"), text(s.S3.Endpoint, s.S3.CAFile))
	if err != nil {
		return fail(err)
	}
	var recipients []string
	if opt.Encrypted {
		recipients = []string{operator.Recipient().String()}
	}
	if err := initialize(ctx, direct, recipients); err != nil {
		return fail(err)
	}
	file, err := s.Write(filepath.Join(name, "pgkeep.yaml"), text(cmp.Or(opt.Endpoint, s.S3.Endpoint), dir+"/ca.pem"))
	if err != nil {
		return fail(err)
	}
	options := " --config " + file
	if opt.Timeout > 0 {
		options += " --timeout " + opt.Timeout.String()
	}
	return Archiver{Name: "pgkeep", Archive: s.program + " push" + options + " %p", Restore: s.program + " fetch" + options + " %f %p",
		Root: filepath.Join(s.S3.Data, name, "clusters/main/wal"), Line: s.program, Config: file}, nil
}

func initialize(ctx context.Context, file string, recipients []string) error {
	cfg, err := config.Load(config.Options{File: file, Hostname: "compare"})
	if err != nil {
		return err
	}
	st, err := open.Store(ctx, cfg.Repository)
	if err != nil {
		return err
	}
	access, err := open.Access(cfg, "compare")
	if err != nil {
		return err
	}
	_, _, err = repo.Init(ctx, st, access, recipients, time.Now())
	return err
}

// PgBackRest makes a repository called name for the cluster in pgdata.
func (s *Site) PgBackRest(ctx context.Context, name, pgdata string, opt Options) (Archiver, error) {
	fail := func(err error) (Archiver, error) { return Archiver{}, fmt.Errorf("set up pgBackRest: %w", err) }
	ca, err := s.authority(opt)
	if err != nil {
		return fail(err)
	}
	dir, err := s.Mkdir(name)
	if err != nil {
		return fail(err)
	}
	if _, err := s.Write(filepath.Join(name, "ca.pem"), ca); err != nil {
		return fail(err)
	}
	u, err := url.Parse(cmp.Or(opt.Endpoint, s.S3.Endpoint))
	if err != nil {
		return fail(err)
	}
	settings := []string{"[global]",
		"repo1-type=s3", "repo1-path=/" + name,
		"repo1-s3-endpoint=localhost", "repo1-storage-port=" + u.Port(), // its check of a certificate knows no addresses
		"repo1-s3-bucket=" + s.S3.Bucket, "repo1-s3-region=" + s.S3.Region, "repo1-s3-uri-style=path",
		"repo1-s3-key=" + s.S3.AccessKeyID, "repo1-s3-key-secret=" + s.S3.SecretAccessKey,
		"repo1-storage-ca-file=" + dir + "/ca.pem", "repo1-retention-full=9",
		"compress-type=zst", fmt.Sprint("compress-level=", cmp.Or(opt.Level, 1)), "start-fast=y",
		"lock-path=" + dir + "/lock", "spool-path=" + dir + "/spool",
		"log-path=" + dir, "log-level-file=off", "log-level-console=warn"}
	if opt.Timeout > 0 {
		settings = append(settings, fmt.Sprintf("io-timeout=%.0f", opt.Timeout.Seconds()))
	}
	if opt.Encrypted {
		settings = append(settings, "repo1-cipher-type=aes-256-cbc", "repo1-cipher-pass="+rand.Text())
	}
	settings = append(append(settings, opt.Settings...), "[main]", "pg1-path="+pgdata, "pg1-socket-path="+filepath.Join(filepath.Dir(pgdata), "run"))
	file, err := s.Write(filepath.Join(name, "pgbackrest.conf"), strings.Join(settings, "\n")+"\n")
	if err != nil {
		return fail(err)
	}
	if _, err := s.Mkdir(filepath.Join(name, "spool")); err != nil {
		return fail(err)
	}
	line := "pgbackrest --config=" + file + " --stanza=main"
	if err := s.Run(ctx, pgdata, line+" --no-online stanza-create"); err != nil {
		return fail(err)
	}
	return Archiver{Name: "pgBackRest", Archive: line + " archive-push %p", Restore: line + " archive-get %f %p",
		Root: filepath.Join(s.S3.Data, name, "archive/main"), Line: line, Config: file}, nil
}

func (s *Site) authority(opt Options) (string, error) {
	b, err := os.ReadFile(cmp.Or(opt.CAFile, s.S3.CAFile))
	return string(b), err
}

// Objects are the files in which the server keeps an archived segment: one, if
// all is well.
func (a Archiver) Objects(segment string) (paths []string, err error) {
	err = filepath.WalkDir(a.Root, func(path string, d os.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.HasPrefix(d.Name(), segment) && !strings.Contains(d.Name(), ".backup") && !strings.Contains(d.Name(), ".partial") {
			paths = append(paths, path)
		}
		return err
	})
	return paths, err
}

// Versions prints what is compared.
func Versions(ctx context.Context, w io.Writer) error {
	for _, line := range []string{"pgbackrest version", "/usr/lib/postgresql/*/bin/postgres --version"} {
		out, err := exec.CommandContext(ctx, "sh", "-c", line).Output()
		if err != nil {
			return fmt.Errorf("%s: %w", line, err)
		}
		fmt.Fprintf(w, "%s", out)
	}
	return nil
}
