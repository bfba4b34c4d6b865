package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store/dir"
)

// What an operator does about retention, one thing after the other.
func TestBackupsAreHeldExpiredBroughtBack(t *testing.T) {
	ctx, place := t.Context(), t.TempDir()
	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(place, "repository"), 0o700); err != nil {
		t.Fatal(err)
	}
	st, err := dir.Open(filepath.Join(place, "repository"))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	r, _, err := repo.Init(ctx, st, repo.Access{Signer: signer, Version: "test"}, nil, now)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.OpenRoot(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer content.Close()
	if err := content.WriteFile("a", bytes.Repeat([]byte("content"), 9999), 0o600); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for n := range 5 { // of a day each
		at := now.Add(time.Duration(n-4)*24*time.Hour - time.Hour)
		ref := repo.Ref{Cluster: "main", ID: repo.NewID(at, fmt.Sprintf("%08x", n))}
		_, err := r.WriteIntent(ctx, repo.Intent{Ref: ref, Kind: repo.Logical, StartedAt: at}, time.Now)
		var files []repo.File
		if err == nil {
			files, err = repo.ListFiles(content.FS())
		}
		if err == nil {
			_, err = r.Write(ctx, repo.Writing{Ref: ref, Root: content}, files)
		}
		if err == nil {
			_, err = r.Publish(ctx, repo.Manifest{Ref: ref, Kind: repo.Logical, StartedAt: at, FinishedAt: at.Add(time.Minute), Details: json.RawMessage("{}")})
		}
		if err != nil {
			t.Fatal(err)
		}
		ids = append(ids, string(ref.ID))
	}
	key := filepath.Join(place, "signing.key")
	if err := os.WriteFile(key, []byte(signer.Secret()+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	says := func(want int, retention, says string, args ...string) {
		t.Helper()
		file := filepath.Join(place, "pgkeep.yaml")
		text := fmt.Sprintf("repository: {url: 'file://%s/repository', encryption: none}\nkeys: {signing_key: %s}\nclusters:\n  main: {conninfo: host=/nowhere, retention: {%s}}\n", place, key, retention)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		var out, said bytes.Buffer
		status := run(ctx, append([]string{"pgkeep", "--config", file}, args...), strings.NewReader(""), &out, &said)
		if all := out.String() + said.String(); status != want || !strings.Contains(all, says) {
			t.Errorf("pgkeep %s = %d, want %d with %q\n%s", strings.Join(args, " "), status, want, says, all)
		}
	}
	const rules = "daily: 2, min: 1"
	says(2, "min: 3", "it has no retention", "expire", "--apply", "--yes")
	says(2, rules, "--reason is missing", "hold", "add", ids[0])
	says(0, rules, "is held", "hold", "add", "--reason", "audit 2026", ids[0])
	says(0, rules, "audit 2026", "hold", "list")
	says(27, rules, "audit 2026", "delete", "--yes", ids[0])
	says(0, rules, "hold: audit 2026", "expire")
	says(0, rules, `"reasons"`, "expire", "--json")
	says(0, rules, ids[1], "list") // nothing happened
	says(2, rules, "--yes", "expire", "--apply")
	says(0, rules, "let go of 2 backups; removed 0 objects", "expire", "--apply", "--yes")
	says(0, rules, "can be brought back until", "expire")
	says(0, rules, "is there again", "undelete", ids[2])
	says(0, rules, ids[2], "list")
	says(13, rules, "not marked as deleted", "undelete", ids[2])
	says(0, rules, "lifted 1 hold", "hold", "remove", ids[0])
	says(13, rules, "no such hold", "hold", "remove", ids[0])
	says(0, "daily: 1, min: 1", `"objects": 0`, "expire", "--apply", "--yes", "--json")
	says(0, rules, ids[4], "list")

	if err := os.WriteFile(filepath.Join(place, "repository/clusters/main/backups", ids[4], "manifest.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	says(28, rules, "cannot be read", "expire", "--apply", "--yes")
}
