package main

import (
	"bufio"
	"bytes"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.temporal.io/api/operatorservice/v1"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/activity"
	"go.temporal.io/sdk/client"
	sdklog "go.temporal.io/sdk/log"
	"go.temporal.io/sdk/temporal"
	"go.temporal.io/sdk/worker"
	"go.temporal.io/sdk/workflow"
	"go.temporal.io/server/common/log/tag"
)

// The tests run the program itself: this binary, told so by its environment.
const beProgram = "PGKEEP_SERVER_TEST_BE_PROGRAM"

func TestMain(m *testing.M) {
	if os.Getenv(beProgram) != "" {
		main()
	}
	os.Exit(m.Run())
}

func command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, os.Args[0], args...)
	cmd.Env = append(os.Environ(), beProgram+"=1")
	return cmd
}

// A program is a running pgkeep-server that has said it is ready.
type program struct {
	Address, Namespace, UI string

	t      testing.TB
	cmd    *exec.Cmd
	exited chan error
	errors *bytes.Buffer // whole once it has exited
}

// launch starts a server on free ports and waits for its line of JSON.
func launch(t testing.TB, file string, args ...string) *program {
	t.Helper()
	p := &program{t: t, exited: make(chan error, 1), errors: new(bytes.Buffer)}
	p.cmd = command(context.WithoutCancel(t.Context()), append([]string{"--db", file, "--port", "0", "--ui-port", "0", "--json"}, args...)...)
	p.cmd.Stderr = p.errors
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.cmd.Process.Kill() })
	ready := json.NewDecoder(out).Decode(p)
	go func() {
		io.Copy(io.Discard, out)
		p.exited <- p.cmd.Wait()
	}()
	if ready != nil {
		p.wait()
		t.Fatalf("not ready: %v\n%s", ready, p.errors)
	}
	return p
}

// end sends the signal and returns how the server exited.
func (p *program) end(sig os.Signal) error {
	p.t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		p.t.Fatal(err)
	}
	return p.wait()
}

func (p *program) wait() error {
	p.t.Helper()
	select {
	case err := <-p.exited:
		return err
	case <-time.After(10 * time.Second):
		p.t.Fatal("still there after 10 s")
		return nil
	}
}

// client connects without trying for long, as the tests kill servers.
func (p *program) client() client.Client {
	p.t.Helper()
	c, err := client.Dial(client.Options{HostPort: p.Address, Namespace: p.Namespace, Logger: sdklog.NewStructuredLogger(slog.New(slog.DiscardHandler))})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(c.Close)
	return c
}

// refused runs a command line that must fail, and returns its exit status and
// what it says.
func refused(t testing.TB, args ...string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	cmd := command(ctx, args...)
	var stderr, stdout bytes.Buffer
	cmd.Stderr, cmd.Stdout = &stderr, &stdout
	err := cmd.Run()
	exit, ok := errors.AsType[*exec.ExitError](err)
	if !ok || ctx.Err() != nil {
		t.Fatalf("%q was not refused: %v", args, err)
	}
	if stdout.Len() > 0 {
		t.Errorf("stdout = %q, want nothing", stdout.String())
	}
	return exit.ExitCode(), stderr.String()
}

func get(t testing.TB, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != http.StatusOK {
		t.Errorf("GET %s = %s, want 200: %s", url, resp.Status, body)
	}
	return string(body)
}

func TestServesTemporalAndItsWebUI(t *testing.T) {
	p := launch(t, filepath.Join(t.TempDir(), "t.db"))
	if _, err := p.client().CheckHealth(t.Context(), &client.CheckHealthRequest{}); err != nil {
		t.Error(err)
	}
	if page := get(t, p.UI+"/namespaces/pgkeep/workflows"); !strings.Contains(page, "<html") {
		t.Errorf("the page is no HTML: %.200s", page)
	}
	if list := get(t, p.UI+"/api/v1/namespaces"); !strings.Contains(list, `"pgkeep"`) {
		t.Errorf("the namespaces do not hold pgkeep: %s", list)
	}
	if settings := get(t, p.UI+"/api/v1/settings"); !strings.Contains(settings, `"DefaultNamespace":"pgkeep"`) {
		t.Errorf("the web ui does not open on pgkeep: %s", settings)
	}
}

