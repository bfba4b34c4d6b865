package report_test

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"fmt"
	"io"
	"math"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/report"
)

var file = flag.String("page", "", "write the page of the test to this file, to be looked at")

const (
	segment = 16 << 20
	day     = 24 * time.Hour
)

var (
	now    = time.Date(2026, 11, 23, 14, 7, 31, 0, time.UTC)
	begun  = now.Add(-36 * day).Truncate(day)
	system = pg.SystemID(7301234567890123456)
)

// lsn is where the log of the test is at a time: more is written by day.
func lsn(t time.Time) pg.LSN {
	days := t.Sub(begun).Hours() / 24
	n := 0x40_0000_0000 + (11+days/8)*1e9*days + 1.5e9*math.Sin(2*math.Pi*days) + 6e9*math.Sin(days/3)
	return pg.LSN(n) / segment * segment
}

func id(t time.Time) repo.ID {
	return repo.NewID(t, fmt.Sprintf("%08x", t.Unix()*2654435761&0xffffffff))
}

// facts are those of three clusters: one with five weeks of all that happens,
// one with dumps only, one without anything.
func facts() report.Facts {
	shop := health.Stored{Cluster: "shop"}
	var bases []audit.Base
	add := func(kind repo.Kind, at time.Time, n int) *health.Backup {
		took := time.Duration(18+n%5) * time.Minute
		m := repo.Manifest{Ref: repo.Ref{Cluster: "shop", ID: id(at)}, Kind: kind, System: system, Version: 170006, StartedAt: at, FinishedAt: at.Add(took),
			LSN: repo.LSNs{Timeline: 1, Before: lsn(at), After: lsn(at.Add(took))}, Verified: repo.VerifiedContent}
		m.Bytes = int64(180+n) << 30
		m.Stored = m.Bytes/4 + int64(n%4)<<28
		if kind == repo.Logical {
			m.Stored = m.Bytes / 7
		} else {
			m.Physical = &repo.PhysicalFacts{System: system, Start: lsn(at), Stop: lsn(at.Add(took)), StartedAt: at, StoppedAt: at.Add(took)}
			bases = append(bases, audit.Base{ID: string(m.ID), Timeline: 1, Start: lsn(at), Stop: lsn(at.Add(took)), Finished: at.Add(took)})
		}
		shop.Backups = append(shop.Backups, health.Backup{Listed: repo.Listed{Manifest: m}})
		return &shop.Backups[len(shop.Backups)-1]
	}
	n := 0
	for at := begun.Add(90 * time.Minute); at.Before(now); at = at.Add(day) {
		b := add(repo.Physical, at, n)
		if n%2 == 0 && at.Before(now.Add(-3*day)) {
			b.Tests = append(b.Tests, test(b.Manifest, at.Add(5*time.Hour), n))
		}
		if at.Weekday() == time.Sunday {
			add(repo.Logical, at.Add(2*time.Hour), n)
		}
		n++
	}
	odd := repo.Ref{Cluster: "shop", ID: id(now.Add(-9 * day))}
	shop.Backups = append(shop.Backups,
		health.Backup{Listed: repo.Listed{Manifest: repo.Manifest{Ref: odd}, Err: fmt.Errorf("clusters/shop/backups/%s/manifest.json: signed by <nobody> & co: %w", odd.ID, fail.Untrusted)}},
		health.Backup{Listed: repo.Listed{Manifest: repo.Manifest{Ref: repo.Ref{Cluster: "shop", ID: id(now.Add(-20 * time.Minute))}}, Unfinished: true}})
	slices.SortFunc(shop.Backups, func(a, b health.Backup) int { return strings.Compare(string(a.ID), string(b.ID)) })

	lost, found := now.Add(-13*day), now.Add(-13*day+7*time.Hour)
	l := audit.Ledger{Archive: repo.Archive{Cluster: "shop", System: system, Major: 17}, SegmentSize: segment}
	l.Timelines = []audit.Timeline{{ID: 1, Ranges: []audit.Range{
		{From: lsn(begun.Add(time.Hour)), To: lsn(lost), First: begun.Add(time.Hour), Last: lost},
		{From: lsn(found), To: lsn(now.Add(-90 * time.Second)), First: found, Last: now.Add(-90 * time.Second)}}}}
	a := audit.Report{Ledger: l, Holes: l.Holes(bases)}
	a.Windows, a.Stuck = l.Windows(bases)
	shop.Archives = []audit.Report{a}

	ledger := health.Stored{Cluster: "ledger"}
	for i := range 6 {
		at := now.Add(time.Duration(i-6) * day).Truncate(time.Hour)
		m := repo.Manifest{Ref: repo.Ref{Cluster: "ledger", ID: id(at)}, Kind: repo.Logical, System: system + 1, Version: 150020, StartedAt: at, FinishedAt: at.Add(4 * time.Minute),
			LSN: repo.LSNs{Timeline: 3, Before: pg.LSN(0x1_0000_0000 + i*0x1234567), After: pg.LSN(0x1_0000_0000 + i*0x1234567 + 9000)}, Verified: repo.VerifiedContent,
			Content: repo.Content{Bytes: 3 << 30, Stored: int64(700+3*i) << 20}}
		ledger.Backups = append(ledger.Backups, health.Backup{Listed: repo.Listed{Manifest: m}})
	}
	ledger.Backups[4].Tests = []health.Test{test(ledger.Backups[4].Manifest, now.Add(-day), 1)}
	attic := health.Stored{Cluster: "attic"}

	f := report.Facts{Made: now, Version: "1.2.3", Repository: "s3://backups/prod"}
	for _, s := range []health.Stored{attic, ledger, shop} {
		c := report.Cluster{Stored: s, Findings: s.Findings(health.Policy{}, now)}
		if s.Cluster == "shop" {
			c.Schedules = []health.Schedule{
				{Kind: "physical", Cron: "30 1 * * *", TimeZone: "Europe/Berlin", Next: now.Add(10 * time.Hour), Last: now.Add(-13 * time.Hour)},
				{Kind: "logical", Cron: "30 3 * * 0", TimeZone: "UTC", Paused: true, Note: `<script>alert("storage moves")</script>`, Last: now.Add(-8 * day), Missed: 1, Skipped: 2}}
		}
		f.Clusters = append(f.Clusters, c)
	}
	return f
}

