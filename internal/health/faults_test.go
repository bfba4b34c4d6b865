package health_test

import (
	"bytes"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/printer"
	"go/token"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/store/s3"
)

// Whatever there is to find has a test that makes it on a real server or bucket,
// does what its fix says, and sees it gone: a call of sick with its name, here or
// in the tests of the command.
func TestEveryFindingIsMadeAndMended(t *testing.T) {
	// Names that do not stand as they are where a finding is made.
	built := map[string][]string{
		`string(fail.NoWorker)`:                 {"no-worker"},
		`string(fail.TemporalDown)`:             {"temporal-down"},
		`"store-" + r.what`:                     {"store-write", "store-read", "store-list", "store-delete"},
		`cmp.Or(string(kind), "store-unknown")`: {"store-down"}, // or how else a store does not work
		`name`:                                  {"pg-down"},    // or how else a server does not answer
	}
	made := make(map[string]bool)
	note := func(e ast.Expr) {
		if lit, ok := e.(*ast.BasicLit); ok {
			name, err := strconv.Unquote(lit.Value)
			if err != nil {
				t.Fatal(err)
			}
			made[name] = true
			return
		}
		var text bytes.Buffer
		printer.Fprint(&text, token.NewFileSet(), e)
		names, ok := built[text.String()]
		if !ok {
			t.Errorf("which findings are called %s?", &text)
		}
		for _, name := range names {
			made[name] = true
		}
	}
	mended := make(map[string]bool)
	for _, dir := range []string{".", "../../cmd/pgkeep"} {
		files, err := filepath.Glob(dir + "/*.go")
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			tree, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
			if err != nil {
				t.Fatal(err)
			}
			test := strings.HasSuffix(file, "_test.go")
			ast.Inspect(tree, func(n ast.Node) bool {
				switch n := n.(type) {
				case *ast.CallExpr:
					called := ""
					switch f := n.Fun.(type) {
					case *ast.Ident:
						called = f.Name
					case *ast.SelectorExpr:
						called = f.Sel.Name
					}
					if !test && dir == "." && called == "add" {
						note(n.Args[0])
					}
					if test && called == "sick" {
						i := slices.IndexFunc(n.Args, func(e ast.Expr) bool { _, ok := e.(*ast.BasicLit); return ok })
						if i >= 0 {
							name, _ := strconv.Unquote(n.Args[i].(*ast.BasicLit).Value)
							mended[name] = true
						}
					}
				case *ast.CompositeLit: // one that the command makes itself
					for _, e := range n.Elts {
						if kv, ok := e.(*ast.KeyValueExpr); ok && !test && dir != "." && isFinding(n.Type) && kv.Key.(*ast.Ident).Name == "Name" {
							note(kv.Value)
						}
					}
				}
				return true
			})
		}
	}
	if len(made) < 40 {
		t.Errorf("only %d findings were seen: %v", len(made), made)
	}
	for name := range made {
		if !mended[name] {
			t.Errorf("no test makes %s, and mends it", name)
		}
	}
	for name := range mended {
		if !made[name] {
			t.Errorf("a test mends %s, which nobody finds", name)
		}
	}
}

func isFinding(e ast.Expr) bool {
	s, ok := e.(*ast.SelectorExpr)
	return ok && s.Sel.Name == "Finding"
}

// A past is a repository in a real bucket, with backups that were taken when a
// test says so.
type past struct {
	t       *testing.T
	st      *s3.Bucket
	r       *repo.Repo
	data    string // directory of the bucket
	archive repo.Archive
	taken   int
}

func newPast(t *testing.T) *past {
	t.Helper()
	server := lab.S3ForTest(t)
	t.Cleanup(server.Kill) // stopping politely, it would wait for the connections that this process keeps
	st, err := s3.Open(t.Context(), s3.Options{Bucket: server.Bucket, Prefix: "prod", Endpoint: server.Endpoint, Region: server.Region, PathStyle: true, CAFile: server.CAFile,
		AccessKeyID: server.AccessKeyID, SecretAccessKey: server.SecretAccessKey})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { st.Close() })
	p := &past{t: t, st: st, data: filepath.Join(server.Data, "prod"), archive: repo.Archive{Cluster: "main", System: 7, Major: 15}}
	p.r, _, err = repo.Init(t.Context(), st, access(t), []string{identity(t).Recipient().String()}, time.Now())
	p.must(err)
	return p
}

