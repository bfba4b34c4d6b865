package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/expire"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/retention"
)

func expireCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "expire",
		Usage:    "show which backups and WAL nobody needs; remove them",
		Category: backups,
		Description: "What is kept stands under retention of the cluster. Without --apply, the plan is\n" +
			"printed and nothing changes. With it, backups that are let go are hidden at once;\n" +
			"\"pgkeep undelete\" brings them back until their grace has passed. The run after that\n" +
			"removes what they held. Neither Temporal nor PostgreSQL is asked.\n\n" + examples(
			"pgkeep expire", "what would go, and why",
			"pgkeep expire --apply", "asks first",
			"pgkeep expire --apply --yes", "for scripts"),
		Flags: []cli.Flag{
			clusterFlag(),
			boolFlag("apply", "let go what the plan says"),
			boolFlag("yes", "do not ask"),
			&cli.IntFlag{Name: "confirm", Usage: "let go of `NUMBER` backups, where the plan wants the number said", DefaultText: "none"},
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			return e.expire(c.Context, expireOptions{Cluster: c.String("cluster"), Apply: c.Bool("apply"), Yes: c.Bool("yes"), Confirm: c.Int("confirm"), JSON: c.Bool("json")})
		},
	}
}

type expireOptions struct {
	Cluster          string
	Apply, Yes, JSON bool
	Confirm          int
}

// expirer is what expires a cluster as the configuration says.
func expirer(cfg *config.Config, name string, open func(context.Context) (*repo.Repo, error)) *expire.Expirer {
	k := cfg.Clusters[config.Name(name)].Retention
	return &expire.Expirer{Name: name, Open: open, Lock: retention.Lock{For: k.Lock, Compliance: k.LockMode == config.LockCompliance},
		Policy: retention.Policy{Window: k.Window, Daily: k.Daily, Weekly: k.Weekly, Monthly: k.Monthly, Min: k.Min, Grace: k.Grace}}
}

func (e *env) expire(ctx context.Context, opt expireOptions) error {
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return err
	}
	name, err := whichOf(ctx, cfg, r, opt.Cluster)
	if err != nil {
		return err
	}
	x := expirer(cfg, name, func(context.Context) (*repo.Repo, error) { return r, nil })
	if x.Policy.IsZero() {
		return fail.Hint(config.Errorf("nothing of cluster %s expires: it has no retention", name), "set clusters."+name+".retention, as window: 14d and daily: 30")
	}
	plan, err := x.Plan(ctx)
	if err != nil {
		return err
	}
	locking, err := x.Locking(ctx)
	if err != nil {
		return err
	}
	var done *expire.Done
	if !opt.JSON {
		if err := e.printExpiry(plan); err != nil {
			return err
		}
		if err := e.printLocking(locking, opt.Apply); err != nil {
			return err
		}
	}
	if opt.Apply { // neither asked for nor refused: it harms nothing that is kept
		if locking, err = x.Relock(ctx); err != nil {
			return err
		}
	}
	if opt.Apply {
		if err := plan.Err(opt.Confirm); err != nil {
			return err
		}
		going := plan.Removals()
		if !opt.Yes {
			if err := e.confirm(ctx, fmt.Sprintf("let go of %s of cluster %s, and of what nothing needs", count(len(going), "backup"), name)); err != nil {
				return err
			}
		}
		d, err := x.Apply(ctx, expire.Order{Backups: going, Confirm: opt.Confirm})
		if err != nil {
			return err
		}
		done = &d
	}
	if opt.JSON {
		return printJSON(e.out, "expire", struct {
			retention.Plan
			Locking *retention.Locking `json:"locking,omitempty"` // absent: locks are left alone
			Done    *expire.Done       `json:"done"`              // null: nothing was to be done
		}{plan, locking, done})
	}
	if done == nil {
		return nil
	}
	for _, why := range done.Refused() {
		e.say("the store refuses to remove, and is asked again by the next run: %s", why)
	}
	if done.Awaited != "" {
		e.say("no log is removed before backup %s is done, or deleted: it may need some", done.Awaited)
	}
	segments, bytes := 0, int64(0)
	for _, w := range done.WAL {
		segments, bytes = segments+w.Objects, bytes+w.Bytes
	}
	_, err = fmt.Fprintf(e.out, "let go of %s; removed %s of backups, and %s of the log (%s)\n",
		count(len(done.Marked), "backup"), count(done.Swept.Objects, "object"), count(segments, "file"), size(bytes))
	return err
}

