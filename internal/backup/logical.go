// Package backup takes a logical backup of a cluster, step by step: dump into
// the spool, upload from there, record, publish. Each step may be repeated,
// also while an earlier try of it still runs.
package backup

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/verify"
)

// Logical takes the logical backups of one cluster on its host. All fields but
// the last group are required.
type Logical struct {
	Name    string // of the cluster
	Host    string
	Cluster cluster.Cluster
	Spool   string // the backup <id> has the directory <Spool>/<Name>/<id> while it is being taken
	Open    func(context.Context) (*repo.Repo, error)
	Log     *slog.Logger // what PostgreSQL's programs say

	Databases     []string // to dump; none: all that take connections and are no templates
	Exclude       []string // not to dump
	Jobs          int      // tables dumped at a time; 0: one
	RolePasswords bool     // dump the hashes of roles' passwords, too
	StallAfter    time.Duration
	LockWait      time.Duration
}

// Owner says which workflow takes a backup, for the operator and for whoever
// looks after the spool.
type Owner struct {
	Namespace string `json:"namespace"`
	Workflow  string `json:"workflow"`
	Run       string `json:"run"`
}

// Seen is what Preflight found out.
type Seen struct {
	System    pg.SystemID `json:"system_id"`
	Version   pg.Version  `json:"pg_version"`
	Tools     pg.Version  `json:"tools_version"`
	Databases int         `json:"databases"`
	Bytes     int64       `json:"bytes"` // of the databases on disk
}

// maxSkew is how far the clocks of host and store may be apart, in both
// directions. S3 refuses requests that are 15 minutes off.
const maxSkew = 5 * time.Minute

// Preflight finds out whether a backup can succeed, before anything is dumped,
// and says in the repository that one is meant. Every refusal has a hint.
func (l *Logical) Preflight(ctx context.Context, id repo.ID, started time.Time, by Owner) (Seen, error) {
	r, err := l.Open(ctx)
	if err != nil {
		return Seen{}, err
	}
	facts, err := l.Cluster.Facts(ctx)
	if err != nil {
		return Seen{}, err
	}
	tools, err := l.Cluster.Tools(ctx, facts.Version)
	if err != nil {
		return Seen{}, err
	}
	chosen, err := l.choose(facts.Databases)
	if err != nil {
		return Seen{}, err
	}
	seen := Seen{System: facts.System, Version: facts.Version, Tools: tools.Version, Databases: len(chosen)}
	var names []string
	for _, d := range chosen {
		names = append(names, d.Name)
		seen.Bytes += max(0, d.Bytes)
	}
	if err := l.Cluster.CheckRights(ctx, names, l.RolePasswords); err != nil {
		return Seen{}, err
	}
	if err := l.makeSpool(id, by); err != nil {
		return Seen{}, err
	}
	if err := l.checkSpace(seen.Bytes); err != nil {
		return Seen{}, err
	}
	return seen, announce(ctx, r, repo.Intent{Ref: l.ref(id), Kind: repo.Logical, Host: l.Host, Workflow: by.Workflow, Run: by.Run, StartedAt: started})
}

// announce says in the repository that a backup is meant.
func announce(ctx context.Context, r *repo.Repo, in repo.Intent) error {
	skew, err := r.WriteIntent(ctx, in, time.Now)
	if err == nil && skew.Abs() > maxSkew {
		err = fmt.Errorf("the store's clock is %v ahead of this host's: %w", skew.Round(time.Second), fail.ClockSkew)
	}
	return err
}

func (l *Logical) ref(id repo.ID) repo.Ref { return repo.Ref{Cluster: l.Name, ID: id} }

