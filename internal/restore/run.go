package restore

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"hash/maphash"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pgdata"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// Run carries out a plan. From its first write to its end there is no pg_control
// in the directory, so no server starts on it, and a marker says which restore
// it was: the same one again goes on with what is there. When it returns nil,
// everything is compared with its digest, and on disk.
func (p Physical) Run(ctx context.Context, plan PhysicalPlan) (rep repo.Report, err error) {
	if err := p.check(); err != nil {
		return rep, err
	}
	if err := p.allow(plan); err != nil {
		return rep, err
	}
	r := run{Physical: p, plan: plan}
	defer func() { r.layout.close() }()
	if err := r.take(); err != nil {
		return rep, err
	}
	if err := r.begin(); err != nil {
		return rep, fmt.Errorf("restore into %s: %w", p.Dir, err)
	}
	if rep, err = r.files(ctx); err != nil {
		return rep, err // it names what
	}
	if err := r.end(ctx); err != nil {
		return rep, fmt.Errorf("restore into %s: %w", p.Dir, err)
	}
	return rep, nil
}

type run struct {
	Physical
	plan   PhysicalPlan
	layout layout
	marker []byte // as it stands in the directory
}

// take opens the data directory and locks it: two restores at a time would
// remove each other's files. The lock goes with us, whatever becomes of us.
func (r *run) take() (err error) {
	if err := r.unchanged(); err != nil {
		return err
	}
	if r.layout.data, err = r.layout.open(r.Dir); err != nil {
		return fmt.Errorf("restore: %w", err)
	}
	switch err := unix.Flock(int(r.layout.held[0].Fd()), unix.LOCK_EX|unix.LOCK_NB); {
	case errors.Is(err, unix.EWOULDBLOCK):
		return fail.Hint(fmt.Errorf("restore: another one into %s goes on: %w", r.Dir, fail.AlreadyRunning), "wait for it, or stop it")
	case err != nil:
		return fmt.Errorf("restore: lock %s: %w", r.Dir, err)
	}
	return r.unchanged()
}

// unchanged finds out whether the directory still is as it was for the plan.
func (r *run) unchanged() error {
	now := r.plan
	if err := r.planDir(&now); err != nil {
		return err
	}
	if now.State != r.plan.State {
		return fmt.Errorf("restore: %s has changed since the plan was made, from %s to %s: %w", r.Dir, r.plan.State, now.State, fail.NotEmpty)
	}
	return nil
}

// still finds out whether the directory is where it was, and nobody who
// does not know the lock, on another host perhaps, has made it something else.
func (r *run) still() error {
	changed := func(what string, err error) error {
		return errors.Join(fmt.Errorf("it was changed meanwhile: %s: %w", what, fail.NotEmpty), err)
	}
	here, err := os.Stat(r.Dir)
	if err != nil {
		return changed("it is not there", err)
	}
	if held, err := r.layout.held[0].Stat(); err != nil || !os.SameFile(held, here) {
		return changed("it is another directory now", err)
	}
	if text, err := r.layout.data.ReadFile(markerFile); err != nil || !bytes.Equal(text, r.marker) {
		return changed(markerFile+" is not what it was", err)
	}
	if _, err := r.layout.data.Lstat(controlFile); !errors.Is(err, fs.ErrNotExist) {
		return changed("there is a "+controlFile, err)
	}
	return nil
}

// Begun reports whether Dir holds a restore that did not end.
func (p Physical) Begun() bool {
	_, err := readMarker(p.Dir)
	return err == nil
}

