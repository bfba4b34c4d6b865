package main

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1 << 20: "1.0 MiB", 1<<20 - 1: "1.0 MiB", 1288490189: "1.2 GiB", 1 << 50: "1.0 PiB", 1<<63 - 1: "8.0 EiB",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
}

func TestShare(t *testing.T) {
	for _, tc := range []struct {
		done, total int64
		want        string
	}{
		{0, 0, "0 B"}, {2048, 0, "2.0 KiB"}, {1024, 4096, "1.0 KiB of 4.0 KiB (25 %)"},
		{4095, 4096, "4.0 KiB of 4.0 KiB (99 %)"}, // not 100 before it is done
		{5000, 4096, "4.9 KiB of 4.0 KiB (100 %)"}, {1 << 62, 1<<63 - 1, "4.0 EiB of 8.0 EiB (50 %)"},
	} {
		if got := share(tc.done, tc.total); got != tc.want {
			t.Errorf("share(%d, %d) = %q, want %q", tc.done, tc.total, got, tc.want)
		}
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 59*time.Second + 600*time.Millisecond: "1m00s", 192 * time.Second: "3m12s", 2*time.Hour + 5*time.Minute: "2h05m", 52 * time.Hour: "2d4h",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%v) = %q, want %q", d, got, want)
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
