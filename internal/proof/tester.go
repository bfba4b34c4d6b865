package proof

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// A Tester tests backups on this host, each in a sandbox of its own. A test is
// Plan, Restore, Recover, Check, Report and CleanUp, in this order. Each of them
// may be cut at any moment, also by the death of the process, and be called
// again; what is known so far stands in the sandbox.
type Tester struct {
	Host string
	Open func(context.Context) (*repo.Repo, error)
	// Prepare says how a server on this host gets the log of a cluster: Fetch and
	// Needs of what it returns count.
	Prepare func(cluster string) (restore.Physical, error)
	// Source is how to ask a cluster how far it is; nil, or not ok: it is not asked.
	Source     func(cluster string) (c cluster.Cluster, ok bool)
	Sandbox    sandbox.Options                  // Name is not looked at
	Policy     Policy                           // of requests without one; "": Newest
	Limit      time.Duration                    // for all of a test; 0: none
	Jobs       int                              // as Test.Jobs
	Thorough   bool                             // as Test.Thorough, of all requests
	Assertions func(cluster string) []Assertion // nil: none
	Log        *slog.Logger                     // of pg_restore; nil: nothing is logged
}

// A Request asks for a test.
type Request struct {
	Cluster string  `json:"cluster"`
	Backup  repo.ID `json:"backup,omitempty"` // "": by policy
	Policy  Policy  `json:"policy,omitempty"` // "": the Tester's
	// Target of a physical backup. Nil: by policy, and else the end of the archive.
	Target *restore.Target `json:"target,omitempty"`
	// Thorough as Test.Thorough.
	Thorough bool `json:"thorough,omitempty"`
}

// A Subject is what a test is of. It is fixed before the test begins, and stands
// in workflow histories: it names neither paths nor anything in the data.
type Subject struct {
	Test repo.ID `json:"test"` // its name, made as a backup's
	repo.Ref
	Kind    repo.Kind      `json:"kind"`
	Target  restore.Target `json:"target"`
	Started time.Time      `json:"started_at"`
	Owner   backup.Owner   `json:"owner"`
	Process int            `json:"process,omitempty"` // that makes the test, where no workflow does
	Source  Position       `json:"source,omitzero"`   // at the test's start; zero: not known
	Bytes   int64          `json:"bytes"`             // of the backup's files
	Stored  int64          `json:"stored"`
	Limit   time.Duration  `json:"limit,omitempty"` // nanoseconds; 0: none
	// Thorough as Test.Thorough.
	Thorough bool `json:"thorough,omitempty"`
}

// Progress tells how far a step is: bytes, if there are any to count. It may be
// called from several goroutines.
type Progress func(doing string, done, total int64)

// Plan chooses what to test and makes the sandbox. Sandboxes of the same
// workflow's other runs are removed. name is the test's.
func (t *Tester) Plan(ctx context.Context, q Request, name repo.ID, started time.Time, by backup.Owner) (Subject, error) {
	s := Subject{Test: name, Started: started, Owner: by, Limit: t.Limit, Thorough: q.Thorough || t.Thorough}
	if by == (backup.Owner{}) {
		s.Process = os.Getpid()
	}
	_, err := t.Collect(ctx, func(other Subject) bool {
		return by.Run != "" && other.Owner.Namespace == by.Namespace && other.Owner.Workflow == by.Workflow && other.Owner.Run != by.Run
	})
	if err != nil {
		return s, err
	}
	r, err := t.Open(ctx)
	if err != nil {
		return s, err
	}
	if err := t.choose(ctx, r, q, &s); err != nil {
		return s, fmt.Errorf("restore test of %s: %w", q.Cluster, err)
	}
	if t.Source != nil {
		if c, ok := t.Source(q.Cluster); ok {
			asking, cancel := context.WithTimeout(ctx, 30*time.Second)
			at, err := c.Position(asking)
			cancel()
			if err == nil { // else it is not known, and the test goes on: it may be all that is left
				s.Source = Position(at)
			}
		}
	}
	b, err := t.take(ctx, s)
	if err != nil {
		return s, err
	}
	defer b.Release()
	if _, err := b.Try(); err != nil { // before hours are spent
		return s, err
	}
	return s, b.save()
}

