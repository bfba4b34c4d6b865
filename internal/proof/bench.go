package proof

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// A bench is a sandbox with what is known of the test in it.
type bench struct {
	*sandbox.Sandbox
	notes
	tester *Tester
	tell   Progress
}

// notes stand in the sandbox.
type notes struct {
	Subject Subject  `json:"subject"`
	Stage   stage    `json:"stage"`
	Boot    string   `json:"boot,omitempty"` // of the host, when the stage was reached
	Expect  expected `json:"expect"`
	Fetch   []Phase  `json:"fetch,omitempty"`
	Found   Report   `json:"report"`
}

// A stage is what has been done with a sandbox.
type stage string

const (
	untouched  stage = ""
	restored   stage = "restored"   // the files are those of the backup
	recovering stage = "recovering" // they are not any more
	recovered  stage = "recovered"
	checked    stage = "checked"
)

// stepCheck is the check that fails where a step cannot be done.
var stepCheck = map[stage]string{untouched: CheckFiles, restored: CheckReplay, recovering: CheckReplay, recovered: CheckOpen}

// expected is the part of a Test that can be written down.
type expected struct {
	Command  string         `json:"restore_command,omitempty"`
	Target   sandbox.Target `json:"target"`
	Follow   pg.Timeline    `json:"follow,omitempty"`
	System   pg.SystemID    `json:"system,omitempty"`
	AtLeast  pg.LSN         `json:"at_least,omitempty"`
	Timeline pg.Timeline    `json:"timeline,omitempty"`
	Bytes    int64          `json:"bytes"`

	Rows    map[string]map[string]int64 `json:"rows,omitempty"`
	Halts   []restore.Halt              `json:"halts,omitempty"`
	Unknown string                      `json:"unknown,omitempty"`
}

func writeDown(t Test) expected {
	return expected{t.Recovery.Command, t.Recovery.Target, t.Recovery.Follow, t.System, t.AtLeast, t.Timeline, t.Bytes, t.Rows, t.Halts, t.Unknown}
}

// take opens the sandbox of a test, and reads what stands in it.
func (t *Tester) take(ctx context.Context, s Subject) (*bench, error) {
	sb, err := t.make(ctx, s)
	if err != nil {
		return nil, err
	}
	b := &bench{Sandbox: sb, tester: t}
	note, err := sb.Note()
	if err == nil && len(note) > 0 {
		err = json.Unmarshal(note, &b.notes)
	}
	if err != nil {
		sb.Release()
		return nil, fmt.Errorf("what is known of test %s: %w", s.Test, err)
	}
	b.notes.Subject = s
	b.Found.Started = s.Started
	return b, nil
}

func (b *bench) save() error {
	text, err := json.Marshal(b.notes)
	if err == nil {
		err = b.WriteNote(text)
	}
	if err != nil {
		return full(fmt.Errorf("note what is known of test %s: %w", b.notes.Subject.Test, err))
	}
	return nil
}

// reach notes that a stage is reached.
func (b *bench) reached(s stage) error {
	b.Stage, b.Boot = s, bootID()
	return b.save()
}

// bootID tells one run of the kernel from another: the server that is checked
// does not sync, and what it wrote may be lost with the host.
func bootID() string {
	text, _ := os.ReadFile("/proc/sys/kernel/random/boot_id") // where there is none, all are one
	return strings.TrimSpace(string(text))
}

// test is what is tested, and how.
func (b *bench) test() Test {
	s, e := b.notes.Subject, b.Expect
	t := Test{Sandbox: b.Sandbox, Source: s.Source, System: e.System, AtLeast: e.AtLeast, Timeline: e.Timeline, Bytes: e.Bytes,
		Rows: e.Rows, Halts: e.Halts, Unknown: e.Unknown, Jobs: b.tester.Jobs,
		Thorough: s.Thorough, Day: s.Started, Progress: func(doing string) { b.tell(doing, 0, 0) }}
	for _, p := range b.Fetch {
		t.Fetched += time.Duration(p.Seconds * float64(time.Second))
	}
	if s.Kind == repo.Physical {
		t.Recovery = &sandbox.Recovery{Command: e.Command, Target: e.Target, Follow: e.Follow}
	}
	if b.tester.Assertions != nil {
		t.Assertions = b.tester.Assertions(s.Cluster)
	}
	return t
}

