package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// What an operator does with backups, one thing after the other.
func TestBackupsAreListedVerifiedRestoredDeleted(t *testing.T) {
	w := newWorld(t)
	if out := w.ok("list"); out != "" {
		t.Errorf("list of an empty repository printed %q", out)
	}
	w.fails(13, nil, "show", "latest")
	first, second := w.backup(), w.backup()

	var list struct {
		Schema  string
		Backups []backupShown
	}
	if err := json.Unmarshal([]byte(w.ok("list", "--json")), &list); err != nil {
		t.Fatal(err)
	}
	var ids []repo.ID
	for _, b := range list.Backups {
		ids = append(ids, b.ID)
	}
	if !slices.Equal(ids, []repo.ID{first, second}) || list.Schema != "pgkeep.list/1" {
		t.Errorf("list --json shows %s %v, want %v and %v", list.Schema, ids, first, second)
	}
	if b := list.Backups[0]; b.State != complete || b.Verified != repo.VerifiedContent || len(b.Databases) != 2 || b.Databases[1].Name != "shop" || b.LSN.After == 0 {
		t.Errorf("list --json shows %+v", b)
	}
	table := w.ok("list", "main")
	for line := range strings.Lines(table) {
		if len(line) > 102 {
			t.Errorf("line of %d columns: %s", len(line), line)
		}
	}
	w.fails(2, []string{`did you mean "main"?`}, "list", "mian")
	w.fails(0, []string{string(first), "WAL archive", "shop", "a-run"}, "show", string(first)[:15])
	w.fails(2, []string{"2 backups begin"}, "show", "main", "2026")
	w.fails(0, []string{`"snapshot"`, `"content"`, `"schema": "pgkeep.show/1"`}, "show", "--json", "latest")

	w.fails(0, []string{string(second) + "  main  sound (content)"}, "verify", "latest")
	w.fails(0, []string{`"contents_listed": true`}, "verify", "--all", "--json")
	w.fails(2, nil, "verify")

	w.fails(18, []string{`database "shop" is not empty`}, "restore", "--database", "shop", "latest")
	w.fails(2, []string{"--database one of: postgres, shop"}, "restore", "--to", "copy", "latest")
	w.fails(0, []string{"dry run", `into database "copy", which is made`}, "restore", "--database", "shop", "--to", "copy", "--dry-run", "latest")
	w.fails(0, []string{`into database "copy", which is made`, `restored "shop" as "copy": 2 tables`}, "restore", "--database", "shop", "--to", "copy", "latest")
	w.same("shop", "copy")
	w.exec("postgres", "CREATE DATABASE made")
	w.fails(0, []string{`"create": false`, `"database": "shop"`, `"tables": 2`}, "restore", "--database", "shop", "--to", "made", "--json", string(first))
	w.same("shop", "made")
	w.fails(0, []string{"CREATE ROLE clerk"}, "restore", "--globals", "latest")
	w.exec("postgres", "CREATE ROLE visitor LOGIN")
	visitor := strings.Replace(w.pg.Conninfo(), "user=postgres", "user=visitor", 1)
	if status, _, said := w.pgkeep("restore", "--target", visitor, "--database", "shop", "--to", "other", "latest"); status != 31 || strings.Contains(said, "left behind") {
		t.Errorf("restore by somebody who may not make databases = %d\n%s", status, said)
	}

	w.fails(2, []string{"is not a backup id"}, "delete", "--yes", "latest")
	w.fails(2, []string{"--yes"}, "delete", string(first))
	w.fails(0, []string{"deleted backup " + string(first)}, "delete", "--yes", string(first))
	w.fails(13, nil, "delete", "--yes", string(first))
	if out := w.ok("list"); strings.Contains(out, string(first)) || !strings.Contains(out, string(second)) {
		t.Errorf("after the deletion of %s the list is\n%s", first, out)
	}
	for key := range w.objects() {
		if strings.Contains(key, string(first)) {
			t.Errorf("the deletion left %s", key)
		}
	}
	w.fails(0, nil, "verify", "--all")
	for _, file := range []string{"spool", "keys"} {
		if left, _ := filepath.Glob(filepath.Join(w.dir, file, "pgkeep-*")); len(left) > 0 {
			t.Errorf("left in scratch: %v", left)
		}
	}
}

