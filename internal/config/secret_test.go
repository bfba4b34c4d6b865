package config_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/config"
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
