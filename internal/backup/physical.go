package backup

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/pgdata"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/verify"
)

// Physical takes the physical backups of one cluster on its host: it copies the
// data directory while PostgreSQL works on it, and waits for the write-ahead log
// that makes the copy whole. All fields but the last group are required.
type Physical struct {
	Name    string // of the cluster
	Host    string
	Cluster cluster.Cluster
	Spool   string // holds the lock that keeps two attempts on this host apart
	Open    func(context.Context) (*repo.Repo, error)
	Log     *slog.Logger

	Readers          int           // files read at a time; 0: one for each processor
	SpreadCheckpoint bool          // begin with a checkpoint that takes its time
	Pace             Pace          // how hard to read
	WALWait          time.Duration // for the last segment to be archived; 0: 1 hour
	// CountRows are the tables whose rows are counted when the copy is done. None:
	// no table is read.
	CountRows []pg.TablePattern
}

func (p *Physical) ref(id repo.ID) repo.Ref { return repo.Ref{Cluster: p.Name, ID: id} }

// Preflight finds out whether a backup can succeed, before anything is read, and
// says in the repository that one is meant. Every refusal has a hint.
func (p *Physical) Preflight(ctx context.Context, id repo.ID, started time.Time, by Owner) (Seen, error) {
	r, err := p.Open(ctx)
	if err != nil {
		return Seen{}, err
	}
	facts, err := p.Cluster.Facts(ctx)
	if err != nil {
		return Seen{}, err
	}
	if err := p.fit(ctx, facts); err != nil {
		return Seen{}, err
	}
	seen := Seen{System: facts.System, Version: facts.Version, Databases: len(facts.Databases)}
	for _, d := range facts.Databases {
		seen.Bytes += max(0, d.Bytes)
	}
	prior, err := p.prior(ctx, r, facts)
	if err != nil {
		return Seen{}, err
	}
	in := repo.Intent{Ref: p.ref(id), Kind: repo.Physical, Host: p.Host, Workflow: by.Workflow, Run: by.Run, StartedAt: started}
	for _, b := range prior {
		in.Pins = append(in.Pins, b.ID)
	}
	return seen, announce(ctx, r, in)
}

// fit refuses a server of which no physical backup can be taken, or none that
// could be restored.
func (p *Physical) fit(ctx context.Context, f cluster.Facts) error {
	switch {
	case f.WALLevel == "minimal":
		return fail.Hint(fmt.Errorf("wal_level is minimal: %w", fail.BadConfig), "set wal_level = replica and restart PostgreSQL")
	case !f.InRecovery && !f.Archiving(): // for a standby its primary does
		return fail.Hint(fmt.Errorf("this server archives no WAL, and a copy of its files is worth nothing without: %w", fail.BadConfig),
			"set archive_mode = on and archive_command = 'pgkeep-wal push %p'")
	case f.DataDirectory == "":
		return fail.Hint(fmt.Errorf("the role may not see where the data directory is: %w", fail.PGDenied), "GRANT pg_read_all_settings, or pg_monitor, to it")
	}
	if err := p.Cluster.CheckBackupRights(ctx); err != nil {
		return err
	}
	if err := p.archives(ctx); err != nil {
		return err
	}
	d, err := pgdata.Open(f.DataDirectory, pgdata.Options{})
	if err != nil {
		return fail.Hint(fmt.Errorf("read the data directory: %w", err),
			"a physical backup is taken on the host of the data directory, by PostgreSQL's user or one of its group (initdb --allow-group-access)")
	}
	defer d.Close()
	c, _, err := d.Control(ctx)
	if err == nil && c.System != f.System {
		err = fmt.Errorf("%s belongs to system %v, the server is %v: %w", f.DataDirectory, c.System, f.System, fail.WrongSystem)
	}
	return err
}

// archiverRests is how long PostgreSQL's archiver waits at most before it tries
// again what has failed, and some time to do it (postmaster/pgarch.c).
const archiverRests = 90 * time.Second