func (e *env) printExpiry(p retention.Plan) error {
	var rows [][]string
	for _, v := range p.Backups {
		verdict := "keep"
		switch {
		case v.Deleted:
			verdict = "deleted"
		case !v.Keep:
			verdict = "GO"
		}
		rows = append(rows, []string{string(v.ID), string(v.Kind), span(p.Now.Sub(v.ID.Time())), size(v.Stored), verdict, strings.Join(v.Reasons, ", ")})
	}
	if err := table(e.out, "ID KIND AGE STORED VERDICT WHY", rows); err != nil {
		return err
	}
	for _, w := range p.WAL {
		if _, err := fmt.Fprintf(e.out, "WAL of system %v, PostgreSQL %d: %s: %s\n", w.System, w.Major, goes(w.Segments), w.Why); err != nil {
			return err
		}
	}
	for _, why := range p.Against {
		e.say("nothing can be removed: %s", why)
	}
	if p.Confirm > 0 {
		e.say("%d backups at once are many: --apply wants --confirm %d", p.Confirm, p.Confirm)
	}
	return nil
}

func (e *env) printLocking(l *retention.Locking, apply bool) error {
	if l == nil {
		return nil
	}
	text := fmt.Sprintf("locked: %s, the first until %s: none is due", count(l.Objects, "object"), moment(l.Ends))
	if l.Due > 0 {
		text = fmt.Sprintf("locked: %s, the first until %s: %d are due, until %s", count(l.Objects, "object"), moment(l.Ends), l.Due, moment(l.Until))
	}
	if l.Later > 0 {
		text += fmt.Sprintf("; %d more with the next runs", l.Later)
	}
	_, err := fmt.Fprintln(e.out, text)
	return err
}

func goes(segments int) string {
	if segments == 0 {
		return "all stays"
	}
	return count(segments, "segment") + " can go"
}

func undeleteCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "undelete",
		Usage:     "bring back a backup that expired, while its grace lasts",
		ArgsUsage: "BACKUP",
		Category:  backups,
		Description: "BACKUP is a whole id; \"pgkeep expire\" shows those that are deleted, and until when\n" +
			"they can be brought back. Hold it too, or the next run lets it go again.\n\n" + examples(
			"pgkeep undelete 20261122T013000Z-4f2a9c01", ""),
		Flags: []cli.Flag{clusterFlag(), jsonFlag()},
		Action: func(c *cli.Context) error {
			r, ref, err := e.named(c.Context, c.String("cluster"), c.Args().First())
			if err != nil {
				return err
			}
			if err := r.Undelete(c.Context, ref); err != nil {
				return err
			}
			if c.Bool("json") {
				return printJSON(e.out, "undelete", ref)
			}
			_, err = fmt.Fprintf(e.out, "backup %s of cluster %s is there again\n", ref.ID, ref.Cluster)
			return err
		},
	}
}

// named is the backup that a whole id names, listed or not.
func (e *env) named(ctx context.Context, cluster, text string) (*repo.Repo, repo.Ref, error) {
	id, err := repo.ParseID(text)
	if err != nil {
		return nil, repo.Ref{}, err
	}
	cfg, r, err := e.repository(ctx)
	if err != nil {
		return nil, repo.Ref{}, err
	}
	name, err := whichOf(ctx, cfg, r, cluster)
	return r, repo.Ref{Cluster: name, ID: id}, err
}

func holdCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "hold",
		Usage:       "keep a backup, whatever the rules say",
		Category:    backups,
		Description: "A backup that is held is removed neither by \"pgkeep expire\" nor by \"pgkeep delete\".",
		Subcommands: []*cli.Command{holdAddCommand(e), holdRemoveCommand(e), holdListCommand(e)},
	}
}

func holdAddCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "add",
		Usage:       "hold a backup",
		ArgsUsage:   "BACKUP",
		Description: "BACKUP is a whole id. The reason is for people, and never encrypted.\n\n" + examples("pgkeep hold add --reason 'audit 2026' 20261122T013000Z-4f2a9c01", ""),
		Flags:       []cli.Flag{clusterFlag(), &cli.StringFlag{Name: "reason", Usage: "why it is held: `TEXT` for who wants to remove it"}, jsonFlag()},
		Action: func(c *cli.Context) error {
			if strings.TrimSpace(c.String("reason")) == "" {
				return fail.Hint(config.Errorf("--reason is missing"), "say why, for those who come later: --reason 'audit 2026'")
			}
			r, ref, err := e.named(c.Context, c.String("cluster"), c.Args().First())
			if err != nil {
				return err
			}
			cfg, err := e.config()
			if err != nil {
				return err
			}
			h, err := r.AddHold(c.Context, ref, c.String("reason"), string(cfg.Host), time.Now())
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return printJSON(e.out, "hold add", showHold(h))
			}
			_, err = fmt.Fprintf(e.out, "backup %s is held (%s): %s\n", ref.ID, h.Name, h.Reason)
			return err
		},
	}
}

func holdRemoveCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "remove",
		Usage:     "lift what holds a backup",
		ArgsUsage: "BACKUP [HOLD]",
		Description: "Without HOLD, all of its holds. The rules apply again with the next run.\n\n" + examples(
			"pgkeep hold remove 20261122T013000Z-4f2a9c01", "all",
			"pgkeep hold remove 20261122T013000Z-4f2a9c01 5e1f02ab", "one of several"),
		Flags: []cli.Flag{clusterFlag(), jsonFlag()},
		Action: func(c *cli.Context) error {
			r, ref, err := e.named(c.Context, c.String("cluster"), c.Args().First())
			if err != nil {
				return err
			}
			n, err := r.LiftHolds(c.Context, ref, c.Args().Get(1))
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return printJSON(e.out, "hold remove", struct {
					repo.Ref
					Lifted int `json:"lifted"`
				}{ref, n})
			}
			_, err = fmt.Fprintf(e.out, "lifted %s of backup %s\n", count(n, "hold"), ref.ID)
			return err
		},
	}
}

// A holdShown is a hold as commands print it.
type holdShown struct {
	repo.Ref
	Name   string     `json:"hold"`
	Reason string     `json:"reason"`
	Host   string     `json:"host"`
	HeldAt *time.Time `json:"held_at"`
}

func showHold(h repo.Hold) holdShown {
	return holdShown{h.Ref, h.Name, h.Reason, h.Host, jsonTime(h.HeldAt)}
}

func holdListCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "list",
		Usage:       "list what is held, and why",
		Description: examples("pgkeep hold list --cluster main", ""),
		Flags:       []cli.Flag{clusterFlag(), jsonFlag()},
		Action: func(c *cli.Context) error {
			cfg, r, err := e.repository(c.Context)
			if err != nil {
				return err
			}
			name, err := whichOf(c.Context, cfg, r, c.String("cluster"))
			if err != nil {
				return err
			}
			all, err := r.Records(c.Context, name)
			if err != nil {
				return err
			}
			holds := []holdShown{}
			var rows [][]string
			for _, b := range all {
				for _, h := range b.Holds {
					holds = append(holds, showHold(h))
					rows = append(rows, []string{string(h.ID), h.Name, moment(h.HeldAt), h.Host, oneLine(h.Reason)})
				}
			}
			if c.Bool("json") {
				return printJSON(e.out, "hold list", struct {
					Holds []holdShown `json:"holds"`
				}{holds})
			}
			if len(rows) == 0 {
				e.say("nothing of cluster %s is held", name)
				return nil
			}
			return table(e.out, "BACKUP HOLD SINCE HOST REASON", rows)
		},
	}
}
