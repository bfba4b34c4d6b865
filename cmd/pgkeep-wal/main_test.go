package main

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/wal"
)

func TestNoTemporalIsLinked(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil || !bytes.Contains(out, []byte("pgkeep/internal/wal\n")) {
		t.Fatalf("go list: %v\n%s", err, out)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "go.temporal.io") || strings.HasPrefix(line, "github.com/jackc/pgx") { // it starts for every segment
			t.Errorf("depends on %s", line)
		}
	}
}

func TestFetchStatus(t *testing.T) {
	for _, k := range fail.Kinds() {
		if got := fetchStatus(fmt.Errorf("fetch: %w", k)); got < 200 || got > 239 {
			t.Errorf("%q: %d", k, got)
		}
	}
	if got := fetchStatus(fmt.Errorf("fetch: %w", wal.ErrAbsent)); got != 1 {
		t.Errorf("absent: %d", got)
	}
	if got := fetchStatus(fmt.Errorf("fetch: %w; %w", fail.StoreDown, wal.ErrLater)); got != 1 {
		t.Errorf("a standby in an outage: %d", got)
	}
	if got := fetchStatus(fmt.Errorf("fetch: %w; %w", fail.StoreDown, wal.ErrWait)); got < 200 || got > 239 {
		t.Errorf("a history that a standby asks for in an outage: %d", got)
	}
}

// A host that restores may know nothing of the cluster but its name.
func TestAClusterThatIsNotInTheConfigurationIsFetchedByTheDefaults(t *testing.T) {
	cfg, err := config.Parse("x.yaml", []byte("repository: {url: 's3://bucket/prefix'}"), config.Options{Hostname: "db2"})
	if err != nil {
		t.Fatal(err)
	}
	if f := (call{cluster: "main"}).fetcher(cfg); f.Ahead != 8 || f.HoleGrace != 30*time.Second {
		t.Errorf("%d ahead, grace for a hole %v", f.Ahead, f.HoleGrace)
	}
}

