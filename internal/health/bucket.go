package health

import (
	"cmp"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/human"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// A Bucket is what is known of the place of a repository, and of its keys.
type Bucket struct {
	store.Rights
	Ruled     bool // it may have rules
	Rules     []store.Rule
	Versioned bool  // what is deleted is kept as an older version
	RulesErr  error // why nothing is known of rules

	Err       error // why the repository does not open; then nothing is known of keys
	Encrypted bool
	Keys      []repo.KeyCheck // of its epochs, oldest first
	Identity  bool            // there is an identity here that should open them
	Wanted    []string        // recipients that the configuration names
}

// A Part is what a host has to do with a repository, besides reading it.
type Part struct {
	Writes  bool // backups, or log
	Deletes bool // it removes what is not needed any more
}

// Findings are what is wrong with the place of a repository, for a host.
func (b Bucket) Findings(p Part) []Finding {
	f := new(findings)
	down := false
	for _, r := range []struct {
		what string
		err  error
	}{{"write", b.Put}, {"read", b.Get}, {"list", b.List}, {"delete", b.Delete}} {
		kind := fail.KindOf(r.err)
		switch {
		case r.err == nil || down:
			continue
		case kind == fail.StoreDenied && (r.what == "write" && !p.Writes || r.what == "delete" && !p.Deletes): // as it should be
			continue
		case kind != fail.StoreDenied: // the same for each
			down = true
			f.add(cmp.Or(string(kind), "store-unknown"), Critical, fixOf(r.err), "the store does not work: %v", r.err)
		default:
			f.add("store-"+r.what, Critical, fixOf(r.err), "this host may not %s objects: %v", r.what, r.err)
		}
	}
	if b.Replaced {
		f.add("store-unfit", Critical, "use a store with conditional writes (If-None-Match), or a newer version of this one", "the store replaced an object that was there already")
	}
	if skew := b.Skew.Abs(); skew > allowedSkew {
		f.add("clock-skew", severe(skew > 5*time.Minute), "set the clock of this host with chrony or systemd-timesyncd", "the clock of the store is %s from that of this host", human.Span(skew))
	}
	if !down || b.RulesErr == nil { // else it is told already
		b.findRules(f)
	}
	if !down || b.Err == nil {
		b.findKeys(f)
	}
	return f.all
}

func (b Bucket) findRules(f *findings) {
	switch {
	case b.RulesErr != nil:
		f.add("rules-unknown", Notice, "pgkeep bucket show, with credentials that may read the bucket's settings", "nobody here can tell whether the bucket removes objects by itself: %v", b.RulesErr)
		return
	}
	for _, r := range b.Rules {
		where := cmp.Or(r.Prefix, "everything")
		if r.Removes {
			f.add("lifecycle-removes", Critical, "delete the lifecycle rule "+cmp.Or(r.ID, "without an id")+" of the bucket, or turn it off", "a lifecycle rule of the bucket removes %s when it is old enough: backups and log with it", where)
		}
		if r.Freezes {
			f.add("lifecycle-freezes", Critical, "delete the lifecycle rule "+cmp.Or(r.ID, "without an id")+" of the bucket, or turn it off", "a lifecycle rule of the bucket moves %s to where it cannot be read at once: no restore can wait for that", where)
		}
	}
	if b.Ruled && !b.Versioned && b.Put == nil {
		f.add("versioning-off", Notice, "turn on versioning of the bucket; pgkeep bucket suggest prints what goes with it", "what somebody deletes from the bucket is gone: it keeps no versions")
	}
}

func (b Bucket) findKeys(f *findings) {
	if b.Err != nil {
		f.add("repository", Critical, fixOf(b.Err), "the repository does not open: %v", b.Err)
		return
	}
	if !b.Encrypted {
		f.add("encryption-off", Warning, "begin another repository: set repository.encryption to age, another repository.url, and run pgkeep init", "backups are not encrypted: whoever reads the bucket reads the data")
		return
	}
	for i, k := range b.Keys {
		newest := i == len(b.Keys)-1
		switch {
		case newest && len(k.Recipients) == 0: // of an older one nothing can be done
			f.add("key-nobody", Critical, "pgkeep key rotate", "nobody can open what is encrypted to epoch %d: it has no recipient", k.Epoch)
		case b.Identity && !k.Opens:
			f.add("key-closed", Critical, "name the identity of one of its recipients as keys.identity; who has one lets others in with pgkeep key add-recipient", "the identity here does not open the backups of key epoch %d: %s", k.Epoch, k.Reason)
		}
		if !newest {
			continue
		}
		if len(k.Recipients) == 1 {
			f.add("key-single", Warning, "make a second one with age-keygen, keep it offline, and let it in: pgkeep key add-recipient RECIPIENT", "only one key opens the backups: if it is lost, so are they")
		}
		for _, want := range b.Wanted {
			if !slices.Contains(k.Recipients, want) {
				f.add("key-recipient", Warning, "pgkeep key add-recipient "+want, "%s is one of keys.recipients, and does not open the backups", want)
			}
		}
	}
}
