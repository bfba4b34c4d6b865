package pg_test

import (
	"testing"

	"github.com/pgkeep/pgkeep/internal/pg"
)

func TestASnapshotSaysWhichTransactionsHaveEnded(t *testing.T) {
	s, err := pg.ParseSnapshot("4294967290:4294967300:4294967291,4294967298")
	if err != nil {
		t.Fatal(err)
	}
	for xid, want := range map[uint64]bool{4294967289: true, 4294967290: true, 4294967291: false, 4294967292: true, 4294967298: false, 4294967299: true, 4294967300: false, 1 << 40: false} {
		if got := s.Ended(xid); got != want {
			t.Errorf("%d: got %v, want %v", xid, got, want)
		}
		if got := s.EndedInLog(uint32(xid)); xid < 1<<40 && got != want {
			t.Errorf("%d in the log: got %v, want %v", uint32(xid), got, want)
		}
	}
	for _, text := range []string{"", "1:2", "a:2:", "1:2:x", "1:2:3:4", "-1:2:"} {
		if s, err := pg.ParseSnapshot(text); err == nil {
			t.Errorf("%q: %v", text, s)
		}
	}
}

func TestATablePatternNamesTables(t *testing.T) {
	for text, want := range map[string]map[[3]string]bool{
		"app.public.orders": {{"app", "public", "orders"}: true, {"app", "public", "orders2"}: false, {"app", "x", "orders"}: false, {"app2", "public", "orders"}: false},
		"app.*.*":           {{"app", "public", "orders"}: true, {"app", "a/b", "c"}: true, {"b", "public", "orders"}: false},
		"*.public.log_?":    {{"b", "public", "log_1"}: true, {"b", "public", "log_10"}: false},
		"app.public.a?b":    {{"app", "public", "a.b"}: true},
		"app.Mine.[x]":      {{"app", "Mine", "[x]"}: true, {"app", "Mine", "x"}: false, {"app", "mine", "[x]"}: false},
	} {
		p, err := pg.ParseTablePattern(text)
		if err != nil {
			t.Fatal(err)
		}
		if p.String() != text {
			t.Errorf("got %q, want %q", p.String(), text)
		}
		for name, want := range want {
			if got := p.Match(name[0], name[1], name[2]); got != want {
				t.Errorf("%s and %v: got %v, want %v", text, name, got, want)
			}
		}
	}
	for _, text := range []string{"", "orders", "public.orders", "a.b.c.d", "a..c", ".b.c", "a.b."} {
		if p, err := pg.ParseTablePattern(text); err == nil {
			t.Errorf("%q: %v", text, p)
		}
	}
}