func (p *past) must(err error) {
	p.t.Helper()
	if err != nil {
		p.t.Fatal(err)
	}
}

const segment = pg.SegmentSize(1 << 20)

// log archives segments.
func (p *past) log(numbers ...int) {
	p.t.Helper()
	for _, n := range numbers {
		text, err := pg.SegmentName(1, pg.LSN(n)*pg.LSN(segment), segment)
		p.must(err)
		name, err := pg.ParseWALName(text)
		p.must(err)
		_, err = p.r.Archiver(p.archive, "").Put(p.t.Context(), repo.WALFile{Name: name, Size: int64(segment), Content: bytes.NewReader(make([]byte, segment))})
		p.must(err)
	}
}

type content struct{ *bytes.Reader }

func (content) Close() error { return nil }

// take takes a physical backup that was finished then, and lies in the segments
// from first to last. Damaged pages were found in it.
func (p *past) take(at time.Time, first, last, damaged int) repo.Ref {
	p.t.Helper()
	p.taken++
	ref := repo.Ref{Cluster: "main", ID: repo.NewID(at.Add(-time.Minute), "0000000"+strconv.Itoa(p.taken))}
	_, err := p.r.WriteIntent(p.t.Context(), repo.Intent{Ref: ref, Kind: repo.Physical, Host: "db1", StartedAt: at.Add(-time.Minute)}, time.Now)
	p.must(err)
	w, err := p.r.Begin(p.t.Context(), repo.Writing{Ref: ref, PackSize: 1 << 20, Readers: 1, Senders: 1, Open: func(*repo.File) (repo.Source, error) { return content{bytes.NewReader(make([]byte, 8192))}, nil }})
	p.must(err)
	defer w.Close()
	p.must(w.Add(p.t.Context(), func(yield func(repo.File, error) bool) {
		yield(repo.File{Path: "data/1", Mode: 0o600, Size: 8192, Modified: at}, nil)
	}))
	a, err := pg.SegmentName(1, pg.LSN(first)*pg.LSN(segment), segment)
	p.must(err)
	b, err := pg.SegmentName(1, pg.LSN(last)*pg.LSN(segment), segment)
	p.must(err)
	facts := &repo.PhysicalFacts{System: 7, Version: 150000, Start: pg.LSN(first)*pg.LSN(segment) + 100, Stop: pg.LSN(last)*pg.LSN(segment) + 100, Timeline: 1, StopTimeline: 1,
		StartedAt: at.Add(-time.Minute), StoppedAt: at, FirstWAL: a, LastWAL: b, SegmentSize: segment, BlockSize: 8192}
	if damaged > 0 {
		facts.Damaged, facts.DamagedFiles = damaged, 1
	}
	_, err = w.Finish(p.t.Context(), facts, nil)
	p.must(err)
	_, err = p.r.Publish(p.t.Context(), repo.Manifest{Ref: ref, Kind: repo.Physical, Host: "db1", System: 7, Version: 150000, StartedAt: at.Add(-time.Minute), FinishedAt: at})
	p.must(err)
	return ref
}

// test writes the answer of a restore test.
func (p *past) test(of repo.Ref, at time.Time, passed bool) {
	p.t.Helper()
	report, err := json.Marshal(tested(0, passed).Report)
	p.must(err)
	p.must(p.r.WriteProof(p.t.Context(), repo.Proof{Ref: of, Test: repo.NewID(at, "0badcafe"), Host: "db1", FinishedAt: at, Passed: passed, Report: report}))
}

