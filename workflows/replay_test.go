package workflows_test

import (
	"path/filepath"
	"testing"

	"go.temporal.io/sdk/worker"

	"github.com/pgkeep/pgkeep/workflows"
)

// TestReplay runs today's workflows over the histories that released versions
// left behind. A failure means that a backup in progress would break on upgrade.
// Histories are recorded by the code of a release, never by that under test:
// go test ./worker -args -record ../workflows/testdata/history/vX.Y.Z
func TestReplay(t *testing.T) {
	files, err := filepath.Glob("testdata/history/*/*.json")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatal("no histories to replay")
	}
	for _, file := range files {
		t.Run(filepath.Base(filepath.Dir(file))+"/"+filepath.Base(file), func(t *testing.T) {
			r := worker.NewWorkflowReplayer()
			workflows.Register(r)
			if err := r.ReplayWorkflowHistoryFromJSONFile(nil, file); err != nil {
				t.Error(err)
			}
		})
	}
}
