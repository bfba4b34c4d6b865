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
	may := make(map[string][]string)
	for line := range strings.Lines(string(policy)) {
		line, _, _ = strings.Cut(line, "#")
		if pkg, list, ok := strings.Cut(line, ":"); ok {
			may[strings.TrimSpace(pkg)] = strings.Fields(list)
		}
	}
	root := os.DirFS("../..")
	err = fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return err
		}
		src, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), name, src, parser.ImportsOnly)
		if err != nil {
			return err
		}
		allowed, ok := may[path.Dir(name)]
		if !ok {
			t.Errorf("%s: package is not in arch.txt", name)
		}
		for _, s := range f.Imports {
			imp, _ := strconv.Unquote(s.Path.Value)
			if ok && !permits(allowed, imp) {
				t.Errorf("%s may not import %s", name, imp)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// permits reports whether imp, or a parent of it, is in the list. Own packages
// are written without the module path. The standard library is free, but for
// what the list takes back with "-".
func permits(allowed []string, imp string) bool {
	own := strings.TrimPrefix(imp, module)
	for _, a := range allowed {
		if a == "-"+imp {
			return false
		}
	}
	for _, a := range allowed {
		if own == a || strings.HasPrefix(own, a+"/") {
			return true
		}
	}
	first, _, _ := strings.Cut(imp, "/")
	return !strings.Contains(first, ".")
}