// archives refuses a server whose archive_command fails, and goes on failing: its
// backup would be copied for hours and never be whole.
func (p *Physical) archives(ctx context.Context) error {
	deadline := time.Now().Add(min(archiverRests, p.walWait()))
	for n := 0; ; n++ {
		a, err := p.Cluster.WALArchived(ctx, 0)
		if err != nil || a.Failing == "" {
			return err
		}
		if n == 0 {
			p.Log.Warn("archive_command has failed; waits for it to succeed", "wal", a.Failing)
			p.Cluster.WakeArchiver(ctx)
		}
		if time.Now().After(deadline) {
			return fail.Hint(fmt.Errorf("archive_command fails on %s, and nothing was archived since: a copy is worth nothing without its log: %w", a.Failing, fail.NotArchiving),
				"PostgreSQL's log says why. Once a file is archived, take the backup again; if none waits, SELECT pg_switch_wal() makes one")
		}
		if err := rest(ctx, time.Second); err != nil {
			return err
		}
	}
}

func (p *Physical) walWait() time.Duration { return cmp.Or(p.WALWait, time.Hour) }

// prior returns the backups whose blocks the next one may keep: the newest of
// this system. One with damaged pages is as good: what is kept is equal to what
// is read.
func (p *Physical) prior(ctx context.Context, r *repo.Repo, f cluster.Facts) ([]repo.Ref, error) {
	all, err := r.Backups(ctx, p.Name)
	if err != nil {
		return nil, err
	}
	for _, b := range slices.Backward(all) {
		if b.Err == nil && !b.Unfinished && b.Kind == repo.Physical && b.System == f.System && b.Version.Major() == f.Version.Major() {
			return []repo.Ref{b.Ref}, nil
		}
	}
	return nil, nil
}

// Copied is what Copy stored.
type Copied struct {
	repo.PhysicalFacts
	repo.Content
	Kept int64 `json:"kept"` // bytes of files that were stored before
	Sent int64 `json:"sent"` // bytes of packs that this attempt sent
	// Uncounted is how many things kept rows from being counted; the details name
	// them.
	Uncounted int `json:"uncounted,omitempty"`
}

// Copy copies the cluster into the repository, from pg_backup_start to
// pg_backup_stop, on one connection. A copy that is complete is returned as it
// is, however often this is called; whatever earlier attempts, or the backup
// before, have stored is compared and kept. progress is called when it moves, and
// while it waits for what takes its time: the checkpoint at the beginning, a
// standby that is behind.
func (p *Physical) Copy(ctx context.Context, id repo.ID, progress func(repo.Progress)) (Copied, error) {
	r, err := p.Open(ctx)
	if err != nil {
		return Copied{}, err
	}
	if err := makeDir(p.Spool); err != nil {
		return Copied{}, err
	}
	lock, err := cluster.TakeLock(ctx, filepath.Join(p.Spool, p.Name+".physical.lock"))
	if err != nil {
		return Copied{}, err
	}
	defer lock.Close()
	if c, err := r.Draft(ctx, p.ref(id)); !errors.Is(err, fail.NoBackup) {
		return Copied{PhysicalFacts: deref(c.Physical), Content: c}, err
	}
	facts, err := p.Cluster.Facts(ctx)
	if err != nil {
		return Copied{}, err
	}
	var total int64 // nearly
	for _, d := range facts.Databases {
		total += max(0, d.Bytes)
	}
	for n := 1; ; n++ {
		s, err := p.start(ctx, id, progress)
		if err != nil {
			return Copied{}, err
		}
		c, err := p.copy(ctx, r, id, total, s, progress)
		s.Abort()
		if !errors.Is(err, errOvertaken) || n == maxStarts {
			return c, err
		}
		p.Log.Warn("begins again", "because", err)
	}
}

// errOvertaken says that a copy came too late, before it read anything.
var errOvertaken = errors.New("a checkpoint overtook the start of the backup")

