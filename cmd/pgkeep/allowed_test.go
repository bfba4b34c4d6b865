package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/pgkeep/pgkeep/activities"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
)

// Who starts workflows does not choose where a host writes.
func TestARequestedRestoreStaysWhereTheHostAllows(t *testing.T) {
	bin := t.TempDir()
	if err := os.WriteFile(filepath.Join(bin, "pgkeep-wal"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", bin)
	allowed := t.TempDir()
	if err := os.Symlink("/etc", filepath.Join(allowed, "out")); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		dir, tablespace, config string
		ok                      bool
	}{
		{dir: allowed + "/new", ok: true},
		{dir: allowed + "/new/data", tablespace: allowed + "/space", config: allowed + "/config", ok: true},
		{dir: allowed},
		{dir: allowed + "more/data"},
		{dir: "/srv/data"},
		{dir: allowed + "/../data"},
		{dir: allowed + "/out/data"},
		{dir: allowed + "/new", tablespace: "/srv/space"},
		{dir: allowed + "/new", config: "/etc/postgresql"},
	} {
		q := activities.RestoreRequest{Cluster: "main", Dir: tt.dir, ConfigDir: tt.config}
		if tt.tablespace != "" {
			q.Tablespaces = map[string]string{"1": tt.tablespace}
		}
		p, err := prepareAllowed(&config.Config{RestoreDirs: []config.Path{"/nowhere", config.Path(allowed)}}, nil, q)
		if (err == nil) != tt.ok || err != nil && !errors.Is(err, fail.BadConfig) {
			t.Errorf("%+v: %v", tt, err)
		}
		if err == nil && (p.Allowed == nil || p.Allowed("/srv/space") == nil || p.Allowed(allowed+"/other") != nil) {
			t.Errorf("%+v: a tablespace that only the backup names goes where it likes", tt)
		}
		if _, err := prepareAllowed(new(config.Config), nil, q); err == nil {
			t.Errorf("%+v: allowed by nobody", tt)
		}
	}
}
