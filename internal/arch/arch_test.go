// Package arch holds one test: who may import whom.
package arch

import (
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const module = "github.com/pgkeep/pgkeep/"

// TestImports compares what every package imports with arch.txt. It reads the
// sources itself, rather than ask the go command, for two reasons: files for
// every platform count, and go test knows to run it again when one changes.
func TestImports(t *testing.T) {
	policy, err := os.ReadFile("arch.txt")
	if err != nil {
		t.Fatal(err)
	}
	rules := parse(string(policy))
	everywhere := rules["*"]
	delete(rules, "*")

	unused := make(map[string]bool)
	for pkg := range rules {
		unused[pkg] = true
	}
	root := os.DirFS("../..")
	err = fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if name != "." && foreign(root, name) {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		imports, err := importsOf(root, name)
		if err != nil {
			return err
		}
		pkg, test := path.Dir(name), strings.HasSuffix(name, "_test.go")
		r, ok := rules[pkg]
		if !ok {
			t.Errorf("%s: package is not in arch.txt", name)
		}
		delete(unused, pkg)
		for _, imp := range imports {
			if everywhere.forbids(imp) || ok && !test && !r.permits(imp) {
				t.Errorf("%s may not import %s", name, imp)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for pkg := range unused {
		t.Errorf("arch.txt speaks of %s, which does not exist", pkg)
	}
}

func TestRules(t *testing.T) {
	r := parse(`
# comment: example.com/no
verbs: internal/store example.com/sdk -os -math/rand  # example.com/no
`)["verbs"]
	for imp, want := range map[string]bool{
		"fmt":                   true,
		"osx":                   true,
		"os":                    false,
		"os/exec":               false,
		"math":                  true,
		"math/rand/v2":          false,
		"example.com/sdk/x":     true,
		"example.com/sdkx":      false,
		"example.com/no":        false,
		"internal/store":        true,
		"internal/store/s3":     false,
		"workflows":             false,
		"example.com/internal/": false,
	} {
		if got := r.permits(imp); got != want {
			t.Errorf("permits(%q) = %v, want %v", imp, got, want)
		}
	}
}

// TestDependenciesAreExplained compares the direct dependencies in go.mod with
// the table in DESIGN.md.
func TestDependenciesAreExplained(t *testing.T) {
	gomod, err := os.ReadFile("../../go.mod")
	if err != nil {
		t.Fatal(err)
	}
	design, err := os.ReadFile("../../docs/DESIGN.md")
	if err != nil {
		t.Fatal(err)
	}
	_, table, _ := strings.Cut(string(design), "## Dependencies")

	var direct, explained []string
	for line := range strings.Lines(string(gomod)) {
		if f := strings.Fields(line); len(f) == 2 && strings.HasPrefix(f[1], "v") {
			direct = append(direct, f[0])
		}
	}
	for line := range strings.Lines(table) {
		if row, ok := strings.CutPrefix(line, "| `"); ok {
			name, _, _ := strings.Cut(row, "`")
			explained = append(explained, name)
		}
	}
	if d := cmp.Diff(direct, explained); d != "" {
		t.Errorf("dependencies (-go.mod +docs/DESIGN.md):\n%s", d)
	}
}

// foreign reports whether dir is another module, or what the go command skips.
func foreign(root fs.FS, dir string) bool {
	base := path.Base(dir)
	if base == "testdata" || strings.HasPrefix(base, ".") || strings.HasPrefix(base, "_") {
		return true
	}
	_, err := fs.Stat(root, path.Join(dir, "go.mod"))
	return err == nil
}

// importsOf returns what a file imports, own packages without the module path.
func importsOf(root fs.FS, name string) ([]string, error) {
	src, err := fs.ReadFile(root, name)
	if err != nil {
		return nil, err
	}
	f, err := parser.ParseFile(token.NewFileSet(), name, src, parser.ImportsOnly)
	if err != nil {
		return nil, err
	}
	var imports []string
	for _, s := range f.Imports {
		imp, err := strconv.Unquote(s.Path.Value)
		if err != nil {
			return nil, err
		}
		imports = append(imports, strings.TrimPrefix(imp, module))
	}
	return imports, nil
}

// A rule is one line of arch.txt.
type rule struct{ may, not []string }

func parse(policy string) map[string]rule {
	rules := make(map[string]rule)
	for line := range strings.Lines(policy) {
		line, _, _ = strings.Cut(line, "#")
		pkg, list, ok := strings.Cut(line, ":")
		if !ok {
			continue
		}
		var r rule
		for _, f := range strings.Fields(list) {
			if not, ok := strings.CutPrefix(f, "-"); ok {
				r.not = append(r.not, not)
			} else {
				r.may = append(r.may, f)
			}
		}
		rules[strings.TrimSpace(pkg)] = r
	}
	return rules
}

func (r rule) forbids(imp string) bool {
	for _, not := range r.not {
		if within(imp, not) {
			return true
		}
	}
	return false
}

func (r rule) permits(imp string) bool {
	if r.forbids(imp) {
		return false
	}
	for _, may := range r.may {
		if imp == may || !own(may) && within(imp, may) {
			return true
		}
	}
	return !own(imp) && !thirdParty(imp)
}

// own reports whether imp, without the module path, is ours.
func own(imp string) bool {
	first, _, _ := strings.Cut(imp, "/")
	switch first {
	case "activities", "cmd", "internal", "worker", "workflows":
		return true
	}
	return false
}

func thirdParty(imp string) bool {
	first, _, _ := strings.Cut(imp, "/")
	return strings.Contains(first, ".")
}

// within reports whether imp is tree or below it.
func within(imp, tree string) bool {
	return imp == tree || strings.HasPrefix(imp, tree+"/")
}
