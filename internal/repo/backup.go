package repo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// An ID names a backup within its cluster: UTC start and eight random digits,
// so that text order is time order: "20261122T013000Z-4f2a9c01".
type ID string

var idForm = regexp.MustCompile(`^\d{8}T\d{6}Z-[0-9a-f]{8}$`)

// NewID makes the name of a backup that starts at t; random is at least eight
// hexadecimal digits.
func NewID(t time.Time, random string) ID {
	return ID(t.UTC().Format("20060102T150405Z") + "-" + random[:8])
}

// ParseID parses the text form.
func ParseID(s string) (ID, error) {
	if !idForm.MatchString(s) {
		return "", fail.Hint(fmt.Errorf("%q is not a backup id: %w", s, fail.BadConfig), "ids look like 20261122T013000Z-4f2a9c01; pgkeep list shows them")
	}
	return ID(s), nil
}

// Time is when the backup began, to the second.
func (id ID) Time() time.Time {
	t, _ := time.Parse("20060102T150405Z", strings.SplitN(string(id), "-", 2)[0]) // zero for what is no ID
	return t
}

// A Ref says which backup is meant.
type Ref struct {
	Cluster string `json:"cluster"`
	ID      ID     `json:"id"`
}

func clusterPrefix(cluster string) string { return "clusters/" + cluster + "/" }
func (b Ref) dir() string                 { return clusterPrefix(b.Cluster) + "backups/" + string(b.ID) + "/" }
func (b Ref) packs() string               { return clusterPrefix(b.Cluster) + "packs/" + string(b.ID) + "/" }

// An Intent is the first object of a backup: somebody means to write here.
type Intent struct {
	Header
	Ref
	Kind      Kind      `json:"kind"`
	Host      string    `json:"host"`
	Workflow  string    `json:"workflow,omitempty"` // Temporal workflow and run, for the operator
	Run       string    `json:"run,omitempty"`
	StartedAt time.Time `json:"started_at"`
	Pins      []ID      `json:"pins,omitempty"` // backups whose packs this one may come to refer to
}

// A Kind of backup.
type Kind string

const (
	Logical  Kind = "logical"
	Physical Kind = "physical"
)

// Content is what a finished upload stored, in numbers and names.
type Content struct {
	Trees  []Part `json:"trees"`
	Files  int    `json:"files"`
	Packs  int    `json:"packs"`
	Bytes  int64  `json:"bytes"`  // of the files
	Stored int64  `json:"stored"` // of the packs they are in, each counted once
	// Uses names the other backups that wrote some of these packs. They may be
	// deleted themselves: their packs stay as long as somebody uses them.
	Uses []ID `json:"uses,omitempty"`
	// Physical is nil for a logical backup.
	Physical *PhysicalFacts `json:"physical,omitempty"`
}

// PhysicalFacts is what a physical backup is besides its files: where in the
// write-ahead log it begins and ends, and how the cluster is built.
type PhysicalFacts struct {
	System         pg.SystemID    `json:"system_id"`
	Version        pg.Version     `json:"pg_version"` // server_version_num
	Start          pg.LSN         `json:"start"`      // what recovery begins from, at least: from pg_backup_start
	Stop           pg.LSN         `json:"stop"`       // consistent from here on: from pg_backup_stop
	Timeline       pg.Timeline    `json:"timeline"`
	StopTimeline   pg.Timeline    `json:"stop_timeline"`
	StartedAt      time.Time      `json:"started_at"` // no record from Start on was written before, by the server's clock, UTC
	StoppedAt      time.Time      `json:"stopped_at"`
	Checkpoint     pg.LSN         `json:"checkpoint"` // of the record that the start waited for
	FirstWAL       string         `json:"first_wal"`  // names of the segments that recovery to Stop needs
	LastWAL        string         `json:"last_wal"`
	SegmentSize    pg.SegmentSize `json:"segment_size"` // bytes
	BlockSize      int            `json:"block_size"`   // bytes
	Checksums      bool           `json:"checksums"`    // pages carry checksums, and they were compared
	CatalogVersion int            `json:"catalog_version"`
	ControlVersion int            `json:"control_version"`
	Damaged        int            `json:"damaged_blocks,omitempty"` // blocks whose checksum is wrong …
	DamagedFiles   int            `json:"damaged_files,omitempty"`  // … and files that have some
	Tablespaces    int            `json:"tablespaces,omitempty"`
	InRecovery     bool           `json:"in_recovery,omitempty"` // taken from a standby
}

