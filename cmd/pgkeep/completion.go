package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/config"
)

func completionCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "completion",
		Usage:     "print what makes a shell complete commands and flags",
		ArgsUsage: "SHELL",
		Category:  theShell,
		Description: "SHELL is bash, zsh or fish.\n\n" + examples(
			"source <(pgkeep completion bash)", "this bash",
			"pgkeep completion bash > /etc/bash_completion.d/pgkeep", "every bash",
			"pgkeep completion zsh > \"${fpath[1]}/_pgkeep\"", "every zsh",
			"pgkeep completion fish > ~/.config/fish/completions/pgkeep.fish", "every fish"),
		BashComplete: func(*cli.Context) { fmt.Fprintln(e.out, strings.Join(shells, "\n")) },
		Action: func(c *cli.Context) error {
			script, err := completion(c.App, c.Args().First())
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(e.out, script)
			return err
		},
	}
}

var shells = []string{"bash", "zsh", "fish"}

func completion(app *cli.App, shell string) (string, error) {
	switch shell {
	case "bash":
		return bashCompletion, nil
	case "zsh":
		return zshCompletion, nil
	case "fish":
		return app.ToFishCompletion()
	}
	return "", config.Errorf("no completion for %q: want bash, zsh or fish", shell)
}

// The program itself answers what may come next, when its last argument is
// --generate-bash-completion.
const (
	bashCompletion = `_pgkeep() {
  local cur="${COMP_WORDS[COMP_CWORD]}" words=("${COMP_WORDS[@]:0:COMP_CWORD}")
  [[ $cur == -* ]] && words+=("$cur")
  mapfile -t COMPREPLY < <(compgen -W "$("${words[@]}" --generate-bash-completion 2>/dev/null)" -- "$cur")
}
complete -o bashdefault -o default -F _pgkeep pgkeep
`
	zshCompletion = `#compdef pgkeep
_pgkeep() {
  local -a before offers
  before=("${(@)words[1,CURRENT-1]}")
  [[ ${words[CURRENT]} == -* ]] && before+=("${words[CURRENT]}")
  offers=("${(@f)$("${before[@]}" --generate-bash-completion 2>/dev/null)}")
  if [[ -n ${offers[1]} ]]; then
    _describe pgkeep offers
  else
    _files
  fi
}
if [[ ${funcstack[1]} == _pgkeep ]]; then _pgkeep "$@"; else compdef _pgkeep pgkeep; fi
`
)
