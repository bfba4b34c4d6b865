package systemd_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/pgkeep/pgkeep/internal/systemd"
)

// known are the directives that there are in systemd.unit(5), systemd.service(5),
// systemd.exec(5), systemd.kill(5) and systemd.resource-control(5), as far as they
// are used here. A word that systemd does not know it only warns of.
var known = map[string]string{
	"Unit": "Description Documentation Wants After Before ConditionPathExists StartLimitIntervalSec",
	"Service": `Type User Group ReadWritePaths DynamicUser ExecStart EnvironmentFile Restart RestartSec RestartPreventExitStatus KillMode KillSignal TimeoutStopSec
		StateDirectory StateDirectoryMode UMask Nice IOSchedulingClass IOSchedulingPriority OOMScoreAdjust LimitCORE
		NoNewPrivileges CapabilityBoundingSet AmbientCapabilities ProtectSystem ProtectHome PrivateTmp PrivateDevices PrivateUsers ProcSubset ProtectProc
		ProtectClock ProtectControlGroups ProtectHostname ProtectKernelLogs ProtectKernelModules ProtectKernelTunables LockPersonality MemoryDenyWriteExecute
		RestrictAddressFamilies RestrictNamespaces RestrictRealtime RestrictSUIDSGID SystemCallArchitectures SystemCallFilter SystemCallErrorNumber`,
	"Install": "WantedBy",
}

func units(t *testing.T) []systemd.Unit {
	t.Helper()
	all, err := systemd.Units(systemd.Options{})
	if err != nil || len(all) != 2 {
		t.Fatalf("%d units, %v", len(all), err)
	}
	return all
}

// values are those of a directive, in a unit.
func values(text, key string) (all []string) {
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(line, key+"="); ok {
			all = append(all, strings.TrimSpace(value))
		}
	}
	return all
}

func TestUnitsSayOnlyWhatSystemdKnows(t *testing.T) {
	for _, u := range units(t) {
		section := ""
		for line := range strings.Lines(u.Text) {
			line = strings.TrimSpace(line)
			key, _, pair := strings.Cut(line, "=")
			switch {
			case line == "", strings.HasPrefix(line, "#"):
			case strings.HasPrefix(line, "["):
				section = strings.Trim(line, "[]")
			case !pair || !slices.Contains(strings.Fields(known[section]), key):
				t.Errorf("%s: [%s] %s", u.Name, section, line)
			}
		}
		for key, want := range map[string]string{"NoNewPrivileges": "yes", "ProtectSystem": "strict", "CapabilityBoundingSet": "", "KillMode": "mixed", "UMask": "0077"} {
			if got := values(u.Text, key); len(got) != 1 || got[0] != want {
				t.Errorf("%s: %s is %q, want %q", u.Name, key, got, want)
			}
		}
	}
}

// The flags that a unit gives are those that the program has.
func TestUnitsStartWhatThereIs(t *testing.T) {
	sources := map[string][]string{"pgkeep": {"../../cmd/pgkeep/worker.go", "../../cmd/pgkeep/env.go"}, "pgkeep-server": {"../../cmd/pgkeep-server/main.go"}}
	for _, u := range units(t) {
		words := strings.Fields(values(u.Text, "ExecStart")[0])
		text := ""
		for _, file := range sources[filepath.Base(words[0])] {
			b, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			text += string(b)
		}
		for _, w := range words[1:] {
			if flag, ok := strings.CutPrefix(w, "--"); ok && !strings.Contains(text, fmt.Sprintf("Name: %q", flag)) {
				t.Errorf("%s: %s has no flag %s", u.Name, words[0], w)
			}
		}
	}
}

// A worker is not killed while it still ends in good order: its grace, and the ten
// seconds that worker.Run adds.
func TestAWorkerHasTimeToStop(t *testing.T) {
	for _, u := range units(t) {
		grace := regexp.MustCompile(`--grace (\d+)s`).FindStringSubmatch(u.Text)
		stop, err := strconv.Atoi(strings.TrimSuffix(values(u.Text, "TimeoutStopSec")[0], "s"))
		if err != nil {
			t.Fatal(err)
		}
		if grace == nil {
			continue
		}
		if g, _ := strconv.Atoi(grace[1]); stop < g+20 {
			t.Errorf("%s: killed after %d s, and its grace is %d s", u.Name, stop, g)
		}
	}
}

func TestPathsOfTheHostAreEscaped(t *testing.T) {
	all, err := systemd.Units(systemd.Options{Programs: "/opt/pg keep", Config: "/srv/100% sure/etc/pgkeep/pgkeep.yaml", Writable: []string{"/srv/100% sure", "/mnt"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, u := range all {
		want := map[string]string{"pgkeep-worker.service": `["\"-/srv/100%% sure\" \"-/mnt\""]`, "pgkeep-server.service": "[]"}[u.Name]
		if got := fmt.Sprintf("%q", values(u.Text, "ReadWritePaths")); got != want {
			t.Errorf("%s may write to %s, want %s", u.Name, got, want)
		}
		if got := values(u.Text, "ExecStart")[0]; !strings.HasPrefix(got, `/opt/pg\x20keep/pgkeep`) {
			t.Errorf("%s starts %s", u.Name, got)
		}
		if strings.Contains(u.Text, " /etc/pgkeep/pgkeep.yaml") || strings.Contains(u.Name, "worker") && !strings.Contains(u.Text, `--config /srv/100%%\x20sure/etc/pgkeep/pgkeep.yaml `) {
			t.Errorf("%s:\n%s", u.Name, u.Text)
		}
		for _, got := range values(u.Text, "ConditionPathExists") { // no command line, and so without quotes
			if got != "/srv/100%% sure/etc/pgkeep/pgkeep.yaml" {
				t.Errorf("%s starts if there is %s", u.Name, got)
			}
		}
	}
}

// Where systemd is, it judges too. Where it is not, the tests above do alone.
func TestSystemdAgrees(t *testing.T) {
	analyze, err := exec.LookPath("systemd-analyze")
	if err != nil {
		t.Log("systemd is not here")
		return
	}
	// It wants the programs to be there, also where a path is one to be escaped.
	programs := filepath.Join(t.TempDir(), "100% pg keep")
	if err := os.Mkdir(programs, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"pgkeep", "pgkeep-server"} {
		if err := os.WriteFile(filepath.Join(programs, name), []byte("#!/bin/sh\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	settings := filepath.Join(programs, "it's pgkeep.yaml")
	if err := os.WriteFile(settings, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	all, err := systemd.Units(systemd.Options{Programs: programs, Config: settings, Writable: []string{programs}})
	if err != nil {
		t.Fatal(err)
	}
	exposed := map[string]string{"pgkeep-worker.service": "28", "pgkeep-server.service": "14"} // tenths
	for _, u := range all {
		file := filepath.Join(t.TempDir(), u.Name)
		if err := os.WriteFile(file, []byte(u.Text), 0o600); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(analyze, "verify", file).CombinedOutput(); err != nil || len(out) > 0 {
			t.Errorf("%s: %v\n%s", u.Name, err, out)
		}
		for _, path := range values(u.Text, "ConditionPathExists") {
			if out, err := exec.Command(analyze, "condition", "ConditionPathExists="+path).CombinedOutput(); err != nil {
				t.Errorf("%s would never start: %v\n%s", u.Name, err, out)
			}
		}
		if out, err := exec.Command(analyze, "security", "--offline=true", "--threshold="+exposed[u.Name], file).CombinedOutput(); err != nil {
			t.Errorf("%s is more exposed than it was, %s tenths: %v\n%s", u.Name, exposed[u.Name], err, out)
		}
	}
}
