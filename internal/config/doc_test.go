package config_test

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/pgkeep/pgkeep/internal/config"
)

var update = flag.Bool("update", false, "write docs/CONFIG.md")

const page = "../../docs/CONFIG.md"

// docs/CONFIG.md says of every setting what the comment of its field says.
func TestReference(t *testing.T) {
	want := reference(t)
	if *update {
		if err := os.WriteFile(page, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	got, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("docs/CONFIG.md is not what the code says; go test ./internal/config -update writes it (-code +page):\n%s", diff)
	}
}

const preface = `# Configuration

pgkeep reads one YAML file: the one given with ` + "`--config`" + `, else the one that ` + "`PGKEEP_CONFIG`" + ` names, else
` + "`" + config.DefaultFile + "`" + `. A key it does not know is an error, with the line; so is a key given twice, and a value of
the wrong form. ` + "`pgkeep config show`" + ` prints what is in force, and where each value comes from.

A setting with a variable can be set in the environment, which wins over the file. A variable that begins with ` + "`PGKEEP_`" + `
and belongs to no setting is an error; one that is set to nothing counts as not set.

Secrets never stand in the file. They stand in files of their own, which nobody but their owner may read (` + "`chmod 600`" + `; a
file of root may also be readable for its group), or in the environment.

Durations are written as ` + "`90s`, `10m`, `6h`, `7d`" + `. Paths are absolute.

` + "```yaml" + `
repository:
  url: s3://backups/production
  endpoint: https://s3.example:9000
  access_key_id: pgkeep
  secret_access_key_file: /etc/pgkeep/s3.secret
keys:
  signing_key: /etc/pgkeep/signing.key
  recipients: [age1…]
temporal:
  address: temporal.example:7233
clusters:
  main:
    conninfo: host=/run/postgresql user=backup
schedules:
  - {cluster: main, cron: "30 1 * * *", time_zone: Europe/Berlin}
` + "```" + `

<!-- What follows is written by: go test ./internal/config -update -->
`

func reference(t *testing.T) string {
	var b strings.Builder
	b.WriteString(preface)
	comments := fieldComments(t)
	table(&b, comments, reflect.TypeFor[config.Config](), "", true)
	return b.String()
}

// table writes the settings of one struct, then those of the structs in it.
func table(b *strings.Builder, comments map[string]string, s reflect.Type, path string, env bool) {
	title := path
	if title == "" {
		title = "The file"
	}
	fmt.Fprintf(b, "\n## %s\n\n", title)
	if path == "schedules[]" || path == "clusters.NAME" {
		b.WriteString("These have no variables.\n\n")
	}
	b.WriteString("| key | default | variable | meaning |\n| --- | --- | --- | --- |\n")
	type section struct {
		of   reflect.Type
		path string
		env  bool
	}
	var below []section
	for i := range s.NumField() {
		f := s.Field(i)
		key := f.Tag.Get("yaml")
		if key == "" {
			continue
		}
		at := strings.TrimPrefix(path+"."+key, ".")
		variable, def := "", f.Tag.Get("default")
		switch {
		case f.Type.Kind() == reflect.Map:
			below = append(below, section{f.Type.Elem(), at + ".NAME", false})
		case f.Type.Kind() == reflect.Slice && f.Type.Elem().Kind() == reflect.Struct:
			below = append(below, section{f.Type.Elem(), at + "[]", false})
		case isSection(f.Type):
			below = append(below, section{f.Type, at, env})
		case f.Type.Kind() != reflect.Slice && env:
			variable = "`PGKEEP_" + strings.ToUpper(strings.ReplaceAll(at, ".", "_")) + "`"
		}
		if def != "" {
			def = "`" + def + "`"
		}
		if f.Tag.Get("required") != "" {
			def = "required"
		}
		meaning := comments[s.Name()+"."+f.Name]
		if f.Type == reflect.TypeFor[config.Secret]() {
			meaning += " Only in the environment."
		}
		fmt.Fprintf(b, "| `%s` | %s | %s | %s |\n", key, def, variable, meaning)
	}
	for _, sec := range below {
		table(b, comments, sec.of, sec.path, sec.env)
	}
}

func isSection(t reflect.Type) bool {
	return t.Kind() == reflect.Struct && t != reflect.TypeFor[config.Secret]() && t != reflect.TypeFor[config.Location]()
}

// fieldComments returns the comments of the fields of all structs in config.go,
// by "Struct.Field".
func fieldComments(t *testing.T) map[string]string {
	f, err := parser.ParseFile(token.NewFileSet(), "config.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	comments := make(map[string]string)
	ast.Inspect(f, func(n ast.Node) bool {
		spec, ok := n.(*ast.TypeSpec)
		if !ok {
			return true
		}
		if s, ok := spec.Type.(*ast.StructType); ok {
			for _, field := range s.Fields.List {
				text := strings.Join(strings.Fields(field.Doc.Text()), " ")
				if field.Tag != nil && text == "" {
					t.Errorf("%s.%s has no comment", spec.Name, field.Names[0])
				}
				for _, name := range field.Names {
					comments[spec.Name.Name+"."+name.Name] = text
				}
			}
		}
		return true
	})
	return comments
}