// Segments are the names of the segments that recovery to Stop needs.
func (f PhysicalFacts) Segments() ([]pg.WALName, error) {
	n, err := pg.ParseWALName(f.FirstWAL)
	if err != nil {
		return nil, err
	}
	last, err := pg.ParseWALName(f.LastWAL)
	if err != nil {
		return nil, err
	}
	names := []pg.WALName{n}
	for n.Timeline == last.Timeline && n.String() < f.LastWAL {
		if n, err = n.Next(f.SegmentSize); err != nil {
			return nil, err
		}
		names = append(names, n)
	}
	if n.String() != f.LastWAL {
		return nil, fmt.Errorf("from segment %s one does not come to %s: %w", f.FirstWAL, f.LastWAL, fail.Corrupt)
	}
	return names, nil
}

// Own chooses the packs that this backup wrote itself.
func (b Ref) Own() func(Pack) bool {
	return func(p Pack) bool { return strings.HasPrefix(p.Key, b.packs()) }
}

// Scrub chooses one pack in so many, at random: other ones for another salt.
func Scrub(salt string, of uint32) func(Pack) bool {
	return func(p Pack) bool { return crc32.ChecksumIEEE([]byte(salt+p.Key))%of == 0 }
}

// draft is the commit point of an upload: a retry finds it and has nothing to do.
type draft struct {
	Header
	Ref
	Content
	Details json.RawMessage `json:"details,omitempty"` // for the manifest
}

// A Manifest describes one backup. The backup exists from the moment its
// manifest does: it is written last. It ends with its tombstone.
type Manifest struct {
	Header
	Ref
	Kind       Kind        `json:"kind"`
	Host       string      `json:"host"`
	System     pg.SystemID `json:"system_id"`
	Version    pg.Version  `json:"pg_version"` // server_version_num
	StartedAt  time.Time   `json:"started_at"` // UTC
	FinishedAt time.Time   `json:"finished_at"`
	Content
	LSN      LSNs     `json:"lsn"`
	Verified Verified `json:"verified"`
	Workflow string   `json:"workflow,omitempty"`
	Run      string   `json:"run,omitempty"`
	Epoch    int      `json:"epoch,omitempty"` // whose key opens it; 0: not encrypted

	// Details hold names of databases: in an encrypted repository they are
	// sealed like the lists of files. See OpenDetails.
	Details json.RawMessage `json:"details,omitempty"`
}

// LSNs say which moment of the cluster a backup holds.
type LSNs struct {
	Timeline pg.Timeline `json:"timeline"`
	Before   pg.LSN      `json:"before"` // of all databases' brackets the smallest …
	After    pg.LSN      `json:"after"`  // … and the largest
	Archived string      `json:"archived"`
	LastWAL  string      `json:"last_wal,omitempty"` // the newest segment archived when the backup was recorded
}

// Verified says what was read back before the backup was published.
type Verified string

const (
	// VerifiedContent: every pack that this backup wrote was read back, decrypted,
	// decompressed, and every block compared. Of packs that it shares, which were
	// when they were written, the directories were read, and a sample.
	VerifiedContent Verified = "content"
	// VerifiedStored: the stored bytes were read back and compared; this host
	// holds no key to look inside.
	VerifiedStored Verified = "stored"
)

// SealDetails encodes v as Details, for those who may read metadata.
func (r *Repo) SealDetails(v any) (json.RawMessage, error) {
	plain, err := json.Marshal(v)
	if err != nil || !r.Marker.Encrypted {
		return plain, err
	}
	to, err := r.metadata()
	if err != nil {
		return nil, err
	}
	sealed, err := seal.Encrypt(plain, to...)
	if err != nil {
		return nil, err
	}
	return json.Marshal(sealed) // a string: base64
}

// OpenDetails decodes the details of m into v; fail.NoKey where no key at hand
// opens them.
func (r *Repo) OpenDetails(m Manifest, v any) error {
	plain := []byte(m.Details)
	if r.Marker.Encrypted {
		var sealed []byte
		if err := json.Unmarshal(m.Details, &sealed); err != nil {
			return fmt.Errorf("details of %s: %w: %w", m.ID, err, fail.Corrupt)
		}
		var err error
		if plain, err = r.openMetadata(sealed); err != nil {
			return fmt.Errorf("details of %s: %w", m.ID, err)
		}
	}
	if err := json.Unmarshal(plain, v); err != nil {
		return fmt.Errorf("details of %s: %w: %w", m.ID, err, fail.Corrupt)
	}
	return nil
}