// test is a restore test of a backup; the 18th failed.
func test(m repo.Manifest, at time.Time, n int) health.Test {
	r := proof.Report{Started: at, Finished: at.Add(30 * time.Minute), Verdict: proof.Passed, RTO: 1260 + float64(n*17) + 200*math.Sin(float64(n)),
		Segments: 60 + n, Tables: 412, Rows: 189_000_000 + int64(n)*1e5, Reached: proof.Position{Timeline: 1, LSN: lsn(at)},
		Lag: &proof.Lag{Bytes: 9 << 20, Seconds: 45 + 30*math.Cos(float64(n))}, Checks: []proof.Check{{Name: proof.CheckRead, Verdict: proof.Passed}}}
	if n == 18 {
		r.Verdict, r.Lag = proof.Failed, nil
		r.Checks = []proof.Check{{Name: proof.CheckBTree, Verdict: proof.Failed, Failed: 1, Items: 803, Message: "1 of 803 indexes does not agree with its table", Findings: []string{"secret_table_idx"}}}
	}
	return health.Test{ListedProof: repo.ListedProof{Proof: repo.Proof{Ref: m.Ref, Test: id(at), FinishedAt: r.Finished, Passed: r.Verdict == proof.Passed}}, Report: r}
}

func write(t *testing.T, f report.Facts) string {
	t.Helper()
	var b bytes.Buffer
	if err := report.Write(&b, f); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestThePageIsWhole(t *testing.T) {
	page := write(t, facts())
	if *file != "" {
		if err := os.WriteFile(*file, []byte(page), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// It is XML, but for the elements that HTML leaves open.
	closed := regexp.MustCompile(`<(meta|br)([^>]*)>`).ReplaceAllString(page, "<$1$2/>")
	d := xml.NewDecoder(strings.NewReader(closed))
	d.Entity = xml.HTMLEntity
	names := make(map[string]bool)
	var references []string
	for {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		start, ok := token.(xml.StartElement)
		if !ok {
			continue
		}
		if start.Name.Local == "script" || start.Name.Local == "link" || start.Name.Local == "img" {
			t.Errorf("there is an element %s", start.Name.Local)
		}
		for _, a := range start.Attr {
			switch a.Name.Local {
			case "id":
				if names[a.Value] {
					t.Errorf("id %s stands twice", a.Value)
				}
				names[a.Value] = true
			case "aria-labelledby":
				references = append(references, strings.Fields(a.Value)...)
			case "href":
				references = append(references, strings.TrimPrefix(a.Value, "#"))
			case "src", "srcset", "onload", "onclick":
				t.Errorf("%s has %s=%q", start.Name.Local, a.Name.Local, a.Value)
			}
		}
	}
	for _, r := range references {
		if !names[r] {
			t.Errorf("nothing has the id %s that is referred to", r)
		}
	}
	if outside := regexp.MustCompile(`(?i)https?:|url\(|@import|ZgotmplZ`).FindString(page); outside != "" {
		t.Errorf("the page holds %q", outside)
	}
}

func TestThePageShowsEverything(t *testing.T) {
	f := facts()
	page := write(t, f)
	for _, c := range f.Clusters {
		for _, b := range c.Backups {
			if !strings.Contains(page, `class="id">`+string(b.ID)+"<") {
				t.Errorf("backup %s of %s is not there", b.ID, c.Cluster)
			}
		}
	}
	for _, want := range []string{
		`<rect class="hole"`,
		"No moment between 2026-11-10 14:07:31Z and 2026-11-11 01:",
		"1 of 803 indexes does not agree with its table",
		">unproven<", ">proven 2", ">failed 1",
		"&lt;script&gt;alert(&#34;storage moves&#34;)",
		"signed by &lt;nobody&gt; &amp; co",
		">30 1 * * * Europe/Berlin<", "1 missed, 2 skipped",
		"pgkeep wal audit --fill --cluster shop",
		`<td class="critical">critical (4)</td>`,
	} {
		if !strings.Contains(page, want) {
			t.Errorf("%q is not there", want)
		}
	}
	if strings.Contains(page, "secret_table") {
		t.Error("the page names what only those may see who read the backup")
	}
	if n := strings.Count(page, "<figure>"); n < 5 {
		t.Errorf("%d plots, want those of two clusters", n)
	}
	if page != write(t, facts()) {
		t.Error("the same facts made another page")
	}
}

func TestThePageSaysWhatIsNotKnown(t *testing.T) {
	page := write(t, report.Facts{Made: now, Unscheduled: "Next runs are not known: no answer"})
	if !strings.Contains(page, "The repository is empty.") {
		t.Error("an empty repository is not told")
	}
	f := facts()
	f.Unscheduled = "Next runs are not known: no answer"
	page = write(t, f)
	if strings.Count(page, f.Unscheduled) != len(f.Clusters) || strings.Contains(page, "30 1 * * *") {
		t.Error("the page does not say that nothing is known of schedules")
	}
	if strings.Contains(write(t, report.Facts{Made: now, Clusters: f.Clusters[:1]}), "NaN") {
		t.Error("a drawing of nothing")
	}
}

// By the clocks of a server and of a store a hole may take no time; it shows all
// the same.
func TestAHoleIsNeverHidden(t *testing.T) {
	f := facts()
	shop := &f.Clusters[2]
	a := shop.Archives[0]
	a.Windows = a.Windows[:1]
	a.Timelines = []audit.Timeline{{ID: 1, Ranges: []audit.Range{{From: a.Timelines[0].Ranges[0].From, To: a.Timelines[0].Ranges[0].To, First: begun, Last: a.Windows[0].Archived}}}}
	shop.Archives = []audit.Report{a}
	page := write(t, f)
	if !strings.Contains(page, `<rect class="hole"`) || !strings.Contains(page, "No moment after "+a.Windows[0].Archived.Format("2006-01-02 15:04:05Z")) {
		t.Error("the hole is not there")
	}
	a.Holes = nil
	shop.Archives = []audit.Report{a}
	if strings.Contains(write(t, f), `<rect class="hole"`) {
		t.Error("a hole where there is none")
	}
}
