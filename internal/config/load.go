package config

import (
	"bytes"
	"cmp"
	"encoding"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/suggest"
)

// Options say what to load a configuration from.
type Options struct {
	// File is the path of the YAML file. If "", it is PGKEEP_CONFIG of Environ,
	// and else DefaultFile, which need not exist.
	File string
	// Environ has the form of os.Environ. A variable that is set to nothing is
	// taken as not set.
	Environ []string
	// Hostname is the default for host.
	Hostname string
}

// Load reads and checks a configuration. The environment wins over the file,
// and the file over the defaults. The error tells everything that is wrong, one
// problem a line, and is of kind fail.BadConfig.
func Load(opt Options) (*Config, error) {
	file, text, err := opt.read()
	if err != nil {
		return nil, err
	}
	return Parse(file, text, opt)
}

// Parse is Load for a file that has been read: text is its content, and file
// its name in messages. File of opt is ignored.
func Parse(file string, text []byte, opt Options) (*Config, error) {
	c := &Config{file: file, sources: make(map[string]Source)}
	l := &loader{file: file, sources: c.sources}
	root := reflect.ValueOf(c).Elem()
	l.defaults(root)
	if doc := l.document(text); doc != nil {
		l.decode(doc, root, "")
	}
	l.environment(opt.Environ, root)
	l.hosts(c, opt.Hostname)
	if len(l.problems) == 0 {
		c.check(l.problem)
	}
	if err := l.err(); err != nil {
		return nil, err
	}
	return c, nil
}

func (opt Options) read() (file string, text []byte, err error) {
	file = opt.File
	if file == "" {
		file = lookup(opt.Environ, prefix+"CONFIG")
	}
	if file != "" {
		text, err = os.ReadFile(file)
	} else if text, err = os.ReadFile(DefaultFile); errors.Is(err, fs.ErrNotExist) {
		return "", nil, nil
	} else {
		file = DefaultFile
	}
	if err != nil {
		return "", nil, Errorf("read configuration: %w", err)
	}
	return file, text, nil
}

func lookup(environ []string, name string) string {
	for _, e := range slices.Backward(environ) {
		if value, ok := strings.CutPrefix(e, name+"="); ok {
			return value
		}
	}
	return ""
}

// A Source is where a value comes from.
type Source struct {
	File string // if it stands in a file
	Line int
	Env  string // the variable, if it comes from the environment
}

// String is "file:line", the name of a variable, or "default".
func (s Source) String() string {
	switch {
	case s.Env != "":
		return s.Env
	case s.File != "":
		return s.File + ":" + strconv.Itoa(s.Line)
	}
	return "default"
}

// A loader fills a Config and collects what is wrong on the way.
type loader struct {
	file     string
	sources  map[string]Source // by path, as "clusters.main.logical.jobs"
	problems []problem
}

type problem struct {
	at   Source
	text string
}

func (l *loader) at(n *yaml.Node) Source { return Source{File: l.file, Line: n.Line} }

func (l *loader) add(at Source, format string, args ...any) {
	err := fmt.Errorf(format, args...)
	l.problems = append(l.problems, problem{at: at, text: err.Error()})
}

// problem adds a problem with the value at path, or with the nearest thing
// around it that has a line.
func (l *loader) problem(path, format string, args ...any) {
	for p := path; p != ""; p = p[:max(0, strings.LastIndexAny(p, ".["))] {
		if at, ok := l.sources[p]; ok {
			l.add(at, format, args...)
			return
		}
	}
	l.add(Source{}, format, args...)
}

