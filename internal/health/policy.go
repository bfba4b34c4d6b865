package health

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/human"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Policy says what is expected of the backups of a cluster.
type Policy struct {
	// Age is how old the newest backup of a kind may be. Empty: the newest of
	// any kind, DefaultAge.
	Age map[repo.Kind]time.Duration
	// Proof is how old the newest moment of a kind may be that a restore test
	// has shown to come back. 0: of any age.
	Proof time.Duration
}

// DefaultAge is for clusters without schedules.
const DefaultAge = 8 * 24 * time.Hour

// Limit is how old the newest backup of a kind may be; 0: none is expected.
// Without schedules that is asked of the kind that was taken last, or if none is
// sound of every kind that there is.
func (s Stored) Limit(p Policy, kind repo.Kind, now time.Time) time.Duration {
	if len(p.Age) > 0 {
		return p.Age[kind]
	}
	if b, ok := s.Newest(now); ok && b.Kind == kind || !ok && s.Has(kind) {
		return DefaultAge
	}
	return 0
}

// ProofLimit is how old the newest moment of a kind may be that a test has shown
// to come back; 0: of any age. No proof is newer than the backup that it is of.
func (p Policy) ProofLimit(kind repo.Kind) time.Duration {
	if p.Proof == 0 {
		return 0
	}
	return max(p.Proof, p.Age[kind])
}

// Findings are what is wrong with what the repository holds, by severity.
func (s Stored) Findings(p Policy, now time.Time) []Finding {
	f := &findings{cluster: s.Cluster}
	again := "pgkeep backup " + s.Cluster

	for _, b := range s.Backups {
		switch {
		case b.Err != nil:
			f.add("backup-damaged", Critical, again+"; then "+gone(b), "backup %s cannot be believed: %v", b.ID, b.Err)
		case b.Physical != nil && b.Physical.Damaged > 0:
			f.add("page-damage", Critical, "pgkeep show "+string(b.ID)+" names the files: look at the disk, and keep the last clean backup; when the next one is clean too: "+gone(b),
				"%s of the cluster were damaged when backup %s was taken", human.Count(b.Physical.Damaged, "page"), b.ID)
		}
	}
	s.findClocks(f, now, again)
	s.findAge(f, p, now)
	s.findTests(f, p, now, again)

	if holes := s.Holes(); len(holes) > 0 {
		files, names := 0, []string{}
		for _, h := range holes {
			files += h.Count
			names = append(names, h.String())
		}
		if n := len(names); n > 3 {
			names = append(names[:3], fmt.Sprintf("and in %d more places", n-3))
		}
		f.add("wal-hole", Critical, "pgkeep wal audit --fill --cluster "+s.Cluster+" where the server's pg_wal is; if nobody has them: "+again+", and pgkeep delete the older backups once you can do without them",
			"%s missing from the archive: %s", human.Count(files, "file"), strings.Join(names, ", "))
	}
	for _, a := range s.Archives {
		for _, b := range a.Stuck {
			f.add("backup-stuck", Critical, "pgkeep wal audit --fill --cluster "+s.Cluster+" where the server's pg_wal is; if nobody has them: "+again+"; then pgkeep delete --cluster "+s.Cluster+" "+b.ID,
				"backup %s cannot be used: the archive lacks segments between %v and %v", b.ID, b.Start, b.Stop)
		}
	}
	slices.SortStableFunc(f.all, BySeverity)
	return f.all
}

// gone is how a backup that is no good stops being told of.
func gone(b Backup) string { return "pgkeep delete --cluster " + b.Cluster + " " + string(b.ID) }

// findClocks looks for what is dated in the future: what was seen last may then
// have been long ago.
func (s Stored) findClocks(f *findings, now time.Time, again string) {
	for _, b := range s.Backups {
		what, host, at := "backup "+string(b.ID), b.Host, b.FinishedAt
		for _, t := range b.Tests {
			if t.Err == nil && Early(t.FinishedAt, now) {
				what, host, at = "a restore test of backup "+string(b.ID), t.Host, t.FinishedAt
			}
		}
		if b.Usable() && Early(at, now) {
			f.add("clock-skew", Critical, "set the clocks of this host and of "+host+" with chrony or systemd-timesyncd; then "+again+"; when that is proven: "+gone(b),
				"%s is dated %s in the future: a clock is or was wrong, and it counts for nothing", what, human.Span(at.Sub(now)))
		}
	}
}

// findAge looks for backups that should have been taken.
func (s Stored) findAge(f *findings, p Policy, now time.Time) {
	expected := false
	for _, kind := range []repo.Kind{repo.Physical, repo.Logical} {
		limit := s.Limit(p, kind, now)
		if limit == 0 {
			continue
		}
		expected = true
		fix := "pgkeep backup --kind " + string(kind) + " " + s.Cluster
		newest, ok := s.Newest(now, kind)
		switch age := now.Sub(newest.FinishedAt); {
		case !ok && s.Has(kind):
			f.add("backup-missing", Critical, fix, "there is no %s backup that counts: of each that there is, something is wrong", kind)
		case !ok:
			f.add("backup-missing", Critical, fix, "there is no %s backup", kind)
		case age > limit:
			f.add("backup-old", severe(age > 2*limit), fix, "the newest %s backup is %s old, and should be %s at most", kind, human.Span(age), human.Span(limit))
		}
	}
	if !expected {
		f.add("backup-missing", Critical, "pgkeep backup "+s.Cluster, "there is no backup")
	}
}

// findTests looks for what restore tests found, and for those not made.
func (s Stored) findTests(f *findings, p Policy, now time.Time, again string) {
	failed := map[repo.Kind]bool{}
	for _, b := range s.Backups {
		if t, ok := b.Tested(now); ok && !t.Passed {
			failed[b.Kind] = true
			why := t.Report.Public().Summary()
			f.add("test-failed", Critical, "pgkeep show "+string(b.ID)+" names what is wrong; then "+again+", and pgkeep restore-test --cluster "+s.Cluster+"; when that has passed: "+gone(b), "the restore test of backup %s failed: %s", b.ID, why)
		}
	}
	for _, kind := range []repo.Kind{repo.Physical, repo.Logical} {
		newest, ok := s.Newest(now, kind)
		if !ok {
			continue // of which nothing can be shown
		}
		fix := "pgkeep restore-test --cluster " + s.Cluster + " " + string(newest.ID)
		proven, ok := s.Proven(now, kind)
		limit := p.ProofLimit(kind)
		switch age := now.Sub(proven.Moment); {
		case !ok && !failed[kind]: // else it is told
			f.add("never-tested", Warning, fix, "no %s backup that there is was ever seen to restore", kind)
		case ok && limit > 0 && age > limit:
			f.add("unproven", Warning, fix, "the newest moment that a restore test of a %s backup brought back is %s ago (backup %s), and should be %s ago at most", kind, human.Span(age), proven.ID, human.Span(limit))
		}
	}
}
