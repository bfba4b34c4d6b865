package health

import (
	"github.com/pgkeep/pgkeep/internal/human"
)

// A Disk is a directory, and the file system that it is on.
type Disk struct {
	What  string // the directory is for: "spool"
	Path  string
	Err   error // it cannot be used; then nothing else is known
	Free  int64 // bytes that we may still take
	Total int64 // bytes
	Needs int64 // bytes that should be free; 0: a twentieth of all
}

// Findings are what is wrong with a directory.
func (d Disk) Findings(cluster string) []Finding {
	f := &findings{cluster: cluster}
	if d.Err != nil {
		f.add("directory", Critical, "make it, and give it to the user that runs pgkeep: install -d -m 0700 "+d.Path, "the directory for %s cannot be used: %v", d.What, d.Err)
		return f.all
	}
	needs := d.Needs
	if needs == 0 {
		needs = d.Total / 20
	}
	if d.Free < needs {
		f.add("disk-space", severe(d.Free < needs/2), "free space on the file system of "+d.Path+", or choose a larger one", "%s is free where %s is (%s), and %s should be", human.Size(d.Free), d.Path, d.What, human.Size(needs))
	}
	return f.all
}
