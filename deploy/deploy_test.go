// Package deploy checks docker-compose.yml and its configuration.
package deploy

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/pgkeep/pgkeep/internal/config"
)

type composeFile struct {
	Services map[string]struct {
		Build struct{ Target string }
		Image string
		User  string
		Ports []string
	}
}

func compose(t *testing.T) composeFile {
	t.Helper()
	text, err := os.ReadFile("../docker-compose.yml")
	if err != nil {
		t.Fatal(err)
	}
	var c composeFile
	if err := yaml.Unmarshal(text, &c); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"postgres", "s3", "temporal", "worker"} {
		if _, ok := c.Services[name]; !ok {
			t.Fatalf("there is no service %s", name)
		}
	}
	return c
}

// pinned is an image whose tag says a version with a dot, or a digest.
var pinned = regexp.MustCompile(`^[a-z0-9./-]+(:[a-z0-9.-]*\d\.\d[a-z0-9.-]*|@sha256:[0-9a-f]{64})$`)

func TestImagesFromOutsideArePinned(t *testing.T) {
	for name, s := range compose(t).Services {
		if s.Build.Target == "" && !pinned.MatchString(s.Image) {
			t.Errorf("service %s: image %q is not pinned", name, s.Image)
		}
		if s.Build.Target != "" && !strings.HasSuffix(s.Image, ":compose") {
			t.Errorf("service %s is built here, and its image %q does not say so", name, s.Image)
		}
	}
	dockerfile, err := os.ReadFile("../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	images := regexp.MustCompile(`(?m)^ARG \w+_IMAGE=(.*)$`).FindAllStringSubmatch(string(dockerfile), -1)
	if len(images) == 0 {
		t.Error("the Dockerfile names no images")
	}
	for _, m := range images {
		if !pinned.MatchString(m[1]) {
			t.Errorf("Dockerfile: image %q is not pinned", m[1])
		}
	}
}

func TestNothingRunsAsRoot(t *testing.T) {
	number := regexp.MustCompile(`^[1-9]\d*:[1-9]\d*$`)
	for name, s := range compose(t).Services {
		if !number.MatchString(s.User) {
			t.Errorf("service %s runs as %q, want numbers that are not 0", name, s.User)
		}
	}
}

func TestPortsAreOnLoopback(t *testing.T) {
	for name, s := range compose(t).Services {
		for _, p := range s.Ports {
			if !strings.HasPrefix(p, "127.0.0.1:") {
				t.Errorf("service %s publishes %s to the network", name, p)
			}
		}
	}
}

func TestEveryBuildTargetExists(t *testing.T) {
	dockerfile, err := os.ReadFile("../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range compose(t).Services {
		if s.Build.Target != "" && !strings.Contains(string(dockerfile), " AS "+s.Build.Target+"\n") {
			t.Errorf("service %s: the Dockerfile has no stage %s", name, s.Build.Target)
		}
	}
}

func TestConfigurationIsValid(t *testing.T) {
	c, err := config.Load(config.Options{File: "compose/pgkeep.yaml", Hostname: "worker"})
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Clusters) == 0 || len(c.Schedules) == 0 {
		t.Errorf("%d clusters and %d schedules, want some", len(c.Clusters), len(c.Schedules))
	}
}