// Done reports whether p.Job has finished this restore already. What has become
// of the directory since is not looked at.
func (p Physical) Done() (bool, error) {
	if p.Job == "" {
		return false, nil
	}
	have, err := os.ReadFile(filepath.Join(p.Dir, doneFile))
	if err == nil && string(have) == p.Job {
		_, err = os.Lstat(filepath.Join(p.Dir, controlFile)) // it comes last
		return err == nil, ignoreMissing(err)
	}
	return false, ignoreMissing(err)
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// begin makes the directories, and the state in which nobody can take them for
// a data directory.
func (r *run) begin() (err error) {
	r.layout.spaces = make(map[string]*os.Root)
	m := marker{Ref: r.plan.Backup, System: r.plan.resolved.Backup.System, Tablespaces: make(map[string]string), State: r.plan.State, Run: rand.Text()}
	for _, t := range r.plan.Tablespaces {
		m.Tablespaces[t.OID] = t.To
	}
	withConfig := r.ConfigDir != "" && len(r.plan.Config) > 0
	if withConfig {
		m.ConfigDir = r.ConfigDir
	}
	if r.marker, err = json.Marshal(m); err != nil {
		return err
	}
	if err := put(r.layout.data, markerFile, r.marker); err != nil {
		return err
	}
	for _, name := range []string{controlFile, "postmaster.pid"} {
		if err := r.layout.data.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if _, err := r.layout.data.Stat("global"); err == nil {
		if err := durable.SyncDir(r.layout.data, "global"); err != nil {
			return err
		}
	}
	for _, t := range r.plan.Tablespaces {
		if r.layout.spaces[t.OID], err = r.layout.open(t.To); err != nil {
			return err
		}
	}
	if withConfig {
		r.layout.config, err = r.layout.open(r.ConfigDir)
	}
	return err
}

// files brings the files, each block of them compared.
func (r *run) files(ctx context.Context) (repo.Report, error) {
	m := r.plan.resolved.Backup
	if r.plan.State != New {
		if err := r.prune(ctx); err != nil {
			return repo.Report{}, fmt.Errorf("restore into %s: remove what is not in the backup: %w", r.Dir, err)
		}
	}
	return r.Repo.Read(ctx, m.ID, m.Content, repo.Reading{
		Place: r.layout.place, Keep: r.plan.State != New, Readers: r.Readers,
		Progress: func(pr repo.Progress) {
			if r.Progress != nil {
				r.Progress(Fetching, pr.Read, pr.Total)
			}
		},
	})
}

// prune removes, inside the directories of the restore only, what the backup does
// not hold, or holds as something else. No link is followed.
func (r *run) prune(ctx context.Context) error {
	const file, dir, link = 1, 2, 3
	seed := maphash.MakeSeed() // a set of numbers: there may be millions of files
	held := make(map[uint64]uint8)
	m := r.plan.resolved.Backup
	err := entries(ctx, r.Repo, m, func(e repo.Entry) error {
		kind := uint8(file)
		if e.Dir {
			kind = dir
		} else if e.Link != "" {
			kind = link
		}
		held[maphash.String(seed, e.Path)] = kind
		for p := path.Dir(e.Path); p != "." && held[maphash.String(seed, p)] == 0; p = path.Dir(p) {
			held[maphash.String(seed, p)] = dir
		}
		return nil
	})
	if err != nil {
		return err
	}
	sweep := func(root *os.Root, tree, below string) error {
		return fs.WalkDir(root.FS(), below, func(name string, d fs.DirEntry, err error) error {
			if err != nil || name == "." || name == markerFile && tree == dataRoot {
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			want := held[maphash.String(seed, tree+"/"+name)]
			switch {
			case d.IsDir() && want == dir, d.Type().IsRegular() && want == file:
				return nil
			case d.IsDir():
				if err := root.RemoveAll(name); err != nil {
					return err
				}
				return fs.SkipDir
			}
			return root.Remove(name)
		})
	}
	if err := sweep(r.layout.data, dataRoot, "."); err != nil {
		return err
	}
	for oid, root := range r.layout.spaces {
		entries, err := fs.ReadDir(root.FS(), ".")
		if err != nil {
			return err
		}
		for _, e := range entries { // others may keep their files beside ours
			tree := spacesRoot + oid
			if held[maphash.String(seed, tree+"/"+e.Name())] == dir && e.IsDir() {
				if err := sweep(root, tree, e.Name()); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// emptyDirs must be there for a server to start; a backup holds them, too.
var emptyDirs = []string{
	"pg_wal", "pg_wal/archive_status", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_subtrans", "pg_stat_tmp",
	"pg_stat", "pg_tblspc", "pg_twophase", "pg_commit_ts", "pg_logical", "pg_logical/snapshots", "pg_logical/mappings",
}

// end adds what is not in the backup, and makes the directory count: modes and
// owners, all of it on disk, pg_control at last.
func (r *run) end(ctx context.Context) error {
	data, m := r.layout.data, r.plan.resolved.Backup
	dirs := emptyDirs
	if m.Version.Major() >= 17 {
		dirs = append(dirs[:len(dirs):len(dirs)], "pg_wal/summaries")
	}
	for _, dir := range dirs {
		if err := data.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	for _, t := range r.plan.Tablespaces {
		link := "pg_tblspc/" + t.OID
		if err := data.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := data.Symlink(t.To, link); err != nil {
			return err
		}
	}
	changed, err := r.writeMap()
	if err == nil {
		err = r.writeSettings()
	}
	if err == nil {
		err = r.writeManifest(ctx, changed)
	}
	if err == nil && r.Job != "" {
		err = put(data, doneFile, []byte(r.Job))
	}
	if err == nil {
		err = r.own()
	}
	if err == nil {
		err = r.sync()
	}
	if err == nil {
		err = r.still()
	}
	if err == nil {
		err = data.Rename(controlTemp, controlFile)
	}
	if err == nil {
		err = durable.SyncDir(data, "global")
	}
	if err == nil {
		err = data.Remove(markerFile)
	}
	if err == nil {
		err = durable.SyncDir(data, ".")
	}
	return err
}

// A change is a file that is not as it is in the backup.
type change struct {
	size int64
	crc  uint32
}

// writeMap makes tablespace_map say where tablespaces are now: the server makes
// their links anew from it (read_tablespace_map in access/transam/xlogrecovery.c).
func (r *run) writeMap() (changed map[string]change, err error) {
	have, err := r.layout.data.ReadFile(mapFile)
	if errors.Is(err, fs.ErrNotExist) && len(r.plan.Tablespaces) == 0 {
		return nil, nil
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	var text bytes.Buffer
	for _, t := range r.plan.Tablespaces {
		fmt.Fprintf(&text, "%s %s\n", t.OID, strings.NewReplacer(`\`, `\\`, "\n", `\`+"\n", "\r", `\`+"\r").Replace(t.To))
	}
	if bytes.Equal(have, text.Bytes()) {
		return nil, nil
	}
	c := change{int64(text.Len()), crc32.Checksum(text.Bytes(), crc32.MakeTable(crc32.Castagnoli))}
	return map[string]change{dataRoot + "/" + mapFile: c}, put(r.layout.data, mapFile, text.Bytes())
}

func put(root *os.Root, name string, text []byte) error {
	return durable.Replace(root, name, 0o600, func(w io.Writer) error {
		_, err := w.Write(text)
		return err
	})
}

// writeSettings tells the server to recover, and how far.
func (r *run) writeSettings() error {
	data := r.layout.data
	have, err := data.ReadFile(autoConf)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	note := fmt.Sprintf("backup %s of cluster %s, to %s", r.plan.Backup.ID, r.plan.Backup.Cluster, strings.ReplaceAll(r.Target.String(), "\n", " "))
	if err := put(data, autoConf, withSettings(have, note, r.recoverySettings(r.plan))); err != nil {
		return err
	}
	signal, other := "recovery.signal", "standby.signal"
	if r.Standby {
		signal, other = other, signal
	}
	if err := data.Remove(other); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return put(data, signal, nil)
}

// writeManifest makes backup_manifest, from the signed list of files, for
// pg_verifybackup.
func (r *run) writeManifest(ctx context.Context, changed map[string]change) error {
	m := r.plan.resolved.Backup
	return durable.Replace(r.layout.data, "backup_manifest", 0o600, func(w io.Writer) error {
		man := pgdata.NewManifest(w, m.Version.Major(), m.System)
		added := make(map[string]bool)
		err := entries(ctx, r.Repo, m, func(e repo.Entry) error {
			root, rest := split(e.Path)
			if e.Dir || e.Link != "" || strings.HasPrefix(root, configRoot) {
				return nil
			}
			if root == dataRoot {
				for _, name := range ours {
					if rest == name {
						return nil
					}
				}
			}
			c, ok := changed[e.Path]
			if !ok {
				c = change{e.Size, e.CRC}
			}
			added[e.Path] = ok
			return man.Add(e.Path, c.size, e.Modified, c.crc)
		})
		if err != nil {
			return err
		}
		for name, c := range changed {
			if !added[name] {
				if err := man.Add(name, c.size, m.Physical.StoppedAt, c.crc); err != nil {
					return err
				}
			}
		}
		return man.Finish(r.ranges()...)
	})
}

// ranges are the pieces of the log that the backup itself needs, the newest
// timeline first.
func (r *run) ranges() []pgdata.WALRange {
	p := r.plan.resolved.Backup.Physical
	return []pgdata.WALRange{{Timeline: cmp.Or(p.StopTimeline, p.Timeline), Start: p.Start, End: p.Stop}}
}

// own gives all files their modes and their owner. PostgreSQL wants its
// directory for itself, or for its group to read (checkDataDir in
// utils/init/miscinit.c).
func (r *run) own() error {
	roots := []*os.Root{r.layout.data}
	if r.layout.config != nil {
		roots = append(roots, r.layout.config)
	}
	for _, root := range roots {
		if err := r.ownBelow(root, "."); err != nil {
			return err
		}
	}
	for oid, root := range r.layout.spaces {
		if err := r.ownSpace(root, r.plan.tops[oid]); err != nil {
			return err
		}
	}
	return nil
}

// ownSpace leaves a directory as it is in which others keep files beside ours.
func (r *run) ownSpace(root *os.Root, tops []string) error {
	names, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(names, func(d fs.DirEntry) bool { return !slices.Contains(tops, d.Name()) }) {
		return r.ownBelow(root, ".")
	}
	for _, top := range tops {
		if err := r.ownBelow(root, top); err != nil {
			return err
		}
	}
	return nil
}

func (r *run) ownBelow(root *os.Root, below string) error {
	return fs.WalkDir(root.FS(), below, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		return r.ownOne(root, name, info)
	})
}

func (r *run) ownOne(root *os.Root, name string, info fs.FileInfo) error {
	mode := 0o600 | r.plan.group&0o040
	if info.IsDir() {
		mode = 0o700 | r.plan.group
	}
	if info.Mode()&fs.ModeSymlink == 0 && info.Mode().Perm() != mode {
		if err := root.Chmod(name, mode); err != nil {
			return err
		}
	}
	if r.plan.owner.name != "" {
		return root.Lchown(name, r.plan.owner.uid, r.plan.owner.gid)
	}
	return nil
}

// sync puts all of it on disk: one call for each file system, which was open
// since before the first write and so tells of any that failed (syncfs(2), from
// Linux 5.8 on). The names of the directories themselves come last.
func (r *run) sync() error {
	done := make(map[uint64]bool)
	for _, dir := range r.layout.held {
		var st unix.Stat_t
		if err := unix.Fstat(int(dir.Fd()), &st); err != nil {
			return err
		}
		if !done[st.Dev] {
			done[st.Dev] = true
			if err := unix.Syncfs(int(dir.Fd())); err != nil {
				return err
			}
		}
	}
	for _, root := range r.layout.all() {
		parent, err := os.Open(filepath.Dir(root.Name()))
		if err != nil {
			return err
		}
		if err := errors.Join(parent.Sync(), parent.Close()); err != nil {
			return err
		}
	}
	return nil
}
