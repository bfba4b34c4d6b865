// Package bucket says how the bucket of a repository should be set up: who may
// do what in it, and how long what was deleted stays. It only writes the
// documents; whoever administers the bucket puts them in force.
package bucket

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// A Role is who holds a set of credentials.
type Role string

const (
	Archiver Role = "archiver" // pgkeep-wal push, on the database host: every superuser of the database is this
	Backup   Role = "backup"   // the worker on the database host; it archives too
	Restore  Role = "restore"  // reads; restore tests write what they found
	Expirer  Role = "expirer"  // deletes, and cannot destroy: on another host than the database
)

// Roles are all of them.
func Roles() []Role { return []Role{Archiver, Backup, Restore, Expirer} }

// ParseRole reads one of the names above.
func ParseRole(s string) (Role, error) {
	for _, r := range Roles() {
		if s == string(r) {
			return r, nil
		}
	}
	return "", fail.Hint(fmt.Errorf("role %q: %w", s, fail.BadConfig), "archiver, backup, restore or expirer")
}

// A Layout is where in a bucket a repository is, and what is in it.
type Layout struct {
	Bucket   string
	Prefix   string   // without slashes at its ends; "" is the whole bucket
	Clusters []string // that the roles may touch
	// LockDays is for how many days at most the expirer may lock objects anew; 0: it
	// may not.
	LockDays int
	// Governance: locks are in that mode, and else in COMPLIANCE.
	Governance bool
	// Basic leaves out the conditions that, so far, only Amazon evaluates: that
	// what is written is created, and not replaced. Without them a replaced
	// object is there still, as an older version.
	Basic bool
}

// A Policy is a document of the language that "Policies and permissions in
// Amazon S3" of the S3 User Guide describes.
type Policy struct {
	Version   string
	Statement []Statement
}

// A Statement of a policy of a bucket has principals; of one that is attached to
// an identity, none.
type Statement struct {
	Sid       string
	Effect    string
	Principal *Principal `json:",omitempty"`
	Action    []string
	Resource  []string
	Condition Condition `json:",omitempty"`
}

// Principal names identities, as the service does: by ARN, or by access key.
type Principal struct{ AWS []string }

// Condition holds values by operator and key.
type Condition map[string]map[string][]string

func policy(statements ...Statement) Policy {
	return Policy{Version: "2012-10-17", Statement: statements}
}

// Role is what a role may do, and all that it may. Principals make it one for
// the bucket; without, it is one to attach to an identity.
func (l Layout) Role(r Role, principals ...string) Policy {
	var all []Statement
	switch r {
	case Archiver:
		all = l.archiver()
	case Backup:
		all = append(l.archiver(),
			l.allow("ReadOwnBackups", l.objects("backups/*", "packs/*"), "s3:GetObject"),
			l.list("ListOwn", "names/*", "clusters/%s/*"),
			l.allow("LeftUploads", []string{l.bucket()}, "s3:ListBucketMultipartUploads"))
		all = append(all, l.create("Backups", append(l.named("names/%s"), l.objects("packs/*",
			"backups/*/intent.json", "backups/*/tree-*", "backups/*/draft.json", "backups/*/manifest.json", "backups/*/proof-*.json")...))...)
		all = append(all, l.allow("Newest", l.objects("latest-*.json"), "s3:GetObject", "s3:PutObject"))
	case Restore:
		all = []Statement{
			l.allow("Read", append(l.shared(), l.objects("*")...), "s3:GetObject", "s3:GetObjectVersion"),
			l.list("List", "keys/*", "names/*", "clusters/%s/*"),
			l.allow("ListVersions", []string{l.bucket()}, "s3:ListBucketVersions"),
		}
		all = append(all, l.create("Proofs", l.objects("backups/*/proof-*.json"))...)
	case Expirer:
		all = []Statement{
			l.allow("Read", append(l.shared(), l.objects("*")...), "s3:GetObject"),
			l.list("List", "keys/*", "names/*", "clusters/%s/*"),
			l.allow("Mark", l.objects("*"), "s3:DeleteObject"),
			l.allow("Newest", l.objects("latest-*.json"), "s3:PutObject"),
		}
		if l.LockDays > 0 {
			all = append(all, l.lock())
		}
		all = append(all, l.create("Tombstones", l.objects("backups/*/deleted.json", "backups/*/settled-*.json", "backups/*/hold-*.json", "wal/*/expired/*", "clock-*"))...)
	}
	if len(principals) > 0 {
		for i := range all {
			all[i].Sid = strings.ToUpper(string(r[:1])) + string(r[1:]) + all[i].Sid
			all[i].Principal = &Principal{principals}
		}
	}
	return policy(all...)
}