func TestSaysWhereItListens(t *testing.T) {
	cmd := command(t.Context(), "--db", filepath.Join(t.TempDir(), "t.db"), "--port", "0", "--ui-port", "0", "--namespace", "other")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var address, ui string
	lines := bufio.NewReader(out)
	if _, err := fmt.Fscanf(lines, "temporal %s namespace other\n", &address); err != nil {
		t.Error(err)
	}
	if _, err := fmt.Fscanf(lines, "web ui %s\n", &ui); err != nil {
		t.Error(err)
	}
	if !strings.HasPrefix(address, "127.0.0.1:") || !strings.HasPrefix(ui, "http://127.0.0.1:") || !strings.HasSuffix(ui, "/namespaces/other") {
		t.Errorf("temporal %q, web ui %q", address, ui)
	}
	cmd.Process.Signal(syscall.SIGTERM)
	if rest, err := io.ReadAll(lines); err != nil || len(rest) > 0 {
		t.Errorf("then it says %q, %v", rest, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestNamespaceIsFitForPgkeep(t *testing.T) {
	p := launch(t, filepath.Join(t.TempDir(), "t.db"))
	c := p.client()
	if got, want := retention(t, c), 90*24*time.Hour; got != want {
		t.Errorf("retention = %s, want %s", got, want)
	}
	list, err := c.OperatorService().ListSearchAttributes(t.Context(), &operatorservice.ListSearchAttributesRequest{Namespace: "pgkeep"})
	if err != nil {
		t.Fatal(err)
	}
	for name, kind := range searchAttributes() {
		if got := list.CustomAttributes[name]; got != kind {
			t.Errorf("search attribute %s is %s, want %s", name, got, kind)
		}
	}
	// They can be searched by.
	_, err = c.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{
		ID: "w", TaskQueue: "nobody",
		TypedSearchAttributes: temporal.NewSearchAttributes(
			temporal.NewSearchAttributeKeyKeyword("PgkeepCluster").ValueSet("main"),
			temporal.NewSearchAttributeKeyInt64("PgkeepBytes").ValueSet(7),
		),
	}, "Nothing")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		found, err := c.CountWorkflow(t.Context(), &workflowservice.CountWorkflowExecutionsRequest{Query: "PgkeepCluster = 'main' AND PgkeepBytes > 6"})
		if err == nil && found.Count != 1 {
			err = fmt.Errorf("the search finds %d workflows, want 1", found.Count)
		}
		return err
	})
}

func TestRetentionFollowsTheFlag(t *testing.T) {
	file := filepath.Join(t.TempDir(), "t.db")
	for _, want := range []time.Duration{48 * time.Hour, 36 * time.Hour, 36 * time.Hour} {
		p := launch(t, file, "--retention", want.String())
		if got := retention(t, p.client()); got != want {
			t.Errorf("retention = %s, want %s", got, want)
		}
		if err := p.end(syscall.SIGTERM); err != nil {
			t.Error(err)
		}
	}
}

func retention(t testing.TB, c client.Client) time.Duration {
	t.Helper()
	ns, err := c.WorkflowService().DescribeNamespace(t.Context(), &workflowservice.DescribeNamespaceRequest{Namespace: "pgkeep"})
	if err != nil {
		t.Fatal(err)
	}
	return ns.Config.WorkflowExecutionRetentionTtl.AsDuration()
}

