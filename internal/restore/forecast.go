package restore

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Forecast says how long a restore is likely to take: first this program
// brings the files, then PostgreSQL replays the log.
type Forecast struct {
	Fetch  float64 `json:"fetch_seconds"`
	Replay float64 `json:"replay_seconds"` // for all segments of the plan
	// FetchRate and ReplayRate are bytes per second: of files, as they will be on
	// disk, and of log.
	FetchRate  float64 `json:"fetch_rate"`
	ReplayRate float64 `json:"replay_rate"`
	// Measured is the restore test of this cluster that the rates are of. Empty:
	// nothing was measured, and they are assumed.
	Measured repo.ID `json:"measured_by,omitempty"`
}

// Rates that are assumed where nothing was measured: little for a disk and a
// network of today, and for one process that replays.
const (
	assumedFetch  = 50 << 20
	assumedReplay = 16 << 20 // a segment of the usual size in a second
)

// forecast is what a plan comes to at the rates of the newest restore test of the
// cluster that measured both.
func forecast(plan *PhysicalPlan, tests []repo.ListedProof) Forecast {
	f := Forecast{FetchRate: assumedFetch, ReplayRate: assumedReplay}
	var newest time.Time
	for _, t := range tests {
		if t.Err != nil || !t.Passed || !t.FinishedAt.After(newest) {
			continue
		}
		if fetch, replay := rates(t.Report); fetch > 0 && replay > 0 {
			newest, f.FetchRate, f.ReplayRate, f.Measured = t.FinishedAt, fetch, replay, t.Test
		}
	}
	f.Fetch, f.Replay = float64(plan.Bytes)/f.FetchRate, float64(plan.WALBytes)/f.ReplayRate
	return f
}

// rates reads what a restore test measured: see proof.Report, of which no more is
// known here. One that lasted no time says nothing.
func rates(report json.RawMessage) (fetch, replay float64) {
	var r struct {
		Phases []struct {
			Name    string  `json:"name"`
			Seconds float64 `json:"seconds"`
			Bytes   float64 `json:"bytes"`
		} `json:"phases"`
	}
	if json.Unmarshal(report, &r) != nil {
		return 0, 0
	}
	for _, p := range r.Phases {
		switch {
		case p.Seconds <= 0 || p.Bytes <= 0:
		case p.Name == "fetch":
			fetch = p.Bytes / p.Seconds
		case p.Name == "replay":
			replay = p.Bytes / p.Seconds
		}
	}
	return fetch, replay
}

// recent is of how many backups the restore tests are looked at.
const recent = 5

// planTime says how long it will take.
func (p Physical) planTime(ctx context.Context, plan *PhysicalPlan, backups []repo.Listed) error {
	var tests []repo.ListedProof
	looked := 0
	for _, b := range slices.Backward(backups) {
		if b.Physical == nil || b.Err != nil || looked == recent {
			continue
		}
		looked++
		of, err := p.Repo.Proofs(ctx, b.Ref)
		if err != nil {
			return fmt.Errorf("restore: how long others took: %w", err)
		}
		tests = append(tests, of...)
	}
	plan.Time = forecast(plan, tests)
	return nil
}
