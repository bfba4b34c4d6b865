// Package deploy checks docker-compose.yml and its configuration.
package deploy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/url"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/pgkeep/pgkeep/internal/config"
)

// A composeFile has what docker-compose.yml may say: what is not here, as
// privileges or the network of the host, nobody has thought of.
type composeFile struct {
	Name     string
	Services map[string]service
	Volumes  map[string]struct{}
}

type service struct {
	Build           struct{ Context, Target string }
	Image           string
	User            string
	NetworkMode     string `yaml:"network_mode"`
	Entrypoint      []string
	Command         []string
	Environment     map[string]string
	Ports           []string
	Profiles        []string
	Volumes         []mount
	DependsOn       map[string]struct{ Condition string } `yaml:"depends_on"`
	Healthcheck     *healthcheck
	Restart         string
	StopGracePeriod time.Duration `yaml:"stop_grace_period"`
}

type healthcheck struct {
	Test        []string
	Interval    time.Duration
	StartPeriod time.Duration `yaml:"start_period"`
}

// A mount is a volume or, where the source is a path, a file of this repository.
type mount struct {
	Source, Target string
	ReadOnly       bool
}

func (m mount) file() bool { return strings.HasPrefix(m.Source, "./") }

func (m *mount) UnmarshalYAML(n *yaml.Node) error {
	if n.Kind == yaml.ScalarNode {
		var mode string
		m.Source, m.Target, _ = strings.Cut(n.Value, ":")
		m.Target, mode, _ = strings.Cut(m.Target, ":")
		m.ReadOnly = mode == "ro"
		if mode != "" && mode != "ro" {
			return fmt.Errorf("volume %s: what is %q?", n.Value, mode)
		}
		return nil
	}
	var long struct {
		Type, Source, Target string
		ReadOnly             bool `yaml:"read_only"`
		Volume               struct{ Nocopy bool }
	}
	if err := n.Decode(&long); err != nil {
		return err
	}
	if long.Type != "volume" {
		return fmt.Errorf("volume %s is a %s", long.Source, long.Type)
	}
	*m = mount{long.Source, long.Target, long.ReadOnly}
	return nil
}

func compose(t *testing.T) composeFile {
	t.Helper()
	text, err := os.ReadFile("../docker-compose.yml")
	if err != nil {
		t.Fatal(err)
	}
	var c composeFile
	strict := yaml.NewDecoder(bytes.NewReader(text))
	strict.KnownFields(true)
	if err := strict.Decode(&c); err != nil {
		t.Fatal(err)
	}
	got := slices.Sorted(maps.Keys(c.Services))
	if want := []string{"grafana", "init", "postgres", "prometheus", "s3", "setup", "temporal", "worker"}; !slices.Equal(got, want) {
		t.Fatalf("the services are %q, want %q", got, want)
	}
	return c
}