// Everything in the repository counts: whichever byte changes, somebody says so
// and says where.
func TestVerifyNamesTheObjectThatChanged(t *testing.T) {
	w := newWorld(t)
	id := w.backup()
	for key, file := range w.objects() {
		sound, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, at := range []int{0, len(sound) / 3, len(sound) / 2, len(sound) - 2} {
			changed := slices.Clone(sound)
			changed[at] ^= 0x01
			overwrite(t, file, changed)
			args := []string{"verify", string(id)}
			status, out, said := w.pgkeep(args...)
			if status < 14 || status > 17 || !strings.Contains(out+said, key) {
				t.Errorf("%s: byte %d of %d changed: verify = %d\n%s%s", key, at, len(sound), status, out, said)
			}
		}
		overwrite(t, file, sound)
	}
	w.fails(0, nil, "verify", string(id))

	for key, file := range w.objects() {
		if !strings.HasSuffix(key, ".pack") {
			continue
		}
		aside := filepath.Join(w.s3.Dir, "aside") // with what the server keeps about it
		if err := os.Rename(file, aside); err != nil {
			t.Fatal(err)
		}
		w.fails(14, []string{"DAMAGED", "  " + key + ": is missing"}, "verify", "latest")
		if err := os.Rename(aside, file); err != nil {
			t.Fatal(err)
		}
	}

	for key, file := range w.objects() {
		if strings.HasSuffix(key, ".pack") {
			sound, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			sound[len(sound)/2] ^= 0x01
			overwrite(t, file, sound)
		}
	}
	w.fails(14, []string{".pack"}, "restore", "--database", "shop", "--to", "copy", "latest")
	if _, err := w.pg.Connect(t.Context(), "copy"); err == nil {
		t.Error("a restore of damaged packs made the database")
	}
}

// overwrite changes the content of a file, and leaves what the server keeps
// about it as it is.
func overwrite(t *testing.T, file string, content []byte) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// Whoever can write to the bucket cannot make a backup that is believed.
func TestBackupOfAnUnknownSignerCountsForNothing(t *testing.T) {
	w := newWorld(t)
	mine := w.backup()
	// another host, with keys of its own that nobody here trusts; it trusts us
	status, out, _ := w.pgkeep("key", "check", "--json")
	var keys keysShown
	if err := json.Unmarshal([]byte(out), &keys); err != nil || status != 0 {
		t.Fatal(status, err)
	}
	host := w.config
	w.config = w.write("other.yaml", fmt.Sprintf(`
%s
keys:
  signing_key: %[2]s/other/signing.key
  metadata_identity: %[2]s/other/metadata.key
  identity: %[2]s/operator.key
  trusted_signers: ["%[3]s"]
spool: %[2]s/spool
temporal: {address: "127.0.0.1:9"}
clusters:
  main: {conninfo: "%[4]s", host: db2}
`, w.repository(), w.dir, keys.Signer, w.pg.Conninfo()))
	w.ok("key", "init")
	planted := w.backup()
	w.fails(0, nil, "verify", "--all") // where both are trusted

	w.config = host
	w.fails(0, []string{string(planted), "UNTRUSTED", "is not trusted here"}, "list")
	w.fails(15, []string{"manifest.json"}, "verify", string(planted))
	w.fails(15, []string{"sound", "DAMAGED"}, "verify", "--all")
	w.fails(15, nil, "restore", "--database", "shop", "--to", "copy", string(planted))
	w.fails(15, nil, "restore", "--database", "shop", "--to", "copy", "latest") // not an older one in its place
	w.fails(0, nil, "restore", "--database", "shop", "--to", "copy", string(mine))
	w.same("shop", "copy")
}

