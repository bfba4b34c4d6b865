package proof

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"github.com/pgkeep/pgkeep/internal/sandbox"
)

// An Assertion is a query of the user's and what it must return.
type Assertion struct {
	Name     string
	Database string
	Query    string // one statement
	// Want are the rows, in order, each value as PostgreSQL writes it; NULL is
	// \N. Nil: one row of one value, t.
	Want [][]string
	// Timeout of the query. 0: 1 minute.
	Timeout time.Duration
}

// reader is the role that asserts: it may read everything, and do nothing else.
const reader = "pgkeep_reader"

// assert runs the user's assertions, one after another. They run as a role that
// can only read, in a transaction that can only read.
func (in *inspection) assert(ctx context.Context) {
	if len(in.Assertions) == 0 || !in.wants(CheckAssertions) {
		return
	}
	in.tell("checking assertions")
	begun := time.Now()
	if err := in.makeReader(ctx); err != nil {
		in.looked(CheckAssertions, "the role that reads", time.Since(begun), err)
		return
	}
	for _, a := range in.Assertions {
		begun := time.Now()
		err := in.try(ctx, a)
		in.looked(CheckAssertions, a.Name, time.Since(begun), err)
	}
}

func (in *inspection) makeReader(ctx context.Context) error {
	conn, err := in.Sandbox.Connect(ctx, "template1")
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	var there bool // of a test that was cut, or by chance
	if err := conn.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_roles WHERE rolname = $1)", reader).Scan(&there); err != nil {
		return err
	}
	sql := "CREATE ROLE " + reader + " LOGIN BYPASSRLS"
	if there {
		sql = "ALTER ROLE " + reader + " LOGIN BYPASSRLS NOSUPERUSER CONNECTION LIMIT -1 VALID UNTIL 'infinity'; ALTER ROLE " + reader + " RESET ALL"
	}
	if in.major >= 14 {
		sql += "; GRANT pg_read_all_data TO " + reader
	} else {
		sql += "; ALTER ROLE " + reader + " SUPERUSER" // there is no other role that reads everything
	}
	// The role may not set them itself, and databases of the source might.
	set := sandbox.Honest(in.major)
	delete(set, "role")
	for _, name := range slices.Sorted(maps.Keys(set)) {
		sql += "; ALTER ROLE " + reader + " SET " + name + " FROM CURRENT" // an empty list cannot be written down
	}
	sql += "; DELETE FROM pg_db_role_setting WHERE setrole = '" + reader + "'::regrole AND setdatabase <> 0"
	_, err = conn.Exec(ctx, sql, pgx.QueryExecModeSimpleProtocol)
	return err
}

func (in *inspection) try(ctx context.Context, a Assertion) error {
	timeout := cmp.Or(a.Timeout, time.Minute)
	hard, cancel := context.WithTimeout(ctx, timeout+10*time.Second) // for a server that does not obey
	defer cancel()
	conn, err := in.Sandbox.ConnectAs(hard, a.Database, reader, map[string]string{
		"statement_timeout":             fmt.Sprintf("%dms", max(1, timeout.Milliseconds())),
		"default_transaction_read_only": "on",
		"role":                          "none",
	})
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	// One statement only, and values as text: that is what this protocol takes.
	result := conn.PgConn().ExecParams(hard, a.Query, nil, nil, nil, nil)
	var got [][]string
	for result.NextRow() {
		var row []string
		for _, v := range result.Values() {
			if v == nil {
				row = append(row, `\N`)
			} else {
				row = append(row, string(v))
			}
		}
		if len(got) <= maxRows {
			got = append(got, row)
		}
	}
	if _, err := result.Close(); err != nil {
		return err
	}
	want := a.Want
	if want == nil {
		want = [][]string{{"t"}}
	}
	if d := diff(want, got); d != "" {
		return errors.New("wanted (-) and got (+):\n" + d)
	}
	return nil
}

const (
	maxRows = 10_000 // of an assertion's answer
	maxDiff = 20     // lines of a difference
)

// diff shows the rows that are missing from got and those too many, with the
// common ones between them left out; "" if both are the same.
func diff(want, got [][]string) string {
	if slices.EqualFunc(want, got, slices.Equal) {
		return ""
	}
	from := 0
	for from < min(len(want), len(got)) && slices.Equal(want[from], got[from]) {
		from++
	}
	wantEnd, gotEnd := len(want), len(got)
	for wantEnd > from && gotEnd > from && slices.Equal(want[wantEnd-1], got[gotEnd-1]) {
		wantEnd--
		gotEnd--
	}
	var lines []string
	if from > 0 {
		lines = append(lines, fmt.Sprintf("  … %d rows as wanted", from))
	}
	for i := from; i < max(wantEnd, gotEnd); i++ {
		if i < wantEnd {
			lines = append(lines, "- "+strings.Join(want[i], " | "))
		}
		if i < gotEnd {
			lines = append(lines, "+ "+strings.Join(got[i], " | "))
		}
	}
	if rest := len(want) - wantEnd; rest > 0 {
		lines = append(lines, fmt.Sprintf("  … %d rows as wanted", rest))
	}
	if len(lines) > maxDiff {
		more := len(lines) - maxDiff
		lines = append(lines[:maxDiff], fmt.Sprintf("  … %d lines more", more))
	}
	return strings.Join(lines, "\n")
}
