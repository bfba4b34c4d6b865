// Package restore brings data back. It needs the repository and a key; not
// Temporal, and nothing that the backup's host had.
package restore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// Logical says which database of a logical backup to restore, and into what.
type Logical struct {
	Repo     *repo.Repo
	Manifest repo.Manifest
	Target   cluster.Cluster // where to restore to

	Database string // in the backup; "": the only one
	To       string // in the target; "": the same name

	// Into lets the target hold something already. Otherwise a database that
	// is not empty is refused, and one that is not there is made.
	Into          bool
	NoOwner       bool // everything belongs to the role that restores
	NoPrivileges  bool // nobody is granted anything
	NoTablespaces bool
	Jobs          int // tables and indexes made at a time; 0: one

	Scratch  string // where the dump is unpacked; "": the system's temporary directory
	Log      *slog.Logger
	Progress func(stage string, done, total int64) // bytes; may be nil, and be called from several goroutines
}

// Stages that Progress tells of.
const (
	Fetching  = "fetch"   // packs from the repository
	Restoring = "restore" // pg_restore
)

// A Plan is what a restore will do. Printing it is the dry run.
type Plan struct {
	Backup   repo.Ref            `json:"backup"`
	Database backup.DatabaseDump `json:"database"`
	To       string              `json:"to"`
	Create   bool                `json:"create"`        // the target is not there yet
	Tools    cluster.Tools       `json:"-"`             // that will restore it
	Tables   int                 `json:"tables"`        // with rows
	Entries  int                 `json:"entries"`       // in the table of contents
	Missing  []string            `json:"missing_roles"` // that it names and the target lacks
}

// Details returns what a logical backup holds.
func Details(r *repo.Repo, m repo.Manifest) (d backup.Details, err error) {
	if m.Kind != repo.Logical {
		return d, fmt.Errorf("backup %s is %s, not logical: %w", m.ID, m.Kind, fail.BadConfig)
	}
	if err := r.OpenDetails(m, &d); err != nil {
		return d, err
	}
	for _, db := range d.Databases { // the signer is trusted; with our files, nobody is
		if !fs.ValidPath(db.Dir) || !fs.ValidPath(d.Globals) {
			return d, fmt.Errorf("details of %s name files outside of the backup: %w", m.ID, fail.Corrupt)
		}
	}
	return d, nil
}

// choose finds the database that is meant.
func choose(d backup.Details, name string) (backup.DatabaseDump, error) {
	var names []string
	for _, db := range d.Databases {
		if db.Name == name || name == "" && len(d.Databases) == 1 {
			return db, nil
		}
		names = append(names, db.Name)
	}
	err := fmt.Errorf("the backup has no database %q: %w", name, fail.BadConfig)
	if name == "" {
		err = fmt.Errorf("the backup holds %d databases, say which: %w", len(names), fail.BadConfig)
	}
	return backup.DatabaseDump{}, fail.Hint(err, "--database one of: "+strings.Join(names, ", "))
}

// Plan finds out whether the restore can be done, and refuses it before
// anything is written: a target that holds something, roles that are missing,
// too little space, programs that are too old. Missing is set also where roles
// that are missing are the reason.
func (l Logical) Plan(ctx context.Context) (p Plan, err error) {
	d, err := Details(l.Repo, l.Manifest)
	if err != nil {
		return p, err
	}
	db, err := choose(d, l.Database)
	if err != nil {
		return p, err
	}
	p = Plan{Backup: l.Manifest.Ref, Database: db, To: l.To}
	if p.To == "" {
		p.To = db.Name
	}
	facts, err := l.Target.Facts(ctx)
	if err != nil {
		return p, err
	}
	if p.Tools, err = l.Target.Tools(ctx, max(facts.Version, d.Tools)); err != nil {
		return p, err
	}
	p.Create = true
	for _, have := range facts.Databases {
		if have.Name == p.To {
			p.Create = false
		}
	}
	if !p.Create && !l.Into {
		empty, err := l.Target.IsEmpty(ctx, p.To)
		if err != nil {
			return p, err
		}
		if !empty {
			return p, fmt.Errorf("database %q is not empty: %w", p.To, fail.NotEmpty)
		}
	}
	err = l.planContents(ctx, &p)
	return p, err
}

