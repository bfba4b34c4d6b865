package config_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
)

func TestSecretIsNeverShown(t *testing.T) {
	var s config.Secret
	if err := json.Unmarshal([]byte(`"hunter2"`), &s); err != nil {
		t.Fatal(err)
	}
	if s.Reveal() != "hunter2" {
		t.Fatal("lost")
	}
	var out bytes.Buffer
	slog.New(slog.NewTextHandler(&out, nil)).Info("x", "k", s)
	slog.New(slog.NewJSONHandler(&out, nil)).Info("x", "k", struct{ S config.Secret }{s})
	b, _ := json.Marshal(s)
	fmt.Fprintf(&out, "%v %+v %#v %s %q %s %v", s, s, s, s, s, b, struct{ S *config.Secret }{&s})
	if strings.Contains(out.String(), "hunter2") {
		t.Errorf("shown in: %s", out.String())
	}
}

func TestSecretFile(t *testing.T) {
	for _, tc := range []struct {
		name    string
		content string
		mode    os.FileMode
		want    string // "" if it is refused
	}{
		{"only its owner reads it", "hunter2\n", 0o600, "hunter2"},
		{"blanks belong to it", " hunter 2 \r\n", 0o400, " hunter 2 "},
		{"everybody reads it", "hunter2", 0o604, ""},
		{"the group writes it", "hunter2", 0o620, ""},
		{"empty", "\n", 0o600, ""},
		{"too long to be one", strings.Repeat("x", 1<<17), 0o600, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "secret")
			if err := os.WriteFile(path, []byte(tc.content), tc.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, tc.mode); err != nil { // whatever the umask is
				t.Fatal(err)
			}
			s, err := config.ReadSecret(path)
			if s.Reveal() != tc.want || (err == nil) != (tc.want != "") {
				t.Errorf("ReadSecret = %q, %v", s.Reveal(), err)
			}
			if err != nil && (!errors.Is(err, fail.BadConfig) || strings.Contains(err.Error(), "hunter2")) {
				t.Errorf("error is %v", err)
			}
		})
	}
	if _, err := config.ReadSecret(t.TempDir()); err == nil {
		t.Error("a directory was taken for a secret")
	}
}

func TestSecretFileOthersReadHasAHint(t *testing.T) {
	path := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(path, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := config.ReadSecret(path)
	if got, want := fail.HintOf(err), "chmod 600 "+path; got != want {
		t.Errorf("hint is %q, want %q", got, want)
	}
}
