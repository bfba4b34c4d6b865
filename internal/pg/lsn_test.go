package pg_test

import (
	"testing"

	"github.com/pgkeep/pgkeep/internal/pg"
)

func TestParseLSN(t *testing.T) {
	for _, tt := range []struct {
		in   string
		want pg.LSN
		ok   bool
	}{
		{in: "0/0", want: 0, ok: true},
		{in: "16/B374D848", want: 0x16_B374D848, ok: true},
		{in: "FFFFFFFF/FFFFFFFF", want: 1<<64 - 1, ok: true},
		{in: "16/B374D848 junk"},
		{in: "1FFFFFFFF/0"},
		{in: "16"},
		{in: ""},
	} {
		got, err := pg.ParseLSN(tt.in)
		if (err == nil) != tt.ok {
			t.Errorf("ParseLSN(%q): err = %v, want ok = %v", tt.in, err, tt.ok)
			continue
		}
		if got != tt.want {
			t.Errorf("ParseLSN(%q) = %v, want %v", tt.in, got, tt.want)
		}
	}
}

func FuzzLSN(f *testing.F) {
	f.Add("16/B374D848")
	f.Fuzz(func(t *testing.T, s string) {
		l, err := pg.ParseLSN(s)
		if err != nil {
			return
		}
		back, err := pg.ParseLSN(l.String())
		if err != nil || back != l {
			t.Fatalf("%q parsed to %v, which came back as %v (%v)", s, l, back, err)
		}
	})
}
