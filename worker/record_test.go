package worker_test

import (
	"flag"
	"os"
	"path/filepath"
	"testing"

	enumspb "go.temporal.io/api/enums/v1"
	historypb "go.temporal.io/api/history/v1"
	"go.temporal.io/api/temporalproto"
	"go.temporal.io/sdk/client"
	sdk "go.temporal.io/sdk/worker"

	"github.com/pgkeep/pgkeep/workflows"
)

// -record DIR writes the history of each scenario into DIR, for the replay test
// of package workflows. It is run once for each release, with the code of that
// release.
var recordTo = flag.String("record", "", "write histories to this directory")

// record replays the history of a finished run, and keeps it if asked to.
func record(t *testing.T, c client.Client, run client.WorkflowRun, scenario string) {
	t.Helper()
	var h historypb.History
	for events := c.GetWorkflowHistory(t.Context(), run.GetID(), run.GetRunID(), false, enumspb.HISTORY_EVENT_FILTER_TYPE_ALL_EVENT); events.HasNext(); {
		event, err := events.Next()
		if err != nil {
			t.Fatal(err)
		}
		h.Events = append(h.Events, event)
	}
	replayer := sdk.NewWorkflowReplayer()
	workflows.Register(replayer)
	if err := replayer.ReplayWorkflowHistory(nil, &h); err != nil {
		t.Errorf("replay of %s: %v", scenario, err)
	}
	if *recordTo == "" {
		return
	}
	b, err := temporalproto.CustomJSONMarshalOptions{Indent: "  "}.Marshal(&h)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(*recordTo, scenario+".json"), append(b, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
}
