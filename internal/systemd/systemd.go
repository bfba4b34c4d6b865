// Package systemd holds the service files of pgkeep. They give a process what it
// needs and nothing else: see systemd.exec(5), and systemd-analyze security.
package systemd

import (
	"embed"
	"strings"
)

//go:embed *.service
var files embed.FS

// A Unit is a service file.
type Unit struct{ Name, Text string }

// Options say where things are on the host. The zero value is as a package
// installs them: /usr/bin, /etc/pgkeep/pgkeep.yaml.
type Options struct {
	Programs string // directory; "": /usr/bin
	Config   string // file; "": /etc/pgkeep/pgkeep.yaml
	// Writable are directories outside /var/lib/pgkeep that the worker writes to. One
	// that is not there when it starts is not there for it.
	Writable []string
}

// Units are the services of a worker and of a server, by name.
func Units(opt Options) ([]Unit, error) {
	var all []Unit
	entries, err := files.ReadDir(".")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		text, err := files.ReadFile(e.Name())
		if err != nil {
			return nil, err
		}
		u := Unit{e.Name(), string(text)}
		if opt.Programs != "" {
			u.Text = strings.ReplaceAll(u.Text, "ExecStart=/usr/bin/", "ExecStart="+word(opt.Programs)+"/")
		}
		if opt.Config != "" {
			const file, condition = "/etc/pgkeep/pgkeep.yaml", "ConditionPathExists="
			// A condition is no command line: nothing but % is special there.
			u.Text = strings.NewReplacer(condition+file, condition+strings.ReplaceAll(opt.Config, "%", "%%"), file, word(opt.Config)).Replace(u.Text)
		}
		if u.Name == "pgkeep-worker.service" && len(opt.Writable) > 0 {
			const before = "StateDirectoryMode="
			u.Text = strings.Replace(u.Text, before, "ReadWritePaths="+places(opt.Writable)+"\n"+before, 1)
		}
		all = append(all, u)
	}
	return all, nil
}

// places is a list of directories that need not be there: systemd.exec(5),
// ReadWritePaths.
func places(dirs []string) string {
	words := make([]string, len(dirs))
	for i, dir := range dirs {
		words[i] = `"-` + strings.NewReplacer("%", "%%", `\`, `\\`, `"`, `\"`).Replace(dir) + `"`
	}
	return strings.Join(words, " ")
}

// word escapes what is special in a command line of a service: systemd.service(5),
// "Command lines".
func word(s string) string {
	return strings.NewReplacer(`\`, `\\`, " ", `\x20`, "%", "%%", "$", "$$", `"`, `\"`, "'", `\'`).Replace(s)
}
