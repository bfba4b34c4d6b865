package cluster

import (
	"regexp"
	"strings"
)

// unsaid stands for words of the server that may hold rows: those of whoever wrote
// RAISE, and those of a server that speaks another language.
const unsaid = "an error of the server, whose words are in the log of this host"

// words are what PostgreSQL says of names and of itself, each from the beginning
// of a message to where a value may begin. What is matched is told, nothing else.
var words = func() (all []*regexp.Regexp) {
	const object = `(?:access method|aggregate|cast|collation|column|constraint|conversion|database|domain|event trigger|extension|foreign table|foreign-data wrapper|function|index|language|` +
		`large object|materialized view|operator|operator class|operator family|parameter|partition|policy|procedure|publication|relation|replication slot|role|routine|rule|schema|sequence|server|` +
		`foreign server|snapshot|subscription|table|tablespace|text search configuration|text search dictionary|text search parser|text search template|transform|trigger|type|user|view)`
	for _, form := range []string{
		// OBJECT is a kind of object, NAME a name in quotes, WORD one without.
		`(?:OBJECT )?NAME(?: (?:of|for|on|in) OBJECT NAME)? (?:does not exist|already exists|is not available|is not permitted to log in|cannot be \w+)`,
		`OBJECT [\w.]+\([\w .,"\[\]]*\) (?:does not exist|already exists)`,
		`permission denied (?:for|to) OBJECT WORD`, `permission denied (?:to|for) [a-z ]+$`, `must be (?:superuser|owner of OBJECT WORD|member of role NAME|able to SET ROLE NAME)`,
		`duplicate key value violates unique constraint NAME`, `new row for relation NAME violates (?:check constraint NAME|partition constraint)`,
		`new row violates row-level security policy(?: NAME)? for table NAME`, `conflicting key value violates exclusion constraint NAME`,
		`null value in column NAME(?: of relation NAME)? violates not-null constraint`, `no partition of relation NAME found for row`, `domain WORD does not allow null values`,
		`value for domain WORD violates check constraint NAME`, `(?:insert or update|update or delete) on table NAME violates foreign key constraint NAME(?: on table NAME)?`,
		`could not create (?:unique index|exclusion constraint) NAME`, `check constraint NAME of relation NAME is violated by some row`,
		`invalid input syntax for type [\w ]+`, `invalid input value for enum WORD`, `value too long for type [\w ]+(?:\(\d+\))?`, `date/time field value out of range`,
		`(?:numeric field overflow|integer out of range|bigint out of range|smallint out of range|division by zero)$`, `extra data after last expected column`, `missing data for column NAME`,
		`invalid byte sequence for encoding NAME`, `malformed (?:array|record|range) literal`, `index row (?:size|requires) \d+`,
		`canceling statement due to (?:lock timeout|statement timeout|user request|conflict with recovery)`, `could not obtain lock on relation NAME`, `deadlock detected`,
		`query would be affected by row-level security policy for table NAME`, `out of (?:shared )?memory`, `invalid memory alloc request size \d+`,
		`could not (?:extend|write|open|read|fsync|create|stat) (?:to )?(?:file|directory|temporary file) NAME: [A-Z][a-z ]+$`, `could not (?:write|extend) [a-z ]+: No space left on device`,
		`could not open extension control file NAME`, `could not (?:access file|load library) NAME`, `invalid snapshot identifier`, `could not import the requested snapshot`,
		`cache lookup failed for [a-z ]+\d+`, `invalid page in block \d+ of relation [\w/]+`, `(?:missing|unexpected) chunk number \d+ (?:\(expected \d+\) )?for toast value \d+ in \w+`,
		`could not read blocks? [\d.]+ in file NAME`, `compressed (?:pglz|lz4) data is corrupt`, `(?:unrecognized configuration parameter|invalid value for parameter) NAME`,
		`syntax error at or near`, `no schema has been selected to create in`, `operator does not exist`, `cannot execute [A-Z ]+ in a read-only transaction`, `unsupported [a-z ]+`,
		`terminating connection [a-z ]+$`, `the database system is [a-z ]+$`, `\w+ authentication failed for user NAME`, `pg_hba\.conf rejects connection`,
		`no pg_hba\.conf entry for (?:replication connection from )?host NAME, user NAME(?:, database NAME)?`, `sorry, too many clients already`, `remaining connection slots are reserved`,
		`too many connections for (?:role|database) NAME`, `encoding NAME does not match locale NAME`, `server version mismatch`,
	} {
		form = strings.NewReplacer("OBJECT", object, "NAME", `"[^"]{1,200}"`, "WORD", `"?[\w.$-]{1,200}"?`).Replace(form)
		all = append(all, regexp.MustCompile("^(?:"+form+")"))
	}
	return all
}()

var (
	outOfRange  = regexp.MustCompile(`^value "[^"]*" is (out of range for type \w+)`)
	otherScript = regexp.MustCompile(`^character with byte sequence [0-9a-fx ]+ in encoding ("\w+") (has no equivalent in encoding "\w+")`)
)

// told is what may be told of a message of the server.
func told(message string) string {
	message = strings.Join(strings.Fields(message), " ")
	for _, w := range words {
		if said := w.FindString(message); said != "" {
			return said
		}
	}
	if m := outOfRange.FindStringSubmatch(message); m != nil {
		return "a value is " + m[1]
	}
	if m := otherScript.FindStringSubmatch(message); m != nil {
		return "a character in encoding " + m[1] + " " + m[2]
	}
	return unsaid
}
