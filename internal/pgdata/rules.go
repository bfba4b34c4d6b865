package pgdata

import (
	"path"
	"slices"
	"strconv"
	"strings"
)

// A verdict says what a backup does with one name in a directory.
type verdict int

const (
	keep  verdict = iota
	skip          // as if it were not there
	empty         // the directory is kept, what it holds is not
)

// emptied are directories right below the data directory whose contents the
// server makes anew, or must not find again (basebackup.c, excludeDirContents;
// the log itself comes from the archive). The server wants them to be there.
var emptied = []string{
	"pg_wal", "pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_subtrans", "pg_stat_tmp",
}

// skipped are files right below the data directory that are of this one life of
// the server, or of a restore before it, or that come with the end of the
// backup (basebackup.c, excludeFiles; and the signal files, which would send a
// restored server into a recovery that nobody asked for).
var skipped = []string{
	"postmaster.pid", "postmaster.opts",
	"backup_label", "backup_label.old", "tablespace_map", "tablespace_map.old", "backup_manifest", "backup_manifest.tmp",
	"recovery.signal", "standby.signal", "postgresql.auto.conf.tmp", "current_logfiles.tmp",
}

// owned are directories that initdb makes right below the data directory. The
// server follows where they are links, and so do we; but not pg_tblspc, which
// holds links itself.
var owned = []string{
	"base", "global", "pg_commit_ts", "pg_logical", "pg_multixact", "pg_stat", "pg_tblspc", "pg_twophase", "pg_xact",
}

// configs are files right below the data directory that people replace by
// links to where they keep their configuration.
var configs = []string{"postgresql.conf", "pg_hba.conf", "pg_ident.conf", "postgresql.auto.conf"}

// judge decides about a name in the directory dir below PGDATA, "." for PGDATA
// itself. Logs is the directory of the server's own log below PGDATA, or "".
func judge(dir, name, logs string) verdict {
	switch {
	case strings.HasPrefix(name, "pgsql_tmp"), strings.HasPrefix(name, "pg_internal.init"), name == ".DS_Store":
		return skip // anywhere, as the server does
	case logs != "" && path.Join(dir, name) == logs:
		return empty
	case dir != ".":
	case slices.Contains(emptied, name):
		return empty
	case slices.Contains(skipped, name):
		return skip
	}
	if dir == "global" && name == "pg_control" {
		return skip // it comes last
	}
	if holdsRelations(dir) && isTemporary(name) {
		return skip
	}
	return keep
}

// holdsRelations reports whether the files of relations stand in a directory
// below PGDATA: global, base/<database>, or the same in a tablespace.
func holdsRelations(dir string) bool {
	if dir == "global" {
		return true
	}
	top, rest, _ := strings.Cut(dir, "/")
	switch top {
	case "base":
		return isOID(rest)
	case "pg_tblspc":
		parts := strings.Split(rest, "/")
		return len(parts) == 3 && isOID(parts[0]) && strings.HasPrefix(parts[1], "PG_") && isOID(parts[2])
	}
	return false
}

// A relation is what the name of a relation's file says.
type relation struct {
	Node    string // the number it begins with
	Fork    string // "", "fsm", "vm" or "init"
	Segment int    // 0 for the first file, which has no number
}

// parseRelation reads names like 16384, 16384_vm and 16384_fsm.1
// (parse_filename_for_nontemp_relation in PostgreSQL's reinit.c). What stands
// in pg_xact looks alike: ask holdsRelations first.
func parseRelation(name string) (r relation, ok bool) {
	stem, seg, segmented := strings.Cut(name, ".")
	if segmented {
		if !isOID(seg) {
			return relation{}, false
		}
		n, err := strconv.Atoi(seg)
		if err != nil {
			return relation{}, false
		}
		r.Segment = n
	}
	node, fork, forked := strings.Cut(stem, "_")
	if !isOID(node) || forked && fork != "fsm" && fork != "vm" && fork != "init" {
		return relation{}, false
	}
	r.Node, r.Fork = node, fork
	return r, true
}

// isTemporary recognizes the files of temporary relations, t3_16384 and their
// forks and segments (looks_like_temp_rel_name in PostgreSQL's fd.c).
func isTemporary(name string) bool {
	backend, node, ok := strings.Cut(strings.TrimPrefix(name, "t"), "_")
	if !ok || name[0] != 't' || !isDigits(backend) {
		return false
	}
	node, seg, segmented := strings.Cut(node, ".")
	node, fork, forked := strings.Cut(node, "_")
	return isDigits(node) && (!segmented || isDigits(seg)) && (!forked || fork == "fsm" || fork == "vm" || fork == "init")
}

func isDigits(s string) bool { return s != "" && strings.Trim(s, "0123456789") == "" }

// isOID recognizes a number of at most 32 bits that does not begin with 0.
func isOID(s string) bool {
	n, err := strconv.ParseUint(s, 10, 32)
	return err == nil && n > 0 && s[0] != '0' && s[0] != '+'
}

// A place is where an entry of the tree of a backup stands: in the data
// directory, in a tablespace, or among the files of the configuration.
type place struct {
	config int    // number of the file, if there is no rest
	oid    string // of the tablespace; "": in the data directory
	rest   string // path below PGDATA, or below the tablespace's directory; "." for that itself; "" for a file of the configuration
}

// parsePath takes the path of an entry apart: config/<n>/<name>, data/…,
// tablespaces/<oid>/…
func parsePath(p string) (place, bool) {
	if p != path.Clean(p) || strings.HasPrefix(p, "/") {
		return place{}, false
	}
	top, rest, more := strings.Cut(p, "/")
	switch {
	case top == "data" && !more:
		return place{rest: "."}, true
	case top == "data":
		return place{rest: rest}, true
	case top == "tablespaces":
		oid, rest, more := strings.Cut(rest, "/")
		if !more {
			rest = "."
		}
		return place{oid: oid, rest: rest}, isOID(oid)
	case top == "config":
		number, name, _ := strings.Cut(rest, "/")
		n, err := strconv.Atoi(number)
		return place{config: n}, err == nil && n >= 0 && name != "" && !strings.Contains(name, "/")
	}
	return place{}, false
}

// below is where the entry stands as seen from the data directory, through the
// link of its tablespace.
func (p place) below() string {
	if p.oid != "" {
		return path.Join("pg_tblspc", p.oid, p.rest)
	}
	return p.rest
}
