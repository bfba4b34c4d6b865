package restore

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// Physical says what to restore of a cluster, and where.
type Physical struct {
	Repo    *repo.Repo
	Cluster string
	Backup  repo.ID // the only one to consider; "": the best there is
	Target  Target
	Action  Action // at the target; "": Pause
	Standby bool   // it goes on following the archive: only for the latest moment

	Dir string // the data directory to be
	// Tablespaces says where to put them: by OID, or by path at the source,
	// the path here. Others go where they were, but under Delta only if Dir is
	// where the source's data directory was.
	Tablespaces map[string]string
	ConfigDir   string // receives configuration that stood outside of the data directory; "": it is left out
	// Delta lets Dir hold a data directory of the same cluster, which is no
	// longer needed: what is equal stays, everything else in it goes.
	Delta bool
	// Allowed refuses a place that is not to be written to: it is asked about Dir,
	// ConfigDir and where each tablespace will be. Nil: anywhere.
	Allowed func(dir string) error
	// Owner is "user" or "user:group", for root. "": the owner of Dir, or else
	// of the directory it is in.
	Owner string
	// Fetch is the command with its arguments, without the file and the path,
	// with which the server gets its log.
	Fetch []string
	// Needs are the files that Fetch reads. The plan says which of them the
	// owner cannot read.
	Needs []string
	// Takeover: it takes the place of its source, and keeps its settings for
	// archiving, replication and subscriptions. Otherwise these are turned off.
	Takeover bool

	// Servers are directories on this host that may hold the programs of a server,
	// the likely ones first. If some do, and none is of the backup's major version,
	// the plan is refused. Nil: nobody has looked.
	Servers []string
	// Job names what asks for the restore. Done knows by it what this job has
	// finished already. "": nobody asks again.
	Job string

	free func(dir string) (device uint64, free int64, err error) // nil: as the file system says

	Readers  int                                   // packs read at a time; 0: 3
	Progress func(stage string, done, total int64) // bytes; may be nil, and be called from several goroutines
}

// A PhysicalPlan is what a restore will do. Printing it is the dry run.
type PhysicalPlan struct {
	Backup   repo.Ref  `json:"backup"`
	TakenAt  time.Time `json:"taken_at"` // when it was consistent, UTC
	Version  string    `json:"version"`  // of PostgreSQL, which must run it
	Damaged  int       `json:"damaged_blocks,omitempty"`
	Target   Target    `json:"target"`
	Timeline int64     `json:"timeline"` // along which to recover
	Path     []int64   `json:"timelines"`
	Stop     *Moment   `json:"stop,omitempty"` // the record that ends recovery
	Last     *Moment   `json:"last_commit,omitempty"`
	FirstWAL string    `json:"first_wal"`
	LastWAL  string    `json:"last_wal"`
	Segments int       `json:"segments"`
	WALBytes int64     `json:"wal_bytes"`
	Files    int       `json:"files"`
	Bytes    int64     `json:"bytes"`
	Stored   int64     `json:"stored"`

	Dir         string            `json:"target_dir"`
	State       DirState          `json:"state"`
	Owner       string            `json:"owner,omitempty"` // "": who runs this
	Tablespaces []TablespacePlace `json:"tablespaces,omitempty"`
	Config      []string          `json:"config,omitempty"` // files of the configuration that stood elsewhere
	Space       []Space           `json:"space"`
	Server      string            `json:"server,omitempty"` // the directory of the programs that can run it; "": not known
	Time        Forecast          `json:"time"`
	Notes       []string          `json:"notes,omitempty"`
	Passed      []Passed          `json:"passed,omitempty"`

	resolved   Resolved
	source     string   // the data directory that the backup is of; "": not known
	configured []string // files of the configuration that stood elsewhere, or that a link led to
	inPlace    bool     // there are tablespaces that stand in pg_tblspc itself
	owner      owner
	linked     map[string]time.Time // by OID: when the link to a tablespace had been made, to the second
	tops       map[string][]string  // by OID: what stands in the tablespace's directory; others may keep theirs there
	group      fs.FileMode          // what the group may do with directories, as at the source
}

