package main

import (
	"os"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/lab"
)

// What keeps a restore test from being made is said before one is due, and the
// attempt leaves nothing.
func TestDoctorTriesToIsolate(t *testing.T) {
	dir := lab.DirForTest(t)
	cfg := &config.Config{RestoreTest: config.RestoreTest{Directory: config.Path(dir), User: "postgres", Isolation: config.Required}}
	if got := tryIsolation(t.Context(), cfg); len(got) > 0 {
		t.Errorf("where all is allowed: %+v", got)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	cfg.RestoreTest.Directory = config.Path(dir + "/" + strings.Repeat("x", 90))
	got := tryIsolation(t.Context(), cfg)
	if len(got) != 1 || got[0].Severity != health.Critical || got[0].Name != "isolation" || !strings.Contains(got[0].What, "too many") || !strings.Contains(got[0].Fix, "shorter path") {
		t.Errorf("where there can be no sandbox: %+v", got)
	}
}
