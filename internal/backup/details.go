package backup

import (
	"cmp"
	"slices"

	"github.com/pgkeep/pgkeep/internal/cluster"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// PhysicalDetails are what a physical backup says only to those who may read
// metadata. They are sealed into its manifest.
type PhysicalDetails struct {
	DataDirectory string        `json:"data_directory"`
	Config        []string      `json:"config,omitempty"` // files beside the data directory: the n-th is below config/<n> in the tree
	Tablespaces   []Tablespace  `json:"tablespaces,omitempty"`
	Label         string        `json:"backup_label"`
	TablespaceMap string        `json:"tablespace_map,omitempty"`
	Damaged       []DamagedFile `json:"damaged,omitempty"`
	// The rows of the tables that were to be counted, each database as one
	// snapshot saw it, after the backup had ended; and what could not be counted,
	// with the reason.
	Counted   []cluster.Counted `json:"counted,omitempty"`
	Uncounted []string          `json:"uncounted,omitempty"`
}

// A Tablespace is a directory outside the data directory that the backup holds.
type Tablespace struct {
	OID  uint32 `json:"oid"`
	Name string `json:"name"` // "": not known
	Path string `json:"path"` // at the source; "": it stood in pg_tblspc itself
}

// A DamagedFile has pages whose checksum is wrong, and which the log will not
// make good.
type DamagedFile struct {
	Path   string  `json:"path"`   // in the tree
	Blocks []int64 `json:"blocks"` // within the file; not more than maxNamed
}

// maxNamed is how many damaged files, and blocks of each, stand in the details:
// enough to see what kind of damage it is.
const maxNamed = 100

// damaged notes an entry with damaged blocks.
func (d *PhysicalDetails) damaged(e repo.Entry) {
	if len(d.Damaged) < maxNamed {
		d.Damaged = append(d.Damaged, DamagedFile{e.Path, e.Damaged[:min(len(e.Damaged), maxNamed)]})
	}
}

// maxTables is how many tables' rows a backup tells of: a manifest is small.
const maxTables = 10_000

// largest keeps the tables with the most rows, no more than most.
func largest(tables []cluster.TableRows, most int) []cluster.TableRows {
	if len(tables) <= most {
		return tables
	}
	slices.SortStableFunc(tables, func(a, b cluster.TableRows) int { return cmp.Compare(b.Rows, a.Rows) })
	return tables[:most]
}
