package human_test

import (
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/human"
)

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KiB", 1 << 20: "1.0 MiB", 1<<20 - 1: "1.0 MiB", 1288490189: "1.2 GiB", 1 << 50: "1.0 PiB", 1<<63 - 1: "8.0 EiB",
	} {
		if got := human.Size(n); got != want {
			t.Errorf("Size(%d) = %q, want %q", n, got, want)
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
		if got := human.Share(tc.done, tc.total); got != tc.want {
			t.Errorf("Share(%d, %d) = %q, want %q", tc.done, tc.total, got, tc.want)
		}
	}
}

func TestSpan(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 59*time.Second + 600*time.Millisecond: "1m00s", 192 * time.Second: "3m12s", 2*time.Hour + 5*time.Minute: "2h05m", 52 * time.Hour: "2d4h",
	} {
		if got := human.Span(d); got != want {
			t.Errorf("Span(%v) = %q, want %q", d, got, want)
		}
	}
}
