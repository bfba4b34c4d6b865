package main

import (
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
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

// pairs prints names with what they stand for, in two columns.
func pairs(w io.Writer, all [][2]string) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, p := range all {
		fmt.Fprintf(t, "%s\t%s\n", p[0], p[1])
	}
	return t.Flush()
}

// count shows a number of things: "1 file", "2 files".
func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// size shows bytes: "873 B", "1.2 GiB".
func size(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n)/1024, 0
	for f >= 1023.95 && unit < len("KMGTPE")-1 {
		f, unit = f/1024, unit+1
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGTPE"[unit])
}

// share shows how much of total is done: "1.2 GiB of 4.0 GiB (30 %)". A total
// of 0 is not known.
func share(done, total int64) string {
	if total <= 0 {
		return size(done)
	}
	return fmt.Sprintf("%s of %s (%d %%)", size(done), size(total), min(100, int64(100*float64(done)/float64(total))))
}

// span shows a duration in its two largest units: "3m12s", "2d4h".
func span(d time.Duration) string {
	d = d.Round(time.Second)
	switch {
	case d < 0:
		return "0s"
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm%02ds", int(d.Minutes()), int(d.Seconds())%60)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%02dm", int(d.Hours()), int(d.Minutes())%60)
	}
	return fmt.Sprintf("%dd%dh", int(d.Hours())/24, int(d.Hours())%24)
}

// moment shows a time in UTC, or "" for none.
func moment(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}

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
