package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The stack does what docker-compose.yml says at its top: it comes up, its first
// backup is there, and a restore of that holds what the source does. Where no
// engine answers, or images cannot be had, the other tests are all there is.
func TestTheStackRuns(t *testing.T) {
	run := func(limit time.Duration, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), limit)
		defer cancel()
		cmd := exec.CommandContext(ctx, "docker", args...)
		cmd.WaitDelay = time.Second
		var said strings.Builder
		cmd.Stderr = &said
		out, err := cmd.Output()
		if err != nil {
			err = fmt.Errorf("docker %s: %w\n%s", strings.Join(args, " "), err, said.String())
		}
		return string(out), err
	}
	for _, ask := range [][]string{{"version", "--format", "{{.Server.Version}}"}, {"compose", "version", "--short"}} {
		if _, err := run(10*time.Second, ask...); err != nil {
			t.Logf("not run: %v", err)
			return
		}
	}
	for _, image := range outside(t) {
		if _, err := run(10*time.Second, "image", "inspect", image); err == nil {
			continue
		}
		if _, err := run(10*time.Minute, "pull", "--quiet", image); err != nil {
			t.Logf("not run: %v", err)
			return
		}
	}

	// Its ports may be taken, by the stack of who runs this.
	private := filepath.Join(t.TempDir(), "private.yml")
	if err := os.WriteFile(private, []byte("services: {temporal: {ports: !reset []}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	stack := []string{"compose", "--project-name", fmt.Sprintf("pgkeep-test-%d", os.Getpid()), "--project-directory", "..", "--file", "../docker-compose.yml", "--file", private}
	try := func(args ...string) (string, error) {
		return run(20*time.Minute, append(append([]string{}, stack...), args...)...)
	}
	must := func(args ...string) string {
		t.Helper()
		out, err := try(args...)
		if err != nil {
			logs, _ := try("logs", "--no-color", "--tail", "20")
			t.Fatalf("%v\n%s", err, logs)
		}
		return out
	}
	defer func() { // and not at Cleanup, when the context is over
		if _, err := try("down", "--volumes", "--timeout", "5"); err != nil {
			t.Error(err)
		}
	}()
	must("up", "--detach", "--build")

	backups := func() (ids []string) {
		t.Helper()
		var list struct{ Backups []struct{ ID string } }
		if err := json.Unmarshal([]byte(must("exec", "-T", "worker", "pgkeep", "list", "--json")), &list); err != nil {
			t.Fatal(err)
		}
		for _, b := range list.Backups {
			ids = append(ids, b.ID)
		}
		return ids
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for late := time.After(3 * time.Minute); len(backups()) == 0; {
		select {
		case <-tick.C:
		case <-late:
			t.Fatalf("there is no backup:\n%s", must("logs", "--no-color", "--tail", "50", "init", "worker"))
		}
	}
	must("exec", "-T", "worker", "pgkeep", "restore", "--to", "shop_restored", "latest")
	orders := func(database string) string {
		t.Helper()
		return must("exec", "-T", "postgres", "sh", "-ec", "PGPASSWORD=$(cat /etc/postgres-setup/superuser.password) psql -AtX -U postgres -d "+database+
			` -c "SELECT count(*), md5(string_agg(o::text, ',' ORDER BY id)) FROM orders o"`)
	}
	source, restored := orders("shop"), orders("shop_restored")
	if !strings.HasPrefix(source, "100000|") || restored != source {
		t.Errorf("the source holds %s, and what was restored %s", source, restored)
	}

	// Once more, as after a change of the configuration: what is there is kept.
	before := backups()
	must("up", "--detach")
	if after := backups(); strings.Join(after, " ") != strings.Join(before, " ") {
		t.Errorf("backups were %q, and are %q", before, after)
	}
}

// outside are the images that others make, of what is in no profile.
func outside(t *testing.T) (images []string) {
	t.Helper()
	for _, s := range compose(t).Services {
		if s.Build.Target == "" && len(s.Profiles) == 0 {
			images = append(images, s.Image)
		}
	}
	dockerfile, err := os.ReadFile("../Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`(?m)^ARG \w+_IMAGE=(.*)$`).FindAllStringSubmatch(string(dockerfile), -1) {
		images = append(images, m[1])
	}
	if len(images) != 3 {
		t.Fatalf("images from outside: %q", images)
	}
	return images
}
