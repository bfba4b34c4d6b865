// Command release packs what was built: for each architecture under the
// directory of builds one tarball with programs, services, documents, a bill of
// materials and checksums. The same input gives the same bytes.
package main

import (
	"archive/tar"
	"cmp"
	"compress/gzip"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

func main() {
	dist := flag.String("dist", "", "directory with ARCH/bin in it; the tarballs go there too")
	source := flag.String("source", "", "source tree")
	version := flag.String("version", "", "of the release")
	epoch := flag.Int64("epoch", 0, "time of all files, in seconds since 1970")
	flag.Parse()
	if err := release(*dist, *source, *version, time.Unix(*epoch, 0).UTC()); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

func release(dist, source, version string, at time.Time) error {
	archs, err := filepath.Glob(filepath.Join(dist, "*", "bin"))
	if err != nil || len(archs) == 0 {
		return fmt.Errorf("nothing was built under %s: %w", dist, err)
	}
	var sums []string
	for _, bin := range archs {
		arch := filepath.Base(filepath.Dir(bin))
		name := fmt.Sprintf("pgkeep-%s-linux-%s", version, arch)
		all, err := contents(bin, source)
		if err != nil {
			return err
		}
		materials, err := bill(all, version)
		if err != nil {
			return err
		}
		all = append(all, file{"sbom.cdx.json", materials, 0o644})
		all = append(all, file{"SHA256SUMS", checksums(all), 0o644})
		tarball := filepath.Join(dist, name+".tar.gz")
		if err := pack(tarball, name, all, at); err != nil {
			return fmt.Errorf("pack %s: %w", tarball, err)
		}
		packed, err := os.ReadFile(tarball)
		if err != nil {
			return err
		}
		sums = append(sums, fmt.Sprintf("%x  %s\n", sha256.Sum256(packed), filepath.Base(tarball)))
	}
	return os.WriteFile(filepath.Join(dist, "SHA256SUMS"), []byte(strings.Join(sums, "")), 0o644)
}

type file struct {
	name    string // in the tarball
	content []byte
	mode    int64
}

// contents are the files of a tarball, by name.
func contents(bin, source string) (all []file, err error) {
	add := func(from, to string, mode int64) error {
		b, err := os.ReadFile(from)
		all = append(all, file{to, b, mode})
		return err
	}
	programs, err := os.ReadDir(bin)
	if err != nil {
		return nil, err
	}
	for _, p := range programs {
		if err := add(filepath.Join(bin, p.Name()), "bin/"+p.Name(), 0o755); err != nil {
			return nil, err
		}
	}
	for from, to := range map[string]string{"internal/systemd/*.service": "systemd/", "deploy/pgkeep.example.yaml": "", "docs/*.md": "docs/", "docs/decisions/*.md": "docs/decisions/", "*.md": "", "LICENSE": ""} {
		found, err := filepath.Glob(filepath.Join(source, from))
		if err != nil || len(found) == 0 {
			return nil, fmt.Errorf("no %s: %w", from, errors.Join(err, fs.ErrNotExist))
		}
		for _, f := range found {
			if err := add(f, to+filepath.Base(f), 0o644); err != nil {
				return nil, err
			}
		}
	}
	slices.SortFunc(all, func(a, b file) int { return cmp.Compare(a.name, b.name) })
	return all, nil
}

// checksums are as sha256sum -c reads them.
func checksums(all []file) []byte {
	var b strings.Builder
	for _, f := range all {
		fmt.Fprintf(&b, "%x  %s\n", sha256.Sum256(f.content), f.name)
	}
	return []byte(b.String())
}

func pack(to, dir string, all []file, at time.Time) (err error) {
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	z, err := gzip.NewWriterLevel(out, gzip.BestCompression)
	if err != nil {
		return err
	}
	t := tar.NewWriter(z)
	for _, f := range all {
		h := &tar.Header{Name: path.Join(dir, f.name), Mode: f.mode, Size: int64(len(f.content)), ModTime: at, Format: tar.FormatPAX}
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		if _, err := io.Copy(t, strings.NewReader(string(f.content))); err != nil {
			return err
		}
	}
	return errors.Join(t.Close(), z.Close())
}

// A component of CycloneDX 1.5 (https://cyclonedx.org/docs/1.5/json/).
type component struct {
	Type       string     `json:"type"`
	Ref        string     `json:"bom-ref"`
	Name       string     `json:"name"`
	Version    string     `json:"version"`
	PURL       string     `json:"purl,omitempty"`
	Hashes     []hash     `json:"hashes,omitempty"`
	Properties []property `json:"properties,omitempty"`
}

type hash struct {
	Alg     string `json:"alg"`
	Content string `json:"content"`
}

type property struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

type dependency struct {
	Ref       string   `json:"ref"`
	DependsOn []string `json:"dependsOn,omitempty"`
}

// bill tells which modules the programs are made of, as they say themselves: what
// "go version -m" prints.
func bill(all []file, version string) ([]byte, error) {
	modules := make(map[string]component)
	var programs []component
	var needs []dependency
	for _, f := range all {
		if !strings.HasPrefix(f.name, "bin/") {
			continue
		}
		info, err := buildinfo.Read(strings.NewReader(string(f.content)))
		if err != nil {
			return nil, fmt.Errorf("%s: %w", f.name, err)
		}
		ref := "program:" + path.Base(f.name)
		programs = append(programs, component{Type: "application", Ref: ref, Name: path.Base(f.name), Version: version,
			Hashes: []hash{{"SHA-256", fmt.Sprintf("%x", sha256.Sum256(f.content))}}})
		std := component{Type: "library", Name: "std", Version: strings.TrimPrefix(info.GoVersion, "go")}
		std.PURL = "pkg:golang/std@" + std.Version
		std.Ref = std.PURL
		modules[std.Ref] = std
		on := []string{std.Ref}
		for _, m := range info.Deps {
			if m.Replace != nil {
				m = m.Replace
			}
			purl := "pkg:golang/" + m.Path + "@" + m.Version
			c := component{Type: "library", Ref: purl, Name: m.Path, Version: m.Version, PURL: purl}
			if m.Sum != "" {
				c.Properties = []property{{"go:sum", m.Sum}}
			}
			modules[purl] = c
			on = append(on, purl)
		}
		slices.Sort(on)
		needs = append(needs, dependency{ref, on})
	}
	for _, c := range modules {
		programs = append(programs, c)
	}
	slices.SortFunc(programs, func(a, b component) int { return cmp.Or(cmp.Compare(a.Type, b.Type), cmp.Compare(a.Ref, b.Ref)) })
	var doc struct {
		Format   string `json:"bomFormat"`
		Spec     string `json:"specVersion"`
		Version  int    `json:"version"`
		Metadata struct {
			Component component `json:"component"`
		} `json:"metadata"`
		Components   []component  `json:"components"`
		Dependencies []dependency `json:"dependencies"`
	}
	doc.Format, doc.Spec, doc.Version = "CycloneDX", "1.5", 1
	doc.Metadata.Component = component{Type: "application", Ref: "release", Name: "pgkeep", Version: version}
	doc.Components, doc.Dependencies = programs, needs
	b, err := json.MarshalIndent(doc, "", "  ")
	return append(b, '\n'), err
}
