package restore_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/restore"
)

// C10: what cannot come to a good end is refused before a byte is written; and
// what can is told beforehand, with the time that it takes.
func TestC10APlanKnowsSpaceServerAndTime(t *testing.T) {
	s := newSite(t)
	id := s.take()
	s.archived()
	p := s.physical("planned", latestMoment)
	plan, err := p.Plan(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	untouched := func(what string) {
		t.Helper()
		if names, err := os.ReadDir(filepath.Dir(p.Dir)); err != nil || len(names) > 0 {
			t.Errorf("%s: it left %v (%v)", what, names, err)
		}
	}

	t.Run("space", func(t *testing.T) {
		data, space := plan.Space[0].Need, plan.Space[1].Need
		if len(plan.Space) != 2 || data < 1<<20 || space < 8192 || data+space != plan.Bytes {
			t.Fatalf("needs %+v of %d", plan.Space, plan.Bytes)
		}
		together := func(free int64) func(string) (uint64, int64, error) {
			return func(string) (uint64, int64, error) { return 1, free, nil }
		}
		apart := func(free, other int64) func(string) (uint64, int64, error) {
			volumes := []int64{free, other} // asked about in this order
			n := 0
			return func(string) (uint64, int64, error) { n++; return uint64(n), volumes[n-1], nil }
		}
		broken := errors.New("no answer")
		for what, tt := range map[string]struct {
			free  func(string) (uint64, int64, error)
			want  error
			names string
		}{
			"just enough":                      {together(data + space), nil, ""},
			"a byte too little":                {together(data + space - 1), fail.NoSpace, p.Dir + ", " + p.Tablespaces[s.space]},
			"just enough on both":              {apart(data, space), nil, ""},
			"too little for the data":          {apart(data-1, space+1), fail.NoSpace, p.Dir},
			"too little for the tablespace":    {apart(data+1, space-1), fail.NoSpace, p.Tablespaces[s.space]},
			"a file system that does not tell": {func(string) (uint64, int64, error) { return 0, 0, broken }, broken, ""},
		} {
			_, err := p.WithFree(tt.free).Plan(t.Context())
			if !errors.Is(err, tt.want) || tt.want == fail.NoSpace && !strings.HasPrefix(err.Error(), "restore: "+tt.names+": ") {
				t.Errorf("%s: %v", what, err)
			}
			untouched(what)
		}
		// What is there and will be replaced makes room; what is others' does not.
		old := s.physical("old", latestMoment)
		s.restored(old)
		s.write("old/space/others", strings.Repeat("x", 20<<20))
		old.Delta = true
		if _, err := old.WithFree(together(1 << 20)).Plan(t.Context()); err != nil {
			t.Errorf("over an old directory: %v", err)
		}
		if err := os.RemoveAll(filepath.Join(old.Dir, "base/1")); err != nil {
			t.Fatal(err)
		}
		if _, err := old.WithFree(together(0)).Plan(t.Context()); !errors.Is(err, fail.NoSpace) {
			t.Errorf("over an old directory, with nothing free: %v", err)
		}
	})

	t.Run("server", func(t *testing.T) {
		server := func(says string) string {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "postgres"), []byte("#!/bin/sh\n"+says+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			return dir
		}
		major, _, _ := strings.Cut(plan.Version, ".")
		right := server("echo 'postgres (PostgreSQL) " + major + ".1 (ours)'")
		newer, broken, none := server("echo 'postgres (PostgreSQL) 99beta1'"), server("exit 1"), t.TempDir()
		for what, tt := range map[string]struct {
			dirs  []string
			found string
			want  error
			notes []string
		}{
			"nobody looked":         {nil, "", nil, nil},
			"none":                  {[]string{none}, "", nil, []string{"no server of PostgreSQL"}},
			"the right one":         {[]string{none, newer, broken, right}, right, nil, nil},
			"another":               {[]string{newer, none}, "", fail.PGVersion, nil},
			"one that does not say": {[]string{broken, newer}, "", nil, []string{"of which version the server in " + broken, "no server of PostgreSQL"}},
		} {
			p := p
			p.Servers = tt.dirs
			plan, err := p.Plan(t.Context())
			if !errors.Is(err, tt.want) || err == nil && plan.Server != tt.found || err != nil && !strings.Contains(fail.HintOf(err), "bin_dir") {
				t.Errorf("%s: found %q, want %q (%v)", what, plan.Server, tt.found, err)
			}
			for i, note := range tt.notes {
				if len(plan.Notes) != len(tt.notes) || !strings.HasPrefix(plan.Notes[i], note) {
					t.Errorf("%s: notes %q, want %q", what, plan.Notes, tt.notes)
				}
			}
			untouched(what)
		}
	})

	t.Run("time", func(t *testing.T) {
		took := func(want restore.Forecast) {
			t.Helper()
			plan, err := p.Plan(t.Context())
			want.Fetch, want.Replay = float64(plan.Bytes)/want.FetchRate, float64(plan.Segments)*float64(1<<20)/want.ReplayRate
			if err != nil || plan.Time != want {
				t.Errorf("forecast %+v, want %+v (%v)", plan.Time, want, err)
			}
		}
		took(restore.Forecast{FetchRate: 50 << 20, ReplayRate: 16 << 20})
		now := time.Now().UTC()
		for i, tt := range []struct {
			report string
			passed bool
		}{
			{`{"phases":[{"name":"fetch","seconds":2,"bytes":3000},{"name":"replay","seconds":4,"bytes":1000}]}`, true},
			{`{"phases":[{"name":"fetch","seconds":1,"bytes":3000},{"name":"replay","seconds":1,"bytes":1000}]}`, false}, // it failed
			{`{"phases":[{"name":"fetch","seconds":1,"bytes":3000}]}`, true},                                             // it measured half of it
			{`{"phases":[{"name":"fetch","seconds":0,"bytes":3000},{"name":"replay","seconds":1,"bytes":1}]}`, true},
		} {
			test := repo.NewID(now.Add(time.Duration(i)*time.Second), fmt.Sprintf("%08x", i))
			proof := repo.Proof{Ref: repo.Ref{Cluster: "main", ID: id}, Test: test, FinishedAt: now.Add(time.Duration(i) * time.Second), Passed: tt.passed, Report: json.RawMessage(tt.report)}
			if err := s.repo.WriteProof(t.Context(), proof); err != nil {
				t.Fatal(err)
			}
			took(restore.Forecast{FetchRate: 1500, ReplayRate: 250, Measured: repo.NewID(now, "00000000")})
		}
	})
	if _, err := os.Lstat(p.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is there (%v)", p.Dir, err)
	}
}