func (l *loader) err() error {
	if len(l.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(l.problems, func(a, b problem) int {
		return cmp.Or(cmp.Compare(a.at.Env, b.at.Env), cmp.Compare(a.at.Line, b.at.Line))
	})
	var lines []string
	for _, p := range l.problems {
		where := p.at.String()
		if p.at == (Source{}) {
			where = cmp.Or(l.file, "configuration")
		}
		lines = append(lines, where+": "+p.text)
	}
	return fail.Hint(Errorf("%s", strings.Join(slices.Compact(lines), "\n")), "docs/CONFIG.md describes every setting")
}

var yamlLine = sync.OnceValue(func() *regexp.Regexp {
	return regexp.MustCompile(`(?s)^yaml: (?:line (\d+): )?(.*)$`)
})

// document returns the node below the document, or nil for an empty file and
// for one that is not YAML.
func (l *loader) document(text []byte) *yaml.Node {
	dec := yaml.NewDecoder(bytes.NewReader(text))
	var doc, more yaml.Node
	if err := dec.Decode(&doc); err != nil {
		if !errors.Is(err, io.EOF) {
			l.syntax(err)
		}
		return nil
	}
	switch err := dec.Decode(&more); {
	case err == nil:
		l.add(l.at(&more), "a second document begins here; want one")
	case !errors.Is(err, io.EOF):
		l.syntax(err)
	}
	if len(doc.Content) != 1 {
		return nil
	}
	return doc.Content[0]
}

func (l *loader) syntax(err error) {
	at, text := Source{File: l.file, Line: 1}, err.Error()
	if m := yamlLine().FindStringSubmatch(text); m != nil {
		text = m[2]
		if n, err := strconv.Atoi(m[1]); err == nil {
			at.Line = n
		}
	}
	l.add(at, "not YAML: %s", text)
}

// defaults sets what the tags of a struct and of the structs in it say.
func (l *loader) defaults(v reflect.Value) {
	for key, f := range fields(v) {
		if f.value.Kind() == reflect.Struct && !isScalar(f.value) {
			l.defaults(f.value)
		} else if text := f.tag.Get("default"); text != "" {
			if err := set(f.value, text); err != nil {
				l.add(Source{}, "default of %s: %w", key, err)
			}
		}
	}
}

// decode sets v, which is at path, to what n says.
func (l *loader) decode(n *yaml.Node, v reflect.Value, path string) {
	null := n.Kind == yaml.ScalarNode && n.Tag == "!!null"
	switch {
	case n.Kind == yaml.AliasNode || n.Anchor != "":
		l.add(l.at(n), "anchors and aliases are not for this file: write the value out")
	case isScalar(v):
		l.scalar(n, v, path)
	case null: // a heading with nothing under it
	case v.Kind() == reflect.Slice:
		l.list(n, v, path)
	case n.Kind != yaml.MappingNode:
		l.add(l.at(n), "%s: want keys with values", cmp.Or(path, "the file"))
	case v.Kind() == reflect.Map:
		l.named(n, v, path)
	default:
		l.mapping(n, v, path)
	}
}

func (l *loader) scalar(n *yaml.Node, v reflect.Value, path string) {
	l.sources[path] = l.at(n)
	if _, secret := v.Interface().(Secret); secret {
		l.add(l.at(n), "%s is a secret and does not belong here: set %s, or put it into a file and name that as %s_file", path, variable(path), path)
		return
	}
	if n.Kind != yaml.ScalarNode {
		l.add(l.at(n), "%s: want one value", path)
		return
	}
	err := errNoValue
	if n.Tag != "!!null" && n.Value != "" {
		err = set(v, n.Value)
	}
	_, private := errors.AsType[privateError](err)
	switch {
	case errors.Is(err, errNoValue):
		l.add(l.at(n), "%s has no value", path)
	case private:
		l.add(l.at(n), "%s: %w", path, err)
	case err != nil:
		l.add(l.at(n), "%s: %q: %w", path, n.Value, err)
	}
}

func (l *loader) list(n *yaml.Node, v reflect.Value, path string) {
	if n.Kind != yaml.SequenceNode {
		l.add(l.at(n), "%s: want a list", path)
		return
	}
	l.sources[path] = l.at(n)
	for i, item := range n.Content {
		elem := reflect.New(v.Type().Elem()).Elem()
		l.element(item, elem, fmt.Sprintf("%s[%d]", path, i))
		v.Set(reflect.Append(v, elem))
	}
}

func (l *loader) named(n *yaml.Node, v reflect.Value, path string) {
	v.Set(reflect.MakeMap(v.Type()))
	for key, value := range l.pairs(n, path) {
		name := reflect.New(v.Type().Key()).Elem()
		if err := set(name, key.Value); err != nil {
			l.add(l.at(key), "%s: %q: %w", path, key.Value, err)
			continue
		}
		elem := reflect.New(v.Type().Elem()).Elem()
		l.sources[path+"."+key.Value] = l.at(key)
		l.element(value, elem, path+"."+key.Value)
		v.SetMapIndex(name, elem)
	}
}

// element decodes one of a list or of a map: unlike the file itself, there may
// be keys it cannot do without.
func (l *loader) element(n *yaml.Node, v reflect.Value, path string) {
	if _, ok := l.sources[path]; !ok {
		l.sources[path] = l.at(n)
	}
	if isScalar(v) {
		l.decode(n, v, path)
		return
	}
	l.defaults(v)
	l.decode(n, v, path)
	for key, f := range fields(v) {
		if _, ok := l.sources[path+"."+key]; !ok && f.tag.Get("required") != "" {
			l.add(l.sources[path], "%s has no %s", path, key)
		}
	}
}

func (l *loader) mapping(n *yaml.Node, v reflect.Value, path string) {
	if _, ok := l.sources[path]; !ok && path != "" {
		l.sources[path] = l.at(n)
	}
	known := make(map[string]reflect.Value)
	var keys []string
	for key, f := range fields(v) {
		known[key], keys = f.value, append(keys, key)
	}
	for key, value := range l.pairs(n, path) {
		if f, ok := known[key.Value]; ok {
			l.decode(value, f, join(path, key.Value))
			continue
		}
		in := ""
		if path != "" {
			in = " in " + path
		}
		l.add(l.at(key), "unknown key %q%s%s", key.Value, in, suggest.DidYouMean(key.Value, keys))
	}
}

// pairs yields the keys of a mapping with their values, each key once.
func (l *loader) pairs(n *yaml.Node, path string) func(yield func(key, value *yaml.Node) bool) {
	return func(yield func(key, value *yaml.Node) bool) {
		first := make(map[string]int)
		for i := 0; i+1 < len(n.Content); i += 2 {
			key, value := n.Content[i], n.Content[i+1]
			if key.Kind != yaml.ScalarNode || key.Anchor != "" {
				l.add(l.at(key), "want a plain word for a key")
				continue
			}
			if line, ok := first[key.Value]; ok {
				l.add(l.at(key), "%s is given twice, the first time in line %d", join(path, key.Value), line)
				continue
			}
			first[key.Value] = key.Line
			if !yield(key, value) {
				return
			}
		}
	}
}

// prefix begins the variables that are settings.
const prefix = "PGKEEP_"

func variable(path string) string {
	return prefix + strings.ToUpper(strings.ReplaceAll(path, ".", "_"))
}

// environment sets what PGKEEP_ variables say. Only what stands at a fixed path
// has one: nothing under clusters and schedules, and no list. PGKEEP_TEST_ is left
// to the tests.
func (l *loader) environment(environ []string, root reflect.Value) {
	settings := make(map[string]string) // path by variable
	values := make(map[string]reflect.Value)
	names := []string{prefix + "CONFIG"}
	for path, v := range scalars(root, "") {
		settings[variable(path)], values[path] = path, v
		names = append(names, variable(path))
	}
	for _, e := range slices.Sorted(slices.Values(environ)) {
		name, value, _ := strings.Cut(e, "=")
		if !strings.HasPrefix(name, prefix) || value == "" || name == prefix+"CONFIG" || strings.HasPrefix(name, prefix+"TEST_") {
			continue
		}
		path, ok := settings[name]
		if !ok {
			l.add(Source{Env: name}, "no such setting%s", suggest.DidYouMean(name, names))
			continue
		}
		l.sources[path] = Source{Env: name}
		if err := set(values[path], value); err != nil {
			l.add(Source{Env: name}, "%w", err)
		}
	}
}

// hosts fills in the names of hosts that are not given.
func (l *loader) hosts(c *Config, hostname string) {
	if c.Host == "" && hostname != "" {
		if err := c.Host.UnmarshalText([]byte(hostname)); err != nil {
			l.problem("host", "the name of this host is %q, and cannot be used: set host", hostname)
		}
	}
	for name, cluster := range c.Clusters {
		cluster.Host = cmp.Or(cluster.Host, c.Host)
		c.Clusters[name] = cluster
	}
}

type field struct {
	value reflect.Value
	tag   reflect.StructTag
}

// fields yields the settings of a struct by their keys, in order.
func fields(v reflect.Value) func(yield func(string, field) bool) {
	return func(yield func(string, field) bool) {
		for i := range v.NumField() {
			tag := v.Type().Field(i).Tag
			if key := tag.Get("yaml"); key != "" && !yield(key, field{v.Field(i), tag}) {
				return
			}
		}
	}
}

// scalars yields the single values at fixed paths in v, which is at path.
func scalars(v reflect.Value, path string) func(yield func(string, reflect.Value) bool) {
	return func(yield func(string, reflect.Value) bool) {
		for key, f := range fields(v) {
			p := join(path, key)
			if isScalar(f.value) {
				if !yield(p, f.value) {
					return
				}
			} else if f.value.Kind() == reflect.Struct {
				for p, v := range scalars(f.value, p) {
					if !yield(p, v) {
						return
					}
				}
			}
		}
	}
}

func join(path, key string) string { return strings.TrimPrefix(path+"."+key, ".") }

func isScalar(v reflect.Value) bool {
	if _, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return true
	}
	switch v.Kind() {
	case reflect.String, reflect.Int, reflect.Int64, reflect.Bool:
		return true
	}
	return false
}

var errNoValue = errors.New("has no value")

// set parses text into v.
func set(v reflect.Value, text string) error {
	switch to := v.Addr().Interface().(type) {
	case encoding.TextUnmarshaler:
		return to.UnmarshalText([]byte(text))
	case *time.Duration:
		d, err := ParseDuration(text)
		*to = d
		return err
	case *string:
		*to = text
	case *int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return errors.New("want a whole number")
		}
		*to = n
	case *bool:
		if text != "true" && text != "false" {
			return errors.New("want true or false")
		}
		*to = text == "true"
	default:
		return fmt.Errorf("a %s cannot be read from text", v.Type())
	}
	return nil
}
