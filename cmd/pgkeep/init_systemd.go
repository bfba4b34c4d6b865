package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/systemd"
)

// initSystemd prints the service files, or writes them into a directory.
func (e *env) initSystemd(dir string) error {
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("where is this program? %w", err)
	}
	cfg, err := e.config()
	if err != nil {
		return err
	}
	opt := systemd.Options{Programs: filepath.Dir(program)}
	if file := cfg.File(); file != "" {
		if opt.Config, err = filepath.Abs(file); err != nil {
			return fmt.Errorf("where is the configuration? %w", err)
		}
	}
	opt.Writable = writable(cfg)
	units, err := systemd.Units(opt)
	if err != nil {
		return err
	}
	if dir == "" {
		for _, u := range units {
			fmt.Fprintf(e.out, "# %s\n%s\n", u.Name, u.Text)
		}
		return nil
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return config.Errorf("--output: %w", err)
	}
	defer root.Close()
	for _, u := range units {
		if err := e.writeUnit(root, u); err != nil {
			return err
		}
	}
	e.say("next: systemctl daemon-reload, and systemctl enable --now pgkeep-worker; pgkeep-server only if you have no Temporal")
	return nil
}

// writable are the places outside of pgkeep's own that a worker writes to.
func writable(cfg *config.Config) []string {
	dirs := append([]config.Path{cfg.Spool, cfg.RestoreTest.Directory, config.Path(cfg.Repository.URL.Dir)}, cfg.RestoreDirs...)
	var others []string
	for _, dir := range dirs {
		if dir != "" && !strings.HasPrefix(string(dir)+"/", "/var/lib/pgkeep/") && !slices.Contains(others, string(dir)) {
			others = append(others, string(dir))
		}
	}
	return others
}

// writeUnit makes a service file. One that is there and says something else is
// somebody's work.
func (e *env) writeUnit(root *os.Root, u systemd.Unit) error {
	path := filepath.Join(root.Name(), u.Name)
	err := durable.Create(root, u.Name, 0o644, func(w io.Writer) error {
		_, err := io.WriteString(w, u.Text)
		return err
	})
	if err == nil {
		fmt.Fprintf(e.out, "made   %s\n", path)
		return nil
	}
	if !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("write %s: %w", path, err)
	}
	have, err := root.ReadFile(u.Name)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	if string(have) != u.Text {
		return fail.Hint(fmt.Errorf("%s is there, and differs: %w", path, fail.NotEmpty),
			"what is special about this host belongs into a drop-in: systemctl edit "+u.Name+"; then remove the file, and run this again")
	}
	fmt.Fprintf(e.out, "found  %s\n", path)
	return nil
}
