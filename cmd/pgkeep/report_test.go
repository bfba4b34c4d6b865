package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/proof"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// What is left is the bucket and a key: the page is made of that.
func TestReportNeedsOnlyTheRepository(t *testing.T) {
	w := newWorld(t)
	tested, fresh := w.backup(), w.backup()
	w.prove(tested, time.Now(), true)
	var keys keysShown
	if err := json.Unmarshal([]byte(w.ok("key", "check", "--json")), &keys); err != nil {
		t.Fatal(err)
	}
	w.config = w.write("rescue.yaml", fmt.Sprintf("%s\nkeys: {trusted_signers: ['%s']}\ntemporal: {address: '127.0.0.1:9'}\n", w.repository(), keys.Signer))

	file := filepath.Join(w.dir, "report.html")
	if out := w.ok("report", "--output", file); out != "" {
		t.Errorf("report printed %q", out)
	}
	page, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{string(tested), string(fresh), ">proven ", ">unproven<", "Next runs are not known: connect to Temporal", w.s3.Bucket, "</html>"} {
		if !strings.Contains(string(page), want) {
			t.Errorf("%q is not in the page", want)
		}
	}
	w.fails(2, []string{`did you mean "main"?`}, "report", "--cluster", "mian")
	w.fails(1, []string{"write report"}, "report", "--output", filepath.Join(w.dir, "nowhere", "report.html"))
}

// repo opens the repository as the world's host does.
func (w *world) repo() *repo.Repo {
	w.t.Helper()
	cfg, err := config.Load(config.Options{File: w.config, Hostname: "db1"})
	if err != nil {
		w.t.Fatal(err)
	}
	r, err := open.Repository(w.t.Context(), cfg, "test")
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// prove writes what a restore test of a backup of the cluster main found.
func (w *world) prove(id repo.ID, at time.Time, passed bool) {
	w.t.Helper()
	rep := proof.Report{Started: at, Finished: at, Verdict: proof.Passed, RTO: 3, Checks: []proof.Check{{Name: proof.CheckRead, Verdict: proof.Passed}}}
	if !passed {
		rep.Verdict = proof.Failed
		rep.Checks[0] = proof.Check{Name: proof.CheckRead, Verdict: proof.Failed, Message: "1 table of 2 cannot be read"}
	}
	text, err := json.Marshal(rep)
	if err != nil {
		w.t.Fatal(err)
	}
	p := repo.Proof{Ref: repo.Ref{Cluster: "main", ID: id}, Test: repo.NewID(at, "0badcafe"), Host: "db1", FinishedAt: at, Passed: passed, Report: text}
	if err := w.repo().WriteProof(w.t.Context(), p); err != nil {
		w.t.Fatal(err)
	}
}