// choose fills in what is tested.
func (t *Tester) choose(ctx context.Context, r *repo.Repo, q Request, s *Subject) error {
	all, err := r.Backups(ctx, q.Cluster)
	if err != nil {
		return err
	}
	usable := slices.DeleteFunc(all, func(b repo.Listed) bool {
		return b.Unfinished || q.Backup != "" && b.ID != q.Backup || q.Backup == "" && (b.Err != nil || q.Target != nil && b.Physical == nil)
	})
	if q.Backup != "" && len(usable) > 0 && usable[0].Err != nil {
		return usable[0].Err
	}
	if q.Target != nil && len(usable) > 0 && usable[0].Kind == repo.Logical {
		return fmt.Errorf("backup %s is logical, and has one moment, its own: %w", q.Backup, fail.BadConfig)
	}
	s.Target = restore.Target{Kind: restore.Latest}
	id := q.Backup
	switch {
	case q.Target != nil: // one that cannot be reached says nothing about a backup
		s.Target = *q.Target
		var plan restore.PhysicalPlan
		plan, err = t.reach(ctx, r, repo.Ref{Cluster: q.Cluster, ID: id}, s.Target)
		id = plan.Backup.ID
	case id == "":
		id, err = t.pick(ctx, r, q, s, usable)
	}
	if err != nil {
		return err
	}
	for _, b := range usable {
		if b.ID == id {
			s.Ref, s.Kind, s.Bytes, s.Stored = b.Ref, b.Kind, b.Bytes, b.Stored
			if q.Target == nil && b.Physical != nil && s.Target.Kind == restore.Latest {
				// That another timeline is the newest, or that nothing of its log is
				// archived yet, says nothing about a backup, which has its own.
				if _, err := t.reach(ctx, r, b.Ref, s.Target); errors.Is(err, fail.Unreachable) {
					s.Target.Timeline = restore.CurrentTimeline
				}
			}
			return nil
		}
	}
	return fmt.Errorf("there is no such backup: %w", fail.NoBackup)
}

// pick follows the policy.
func (t *Tester) pick(ctx context.Context, r *repo.Repo, q Request, s *Subject, usable []repo.Listed) (repo.ID, error) {
	policy := cmp.Or(q.Policy, t.Policy, Newest)
	var from []Candidate
	for _, b := range usable {
		c := Candidate{ID: string(b.ID), Kind: b.Kind, At: b.FinishedAt}
		if b.Physical != nil {
			c.At = b.Physical.StoppedAt
		}
		if policy != Random {
			proofs, err := r.Proofs(ctx, b.Ref)
			if err != nil {
				return "", err
			}
			c.Proven = Judge(proofs, time.Now()).At
			for _, p := range proofs {
				if Counts(p, time.Now()) && p.FinishedAt.After(c.Tested) {
					c.Tested = p.FinishedAt
				}
			}
		}
		if policy == RandomMoment && b.Physical != nil {
			at, err := t.reach(ctx, r, b.Ref, restore.Target{Kind: restore.Latest})
			if err != nil && !nowhere(err) {
				return "", err
			}
			if err == nil && at.Last != nil {
				c.Until = at.Last.Time
			}
		}
		from = append(from, c)
	}
	for try := range 5 { // between a commit and the end of the log there may be nothing to stop at
		choice, err := Pick(policy, string(s.Test)+strings.Repeat("+", try), from)
		if err != nil || choice.At.IsZero() {
			return repo.ID(choice.ID), err
		}
		target := restore.Target{Kind: restore.ToTime, Time: choice.At}
		plan, err := t.reach(ctx, r, repo.Ref{Cluster: q.Cluster}, target)
		if err == nil {
			s.Target = target
			return plan.Backup.ID, nil
		}
		if !nowhere(err) {
			return "", err
		}
	}
	choice, err := Pick(Newest, "", from)
	return repo.ID(choice.ID), err
}

// nowhere reports whether an error of reach says that there is no such way, and not
// that nobody knows.
func nowhere(err error) bool {
	return errors.Is(err, fail.Unreachable) || errors.Is(err, fail.WALHole) || errors.Is(err, fail.NoBackup)
}

// reach finds the way of a restore to a moment.
func (t *Tester) reach(ctx context.Context, r *repo.Repo, b repo.Ref, target restore.Target) (restore.PhysicalPlan, error) {
	return restore.Physical{Repo: r, Cluster: b.Cluster, Backup: b.ID, Target: target}.Reach(ctx)
}

// Restore brings the files of the backup into the sandbox; of a logical one, all
// of its databases into a cluster made there. An error is not the verdict: the
// caller decides how often to try, and tells Report of the last.
func (t *Tester) Restore(ctx context.Context, s Subject, tell Progress) (Report, error) {
	return t.step(ctx, s, tell, (*bench).restore)
}

// Recover brings restored files to the target. What it finds wrong is in the
// report, which ends the test.
func (t *Tester) Recover(ctx context.Context, s Subject, tell Progress) (Report, error) {
	return t.step(ctx, s, tell, (*bench).recover)
}