// Whatever a client was told is there after SIGKILL, also while more comes in.
func TestKilledServerLosesNothingAcknowledged(t *testing.T) {
	file := filepath.Join(t.TempDir(), "t.db")
	var acknowledged []string
	for round := range 4 {
		p := launch(t, file)
		c := p.client()
		for _, id := range acknowledged {
			if _, err := c.DescribeWorkflowExecution(t.Context(), id, ""); err != nil {
				t.Errorf("round %d: %s is lost: %v", round, id, err)
			}
		}
		ids := make(chan string)
		ctx, cancel := context.WithCancel(t.Context())
		var starters sync.WaitGroup
		for n := range 4 {
			starters.Go(func() {
				for i := 0; ; i++ {
					id := fmt.Sprintf("w-%d-%d-%d", round, n, i)
					_, err := c.ExecuteWorkflow(ctx, client.StartWorkflowOptions{ID: id, TaskQueue: "nobody"}, "Nothing")
					if err != nil {
						return
					}
					ids <- id
				}
			})
		}
		for range 50 {
			acknowledged = append(acknowledged, <-ids)
		}
		p.cmd.Process.Kill()
		p.wait()
		cancel()
		go func() { starters.Wait(); close(ids) }()
		for id := range ids { // told before the end came
			acknowledged = append(acknowledged, id)
		}
	}
	p := launch(t, file)
	c := p.client()
	for _, id := range acknowledged {
		if _, err := c.DescribeWorkflowExecution(t.Context(), id, ""); err != nil {
			t.Errorf("%s is lost: %v", id, err)
		}
	}
	t.Logf("%d acknowledged starts", len(acknowledged))
}

// Whenever a first start is killed, the next one finds nothing half made.
func TestKilledFirstStartDoesNoHarm(t *testing.T) {
	file := filepath.Join(t.TempDir(), "t.db")
	for after := 20 * time.Millisecond; after < 500*time.Millisecond; after += 40 * time.Millisecond {
		ctx, cancel := context.WithTimeout(t.Context(), after)
		command(ctx, "--db", file, "--port", "0", "--ui-port", "0").Run() // it is killed
		cancel()
	}
	p := launch(t, file)
	if err := p.end(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
}

func TestStopsCleanly(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		t.Run(sig.String(), func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "t.db")
			p := launch(t, file)
			// A worker's polls are open for a minute each.
			w := worker.New(p.client(), "q", worker.Options{WorkerStopTimeout: time.Second})
			w.RegisterWorkflowWithOptions(sleep, workflow.RegisterOptions{Name: "Sleep"})
			if err := w.Start(); err != nil {
				t.Fatal(err)
			}
			defer w.Stop()
			if _, err := p.client().ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{ID: "w", TaskQueue: "q"}, "Sleep"); err != nil {
				t.Fatal(err)
			}
			began := time.Now()
			if err := p.end(sig); err != nil {
				t.Errorf("exit: %v", err)
			}
			t.Logf("stopped in %s", time.Since(began).Round(time.Millisecond))
			if p.errors.Len() > 0 {
				t.Errorf("a stop that was asked for is no news: %s", p.errors)
			}
			if wal, err := os.Stat(file + "-wal"); err == nil && wal.Size() > 0 {
				t.Errorf("%d bytes are not in the database yet", wal.Size())
			}
		})
	}
}

func sleep(ctx workflow.Context) error { return workflow.Sleep(ctx, time.Hour) }

// An activity without a heartbeat learns that it is cancelled only where the
// server sends commands to workers.
func TestCancelReachesAnActivityWithoutHeartbeat(t *testing.T) {
	p := launch(t, filepath.Join(t.TempDir(), "t.db"))
	c := p.client()
	w := worker.New(c, "q", worker.Options{})
	w.RegisterWorkflowWithOptions(func(ctx workflow.Context) error {
		ctx = workflow.WithActivityOptions(ctx, workflow.ActivityOptions{StartToCloseTimeout: time.Hour, WaitForCancellation: true})
		return workflow.ExecuteActivity(ctx, "Wait").Get(ctx, nil)
	}, workflow.RegisterOptions{Name: "Waiter"})
	running := make(chan struct{})
	w.RegisterActivityWithOptions(func(ctx context.Context) error {
		close(running)
		<-ctx.Done()
		return ctx.Err()
	}, activity.RegisterOptions{Name: "Wait"})
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	run, err := c.ExecuteWorkflow(t.Context(), client.StartWorkflowOptions{ID: "w", TaskQueue: "q"}, "Waiter")
	if err != nil {
		t.Fatal(err)
	}
	<-running
	if err := c.CancelWorkflow(t.Context(), "w", ""); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if err := run.Get(ctx, nil); !temporal.IsCanceledError(err) {
		t.Errorf("the workflow ended with %v, want a cancellation", err)
	}
}

