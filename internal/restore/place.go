package restore

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// The roots of the tree of a backup, and files of note in the data directory.
const (
	dataRoot   = "data"
	spacesRoot = "tablespaces/" // and the OID
	configRoot = "config/"

	controlFile = "global/pg_control"
	controlTemp = "global/pg_control.pgkeep" // until all else is there
	labelFile   = "backup_label"
	mapFile     = "tablespace_map"
	autoConf    = "postgresql.auto.conf"
	markerFile  = "pgkeep.restoring"
	doneFile    = "pg_wal/pgkeep.restored" // there neither the server nor pg_verifybackup minds it
)

// split takes the root off a path of the tree: "data", "tablespaces/<oid>" or
// "config/<n>". The rest is "" for the root itself.
func split(p string) (root, rest string) {
	if strings.HasPrefix(p, spacesRoot) || strings.HasPrefix(p, configRoot) {
		top, below, _ := strings.Cut(p, "/")
		second, rest, _ := strings.Cut(below, "/")
		return top + "/" + second, rest
	}
	root, rest, _ = strings.Cut(p, "/")
	return root, rest
}

// A DirState is what a restore finds in its target directory.
type DirState string

const (
	New        DirState = "new"        // nothing is there
	Unfinished DirState = "unfinished" // the same restore, which did not end
	Existing   DirState = "existing"   // a data directory, for Delta
)

// A Space says how much a restore puts on a file system.
type Space struct {
	Dir  string `json:"dir"`
	Need int64  `json:"need"` // bytes
	Free int64  `json:"free"`
}

// A marker stands in a data directory as long as its restore is not finished.
type marker struct {
	repo.Ref
	System      pg.SystemID       `json:"system_id"`
	Tablespaces map[string]string `json:"tablespaces,omitempty"` // by OID
	ConfigDir   string            `json:"config_dir,omitempty"`
	State       DirState          `json:"state"` // in which the directory was met
	Run         string            `json:"run"`   // of each attempt another
}

// planPlaces looks at where things go, and refuses what is in the way.
func (p Physical) planPlaces(plan *PhysicalPlan) error {
	if err := p.planDir(plan); err != nil {
		return err
	}
	if err := p.apartFromSource(plan); err != nil {
		return err
	}
	var taken []string
	for i := range plan.Tablespaces {
		t := plan.Tablespaces[i]
		for _, other := range append([]string{p.Dir}, taken...) {
			if within(t.To, other) || within(other, t.To) {
				return fail.Hint(fmt.Errorf("restore: tablespace %s would be at %s, and %s is the place of something else: %w", t.OID, t.To, other, fail.BadConfig),
					"say where it goes: --tablespace-map "+t.OID+"=/some/directory")
			}
		}
		taken = append(taken, t.To)
		if err := p.planTablespace(plan, t); err != nil {
			return err
		}
	}
	if p.ConfigDir != "" {
		if err := p.planConfigDir(plan, append(taken, p.Dir)); err != nil {
			return err
		}
	} else if len(plan.Config) > 0 {
		plan.Notes = append(plan.Notes, fmt.Sprintf("%d files of the configuration stood outside of the data directory and are left out; --config-dir brings them back", len(plan.Config)))
	}
	var err error
	if plan.owner, err = p.findOwner(); err != nil {
		return err
	}
	plan.Owner = plan.owner.name
	for _, name := range p.Needs {
		if why := plan.owner.cannotRead(name); why != "" {
			plan.Notes = append(plan.Notes, fmt.Sprintf("%s gets its log with %s, and may not read it: %s", plan.Owner, name, why))
		}
	}
	return p.checkSpace(plan)
}