// WriteIntent begins a backup. It returns by how much the store's clock is
// ahead of now, to the second. The same intent again is success.
func (r *Repo) WriteIntent(ctx context.Context, in Intent, now func() time.Time) (skew time.Duration, err error) {
	in.Header = r.access.header("intent")
	key := "names/" + in.Cluster
	if err := putSigned(ctx, r.st, r.access, key, name{r.access.header("name"), in.Cluster}); err != nil && !errors.Is(err, store.ErrExist) {
		return 0, err
	}
	key = in.dir() + "intent.json"
	if err := putSigned(ctx, r.st, r.access, key, in); errors.Is(err, store.ErrExist) {
		// The same run may try again with another version of this program.
		var have Intent
		if rerr := r.getSigned(ctx, key, "intent", &have); rerr != nil || have.Ref != in.Ref || have.Run != in.Run {
			return 0, errors.Join(err, rerr)
		}
	} else if err != nil {
		return 0, err
	}
	for o, err := range r.st.List(ctx, key, "") {
		if err != nil {
			return 0, wrap("list", key, err)
		}
		if o.Key == key {
			return o.Modified.Sub(now()), nil
		}
	}
	return 0, fmt.Errorf("%s was written and is not listed: %w", key, fail.StoreUnfit)
}

// Publish makes the backup exist, after its upload is complete. It is the last
// write. Publishing the same backup again is success and returns the manifest
// that is there.
func (r *Repo) Publish(ctx context.Context, m Manifest) (Manifest, error) {
	d, err := r.draft(ctx, m.Ref)
	if errors.Is(err, fail.NoBackup) { // it was deleted
		return Manifest{}, r.outlives(ctx, m.Ref)
	}
	if err != nil {
		return Manifest{}, err
	}
	m.Header, m.Content = r.access.header("manifest"), d.Content
	if m.Details == nil {
		m.Details = d.Details
	}
	if n := len(r.epochs); n > 0 {
		m.Epoch = r.epochs[n-1].Number
	}
	if err := r.outlives(ctx, m.Ref); err != nil {
		return Manifest{}, err
	}
	err = putSigned(ctx, r.st, r.access, m.dir()+"manifest.json", m)
	if err != nil && !errors.Is(err, store.ErrExist) {
		return Manifest{}, err
	}
	if err := r.outlives(ctx, m.Ref); err != nil {
		return Manifest{}, err
	}
	return r.Backup(ctx, m.Ref)
}

// outlives looks, before a manifest is written and after it, whether all that it
// speaks of is there still. A deletion that came between the two has left, or will
// leave, nothing of it: then the manifest counts for nothing. It stays, as who takes
// backups may delete nothing; see alone. Of all that a deletion removes the intent is
// the last but the tombstone, and what pinned packs of others.
func (r *Repo) outlives(ctx context.Context, b Ref) error {
	_, err := r.tombstone(ctx, b)
	switch {
	case err == nil:
		err = fail.NoBackup
	case errors.Is(err, store.ErrNotExist):
		if _, err = r.draft(ctx, b); err == nil {
			err = r.getSigned(ctx, b.dir()+"intent.json", "intent", new(Intent))
		}
	}
	if errors.Is(err, store.ErrNotExist) || errors.Is(err, fail.NoBackup) {
		return fmt.Errorf("backup %s was deleted while it was published: %w", b.ID, fail.NoBackup)
	}
	return err
}

// alone reports whether a manifest stands by itself among documents of those names:
// its backup was deleted while it was published, and the deletion did not see it.
// One such document is enough for it to count: a deletion leaves none, and to lose
// one is not to lose the backup.
func alone(names []string) bool {
	return !slices.ContainsFunc(names, func(name string) bool {
		return name == "intent.json" || name == "draft.json" || strings.HasPrefix(name, "tree-") || name == tombstoneName
	})
}

// names lists the documents of a backup.
func (r *Repo) names(ctx context.Context, b Ref) (names []string, err error) {
	for o, err := range r.st.List(ctx, b.dir(), "") {
		if err != nil {
			return nil, wrap("list", b.dir(), err)
		}
		names = append(names, strings.TrimPrefix(o.Key, b.dir()))
	}
	return names, nil
}

