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
	// Proof is how long a restore test that passed counts. 0: for ever.
	Proof time.Duration
}

// DefaultAge is for clusters without schedules.
const DefaultAge = 8 * 24 * time.Hour

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

// findAge looks for backups that should have been taken.
func (s Stored) findAge(f *findings, p Policy, now time.Time) {
	if len(p.Age) == 0 {
		p.Age = map[repo.Kind]time.Duration{"": DefaultAge}
	}
	for _, kind := range []repo.Kind{repo.Physical, repo.Logical, ""} {
		limit, ok := p.Age[kind]
		if !ok {
			continue
		}
		kinds, name, fix := []repo.Kind{kind}, string(kind)+" backup", "pgkeep backup --kind "+string(kind)+" "+s.Cluster
		if kind == "" {
			kinds, name, fix = nil, "backup", "pgkeep backup "+s.Cluster
		}
		newest, ok := s.Newest(kinds...)
		switch age := now.Sub(newest.FinishedAt); {
		case !ok:
			f.add("backup-missing", Critical, fix, "there is no %s", name)
		case age > 2*limit:
			f.add("backup-old", Critical, fix, "the newest %s is %s old, and should be %s at most", name, human.Span(age), human.Span(limit))
		case age > limit:
			f.add("backup-old", Warning, fix, "the newest %s is %s old, and should be %s at most", name, human.Span(age), human.Span(limit))
		}
	}
}

// findTests looks for what restore tests found, and for those not made.
func (s Stored) findTests(f *findings, p Policy, now time.Time, again string) {
	for _, b := range s.Backups {
		if t, ok := b.Tested(); ok && !t.Passed {
			why := t.Report.Public().Summary()
			f.add("test-failed", Critical, "pgkeep show "+string(b.ID)+" names what is wrong; then "+again+", and pgkeep restore-test --cluster "+s.Cluster+"; when that has passed: "+gone(b), "the restore test of backup %s failed: %s", b.ID, why)
		}
	}
	oldest := time.Time{}
	for _, b := range s.Backups {
		if b.Usable() {
			oldest = b.FinishedAt
			break
		}
	}
	fix := "pgkeep restore-test --cluster " + s.Cluster
	switch last, ok := s.Proven(); {
	case oldest.IsZero():
	case !ok:
		f.add("never-tested", Warning, fix, "no backup was ever restored for a test")
	case p.Proof > 0 && now.Sub(last.FinishedAt) > p.Proof:
		f.add("unproven", Warning, fix, "the last restore test that passed was %s ago, and should be %s ago at most", human.Span(now.Sub(last.FinishedAt)), human.Span(p.Proof))
	}
}
