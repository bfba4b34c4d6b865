package proof

import (
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/restore"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// Expect makes the test of what a plan restored: that it recovers to the target
// of the plan, over the log that the plan found. The caller adds the sandbox,
// which p.Dir and all tablespaces must be in, and what else he expects.
func Expect(p restore.Physical, plan restore.PhysicalPlan) Test {
	m, timeline := plan.Manifest(), pg.Timeline(plan.Timeline)
	t := Test{
		Recovery: &sandbox.Recovery{Command: p.FetchCommand(plan), Target: target(p.Target), Follow: timeline},
		System:   m.System,
		Bytes:    plan.Bytes,
	}
	switch p.Target.Kind {
	case restore.Immediate: // it may end before the timeline begins
	case restore.Latest:
		t.Timeline = timeline
		// Of the last segment some may be missing: a record that goes on behind it.
		if _, begins, err := pg.ParseSegmentName(plan.LastWAL, m.Physical.SegmentSize); err == nil {
			t.AtLeast = begins
		}
		if plan.Last != nil {
			t.AtLeast = max(t.AtLeast, plan.Last.LSN)
		}
	case restore.ToTime:
		t.Timeline = timeline
		if plan.Stop != nil {
			t.Recovery.Target.Stop = plan.Stop.LSN
		}
	default:
		t.Timeline = timeline
	}
	return t
}

func target(t restore.Target) sandbox.Target {
	s := sandbox.Target{Exclusive: t.Exclusive}
	switch t.Kind {
	case restore.Immediate:
		s.Immediate = true
	case restore.ToTime:
		s.Time = t.Time
	case restore.ToLSN:
		s.LSN = t.LSN
	case restore.ToXID:
		s.XID = t.XID
	case restore.ToName:
		s.Name = t.Name
	}
	return s
}