// settings is the configuration of the stack.
func settings(t *testing.T) *config.Config {
	t.Helper()
	c, err := config.Load(config.Options{File: "compose/pgkeep.yaml", Hostname: "worker"})
	if err != nil {
		t.Fatal(err)
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
	c := settings(t)
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
	used := make(map[string]bool)
	for name, s := range c.Services {
		targets := make(map[string]bool)
		for _, v := range s.Volumes {
			if targets[v.Target] || !path.IsAbs(v.Target) {
				t.Errorf("service %s mounts %s at %q", name, v.Source, v.Target)
			}
			targets[v.Target] = true
			if v.file() {
				info, err := os.Stat(filepath.Join("..", v.Source))
				if err != nil || !info.Mode().IsRegular() || info.Mode().Perm()&0o044 != 0o044 { // another user reads it
					t.Errorf("service %s mounts %s: %v", name, v.Source, err)
				}
				if !v.ReadOnly {
					t.Errorf("service %s may write to %s", name, v.Source)
				}
				continue
			}
			used[v.Source] = true
			if _, ok := c.Volumes[v.Source]; !ok {
				t.Errorf("service %s: there is no volume %s", name, v.Source)
			}
		}
	}
	for name := range c.Volumes {
		if !used[name] {
			t.Errorf("nobody uses the volume %s", name)
		}
	}
}

// Each has secrets that the others do not need, and only those that make them may
// write there.
func TestSecretsAreOfThoseWhoNeedThem(t *testing.T) {
	for volume, want := range map[string]string{
		"pgkeep-etc":      "init setup worker:ro",
		"s3-etc":          "s3:ro setup",
		"postgres-etc":    "postgres:ro setup",
		"postgres-socket": "postgres worker",
		"s3-data":         "s3",
		"postgres-data":   "postgres",
		"temporal-data":   "temporal",
		"spool":           "worker",
	} {
		var got []string
		for name, s := range compose(t).Services {
			for _, v := range s.Volumes {
				if v.Source == volume && v.ReadOnly {
					name += ":ro"
				}
				if v.Source == volume {
					got = append(got, name)
				}
			}
		}
		if slices.Sort(got); strings.Join(got, " ") != want {
			t.Errorf("volume %s is of %q, want %q", volume, got, want)
		}
	}
}

// What is waited for can come: who is to be healthy says so, who is to end does
// not start again. Whoever stays comes back after the machine does.
func TestWhatIsWaitedForComes(t *testing.T) {
	services := compose(t).Services
	ends := map[string]bool{"setup": true, "init": true}
	for name, s := range services {
		if want := map[bool]string{false: "unless-stopped"}[ends[name]]; s.Restart != want {
			t.Errorf("service %s: restart is %q, want %q", name, s.Restart, want)
		}
		if h := s.Healthcheck; h != nil && (len(h.Test) < 2 || h.Test[0] != "CMD" || h.Interval <= 0 || h.StartPeriod < 30*time.Second) {
			t.Errorf("service %s: healthcheck %+v", name, h)
		}
		for on, how := range s.DependsOn {
			it, ok := services[on]
			switch {
			case !ok || on == name:
				t.Errorf("service %s waits for %s", name, on)
			case how.Condition == "service_healthy" && it.Healthcheck == nil:
				t.Errorf("service %s waits until %s is healthy, which it never says", name, on)
			case how.Condition != map[bool]string{true: "service_completed_successfully", false: "service_healthy"}[ends[on]]:
				t.Errorf("service %s waits for %s to be %s", name, on, how.Condition)
			case len(s.Profiles) == 0 && len(it.Profiles) > 0:
				t.Errorf("service %s waits for %s, which is in a profile", name, on)
			}
		}
	}
	after := func(name string) (all []string) { return slices.Sorted(maps.Keys(services[name].DependsOn)) }
	for name, want := range map[string][]string{"init": {"s3", "setup", "temporal"}, "worker": {"init", "postgres"}, "postgres": {"setup"}, "s3": {"setup"}} {
		if got := after(name); !slices.Equal(got, want) {
			t.Errorf("service %s waits for %q, want %q", name, got, want)
		}
	}
	if grace := services["worker"].StopGracePeriod; grace <= 30*time.Second { // what pgkeep worker takes
		t.Errorf("the worker has %v to stop", grace)
	}
}

// What the configuration of pgkeep names is there, in the container that looks.
func TestConfigurationFitsTheStack(t *testing.T) {
	c, all := settings(t), compose(t)
	at := func(service, dir string) (volume string) {
		for _, v := range all.Services[service].Volumes {
			if v.Target == dir {
				return v.Source
			}
		}
		return ""
	}
	endpoint, err := url.Parse(string(c.Repository.Endpoint))
	if err != nil {
		t.Fatal(err)
	}
	host, _, _ := strings.Cut(string(c.Temporal.Address), ":")
	for what, name := range map[string]string{"repository.endpoint": endpoint.Hostname(), "temporal.address": host} {
		if _, ok := all.Services[name]; !ok {
			t.Errorf("%s is at %q, which is no service", what, name)
		}
	}
	if s3, err := os.ReadFile("compose/s3.sh"); err != nil || !strings.Contains(string(s3), "--port :"+endpoint.Port()+" ") || endpoint.Scheme != "https" {
		t.Errorf("the S3 server does not listen at %s: %v", endpoint, err)
	}
	if ui, err := url.Parse(string(c.Temporal.UIURL)); err != nil || !slices.ContainsFunc(all.Services["temporal"].Ports, func(p string) bool { return strings.HasPrefix(p, "127.0.0.1:"+ui.Port()+":") }) {
		t.Errorf("the Web UI is not at %s: %v", c.Temporal.UIURL, err)
	}
	if at("worker", string(c.Spool)) != "spool" {
		t.Errorf("the worker's spool %s is no volume", c.Spool)
	}
	setup, err := os.ReadFile("compose/setup.sh")
	if err != nil {
		t.Fatal(err)
	}
	main := c.Clusters["main"]
	for what, file := range map[string]config.Path{"repository.ca_file": c.Repository.CAFile, "repository.secret_access_key_file": c.Repository.SecretAccessKeyFile, "password_file": main.PasswordFile} {
		if dir, base := path.Split(string(file)); dir != "/etc/pgkeep/" || !strings.Contains(string(setup), "\"$pgkeep/"+base+"\"") {
			t.Errorf("nobody makes %s: %s", what, file)
		}
	}
	socket := regexp.MustCompile(`host=(\S+)`).FindStringSubmatch(string(main.Conninfo))
	if socket == nil || at("worker", socket[1]) == "" || at("worker", socket[1]) != at("postgres", socket[1]) {
		t.Errorf("worker and server have no socket in common: %v", socket)
	}
	if init := all.Services["init"].Command; len(init) != 1 || !strings.Contains(init[0], "--new-identity "+string(c.Keys.Identity)+"\n") {
		t.Errorf("nobody makes %s: %q", c.Keys.Identity, init)
	}
	if init := all.Services["init"].Command[0]; len(c.Schedules) != 1 || !strings.Contains(init, "pgkeep backup --detach --kind "+string(c.Schedules[0].Kind)+" main ") {
		t.Errorf("the first backup is of another kind than those to come, %v: %s", c.Schedules, init)
	}
}

// Grafana finds what Prometheus has, and the dashboard.
func TestGrafanaIsProvisioned(t *testing.T) {
	s := compose(t).Services["grafana"]
	var sources struct{ Datasources []struct{ Type, URL string } }
	var boards struct {
		Providers []struct{ Options struct{ Path string } }
	}
	home := ""
	for _, v := range s.Volumes {
		text, err := os.ReadFile(filepath.Join("..", v.Source))
		switch path.Dir(v.Target) {
		case "/etc/grafana/provisioning/datasources":
			err = errors.Join(err, yaml.Unmarshal(text, &sources))
		case "/etc/grafana/provisioning/dashboards":
			err = errors.Join(err, yaml.Unmarshal(text, &boards))
		default:
			if strings.HasSuffix(v.Target, ".json") {
				home = v.Target
			} else {
				err = nil // its own volume
			}
		}
		if err != nil {
			t.Error(err)
		}
	}
	if d := sources.Datasources; len(d) != 1 || d[0].Type != "prometheus" || d[0].URL != "http://prometheus:9090" {
		t.Errorf("it asks %+v", d)
	}
	if p := boards.Providers; len(p) != 1 || p[0].Options.Path != path.Dir(home) || s.Environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"] != home {
		t.Errorf("it shows %+v and at first %s, and the dashboard is at %s", p, s.Environment["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"], home)
	}
}

// A shell reads what shells are to run.
func TestScriptsAreScripts(t *testing.T) {
	check := func(what, text string) {
		sh := exec.CommandContext(t.Context(), "sh", "-n")
		sh.Stdin = strings.NewReader(text)
		if out, err := sh.CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", what, err, out)
		}
	}
	files, err := filepath.Glob("compose/*.sh")
	if err != nil || len(files) < 3 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if check(file, string(text)); !strings.HasPrefix(string(text), "#!/bin/sh\n") || !strings.Contains(string(text), "\nset -eu\n") {
			t.Errorf("%s goes on after a failure, or is no script", file)
		}
	}
	for name, s := range compose(t).Services {
		if slices.Equal(s.Entrypoint, []string{"sh", "-ec"}) {
			check("service "+name, strings.ReplaceAll(s.Command[0], "$$", "$"))
		}
	}
}

func TestPrometheusScrapesTheWorker(t *testing.T) {
	c := settings(t)
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