// A Moment is a record of the log.
type Moment struct {
	LSN  pg.LSN    `json:"lsn"`
	Time time.Time `json:"time,omitzero"` // UTC
	XID  uint32    `json:"xid,omitempty"`
	Name string    `json:"name,omitempty"`
}

// A TablespacePlace says where a tablespace was, and where it will be.
type TablespacePlace struct {
	OID  string `json:"oid"`
	From string `json:"from"`
	To   string `json:"to"`
}

// Plan finds out whether the restore can be done, and refuses it before
// anything is written: a target that cannot be reached, a directory that holds
// something or belongs to a running server, too little space.
func (p Physical) Plan(ctx context.Context) (PhysicalPlan, error) {
	var plan PhysicalPlan
	if err := p.check(); err != nil {
		return plan, err
	}
	var err error
	var backups []repo.Listed
	if plan.resolved, backups, err = p.resolve(ctx); err != nil {
		return plan, err
	}
	plan.describe(p)
	if err := p.planServer(ctx, &plan); err != nil {
		return plan, err
	}
	if err := p.readSource(&plan); err != nil {
		return plan, err
	}
	if err := p.planFiles(ctx, &plan); err != nil {
		return plan, err
	}
	if err := p.allow(plan); err != nil {
		return plan, err
	}
	if err := p.planPlaces(&plan); err != nil {
		return plan, err
	}
	if err := p.spareSource(&plan); err != nil {
		return plan, err
	}
	return plan, p.planTime(ctx, &plan, backups)
}

// allow asks whether all places of a plan are allowed.
func (p Physical) allow(plan PhysicalPlan) error {
	if p.Allowed == nil {
		return nil
	}
	places := []string{p.Dir}
	if p.ConfigDir != "" {
		places = append(places, p.ConfigDir)
	}
	for _, t := range plan.Tablespaces {
		places = append(places, t.To)
	}
	for _, place := range places {
		if err := p.Allowed(place); err != nil {
			return err
		}
	}
	return nil
}

func (p *Physical) check() error {
	bad := func(format string, args ...any) error {
		return fmt.Errorf("restore: "+format+": %w", append(args, fail.BadConfig)...)
	}
	switch {
	case !filepath.IsAbs(p.Dir) || filepath.Clean(p.Dir) == "/":
		return bad("target directory %q: want an absolute path", p.Dir)
	case len(p.Fetch) == 0 || !filepath.IsAbs(p.Fetch[0]):
		return bad("restore_command %q: want an absolute path", p.Fetch)
	case p.Standby && p.Target.Kind != Latest:
		return bad("a standby follows the archive to its end; %v is not", p.Target)
	}
	if p.ConfigDir != "" && !filepath.IsAbs(p.ConfigDir) {
		return bad("directory of the configuration %q: want an absolute path", p.ConfigDir)
	}
	for from, to := range p.Tablespaces {
		if !filepath.IsAbs(to) {
			return bad("tablespace %s=%s: want an absolute path", from, to)
		}
	}
	p.Dir = filepath.Clean(p.Dir)
	if p.ConfigDir != "" {
		p.ConfigDir = filepath.Clean(p.ConfigDir)
	}
	if p.Action == "" {
		p.Action = Pause
	}
	return nil
}

// resolve asks the repository what Resolve needs to know.
func (p Physical) resolve(ctx context.Context) (Resolved, []repo.Listed, error) {
	backups, err := p.Repo.Backups(ctx, p.Cluster)
	if err != nil {
		return Resolved{}, nil, err
	}
	archive := p.life(backups)
	ledger, odd := audit.Ledger{Archive: archive}, audit.Oddities{}
	if archive.System != 0 {
		// What is damaged of the archive counts as missing; if it is a history, Resolve is told.
		if ledger, odd, err = audit.Survey(ctx, p.Repo, archive, audit.Ledger{}); err != nil {
			return Resolved{}, nil, err
		}
	}
	res, err := Resolve(ctx, p.Target, p.Backup, backups, ledger, ScanArchive(p.Repo, ledger))
	if odd.Count > 0 {
		missed := fmt.Sprintf("objects in the archive that are damaged, or no files of it, and count as missing: %d, such as %s: %s", odd.Count, odd.Told[0].Key, odd.Told[0].Why)
		res.Notes = append(res.Notes, missed+"; the way to the target does not need them, and pgkeep wal audit names them")
		if err != nil {
			err = fail.Hint(err, strings.TrimPrefix(fail.HintOf(err)+"; ", "; ")+missed+"; pgkeep wal audit names them")
		}
	}
	return res, backups, err
}