// Draft returns what the finished upload of a backup stored; store.ErrNotExist
// and fail.NoBackup when it is not finished, or was deleted.
func (r *Repo) Draft(ctx context.Context, b Ref) (Content, error) {
	d, err := r.draft(ctx, b)
	return d.Content, err
}

func (r *Repo) draft(ctx context.Context, b Ref) (d draft, err error) {
	key := b.dir() + "draft.json"
	if err := r.getSigned(ctx, key, "draft", &d); errors.Is(err, store.ErrNotExist) {
		return draft{}, fail.With(fail.NoBackup, err)
	} else if err != nil {
		return draft{}, err
	}
	if d.Ref != b {
		return draft{}, fmt.Errorf("%s: belongs to %s of %s: %w", key, d.ID, d.Cluster, fail.Corrupt)
	}
	return d, nil
}

// Backup returns the manifest of one backup; fail.NoBackup when there is none.
func (r *Repo) Backup(ctx context.Context, b Ref) (Manifest, error) {
	m, err := r.manifest(ctx, b)
	if errors.Is(err, store.ErrNotExist) {
		err = fmt.Errorf("backup %s of cluster %s: %w", b.ID, b.Cluster, fail.NoBackup)
	}
	var names []string
	if err == nil {
		names, err = r.names(ctx, b)
	}
	if err == nil {
		err = r.counts(ctx, b, names)
	}
	if err != nil {
		return Manifest{}, err
	}
	return m, nil
}

// manifest reads the manifest of a backup, whether or not it counts.
func (r *Repo) manifest(ctx context.Context, b Ref) (m Manifest, err error) {
	key := b.dir() + "manifest.json"
	err = r.getSigned(ctx, key, "manifest", &m)
	if err == nil && m.Ref != b {
		err = fmt.Errorf("%s: is the manifest of %s of %s: %w", key, m.ID, m.Cluster, fail.Corrupt)
	}
	return m, err
}

// counts is nil if a manifest that stood among documents of those names is that of
// a backup.
func (r *Repo) counts(ctx context.Context, b Ref, names []string) error {
	_, err := r.tombstone(ctx, b) // asked for, as it may have come since
	switch {
	case err == nil:
		return fmt.Errorf("backup %s of cluster %s is deleted: %w", b.ID, b.Cluster, fail.NoBackup)
	case !errors.Is(err, store.ErrNotExist):
		return err
	case alone(names):
		return fmt.Errorf("backup %s of cluster %s was deleted while it was published: %w", b.ID, b.Cluster, fail.NoBackup)
	}
	return nil
}

// A Listed is a backup as a list shows it.
type Listed struct {
	Manifest
	// Err: the manifest is there and cannot be believed. It is shown, and
	// counts for nothing. Then only Ref is set above.
	Err error
	// Unfinished: something was written, and there is no manifest. Only Ref is set.
	Unfinished bool
}

// Backups lists what the repository holds of a cluster, oldest first.
func (r *Repo) Backups(ctx context.Context, cluster string) ([]Listed, error) {
	prefix := clusterPrefix(cluster) + "backups/"
	found := make(map[ID][]string)
	for o, err := range r.st.List(ctx, prefix, "") {
		if err != nil {
			return nil, wrap("list", prefix, err)
		}
		id, name, ok := strings.Cut(strings.TrimPrefix(o.Key, prefix), "/")
		if ok && idForm.MatchString(id) {
			found[ID(id)] = append(found[ID(id)], name)
		}
	}
	var all []Listed
	for id, names := range found {
		b := Listed{Manifest: Manifest{Ref: Ref{cluster, id}}}
		switch {
		case slices.Contains(names, tombstoneName):
			_, err := r.tombstone(ctx, b.Ref)
			switch {
			case err == nil, errors.Is(err, store.ErrNotExist): // deleted, or just now gone for good
				continue
			case fail.KindOf(err).Retry(), ctx.Err() != nil:
				return nil, err
			}
			b.Err = err // whoever wrote it has no say
		case !slices.Contains(names, "manifest.json"):
			b.Unfinished = true
		default:
			m, err := r.manifest(ctx, b.Ref)
			if err == nil {
				err = r.counts(ctx, b.Ref, names)
			}
			switch {
			case errors.Is(err, fail.NoBackup), errors.Is(err, store.ErrNotExist): // deleted
				continue
			case fail.KindOf(err).Retry() && err != nil, ctx.Err() != nil:
				return nil, err // the store's trouble, not this backup's
			case err != nil:
				b.Err = err
			default:
				b.Manifest = m
			}
		}
		all = append(all, b)
	}
	slices.SortFunc(all, func(a, b Listed) int { return strings.Compare(string(a.ID), string(b.ID)) })
	return all, nil
}

