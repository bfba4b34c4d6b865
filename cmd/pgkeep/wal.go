package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

func walCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "wal",
		Usage:       "look at the archive of the write-ahead log",
		Category:    backups,
		Description: "PostgreSQL archives with pgkeep-wal; what is there, and what is missing, is told here.",
		Subcommands: []*cli.Command{walListCommand(e), walAuditCommand(e)},
	}
}

func walListCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "list",
		Usage:       "list what is archived, by timeline",
		Description: "Only the repository is asked: neither Temporal nor PostgreSQL. All of the archive is\nlisted, a thousand segments a request.\n\n" + examples("pgkeep wal list --cluster main", ""),
		Flags:       []cli.Flag{clusterFlag(), jsonFlag()},
		Action: func(c *cli.Context) error {
			_, _, cluster, all, err := e.audit(c.Context, c.String("cluster"))
			if err != nil {
				return err
			}
			return e.printArchives(cluster, all, c.Bool("json"), time.Now())
		},
	}
}

func windowsCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "windows",
		Usage:    "show to which moments the cluster can be brought back",
		Category: backups,
		Description: "From each physical backup, as far as the archive has every segment. What the last of\n" +
			"them holds was written before it was archived, at the time shown.\n\n" + examples("pgkeep windows --cluster main", ""),
		Flags: []cli.Flag{clusterFlag(), jsonFlag()},
		Action: func(c *cli.Context) error {
			_, _, cluster, all, err := e.audit(c.Context, c.String("cluster"))
			if err != nil {
				return err
			}
			return e.printWindows(cluster, all, c.Bool("json"), time.Now())
		},
	}
}

// audit audits the archives of a cluster.
func (e *env) audit(ctx context.Context, name string) (*config.Config, *repo.Repo, string, []audit.Report, error) {
	now := time.Now()
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return nil, nil, "", nil, err
	}
	if name == "" { // else it need not be known: an archive may be all that is left
		if name, err = whichOf(ctx, cfg, r, ""); err != nil {
			return nil, nil, "", nil, err
		}
	} else if err := new(config.Name).UnmarshalText([]byte(name)); err != nil {
		return nil, nil, "", nil, config.Errorf("--cluster %q: %w", name, err)
	}
	all, err := audit.Take(ctx, r, name, nil, now)
	if err == nil && len(all) == 0 {
		err = fail.Hint(fail.With(fail.NoBackup, fmt.Errorf("cluster %s has no archived WAL", name)),
			"PostgreSQL archives with archive_command = 'pgkeep-wal push %p'; is this the right cluster?")
	}
	return cfg, r, name, all, err
}

// An archiveShown is an archive as commands print it as JSON.
type archiveShown struct {
	repo.Archive
	SegmentSize pg.SegmentSize  `json:"segment_size"`
	Newest      *time.Time      `json:"newest"` // when the newest segment was archived
	Timelines   []timelineShown `json:"timelines"`
	Holes       []audit.Hole    `json:"holes"`
	Odd         []audit.Odd     `json:"odd"`
	OddMore     int             `json:"odd_more,omitempty"` // beside those
}

type timelineShown struct {
	ID       pg.Timeline  `json:"timeline"`
	Ranges   []rangeShown `json:"ranges"`
	Partials []pg.LSN     `json:"partials"`
	Forks    []pg.Fork    `json:"history"` // null: none is archived
	Notes    int          `json:"backup_notes"`
}

type rangeShown struct {
	First    string     `json:"first"`
	Last     string     `json:"last"`
	Segments int        `json:"segments"`
	From     pg.LSN     `json:"from"`
	To       pg.LSN     `json:"to"`
	Archived *time.Time `json:"archived"` // the last of them
}

func showArchive(rep audit.Report) archiveShown {
	at, _, _ := rep.Newest()
	s := archiveShown{Archive: rep.Archive, SegmentSize: rep.SegmentSize, Newest: jsonTime(at),
		Timelines: []timelineShown{}, Holes: append([]audit.Hole{}, rep.Holes...), Odd: append([]audit.Odd{}, rep.Odd...), OddMore: rep.OddMore}
	for _, t := range rep.Timelines {
		one := timelineShown{ID: t.ID, Ranges: []rangeShown{}, Partials: append([]pg.LSN{}, t.Partials...), Forks: t.Forks, Notes: t.Notes}
		for _, r := range t.Ranges {
			one.Ranges = append(one.Ranges, rangeShown{nameAt(rep, t.ID, r.From), nameAt(rep, t.ID, r.To-1), r.Segments(rep.SegmentSize), r.From, r.To, jsonTime(r.Last)})
		}
		s.Timelines = append(s.Timelines, one)
	}
	return s
}

