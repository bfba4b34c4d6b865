package main

import (
	"bytes"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// What somebody types who has read little yet is answered with what to do, and
// nothing is made by halves.
func TestWhatNewcomersAreTold(t *testing.T) {
	dir := t.TempDir()
	if err := os.Mkdir(dir+"/repo", 0o700); err != nil {
		t.Fatal(err)
	}
	config := func(more string) string {
		file := filepath.Join(dir, "pgkeep.yaml")
		text := "host: db1\nrepository: {url: 'file://" + dir + "/repo'}\nspool: " + dir + "\ntemporal: {address: '127.0.0.1:9'}\n" + more
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	signing := "keys: {signing_key: " + dir + "/signing.key}\n"
	open := "keys: {signing_key: " + dir + "/signing.key, metadata_identity: " + dir + "/metadata.key}\n"
	for _, c := range []struct {
		config, args string
		status       int
		want         []string // of all that is printed
	}{
		{"", "check", 2, []string{"pgkeep: error: no repository here\n", "hint: pgkeep init makes one"}},
		{"", "doctor", 51, []string{"the repository does not open: no repository here\n", "warning   no-cluster", "pgkeep: error: 1 critical finding: repository\n", "pgkeep: hint: each finding says how to put it right\n"}},
		{signing, "init", 2, []string{"keys.metadata_identity is not set"}},
		{signing, "init --new-identity " + dir + "/operator.key", 2, []string{"keys.metadata_identity is not set"}},
		{"", "restore-test --to yesterday", 2, []string{"unknown flag --to (did you mean --to-time, --to-lsn, --to-xid or --to-name?)"}},
		{"", "restore --to X", 2, []string{"BACKUP is missing", "--target-dir", "--to-time"}},
		{"", "list --clutser main", 2, []string{"unknown flag --clutser"}},
	} {
		var out bytes.Buffer
		status := run(t.Context(), append([]string{"pgkeep", "--config", config(c.config)}, strings.Fields(c.args)...), strings.NewReader(""), &out, &out)
		if status != c.status {
			t.Errorf("pgkeep %s: status %d, want %d", c.args, status, c.status)
		}
		for _, text := range c.want {
			if !strings.Contains(out.String(), text) {
				t.Errorf("pgkeep %s does not say %q:\n%s", c.args, text, &out)
			}
		}
		if made, _ := filepath.Glob(dir + "/*.key"); len(made) > 0 {
			t.Fatalf("pgkeep %s made %v", c.args, made)
		}
	}

	// An empty repository, and no cluster: nobody can say that all is well.
	var out bytes.Buffer
	file := config(open)
	if status := run(t.Context(), []string{"pgkeep", "--config", file, "key", "init", "--new-identity", dir + "/operator.key"}, strings.NewReader(""), &out, &out); status != 0 {
		t.Fatalf("key init: %s", &out)
	}
	for args, want := range map[string]int{"check": 2, "check --nagios": 3} {
		out.Reset()
		if status := run(t.Context(), append([]string{"pgkeep", "--config", file}, strings.Fields(args)...), strings.NewReader(""), &out, &out); status != want || !strings.Contains(out.String(), "no cluster is configured") {
			t.Errorf("pgkeep %s = %d, want %d:\n%s", args, status, want, &out)
		}
	}
}

// A store that takes a connection and never says a word holds nobody up for long.
func TestChecksEndInTime(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	dir := t.TempDir()
	file := filepath.Join(dir, "pgkeep.yaml")
	text := "repository: {url: 's3://bucket/p', endpoint: 'http://" + silent.Addr().String() + "', access_key_id: a, secret_access_key_file: " + file + ", encryption: none}\nspool: " + dir + "\n"
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]struct {
		status int
		says   string
	}{
		"check --nagios --timeout 300ms": {3, "PGKEEP UNKNOWN - the repository did not answer all within 300ms: "},
		"check --timeout 300ms":          {20, "pgkeep: error: the repository did not answer all within 300ms: "},
		"doctor --timeout 300ms":         {51, "the store does not work: "},
	} {
		var out bytes.Buffer
		began := time.Now()
		status := run(t.Context(), append([]string{"pgkeep", "--config", file}, strings.Fields(args)...), strings.NewReader(""), &out, &out)
		if took := time.Since(began); status != want.status || !strings.Contains(out.String(), want.says) || took > 20*time.Second {
			t.Errorf("pgkeep %s = %d after %v, want %d and %q:\n%s", args, status, took, want.status, want.says, &out)
		}
	}
}
