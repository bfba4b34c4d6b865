package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.temporal.io/sdk/client"

	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/lab"
)

// sick sees a finding of doctor, lets its fix be done, and sees it gone.
func (w *world) sick(name string, severity health.Severity, mend func(fix string)) {
	w.t.Helper()
	ask := func() (health.Finding, bool) {
		w.t.Helper()
		_, out, said := w.pgkeep("doctor", "--json")
		var all struct{ Findings []health.Finding }
		if err := json.Unmarshal([]byte(out), &all); err != nil {
			w.t.Fatalf("%v in\n%s%s", err, out, said)
		}
		i := slices.IndexFunc(all.Findings, func(f health.Finding) bool { return f.Name == name })
		if i < 0 {
			return health.Finding{}, false
		}
		return all.Findings[i], true
	}
	wait := func(there bool) health.Finding {
		w.t.Helper()
		ctx, cancel := context.WithTimeout(w.t.Context(), time.Minute)
		defer cancel()
		for { // Temporal does what it is told in its own time
			if f, ok := ask(); ok == there {
				return f
			}
			select {
			case <-time.After(200 * time.Millisecond):
			case <-ctx.Done():
				w.t.Fatalf("%s: there should be %v", name, there)
			}
		}
	}
	f := wait(true)
	if f.Severity != severity {
		w.t.Errorf("%+v, want it %s", f, severity)
	}
	mend(f.Fix)
	wait(false)
}

// obey runs the commands of a fix.
func (w *world) obey(fix string) {
	w.t.Helper()
	for _, one := range strings.Split(fix, "; ") {
		_, command, ok := strings.Cut(one, "pgkeep ")
		if !ok {
			w.t.Errorf("the fix %q is no command", one)
			continue
		}
		w.ok(strings.Fields(strings.TrimSuffix(command, " ends it"))...)
	}
}

// What goes wrong with a server that has schedules, and with who serves them.
func TestDoctorOfSchedules(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	temporal := lab.TemporalForTest(t)
	text, err := os.ReadFile(w.config)
	if err != nil {
		t.Fatal(err)
	}
	base := strings.ReplaceAll(string(text), `temporal: {address: "127.0.0.1:9"}`, `temporal: {address: "`+temporal.Address+`"}`) + "\nhost: db1\n"
	set := func(schedules string) { w.write("pgkeep.yaml", base+schedules) }
	before, _, _ := strings.Cut(base, "clusters:")
	w.write("pgkeep.yaml", before+"\nhost: db1\n")
	w.sick("no-cluster", health.Warning, func(string) { set("") })
	w.sick("unscheduled", health.Warning, func(fix string) {
		set(`schedules: [{cluster: main, cron: "@daily"}]`)
		w.obey(strings.TrimPrefix(fix, "write schedules into the configuration, then: "))
	})
	w.sick("no-worker", health.Critical, func(fix string) {
		if fix != "start pgkeep worker on db1" {
			t.Errorf("fix: %s", fix)
		}
		// In a process of its own: the library of the command line has state for all
		// of a process.
		worker := exec.Command("pgkeep", "--config", w.config, "worker", "--grace", "1s")
		if err := worker.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := errors.Join(worker.Process.Signal(syscall.SIGTERM), worker.Wait()); err != nil {
				t.Errorf("the worker: %v", err)
			}
		})
	})
	keeps := strings.ReplaceAll(base, "host: db1}", "host: db1, retention: {window: 14d}}")
	w.write("pgkeep.yaml", keeps+`schedules: [{cluster: main, cron: "@daily"}]`)
	w.sick("never-expires", health.Warning, func(fix string) {
		entry, rest, _ := strings.Cut(strings.TrimPrefix(fix, "write "), " into schedules of the configuration, then: ")
		w.write("pgkeep.yaml", keeps+`schedules: [{cluster: main, cron: "@daily"}, `+entry+`]`)
		w.obey(rest)
	})
	set(`schedules: [{cluster: main, cron: "@daily"}]`)
	w.ok("schedule", "delete", "main/expire")
	w.ok("schedule", "pause", "--note", "storage moves", "main/logical")
	w.sick("schedule-paused", health.Warning, w.obey)
	w.ok("schedule", "delete", "main/logical")
	w.sick("schedule-missing", health.Critical, w.obey)
	set(`schedules: [{cluster: main, cron: "0 0 30 2 *"}]`)
	w.ok("schedule", "apply")
	w.sick("schedule-ended", health.Warning, func(fix string) {
		set(`schedules: [{cluster: main, cron: "@daily"}]`)
		w.obey(strings.TrimPrefix(fix, "give it a time that comes in the configuration, then: "))
	})

	// A run that takes longer than it may: its dump waits for a lock. Somebody has
	// set it to every five seconds, in the Web UI.
	lock, err := w.pg.Connect(t.Context(), "shop")
	if err == nil {
		_, err = lock.Exec(t.Context(), "BEGIN; LOCK TABLE orders")
	}
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close(context.Background())
	c, err := client.Dial(client.Options{HostPort: temporal.Address, Namespace: temporal.Namespace})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	err = c.ScheduleClient().GetHandle(t.Context(), "pgkeep/main/logical").Update(t.Context(), client.ScheduleUpdateOptions{
		DoUpdate: func(in client.ScheduleUpdateInput) (*client.ScheduleUpdate, error) {
			s := in.Description.Schedule
			s.Spec = &client.ScheduleSpec{Intervals: []client.ScheduleIntervalSpec{{Every: 5 * time.Second}}}
			return &client.ScheduleUpdate{Schedule: &s}, nil
		}})
	if err != nil {
		t.Fatal(err)
	}
	w.sick("schedule-skipping", health.Warning, func(fix string) {
		_, command, _ := strings.Cut(fix, "; ")
		w.obey(command)
	})
	// That run ended badly. The next one does not have to wait.
	w.sick("schedule-failing", health.Warning, func(fix string) {
		if !strings.HasSuffix(fix, ": pgkeep schedule trigger main/logical") { // which it does by itself, every five seconds
			t.Errorf("fix: %s", fix)
		}
		if _, err := lock.Exec(t.Context(), "ROLLBACK"); err != nil {
			t.Fatal(err)
		}
	})
	w.ok("schedule", "delete", "main/logical")

	temporal.Kill()
	w.sick("temporal-down", health.Warning, func(string) {
		if err := temporal.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
}