// cannotRead says why a file is closed to o; "" if it is open, as far as modes
// tell, or o is nobody else.
func (o owner) cannotRead(name string) string {
	if o.name == "" {
		return ""
	}
	allowed := func(name string, bit uint32) string {
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			return err.Error()
		}
		mode := st.Mode & 0o7
		switch {
		case int(st.Uid) == o.uid:
			mode = st.Mode >> 6
		case int(st.Gid) == o.gid:
			mode = st.Mode >> 3
		}
		if mode&bit == 0 {
			return fmt.Sprintf("%s has mode %04o", name, st.Mode&0o7777)
		}
		return ""
	}
	for dir := filepath.Dir(name); dir != "/" && dir != "."; dir = filepath.Dir(dir) {
		if why := allowed(dir, 1); why != "" {
			return why
		}
	}
	return allowed(name, 4)
}

// planConfigDir refuses a directory that holds something, unless the unfinished
// restore has put it there, and one that is the place of something else.
func (p Physical) planConfigDir(plan *PhysicalPlan, taken []string) error {
	const own = "--config-dir wants a directory of its own"
	for _, other := range taken {
		if within(p.ConfigDir, other) || within(other, p.ConfigDir) {
			return fail.Hint(fmt.Errorf("restore: the configuration would be at %s, and %s is the place of something else: %w", p.ConfigDir, other, fail.BadConfig), own)
		}
	}
	_, empty, err := emptyDir(p.ConfigDir)
	if err != nil || empty {
		return err
	}
	if have, err := readMarker(p.Dir); err == nil && plan.State == Unfinished && have.ConfigDir == p.ConfigDir {
		return nil
	}
	return fail.Hint(fmt.Errorf("restore: %s is not empty: %w", p.ConfigDir, fail.NotEmpty), own)
}

// emptyDir reports whether a directory is there, and whether it is empty or
// absent. Its parent must be there.
func emptyDir(dir string) (there, empty bool, err error) {
	entries, err := os.ReadDir(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		info, perr := os.Stat(filepath.Dir(dir))
		if perr != nil || !info.IsDir() {
			return false, true, fail.Hint(fmt.Errorf("restore: %s cannot be made: %s is no directory: %w", dir, filepath.Dir(dir), fail.BadConfig), "make it first, for the user that runs PostgreSQL")
		}
		return false, true, nil
	case err != nil:
		return false, false, fmt.Errorf("restore: %w", err)
	}
	return true, len(entries) == 0, nil
}

// planDir decides what state the target directory is in.
func (p Physical) planDir(plan *PhysicalPlan) error {
	_, empty, err := emptyDir(p.Dir)
	if err != nil {
		return err
	}
	if empty {
		plan.State = New
		return nil
	}
	if pid, runs := running(p.Dir); runs {
		return fail.Hint(fmt.Errorf("restore: a server runs on %s, as process %d: %w", p.Dir, pid, fail.NotEmpty), "stop it first; nothing was touched. If none runs, here or in another container, remove postmaster.pid")
	}
	_, cerr := os.Lstat(filepath.Join(p.Dir, controlFile))
	have, merr := readMarker(p.Dir)
	switch {
	case merr == nil && errors.Is(cerr, fs.ErrNotExist) && have.Ref == plan.Backup:
		plan.State = Unfinished
		for _, t := range plan.Tablespaces {
			if have.Tablespaces[t.OID] != t.To {
				return fail.Hint(fmt.Errorf("restore: the unfinished one in %s put tablespace %s at %s: %w", p.Dir, t.OID, have.Tablespaces[t.OID], fail.NotEmpty), "map it there again, or empty both directories")
			}
		}
		return nil
	case !p.Delta:
		hint := "give an empty directory, or --delta if it is an old data directory of this cluster that may be overwritten"
		switch {
		case merr != nil:
		case cerr == nil && have.State != Existing: // it had none when it began
			hint = fmt.Sprintf("the restore of backup %s there has come to its end, and only %s was left: remove that file, and start the server", have.ID, markerFile)
		case errors.Is(cerr, fs.ErrNotExist):
			hint = fmt.Sprintf("a restore of backup %s was cut off there: name that backup to go on with it; or give --delta, or an empty directory", have.ID)
		}
		return fail.Hint(fmt.Errorf("restore: %s is not empty: %w", p.Dir, fail.NotEmpty), hint)
	}
	plan.State = Existing
	system := have.System
	if merr != nil || cerr == nil {
		b, err := os.ReadFile(filepath.Join(p.Dir, controlFile))
		if err != nil {
			return fail.Hint(fmt.Errorf("restore: %s is not empty, and no data directory: %w: %w", p.Dir, err, fail.NotEmpty), "--delta is for an old data directory of this cluster")
		}
		c, err := pg.ParseControl(b)
		if err != nil {
			return fmt.Errorf("restore: whose data directory is %s: %w: %w", p.Dir, err, fail.NotEmpty)
		}
		system = c.System
	}
	if m := plan.resolved.Backup; system != m.System {
		return fail.Hint(fmt.Errorf("restore: %s is the data directory of system %v, and the backup is of %v: %w", p.Dir, system, m.System, fail.WrongSystem), "is this the right directory? Nothing was touched")
	}
	if info, err := os.Lstat(filepath.Join(p.Dir, "pg_wal")); err == nil && info.Mode()&fs.ModeSymlink != 0 {
		plan.Notes = append(plan.Notes, "pg_wal is a link; it becomes a directory, and what it led to stays as it is")
	}
	return nil
}

