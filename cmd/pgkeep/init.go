package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/urfave/cli/v2"
	enumspb "go.temporal.io/api/enums/v1"
	"go.temporal.io/api/operatorservice/v1"
	"go.temporal.io/api/serviceerror"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/workflows"
)

func initCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "init",
		Usage:    "make what is missing: keys, repository, search attributes",
		Category: setUp,
		Description: "Says what it made and what it found. Run it at any time: what is there is kept.\n\n" + examples(
			"pgkeep init", "for keys.recipients",
			"pgkeep init --new-identity operator.key", "and for a new identity",
			"pgkeep init --sql main", "only print the SQL for the role of a cluster",
			"pgkeep init --systemd --output /etc/systemd/system", "only write the service files"),
		ArgsUsage: "[CLUSTER]",
		Flags: []cli.Flag{
			newIdentityFlag(),
			boolFlag("sql", "make nothing: print the SQL that makes the role of CLUSTER, with the rights it needs"),
			&cli.StringFlag{Name: "kind", Usage: "with --sql: for backups of `KIND`, physical or logical, in place of what the schedules need"},
			boolFlag("systemd", "make nothing: print the service files of worker and server"),
			&cli.PathFlag{Name: "output", Usage: "with --systemd: write them into `DIR`"},
			jsonFlag(),
		},
		Action: func(c *cli.Context) error {
			switch {
			case c.Bool("systemd") && c.NArg() == 0 && !c.Bool("sql"):
				return e.initSystemd(c.Path("output"))
			case c.Bool("systemd"), c.IsSet("output"):
				return config.Errorf("--systemd goes alone, but for --output, which goes with it")
			case c.Bool("sql"):
				return e.initSQL(c.Args().First(), c.String("kind"))
			case c.NArg() > 0 || c.IsSet("kind"):
				return config.Errorf("a cluster, and --kind, go with --sql")
			}
			return e.init(c.Context, c.String("new-identity"), c.Bool("json"))
		},
	}
}

func (e *env) init(ctx context.Context, identity string, asJSON bool) error {
	s := &setup{e: e, json: asJSON}
	defer s.advise()
	if err := s.keys(ctx, identity, time.Now()); err != nil {
		return err
	}
	if err := s.searchAttributes(ctx); err != nil {
		return err
	}
	cfg, err := e.config()
	if err != nil {
		return err
	}
	for _, command := range nextCommands(cfg) {
		s.note("next: %s", command)
	}
	return s.end("init")
}

// nextCommands are what to do once everything is there.
func nextCommands(cfg *config.Config) []string {
	names := slices.Sorted(maps.Keys(cfg.Clusters))
	if len(names) == 0 {
		return []string{"describe a cluster under clusters in the configuration"}
	}
	next := []string{"pgkeep worker (on the host of the cluster; it stays)", "pgkeep backup " + string(names[0])}
	if len(cfg.Schedules) > 0 {
		next = append(next, "pgkeep schedule apply")
	}
	return next
}

// searchAttributes registers those that runs carry. Everything works without
// them but the search: a server that is away, or refuses, is no failure.
func (s *setup) searchAttributes(ctx context.Context) error {
	server, err := s.e.temporal(ctx)
	if err == nil {
		defer server.Close()
		err = s.register(ctx, server)
	}
	if err == nil || ctx.Err() != nil {
		return err
	}
	if err = classify(ctx, err); fail.KindOf(err) == fail.TemporalDown {
		s.note("warning: %v", err)
		s.note("  search attributes are not registered: run pgkeep init again when Temporal is there")
		return nil
	}
	return err
}

func (s *setup) register(ctx context.Context, server *server) error {
	const what = "search attributes"
	have, err := server.OperatorService().ListSearchAttributes(ctx, &operatorservice.ListSearchAttributesRequest{Namespace: server.namespace})
	if refused(err) {
		s.noteAttributes(server.namespace)
		return nil
	}
	if err != nil {
		return fmt.Errorf("list search attributes: %w", err)
	}
	missing, err := missingAttributes(have.CustomAttributes)
	if err != nil {
		return err
	}
	is := fmt.Sprintf("%d in namespace %s", len(workflows.SearchAttributes()), server.namespace)
	if len(missing) == 0 {
		s.step(false, what, "%s", is)
		return nil
	}
	_, err = server.OperatorService().AddSearchAttributes(ctx, &operatorservice.AddSearchAttributesRequest{Namespace: server.namespace, SearchAttributes: missing})
	if refused(err) {
		s.noteAttributes(server.namespace)
		return nil
	}
	if err != nil {
		return fmt.Errorf("add search attributes: %w", err)
	}
	s.step(true, what, "%s", is)
	return nil
}

// missingAttributes are those that a server with these lacks. One of another
// type would stop every workflow that sets it.
func missingAttributes(have map[string]enumspb.IndexedValueType) (map[string]enumspb.IndexedValueType, error) {
	missing := make(map[string]enumspb.IndexedValueType)
	for _, key := range workflows.SearchAttributes() {
		is, ok := have[key.GetName()]
		switch {
		case !ok:
			missing[key.GetName()] = key.GetValueType()
		case is != key.GetValueType():
			return nil, fail.Hint(config.Errorf("search attribute %s is of type %v on the Temporal server, and must be %v", key.GetName(), is, key.GetValueType()),
				"somebody else's? Give pgkeep a namespace of its own, as temporal.namespace")
		}
	}
	return missing, nil
}

// refused reports whether a server lets nobody register attributes this way, as
// Temporal Cloud.
func refused(err error) bool {
	_, denied := errors.AsType[*serviceerror.PermissionDenied](err)
	_, unknown := errors.AsType[*serviceerror.Unimplemented](err)
	return denied || unknown
}

// noteAttributes tells how an administrator registers them.
func (s *setup) noteAttributes(namespace string) {
	s.note("warning: this Temporal server lets only its administrator register search attributes:")
	for _, key := range workflows.SearchAttributes() {
		s.note("  temporal operator search-attribute create --namespace %s --name %s --type %v", namespace, key.GetName(), key.GetValueType())
	}
}
