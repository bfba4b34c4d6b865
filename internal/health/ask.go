package health

import (
	"context"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
)

// AskServer asks a cluster how it is doing, and looks for what its backups take
// on this host. What goes wrong is part of the answer.
func AskServer(ctx context.Context, name string, c cluster.Cluster, d Duty) Server {
	s := Server{Cluster: name}
	young := time.Minute
	for _, limit := range []time.Duration{d.Transaction, d.Idle} {
		if limit > 0 {
			young = min(young, limit)
		}
	}
	before := time.Now()
	if s.Condition, s.Err = c.Condition(ctx, young); s.Err != nil {
		return s
	}
	if after := time.Now(); s.Now.After(after) {
		s.Skew = s.Now.Sub(after)
	} else if s.Now.Before(before) {
		s.Skew = s.Now.Sub(before)
	}
	_, s.Tools = c.Tools(ctx, s.Version)
	if d.Logical {
		var names []string
		for _, db := range s.Databases {
			if db.Dumpable() {
				names = append(names, db.Name)
			}
		}
		s.Rights = c.CheckRights(ctx, names, false)
	}
	return s
}

// AskBucket finds out what the place of a repository lets us do and does by
// itself, with an object under each of keys, and which identities open it.
func AskBucket(ctx context.Context, st store.Store, a repo.Access, keys ...string) Bucket {
	b := Bucket{Rights: store.Try(ctx, st, time.Now, keys...), Identity: len(a.Identities) > 0}
	if ruled, ok := st.(store.Ruled); ok {
		b.Ruled = true
		b.Rules, b.Versioned, b.RulesErr = ruled.Rules(ctx)
	}
	r, err := repo.Open(ctx, st, a)
	if b.Err = err; err == nil {
		b.Encrypted, b.Keys = r.Marker.Encrypted, r.CheckKeys()
	}
	return b
}

// AskDisk looks at a directory. write: we are to make files in it.
func AskDisk(what, path string, write bool) Disk {
	d := Disk{What: what, Path: path}
	var fs unix.Statfs_t
	if d.Err = unix.Statfs(path, &fs); d.Err != nil {
		d.Err = fmt.Errorf("%s: %w", path, d.Err)
		return d
	}
	d.Free, d.Total = int64(fs.Bavail)*fs.Bsize, int64(fs.Blocks)*fs.Bsize
	if write {
		f, err := os.CreateTemp(path, ".pgkeep-doctor-")
		if err != nil {
			d.Err = err
			return d
		}
		f.Close()           // nothing was written
		os.Remove(f.Name()) // who may create it may remove it
	}
	return d
}