// planTablespace refuses a directory that holds something that is not ours.
func (p Physical) planTablespace(plan *PhysicalPlan, t TablespacePlace) error {
	_, empty, err := emptyDir(t.To)
	if err != nil || empty {
		return err
	}
	switch plan.State {
	case Unfinished:
		return nil
	case Existing: // only what this very data directory leads to, and no other that it is a copy of
		if !p.mapped(t) && !p.overSource(plan) {
			break
		}
		link := filepath.Join(p.Dir, "pg_tblspc", t.OID)
		if to, err := os.Readlink(link); err == nil && filepath.Clean(to) == t.To {
			return nil
		}
		if have, err := readMarker(p.Dir); err == nil && have.Tablespaces[t.OID] == t.To {
			return nil
		}
	}
	return fail.Hint(fmt.Errorf("restore: the place of tablespace %s, %s, is not empty: %w", t.OID, t.To, fail.NotEmpty), "put it elsewhere: --tablespace-map "+t.OID+"=/some/directory")
}

// within reports whether a path is in a directory, or is it. Links on the way
// to both are followed as far as they lead anywhere.
func within(p, dir string) bool {
	rel, err := filepath.Rel(realPath(dir), realPath(p))
	return err == nil && rel != ".." && !strings.HasPrefix(rel, "../")
}

func realPath(p string) string {
	if real, err := filepath.EvalSymlinks(p); err == nil {
		return real
	}
	if parent := filepath.Dir(p); parent != p {
		return filepath.Join(realPath(parent), filepath.Base(p))
	}
	return p
}

// running reports whether a server may be running on a data directory: the
// process that postmaster.pid names is there, or what else it names answers. That
// the process belongs to somebody else does not prove that it is another one; that
// it is not here does not prove that it is nowhere: another container has numbers
// of its own.
func running(dir string) (pid int, runs bool) {
	b, err := os.ReadFile(filepath.Join(dir, "postmaster.pid"))
	if err != nil {
		return 0, !errors.Is(err, fs.ErrNotExist)
	}
	lines := strings.Split(string(b), "\n")
	pid, err = strconv.Atoi(strings.TrimSpace(lines[0]))
	if err != nil || pid == 0 {
		return 0, true // being written
	}
	if pid < 0 { // of a single-user session
		pid = -pid
	}
	err = syscall.Kill(pid, 0)
	return pid, err == nil || errors.Is(err, syscall.EPERM) || answers(lines)
}