// choose picks the databases to dump. One that is named and is not there is an
// error: a backup that silently lacks it is none.
func (l *Logical) choose(all []cluster.Database) ([]cluster.Database, error) {
	var chosen []cluster.Database
	for _, d := range all {
		wanted := d.Dumpable()
		if len(l.Databases) > 0 {
			wanted = slices.Contains(l.Databases, d.Name)
		}
		if wanted && !slices.Contains(l.Exclude, d.Name) {
			chosen = append(chosen, d)
		}
	}
	for _, name := range l.Databases {
		if !slices.ContainsFunc(all, func(d cluster.Database) bool { return d.Name == name }) {
			return nil, fail.Hint(fmt.Errorf("cluster %s has no database %q: %w", l.Name, name, fail.BadConfig),
				"correct clusters."+l.Name+".logical.databases, or the --database flag")
		}
	}
	if len(chosen) == 0 {
		return nil, fail.Hint(fmt.Errorf("nothing to dump: %w", fail.BadConfig), "databases and exclude of the cluster leave none")
	}
	return chosen, nil
}

// checkSpace compares the free space of the spool with the size of the
// databases. A dump leaves out indexes and dead rows, and writes values out as
// text: as a rule it is smaller.
func (l *Logical) checkSpace(need int64) error {
	var fs unix.Statfs_t
	if err := unix.Statfs(l.Spool, &fs); err != nil {
		return fmt.Errorf("spool %s: %w", l.Spool, err)
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < need {
		return fail.Hint(fmt.Errorf("spool %s has %d MB free, the databases have %d MB: %w", l.Spool, free>>20, need>>20, fail.NoSpace),
			"put spool on a larger file system, or leave databases out with exclude")
	}
	return nil
}

func (l *Logical) dir(id repo.ID) string { return filepath.Join(l.Spool, l.Name, string(id)) }

// makeSpool makes the directory of a backup and says whose it is.
func (l *Logical) makeSpool(id repo.ID, by Owner) error {
	dir := l.dir(id)
	if err := makeDir(dir); err != nil {
		return err
	}
	return writeJSON(filepath.Join(dir, ownerFile), by)
}

func makeDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fail.Hint(fmt.Errorf("make spool: %w: %w", err, fail.BadConfig), "make the directory, and give it to the user that pgkeep runs as")
	}
	return nil
}

const (
	ownerFile = "owner.json" // Owner
	lockFile  = "lock"       // held by a dump and the programs it runs
	doneFile  = "done.json"  // Details: the dump is complete
	treeDir   = "tree"       // what is uploaded
)

// Details say what a logical backup holds. They are sealed into its manifest,
// and stand in the tree as details.json for people without pgkeep.
type Details struct {
	Tools     pg.Version     `json:"tools_version"` // of pg_dump
	Globals   string         `json:"globals"`       // path of the SQL of roles and tablespaces
	Passwords bool           `json:"role_passwords"`
	Databases []DatabaseDump `json:"databases"`
	Skipped   []string       `json:"skipped,omitempty"` // databases of the cluster that are not in it
}

// A DatabaseDump is one database in a logical backup.
type DatabaseDump struct {
	Name     string             `json:"name"`
	Dir      string             `json:"dir"` // within the tree; what pg_dump --format=directory wrote
	Bytes    int64              `json:"bytes"`
	LSN      cluster.LSNBracket `json:"lsn"`
	Inexact  string             `json:"inexact,omitempty"` // why LSN is a bracket
	Snapshot string             `json:"snapshot"`          // pg_current_snapshot
	TakenAt  time.Time          `json:"taken_at"`
	Like     cluster.Database   `json:"like"` // how to make one like it

	Rows      []cluster.TableRows `json:"rows,omitempty"`      // of the tables in the dump
	Uncounted string              `json:"uncounted,omitempty"` // why there are none
}

// Span returns the smallest bracket that holds those of all databases.
func (d Details) Span() cluster.LSNBracket {
	var span cluster.LSNBracket
	for i, db := range d.Databases {
		if i == 0 {
			span = db.LSN
			continue
		}
		span.Before, span.After = min(span.Before, db.LSN.Before), max(span.After, db.LSN.After)
		span.Exact = false // two positions, one of each database
	}
	return span
}

// Bytes is the size of all dumps.
func (d Details) Bytes() (sum int64) {
	for _, db := range d.Databases {
		sum += db.Bytes
	}
	return sum
}