// maxStarts is how often a copy begins before it gives up. To be overtaken takes
// a checkpoint within some milliseconds.
const maxStarts = 5

// start begins the backup at the server. That takes as long as a checkpoint does.
func (p *Physical) start(ctx context.Context, id repo.ID, progress func(repo.Progress)) (*cluster.BackupSession, error) {
	defer telling(ctx, func() { progress(repo.Progress{}) })()
	return p.Cluster.StartBackup(ctx, "pgkeep "+string(id), !p.SpreadCheckpoint)
}

// telling calls tell now and then, until the function that it returns is called.
func telling(ctx context.Context, tell func()) (done func()) {
	waiting, cancel := context.WithCancel(ctx)
	var w sync.WaitGroup
	w.Go(func() {
		for rest(waiting, lookEvery) == nil {
			tell()
		}
	})
	return func() {
		cancel()
		w.Wait()
	}
}

// countFor is how long counting may take: as long it holds back VACUUM, and
// whoever wants to alter one of the tables.
const countFor = 30 * time.Minute

// count notes the rows of the tables that were asked for. That they cannot be
// counted makes no backup worse: it is told, and restore tests say that they
// have nothing to compare.
func (p *Physical) count(ctx context.Context, d *PhysicalDetails, tell func()) error {
	if len(p.CountRows) == 0 {
		return nil
	}
	defer telling(ctx, tell)()
	limited, cancel := context.WithTimeout(ctx, countFor)
	defer cancel()
	var err error
	d.Counted, d.Uncounted, err = p.Cluster.CountRows(limited, p.CountRows)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if limited.Err() != nil {
		err = fmt.Errorf("not done within %v", countFor)
	}
	if err != nil {
		d.Uncounted = append(d.Uncounted, err.Error())
	}
	left := maxTables
	for i := range d.Counted {
		d.Counted[i].Tables = largest(d.Counted[i].Tables, left)
		left -= len(d.Counted[i].Tables)
	}
	d.Counted = slices.DeleteFunc(d.Counted, func(c cluster.Counted) bool { return len(c.Tables) == 0 })
	if n := len(d.Uncounted); n > 0 { // which name tables
		d.Uncounted = d.Uncounted[:min(n, maxNamed)]
		p.Log.Warn("rows were not counted as count_rows wants it; pgkeep show says why", "reasons", n)
	}
	return nil
}

// lookEvery is how often a copy looks whether all is as it was.
const lookEvery = 5 * time.Second

