package proof

import (
	"fmt"
	"testing"
	"time"
)

// However often a cluster is tested, and from whenever on, each index is compared
// with its table.
func TestEveryIndexHasItsTurn(t *testing.T) {
	const tests, indexes = 17, 20
	for _, days := range [][]int{{1}, {2}, {3}, {4}, {5}, {7}, {14}, {21}, {28}, {30}, {3, 4}, {2, 2, 3}, {1, 1, 1, 1, 3}} {
		for from := range 70 {
			day := time.Date(2026, 12, 1+from, 3, 0, 0, 0, time.UTC)
			seen := make(map[int]int)
			for i := range tests {
				for index := range indexes {
					if inTurn(relation{Schema: "public", Name: fmt.Sprint(index), Pages: 1e6}, "shop", day) {
						seen[index]++
					}
				}
				day = day.AddDate(0, 0, days[i%len(days)])
			}
			sum := 0
			for _, n := range seen {
				sum += n
			}
			if len(seen) != indexes || sum > indexes*tests/4 {
				t.Errorf("tested every %d days from the %dth, they are compared so often: %v", days, from, seen)
			}
		}
	}
	if !inTurn(relation{Pages: smallIndex}, "shop", time.Time{}) {
		t.Error("a small one waits for its turn")
	}
}

// The parts of a table are all of it, and none is read twice.
func TestALargeTableIsReadInParts(t *testing.T) {
	for _, c := range []struct {
		r     relation
		major int
		parts int
	}{
		{relation{Heap: true, Pages: 0}, 18, 1},
		{relation{Heap: true, Pages: 2*partPages - 1}, 18, 1},
		{relation{Heap: true, Pages: 2 * partPages}, 18, 2},
		{relation{Heap: true, Pages: 10*partPages + 1}, 14, 10},
		{relation{Heap: true, Pages: 10 * partPages}, 13, 1},
		{relation{Pages: 10 * partPages}, 18, 1}, // of an access method of somebody else
	} {
		in := inspection{major: c.major}
		parts := in.parts("shop", []relation{c.r}, false)
		if len(parts) != c.parts {
			t.Errorf("%+v: %d parts, want %d", c.r, len(parts), c.parts)
		}
		next := int64(0)
		for i, p := range parts {
			last := i == len(parts)-1
			if p.from != next || last != (p.to == 0) || p.whole != parts[0].whole || p.whole.left != len(parts) || !last && p.to != p.from+partPages {
				t.Errorf("%+v: part %d is %d to %d of %+v", c.r, i, p.from, p.to, p.whole)
			}
			next = p.to
		}
	}
}