// Dump writes every chosen database and the roles into the spool. A dump that
// is complete there is returned as it is, however often this is called.
// progress is told how many bytes there are, and is called only when it moves.
func (l *Logical) Dump(ctx context.Context, id repo.ID, progress func(bytes int64)) (Details, error) {
	dir := l.dir(id)
	if d, err := l.dumped(id); !errors.Is(err, fail.SpoolLost) {
		return d, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Details{}, fmt.Errorf("make spool: %w", err)
	}
	lock, err := cluster.TakeLock(ctx, filepath.Join(dir, lockFile))
	if err != nil {
		return Details{}, err
	}
	defer lock.Close()
	if d, err := l.dumped(id); !errors.Is(err, fail.SpoolLost) { // by whoever held the lock
		return d, err
	}
	d, err := l.dump(ctx, filepath.Join(dir, treeDir), lock, progress)
	if err != nil {
		return Details{}, err
	}
	return d, writeJSON(filepath.Join(dir, doneFile), d)
}

func (l *Logical) dump(ctx context.Context, tree string, lock *os.File, progress func(int64)) (Details, error) {
	if err := errors.Join(os.RemoveAll(tree), os.MkdirAll(filepath.Join(tree, "databases"), 0o700)); err != nil {
		return Details{}, fmt.Errorf("clear spool: %w", err)
	}
	facts, err := l.Cluster.Facts(ctx)
	if err != nil {
		return Details{}, err
	}
	tools, err := l.Cluster.Tools(ctx, facts.Version)
	if err != nil {
		return Details{}, err
	}
	chosen, err := l.choose(facts.Databases)
	if err != nil {
		return Details{}, err
	}
	d := Details{Tools: tools.Version, Globals: "globals.sql", Passwords: l.RolePasswords}
	err = l.Cluster.DumpGlobals(ctx, cluster.GlobalsOptions{Tools: tools, File: filepath.Join(tree, d.Globals), RolePasswords: l.RolePasswords,
		Lock: lock, Log: l.Log, StallAfter: l.StallAfter})
	if err != nil {
		return Details{}, err
	}
	left := maxTables
	for _, db := range facts.Databases {
		if !slices.ContainsFunc(chosen, func(c cluster.Database) bool { return c.Name == db.Name }) {
			if db.Dumpable() {
				d.Skipped = append(d.Skipped, db.Name)
			}
			continue
		}
		done := d.Bytes()
		one, err := l.dumpOne(ctx, db, tools, filepath.Join(tree, "databases", fmt.Sprint(len(d.Databases)+1)), lock,
			func(bytes int64) { progress(done + bytes) })
		if err != nil {
			return Details{}, err
		}
		one.Rows = largest(one.Rows, left)
		left -= len(one.Rows)
		d.Databases = append(d.Databases, one)
	}
	return d, writeJSON(filepath.Join(tree, "details.json"), d)
}

// dumpOne dumps a database as one snapshot shows it.
func (l *Logical) dumpOne(ctx context.Context, db cluster.Database, tools cluster.Tools, dir string, lock *os.File, progress func(int64)) (DatabaseDump, error) {
	snap, err := l.Cluster.OpenSnapshot(ctx, db.Name, cluster.SnapshotOptions{})
	if err != nil {
		return DatabaseDump{}, err
	}
	defer snap.Close()
	one := DatabaseDump{Name: db.Name, Dir: "databases/" + filepath.Base(dir), LSN: snap.LSN, Snapshot: snap.Text,
		TakenAt: time.Now().UTC().Truncate(time.Millisecond), Like: db}
	if snap.Inexact != nil {
		one.Inexact = snap.Inexact.Error()
	}
	err = l.Cluster.Dump(ctx, cluster.DumpOptions{Tools: tools, Database: db.Name, Snapshot: snap.ID, Dir: dir, Jobs: l.Jobs,
		Lock: lock, Log: l.Log, LockWait: l.LockWait, StallAfter: l.StallAfter, Progress: progress})
	if err != nil {
		return DatabaseDump{}, err
	}
	if one.Bytes, err = sizeOf(dir); err != nil {
		return DatabaseDump{}, err
	}
	one.Rows, err = cluster.CountDump(ctx, tools, snap, dir, func() { progress(one.Bytes) })
	if err != nil && ctx.Err() == nil { // the dump is as good as before
		one.Uncounted = err.Error()
		l.Log.Warn("rows of a dump were not counted; pgkeep show says why", "cluster", l.Name)
		err = nil
	}
	return one, err
}

