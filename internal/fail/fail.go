// Package fail is the catalogue of ways pgkeep can fail that somebody acts on:
// a retry policy, a script reading the exit status, or an operator. Every other
// error is just an error.
package fail

import (
	"cmp"
	"errors"
	"maps"
	"slices"
)

// A Kind is a class of failure. It is an error itself, so that code makes one
// with fmt.Errorf("...: %w", kind) and tests for one with errors.Is.
type Kind string

const (
	// Unknown is the kind of an error that has none. It is retried.
	Unknown Kind = ""

	BadConfig Kind = "bad-config"

	WrongSystem Kind = "wrong-system" // the repository belongs to another cluster
	WALConflict Kind = "wal-conflict" // another file of that name is archived
	// TimelineTaken: another copy of the data directory archives it.
	TimelineTaken Kind = "timeline-taken"
	WALHole       Kind = "wal-hole" // the archive lacks segments that something shows were written
	NoBackup      Kind = "no-backup"
	Corrupt       Kind = "corrupt"
	PageDamage    Kind = "page-damage" // pages of the cluster itself, before any backup
	Untrusted     Kind = "untrusted"   // not signed, or by a key that is not pinned
	NoKey         Kind = "no-key"      // encrypted, and no key here opens it
	Unsupported   Kind = "unsupported" // written by a newer pgkeep
	NotEmpty      Kind = "not-empty"   // the restore target holds something already

	Unreachable Kind = "unreachable" // the moment to restore to, from every backup there is

	AlreadyRunning Kind = "already-running"

	Held Kind = "held" // a backup that somebody wants kept
	// ExpireRefused: what a rule would let go is more, or less certain, than is
	// removed without asking.
	ExpireRefused Kind = "expire-refused"

	StoreDown   Kind = "store-down"
	StoreDenied Kind = "store-denied"
	StoreUnfit  Kind = "store-unfit" // lacks what create-only needs

	PGDown     Kind = "pg-down"
	PGDenied   Kind = "pg-denied"
	PGVersion  Kind = "pg-version" // PostgreSQL's programs are missing, or of a version that does not fit
	NoSpace    Kind = "no-space"
	ClockSkew  Kind = "clock-skew"
	Stalled    Kind = "stalled" // a child process made no progress
	DumpFailed Kind = "dump-failed"
	SpoolLost  Kind = "spool-lost" // the dump that was to be sent is not there
	Promoted   Kind = "promoted"   // a standby stopped being one
	FilesLost  Kind = "files-lost" // a directory that holds a part of the cluster is gone

	NotArchiving Kind = "not-archiving" // segments wait, and nothing takes them

	RestoreFailed Kind = "restore-failed" // what it restored into holds a part

	ProofFailed Kind = "proof-failed" // a restore test found something wrong
	Unhealthy   Kind = "unhealthy"    // backups are not as they should be, says doctor or check

	TemporalDown Kind = "temporal-down"
	Stopping     Kind = "stopping" // the worker was told to stop
	Cancelled    Kind = "cancelled"
	NoWorker     Kind = "no-worker" // nobody serves the task queue of a host
)

