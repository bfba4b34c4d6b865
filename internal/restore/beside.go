package restore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/pgkeep/pgkeep/internal/backup"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// readSource finds out where the data directory was that the backup is of,
// whether tablespaces stood in it, and where its configuration was.
func (p Physical) readSource(plan *PhysicalPlan) error {
	var details backup.PhysicalDetails
	err := p.Repo.OpenDetails(plan.resolved.Backup, &details)
	plan.source, plan.configured = details.DataDirectory, details.Config
	plan.inPlace = slices.ContainsFunc(details.Tablespaces, func(t backup.Tablespace) bool {
		return t.Path == "" && (t.Name != "" || plan.resolved.Backup.Version.Major() >= 15) // an older server may not know the setting; then it has none, but a stray directory
	})
	return err
}

// overSource reports whether the target is the source's own data directory.
func (p Physical) overSource(plan *PhysicalPlan) bool {
	return plan.source != "" && realPath(plan.source) == realPath(p.Dir)
}

// apartFromSource refuses a place that the source uses, when the target is not
// the source's own directory: then it may run, and nothing in the target tells.
// A copy of its directory has links to its tablespaces, too.
func (p Physical) apartFromSource(plan *PhysicalPlan) error {
	if plan.source == "" || p.overSource(plan) {
		return nil
	}
	spaces := filepath.Join(plan.source, "pg_tblspc")
	links, err := os.ReadDir(spaces)
	if err != nil && !elsewhere(err) {
		return fmt.Errorf("restore: tablespaces of the source: %w", err)
	}
	used := []string{plan.source}
	for _, link := range links {
		used = append(used, filepath.Join(spaces, link.Name()))
	}
	for _, t := range plan.Tablespaces {
		for _, u := range used {
			if within(t.To, u) || within(u, t.To) {
				return fail.Hint(fmt.Errorf("restore: tablespace %s would be at %s, which %s, the source, uses: %w", t.OID, t.To, plan.source, fail.NotEmpty),
					"put it elsewhere: --tablespace-map "+t.OID+"=/some/directory; if the source is no longer needed, restore over it, or remove its data directory first")
			}
		}
	}
	return nil
}

// spareSource refuses a restore beside its source if recovery would come to the
// making of a tablespace that the source has. PostgreSQL makes it at the path
// that the log names, whatever was mapped, and writes over what is there ("CREATE
// TABLESPACE" among the caveats in its chapter on continuous archiving). Whoever
// may not read the source may not overwrite it either, and need not be stopped.
func (p Physical) spareSource(plan *PhysicalPlan) error {
	m, source := plan.resolved.Backup, plan.source
	if source == "" || p.overSource(plan) {
		return nil
	}
	b, err := os.ReadFile(filepath.Join(source, controlFile))
	if elsewhere(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("restore: is %s the source: %w", source, err)
	}
	if c, err := pg.ParseControl(b); err == nil && c.System != m.System { // a torn one may be the source's
		return nil
	}
	links, err := os.ReadDir(filepath.Join(source, "pg_tblspc"))
	if err != nil && !elsewhere(err) {
		return fmt.Errorf("restore: tablespaces of the source: %w", err)
	}
	held := make(map[string]bool)
	for _, t := range plan.Tablespaces {
		held[t.OID] = true
	}
	for _, link := range links {
		info, err := link.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && info.Mode()&fs.ModeSymlink == 0 {
			continue
		}
		if err != nil {
			return fmt.Errorf("restore: tablespaces of the source: %w", err)
		}
		// The link was made just before the record of it was written, by the same
		// clock: it is older than the log that is replayed, or younger.
		made, by := info.ModTime(), plan.resolved.By
		if held[link.Name()] && (made.Add(unsure).Before(m.Physical.StartedAt) || old(plan.linked[link.Name()], m.Physical.StartedAt)) || !by.IsZero() && by.Add(unsure).Before(made) {
			continue
		}
		to, err := os.Readlink(filepath.Join(source, "pg_tblspc", link.Name()))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("restore: tablespaces of the source: %w", err)
		}
		return fail.Hint(fmt.Errorf("restore: the source, %s, made tablespace %s at %s after backup %s had begun; recovery would write over it: %w", source, link.Name(), to, m.ID, fail.NotEmpty),
			fmt.Sprintf("take a backup now and restore that one, or restore to a moment before %s, or on another host", made.UTC().Format(time.RFC3339)))
	}
	return nil
}

// old reports whether the link to a tablespace had been made before a backup began,
// as the backup has it. The link that is there now may be younger: that of a standby
// that was made since.
func old(made, began time.Time) bool {
	return !made.IsZero() && made.Add(time.Second+unsure).Before(began) // it is known to the second
}

// unsure is how far the order of two events on a host may differ from that of
// their times: a file's is that of the last tick of the clock, and a record's was
// looked up before the record was written.
const unsure = 20 * time.Millisecond

// elsewhere says of an error that what was looked for is not on this host, or
// out of reach.
func elsewhere(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
}