// nameAt is the name of the segment that holds a position.
func nameAt(rep audit.Report, t pg.Timeline, at pg.LSN) string {
	name, _ := pg.SegmentName(t, at, rep.SegmentSize) // the size is valid where there are segments
	return name
}

func (e *env) printArchives(cluster string, all []audit.Report, asJSON bool, now time.Time) error {
	if asJSON {
		answer := struct {
			Cluster  string         `json:"cluster"`
			Archives []archiveShown `json:"archives"`
		}{cluster, []archiveShown{}}
		for _, rep := range all {
			answer.Archives = append(answer.Archives, showArchive(rep))
		}
		return printJSON(e.out, "wal list", answer)
	}
	for i, rep := range all {
		if i > 0 {
			fmt.Fprintln(e.out)
		}
		if err := printArchive(e.out, cluster, rep, now); err != nil {
			return err
		}
		e.sayOdd(rep)
	}
	return nil
}

func (e *env) sayOdd(rep audit.Report) {
	for _, o := range rep.Odd {
		e.say("%s is no file of the archive: %s", o.Key, o.Why)
	}
	if rep.OddMore > 0 {
		e.say("and %d more are none", rep.OddMore)
	}
}

// printArchive prints an archive in the order of its names, holes included.
func printArchive(w io.Writer, cluster string, rep audit.Report, now time.Time) error {
	fmt.Fprintf(w, "%s: system %v, PostgreSQL %d, segments of %s\n", cluster, rep.System, rep.Major, size(int64(rep.SegmentSize)))
	type row struct{ key, what, first, last, count, to, age string }
	var rows []row
	for _, t := range rep.Timelines {
		if len(t.Forks) > 0 {
			f := t.Forks[len(t.Forks)-1]
			name := pg.HistoryName(t.ID).String()
			rows = append(rows, row{name[:8], "history", name, fmt.Sprintf("timeline %d left", f.Timeline), "", f.At.String(), span(now.Sub(t.Born))})
		}
		for _, r := range t.Ranges {
			first, last := nameAt(rep, t.ID, r.From), nameAt(rep, t.ID, r.To-1)
			rows = append(rows, row{first, "segments", first, last, strconv.Itoa(r.Segments(rep.SegmentSize)), r.To.String(), span(now.Sub(r.Last))})
		}
		for _, p := range t.Partials {
			name := nameAt(rep, t.ID, p)
			rows = append(rows, row{name, "partial", name, "", "", "", ""})
		}
	}
	for _, h := range rep.Holes {
		to := ""
		if h.To != 0 {
			to = h.To.String()
		}
		rows = append(rows, row{h.First, "HOLE", h.First, h.Last, strconv.Itoa(h.Count), to, span(now.Sub(h.Since))})
	}
	slices.SortStableFunc(rows, func(a, b row) int { return strings.Compare(a.key, b.key) })
	var cells [][]string
	for _, r := range rows {
		cells = append(cells, []string{r.what, r.first, r.last, r.count, r.to, r.age})
	}
	return table(w, "WHAT FIRST LAST COUNT TO-LSN AGE", cells)
}

type windowShown struct {
	audit.Window
	System pg.SystemID `json:"system_id"`
	Major  int         `json:"pg_major"`
}