// lock lets locks be made longer, up to a limit: Service Authorization Reference,
// "Condition keys for Amazon S3". Nobody has s3:BypassGovernanceRetention, without
// which S3 shortens none.
func (l Layout) lock() Statement {
	s := l.allow("Lock", append(l.shared(), l.objects("*")...), "s3:GetObjectRetention", "s3:PutObjectRetention")
	if !l.Basic {
		s.Condition = Condition{"NumericLessThanEqualsIfExists": {"s3:object-lock-remaining-retention-days": {strconv.Itoa(l.LockDays)}}}
	}
	return s
}

func (l Layout) archiver() []Statement {
	return append([]Statement{
		l.allow("ReadArchive", append(l.shared(), l.objects("wal/*")...), "s3:GetObject"),
		l.list("ListArchive", "keys/*", "clusters/%s/wal/*"),
	}, l.create("Archive", l.objects("wal/*/????????/*", "wal/*/claims/*", "wal/probe/*"))...) // not what says how much was let go
}

// create lets objects be made, and nothing be replaced: S3 User Guide, "Enforce
// conditional writes on Amazon S3 buckets". Requests that send parts of an
// upload make no object, and carry no such header.
func (l Layout) create(sid string, objects []string) []Statement {
	whole := l.allow("Create"+sid, objects, "s3:PutObject")
	abort := l.allow("Abort"+sid, objects, "s3:AbortMultipartUpload")
	if l.Basic {
		return []Statement{whole, abort}
	}
	parts := l.allow("Parts"+sid, objects, "s3:PutObject")
	whole.Condition = Condition{"Null": {"s3:if-none-match": {"false"}}}
	parts.Condition = Condition{"Bool": {"s3:ObjectCreationOperation": {"false"}}}
	return []Statement{whole, parts, abort}
}

// list allows lists by prefix. The condition lets pass what names no prefix:
// else S3 answers a read of what is not there with "denied" instead of "not
// found", and nobody could tell an outage of rights from the end of the log.
func (l Layout) list(sid string, keys ...string) Statement {
	s := l.allow(sid, []string{l.bucket()}, "s3:ListBucket")
	var prefixes []string
	for _, key := range keys {
		for _, name := range l.named(key) {
			prefixes = append(prefixes, strings.TrimPrefix(name, l.bucket()+"/"))
		}
	}
	s.Condition = Condition{"StringLikeIfExists": {"s3:prefix": prefixes}}
	return s
}

func (l Layout) allow(sid string, resources []string, actions ...string) Statement {
	return Statement{Sid: sid, Effect: "Allow", Action: actions, Resource: resources}
}

func (l Layout) bucket() string { return "arn:aws:s3:::" + l.Bucket }

func (l Layout) key(name string) string {
	if l.Prefix != "" {
		name = l.Prefix + "/" + name
	}
	return l.bucket() + "/" + name
}

// shared are the objects that every reader of a repository needs first.
func (l Layout) shared() []string {
	return []string{l.key("PGKEEP"), l.key("keys/*"), l.key("names/*")}
}

// objects are those of the clusters.
func (l Layout) objects(names ...string) (all []string) {
	for _, name := range names {
		all = append(all, l.named("clusters/%s/"+name)...)
	}
	return all
}

// named are the keys that a pattern gives, for each cluster if it has one in it.
func (l Layout) named(pattern string) (all []string) {
	if !strings.Contains(pattern, "%s") {
		return []string{l.key(pattern)}
	}
	for _, c := range l.Clusters {
		all = append(all, l.key(strings.ReplaceAll(pattern, "%s", c)))
	}
	return all
}
