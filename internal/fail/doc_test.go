package fail_test

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/fail"
)

var update = flag.Bool("update", false, "write docs/ERRORS.md")

const page = "../../docs/ERRORS.md"

const intro = `# How pgkeep fails

<!-- Written by "make update" from internal/fail. Do not edit. -->

A failure that somebody acts on has a *kind*. It is the exit status for a
script, "kind" in the output of --json, the failure type in Temporal's history,
and the choice between trying again and giving up. Status 0 is success and no
status is above 125, which PostgreSQL would take for a crash.

| kind | exit | tried again | what happened | hint |
| --- | --: | --- | --- | --- |
`

const restoreStatuses = `
## pgkeep-wal fetch

PostgreSQL takes every status of its restore_command from 1 to 125 for the end
of the log, and opens for writing with what it has. So here 0 means that the
file was delivered and verified, and 1 that it is proved that there is none.
Everything else is 200 and the status above, at most 239: PostgreSQL stops.
A store that is down is 220, a damaged object 214.

pgkeep-wal push ends with the statuses above. It has to: those over 125 end
PostgreSQL's archiver, and its statistics do not count them.
`

func TestErrorsPage(t *testing.T) {
	var b strings.Builder
	b.WriteString(intro)
	for _, k := range fail.Kinds() {
		name, retry := string(k), "no"
		if k == fail.Unknown {
			name = "(none)"
		}
		if k.Retry() {
			retry = "yes"
		}
		fmt.Fprintf(&b, "| %s | %d | %s | %s | %s |\n", name, k.ExitStatus(), retry, k.Meaning(), fail.HintOf(k))
	}
	b.WriteString(restoreStatuses)
	if *update {
		if err := os.WriteFile(page, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(b.String(), string(got)); d != "" {
		t.Errorf("docs/ERRORS.md is behind the catalogue; run make update (-want +got):\n%s", d)
	}
}

func TestEveryKindIsUsable(t *testing.T) {
	seen := make(map[int]fail.Kind)
	for _, k := range fail.Kinds() {
		exit := k.ExitStatus()
		if exit < 1 || exit > 125 {
			t.Errorf("%q exits with %d, want 1 to 125", k, exit)
		}
		if other, ok := seen[exit]; ok {
			t.Errorf("%q and %q both exit with %d", k, other, exit)
		}
		seen[exit] = k
		if k.Meaning() == "" {
			t.Errorf("%q has no meaning", k)
		}
		if text := k.Meaning() + fail.HintOf(k); strings.ContainsAny(text, "|\n") {
			t.Errorf("%q does not fit into a table: %q", k, text)
		}
	}
}
