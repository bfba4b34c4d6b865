package restore_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// object is where a file of the archive stands.
func (s *site) object(name string) string {
	s.t.Helper()
	found, _ := filepath.Glob(filepath.Join(s.dir, "repository/clusters/main/wal/*", name[:8], name+".zst"))
	if len(found) != 1 {
		s.t.Fatalf("%s: found %v", name, found)
	}
	return found[0]
}

// opened starts a server on what was restored, waits until it has opened, and
// returns its rows.
func (s *site) opened(p restore.Physical) []int32 {
	s.t.Helper()
	server, err := s.start(p, nil)
	if err != nil {
		s.t.Fatal(err)
	}
	defer server.Kill()
	return seqs(s.t, server)
}

// A mistake on timeline 1 was undone by a restore to the moment before it, which
// began timeline 2. Of that, nothing but its history was archived yet, and timeline
// 1 had filled the segment in which it was left. A restore to the latest moment
// brought the mistake back, and said that all was well.
func TestTheLatestMomentBringsBackNothingThatWasUndone(t *testing.T) {
	s := newSite(t)
	s.rows(5)
	s.take()
	s.rows(5)
	s.exec("SELECT pg_create_restore_point('fork')")
	atFork := seqs(t, s.pg)
	s.rows(30) // the mistake
	s.archived()
	s.pg.Stop()
	p := s.physical("successor", restore.Target{Kind: restore.ToName, Name: "fork"})
	p.Takeover = true
	s.restored(p)
	more := s.archiving()
	more["hot_standby"] = "on"
	successor, err := s.start(p, more)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { successor.Stop() }()
	s.until("the successor opens", func() bool { return !query[bool](t, successor, "SELECT pg_is_in_recovery()") })
	s.until("its history is archived", func() bool {
		found, _ := filepath.Glob(filepath.Join(s.dir, "repository/clusters/main/wal/*/00000002/00000002.history.zst"))
		return len(found) == 1
	})
	s.own()
	history, err := os.ReadFile(filepath.Join(successor.DataDir, "pg_wal/00000002.history"))
	if err != nil {
		t.Fatal(err)
	}
	forks, err := pg.ParseHistory(2, string(history))
	if err != nil {
		t.Fatal(err)
	}
	left, err := pg.SegmentName(1, forks[0].At, 1<<20)
	if err != nil {
		t.Fatal(err)
	}

	for what, standby := range map[string]bool{"a server": false, "a standby": true} {
		p := s.physical("refused", latestMoment)
		p.Standby = standby
		_, err := p.Plan(t.Context())
		hint := fail.HintOf(err)
		if want := "--timeline 1 --to-lsn " + forks[0].At.String() + " --exclusive"; !errors.Is(err, fail.Unreachable) || !strings.Contains(hint, want) || !strings.Contains(hint, "pg_switch_wal()") {
			t.Errorf("%s: %v; %s", what, err, hint)
		}
	}
	p = s.physical("as-advised", restore.Target{Kind: restore.ToLSN, LSN: forks[0].At, Exclusive: true, Timeline: 1})
	s.restored(p)
	if diff := cmp.Diff(atFork, s.opened(p)); diff != "" {
		t.Errorf("as the hint says: %s", diff)
	}

	t.Run("a restore test takes the way of the backup", func(t *testing.T) {
		backups, err := s.repo.Backups(t.Context(), "main")
		if err != nil {
			t.Fatal(err)
		}
		tester := proof.Tester{Open: func(context.Context) (*repo.Repo, error) { return s.repo, nil }, Sandbox: sandbox.Options{Parent: s.mkdir("tests")}}
		sub, err := tester.Plan(t.Context(), proof.Request{Cluster: "main", Backup: backups[0].ID}, repo.NewID(time.Now(), "00000001"), time.Now(), backup.Owner{})
		if err != nil || sub.Target.Kind != restore.Latest || sub.Target.Timeline != restore.CurrentTimeline {
			t.Errorf("it tests %+v (%v)", sub, err)
		}
	})

	// The plan is made before timeline 1 has filled its segment, and the server
	// asks for it when it has.
	object := s.object(left)
	if err := os.Rename(object, object+".later"); err != nil {
		t.Fatal(err)
	}
	tail, err := filepath.Glob(filepath.Dir(object) + "/*.zst")
	if err != nil {
		t.Fatal(err)
	}
	for _, later := range tail {
		if filepath.Base(later) > left {
			if err := os.Rename(later, later+".later"); err != nil {
				t.Fatal(err)
			}
		}
	}
	p = s.physical("ordinary", latestMoment)
	plan := s.restored(p)
	moved, _ := filepath.Glob(filepath.Dir(object) + "/*.later")
	for _, m := range moved {
		if err := os.Rename(m, strings.TrimSuffix(m, ".later")); err != nil {
			t.Fatal(err)
		}
	}
	got := s.opened(p)
	if len(got) == 0 || len(got) > len(atFork) || cmp.Diff(atFork[:len(got)], got) != "" {
		t.Errorf("planned to %s of timeline %d before timeline 1 went on: %v, and %v at the fork", plan.LastWAL, plan.Timeline, got, atFork)
	}

	if err := successor.Exec(t.Context(), "postgres", "SELECT pg_switch_wal()"); err != nil {
		t.Fatal(err)
	}
	s.until("timeline 2 is archived", func() bool {
		found, _ := filepath.Glob(filepath.Join(s.dir, "repository/clusters/main/wal/*/00000002/00000002"+left[8:]+".zst"))
		return len(found) == 1
	})
	s.own()
	p = s.physical("latest", latestMoment)
	s.restored(p)
	if diff := cmp.Diff(atFork, s.opened(p)); diff != "" {
		t.Errorf("when timeline 2 is archived: %s", diff)
	}

	// One flipped bit in the history of timeline 2 made every restore impossible.
	t.Run("a damaged history ends no other restore", func(t *testing.T) {
		object := s.object("00000002.history")
		b, err := os.ReadFile(object)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)-3] ^= 1
		if err := errors.Join(os.Chmod(object, 0o600), os.WriteFile(object, b, 0o600), lab.Own(object)); err != nil {
			t.Fatal(err)
		}
		key := strings.TrimPrefix(object, filepath.Join(s.dir, "repository")+"/")
		for _, target := range []restore.Target{latestMoment, {Kind: restore.Latest, Timeline: 2}, {Kind: restore.Latest, Timeline: 1}} {
			_, err := s.physical("refused", target).Plan(t.Context())
			if hint := fail.HintOf(err); !errors.Is(err, fail.Corrupt) || !strings.Contains(err.Error(), "the history of timeline 2 is damaged") || !strings.Contains(hint, key) || !strings.Contains(hint, "pgkeep wal audit --fill") {
				t.Errorf("%v along %v: %v; %s", target, target.Timeline, err, hint)
			}
		}
		for name, target := range map[string]restore.Target{
			"damaged-immediate": {Kind: restore.Immediate},
			"damaged-fork":      {Kind: restore.ToName, Name: "fork", Timeline: 1},
		} {
			p := s.physical(name, target)
			p.Fetch = append(p.Fetch[:2:2], append([]string{"--timeout", "1s"}, p.Fetch[4:]...)...)
			s.restored(p)
			server, err := s.start(p, nil)
			if err != nil {
				t.Errorf("%v: %v", target, err)
				continue
			}
			rows := seqs(t, server)
			if target.Kind == restore.ToName && cmp.Diff(atFork, rows) != "" {
				t.Errorf("%v: %v", target, rows)
			}
			if n := query[int](t, server, "SELECT timeline_id FROM pg_control_checkpoint()"); n != 3 {
				t.Errorf("%v: it opens as timeline %d; 2 is taken", target, n)
			}
			server.Kill()
		}

		// More than a hundred of them did end every plan.
		for n := range pg.Timeline(150) {
			other := filepath.Join(filepath.Dir(filepath.Dir(object)), (n + 20).String(), pg.HistoryName(n+20).String()+".zst")
			if err := errors.Join(os.MkdirAll(filepath.Dir(other), 0o700), os.WriteFile(other, b, 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		s.own()
		const many = "count as missing: 151, such as "
		plan, err := s.physical("many-fork", restore.Target{Kind: restore.ToName, Name: "fork", Timeline: 1}).Plan(t.Context())
		if err != nil || !slices.ContainsFunc(plan.Notes, func(note string) bool {
			return strings.Contains(note, many) && strings.Contains(note, "pgkeep wal audit")
		}) {
			t.Errorf("a target that needs none of many: %v; notes %q", err, plan.Notes)
		}
		_, err = s.physical("refused", latestMoment).Plan(t.Context())
		if hint := fail.HintOf(err); !errors.Is(err, fail.Corrupt) || !strings.Contains(hint, "remove the object") || !strings.Contains(hint, many) {
			t.Errorf("a target that needs some of many: %v; %s", err, hint)
		}
	})
}