// kinds is the one place that says what a kind means to the outside.
// docs/ERRORS.md lists the same rows; a test compares the two. No status is
// above 125: PostgreSQL takes those of an archive command for a crash.
var kinds = map[Kind]row{
	Unknown:        {exit: 1, retry: true, means: "an error that fits no other line; its text is all there is"},
	BadConfig:      {exit: 2, means: "the configuration, a flag or an argument is wrong", hint: "see pgkeep --help, and pgkeep config show for the settings in force"},
	WrongSystem:    {exit: 10, means: "the repository belongs to another PostgreSQL cluster than the one at hand", hint: "is this the repository of another cluster, or was initdb run again? Give the new cluster its own name"},
	WALConflict:    {exit: 11, means: "the archive holds another file under the name of this one", hint: "two servers archive as one cluster: give one of them another cluster name. Nothing was replaced"},
	TimelineTaken:  {exit: 12, means: "the timeline is archived by another server, or by another copy of this one", hint: "if this is the same server, moved or restored in its place, and the other one is gone: pgkeep-wal claim, in its data directory. If it is a clone, give it a cluster name of its own. Nothing was written"},
	NoBackup:       {exit: 13, means: "there is no such backup, or none that serves the request", hint: "pgkeep list shows what there is"},
	Corrupt:        {exit: 14, means: "what is stored is not what was written: a digest differs, or something is missing", hint: "run pgkeep verify to see what else is damaged, and restore from another backup"},
	Untrusted:      {exit: 15, means: "a manifest is not signed, or its signer is not pinned here", hint: "if you know that signer, pin it under keys.trusted_signers; if not, somebody else wrote this"},
	NoKey:          {exit: 16, means: "the data is encrypted, and no identity given here opens it", hint: "name the file with an operator's age identity under keys.identity; pgkeep key check shows which keys open what"},
	Unsupported:    {exit: 17, means: "the object was written by a newer pgkeep", hint: "install the version of pgkeep named above, or a newer one"},
	NotEmpty:       {exit: 18, means: "the place to restore into holds something already", hint: "restore under another name with --to, or allow it with --into-existing"},
	AlreadyRunning: {exit: 19, means: "another backup of this cluster is running", hint: "pgkeep ps shows the run; wait for it, or stop it with pgkeep cancel"},
	PageDamage:     {exit: 24, means: "pages of the cluster itself have wrong checksums: the disk, not the backup, is damaged", hint: "pgkeep show names the files and blocks; keep the last clean backup, and look at the disk"},
	Unreachable:    {exit: 26, means: "the moment to restore to cannot be reached from any backup", hint: "the message names the nearest moments that can be; pgkeep windows shows them all"},
	Held:           {exit: 27, means: "somebody holds the backup: it is not to be removed", hint: "pgkeep hold list shows why; pgkeep hold remove lifts it"},
	ExpireRefused:  {exit: 28, means: "nothing was removed: the plan lets go too much at once, or rests on what is not certain", hint: "pgkeep expire shows the plan, and what stands against it"},
	StoreDown:      {exit: 20, retry: true, means: "the object store does not answer, or says that it is overloaded", hint: "pgkeep keeps trying; check the endpoint, its name in DNS and its certificate"},
	StoreDenied:    {exit: 21, means: "the object store refuses the credentials or the request", hint: "check the access key and what its policy allows on this bucket and prefix"},
	StoreUnfit:     {exit: 22, means: "the object store lacks what objects that are never replaced need", hint: "pgkeep needs a store with conditional writes (If-None-Match) and strong reads after writes"},
	WALHole:        {exit: 23, means: "segments are missing in the archive, in the middle or before a promotion", hint: "pgkeep wal audit --fill on the new primary puts back what it still has; else take a physical backup now"},
	PGDown:         {exit: 30, retry: true, means: "PostgreSQL does not answer, or went away in the middle", hint: "is PostgreSQL running, and is the conninfo of the cluster right?"},
	PGDenied:       {exit: 31, means: "PostgreSQL refuses the login, or a right is missing", hint: "check pg_hba.conf, the password file and the rights of the backup role"},
	PGVersion:      {exit: 32, means: "PostgreSQL's programs are missing, or of a version that does not fit", hint: "install the client programs of the server's major version, or name their directory as bin_dir"},
	NotArchiving:   {exit: 25, means: "PostgreSQL has segments to archive, and they wait for too long", hint: "the server's log says what archive_command ran into; until it works, pg_wal grows"},
	NoSpace:        {exit: 34, means: "the disk is full, or too small for what is to come", hint: "free space, or put spool on a larger file system"},
	ClockSkew:      {exit: 35, means: "the clocks of this host and of the object store are too far apart", hint: "set the clock of this host, with chrony or systemd-timesyncd"},
	Stalled:        {exit: 36, retry: true, means: "a child process made no progress for too long and was ended", hint: "look for lock waits in pg_stat_activity, and at the load of the server"},
	DumpFailed:     {exit: 37, retry: true, means: "pg_dump or pg_dumpall ended with an error", hint: "the worker's log holds what pg_dump said"},
	SpoolLost:      {exit: 39, means: "the dump that was to be sent is not in the spool any more", hint: "take a new backup; and do not clean the spool directory by other means than pgkeep"},
	RestoreFailed:  {exit: 38, means: "pg_restore ended with an error, and the database holds a part of the backup", hint: "the log holds what pg_restore said; drop that database before the next try"},
	Promoted:       {exit: 44, retry: true, means: "a standby was promoted while it was being copied", hint: "the next attempt copies the new primary; is that what you want?"},
	FilesLost:      {exit: 45, means: "the data directory, or a tablespace, is not there any more", hint: "is a file system not mounted? Nothing was taken for dropped"},
	ProofFailed:    {exit: 50, means: "a backup was restored for a test, and is not what it should be", hint: "pgkeep show names what is wrong; run pgkeep verify, and take a new backup"},
	Unhealthy:      {exit: 51, means: "what is promised of backups does not hold now", hint: "each finding says how to put it right; pgkeep doctor looks at everything"},
	TemporalDown:   {exit: 40, retry: true, means: "the Temporal server does not answer", hint: "is the Temporal server up? list, show, verify and restore work without it"},
	Stopping:       {exit: 41, retry: true, means: "the worker was told to stop; another attempt goes on from here"},
	Cancelled:      {exit: 42, means: "somebody cancelled it"},
	NoWorker:       {exit: 43, means: "no worker serves the task queue of the host", hint: "start pgkeep worker on that host; pgkeep ps shows what waits"},
}

