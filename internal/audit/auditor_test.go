package audit_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/fail"
)

func TestStuck(t *testing.T) {
	ago := func(d time.Duration) time.Time { return epoch.Add(-d) }
	const short, long = audit.Patience - time.Second, audit.Patience + time.Second
	for what, tt := range map[string]struct {
		a    cluster.Archiver
		says string // "": nothing
	}{
		"nothing waits":           {cluster.Archiver{Archiving: true}, ""},
		"one waits for a moment":  {cluster.Archiver{Archiving: true, Waiting: 1, Oldest: ago(short)}, ""},
		"many, and it goes on":    {cluster.Archiver{Archiving: true, Waiting: 900, Oldest: ago(long), LastArchived: ago(short)}, ""},
		"it never did anything":   {cluster.Archiver{Archiving: true, Waiting: 1, Oldest: ago(long)}, "1 file waits to be archived, the first for 5m1s, and PostgreSQL counts neither"},
		"it stopped":              {cluster.Archiver{Archiving: true, Waiting: 2, Oldest: ago(long), LastArchived: ago(long), LastFailed: ago(time.Hour)}, "2 files wait"},
		"it fails":                {cluster.Archiver{Archiving: true, Waiting: 2, Oldest: ago(long), LastArchived: ago(long), LastFailed: ago(short), FailedWAL: "000000010000000000000007"}, "archive_command fails on 000000010000000000000007"},
		"it is off":               {cluster.Archiver{}, "archives nothing"},
		"a standby, by the way":   {cluster.Archiver{Standby: true, Waiting: 1, Oldest: ago(long)}, ""},
		"a standby that archives": {cluster.Archiver{Standby: true, Archiving: true, Waiting: 1, Oldest: ago(long)}, "1 file waits"},
	} {
		tt.a.Now = epoch
		err := audit.Stuck("main", tt.a)
		if errors.Is(err, fail.NotArchiving) != (tt.says != "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v, want %q", what, err, tt.says)
		}
	}
}