func (e *env) printWindows(cluster string, all []audit.Report, asJSON bool, now time.Time) error {
	answer := struct {
		Cluster string        `json:"cluster"`
		Windows []windowShown `json:"windows"`
		Stuck   []audit.Base  `json:"unusable"` // backups whose own log is not all there
	}{cluster, []windowShown{}, []audit.Base{}}
	var rows [][]string
	for _, rep := range all {
		for _, w := range rep.Windows {
			answer.Windows = append(answer.Windows, windowShown{w, rep.System, rep.Major})
			var path []string
			for _, t := range w.Path {
				path = append(path, strconv.Itoa(int(t)))
			}
			rows = append(rows, []string{w.Base.ID, w.From.String(), w.To.String(), strings.Join(path, ">"), moment(w.Archived), since(w.Archived, now)})
		}
		answer.Stuck = append(answer.Stuck, rep.Stuck...)
	}
	for _, b := range answer.Stuck {
		e.say("backup %s cannot be used: the archive lacks WAL between %v and %v on timeline %d", b.ID, b.Start, b.Stop, b.Timeline)
	}
	if asJSON {
		return printJSON(e.out, "windows", answer)
	}
	if len(rows) == 0 {
		e.say("cluster %s can be brought back to no moment: there is no physical backup that the archive goes with", cluster)
		return nil
	}
	return table(e.out, "BACKUP FROM-LSN TO-LSN TIMELINES ARCHIVED AGE", rows)
}

func since(t, now time.Time) string {
	if t.IsZero() {
		return ""
	}
	return span(now.Sub(t))
}

func walAuditCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "audit",
		Usage: "find out whether segments are missing",
		Description: "The exit status is 23 if some are, and the error says which. A hole that shows for less\n" +
			"than 30s is not one yet: segments go up side by side.\n\n" + examples(
			"pgkeep wal audit --cluster main", "",
			"pgkeep wal audit --fill", "on the new primary after a failover, as the user that runs PostgreSQL"),
		Flags: []cli.Flag{clusterFlag(), boolFlag("fill", "put back what the data directory on this host still has of what is missing"), jsonFlag()},
		Action: func(c *cli.Context) error {
			return e.walAudit(c.Context, c.String("cluster"), c.Bool("fill"), c.Bool("json"))
		},
	}
}

func (e *env) walAudit(ctx context.Context, name string, fill, asJSON bool) error {
	cfg, r, cluster, all, err := e.audit(ctx, name)
	if err != nil {
		return err
	}
	filled := []string{}
	if fill && audit.Err(cluster, all) != nil {
		if err := e.fill(ctx, cfg, r, cluster, all, &filled); err != nil {
			return err
		}
		if all, err = audit.Take(ctx, r, cluster, nil, time.Now()); err != nil {
			return err
		}
	}
	if asJSON {
		answer := struct {
			Cluster  string         `json:"cluster"`
			Sound    bool           `json:"sound"`
			Filled   []string       `json:"filled"`
			Archives []archiveShown `json:"archives"`
		}{cluster, audit.Err(cluster, all) == nil, filled, []archiveShown{}}
		for _, rep := range all {
			answer.Archives = append(answer.Archives, showArchive(rep))
		}
		if err := printJSON(e.out, "wal audit", answer); err != nil {
			return err
		}
		return audit.Err(cluster, all)
	}
	for _, name := range filled {
		fmt.Fprintf(e.out, "filled %s\n", name)
	}
	for _, rep := range all {
		e.sayOdd(rep)
		fmt.Fprintln(e.out, inOneLine(cluster, rep, time.Now()))
	}
	return audit.Err(cluster, all)
}

// fill puts back what the server on this host still has.
func (e *env) fill(ctx context.Context, cfg *config.Config, r *repo.Repo, cluster string, all []audit.Report, filled *[]string) error {
	_, at, err := clusterOf(cfg, cluster)
	if err != nil {
		return err
	}
	done, err := audit.Fill(ctx, r, cluster, at, all)
	*filled = append(*filled, done.Files...)
	for _, why := range done.Refused {
		e.say("not filled: %s", why)
	}
	return err
}

// inOneLine is an audit in one line.
func inOneLine(cluster string, rep audit.Report, now time.Time) string {
	segments, timelines := 0, 0
	for _, t := range rep.Timelines {
		timelines++
		for _, r := range t.Ranges {
			segments += r.Segments(rep.SegmentSize)
		}
	}
	state := "no hole"
	if n := len(rep.Holes); n > 0 {
		state = strings.ToUpper(count(n, "hole"))
	}
	text := fmt.Sprintf("%s  %v-%d  %s; %s on %s", cluster, rep.System, rep.Major, state, count(segments, "segment"), count(timelines, "timeline"))
	if at, t, to := rep.Newest(); !at.IsZero() {
		text += fmt.Sprintf(", the newest %s, archived %s ago", nameAt(rep, t, to-1), span(now.Sub(at)))
	}
	return text
}
