package repo

import (
	"context"
	"iter"
	"strconv"
	"strings"
	"time"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/pg"
)

// Archives finds the archives of a cluster, by system and version: one that was
// upgraded has several. None is no error.
func (r *Repo) Archives(ctx context.Context, cluster string) ([]Archive, error) {
	prefix := clusterPrefix(cluster) + "wal/"
	var found []Archive
	for after, again := "", true; again; {
		again = false
		for o, err := range r.st.List(ctx, prefix, after) {
			if err != nil {
				return nil, wrap("list", prefix, err)
			}
			name, _, _ := strings.Cut(strings.TrimPrefix(o.Key, prefix), "/")
			if a, ok := parseArchive(cluster, name); ok {
				found = append(found, a)
			}
			after, again = prefix+name+"0", true // "0" comes after "/": what is in that directory is passed over
			break
		}
	}
	return found, nil
}

func parseArchive(cluster, name string) (Archive, bool) {
	system, major, _ := strings.Cut(name, "-")
	id, err := pg.ParseSystemID(system)
	n, nerr := strconv.Atoi(major)
	a := Archive{cluster, id, n}
	return a, err == nil && nerr == nil && a.dir() == clusterPrefix(cluster)+"wal/"+name+"/"
}

// A WALObject is an object of an archive as a list shows it; nothing of it was
// read.
type WALObject struct {
	Name     pg.WALName // zero: PostgreSQL names no file so
	Key      string
	Stored   int64     // bytes
	Modified time.Time // by the store's clock
}

// WALObjects yields the objects of an archive in the order of their names,
// timeline by timeline. Of after and what sorts before it, nothing is listed;
// the zero name means from the beginning.
func (r *Repo) WALObjects(ctx context.Context, a Archive, after pg.WALName) iter.Seq2[WALObject, error] {
	last := ""
	if after != (pg.WALName{}) {
		last = a.key(after)
	}
	return func(yield func(WALObject, error) bool) {
		for o, err := range r.st.List(ctx, a.dir(), last) {
			if err != nil {
				yield(WALObject{}, wrap("list", a.dir(), err))
				return
			}
			if strings.HasPrefix(o.Key, a.dir()+"claims/") || strings.HasPrefix(o.Key, a.expired()) { // they come last
				return
			}
			n, _, ok := a.name(o.Key)
			if !ok {
				n = pg.WALName{}
			}
			if !yield(WALObject{n, o.Key, o.Size, o.Modified}, nil) {
				return
			}
		}
	}
}

// WALSize reads how many bytes an archived file has, from its signed header:
// that takes no key that opens data.
func (r *Repo) WALSize(ctx context.Context, a Archive, of WALObject) (int64, error) {
	o, err := r.openWAL(ctx, a, of.Name, of.Key)
	if err != nil {
		return 0, wrap("read", of.Key, err)
	}
	return o.header.Size, o.Close()
}

// walReaders are whom a file of the archive is encrypted to. A history is
// metadata: the host that audits follows timelines, and opens no data.
func (r *Repo) walReaders(n pg.WALName) ([]age.Recipient, error) {
	to, err := r.data()
	if n.Kind == pg.History && len(to) > 0 && r.access.Metadata != nil {
		to = append(to, r.access.Metadata.Recipient())
	}
	return to, err
}
