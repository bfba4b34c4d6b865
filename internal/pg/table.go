package pg

import (
	"fmt"
	"strings"
)

// A TablePattern names tables: * is any characters, ? is one.
type TablePattern struct{ Database, Schema, Table string }

// ParseTablePattern parses database.schema.table. A name with a dot is written
// with ? in its place.
func ParseTablePattern(s string) (TablePattern, error) {
	parts := strings.Split(s, ".")
	if len(parts) != 3 || parts[0] == "" || parts[1] == "" || parts[2] == "" {
		return TablePattern{}, fmt.Errorf("%q is no database.schema.table, each with * and ? if need be", s)
	}
	return TablePattern{parts[0], parts[1], parts[2]}, nil
}

func (p TablePattern) String() string { return p.Database + "." + p.Schema + "." + p.Table }

// Match reports whether p names the table.
func (p TablePattern) Match(database, schema, table string) bool {
	return like(p.Database, database) && like(p.Schema, schema) && like(p.Table, table)
}

// MatchDatabase reports whether p may name tables of a database.
func (p TablePattern) MatchDatabase(name string) bool { return like(p.Database, name) }

// like matches without going back further than the last *.
func like(pattern, name string) bool {
	p, n := []rune(pattern), []rune(name)
	i, star, from := 0, -1, 0
	for j := 0; j < len(n); {
		switch {
		case i < len(p) && p[i] == '*':
			star, from = i, j
			i++
		case i < len(p) && (p[i] == '?' || p[i] == n[j]):
			i++
			j++
		case star >= 0:
			from++
			i, j = star+1, from
		default:
			return false
		}
	}
	for i < len(p) && p[i] == '*' {
		i++
	}
	return i == len(p)
}
