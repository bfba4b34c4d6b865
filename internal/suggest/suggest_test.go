package suggest_test

import (
	"testing"

	"github.com/pgkeep/pgkeep/internal/suggest"
)

func TestWord(t *testing.T) {
	known := []string{"clusters", "schedules", "spool", "host", "log"}
	for _, tc := range []struct{ name, typed, want string }{
		{"two neighbours swapped", "clsuters", "clusters"},
		{"one letter missing", "schedule", "schedules"},
		{"one letter too many", "spooll", "spool"},
		{"one letter wrong", "lag", "log"},
		{"the nearest of two", "hos", "host"},
		{"nothing near", "retention", ""},
		{"nothing typed", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := suggest.Word(tc.typed, known); got != tc.want {
				t.Errorf("Word(%q) = %q, want %q", tc.typed, got, tc.want)
			}
		})
	}
}