// name is the object names/<cluster>: it says that there is such a cluster, so
// that one can be found with nothing but the bucket and a key.
type name struct {
	Header
	Cluster string `json:"cluster"`
}

// Clusters lists the clusters of which a backup was ever begun here.
func (r *Repo) Clusters(ctx context.Context) ([]string, error) {
	var names []string
	for o, err := range r.st.List(ctx, "names/", "") {
		if err != nil {
			return nil, wrap("list", "names/", err)
		}
		names = append(names, strings.TrimPrefix(o.Key, "names/"))
	}
	return names, nil
}

// Latest is the small object for scripts beside a cluster's backups. It is
// advice: the only object that is overwritten, and nothing here reads it.
type Latest struct {
	Header
	Ref
	Kind       Kind      `json:"kind"`
	FinishedAt time.Time `json:"finished_at"`
	LSN        LSNs      `json:"lsn"`
	Bytes      int64     `json:"bytes"`
	Stored     int64     `json:"stored"`
	Verified   Verified  `json:"verified"`
	Manifest   string    `json:"manifest"` // key
}

// latest returns the key and content of the object that points at m.
func (r *Repo) latest(m Manifest) (string, []byte, error) {
	b, err := json.MarshalIndent(Latest{Header: m.Header, Ref: m.Ref, Kind: m.Kind, FinishedAt: m.FinishedAt, LSN: m.LSN,
		Bytes: m.Bytes, Stored: m.Stored, Verified: m.Verified, Manifest: m.dir() + "manifest.json"}, "", "  ")
	return clusterPrefix(m.Cluster) + "latest-" + string(m.Kind) + ".json", append(b, '\n'), err
}

// WriteLatest points latest-<kind>.json of the cluster at m.
func (r *Repo) WriteLatest(ctx context.Context, m Manifest) error {
	m.Header.Type = "latest"
	key, b, err := r.latest(m)
	if err != nil {
		return err
	}
	return wrap("write", key, r.st.Put(ctx, key, bytes.NewReader(b), store.PutOptions{}))
}

// checkLatest compares the object for scripts with the backup it points at.
func (r *Repo) checkLatest(ctx context.Context, of Manifest, rep *Report) error {
	key, _, err := r.latest(of)
	if err != nil {
		return err
	}
	have, err := readAll(ctx, r.st, key, maxDocument)
	if errors.Is(err, store.ErrNotExist) {
		return nil
	}
	var l Latest
	if err == nil && (json.Unmarshal(have, &l) != nil || l.Cluster != of.Cluster || !idForm.MatchString(string(l.ID))) {
		err = fmt.Errorf("names no backup of this cluster: %w", fail.Corrupt)
	}
	if err == nil {
		var m Manifest
		if m, err = r.Backup(ctx, l.Ref); errors.Is(err, fail.NoBackup) {
			err = fmt.Errorf("points at %s, which is not there: %w", l.ID, fail.Corrupt)
		} else if err == nil {
			m.Header.Type = "latest"
			if _, want, _ := r.latest(m); !bytes.Equal(have, want) {
				err = fmt.Errorf("does not say what the manifest of %s says: %w", l.ID, fail.Corrupt)
			}
		}
	}
	return rep.add(key, err)
}

// RenewLatest points the objects for scripts at the newest backups there are.
func (r *Repo) RenewLatest(ctx context.Context, cluster string) error {
	all, err := r.Backups(ctx, cluster)
	if err != nil {
		return err
	}
	newest := make(map[Kind]Manifest)
	for _, b := range all {
		if b.Err == nil && !b.Unfinished && (b.Physical == nil || b.Physical.Damaged == 0) {
			newest[b.Kind] = b.Manifest
		}
	}
	for _, kind := range []Kind{Logical, Physical} {
		m, ok := newest[kind]
		if ok {
			err = r.WriteLatest(ctx, m)
		} else {
			key, _, _ := r.latest(Manifest{Ref: Ref{Cluster: cluster}, Kind: kind})
			err = wrap("delete", key, r.st.Delete(ctx, key))
		}
		if err != nil {
			return err
		}
	}
	return nil
}