// What outlives its parent becomes a child of process 1.
func TestNothingOutlivesAPushWhereTheServerIsProcessOne(t *testing.T) {
	for pid, want := range map[string]bool{"1": false, "17": true, "": true} {
		c := call{cluster: "main", pgdata: t.TempDir()}
		if pid != "" {
			if err := os.WriteFile(filepath.Join(c.pgdata, "postmaster.pid"), []byte(pid+"\n"+c.pgdata+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if p := c.pusher(new(config.Config), nil); (p.Spawn != nil) != want {
			t.Errorf("server %q: a process is started: %t", pid, !want)
		}
	}
}

func TestWrongCommandLines(t *testing.T) {
	for _, tt := range []struct {
		line string
		want int
	}{
		{"", 202},
		{"fecth 000000010000000000000001 x", 202}, // not 2, which ends a recovery
		{"fetch 000000010000000000000001", 202},
		{"fetch --nonsense 000000010000000000000001 x", 202},
		{"fetch --timeout 0s 000000010000000000000001 x", 202},
		{"fetch --config /nonexistent 000000010000000000000001 x", 202},
		{"ahead --config /nonexistent", 0}, // whatever happens to it
		{"ahead x", 0},
		{"push-ahead --config /nonexistent --after 000000010000000000000001", 0},
		{"push-ahead --after x", 0},
		{"push", 2},
		{"push a b", 2},
		{"push --nonsense a", 2},
		{"push --config /nonexistent a", 2},
		{"--help", 0},
		{"push --help", 0},
	} {
		var out, said bytes.Buffer
		args := append([]string{"pgkeep-wal"}, strings.Fields(tt.line)...)
		got := run(t.Context(), args, nil, &out, &said)
		if got != tt.want || (got != 0) != (strings.Count(said.String(), "\n") == 1) {
			t.Errorf("pgkeep-wal %s = %d, want %d, and one line if that is wrong; it said %q", tt.line, got, tt.want, &said)
		}
	}
}

// A world is a PostgreSQL that archives small segments to a real S3 server, with
// the program as it is shipped. What archives holds no key that opens data.
type world struct {
	t             testing.TB
	dir           string // all below belongs to PostgreSQL's OS user
	cred          *syscall.Credential
	program       string
	s3            *lab.S3
	pg            *lab.Postgres
	host, restore string // configurations
}

const rows = 20

func newWorld(t testing.TB, segmentMB int) *world {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgkeep-wal-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	w := &world{t: t, dir: dir, program: filepath.Join(dir, "pgkeep-wal"), s3: lab.S3ForTest(t)}
	if os.Getuid() == 0 {
		u, err := user.Lookup("postgres")
		if err != nil {
			t.Fatal(err)
		}
		uid, _ := strconv.Atoi(u.Uid)
		gid, _ := strconv.Atoi(u.Gid)
		w.cred = &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}
	}
	w.own(dir)
	if err := lab.Build(t.Context(), dir, "pgkeep-wal"); err != nil {
		t.Fatal(err)
	}
	w.own(w.program)

	signer, err := seal.NewSigner()
	if err != nil {
		t.Fatal(err)
	}
	metadata, _ := age.GenerateX25519Identity()
	operator, _ := age.GenerateX25519Identity()
	ca, err := os.ReadFile(w.s3.CAFile)
	if err != nil {
		t.Fatal(err)
	}
	w.write("ca.pem", string(ca))
	w.write("s3.secret", w.s3.SecretAccessKey)
	w.write("signing.key", signer.Secret())
	w.write("metadata.key", metadata.String())
	w.write("operator.key", operator.String())
	w.host = w.configure("host.yaml", "", w.s3.Endpoint, w.s3.AccessKeyID)
	w.restore = w.configure("restore.yaml", "operator.key", w.s3.Endpoint, w.s3.AccessKeyID)

	cfg, err := config.Load(config.Options{File: w.restore, Hostname: "db1"})
	if err != nil {
		t.Fatal(err)
	}
	st, err := open.Store(t.Context(), cfg.Repository)
	if err != nil {
		t.Fatal(err)
	}
	access, err := open.Access(cfg, "test")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := repo.Init(t.Context(), st, access, []string{operator.Recipient().String()}, time.Now()); err != nil {
		t.Fatal(err)
	}
	w.pg = lab.PostgresForTest(t, lab.PostgresOptions{WALSegmentMB: segmentMB, Settings: map[string]string{
		"archive_mode": "on", "archive_command": w.program + " push --config " + w.host + " %p", "wal_keep_size": "500MB"}})
	return w
}

// configure writes a configuration file.
func (w *world) configure(name, identity, endpoint, accessKey string) string {
	w.t.Helper()
	if identity != "" {
		identity = "  identity: " + w.dir + "/" + identity + "\n"
	}
	return w.write(name, fmt.Sprintf(`
repository: {url: 's3://%s/prod', endpoint: '%s', ca_file: %[3]s/ca.pem, access_key_id: %s, secret_access_key_file: %[3]s/s3.secret}
keys:
  signing_key: %[3]s/signing.key
  metadata_identity: %[3]s/metadata.key
%[5]sclusters:
  main: {conninfo: "host=/nowhere"}
`, w.s3.Bucket, endpoint, w.dir, accessKey, identity))
}

func (w *world) write(name, text string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	w.own(path)
	return path
}

func (w *world) own(path string) {
	w.t.Helper()
	if w.cred != nil {
		if err := os.Chown(path, int(w.cred.Uid), int(w.cred.Gid)); err != nil {
			w.t.Fatal(err)
		}
	}
}

// as runs a program as PostgreSQL's OS user.
func (w *world) as(ctx context.Context, dir, program string, args ...string) (status int, said string) {
	w.t.Helper()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Dir, cmd.Env = dir, []string{"PATH=/usr/bin:/bin", "HOME=" + w.dir}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: w.cred}
	out, err := cmd.CombinedOutput()
	if _, ok := errors.AsType[*exec.ExitError](err); err != nil && !ok {
		w.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), string(out)
}

// wal runs pgkeep-wal in a data directory and wants a status, with a line that
// says all of that, or no line at all.
func (w *world) wal(want int, says, pgdata string, args ...string) {
	w.t.Helper()
	status, said := w.as(w.t.Context(), pgdata, w.program, args...)
	lines := strings.Count(said, "\n")
	if status != want || !strings.Contains(said, says) || lines > 1 || (says == "") != (lines == 0) {
		w.t.Errorf("pgkeep-wal %s = %d, want %d; want %q in %q", strings.Join(args, " "), status, want, says, said)
	}
}

func (w *world) query(p *lab.Postgres, sql string) (text string) {
	w.t.Helper()
	conn, err := p.Connect(w.t.Context(), "postgres")
	if err != nil {
		w.t.Fatal(err)
	}
	defer conn.Close(w.t.Context())
	if err := conn.QueryRow(w.t.Context(), sql).Scan(&text); err != nil {
		w.t.Fatal(err)
	}
	return text
}

// fill takes a base backup, inserts rows, each in a segment of its own, and
// waits until the last is archived. It returns the segments with rows.
func (w *world) fill() (base string, segments []string) {
	w.t.Helper()
	base = filepath.Join(w.dir, "base")
	if err := w.pg.Exec(w.t.Context(), "postgres", "CREATE TABLE t (id int, noise text)"); err != nil {
		w.t.Fatal(err)
	}
	out, err := w.pg.Command(w.t.Context(), "pg_basebackup", "-d", w.pg.Conninfo(), "-D", base, "-X", "none", "-c", "fast", "--no-sync").CombinedOutput()
	if err != nil {
		w.t.Fatalf("pg_basebackup: %v\n%s", err, out)
	}
	for i := range rows {
		if err := w.pg.Exec(w.t.Context(), "postgres", fmt.Sprintf("INSERT INTO t SELECT %d, string_agg(md5(random()::text), '') FROM generate_series(1, 1000)", i)); err != nil {
			w.t.Fatal(err)
		}
		segments = append(segments, w.query(w.pg, "SELECT pg_walfile_name(pg_switch_wal())"))
	}
	last := segments[rows-1]
	deadline := time.Now().Add(time.Minute)
	for w.query(w.pg, "SELECT coalesce(last_archived_wal, '') FROM pg_stat_archiver") < last {
		if time.Now().After(deadline) {
			w.t.Fatalf("%s is not archived: %s", last, w.query(w.pg, "SELECT row_to_json(a)::text FROM pg_stat_archiver a"))
		}
		<-time.After(20 * time.Millisecond)
	}
	return base, segments
}

// recover starts a copy of the base backup that replays all there is.
func (w *world) recover(base, name, config string) (*lab.Postgres, error) {
	w.t.Helper()
	dir := filepath.Join(w.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		w.t.Fatal(err)
	}
	if out, err := exec.Command("cp", "-a", base, filepath.Join(dir, "data")).CombinedOutput(); err != nil {
		w.t.Fatalf("%v: %s", err, out)
	}
	w.write(filepath.Join(name, "data", "recovery.signal"), "")
	p, err := lab.StartPostgres(w.t.Context(), lab.PostgresOptions{Dir: dir, Settings: map[string]string{"hot_standby": "off",
		"restore_command": w.program + " fetch --timeout 2s --config " + config + " %f %p"}})
	if err == nil {
		w.t.Cleanup(func() { p.Stop() })
	}
	return p, err
}

// object is the file that holds an object of the archive.
func (w *world) object(name string) string {
	w.t.Helper()
	found, err := filepath.Glob(filepath.Join(w.s3.Data, "prod/clusters/main/wal/*-*", name[:8], name+".zst"))
	if err != nil || len(found) != 1 {
		w.t.Fatalf("object of %s: %q, %v", name, found, err)
	}
	return found[0]
}

// TestArchive tells the story of one archive, on real parts.
func TestArchive(t *testing.T) {
	w := newWorld(t, 1)
	base, segments := w.fill()
	pgwal := filepath.Join(w.pg.DataDir, "pg_wal")
	target := filepath.Join(w.dir, "fetched")
	if got := w.query(w.pg, "SELECT failed_count::text FROM pg_stat_archiver"); got != "0" {
		t.Errorf("%s attempts failed", got)
	}

	t.Run("every segment comes back byte for byte", func(t *testing.T) {
		for _, s := range segments {
			w.wal(0, "", base, "fetch", "--config", w.restore, s, target)
			same(t, filepath.Join(pgwal, s), target)
		}
	})
	t.Run("the same file again is success", func(t *testing.T) {
		before := read(t, w.object(segments[3]))
		w.wal(0, "", w.pg.DataDir, "push", "--config", w.host, "pg_wal/"+segments[3])
		if !bytes.Equal(before, read(t, w.object(segments[3]))) {
			t.Error("the object was replaced")
		}
	})
	t.Run("another file of the name is a conflict", func(t *testing.T) {
		before := read(t, w.object(segments[3]))
		content := read(t, filepath.Join(pgwal, segments[3]))
		content[500_000] ^= 1
		w.wal(11, "SHA-256", w.pg.DataDir, "push", "--config", w.host, w.write(segments[3], string(content)))
		if !bytes.Equal(before, read(t, w.object(segments[3]))) {
			t.Error("the object was replaced")
		}
		w.wal(14, "524288 bytes", w.pg.DataDir, "push", "--config", w.host, w.write(segments[3], string(content[:1<<19])))
		w.wal(14, "by its name", w.pg.DataDir, "push", "--config", w.host, w.write("0000000100000000000000F0", string(content)))
	})
	t.Run("another cluster's WAL is refused", func(t *testing.T) {
		other := lab.PostgresForTest(t, lab.PostgresOptions{WALSegmentMB: 1})
		segment := w.query(other, "SELECT pg_walfile_name(pg_switch_wal())")
		content := read(t, filepath.Join(other.DataDir, "pg_wal", segment))
		w.wal(10, "hint", w.pg.DataDir, "push", "--config", w.host, w.write(segment, string(content)))
		w.wal(210, "has no WAL of system", other.DataDir, "fetch", "--timeout", "1s", "--config", w.restore, "00000002.history", target)
	})
	t.Run("fetch tells absence from everything else", func(t *testing.T) {
		next := segments[rows-1][:16] + "000000F0"
		w.wal(1, "", base, "fetch", "--config", w.restore, next, target)
		w.wal(1, "", base, "fetch", "--config", w.restore, "00000002.history", target)
		w.wal(216, "no identity", base, "fetch", "--timeout", "1s", "--config", w.host, segments[0], target+"-")
		w.wal(202, "RECOVERYXLOG", base, "fetch", "--config", w.restore, "RECOVERYXLOG", target)
		w.wal(221, "store-denied", base, "fetch", "--timeout", "1s", "--config", w.configure("denied.yaml", "operator.key", w.s3.Endpoint, "nobody"), next, target)
		w.wal(220, "store-down", base, "fetch", "--timeout", "2s", "--config", w.configure("down.yaml", "operator.key", "https://127.0.0.1:9", w.s3.AccessKeyID), next, target)
	})
	t.Run("recovery replays to the last row", func(t *testing.T) {
		p, err := w.recover(base, "sound", w.restore)
		if err != nil {
			t.Fatal(err)
		}
		if got := w.query(p, "SELECT count(*)::text FROM t"); got != strconv.Itoa(rows) {
			t.Errorf("%s rows, want %d", got, rows)
		}
	})

	middle := segments[rows/2]
	object := w.object(middle)
	sound := read(t, object)
	flipped := slices.Clone(sound)
	flipped[len(flipped)-100] ^= 1
	lied := slices.Clone(sound)
	lied[200] ^= 1
	for _, tt := range []struct {
		name, says string
		status     int
		content    []byte // nil: no object
	}{
		{"one bit flipped", "", 214, flipped},
		{"one bit of the header flipped", "", 214, lied},
		{"truncated", "", 214, sound[:len(sound)-1000]},
		{"nothing in it", "", 214, []byte{}},
		{"too long", "", 214, append(slices.Clone(sound), 0)},
		{"another file's", "holds the file", 214, read(t, w.object(segments[2]))},
		{"missing", "it is missing, though the archive holds " + segments[rows-1], 214, nil},
	} {
		t.Run("PostgreSQL does not open: "+tt.name, func(t *testing.T) {
			err := os.WriteFile(object, tt.content, 0o600) // in place: the server keeps what else it knows of the object
			if tt.content == nil {
				err = os.Remove(object)
			}
			if err != nil {
				t.Fatal(err)
			}
			os.Remove(target)
			w.wal(tt.status, cmp.Or(tt.says, "pgkeep-wal: "), base, "fetch", "--timeout", "1s", "--config", w.restore, middle, target)
			if _, err := os.Stat(target); err == nil {
				t.Error("something was delivered all the same")
			}
			if p, err := w.recover(base, strings.ReplaceAll(tt.name, " ", ""), w.restore); err == nil {
				t.Errorf("it opened, with %s of %d rows", w.query(p, "SELECT count(*)::text FROM t"), rows)
			}
		})
	}
	t.Run("PostgreSQL does not open: S3 is down", func(t *testing.T) {
		if _, err := w.recover(base, "down", filepath.Join(w.dir, "down.yaml")); err == nil {
			t.Error("it opened")
		}
	})
	t.Run("PostgreSQL does not open: S3 says 403", func(t *testing.T) {
		if _, err := w.recover(base, "denied", filepath.Join(w.dir, "denied.yaml")); err == nil {
			t.Error("it opened")
		}
	})
	t.Run("SIGTERM is answered at once, and so is the deadline", func(t *testing.T) {
		if err := w.s3.Pause(); err != nil {
			t.Fatal(err)
		}
		defer w.s3.Resume()
		for _, tt := range []struct {
			want int
			args []string
		}{
			{42, []string{"push", "--config", w.host, "pg_wal/" + segments[0]}},
			{239, []string{"fetch", "--config", w.restore, segments[0], target}},
		} {
			cmd := exec.Command(w.program, tt.args...)
			cmd.Dir = w.pg.DataDir
			cmd.SysProcAttr = &syscall.SysProcAttr{Credential: w.cred}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			connected(t, cmd.Process.Pid)
			start := time.Now()
			cmd.Process.Signal(syscall.SIGTERM)
			cmd.Wait()
			if got, took := cmd.ProcessState.ExitCode(), time.Since(start); got != tt.want || took > 2*time.Second {
				t.Errorf("%s: status %d after %v, want %d", tt.args[0], got, took, tt.want)
			}
		}
		start := time.Now()
		w.wal(20, "not done within 1s", w.pg.DataDir, "push", "--timeout", "1s", "--config", w.host, "pg_wal/"+segments[0])
		if took := time.Since(start); took > 3*time.Second {
			t.Errorf("the deadline of 1s took %v", took)
		}
	})
}

// connected waits until a process has a socket.
func connected(t *testing.T, pid int) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		fds, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
		for _, fd := range fds {
			if to, err := os.Readlink(fd); err == nil && strings.HasPrefix(to, "socket:") {
				return
			}
		}
		<-time.After(5 * time.Millisecond)
	}
	t.Fatal("it does not connect to anything")
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func same(t testing.TB, want, got string) {
	t.Helper()
	if !bytes.Equal(read(t, want), read(t, got)) {
		t.Errorf("%s is not %s", got, want)
	}
}