// restore brings the files, unless they are there.
func (b *bench) restore(ctx context.Context) error {
	if b.Stage != untouched {
		return nil
	}
	return b.fetch(ctx)
}

// recover replays the log, from files that are those of the backup.
func (b *bench) recover(ctx context.Context) error {
	if b.Stage == recovered || b.Stage == checked || b.Found.Failed() {
		return nil
	}
	if b.Stage != restored { // an attempt was cut: how far it had come, nobody knows
		if err := b.fetch(ctx); err != nil {
			return err
		}
	}
	if err := b.reached(recovering); err != nil {
		return err
	}
	t := b.test()
	rep := Report{Started: b.notes.Subject.Started, Source: t.Source, Phases: b.Fetch, RTO: t.Fetched.Seconds()}
	if t.Recovery != nil {
		rep.Target = t.Recovery.Target
		t.replay(ctx, &rep)
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	for _, c := range rep.Checks {
		if c.Verdict == Failed && c.Kind == fail.StoreDown { // nothing was learned; another try starts over
			return fail.With(c.Kind, errors.New(c.Message))
		}
	}
	b.Found = rep
	return b.reached(recovered)
}

// check looks at what recovery left.
func (b *bench) check(ctx context.Context) error {
	if b.Stage == checked || b.Found.Failed() {
		return nil
	}
	if b.Stage != recovered || b.Boot != bootID() {
		if b.Stage == recovered {
			b.Stage = recovering
		}
		if err := b.recover(ctx); err != nil || b.Found.Failed() {
			return err
		}
	}
	t, rep := b.test(), b.Found
	if b.notes.Subject.Kind == repo.Logical {
		t.Skip = append(t.Skip, CheckChecksums) // of pages written just now
	}
	t.look(ctx, &rep, t.open(ctx, &rep))
	if err := ctx.Err(); err != nil {
		return err
	}
	b.Found = rep
	return b.reached(checked)
}

// fetch makes the files those of the backup, whatever is there.
func (b *bench) fetch(ctx context.Context) error {
	b.Stage, b.Found, b.Fetch = untouched, Report{Started: b.notes.Subject.Started}, nil
	if err := b.save(); err != nil {
		return err
	}
	r, err := b.tester.Open(ctx)
	if err != nil {
		return err
	}
	if b.notes.Subject.Kind == repo.Logical {
		err = b.load(ctx, r)
	} else {
		err = b.bring(ctx, r)
	}
	if err != nil {
		return full(err)
	}
	return b.reached(restored)
}

// bring restores a physical backup. What an attempt before has left is kept, as
// far as it is right.
func (b *bench) bring(ctx context.Context, r *repo.Repo) error {
	s := b.notes.Subject
	p, err := b.tester.Prepare(s.Cluster)
	if err != nil {
		return err
	}
	p.Repo, p.Cluster, p.Backup, p.Target, p.Dir, p.Delta = r, s.Cluster, s.ID, s.Target, b.Data(), true
	if p.Tablespaces, err = b.places(ctx, p); err != nil {
		return err
	}
	begun := time.Now()
	if err := os.Remove(filepath.Join(p.Dir, "postmaster.pid")); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err // it names a process of another namespace
	}
	plan, err := p.Plan(ctx)
	if k := fail.KindOf(err); k == fail.NotEmpty || k == fail.WrongSystem { // what was cut left nothing to go on from
		if err := b.Empty(); err != nil {
			return err
		}
		plan, err = p.Plan(ctx)
	}
	if err != nil {
		return err
	}
	if closed := p.Closed(plan); len(closed) > 0 {
		return fail.Hint(fmt.Errorf("restore test: %s may not read %d of the files with which it gets its log: %w", plan.Owner, len(closed), fail.BadConfig),
			"make configuration and keys readable for that user, or name as restore_test.user one who may read them")
	}
	p.Progress = func(doing string, done, total int64) { b.tell(doing, done, total) }
	if _, err := p.Run(ctx, plan); err != nil {
		return err
	}
	expect := Expect(p, plan)
	if expect.Halts, expect.Unknown, err = p.Halts(ctx, plan); err != nil {
		if ctx.Err() != nil {
			return err
		}
		expect.Unknown = "what was counted, or the log of that moment, cannot be read" // replay will tell
	}
	b.Expect = writeDown(expect)
	b.Fetch = []Phase{{Name: Fetch, Seconds: time.Since(begun).Seconds(), Bytes: plan.Bytes}}
	return nil
}

