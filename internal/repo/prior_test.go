package repo

import (
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestRebase(t *testing.T) {
	day := 24 * time.Hour
	for _, c := range []struct {
		why       string
		uses      []layerUse
		must, may []int
	}{
		{"young and used", []layerUse{{stored: 100, live: 50}, {stored: 1, live: 1}}, nil, nil},
		{"less than half counts", []layerUse{{stored: 100, live: 49}}, nil, []int{0}},
		{"old", []layerUse{{stored: 100, live: 100, age: 81 * day}}, nil, []int{0}},
		{"nothing counts: gone without cost", []layerUse{{stored: 100}, {}}, nil, nil},
		{"of an earlier attempt: it is stored here anyway", []layerUse{{stored: 100, live: 1, age: 100 * day, own: true}}, nil, nil},
		{"too many: those that cost least", []layerUse{{stored: 9, live: 9}, {stored: 3, live: 3}, {stored: 8, live: 8}, {stored: 10, live: 4}}, []int{1}, []int{3}},
		{"too many, and one is wasteful", []layerUse{{stored: 9, live: 9}, {stored: 90, live: 3}, {stored: 8, live: 8}, {stored: 10, live: 10}}, []int{1}, []int{}},
	} {
		must, may := rebase(c.uses, 80*day, 4)
		if !cmp.Equal(must, c.must) || !cmp.Equal(may, c.may) {
			t.Errorf("%s: must %v, may %v; want %v, %v", c.why, must, may, c.must, c.may)
		}
	}
	least, most := maxAge, time.Duration(0)
	for n := range 1000 {
		old := oldFor(fmt.Sprintf("data/base/5/%d", n))
		least, most = min(least, old), max(most, old)
	}
	if least < maxAge-ageSpread || least > maxAge-ageSpread+day || most > maxAge || most < maxAge-day {
		t.Errorf("files are old at %v to %v", least, most)
	}
}

func TestJoinLayers(t *testing.T) {
	a, b := &Pack{Key: "a"}, &Pack{Key: "b"}
	got := joinLayers([]layerRef{
		{order: 2, pack: a, first: 9, frames: 1, offset: 90}, {order: -1, pack: b, first: 5, frames: 2, offset: 50}, {order: 2, pack: a, first: 3, frames: 2, offset: 30},
		{order: -1, pack: a, first: 0, frames: 1}, {order: -1, pack: b, first: 7, frames: 1, offset: 70}, {order: -1, pack: b, first: 9, frames: 1, offset: 95}, {order: 1, pack: a, first: 1, frames: 1, offset: 10},
	})
	want := []layerRef{{order: -1, pack: a, first: 0, frames: 1}, // new ones that do not follow each other stay apart
		{order: -1, pack: b, first: 5, frames: 3, offset: 50}, {order: -1, pack: b, first: 9, frames: 1, offset: 95},
		{order: 1, pack: a, first: 1, frames: 1, offset: 10}, {order: 2, pack: a, first: 3, frames: 7, offset: 30}} // one layer stays one
	if d := cmp.Diff(want, got, cmp.AllowUnexported(layerRef{})); d != "" {
		t.Error(d)
	}
}