func sizeOf(dir string) (sum int64, err error) {
	files, err := repo.ListFiles(os.DirFS(dir))
	for _, f := range files {
		sum += f.Size
	}
	return sum, err
}

// dumped returns what a complete dump holds; fail.SpoolLost when there is none.
func (l *Logical) dumped(id repo.ID) (d Details, err error) {
	b, err := os.ReadFile(filepath.Join(l.dir(id), doneFile))
	if errors.Is(err, os.ErrNotExist) {
		return d, fmt.Errorf("no complete dump in %s: %w", l.dir(id), fail.SpoolLost)
	}
	if err == nil {
		err = json.Unmarshal(b, &d)
	}
	if err != nil {
		return d, fmt.Errorf("read spool: %w", err)
	}
	return d, nil
}

// Upload stores the dump. It sends nothing that an earlier try has stored.
func (l *Logical) Upload(ctx context.Context, id repo.ID, progress func(repo.Progress)) (repo.Content, error) {
	r, err := l.Open(ctx)
	if err != nil {
		return repo.Content{}, err
	}
	d, err := l.dumped(id)
	if err != nil {
		return repo.Content{}, err
	}
	root, err := os.OpenRoot(filepath.Join(l.dir(id), treeDir))
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("%w: %w", err, fail.SpoolLost)
	}
	if err != nil {
		return repo.Content{}, fmt.Errorf("open spool: %w", err)
	}
	defer root.Close()
	files, err := repo.ListFiles(root.FS())
	if err != nil {
		return repo.Content{}, fmt.Errorf("list spool: %w", err)
	}
	if err := d.whole(files); err != nil {
		return repo.Content{}, err
	}
	return r.Write(ctx, repo.Writing{Ref: l.ref(id), Root: root, Progress: progress}, files)
}

// whole compares what is in the spool with what the dump left there. Something
// may have been lost since: to a cleaner of old files, or a crash of the host.
func (d Details) whole(files []repo.File) error {
	sizes := make(map[string]int64) // by directory
	roles := false
	for _, f := range files {
		sizes[path.Dir(f.Path)] += f.Size
		roles = roles || f.Path == d.Globals
	}
	for _, db := range d.Databases {
		if have := sizes[db.Dir]; have != db.Bytes {
			return fmt.Errorf("the dump of database %q had %d bytes, %d are in the spool: %w", db.Name, db.Bytes, have, fail.SpoolLost)
		}
	}
	if !roles {
		return fmt.Errorf("%s is not in the spool: %w", d.Globals, fail.SpoolLost)
	}
	return nil
}

// RecordLSN asks the server again which timeline it is on, and whether the log
// up to the dump has been archived.
func (l *Logical) RecordLSN(ctx context.Context, span cluster.LSNBracket) (repo.LSNs, error) {
	a, err := l.Cluster.WALArchived(ctx, span.After)
	if err != nil {
		return repo.LSNs{}, err
	}
	return repo.LSNs{Timeline: a.Timeline, Before: span.Before, After: span.After, Archived: string(a.State), LastWAL: a.Last}, nil
}

