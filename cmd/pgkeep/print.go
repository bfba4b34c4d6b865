package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"golang.org/x/term"

	"github.com/pgkeep/pgkeep/internal/human"
)

// This file is the only place that says how an answer looks.

// printJSON prints v, a struct, as one object that begins with its schema:
// "pgkeep.schedule.list/1" for the command "schedule list". Fields are added
// under the same number, never renamed or removed.
func printJSON(w io.Writer, command string, v any) error {
	body, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("print %s: %w", command, err)
	}
	rest, ok := strings.CutPrefix(string(body), "{")
	if !ok {
		return fmt.Errorf("print %s: %T is not an object", command, v)
	}
	comma := ","
	if rest == "}" {
		comma, rest = "\n", "}"
	}
	schema := "pgkeep." + strings.ReplaceAll(command, " ", ".") + "/1"
	_, err = fmt.Fprintf(w, "{\n  \"schema\": %q%s%s\n", schema, comma, rest)
	return err
}

// table prints rows under a header, in columns. An empty cell is a "-".
func table(w io.Writer, header string, rows [][]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, strings.Join(strings.Fields(header), "\t"))
	for _, row := range rows {
		for i, cell := range row {
			if cell == "" {
				row[i] = "-"
			}
		}
		fmt.Fprintln(t, strings.Join(row, "\t"))
	}
	return t.Flush()
}

// width is that of the terminal that answers go to; 0 if it is none: programs get
// long lines whole.
func (e *env) width() int {
	f, ok := e.out.(*os.File)
	if !ok {
		return 0
	}
	columns, _, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0
	}
	return columns
}

// wrap breaks text between words into lines of width runes at most, but for words
// that are longer. With less than 20 it is left whole.
func wrap(text string, width int) []string {
	if width < 20 {
		return []string{strings.ReplaceAll(text, "\n", " ")}
	}
	var lines []string
	line := ""
	for _, word := range strings.Fields(text) {
		if line != "" && utf8.RuneCountInString(line)+1+utf8.RuneCountInString(word) > width {
			lines, line = append(lines, line), ""
		}
		if line != "" {
			line += " "
		}
		line += word
	}
	return append(lines, line)
}

// pairs prints names with what they stand for, in two columns.
func pairs(w io.Writer, all [][2]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, p := range all {
		fmt.Fprintf(t, "%s\t%s\n", p[0], p[1])
	}
	return t.Flush()
}

// Numbers as people read them.
func count(n int, thing string) string { return human.Count(n, thing) }
func size(n int64) string              { return human.Size(n) }
func share(done, total int64) string   { return human.Share(done, total) }
func span(d time.Duration) string      { return human.Span(d) }
func moment(t time.Time) string        { return human.Moment(t) }

// jsonTime is a time in UTC that is null if there is none.
func jsonTime(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	t = t.UTC().Truncate(time.Second)
	return &t
}

// oneLine is the first line of s, cut to a length that fits a terminal.
func oneLine(s string) string {
	s, _, _ = strings.Cut(strings.TrimSpace(s), "\n")
	if r := []rune(s); len(r) > 200 {
		return string(r[:199]) + "…"
	}
	return s
}
