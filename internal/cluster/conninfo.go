package cluster

import (
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// conninfo is a parsed connection string, in the order it was written. Two
// parties read it, pgx and the libpq inside pg_dump, and they must not
// understand it differently: so only keywords whose meaning both keep are let
// in.
type conninfo []param

type param struct{ key, value string }

// shared are the keywords that pgx and libpq understand alike.
var shared = []string{
	"host", "port", "user", "dbname", "passfile", "service", "servicefile", "connect_timeout", "options",
	"sslmode", "sslkey", "sslcert", "sslcertmode", "sslrootcert", "sslnegotiation", "sslsni",
	"target_session_attrs", "channel_binding", "require_auth", "min_protocol_version", "max_protocol_version",
}

// libpqOnly are keywords that pgx lacks and can do without: they make a
// connection no less safe when left out.
var libpqOnly = []string{
	"gssencmode", "tcp_user_timeout", "keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count",
}

// ours are keywords that pgkeep decides itself.
var ours = []string{"application_name", "fallback_application_name", "client_encoding"}

// parseConninfo reads a libpq connection string: keywords and values, or a URI
// (PostgreSQL documentation, "Connection Strings"). The password comes back
// apart. No error quotes the text, for a part of it may be a password.
func parseConninfo(text string) (c conninfo, password string, err error) {
	var all []param
	if strings.HasPrefix(text, "postgres://") || strings.HasPrefix(text, "postgresql://") {
		all, err = parseURI(text)
	} else {
		all, err = parseKeywords(text)
	}
	if err != nil {
		return nil, "", fmt.Errorf("parse conninfo: %w: %w", err, fail.BadConfig)
	}
	hasPassword := slices.ContainsFunc(all, func(p param) bool { return p.key == "password" })
	for _, p := range all {
		switch {
		case p.key == "password":
			password = p.value
		case slices.Contains(shared, p.key), slices.Contains(libpqOnly, p.key):
			c = append(c, p)
		case slices.Contains(ours, p.key):
		case hasPassword: // what looks like a keyword may be the rest of an unquoted password
			return nil, "", fmt.Errorf("parse conninfo: a keyword that pgkeep does not take: %w", fail.BadConfig)
		default:
			return nil, "", fmt.Errorf("parse conninfo: keyword %q is not one that pgkeep takes: %w", p.key, fail.BadConfig)
		}
	}
	return c, password, nil
}

func parseURI(text string) ([]param, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, errors.New("not a well-formed URI") // err quotes it
	}
	var all []param
	add := func(key, value string) {
		if value != "" {
			all = append(all, param{key, value})
		}
	}
	var hosts, ports []string
	for hp := range strings.SplitSeq(u.Host, ",") {
		host, port := hp, ""
		if i := strings.LastIndexByte(hp, ':'); i >= 0 && !strings.HasSuffix(hp, "]") {
			host, port = hp[:i], hp[i+1:]
		}
		hosts = append(hosts, strings.Trim(host, "[]"))
		ports = append(ports, port)
	}
	add("host", strings.Join(hosts, ","))
	if strings.Trim(strings.Join(ports, ""), " ") != "" {
		add("port", strings.Join(ports, ","))
	}
	add("user", u.User.Username())
	secret, _ := u.User.Password()
	add("password", secret)
	add("dbname", strings.TrimPrefix(u.Path, "/"))
	query, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, errors.New("the part after the question mark is not well-formed")
	}
	for key, values := range query {
		if key == "ssl" && values[len(values)-1] == "true" { // as libpq does, for JDBC's sake
			key, values = "sslmode", []string{"require"}
		}
		add(key, values[len(values)-1])
	}
	slices.SortStableFunc(all, func(a, b param) int { return strings.Compare(a.key, b.key) })
	return all, nil
}

// parseKeywords follows conninfo_parse of libpq's fe-connect.c: blanks around
// the equal sign, values in single quotes, a backslash before any character.
func parseKeywords(text string) ([]param, error) {
	var all []param
	const blank = " \t\n\r\v\f"
	for rest := strings.TrimLeft(text, blank); rest != ""; rest = strings.TrimLeft(rest, blank) {
		key, after, ok := strings.Cut(rest, "=")
		key = strings.TrimRight(key, blank)
		if !ok || key == "" || strings.ContainsAny(key, blank+`'\`) {
			return nil, fmt.Errorf("expected keyword=value after %d of them", len(all))
		}
		rest = strings.TrimLeft(after, blank)
		quoted := strings.HasPrefix(rest, "'")
		if quoted {
			rest = rest[1:]
		}
		var value strings.Builder
		closed := !quoted
		for rest != "" {
			c := rest[0]
			if quoted && c == '\'' {
				rest, closed = rest[1:], true
				break
			}
			if !quoted && strings.IndexByte(blank, c) >= 0 {
				break
			}
			rest = rest[1:]
			if c == '\\' {
				if rest == "" {
					break
				}
				c, rest = rest[0], rest[1:]
			}
			value.WriteByte(c)
		}
		if !closed {
			return nil, errors.New("a quote is not closed")
		}
		all = append(all, param{key, value.String()})
	}
	return all, nil
}

// with returns c with key set to value, wherever it was set before.
func (c conninfo) with(key, value string) conninfo {
	c = slices.DeleteFunc(slices.Clone(c), func(p param) bool { return p.key == key })
	return append(c, param{key, value})
}

// without returns c without the keywords.
func (c conninfo) without(keys []string) conninfo {
	return slices.DeleteFunc(slices.Clone(c), func(p param) bool { return slices.Contains(keys, p.key) })
}

// String writes c so that any name survives: every value in quotes.
func (c conninfo) String() string {
	var b strings.Builder
	for i, p := range c {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(p.key)
		b.WriteString("='")
		b.WriteString(strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(p.value))
		b.WriteByte('\'')
	}
	return b.String()
}
