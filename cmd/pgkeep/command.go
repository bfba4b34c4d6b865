package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/suggest"
)

// Categories of commands, in the order in which the help shows them: that of
// the alphabet.
const (
	backups  = "Backups"
	runs     = "Runs and schedules"
	setUp    = "Set-up"
	theShell = "This program"
)

// prepare gives a command, and those below it, what the library does not: one
// form of help, and errors that go up instead of being printed.
func prepare(e *env, c *cli.Command, parent string) {
	name := parent + " " + c.Name
	c.OnUsageError = usageError // not inherited from the app
	c.HideHelpCommand = true
	c.CustomHelpTemplate = commandHelp
	c.Flags = append(c.Flags, e.globalFlags()...)
	if len(c.Subcommands) == 0 {
		c.Action = checked(name, c.ArgsUsage, c.Action)
		return
	}
	c.Action = unknownCommand
	c.CustomHelpTemplate = groupHelp
	for _, sub := range c.Subcommands {
		prepare(e, sub, name)
	}
}

// checked is action for the number of arguments that usage shows: "SCHEDULE",
// "[CLUSTER]" for one that may be missing, "CLUSTER..." for one or more.
func checked(name, usage string, action cli.ActionFunc) cli.ActionFunc {
	low, top := 0, 0
	var needed []string
	for word := range strings.FieldsSeq(usage) {
		if !strings.HasPrefix(word, "[") {
			low++
			needed = append(needed, strings.Trim(word, "."))
		}
		top++
		if strings.Contains(word, "...") {
			top = 1 << 20
		}
	}
	return func(c *cli.Context) error {
		for i, arg := range c.Args().Slice() {
			if i > 0 && len(arg) > 1 && strings.HasPrefix(arg, "-") {
				// The library takes it for an argument.
				return fail.Hint(config.Errorf("%s stands after %s: flags come before arguments", arg, c.Args().Get(0)), "usage: "+line(name, usage))
			}
		}
		switch n := c.NArg(); {
		case n >= low && n <= top:
			return action(c)
		case top == 0:
			return fail.Hint(config.Errorf("%s takes no argument, and there is %q", name, c.Args().First()), "see "+name+" --help")
		case n > top:
			return fail.Hint(config.Errorf("%q is one argument too many", c.Args().Get(top)), "usage: "+line(name, usage))
		}
		return fail.Hint(config.Errorf("%s is missing", needed[c.NArg()]), "usage: "+line(name, usage))
	}
}

func line(name, usage string) string { return name + " [OPTIONS] " + usage }

// usageError is for flags that cannot be read. Without it, the library prints
// the help to the standard output.
func usageError(c *cli.Context, err error, _ bool) error {
	name := c.App.Name
	var flags []string
	if c.Command != nil && c.Command.HelpName != "" {
		name = c.Command.HelpName
		for _, f := range c.Command.Flags {
			flags = append(flags, f.Names()...)
		}
	}
	text := err.Error()
	if given, ok := strings.CutPrefix(text, "flag provided but not defined: -"); ok {
		given = strings.TrimLeft(given, "-")
		text = "unknown flag --" + given
		longer := slices.DeleteFunc(slices.Clone(flags), func(f string) bool { return !strings.HasPrefix(f, given+"-") })
		if n := len(longer); n > 0 {
			text += " (did you mean --" + strings.Join(longer[:n-1], ", --")
			if n > 1 {
				text += " or --"
			}
			text += longer[n-1] + "?)"
		} else if word := suggest.Word(given, flags); word != "" {
			text += " (did you mean --" + word + "?)"
		}
	}
	return fail.With(fail.BadConfig, fail.Hint(errors.New(text), "see "+name+" --help"))
}

// unknownCommand is the action of what has commands below it.
func unknownCommand(c *cli.Context) error {
	name, commands := c.App.Name, c.App.Commands
	if len(c.Command.Subcommands) > 0 && c.Command.HelpName != "" {
		name, commands = c.Command.HelpName, c.Command.Subcommands
	}
	switch {
	case c.NArg() == 0 && name == c.App.Name:
		return cli.ShowAppHelp(c)
	case c.NArg() == 0:
		return cli.ShowSubcommandHelp(c)
	case c.Args().First() == "help": // "pgkeep help schedule apply" is what people expect
		words := append(strings.Fields(name), c.Args().Tail()...)
		return c.App.RunContext(c.Context, append(words, "--help"))
	}
	var names []string
	for _, sub := range commands {
		if !sub.Hidden {
			names = append(names, sub.Name)
		}
	}
	given := c.Args().First()
	return fail.Hint(config.Errorf("no command %q%s", strings.TrimPrefix(name+" "+given, c.App.Name+" "), suggest.DidYouMean(given, names)), "see "+name+" --help")
}

// Help screens. The library hands them to text/template with its own functions
// and a tabwriter.
const (
	flagsHelp = `{{range .VisibleFlags}}
  {{.}}{{end}}
`
	commandsHelp = `{{range .VisibleCategories}}
{{if .Name}}{{.Name}}:{{else}}Commands:{{end}}{{range .VisibleCommands}}
  {{.Name}}{{"\t"}}{{.Usage}}{{end}}
{{end}}`
	appHelp = `{{.Name}}: {{.Usage}}

Usage: {{.Name}} COMMAND [OPTIONS] [ARGUMENTS]
` + commandsHelp + `
Options of every command:` + flagsHelp + `
{{.Description}}
`
	commandHelp = `{{.HelpName}}: {{.Usage}}

Usage: {{.HelpName}} [OPTIONS]{{if .ArgsUsage}} {{.ArgsUsage}}{{end}}
{{if .Description}}
{{.Description}}
{{end}}
Options:` + flagsHelp
	groupHelp = `{{.HelpName}}: {{.Usage}}

Usage: {{.HelpName}} COMMAND [OPTIONS] [ARGUMENTS]
{{if .Description}}
{{.Description}}
{{end}}` + commandsHelp + `
"{{.HelpName}} COMMAND --help" says more.
`
)

// boolFlag is a flag that takes no value.
func boolFlag(name, usage string) cli.Flag {
	return &cli.BoolFlag{Name: name, Usage: usage, DisableDefaultText: true}
}

// jsonFlag is for every command that prints an answer.
func jsonFlag() cli.Flag { return boolFlag("json", "print the answer as JSON") }

// examples is the end of a description: command lines with what they do.
func examples(lines ...string) string {
	var b strings.Builder
	b.WriteString("Examples:")
	for i := 0; i+1 < len(lines); i += 2 {
		fmt.Fprintf(&b, "\n  %s\t%s", lines[i], lines[i+1])
	}
	return b.String()
}
