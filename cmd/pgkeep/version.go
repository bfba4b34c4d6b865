package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/urfave/cli/v2"
)

// version is set by the linker: -X main.version=v1.2.3.
var version string

func versionCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "version",
		Usage:    "print the version of this program",
		Category: theShell,
		Flags:    []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			v := thisVersion()
			if c.Bool("json") {
				return printJSON(e.out, "version", v)
			}
			_, err := fmt.Fprintf(e.out, "pgkeep %s (%s, %s/%s)\n", v.Version, v.Go, v.OS, v.Arch)
			return err
		},
	}
}

type versionInfo struct {
	Version string `json:"version"`
	Commit  string `json:"commit,omitempty"`
	Go      string `json:"go"`
	OS      string `json:"os"`
	Arch    string `json:"arch"`
}

func thisVersion() versionInfo {
	v := versionInfo{Version: version, Go: runtime.Version(), OS: runtime.GOOS, Arch: runtime.GOARCH}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return v
	}
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" {
			v.Commit = s.Value
		}
	}
	if v.Version == "" {
		v.Version = info.Main.Version
	}
	return v
}