// life is the archive of the cluster's life that is meant: it has had several, if it
// was upgraded or made anew under its name. To a time leads that of the newest
// backup that ended before it; else the newest is meant.
func (p Physical) life(backups []repo.Listed) repo.Archive {
	a := repo.Archive{Cluster: p.Cluster}
	var ended time.Time
	for _, b := range backups {
		if b.Physical == nil || b.Err != nil || b.Unfinished || p.Backup != "" && b.ID != p.Backup {
			continue
		}
		late := p.Target.Kind == ToTime && b.Physical.StoppedAt.After(p.Target.Time)
		if a.System == 0 || !late && !b.Physical.StoppedAt.Before(ended) {
			a.System, a.Major = b.System, b.Version.Major()
		}
		if !late {
			ended = b.Physical.StoppedAt
		}
	}
	return a
}

// planServer looks for a server that can run what is restored: one of the same
// major version, no other can open it.
func (p Physical) planServer(ctx context.Context, plan *PhysicalPlan) error {
	want := plan.resolved.Backup.Version.Major()
	var others, unclear []string
	for _, dir := range p.Servers {
		v, err := cluster.ServerVersion(ctx, dir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			unclear = append(unclear, fmt.Sprintf("of which version the server in %s is, it does not say: %v", dir, err))
		case v.Major() == want:
			plan.Server = dir
			return nil
		default:
			others = append(others, fmt.Sprintf("%v in %s", v, dir))
		}
	}
	if len(others) > 0 && len(unclear) == 0 {
		return fail.Hint(fmt.Errorf("restore: backup %s is of PostgreSQL %d, and this host has %s: %w", plan.Backup.ID, want, strings.Join(others, ", "), fail.PGVersion),
			fmt.Sprintf("no other major version can open it: apt-get install postgresql-%d, or name the directory of its programs as bin_dir of the cluster", want))
	}
	plan.Notes = append(plan.Notes, unclear...)
	if p.Servers != nil {
		plan.Notes = append(plan.Notes, fmt.Sprintf("no server of PostgreSQL %d was found on this host; no other major version can open what is restored", want))
	}
	return nil
}

// describe fills in what follows from the resolved target.
func (plan *PhysicalPlan) describe(p Physical) {
	res := plan.resolved
	m := res.Backup
	plan.Backup, plan.TakenAt, plan.Version, plan.Damaged = m.Ref, m.Physical.StoppedAt.UTC(), m.Version.String(), m.Physical.Damaged
	plan.Target, plan.Timeline = p.Target, int64(res.Timeline)
	for _, t := range res.Window.Path {
		plan.Path = append(plan.Path, int64(t))
	}
	show := func(r pg.WALRecord) *Moment {
		if r.At == 0 {
			return nil
		}
		return &Moment{r.At, r.Time, r.XID, r.Name}
	}
	plan.Stop, plan.Last = show(res.Stop), show(res.Last)
	for n := range res.Window.Segments(res.segmentSize(), m.Physical.Start, max(res.Until, m.Physical.Stop)) {
		if plan.Segments == 0 {
			plan.FirstWAL = n.String()
		}
		plan.LastWAL = n.String()
		plan.Segments++
	}
	plan.WALBytes = int64(plan.Segments) * int64(res.segmentSize())
	plan.Files, plan.Bytes, plan.Stored, plan.Passed = m.Files, m.Bytes, m.Stored, res.Passed
	plan.Dir = p.Dir
	plan.Notes = append(plan.Notes, res.Notes...)
}

// entries tells of every entry of a backup. A list that is not whole is an error,
// whatever it did hold.
func entries(ctx context.Context, r *repo.Repo, m repo.Manifest, tell func(repo.Entry) error) error {
	rep, err := r.Read(ctx, m.ID, m.Content, repo.Reading{Want: func(string) bool { return false }, Entries: tell})
	if err == nil {
		err = rep.Err()
	}
	if errors.Is(err, store.ErrNotExist) {
		err = fmt.Errorf("%w: %w", err, fail.Corrupt) // the signed manifest names it
	}
	return err
}