// places puts all tablespaces into the sandbox.
func (b *bench) places(ctx context.Context, p restore.Physical) (map[string]string, error) {
	oids, err := p.TablespaceOIDs(ctx)
	to := make(map[string]string)
	for _, oid := range oids {
		to[oid] = filepath.Join(b.Tablespaces(), oid)
	}
	return to, err
}

// load restores all databases of a logical backup into an empty cluster.
func (b *bench) load(ctx context.Context, r *repo.Repo) (err error) {
	m, err := r.Backup(ctx, b.notes.Subject.Ref)
	if err != nil {
		return err
	}
	details, err := restore.Details(r, m)
	if err != nil {
		return err
	}
	if err := b.Empty(); err != nil {
		return err
	}
	if err := b.Create(ctx, m.Version.Major()); err != nil {
		return err
	}
	if err := b.Open(ctx); err != nil {
		return err
	}
	var mu sync.Mutex
	begun, spent, stage := time.Now(), make(map[string]time.Duration), restore.Fetching
	turn := func(next string) {
		mu.Lock()
		defer mu.Unlock()
		spent[stage] += time.Since(begun)
		begun, stage = time.Now(), next
	}
	for _, db := range details.Databases {
		turn(restore.Fetching)
		l := restore.Logical{Repo: r, Manifest: m, Target: cluster.Cluster{Conninfo: b.Conninfo(), BinDir: b.tester.Sandbox.BinDir}, Database: db.Name,
			NoTablespaces: true, Jobs: max(1, b.tester.Jobs), Scratch: b.Tablespaces(), Log: b.tester.Log,
			Progress: func(doing string, done, total int64) {
				if doing == restore.Restoring && done == 0 {
					turn(doing)
				}
				b.tell(doing, done, total)
			}}
		if err := b.loadOne(ctx, l); err != nil {
			return err
		}
	}
	turn("")
	b.Expect = expected{Bytes: m.Bytes, Rows: rowsOf(details)}
	if b.Expect.Rows == nil {
		b.Expect.Unknown = "no rows were counted when the backup was taken"
	}
	b.Fetch = []Phase{{Name: Fetch, Seconds: spent[restore.Fetching].Seconds(), Bytes: m.Bytes}, {Name: Load, Seconds: spent[restore.Restoring].Seconds(), Bytes: m.Bytes}}
	return b.Close(ctx)
}

// rowsOf are the rows that tables of a logical backup have; nil: they were not
// counted.
func rowsOf(d backup.Details) map[string]map[string]int64 {
	rows := make(map[string]map[string]int64)
	for _, db := range d.Databases {
		for _, t := range db.Rows {
			if rows[db.Name] == nil {
				rows[db.Name] = make(map[string]int64)
			}
			rows[db.Name][t.String()] = t.Rows
		}
	}
	if len(rows) == 0 {
		return nil
	}
	return rows
}

// loadOne restores a database, with owners and grants: roles that are missing
// are made, and can do nothing.
func (b *bench) loadOne(ctx context.Context, l restore.Logical) error {
	plan, err := l.Plan(ctx)
	if len(plan.Missing) > 0 {
		if err := b.makeRoles(ctx, plan.Missing); err != nil {
			return err
		}
		plan, err = l.Plan(ctx)
	}
	if err != nil {
		return err
	}
	return l.Run(ctx, plan)
}

func (b *bench) makeRoles(ctx context.Context, names []string) error {
	conn, err := b.Connect(ctx, "template1")
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var sql bytes.Buffer
	for _, name := range names {
		fmt.Fprintf(&sql, "CREATE ROLE %s;", pgx.Identifier{name}.Sanitize())
	}
	_, err = conn.Exec(ctx, sql.String(), pgx.QueryExecModeSimpleProtocol)
	return err
}

// watch tells of progress as long as what runs in the sandbox works, until ctx
// ends. The function it returns waits for that.
func (b *bench) watch(ctx context.Context) (wait func()) {
	tell := b.tell
	var mu sync.Mutex
	var doing string
	var done, total int64
	b.tell = func(what string, d, t int64) {
		mu.Lock()
		doing, done, total = what, d, t
		mu.Unlock()
		tell(what, d, t)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for last := uint64(0); ; {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if now := b.Work(); now != last {
				last = now
				mu.Lock()
				what, d, t := doing, done, total
				mu.Unlock()
				tell(what, d, t)
			}
		}
	})
	return wg.Wait
}