// delete does what a fix says at its end.
func (p *past) delete(of repo.Ref, fix string) {
	p.t.Helper()
	if !strings.HasSuffix(fix, "pgkeep delete --cluster main "+string(of.ID)) {
		p.t.Errorf("the fix does not delete %s: %s", of.ID, fix)
	}
	_, err := p.r.Delete(p.t.Context(), of, time.Now())
	p.must(err)
}

// What time, disks and bad luck do to backups in a bucket.
func TestFindingsOfARealBucket(t *testing.T) {
	t.Parallel()
	p := newPast(t)
	at := time.Now().Add(-10 * day).Truncate(time.Second)
	policy := health.Policy{Age: map[repo.Kind]time.Duration{repo.Physical: 36 * time.Hour}, Proof: 7 * day}
	now := at.Add(time.Hour)
	ask := func() []health.Finding {
		t.Helper()
		s, err := health.Look(t.Context(), p.r, "main", "", time.Now().Add(2*audit.Grace))
		p.must(err)
		return s.Findings(policy, now)
	}
	p.log(1, 2, 3)
	var first, second, third repo.Ref
	sick(t, "backup-missing", health.Critical, ask, func(string) { first = p.take(at, 1, 2, 0) })
	sick(t, "never-tested", health.Warning, ask, func(string) { p.test(first, now, true) })
	if found := ask(); len(found) > 0 {
		t.Fatalf("of a cluster that is well: %+v", found)
	}

	now = at.Add(2 * day)
	sick(t, "backup-old", health.Warning, ask, func(string) { second = p.take(now, 3, 3, 0) })
	now = at.Add(6 * day)
	sick(t, "backup-old", health.Critical, ask, func(string) { p.log(4); third = p.take(now, 4, 4, 0) })
	now = at.Add(7*day + 2*time.Hour)
	sick(t, "unproven", health.Warning, ask, func(string) { p.test(third, now, true) })
	p.test(second, now, false)
	sick(t, "test-failed", health.Critical, ask, func(fix string) {
		if !strings.Contains(fix, "pgkeep restore-test --cluster main") {
			t.Errorf("fix: %s", fix)
		}
		p.delete(second, fix)
	})

	// A segment that nobody has: the next backup begins after it, and those before
	// go.
	p.log(6, 7)
	hole := sick(t, "wal-hole", health.Critical, ask, func(string) { p.log(5) }) // as audit --fill does
	if !strings.Contains(hole.Fix, "wal audit --fill") {
		t.Errorf("%+v", hole)
	}
	p.log(9, 10)
	sick(t, "wal-hole", health.Critical, ask, func(fix string) {
		if !strings.Contains(fix, "pgkeep delete the older backups") {
			t.Errorf("fix: %s", fix)
		}
		now = at.Add(8 * day)
		p.log(11)
		fourth := p.take(now, 11, 11, 0)
		p.test(fourth, now, true)
		for _, old := range []repo.Ref{first, third} {
			_, err := p.r.Delete(t.Context(), old, time.Now())
			p.must(err)
		}
	})

	future := p.take(now.Add(300*day), 11, 11, 0)
	sick(t, "clock-skew", health.Critical, ask, func(fix string) { p.delete(future, fix) })
	damaged := p.take(now, 11, 11, 3)
	sick(t, "page-damage", health.Critical, ask, func(fix string) { p.delete(damaged, fix) })
	stuck := p.take(now, 11, 13, 0)
	p.log(13)
	sick(t, "backup-stuck", health.Critical, ask, func(fix string) { p.delete(stuck, fix) })
	if found := ask(); slices.ContainsFunc(found, func(f health.Finding) bool { return f.Name == "backup-stuck" }) {
		t.Errorf("found %+v", found)
	}

	// One whose manifest is not what was signed.
	broken := p.take(now, 11, 11, 0)
	key := "clusters/main/backups/" + string(broken.ID) + "/manifest.json"
	text, err := store.ReadAll(t.Context(), p.st, key, store.Range{})
	p.must(err)
	p.must(os.WriteFile(filepath.Join(p.data, key), append([]byte("{"), text...), 0o600))
	sick(t, "backup-damaged", health.Critical, ask, func(fix string) { p.delete(broken, fix) })
}
