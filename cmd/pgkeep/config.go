package main

import (
	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/config"
)

func configCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "config",
		Usage:       "look at the configuration",
		Category:    setUp,
		Subcommands: []*cli.Command{configShowCommand(e)},
	}
}

func configShowCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "show",
		Usage: "print the settings in force, and where each comes from",
		Description: "The answer is itself a configuration file. Secrets are not shown.\n\n" + examples(
			"pgkeep config show", "file, environment and defaults together",
			"pgkeep config show | grep -v '# default'", "what somebody has set"),
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			cfg, err := e.config()
			if err != nil {
				return err
			}
			if c.Bool("json") {
				return printJSON(e.out, "config show", configShown{cfg.File(), cfg.Settings()})
			}
			return cfg.WriteYAML(e.out)
		},
	}
}

type configShown struct {
	File     string           `json:"file,omitempty"` // the one that was read
	Settings []config.Setting `json:"settings"`
}