// The host of the cluster is gone. What is left: the bucket, an operator's key,
// the name of the signer.
func TestRestoreWithNothingButRepositoryAndKey(t *testing.T) {
	w := newWorld(t)
	w.exec("postgres", "ALTER ROLE postgres PASSWORD 'canary-secret'")
	w.backup()
	var keys keysShown
	if err := json.Unmarshal([]byte(w.ok("key", "check", "--json")), &keys); err != nil {
		t.Fatal(err)
	}
	w.config = w.write("rescue.yaml", fmt.Sprintf("%s\nkeys: {identity: %s, trusted_signers: ['%s']}\n", w.repository(), w.operator, keys.Signer))
	target := lab.PostgresForTest(t, lab.PostgresOptions{Password: "hunter2-canary"})

	w.ok("key", "check")
	w.fails(0, []string{"logical", "content"}, "list")
	w.fails(0, []string{"sound (content)"}, "verify", "latest")
	w.fails(2, []string{"--target"}, "restore", "--database", "shop", "latest")
	password := w.write("password", "hunter2-canary")
	// clerk is not there: restore says so before it makes anything
	args := []string{"restore", "--target", target.TCPConninfo(), "--target-password-file", password, "--database", "shop", "--scratch", w.dir}
	w.fails(2, []string{"no role clerk", "--globals"}, append(args, "latest")...)
	if err := target.Exec(t.Context(), "postgres", "CREATE ROLE clerk"); err != nil {
		t.Fatal(err)
	}
	status, out, said := w.pgkeep(append(args, "latest")...)
	if status != 0 || strings.Contains(out+said, "canary") {
		t.Fatalf("restore = %d\n%s%s", status, out, said)
	}
	want, err := lab.Fingerprint(t.Context(), w.pg.Conninfo()+" dbname=shop")
	if err != nil {
		t.Fatal(err)
	}
	got, err := lab.Fingerprint(t.Context(), target.Conninfo()+" dbname=shop")
	if err != nil {
		t.Fatal(err)
	}
	if len(want) == 0 || fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("restored %v, want %v", got, want)
	}

	// a password in the flag is refused, and not repeated
	w.fails(2, []string{"--target-password-file"}, "restore", "--target", "postgresql://me:s3cret@h/x", "--database", "shop", "latest")
	if _, _, said := w.pgkeep("restore", "--target", "postgresql://me:s3cret@h/x", "latest"); strings.Contains(said, "s3cret") {
		t.Errorf("the password is shown: %s", said)
	}
}

// A host that only writes compares what it can, and says what it cannot.
func TestVerifyWithoutAnIdentity(t *testing.T) {
	w := newWorld(t)
	w.backup()
	var keys keysShown
	if err := json.Unmarshal([]byte(w.ok("key", "check", "--json")), &keys); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(w.config)
	if err != nil {
		t.Fatal(err)
	}
	w.config = w.write("writer.yaml", strings.Replace(string(text), "  identity:", "  # identity:", 1))
	w.fails(0, []string{"sound (stored)", "not decrypted"}, "verify", "latest")
	w.fails(0, []string{"does not open here", keys.Signer}, "key", "check")
	w.fails(16, []string{"keys.identity"}, "restore", "--database", "shop", "--to", "copy", "latest")

	w.config = w.write("reader.yaml", fmt.Sprintf("%s\nkeys: {trusted_signers: ['%s']}\n", w.repository(), keys.Signer))
	w.fails(16, []string{"only the signed documents were compared", "not verified"}, "verify", "latest")
	w.fails(0, []string{"main"}, "list")
	w.fails(0, []string{"no key here opens the names"}, "show", "latest")
	w.fails(2, []string{"neither write nor open"}, "key", "check")
}

func TestInterruptedRestoreSaysWhatIsLeft(t *testing.T) {
	w := newWorld(t)
	w.exec("shop", `CREATE FUNCTION slow_elsewhere() RETURNS int LANGUAGE plpgsql IMMUTABLE AS $$
		BEGIN
			IF pg_catalog.current_database() <> 'shop' THEN PERFORM pg_catalog.pg_sleep(60); END IF;
			RETURN 1;
		END $$`, "CREATE INDEX ON customers ((length(name) + slow_elsewhere()))")
	w.backup()
	ctx, cancel := context.WithCancel(t.Context())
	var waiting sync.WaitGroup
	waiting.Go(func() {
		defer cancel()
		w.untilSleeping(t.Context(), "copy")
	})
	status, out, said := w.with(ctx, w.config, "restore", "--database", "shop", "--to", "copy", "latest")
	cancel()
	waiting.Wait()
	w.check(42, []string{"interrupted", `database "copy" is left behind`, "run the same command again"}, status, out, said, []string{"restore"})
}

// untilSleeping waits until somebody sleeps in a database.
func (w *world) untilSleeping(ctx context.Context, database string) {
	conn, err := w.pg.Connect(ctx, "postgres")
	if err != nil {
		w.t.Error(err)
		return
	}
	defer conn.Close(context.WithoutCancel(ctx))
	for range 1000 {
		var sleeping bool
		err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = $1 AND wait_event = 'PgSleep')", database).Scan(&sleeping)
		if err != nil || sleeping {
			if err != nil {
				w.t.Error(err)
			}
			return
		}
		if _, err := conn.Exec(ctx, "SELECT pg_sleep(0.02)"); err != nil {
			w.t.Error(err)
			return
		}
	}
	w.t.Error("nobody sleeps")
}
