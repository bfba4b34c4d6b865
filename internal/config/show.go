package config

import (
	"encoding"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// A Setting is one value of a configuration, for people to look at. Secrets
// show themselves as "[secret]".
type Setting struct {
	Path   string `json:"path"` // as "clusters.main.logical.jobs"
	Value  string `json:"value"`
	Source string `json:"source"` // Source.String of where it comes from
}

// Settings lists every value that is set or has a default, in the order of the
// file's reference.
func (c *Config) Settings() []Setting {
	var all []Setting
	c.walk(reflect.ValueOf(c).Elem(), "", func(s Setting) { all = append(all, s) })
	return all
}

// WriteYAML writes c as a configuration file with the source of each value
// beside it.
func (c *Config) WriteYAML(w io.Writer) error {
	node := c.walk(reflect.ValueOf(c).Elem(), "", func(Setting) {})
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(node); err != nil {
		return fmt.Errorf("write configuration: %w", err)
	}
	return enc.Close()
}

// walk returns v, which is at path, as YAML, and hands every single value in it
// to leaf. It returns nil for what is empty.
func (c *Config) walk(v reflect.Value, path string, leaf func(Setting)) *yaml.Node {
	switch {
	case isScalar(v):
		return c.leaf(v, path, leaf)
	case v.Kind() == reflect.Slice:
		list := &yaml.Node{Kind: yaml.SequenceNode}
		for i := range v.Len() {
			list.Content = append(list.Content, c.walk(v.Index(i), fmt.Sprintf("%s[%d]", path, i), leaf))
		}
		return notEmpty(list)
	case v.Kind() == reflect.Map:
		keys := v.MapKeys()
		slices.SortFunc(keys, func(a, b reflect.Value) int { return strings.Compare(a.String(), b.String()) })
		m := &yaml.Node{Kind: yaml.MappingNode}
		for _, k := range keys {
			elem := reflect.New(v.Type().Elem()).Elem() // what is in a map cannot be addressed
			elem.Set(v.MapIndex(k))
			put(m, k.String(), c.walk(elem, join(path, k.String()), leaf))
		}
		return notEmpty(m)
	}
	m := &yaml.Node{Kind: yaml.MappingNode}
	for key, f := range fields(v) {
		put(m, key, c.walk(f.value, join(path, key), leaf))
	}
	return notEmpty(m)
}

func (c *Config) leaf(v reflect.Value, path string, leaf func(Setting)) *yaml.Node {
	source, given := c.sources[path]
	if v.IsZero() && !given && v.Kind() != reflect.Bool {
		return nil
	}
	n := &yaml.Node{Kind: yaml.ScalarNode, Value: text(v)}
	n.LineComment = source.String()
	if v.Kind() == reflect.String || v.Kind() == reflect.Struct {
		n.Tag = "!!str" // the encoder quotes what would read as something else
	}
	leaf(Setting{Path: path, Value: n.Value, Source: source.String()})
	return n
}

// text is the inverse of set.
func text(v reflect.Value) string {
	switch x := v.Interface().(type) {
	case encoding.TextMarshaler:
		b, _ := x.MarshalText() // ours do not fail
		return string(b)
	case time.Duration:
		return FormatDuration(x)
	case int:
		return strconv.Itoa(x)
	case bool:
		return strconv.FormatBool(x)
	}
	return v.String()
}

func put(m *yaml.Node, key string, value *yaml.Node) {
	if value != nil {
		m.Content = append(m.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: key}, value)
	}
}

func notEmpty(n *yaml.Node) *yaml.Node {
	if len(n.Content) == 0 {
		return nil
	}
	return n
}
