package proof_test

import (
	"bytes"
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

	"github.com/pgkeep/pgkeep/internal/proof"
)

// Whatever code a superuser of the source has left in the data runs nowhere but in
// the sandbox. There some of it must run: functions in indexes, when amcheck
// computes them; those in views, when an assertion reads one.
func TestHostileSourceReachesNothing(t *testing.T) {
	r := newRig(t)
	// It knows where everything is, and is of the same OS user.
	psql := r.pg.Command(t.Context(), "psql").Path
	attack := strings.Join([]string{
		"cat >/dev/null; touch fired-NAME",
		"touch " + r.pg.DataDir + "/struck-NAME " + r.dir + "/struck-NAME",
		"mkdir -p " + r.dir + "; touch " + r.dir + "/struck-NAME",
		psql + ` -w -X -d "` + r.pg.Conninfo() + `" -c "INSERT INTO struck VALUES ($$NAME$$); NOTIFY struck"`,
		"cat /proc/[0-9]*/environ >>seen; ls -AR /etc /run /home /root /var >>seen; :",
	}, "; ")
	quoted := strings.ReplaceAll(attack, "'", "''")
	r.exec(t, "postgres",
		"CREATE TABLE struck (by text)",
		"GRANT ALL ON struck TO PUBLIC",
		`CREATE FUNCTION strike(by text) RETURNS int LANGUAGE plpgsql VOLATILE SECURITY DEFINER AS $f$ BEGIN
		   IF current_setting('unix_socket_directories') LIKE '%pgkeep-sandbox-%' THEN
		     BEGIN EXECUTE format('COPY (SELECT 1) TO PROGRAM %L', replace('`+quoted+`', 'NAME', by)); EXCEPTION WHEN OTHERS THEN END;
		     BEGIN EXECUTE format('COPY (SELECT 1) TO %L', '`+r.dir+`/struck-file-' || by); EXCEPTION WHEN OTHERS THEN END;
		     BEGIN PERFORM lo_export((SELECT min(oid) FROM pg_largeobject_metadata), '`+r.dir+`/struck-lo-' || by); EXCEPTION WHEN OTHERS THEN END;
		     BEGIN PERFORM public.dblink_exec('`+strings.ReplaceAll(r.pg.Conninfo(), "'", "''")+`', 'INSERT INTO struck VALUES (''dblink'')'); EXCEPTION WHEN OTHERS THEN END;
		     BEGIN INSERT INTO public.far VALUES ('fdw'); EXCEPTION WHEN OTHERS THEN END;
		     BEGIN PERFORM * FROM public.far; EXCEPTION WHEN OTHERS THEN END;
		   END IF;
		   RETURN length(by); END $f$`,
		`CREATE FUNCTION pure(by text) RETURNS int LANGUAGE plpgsql IMMUTABLE AS $f$ BEGIN RETURN public.strike(by); END $f$`,
		"SELECT lo_create(0)",
		"CREATE EXTENSION dblink", "CREATE EXTENSION postgres_fdw",
		"CREATE SERVER source FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '"+filepath.Dir(r.pg.DataDir)+"/run', port '"+strconv.Itoa(r.pg.Port)+"', dbname 'postgres')",
		"CREATE USER MAPPING FOR PUBLIC SERVER source OPTIONS (user 'postgres', password_required 'false')",
		"CREATE FOREIGN TABLE far (by text) SERVER source OPTIONS (table_name 'struck')",
		"CREATE DOMAIN guarded AS int CHECK (pure('domain') > 0)",
		"CREATE TABLE bait (i int, d guarded, g int GENERATED ALWAYS AS (i + pure('column')) STORED)",
		"INSERT INTO bait VALUES (1, 1)",
		"CREATE INDEX ON bait ((i + pure('index')))",
		"CREATE INDEX ON bait (i) WHERE pure('predicate') > 0",
		"ALTER TABLE bait ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
		"CREATE POLICY trap ON bait USING (pure('policy') > 0)",
		"CREATE VIEW trap AS SELECT strike('view') AS n",
		`CREATE FUNCTION trapped() RETURNS event_trigger LANGUAGE plpgsql AS $f$ BEGIN PERFORM public.strike('trigger'); END $f$`,
		"CREATE EVENT TRIGGER trapped ON ddl_command_end EXECUTE FUNCTION trapped()")
	r.switchWAL(t)
	secret := holdSecret(t)

	s := r.sandbox(t, "hostile")
	for _, name := range []string{"postgresql.auto.conf", "standby.signal"} { // which no manifest lists
		evil := fmt.Sprintf("archive_mode = on\narchive_command = 'touch %[1]s/struck-archive'\nrecovery_end_command = 'touch %[1]s/struck-end'\n"+
			"shared_preload_libraries = 'evil'\nlisten_addresses = '*'\n", r.dir)
		must(t, os.WriteFile(filepath.Join(s.Data(), name), []byte(evil), 0o600))
	}
	test := r.test(s)
	test.Assertions = append(test.Assertions, proof.Assertion{Name: "a view", Database: "postgres", Query: "SELECT n > 0 FROM trap"})
	rep := run(t, test)
	if rep.Verdict != proof.Passed || !rep.Isolation.Files || !rep.Isolation.Network || !rep.Isolation.Processes {
		t.Errorf("%s, isolation %+v\n%s", rep.Verdict, rep.Isolation, failures(rep))
	}
	for _, name := range []string{"index", "predicate", "view"} { // else this shows nothing
		if _, err := os.Stat(filepath.Join(s.Data(), "fired-"+name)); err != nil {
			t.Errorf("the code in the %s did not run: %v", name, err)
		}
	}
	for _, dir := range []string{r.pg.DataDir, r.dir} {
		if struck, _ := filepath.Glob(dir + "/struck-*"); len(struck) > 0 {
			t.Errorf("written at the source: %v", struck)
		}
	}
	if got := r.text(t, "postgres", "SELECT coalesce(string_agg(DISTINCT by, ' '), '') FROM struck"); got != "" {
		t.Errorf("SQL was run at the source, by %s", got)
	}
	seen, err := os.ReadFile(filepath.Join(s.Data(), "seen"))
	if err != nil || bytes.Contains(seen, []byte(secret)) {
		t.Errorf("seen: %v\n%s", err, seen)
	}
	for _, never := range []string{"shadow", "ssl-cert", "pgkeep.yaml", ".s.PGSQL"} {
		if bytes.Contains(seen, []byte(never)) {
			t.Errorf("seen: %s", never)
		}
	}
	if n := slices.IndexFunc(rep.Checks, func(c proof.Check) bool { return c.Name == proof.CheckBTree && c.Items > 0 }); n < 0 {
		t.Error("no index was checked")
	}
}

// holdSecret starts a process of PostgreSQL's OS user with a secret in its
// environment, which that user may read.
func holdSecret(t *testing.T) string {
	t.Helper()
	u, err := user.Lookup("postgres")
	must(t, err)
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	must(t, err)
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	must(t, err)
	const secret = "canary-in-the-environment"
	cmd := exec.CommandContext(t.Context(), "/bin/cat")
	cmd.Env, cmd.Dir = []string{"AWS_SECRET_ACCESS_KEY=" + secret}, "/"
	if os.Getuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}
	in, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { in.Close(); cmd.Wait() })
	return secret
}