func TestSecondServerOnADatabaseIsRefused(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "t.db")
	p := launch(t, file)
	link := filepath.Join(dir, "link.db")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{file, link} {
		status, said := refused(t, "--db", name, "--port", "0", "--ui-port", "0")
		if status != 1 || !strings.Contains(said, file+": another pgkeep-server uses it") || !strings.Contains(said, "hint: ") {
			t.Errorf("exit %d, %s", status, said)
		}
	}
	if _, err := p.client().CheckHealth(t.Context(), &client.CheckHealthRequest{}); err != nil {
		t.Errorf("the first server suffers: %v", err)
	}
}

func TestRefusesADatabaseThatIsNotItsOwn(t *testing.T) {
	script := func(statements ...string) func(t *testing.T, file string) {
		return func(t *testing.T, file string) {
			db, err := sql.Open("sqlite", dsn(file))
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			for _, stmt := range statements {
				if _, err := db.Exec(stmt); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for _, tt := range []struct {
		name string
		make func(t *testing.T, file string)
		want string
	}{
		{"another schema", func(t *testing.T, file string) {
			if err := prepare(t.Context(), file); err != nil {
				t.Fatal(err)
			}
			script(`UPDATE pgkeep_server SET schema = '0.10-00000000', server = '1.30.4'`)(t, file)
		}, "has schema 0.10-00000000, made by Temporal 1.30.4; this is Temporal 1."},
		{"a stamp without a row", func(t *testing.T, file string) {
			if err := prepare(t.Context(), file); err != nil {
				t.Fatal(err)
			}
			script(`DELETE FROM pgkeep_server`)(t, file)
		}, "read the stamp of "},
		{"tables without a stamp", script(`CREATE TABLE namespaces (id INTEGER)`), ": not a database of pgkeep-server"},
		{"no database", func(t *testing.T, file string) {
			if err := os.WriteFile(file, bytes.Repeat([]byte("a letter to my aunt\n"), 100), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "file is not a database"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "t.db")
			tt.make(t, file)
			before, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			status, said := refused(t, "--db", file, "--port", "0", "--ui-port", "0")
			if status != 1 || !strings.Contains(said, tt.want) {
				t.Errorf("exit %d, said %q, want 1 and %q", status, said, tt.want)
			}
			after, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(before, after) {
				t.Error("the file has changed")
			}
		})
	}
}

func TestTakenPortIsRefusedBeforeTheDatabaseIsTouched(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, taken, _ := net.SplitHostPort(l.Addr().String())
	for _, flags := range [][]string{{"--port", "--ui-port"}, {"--ui-port", "--port"}} {
		dir := filepath.Join(t.TempDir(), "new")
		status, said := refused(t, "--db", filepath.Join(dir, "t.db"), flags[0], taken, flags[1], "0")
		if status != 1 || !strings.Contains(said, "127.0.0.1:"+taken) || !strings.Contains(said, "another port with "+flags[0]+"\n") {
			t.Errorf("exit %d, %s", status, said)
		}
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was made: %v", dir, err)
		}
	}
}

func TestRefusesACommandLine(t *testing.T) {
	db := filepath.Join(t.TempDir(), "new", "t.db")
	for _, tt := range []struct {
		name string
		args []string
		want string
	}{
		{"without a database", nil, "no --db"},
		{"that opens it to others", []string{"--db", db, "--ip", "0.0.0.0"}, "no TLS and no login"},
		{"with a name for an address", []string{"--db", db, "--ip", "localhost"}, "--ip"},
		{"with a port out of range", []string{"--db", db, "--port", "65536"}, "--port 65536"},
		{"with one port for both", []string{"--db", db, "--port", "17233", "--ui-port", "17233"}, "17233"},
		{"with no namespace", []string{"--db", db, "--namespace", ""}, "--namespace"},
		{"with a retention Temporal refuses", []string{"--db", db, "--retention", "1m"}, "--retention 1m0s"},
		{"with an unknown level", []string{"--db", db, "--log-level", "loud"}, "--log-level"},
		{"with an unknown flag", []string{"--db", db, "--bogus"}, "bogus"},
		{"with an unknown command", []string{"--db", db, "migrate"}, `"migrate"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			status, said := refused(t, tt.args...)
			if status != 2 || !strings.HasPrefix(said, "pgkeep-server: error: ") || !strings.Contains(said, tt.want) {
				t.Errorf("exit %d, said %q, want 2 and %q", status, said, tt.want)
			}
		})
	}
	if _, err := os.Stat(filepath.Dir(db)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the directory was made: %v", err)
	}
}

func TestServesOthersWhenAskedTo(t *testing.T) {
	p := launch(t, filepath.Join(t.TempDir(), "t.db"), "--ip", "0.0.0.0", "--insecure-bind")
	if !strings.HasPrefix(p.Address, "127.0.0.1:") {
		t.Errorf("address = %q, which no client on this host can use", p.Address)
	}
	if _, err := p.client().CheckHealth(t.Context(), &client.CheckHealthRequest{}); err != nil {
		t.Error(err)
	}
	get(t, p.UI+"/namespaces/pgkeep")
}

func TestFilesArePrivate(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "new")
	p := launch(t, filepath.Join(dir, "t.db"))
	var seen []string
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		seen = append(seen, d.Name())
		if got := info.Mode().Perm() & 0o077; got != 0 {
			t.Errorf("%s: mode %s lets others in", name, info.Mode())
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"new", "t.db", "t.db-shm", "t.db-wal", "t.db.lock"}; !slices.Equal(seen, want) {
		t.Errorf("files = %q, want %q", seen, want)
	}
	if err := p.end(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
}

func TestAnyPathIsADatabase(t *testing.T) {
	dir := t.TempDir()
	p := launch(t, filepath.Join(dir, "a b?c#d%20", "t.db"))
	if err := p.end(syscall.SIGTERM); err != nil {
		t.Error(err)
	}
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 {
		t.Errorf("made %v, want one directory", list)
	}
}

func TestVersion(t *testing.T) {
	var out, errw bytes.Buffer
	if status := run(t.Context(), []string{"pgkeep-server", "version"}, &out, &errw); status != 0 {
		t.Errorf("exit %d, %s", status, &errw)
	}
	for _, want := range []string{"pgkeep-server ", "temporal server 1.", "temporal web ui 2.", "sqlite schema 0."} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q does not hold %q", out.String(), want)
		}
	}
}

func TestFatalEndsNothing(t *testing.T) {
	var out bytes.Buffer
	broken := make(chan error, 1)
	l := logger{slog.New(slog.NewTextHandler(&out, nil)), broken}
	l.With(tag.NewStringTag("service", "history")).Fatal("no shard", tag.Error(errors.New("disk full")))
	l.Panic("again")
	if got, want := (<-broken).Error(), "temporal server: no shard, error disk full"; got != want {
		t.Errorf("broken = %q, want %q", got, want)
	}
	for _, want := range []string{`msg="no shard" service=history error="disk full"`, "msg=again"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the log %q does not hold %q", out.String(), want)
		}
	}
}

// eventually calls try until it succeeds, for ten seconds.
func eventually(t testing.TB, try func() error) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return
		}
		select {
		case <-deadline:
			t.Fatal(err)
		case <-tick.C:
		}
	}
}
