package main

import (
	"bytes"
	"slices"
	"strings"
	"testing"
)

func TestWrapBreaksBetweenWords(t *testing.T) {
	for _, c := range []struct {
		text  string
		width int
		want  []string
	}{
		{"the log piles up\nin pg_wal", -10, []string{"the log piles up in pg_wal"}},
		{"the log piles up\nin pg_wal", 20, []string{"the log piles up in", "pg_wal"}},
		{"außen größer als ≤ 20", 20, []string{"außen größer als ≤", "20"}},
		{"0123456789012345678901234 is long", 20, []string{"0123456789012345678901234", "is long"}},
		{"", 20, []string{""}},
	} {
		if got := wrap(c.text, c.width); !slices.Equal(got, c.want) {
			t.Errorf("wrap(%q, %d) = %q, want %q", c.text, c.width, got, c.want)
		}
	}
}

func TestJSONBeginsWithItsSchema(t *testing.T) {
	for _, tc := range []struct {
		v    any
		want string
	}{
		{struct {
			A int `json:"a"`
		}{1}, "{\n  \"schema\": \"pgkeep.schedule.list/1\",\n  \"a\": 1\n}\n"},
		{struct{}{}, "{\n  \"schema\": \"pgkeep.schedule.list/1\"\n}\n"},
	} {
		var out bytes.Buffer
		if err := printJSON(&out, "schedule list", tc.v); err != nil {
			t.Fatal(err)
		}
		if out.String() != tc.want {
			t.Errorf("printed %q, want %q", out.String(), tc.want)
		}
	}
	if err := printJSON(new(bytes.Buffer), "x", []int{1}); err == nil {
		t.Error("a list was printed: it has no place for a schema")
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	if err := table(&out, "NAME SIZE", [][]string{{"long name", "1"}, {"x", ""}}); err != nil {
		t.Fatal(err)
	}
	if want := "NAME       SIZE\nlong name  1\nx          -\n"; out.String() != want {
		t.Errorf("printed\n%s, want\n%s", out.String(), want)
	}
}

func TestOneLine(t *testing.T) {
	for in, want := range map[string]string{"": "", " a\nb": "a", strings.Repeat("é", 300): strings.Repeat("é", 199) + "…"} {
		if got := oneLine(in); got != want {
			t.Errorf("oneLine(%q) = %q", in, got)
		}
	}
}
