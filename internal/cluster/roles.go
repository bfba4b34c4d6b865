package cluster

import (
	"slices"
	"strings"
)

// rolesIn lists the roles that SQL names, as pg_restore writes it: who is
// granted something and by whom, whose default privileges change, for whom a
// policy or a user mapping is. Other statements are passed over.
func rolesIn(sql string) []string {
	var roles []string
	var statement []token
	for _, t := range tokens(sql) {
		if t != (token{text: ";"}) {
			statement = append(statement, t)
			continue
		}
		roles = append(roles, rolesOf(statement)...)
		statement = statement[:0]
	}
	slices.Sort(roles)
	return slices.Compact(roles)
}

// rolesOf lists the roles of one statement. The words it looks for are reserved
// in SQL: unquoted, they are never names.
func rolesOf(statement []token) []string {
	begins := func(words ...string) bool {
		for i, w := range words {
			if i >= len(statement) || !statement[i].is(w) {
				return false
			}
		}
		return true
	}
	switch {
	case begins("GRANT"), begins("REVOKE"), begins("ALTER", "DEFAULT", "PRIVILEGES"), begins("CREATE", "USER", "MAPPING"),
		begins("SET", "SESSION", "AUTHORIZATION"):
	case begins("CREATE", "POLICY"):
		// The roles stand before its expressions, which may hold anything.
		if i := slices.Index(statement, token{text: "("}); i >= 0 {
			statement = statement[:i]
		}
	default:
		return nil
	}
	var roles []string
	after := func(i int, word string) bool { return i > 0 && statement[i-1].is(word) }
	for i, t := range statement {
		list := t.is("TO") || t.is("FROM")
		one := t.is("ROLE") && after(i, "FOR") || t.is("FOR") && after(i, "MAPPING") || t.is("AUTHORIZATION")
		if !list && !one {
			continue
		}
		for j := i + 1; j < len(statement); j += 2 {
			if !statement[j].is("PUBLIC") {
				roles = append(roles, statement[j].text)
			}
			if one || j+1 >= len(statement) || statement[j+1] != (token{text: ","}) {
				break
			}
		}
	}
	return roles
}

// A token is a word, a name in double quotes without them, or one other
// character. String constants and comments leave none.
type token struct {
	text   string
	quoted bool
}

func (t token) is(word string) bool { return !t.quoted && strings.EqualFold(t.text, word) }

func tokens(sql string) []token {
	var out []token
	for sql != "" {
		var t token
		switch c := sql[0]; {
		case strings.IndexByte(" \t\r\n\f\v", c) >= 0:
			sql = sql[1:]
			continue
		case strings.HasPrefix(sql, "--"), c == '\\': // a command of psql ends with its line too
			_, sql, _ = strings.Cut(sql, "\n")
			continue
		case c == '\'':
			sql = skipString(sql[1:], false)
			continue
		case (c == 'E' || c == 'e') && strings.HasPrefix(sql[1:], "'"):
			sql = skipString(sql[2:], true)
			continue
		case c == '$':
			if end := strings.IndexByte(sql[1:], '$'); end >= 0 {
				mark := sql[:end+2]
				_, sql, _ = strings.Cut(sql[len(mark):], mark)
				continue
			}
			t, sql = token{text: "$"}, sql[1:]
		case c == '"':
			t, sql = quotedName(sql[1:])
		case letter(c):
			n := 1
			for n < len(sql) && (letter(sql[n]) || sql[n] == '$' || '0' <= sql[n] && sql[n] <= '9') {
				n++
			}
			t, sql = token{text: sql[:n]}, sql[n:]
		default:
			t, sql = token{text: sql[:1]}, sql[1:]
		}
		out = append(out, t)
	}
	return out
}

func letter(c byte) bool {
	return c == '_' || c >= 0x80 || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z'
}

// skipString returns what follows a string constant whose opening quote is gone.
func skipString(s string, escapes bool) string {
	for i := 0; i < len(s); i++ {
		switch {
		case escapes && s[i] == '\\':
			i++
		case s[i] == '\'' && strings.HasPrefix(s[i+1:], "'"):
			i++
		case s[i] == '\'':
			return s[i+1:]
		}
	}
	return ""
}

// quotedName reads a name whose opening quote is gone.
func quotedName(s string) (token, string) {
	var name strings.Builder
	for {
		part, rest, ok := strings.Cut(s, `"`)
		name.WriteString(part)
		if !ok || !strings.HasPrefix(rest, `"`) {
			return token{name.String(), true}, rest
		}
		name.WriteByte('"')
		s = rest[1:]
	}
}