// Verify reads the upload back from the repository and compares everything it
// can open; and pg_restore reads each table of contents.
func (l *Logical) Verify(ctx context.Context, id repo.ID, progress func(repo.Progress)) (repo.Report, error) {
	r, err := l.Open(ctx)
	if err != nil {
		return repo.Report{}, err
	}
	content, err := r.Draft(ctx, l.ref(id))
	if err != nil {
		return repo.Report{}, err
	}
	rep, err := r.Read(ctx, id, content, repo.Reading{Progress: progress})
	if err != nil {
		return rep, err
	}
	if err := rep.Err(); err != nil {
		return rep, err
	}
	d, err := l.dumped(id)
	if err != nil {
		return rep, err
	}
	tools, err := l.tools(ctx)
	if err != nil {
		return rep, err
	}
	if rep.Verified != repo.VerifiedContent { // nothing here opens what is stored: the list in the spool it is
		for _, db := range d.Databases {
			if _, err := cluster.ListTOC(ctx, tools, filepath.Join(l.dir(id), treeDir, db.Dir)); err != nil {
				return rep, err
			}
		}
		return rep, nil
	}
	return rep, verify.TOCs(ctx, r, id, content, tools, l.dir(id))
}

func (l *Logical) tools(ctx context.Context) (cluster.Tools, error) {
	facts, err := l.Cluster.Facts(ctx)
	if err != nil {
		return cluster.Tools{}, err
	}
	return l.Cluster.Tools(ctx, facts.Version)
}

// Published is what Publish needs to know of the steps before.
type Published struct {
	Seen     Seen
	LSN      repo.LSNs
	Verified repo.Verified
	Started  time.Time
	By       Owner
}

// Publish makes the backup exist.
func (l *Logical) Publish(ctx context.Context, id repo.ID, p Published) (repo.Manifest, error) {
	r, err := l.Open(ctx)
	if err != nil {
		return repo.Manifest{}, err
	}
	m, err := r.Backup(ctx, l.ref(id))
	if errors.Is(err, fail.NoBackup) {
		m, err = l.publish(ctx, r, id, p)
	}
	if err != nil {
		return repo.Manifest{}, err
	}
	return m, noteLatest(ctx, r, m, l.Log)
}

// noteLatest points scripts at the backup. That is advice: the backup is there
// all the same.
func noteLatest(ctx context.Context, r *repo.Repo, m repo.Manifest, log *slog.Logger) error {
	err := r.WriteLatest(ctx, m)
	if errors.Is(err, fail.StoreDenied) {
		log.Warn("latest backup not noted for scripts", "id", m.ID, "error", err)
		return nil
	}
	return err
}

func (l *Logical) publish(ctx context.Context, r *repo.Repo, id repo.ID, p Published) (repo.Manifest, error) {
	d, err := l.dumped(id)
	if err != nil {
		return repo.Manifest{}, err
	}
	details, err := r.SealDetails(d)
	if err != nil {
		return repo.Manifest{}, err
	}
	return r.Publish(ctx, repo.Manifest{Ref: l.ref(id), Kind: repo.Logical, Host: l.Host, System: p.Seen.System, Version: p.Seen.Version,
		StartedAt: p.Started, FinishedAt: time.Now().UTC().Truncate(time.Millisecond), LSN: p.LSN, Verified: p.Verified,
		Workflow: p.By.Workflow, Run: p.By.Run, Details: details})
}

// CleanUp removes a backup's directory from the spool, after whatever program
// still worked there has ended.
func (l *Logical) CleanUp(ctx context.Context, id repo.ID) error {
	dir := l.dir(id)
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	lock, err := cluster.TakeLock(ctx, filepath.Join(dir, lockFile))
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("clean spool: %w", err)
	}
	return nil
}

// Spooled lists the backups that have a directory in the spool, and whose they are.
func (l *Logical) Spooled() (map[repo.ID]Owner, error) {
	entries, err := os.ReadDir(filepath.Join(l.Spool, l.Name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list spool: %w", err)
	}
	found := make(map[repo.ID]Owner)
	for _, e := range entries {
		id, err := repo.ParseID(e.Name())
		if err != nil {
			continue // not ours
		}
		var by Owner
		if b, err := os.ReadFile(filepath.Join(l.dir(id), ownerFile)); err == nil {
			json.Unmarshal(b, &by) // unreadable: nobody's
		}
		found[id] = by
	}
	return found, nil
}

func writeJSON(path string, v any) error {
	return durable.WriteFile(path, 0o600, func(w io.Writer) error {
		enc := json.NewEncoder(w)
		enc.SetIndent("", "  ")
		return enc.Encode(v)
	})
}
