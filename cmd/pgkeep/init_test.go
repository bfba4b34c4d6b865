package main

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/client"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/workflows"
)

func TestMissingAttributes(t *testing.T) {
	all, err := missingAttributes(nil)
	if err != nil || len(all) != 7 || all["PgkeepBytes"] != enumspb.INDEXED_VALUE_TYPE_INT {
		t.Fatalf("missing on an empty server: %v, %v", all, err)
	}
	most := maps.Clone(all)
	delete(most, "PgkeepStage")
	if missing, err := missingAttributes(most); err != nil || !slices.Equal(slices.Collect(maps.Keys(missing)), []string{"PgkeepStage"}) {
		t.Errorf("missing: %v, %v; want PgkeepStage", missing, err)
	}
	all["PgkeepHost"] = enumspb.INDEXED_VALUE_TYPE_TEXT
	if _, err := missingAttributes(all); fail.KindOf(err) != fail.BadConfig {
		t.Errorf("an attribute of another type: %v", err)
	}
}

// A namespace that somebody made knows nothing of pgkeep.
func TestInitRegistersSearchAttributes(t *testing.T) {
	server, dir := lab.TemporalForTest(t), t.TempDir()
	file := filepath.Join(dir, "pgkeep.yaml")
	err := os.WriteFile(file, fmt.Appendf(nil, `
repository: {url: "file://%[1]s/repository", encryption: none}
keys: {signing_key: %[1]s/signing.key}
temporal: {address: "%[2]s", namespace: others}
`, dir, server.Address), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "repository"), 0o700); err != nil {
		t.Fatal(err)
	}
	namespaces, err := client.NewNamespaceClient(client.Options{HostPort: server.Address})
	if err != nil {
		t.Fatal(err)
	}
	defer namespaces.Close()
	own, err := namespaces.Describe(t.Context(), server.Namespace)
	if err != nil {
		t.Fatal(err)
	}
	err = namespaces.Register(t.Context(), &workflowservice.RegisterNamespaceRequest{Namespace: "others",
		WorkflowExecutionRetentionPeriod: own.Config.WorkflowExecutionRetentionTtl})
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"made   search attributes", "found  search attributes"} {
		untilInit(t, file, want)
	}
	if len(workflows.SearchAttributes()) != 7 {
		t.Error("the list of search attributes has changed: so must that of pgkeep-server")
	}
}

// untilInit runs pgkeep init until it says that: a server's list of namespaces,
// and of what each has, is as new as its cache.
func untilInit(t *testing.T, file, want string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	again := time.NewTicker(100 * time.Millisecond)
	defer again.Stop()
	for {
		var out, said bytes.Buffer
		status := run(ctx, []string{"pgkeep", "--config", file, "init"}, strings.NewReader(""), &out, &said)
		if strings.Contains(out.String(), want) {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("pgkeep init = %d, and never says %q\n%s%s", status, want, &out, &said)
		case <-again.C:
		}
	}
}
