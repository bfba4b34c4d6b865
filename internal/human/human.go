// Package human writes numbers the way people read them.
package human

import (
	"fmt"
	"time"
)

// Count shows a number of things: "1 file", "2 files".
func Count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

// Size shows bytes: "873 B", "1.2 GiB".
func Size(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, unit := float64(n)/1024, 0
	for f >= 1023.95 && unit < len("KMGTPE")-1 {
		f, unit = f/1024, unit+1
	}
	return fmt.Sprintf("%.1f %ciB", f, "KMGTPE"[unit])
}

// Share shows how much of total is done: "1.2 GiB of 4.0 GiB (30 %)". A total
// of 0 is not known.
func Share(done, total int64) string {
	if total <= 0 {
		return Size(done)
	}
	return fmt.Sprintf("%s of %s (%d %%)", Size(done), Size(total), min(100, int64(100*float64(done)/float64(total))))
}

// Span shows a duration in its two largest units: "3m12s", "2d4h". One that is
// negative is none.
func Span(d time.Duration) string {
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

// Moment shows a time in UTC, to the second; "" for none.
func Moment(t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return t.UTC().Format("2006-01-02 15:04:05Z")
}