type row struct {
	exit  int
	retry bool
	means string
	hint  string
}

// Kinds returns the whole catalogue in the order of exit statuses, Unknown
// included.
func Kinds() []Kind {
	return slices.SortedFunc(maps.Keys(kinds), func(a, b Kind) int {
		return cmp.Compare(kinds[a].exit, kinds[b].exit)
	})
}

func (k Kind) Error() string { return string(k) }

// ExitStatus is the process exit status for an error of kind k.
func (k Kind) ExitStatus() int { return kinds[k].exit }

// Retry reports whether trying again, with nothing changed, may help.
func (k Kind) Retry() bool { return kinds[k].retry }

// Meaning says in one sentence what happened.
func (k Kind) Meaning() string { return kinds[k].means }

// KindOf returns the kind of err, also when err has crossed a process boundary
// as a Temporal application error, whose Type is the kind. A nil err and one
// without a kind are Unknown.
func KindOf(err error) Kind {
	if k, ok := errors.AsType[Kind](err); ok {
		return k
	}
	var remote interface {
		error
		Type() string
	}
	if errors.As(err, &remote) {
		if _, ok := kinds[Kind(remote.Type())]; ok {
			return Kind(remote.Type())
		}
	}
	return Unknown
}

// With gives err the kind k where the text of err says enough: k is not part of
// it. A nil err stays nil.
func With(k Kind, err error) error {
	if err == nil {
		return nil
	}
	return &kinded{err, k}
}

type kinded struct {
	error
	kind Kind
}

func (k *kinded) Unwrap() []error { return []error{k.kind, k.error} }

// Hint attaches advice for the operator to err, better than the one its kind
// has. Advice is not part of err.Error(): it is printed on its own line.
func Hint(err error, advice string) error {
	if err == nil {
		return nil
	}
	return &hinted{err, advice}
}

type hinted struct {
	error
	advice string
}

func (h *hinted) Unwrap() error { return h.error }

// HintOf returns the advice attached to err, or else that of its kind, or "".
func HintOf(err error) string {
	if h, ok := errors.AsType[*hinted](err); ok {
		return h.advice
	}
	return kinds[KindOf(err)].hint
}