// Check opens what Recover left, and looks at all there is in it.
func (t *Tester) Check(ctx context.Context, s Subject, tell Progress) (Report, error) {
	return t.step(ctx, s, tell, (*bench).check)
}

// Report gives the verdict and writes it into the repository, signed. trouble is
// the error that ended the test before its checks did, if one did. The report is
// returned without what only those may see who may read the backup; the same
// finished makes the same proof, however often this is called.
func (t *Tester) Report(ctx context.Context, s Subject, finished time.Time, trouble error) (Report, error) {
	b, err := t.take(ctx, s)
	if err != nil {
		return Report{}, err
	}
	defer b.Release()
	rep := b.Found
	rep.Finished = finished.UTC()
	if trouble != nil {
		c := failed(cmp.Or(stepCheck[b.Stage], CheckFiles), trouble)
		rep.Checks = append(rep.Checks, c)
	} else if b.Stage != checked && !rep.Failed() {
		rep.Checks = append(rep.Checks, failed(CheckReplay, fail.With(fail.Stalled, errors.New("the test did not come to its end: its sandbox was lost"))))
	}
	rep.judge()
	r, err := t.Open(ctx)
	if err != nil {
		return rep.Public(), err
	}
	p := repo.Proof{Ref: s.Ref, Test: s.Test, Host: t.Host, FinishedAt: rep.Finished, Passed: rep.Verdict == Passed}
	p.Trouble = !Answered(p, rep)
	if p.Report, err = json.Marshal(rep.Public()); err != nil {
		return rep.Public(), err
	}
	if p.Details, err = r.SealDetails(rep); err != nil {
		return rep.Public(), err
	}
	return rep.Public(), r.WriteProof(ctx, p)
}

// CleanUp removes the sandbox of a test, whatever is in it.
func (t *Tester) CleanUp(ctx context.Context, s Subject) error {
	if _, err := os.Stat(t.Sandbox.Parent); errors.Is(err, fs.ErrNotExist) {
		return nil // it could never be made, and is not made to be removed
	}
	sb, err := t.make(ctx, s)
	if err == nil {
		err = sb.Remove()
	}
	return err
}

// Collect removes the sandboxes that nobody uses of tests that are gone: those
// of which gone says so, those of a process that has ended, and those that hold
// no word of whose they are. It returns the names of the tests.
func (t *Tester) Collect(ctx context.Context, gone func(Subject) bool) (removed []string, err error) {
	return sandbox.Collect(ctx, t.Sandbox.Parent, func(_ string, note []byte) bool {
		var n notes
		if len(note) == 0 || json.Unmarshal(note, &n) != nil {
			return false
		}
		if p := n.Subject.Process; p != 0 {
			return syscall.Kill(p, 0) == nil || p == os.Getpid()
		}
		return !gone(n.Subject)
	})
}

func (t *Tester) make(ctx context.Context, s Subject) (*sandbox.Sandbox, error) {
	opt := t.Sandbox
	opt.Name = string(s.Test)
	sb, err := sandbox.Make(ctx, opt)
	if errors.Is(err, fail.AlreadyRunning) { // an attempt that was given up, and does not know yet
		err = fail.With(fail.Stopping, err)
	}
	return sb, full(err)
}

// full gives its kind to the error of a full disk.
func full(err error) error {
	if err != nil && (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)) && fail.KindOf(err) == fail.Unknown {
		return fail.With(fail.NoSpace, err)
	}
	return err
}

// step takes up the sandbox of a test and does one step of it, within the limit.
func (t *Tester) step(ctx context.Context, s Subject, tell Progress, do func(*bench, context.Context) error) (Report, error) {
	b, err := t.take(ctx, s)
	if err != nil {
		return Report{}, err
	}
	defer b.Release()
	if tell == nil {
		tell = func(string, int64, int64) {}
	}
	b.tell = tell
	limited := ctx
	if s.Limit > 0 {
		var cancel context.CancelFunc
		limited, cancel = context.WithDeadline(ctx, s.Started.Add(s.Limit))
		defer cancel()
	}
	working, stop := context.WithCancel(ctx)
	defer b.watch(working)()
	defer stop()
	if err = limited.Err(); err == nil {
		err = do(b, limited)
	}
	if limited.Err() != nil && ctx.Err() == nil && b.Stage != checked {
		late := failed(CheckTime, fail.With(fail.Stalled, fmt.Errorf("not done within %v", s.Limit)))
		b.Found.Checks = append(slices.DeleteFunc(b.Found.Checks, func(c Check) bool { return c.Name == CheckTime }), late)
		err = b.save()
	}
	return b.Found.Public(), full(err)
}