// answers reports whether somebody uses the memory that a postmaster.pid names,
// as PostgreSQL asks before it starts (CreateLockFile in utils/init/miscinit.c), or
// serves at its socket or its port (what stands in which line: miscadmin.h).
func answers(lines []string) bool {
	line := func(n int) string {
		if n > len(lines) {
			return ""
		}
		return strings.TrimSpace(lines[n-1])
	}
	var key, id int
	if _, err := fmt.Sscan(line(7), &key, &id); err == nil {
		var shm unix.SysvShmDesc
		if _, err := unix.SysvShmCtl(id, unix.IPC_STAT, &shm); err == nil && int(shm.Perm.Key) == key && shm.Nattch > 0 {
			return true
		}
	}
	port := line(4)
	if port == "" {
		return false
	}
	if socket := line(5); socket != "" {
		name := filepath.Join(socket, ".s.PGSQL."+port)
		if lock, err := os.ReadFile(name + ".lock"); err == nil { // of whoever has that port: its process, directory and start
			have := strings.Split(string(lock), "\n")
			return len(have) >= 3 && slices.Equal(have[:3], lines[:min(3, len(lines))]) && listens("unix", name)
		}
	}
	host := line(6)
	if host == "" {
		return false
	}
	if host == "*" {
		host = "localhost"
	}
	return listens("tcp", net.JoinHostPort(host, port))
}

func listens(network, address string) bool {
	conn, err := net.DialTimeout(network, address, time.Second)
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

func readMarker(dir string) (m marker, err error) {
	b, err := os.ReadFile(filepath.Join(dir, markerFile))
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	return m, err
}

// An owner is who the files are given to. The zero owner: nobody, they stay with
// whoever writes them.
type owner struct {
	name     string
	uid, gid int
}

// findOwner decides who shall own the files. PostgreSQL refuses to run as root,
// and on files of somebody else.
func (p Physical) findOwner() (owner, error) {
	if os.Geteuid() != 0 {
		if p.Owner != "" {
			return owner{}, fmt.Errorf("restore: only root gives files to %s: %w", p.Owner, fail.BadConfig)
		}
		return owner{}, nil
	}
	if p.Owner != "" {
		return lookupOwner(p.Owner)
	}
	for _, dir := range []string{p.Dir, filepath.Dir(p.Dir)} {
		var st unix.Stat_t
		if err := unix.Stat(dir, &st); err != nil || st.Uid == 0 {
			continue
		}
		name := fmt.Sprint(st.Uid)
		if u, err := user.LookupId(name); err == nil {
			name = u.Username
		}
		return owner{name, int(st.Uid), int(st.Gid)}, nil
	}
	return owner{}, fail.Hint(fmt.Errorf("restore: who shall own %s? PostgreSQL does not run as root: %w", p.Dir, fail.BadConfig), "give --owner postgres, or make the directory first, for that user")
}

func lookupOwner(s string) (owner, error) {
	name, groupName, hasGroup := strings.Cut(s, ":")
	u, err := user.Lookup(name)
	if err != nil {
		return owner{}, fmt.Errorf("restore: owner: %w: %w", err, fail.BadConfig)
	}
	gid := u.Gid
	if hasGroup {
		g, err := user.LookupGroup(groupName)
		if err != nil {
			return owner{}, fmt.Errorf("restore: owner: %w: %w", err, fail.BadConfig)
		}
		gid = g.Gid
	}
	uid, uerr := strconv.Atoi(u.Uid)
	g, gerr := strconv.Atoi(gid)
	if err := errors.Join(uerr, gerr); err != nil {
		return owner{}, fmt.Errorf("restore: owner %s: %w", s, err)
	}
	if uid == 0 {
		return owner{}, fmt.Errorf("restore: owner %s: PostgreSQL does not run as root: %w", s, fail.BadConfig)
	}
	return owner{s, uid, g}, nil
}

// checkSpace compares what is needed with what each file system has. What an
// existing directory holds counts as free: it is overwritten or removed.
func (p Physical) checkSpace(plan *PhysicalPlan) error {
	type volume struct {
		free int64
		need int64
		dirs []string
	}
	volumes := make(map[uint64]*volume)
	for i := range plan.Space {
		s := &plan.Space[i]
		at := s.Dir
		if _, err := os.Stat(at); err != nil {
			at = filepath.Dir(at)
		}
		free := p.free
		if free == nil {
			free = freeAt
		}
		device, bytes, err := free(at)
		if err != nil {
			return fmt.Errorf("restore: space at %s: %w", at, err)
		}
		s.Free = bytes
		v := volumes[device]
		if v == nil {
			v = &volume{free: s.Free}
			volumes[device] = v
		}
		v.need += s.Need
		v.dirs = append(v.dirs, s.Dir)
		if plan.State != New {
			tops := []string{"."}
			if i > 0 {
				tops = plan.tops[plan.Tablespaces[i-1].OID]
			}
			for _, top := range tops {
				used, err := usedBy(filepath.Join(s.Dir, top))
				if err != nil {
					return err
				}
				v.need -= used
			}
		}
	}
	for _, v := range volumes {
		if v.need > v.free {
			slices.Sort(v.dirs)
			return fail.Hint(fmt.Errorf("restore: %s: %d MB are needed, and %d MB are free: %w", strings.Join(v.dirs, ", "), v.need>>20, v.free>>20, fail.NoSpace), "nothing was written")
		}
	}
	return nil
}

// freeAt asks a file system for the space that anybody may use.
func freeAt(dir string) (device uint64, free int64, err error) {
	var st unix.Stat_t
	var vfs unix.Statfs_t
	err = errors.Join(unix.Stat(dir, &st), unix.Statfs(dir, &vfs))
	return st.Dev, int64(vfs.Bavail) * vfs.Bsize, err
}

// usedBy counts the bytes of disk below a directory; none if it is not there.
func usedBy(dir string) (used int64, err error) {
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return nil // gone
		}
		if st, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode().IsRegular() && st.Nlink == 1 { // else another name keeps it
			used += st.Blocks * 512
		}
		return nil
	})
	return used, err
}

