package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/bucket"
	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/store/s3"
)

func bucketCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "bucket",
		Usage:    "show how the bucket is set up, and how it should be",
		Category: setUp,
		Subcommands: []*cli.Command{
			bucketShowCommand(e),
			bucketSuggestCommand(e),
		},
	}
}

func bucketShowCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "show",
		Usage: "show the versioning, Object Lock, lifecycle and policy that the bucket has",
		Description: "As far as the credentials of the configuration may read them: those of a role of pgkeep\n" +
			"need not, and cannot.",
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			return e.bucketShow(c.Context, c.Bool("json"))
		},
	}
}

func bucketSuggestCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "suggest",
		Usage: "print policies, lifecycle and Object Lock that fit the configuration, as JSON",
		Description: "With --role, only the policy of that role: archiver for pgkeep-wal, backup for the worker,\n" +
			"restore for those who read, expirer for whoever deletes. No role destroys a version; what\n" +
			"is deleted stays for --days. With --principal it is a policy for the bucket, else one to\n" +
			"attach to an identity. Nothing is asked of the service, and nothing changed.\n\n" + examples(
			"pgkeep bucket suggest | jq .lifecycle > lifecycle.json", "for aws s3api put-bucket-lifecycle-configuration",
			"pgkeep bucket suggest --role archiver > archiver.json", "for aws iam put-user-policy"),
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "role", Usage: "print the policy of `ROLE`: archiver, backup, restore or expirer"},
			&cli.StringSliceFlag{Name: "principal", Usage: "of the bucket, for the identity `ARN`; may be repeated"},
			&cli.IntFlag{Name: "days", DefaultText: "retention.lock, or 30", Usage: "keep what was deleted for `N` days, and lock what is new for as many"},
			boolFlag("basic", "without the conditions that only Amazon evaluates"),
		},
		Action: func(c *cli.Context) error {
			days := 0
			if c.IsSet("days") {
				if days = c.Int("days"); days < 1 {
					return config.Errorf("--days is %d, and must be 1 at least", days)
				}
			}
			return e.bucketSuggest(c.String("role"), c.StringSlice("principal"), days, c.Bool("basic"))
		},
	}
}

func (e *env) bucketShow(ctx context.Context, asJSON bool) error {
	cfg, err := e.config()
	if err != nil {
		return err
	}
	st, err := open.Store(ctx, cfg.Repository)
	if err != nil {
		return err
	}
	in, ok := st.(*s3.Bucket)
	if !ok {
		return config.Errorf("the repository is %s, and in no bucket", cfg.Repository.URL)
	}
	settings, err := in.Settings(ctx)
	if err != nil {
		return err
	}
	if asJSON {
		type shown struct {
			Name  string          `json:"name"`
			State string          `json:"state"` // set, none, denied or unknown
			Value json.RawMessage `json:"value,omitempty"`
		}
		var all []shown
		for _, s := range settings {
			all = append(all, shown{s.Name, stateOf(s), s.Value})
		}
		return printJSON(e.out, "bucket show", struct {
			Settings []shown `json:"settings"`
		}{all})
	}
	for _, s := range settings {
		switch stateOf(s) {
		case "set":
			var b bytes.Buffer
			if err := json.Indent(&b, s.Value, "", "  "); err != nil {
				return fmt.Errorf("print %s: %w", s.Name, err)
			}
			fmt.Fprintf(e.out, "%s: %s\n", s.Name, &b)
		case "none":
			fmt.Fprintf(e.out, "%s: none\n", s.Name)
		case "denied":
			fmt.Fprintf(e.out, "%s: not readable with these credentials\n", s.Name)
		default:
			fmt.Fprintf(e.out, "%s: the service does not tell: %v\n", s.Name, s.Err)
		}
	}
	return nil
}

func stateOf(s s3.Setting) string {
	switch {
	case s.Value != nil:
		return "set"
	case s.Err == nil:
		return "none"
	case errors.Is(s.Err, fail.StoreDenied):
		return "denied"
	}
	return "unknown"
}

func (e *env) bucketSuggest(role string, principals []string, days int, basic bool) error {
	cfg, err := e.config()
	if err != nil {
		return err
	}
	url := cfg.Repository.URL
	switch {
	case url.Bucket == "":
		return fail.Hint(config.Errorf("repository.url is %s, and names no bucket", url), "this is for repositories in S3")
	case len(cfg.Clusters) == 0:
		return fail.Hint(config.Errorf("no cluster in the configuration"), "describe one under clusters: a role may touch only what belongs to those")
	}
	l := bucket.Layout{Bucket: url.Bucket, Prefix: url.Prefix, Basic: basic}
	for _, name := range slices.Sorted(maps.Keys(cfg.Clusters)) {
		l.Clusters = append(l.Clusters, string(name))
		if k := cfg.Clusters[name].Retention; k.Lock > 0 {
			const day = 24 * time.Hour
			l.LockDays = max(l.LockDays, int((k.Lock+day-1)/day))
			l.Governance = k.LockMode == config.LockGovernance
		}
	}
	if days == 0 {
		days = cmp.Or(l.LockDays, 30)
	}
	if role != "" {
		r, err := bucket.ParseRole(role)
		if err != nil {
			return err
		}
		return e.printDocument(l.Role(r, principals...))
	}
	roles := make(map[bucket.Role]bucket.Policy)
	for _, r := range bucket.Roles() {
		roles[r] = l.Role(r, principals...)
	}
	return printJSON(e.out, "bucket suggest", struct {
		bucket.Settings
		Roles map[bucket.Role]bucket.Policy `json:"roles"`
	}{l.Settings(days), roles})
}

// printDocument prints what another program reads: without a schema of ours.
func (e *env) printDocument(v any) error {
	enc := json.NewEncoder(e.out)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}