// copy is one attempt. What it reads counts only between its own start and
// stop: the label of one session with files of another would be no backup.
func (p *Physical) copy(ctx context.Context, r *repo.Repo, id repo.ID, total int64, s *cluster.BackupSession, progress func(repo.Progress)) (Copied, error) {
	begun := s.Start
	details := PhysicalDetails{DataDirectory: begun.DataDirectory}
	d, err := pgdata.Open(begun.DataDirectory, pgdata.Options{Config: begun.Config, LogDirectory: begun.LogDirectory,
		Note: func(path, what string) { p.Log.Warn("not copied", "path", path, "because", what) }})
	if err != nil {
		return Copied{}, err
	}
	defer d.Close()
	if err := keepDatabases(ctx, d, s); err != nil {
		return Copied{}, err
	}
	control, _, err := d.Control(ctx)
	if err == nil {
		err = begun.Check(control)
	}
	if err != nil {
		return Copied{}, err
	}
	details.Config = d.Config()
	spaces, err := d.Tablespaces()
	if err != nil {
		return Copied{}, err
	}
	for _, s := range spaces {
		details.Tablespaces = append(details.Tablespaces, Tablespace{s.OID, begun.Tablespaces[s.OID], s.Path})
	}

	ctx, cancel := context.WithCancelCause(ctx)
	gov := newGovernor(p.Pace)
	defer cancel(nil)
	watched, unwatch := context.WithCancel(ctx)
	var watching sync.WaitGroup
	var done atomic.Pointer[repo.Progress]
	done.Store(new(repo.Progress))
	watching.Go(func() { p.watch(ctx, watched, s, gov, func() { progress(*done.Load()) }, cancel) })
	defer watching.Wait()
	defer unwatch()
	check := pgdata.PageCheck{Start: begun.LSN, Now: func() (pg.LSN, error) { return s.Position(ctx) }}
	if !control.Checksums {
		check = pgdata.PageCheck{}
	}
	last := make(map[string]string) // the small files of the end
	damage, damagedFiles := 0, 0
	w, err := r.Begin(ctx, repo.Writing{Ref: p.ref(id), Total: total, Readers: p.Readers, Wait: gov.wait,
		Open: func(f *repo.File) (repo.Source, error) {
			if text, ok := last[f.Path]; ok {
				return memory{strings.NewReader(text)}, nil
			}
			src, err := d.OpenFile(ctx, dataFile(*f), check)
			if err != nil {
				return nil, err
			}
			f.Size = src.Size()
			return gov.timed(src), nil
		},
		Stored: func(e repo.Entry) {
			if len(e.Damaged) > 0 {
				damage, damagedFiles = damage+len(e.Damaged), damagedFiles+1
				details.damaged(e)
			}
		},
		Progress: func(pr repo.Progress) {
			done.Store(&pr)
			progress(pr)
		}})
	if err != nil {
		return Copied{}, err
	}
	defer w.Close()
	if err := w.Add(ctx, treeFiles(d.Files(ctx))); err != nil {
		return Copied{}, because(ctx, err)
	}
	_, pgControl, err := d.Control(ctx) // behind every page
	if err == nil {
		err = d.Present()
	}
	if err == nil {
		err = s.Check(ctx)
	}
	if err != nil {
		return Copied{}, because(ctx, err)
	}
	unwatch() // the session ends now, as it should
	watching.Wait()
	end, err := s.Stop(ctx)
	if err != nil {
		return Copied{}, because(ctx, err)
	}
	if end.Timeline != begun.Timeline { // the log between lies on two timelines: wait for the standby's next checkpoint
		return Copied{}, fmt.Errorf("the standby went from timeline %v to %v during the backup: %w", begun.Timeline, end.Timeline, fail.Promoted)
	}
	details.Label, details.TablespaceMap = end.Label, end.TablespaceMap
	last["data/backup_label"], last["data/global/pg_control"] = end.Label, string(pgControl)
	if strings.TrimSpace(end.TablespaceMap) != "" {
		last["data/tablespace_map"] = end.TablespaceMap
	}
	if err := w.Add(ctx, texts(last, end.Time)); err != nil {
		return Copied{}, because(ctx, err)
	}
	if err := p.count(ctx, &details, func() { progress(*done.Load()) }); err != nil {
		return Copied{}, because(ctx, err)
	}
	sealed, err := r.SealDetails(details)
	if err != nil {
		return Copied{}, err
	}
	content, err := w.Finish(ctx, &repo.PhysicalFacts{System: begun.System, Version: begun.Version, Start: begun.LSN, Stop: end.LSN, Timeline: begun.Timeline, StopTimeline: end.Timeline,
		StartedAt: begun.Time, StoppedAt: end.Time, Checkpoint: begun.Checkpoint, FirstWAL: begun.FirstWAL, LastWAL: end.LastWAL, SegmentSize: begun.SegmentSize,
		Checksums: control.Checksums, Damaged: damage, BlockSize: control.BlockSize, CatalogVersion: control.Catalog, ControlVersion: control.Version, DamagedFiles: damagedFiles, Tablespaces: len(details.Tablespaces), InRecovery: begun.InRecovery}, sealed)
	if err != nil {
		return Copied{}, because(ctx, err)
	}
	pr := done.Load()
	return Copied{PhysicalFacts: deref(content.Physical), Content: content, Kept: pr.Kept, Sent: pr.Sent, Uncounted: len(details.Uncounted)}, nil
}

