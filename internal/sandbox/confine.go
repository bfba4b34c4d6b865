package sandbox

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// Confine makes sure that a server on this data stays within the sandbox: no
// link leads out of it, a tablespace that is in place at the source least of
// all. A link in the data directory that is no tablespace's was the source's
// administrator's, to a certificate for instance: one that leads out, or nowhere,
// is removed. Then it gives every file to the server's OS user. Data that would
// not stay is fail.BadConfig.
func (s *Sandbox) Confine() error {
	if err := s.confineMap(); err != nil {
		return fmt.Errorf("confine: %w", err)
	}
	for _, dir := range []string{s.Data(), s.Tablespaces()} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			switch d.Type() {
			case 0, fs.ModeDir:
			case fs.ModeSymlink:
				err := s.confineLink(path)
				if err != nil && dir == s.Data() && filepath.Dir(path) != filepath.Join(dir, "pg_tblspc") {
					return os.Remove(path)
				}
				if err != nil {
					return err
				}
			default:
				return fmt.Errorf("%s is neither file, directory nor link: %w", s.name(path), fail.BadConfig)
			}
			return s.own(path)
		})
		if err != nil {
			return fmt.Errorf("confine: %w", err)
		}
	}
	// PostgreSQL wants it for nobody else.
	return os.Chmod(s.Data(), 0o700)
}

// name is a path as seen from the sandbox.
func (s *Sandbox) name(path string) string {
	rel, err := filepath.Rel(s.dir, path)
	if err != nil {
		return path
	}
	return rel
}

func (s *Sandbox) confineLink(path string) error {
	to, err := filepath.EvalSymlinks(path)
	if errors.Is(err, fs.ErrNotExist) {
		target, _ := os.Readlink(path)
		return fail.With(fail.Corrupt, fmt.Errorf("%s leads to %s, which is missing", s.name(path), target))
	}
	if err != nil {
		return err
	}
	if !s.holds(to) {
		return fail.Hint(fmt.Errorf("%s leads to %s, out of the sandbox: %w", s.name(path), to, fail.BadConfig),
			"restore tablespaces into the sandbox, too")
	}
	return nil
}

func (s *Sandbox) holds(path string) bool {
	return strings.HasPrefix(filepath.Clean(path)+"/", s.dir+"/")
}

// confineMap looks at tablespace_map, from which the server makes its links anew
// when it begins to recover a backup.
func (s *Sandbox) confineMap() error {
	f, err := os.Open(filepath.Join(s.Data(), "tablespace_map"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	in := bufio.NewScanner(f)
	for in.Scan() {
		oid, path, _ := strings.Cut(in.Text(), " ")
		if !filepath.IsAbs(path) { // one in place
			path = filepath.Join(s.Data(), path)
		}
		if !s.holds(path) {
			return fail.Hint(fmt.Errorf("tablespace %s is at %s, out of the sandbox: %w", oid, path, fail.BadConfig),
				"restore tablespaces into the sandbox, too")
		}
		if _, err := os.Stat(path); err != nil {
			return fail.With(fail.Corrupt, fmt.Errorf("tablespace %s is missing: %w", oid, err))
		}
	}
	return in.Err()
}