// planContents looks into the table of contents of the dump.
func (l Logical) planContents(ctx context.Context, p *Plan) error {
	toc := p.Database.Dir + "/toc.dat"
	return l.unpack(ctx, func(name string) bool { return name == toc }, nil, func(dir string) error {
		opt := l.options(*p, dir)
		list, err := cluster.ListTOC(ctx, p.Tools, opt.Dir)
		if err != nil {
			return err
		}
		p.Tables, p.Entries = list.Tables, list.Entries
		if p.Missing, err = l.Target.MissingRoles(ctx, list, opt); err != nil {
			return err
		}
		if len(p.Missing) > 0 {
			return fail.Hint(fmt.Errorf("the target has no role %s: %w", strings.Join(p.Missing, ", "), fail.BadConfig),
				fmt.Sprintf("make them first (pgkeep restore --globals %s shows the SQL that made them), or restore with --no-owner --no-privileges", p.Backup.ID))
		}
		return nil
	})
}

func (l Logical) options(p Plan, dir string) cluster.RestoreOptions {
	return cluster.RestoreOptions{Tools: p.Tools, Dir: filepath.Join(dir, p.Database.Dir), Database: p.To, Jobs: l.Jobs,
		NoOwner: l.NoOwner, NoPrivileges: l.NoPrivileges, NoTablespaces: l.NoTablespaces, Log: l.Log}
}

// Run carries out a plan: it fetches the dump, every block of it compared, then
// makes the database and fills it. An error after that leaves the database with
// a part; it is never dropped by pgkeep.
func (l Logical) Run(ctx context.Context, p Plan) error {
	if err := l.checkSpace(p.Database.Bytes); err != nil {
		return err
	}
	l.progress(Fetching, 0, 0)
	fetching := func(pr repo.Progress) { l.progress(Fetching, pr.Read, pr.Total) }
	return l.unpack(ctx, func(name string) bool { return strings.HasPrefix(name, p.Database.Dir+"/") }, fetching, func(dir string) error {
		if p.Create {
			like := p.Database.Like
			if l.NoOwner {
				like.Owner = ""
			}
			if err := l.Target.CreateDatabase(ctx, p.To, like); err != nil {
				return err
			}
		}
		l.progress(Restoring, 0, p.Database.Bytes)
		opt := l.options(p, dir)
		opt.Progress = func(bytes int64) { l.progress(Restoring, bytes, p.Database.Bytes) }
		if err := l.Target.Restore(ctx, opt); err != nil {
			return err
		}
		l.progress(Restoring, p.Database.Bytes, p.Database.Bytes)
		return nil
	})
}

func (l Logical) progress(stage string, done, total int64) {
	if l.Progress != nil {
		l.Progress(stage, done, total)
	}
}

func (l Logical) checkSpace(need int64) error {
	dir := l.Scratch
	if dir == "" {
		dir = os.TempDir()
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fmt.Errorf("scratch directory %s: %w", dir, err)
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < need {
		return fmt.Errorf("scratch directory %s has %d MB free, the dump has %d MB: %w", dir, free>>20, need>>20, fail.NoSpace)
	}
	return nil
}

// unpack fetches the chosen files into a directory of its own, lets use have
// it, and removes it.
func (l Logical) unpack(ctx context.Context, want func(string) bool, progress func(repo.Progress), use func(dir string) error) (err error) {
	dir, err := os.MkdirTemp(l.Scratch, "pgkeep-restore-")
	if err != nil {
		return fmt.Errorf("scratch directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fmt.Errorf("scratch directory: %w", err)
	}
	defer root.Close()
	if _, err := l.Repo.Read(ctx, l.Manifest.ID, l.Manifest.Content, repo.Reading{Dir: root, Want: want, Progress: progress}); err != nil {
		return err
	}
	return use(dir)
}

// Globals returns the SQL that made the roles and tablespaces of the cluster.
// It is for reading and for psql; pgkeep runs none of it.
func (l Logical) Globals(ctx context.Context) (sql []byte, err error) {
	d, err := Details(l.Repo, l.Manifest)
	if err != nil {
		return nil, err
	}
	err = l.unpack(ctx, func(name string) bool { return name == d.Globals }, nil, func(dir string) error {
		sql, err = os.ReadFile(path.Join(dir, d.Globals))
		return err
	})
	return sql, err
}