// keepDatabases has the copy hold a directory for each database that was there
// when the backup began, whatever becomes of it. Replay may begin within CREATE
// DATABASE, write into the directory, and cannot make it. To remove one, the
// server makes a checkpoint first: if there was none yet, none is gone.
func keepDatabases(ctx context.Context, d *pgdata.Dir, s *cluster.BackupSession) error {
	if err := d.KeepDatabases(); err != nil {
		return err
	}
	redo, err := s.Redo(ctx)
	if err == nil && redo != s.Start.LSN {
		err = fmt.Errorf("%w: it began at %v, the checkpoint at %v", errOvertaken, s.Start.LSN, redo)
	}
	return err
}

// because prefers why the work was given up to how it noticed.
func because(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// watch ends the copy when its session does: what is read after that is worth
// nothing. And it looks at how far standbys are behind. It returns when while is
// done, and lets a question be answered first: cut off, it would end the session.
// waits is called while reading pauses.
func (p *Physical) watch(ctx, while context.Context, s *cluster.BackupSession, gov *governor, waits func(), stop context.CancelCauseFunc) {
	for rest(while, lookEvery) == nil {
		if err := s.Check(ctx); err != nil && ctx.Err() == nil {
			stop(err)
			return
		}
		if p.Pace.MaxLag == 0 {
			continue
		}
		lag, err := p.Cluster.StandbyLag(ctx)
		if err != nil && ctx.Err() == nil {
			p.Log.Warn("how far standbys are behind is not known", "error", err)
		}
		if gov.lagging(lag) {
			waits()
		}
	}
}

// dataFile is f as package pgdata knows it.
func dataFile(f repo.File) pgdata.File {
	return pgdata.File{Path: f.Path, Dir: f.Dir, Link: f.Link, Mode: f.Mode, Size: f.Size, Modified: f.Modified}
}

func treeFiles(files iter.Seq2[pgdata.File, error]) iter.Seq2[repo.File, error] {
	return func(yield func(repo.File, error) bool) {
		for f, err := range files {
			if !yield(repo.File{Path: f.Path, Dir: f.Dir, Link: f.Link, Mode: f.Mode, Size: f.Size, Modified: f.Modified}, err) {
				return
			}
		}
	}
}

func deref(f *repo.PhysicalFacts) repo.PhysicalFacts {
	if f == nil {
		return repo.PhysicalFacts{}
	}
	return *f
}

// Err says that the cluster itself is damaged, if it is. Such a backup is kept,
// and counts for nothing.
func (c Copied) Err(id repo.ID) error {
	if c.PhysicalFacts.Damaged == 0 {
		return nil
	}
	return fail.Hint(fmt.Errorf("backup %s has %d damaged pages of the cluster in it, in %d files: %w", id, c.PhysicalFacts.Damaged, c.DamagedFiles, fail.PageDamage),
		"pgkeep show "+string(id)+" names the files and blocks; keep the last clean backup, and look at the disk")
}

// Verify reads back what this backup has stored and compares it; of what older
// backups had stored and verified, it reads the directories, and a sample.
func (p *Physical) Verify(ctx context.Context, id repo.ID, progress func(repo.Progress)) (repo.Report, error) {
	r, err := p.Open(ctx)
	if err != nil {
		return repo.Report{}, err
	}
	content, err := r.Draft(ctx, p.ref(id))
	if err != nil {
		return repo.Report{}, err
	}
	own, scrub := p.ref(id).Own(), repo.Scrub(string(id), verify.ScrubShare)
	rep, err := r.Read(ctx, id, content, repo.Reading{Progress: progress, Packs: func(k repo.Pack) bool {
		return own(k) || scrub(k)
	}})
	if err == nil {
		err = rep.Err()
	}
	return rep, err
}

// WaitWAL waits until every segment that the copy needs is in the archive, and
// reads each of them back. progress counts in bytes of log; it is called when it
// moves, and while it waits.
func (p *Physical) WaitWAL(ctx context.Context, id repo.ID, progress func(done, total int64)) (archived string, err error) {
	r, err := p.Open(ctx)
	if err != nil {
		return "", err
	}
	content, err := r.Draft(ctx, p.ref(id))
	if err != nil {
		return "", err
	}
	f := deref(content.Physical)
	need, err := f.Segments()
	if err != nil {
		return "", err
	}
	size := int64(f.SegmentSize)
	a := repo.Archive{Cluster: p.Name, System: f.System, Major: f.Version.Major()}
	deadline := time.Now().Add(p.walWait())
	var mu sync.Mutex
	var there int64
	tell := func(more int64) {
		mu.Lock()
		defer mu.Unlock()
		there += more
		progress(there*size, int64(len(need))*size)
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(walReaders)
	for _, n := range need {
		g.Go(func() error {
			for wait := 50 * time.Millisecond; ; wait = min(2*wait, time.Second) { // mostly the last segment is on its way
				err := r.CheckWAL(gctx, a, n)
				if err == nil {
					tell(1)
					return nil
				}
				if !errors.Is(err, store.ErrNotExist) {
					return err
				}
				if time.Now().After(deadline) {
					return p.notArchived(gctx, n)
				}
				tell(0)
				if err := rest(gctx, wait); err != nil {
					return err
				}
			}
		})
	}
	if err := g.Wait(); err != nil {
		return "", err
	}
	return f.LastWAL, nil
}

// walReaders is how many segments are read back at a time. Each takes a request
// and little memory.
const walReaders = 4

// notArchived says why a segment may not have come.
func (p *Physical) notArchived(ctx context.Context, n pg.WALName) error {
	err := fmt.Errorf("segment %v is not in the archive, and the copy is worth nothing without: %w", n, fail.NotArchiving)
	if a, aerr := p.Cluster.WALArchived(ctx, 0); aerr == nil && a.Failing != "" {
		return fail.Hint(err, "archive_command fails on "+a.Failing+": PostgreSQL's log says why")
	}
	return fail.Hint(err, "is archive_command 'pgkeep-wal push %p', for this cluster and this repository? pgkeep wal audit tells what is there; on a standby, PostgreSQL archives when the primary begins a new segment")
}

// Publish makes the backup exist.
func (p *Physical) Publish(ctx context.Context, id repo.ID, pub Published) (repo.Manifest, error) {
	r, err := p.Open(ctx)
	if err != nil {
		return repo.Manifest{}, err
	}
	content, err := r.Draft(ctx, p.ref(id))
	if err != nil {
		return repo.Manifest{}, err
	}
	f := deref(content.Physical)
	m, err := r.Publish(ctx, repo.Manifest{Ref: p.ref(id), Kind: repo.Physical, Host: p.Host, System: f.System, Version: f.Version,
		StartedAt: pub.Started, FinishedAt: time.Now().UTC().Truncate(time.Millisecond), LSN: repo.LSNs{Timeline: f.StopTimeline, Before: f.Start, After: f.Stop, Archived: string(cluster.ArchiveDone), LastWAL: f.LastWAL}, Verified: pub.Verified,
		Workflow: pub.By.Workflow, Run: pub.By.Run})
	if err != nil {
		return repo.Manifest{}, err
	}
	if f.Damaged > 0 { // for scripts, the last clean one stays the newest
		return m, nil
	}
	return m, noteLatest(ctx, r, m, p.Log)
}

// texts are small files that stand nowhere, in path order.
func texts(content map[string]string, modified time.Time) iter.Seq2[repo.File, error] {
	return func(yield func(repo.File, error) bool) {
		for _, path := range slices.Sorted(maps.Keys(content)) {
			if !yield(repo.File{Path: path, Mode: 0o600, Size: int64(len(content[path])), Modified: modified}, nil) {
				return
			}
		}
	}
}

// memory is a file that stands nowhere.
type memory struct{ *strings.Reader }

func (memory) Close() error { return nil }