// planFiles looks through the list of files for what concerns the places.
func (p Physical) planFiles(ctx context.Context, plan *PhysicalPlan) error {
	m := plan.resolved.Backup
	var control, label bool
	need := make(map[string]int64) // by root
	plan.tops, plan.linked = make(map[string][]string), make(map[string]time.Time)
	err := entries(ctx, p.Repo, m, func(e repo.Entry) error {
		root, rest := split(e.Path)
		need[root] += e.Size
		if oid, ok := strings.CutPrefix(root, spacesRoot); ok && rest != "" {
			if top, _, _ := strings.Cut(rest, "/"); !slices.Contains(plan.tops[oid], top) {
				plan.tops[oid] = append(plan.tops[oid], top)
			}
		}
		switch {
		case e.Path == dataRoot:
			if e.Mode&0o050 == 0o050 {
				plan.group = 0o050
			}
		case root == dataRoot && rest == controlFile:
			control = true
		case root == dataRoot && rest == labelFile:
			label = true
		case root == dataRoot && e.Link != "":
			oid, ok := strings.CutPrefix(rest, "pg_tblspc/")
			if !ok && slices.Contains(plan.configured, filepath.Join(plan.source, rest)) {
				break // it comes with the configuration
			}
			if !ok { // somebody's own: a link to a certificate, say
				plan.Notes = append(plan.Notes, fmt.Sprintf("%s is a link to %s; what it leads to is not in the backup", rest, e.Link))
				break
			}
			if oid == "" || strings.Trim(oid, "0123456789") != "" {
				return fmt.Errorf("backup %s holds the link %s: %w", m.ID, e.Path, fail.Corrupt)
			}
			plan.Tablespaces = append(plan.Tablespaces, TablespacePlace{OID: oid, From: e.Link, To: e.Link})
			plan.linked[oid] = e.Modified
		case strings.HasPrefix(root, configRoot) && !e.Dir:
			plan.Config = append(plan.Config, rest)
		}
		return nil
	})
	switch {
	case err != nil:
		return err
	case !control || !label:
		return fmt.Errorf("backup %s holds no pg_control or no backup_label: %w", m.ID, fail.Corrupt)
	}
	plan.Space = []Space{{Dir: p.Dir, Need: need[dataRoot]}}
	for _, t := range plan.Tablespaces {
		plan.Space = append(plan.Space, Space{Dir: t.OID, Need: need[spacesRoot+t.OID]}) // the place comes later
		delete(need, spacesRoot+t.OID)
	}
	for root := range need {
		if strings.HasPrefix(root, spacesRoot) {
			return fmt.Errorf("backup %s holds %s, and no link to it: %w", m.ID, root, fail.Corrupt)
		}
	}
	return p.mapTablespaces(plan)
}

// mapped reports whether somebody said where a tablespace goes.
func (p Physical) mapped(t TablespacePlace) bool {
	_, byOID := p.Tablespaces[t.OID]
	_, byPath := p.Tablespaces[t.From]
	return byOID || byPath
}

// mapTablespaces finds the place of each tablespace.
func (p Physical) mapTablespaces(plan *PhysicalPlan) error {
	used := make(map[string]bool)
	for i := range plan.Tablespaces {
		t := &plan.Tablespaces[i]
		for _, key := range []string{t.OID, t.From} {
			if to, ok := p.Tablespaces[key]; ok {
				t.To = filepath.Clean(to)
				used[key] = true
			}
		}
		plan.Space[i+1].Dir = t.To
		if !filepath.IsAbs(t.To) {
			return fail.Hint(fmt.Errorf("restore: tablespace %s was at %q: %w", t.OID, t.From, fail.BadConfig), "say where it goes: --tablespace-map "+t.OID+"=/some/directory")
		}
	}
	for key := range p.Tablespaces {
		if !used[key] {
			var known []string
			for _, t := range plan.Tablespaces {
				known = append(known, t.OID+" at "+t.From)
			}
			slices.Sort(known)
			return fail.Hint(fmt.Errorf("restore: the backup has no tablespace %q: %w", key, fail.BadConfig), "it has: "+strings.Join(known, ", "))
		}
	}
	return nil
}
