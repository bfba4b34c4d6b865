package proof_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// A host whose restore_test.directory could not be made had its tests stay for an
// hour: each try to clean up made the sandbox first, and failed as the test had.
func TestWhatWasNeverMadeIsCleanedUp(t *testing.T) {
	parent := filepath.Join(t.TempDir(), "none", "s")
	tests := proof.Tester{Sandbox: sandbox.Options{Parent: parent}}
	if err := tests.CleanUp(t.Context(), proof.Subject{Test: repo.NewID(time.Now(), "0badcafe")}); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(parent); !os.IsNotExist(err) {
		t.Errorf("%s is there now: %v", parent, err)
	}
}
