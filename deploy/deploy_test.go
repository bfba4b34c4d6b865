// Package deploy checks docker-compose.yml and its configuration.
package deploy

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/pgkeep/pgkeep/internal/config"
)

type composeFile struct {
	Volumes  map[string]any
	Services map[string]struct {
		Build    struct{ Target string }
		Image    string
		User     string
		Ports    []string
		Profiles []string
		Volumes  []yaml.Node // each a text or a map
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
	for _, name := range []string{"postgres", "s3", "temporal", "worker", "prometheus", "grafana"} {
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

// Who does not ask for the profile gets what the README says, and no more.
func TestOnlyMetricsAreInAProfile(t *testing.T) {
	for name, s := range compose(t).Services {
		var want []string
		if name == "prometheus" || name == "grafana" {
			want = []string{"metrics"}
		}
		if !slices.Equal(s.Profiles, want) {
			t.Errorf("service %s is in the profiles %q, want %q", name, s.Profiles, want)
		}
	}
}

func TestWhatIsMountedExists(t *testing.T) {
	c := compose(t)
	for name, s := range c.Services {
		for _, v := range s.Volumes {
			if v.Kind != yaml.ScalarNode {
				continue
			}
			source, _, _ := strings.Cut(v.Value, ":")
			if _, ok := c.Volumes[source]; ok {
				continue
			}
			if info, err := os.Stat(filepath.Join("..", source)); err != nil || !info.Mode().IsRegular() {
				t.Errorf("service %s mounts %s: %v", name, source, err)
			}
		}
	}
}

func TestPrometheusScrapesTheWorker(t *testing.T) {
	c, err := config.Load(config.Options{File: "compose/pgkeep.yaml", Hostname: "worker"})
	if err != nil {
		t.Fatal(err)
	}
	var p struct {
		ScrapeConfigs []struct {
			JobName       string                       `yaml:"job_name"`
			StaticConfigs []struct{ Targets []string } `yaml:"static_configs"`
		} `yaml:"scrape_configs"`
	}
	dir := t.TempDir() // as in the container
	for _, file := range []string{"compose/prometheus.yml", rules} {
		text, err := os.ReadFile(file)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, filepath.Base(file)), text, 0o600)
		}
		if err == nil && file != rules {
			err = yaml.Unmarshal(text, &p)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	_, port, _ := strings.Cut(string(c.Metrics.Listen), ":")
	if s := p.ScrapeConfigs; len(s) != 1 || s[0].JobName != "pgkeep" || len(s[0].StaticConfigs) != 1 || !slices.Equal(s[0].StaticConfigs[0].Targets, []string{"worker:" + port}) {
		t.Errorf("it scrapes %+v, and the worker listens at %s", s, c.Metrics.Listen)
	}
	out, err := exec.CommandContext(t.Context(), "promtool", "check", "config", filepath.Join(dir, "prometheus.yml")).CombinedOutput()
	if err != nil {
		t.Errorf("promtool check config: %v: %s", err, out)
	}
}

// Each panel asks something that PromQL can say, of the data source that the user
// chose. That the metrics exist is seen where a worker is scraped.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile("grafana/pgkeep.json")
	if err != nil {
		t.Fatal(err)
	}
	type source struct{ Type, UID string }
	var d struct {
		Panels []struct {
			ID          int
			Type, Title string
			Datasource  source
			Targets     []struct {
				Expr       string
				Datasource source
			}
		}
	}
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	ids := make(map[int]bool)
	var exprs []map[string]any
	for _, p := range d.Panels {
		if ids[p.ID] || p.Title == "" || (p.Type == "row") != (len(p.Targets) == 0) {
			t.Errorf("panel %d %q", p.ID, p.Title)
		}
		ids[p.ID] = true
		for _, target := range p.Targets {
			if want := (source{"prometheus", "${datasource}"}); p.Datasource != want || target.Datasource != want {
				t.Errorf("panel %q asks %v", p.Title, target.Datasource)
			}
			exprs = append(exprs, map[string]any{"record": "x:y", "expr": strings.ReplaceAll(target.Expr, "$cluster", ".*"), "labels": map[string]string{"n": strconv.Itoa(len(exprs))}})
		}
	}
	if len(exprs) < 20 {
		t.Errorf("%d questions", len(exprs))
	}
	b, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "dashboard", "rules": exprs}}})
	file := filepath.Join(t.TempDir(), "dashboard.yml")
	if err == nil {
		err = os.WriteFile(file, b, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "promtool", "check", "rules", file).CombinedOutput(); err != nil {
		t.Errorf("promtool: %v: %s", err, out)
	}
}

// What an operator begins with says nothing wrong.
func TestTheExampleIsRead(t *testing.T) {
	c, err := config.Load(config.Options{File: "pgkeep.example.yaml", Hostname: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	if len(c.Clusters) != 1 || len(c.Schedules) < 2 {
		t.Errorf("%d clusters, %d schedules", len(c.Clusters), len(c.Schedules))
	}
}