// A layout is the open directories of a restore.
type layout struct {
	data   *os.Root
	spaces map[string]*os.Root // by OID
	config *os.Root            // nil: left out
	held   []*os.File          // the same, data first, open since before the first write
}

// open opens a directory, which it makes if it is not there.
func (l *layout) open(dir string) (*os.Root, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	held, err := root.Open(".")
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	l.held = append(l.held, held)
	return root, nil
}

// place says where an entry of the tree goes. Not ok: nowhere; links to
// tablespaces, and files that are ours to make, come later.
func (l layout) place(p string) (root *os.Root, name string, ok bool) {
	top, rest := split(p)
	name = rest
	if rest == "" {
		name = "."
	}
	switch {
	case top == dataRoot:
		switch {
		case rest == controlFile:
			name = controlTemp
		case slices.Contains(ours, rest):
			return nil, "", false
		case path.Dir(rest) == "pg_tblspc" && l.spaces[path.Base(rest)] != nil:
			return nil, "", false
		}
		return l.data, name, true
	case strings.HasPrefix(top, spacesRoot):
		root = l.spaces[strings.TrimPrefix(top, spacesRoot)]
		return root, name, root != nil
	case strings.HasPrefix(top, configRoot) && l.config != nil:
		return l.config, path.Join(strings.TrimPrefix(top, configRoot), name), true
	}
	return nil, "", false
}

// ours are files that a data directory may not bring along.
var ours = []string{"recovery.signal", "standby.signal", "postmaster.pid", "postmaster.opts", "backup_manifest", markerFile}

func (l layout) close() {
	for _, r := range l.all() {
		r.Close()
	}
	for _, f := range l.held {
		f.Close()
	}
}

func (l layout) all() (roots []*os.Root) {
	if l.data != nil {
		roots = append(roots, l.data)
	}
	for _, r := range l.spaces {
		roots = append(roots, r)
	}
	if l.config != nil {
		roots = append(roots, l.config)
	}
	return roots
}
