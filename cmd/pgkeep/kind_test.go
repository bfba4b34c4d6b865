package main

import (
	"testing"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/workflows"
)

func TestTheKindOfABackupFollowsFromTheCluster(t *testing.T) {
	one := []string{"app"}
	for _, tt := range []struct {
		conninfo, kind string
		databases      []string
		want           string // "": refused
	}{
		{"host=/run/postgresql user=b", "", nil, workflows.Physical},
		{"user=b", "", nil, workflows.Physical},
		{"host=localhost", "", nil, workflows.Physical},
		{"hostaddr=127.0.0.1", "", nil, workflows.Physical},
		{"host='::1'", "", nil, workflows.Physical},
		{"postgresql:///app?host=/run/postgresql", "", nil, workflows.Physical},
		{"postgresql://b@db2/app", "", nil, workflows.Logical},
		{"host=db2", "", nil, workflows.Logical},
		{"host=10.0.0.7", "", nil, workflows.Logical},
		{"user=b", "", one, workflows.Logical},
		{"host=db2", "physical", nil, workflows.Physical},
		{"user=b", "logical", nil, workflows.Logical},
		{"user=b", "physical", one, ""},
		{"user=b", "phsyical", nil, ""},
	} {
		got, err := kindOf(backupOptions{Kind: tt.kind, Databases: tt.databases}, config.Cluster{Conninfo: config.Conninfo(tt.conninfo)})
		if got != tt.want || (err != nil) != (tt.want == "") {
			t.Errorf("%q, --kind %q, %v: %q, %v; want %q", tt.conninfo, tt.kind, tt.databases, got, err, tt.want)
		}
	}
}
