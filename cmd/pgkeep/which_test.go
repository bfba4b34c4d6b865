package main

import (
	"errors"
	"testing"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/repo"
)

func TestWhich(t *testing.T) {
	for _, c := range []struct {
		name               string
		configured, stored []string
		want               string
		kind               fail.Kind
	}{
		{name: "", configured: []string{"main"}, stored: []string{"crm", "main"}, want: "main"},
		{name: "", stored: []string{"crm"}, want: "crm"},
		{name: "", configured: []string{"main", "web"}, stored: []string{"crm"}, want: "crm"},
		{name: "", configured: []string{"main", "web"}, stored: []string{"main", "web"}, kind: fail.BadConfig},
		{name: "", configured: []string{"main", "web"}, kind: fail.BadConfig},
		{name: "", kind: fail.NoBackup},
		{name: "crm", configured: []string{"main"}, stored: []string{"crm"}, want: "crm"},
		{name: "main", configured: []string{"main"}, want: "main"},
		{name: "mian", configured: []string{"main"}, kind: fail.BadConfig},
	} {
		got, err := which(c.name, c.configured, c.stored)
		if got != c.want || fail.KindOf(err) != c.kind || (err != nil) != (c.kind != "") {
			t.Errorf("which(%q, %q, %q) = %q, %v; want %q and kind %q", c.name, c.configured, c.stored, got, err, c.want, c.kind)
		}
	}
}

func TestPick(t *testing.T) {
	listed := func(id repo.ID) repo.Listed {
		return repo.Listed{Manifest: repo.Manifest{Ref: repo.Ref{Cluster: "main", ID: id}}}
	}
	older, newer, running := listed("20261120T013000Z-aaaaaaaa"), listed("20261122T013000Z-bbbbbbbb"), listed("20261122T020000Z-cccccccc")
	running.Unfinished = true
	planted := listed("20261123T000000Z-dddddddd")
	planted.Err = fail.Untrusted
	all := []repo.Listed{older, newer, running}
	for _, c := range []struct {
		what string
		all  []repo.Listed
		want repo.ID
		kind fail.Kind
	}{
		{what: "20261120T013000Z-aaaaaaaa", all: all, want: older.ID},
		{what: "20261120", all: all, want: older.ID},
		{what: "20261122T02", all: all, want: running.ID},
		{what: "latest", all: all, want: newer.ID},
		{what: "latest", all: append(all[:3:3], planted), want: planted.ID}, // not an older one in its place
		{what: "latest", all: []repo.Listed{running}, kind: fail.NoBackup},
		{what: "latest", kind: fail.NoBackup},
		{what: "20261122", all: all, kind: fail.BadConfig},
		{what: "", all: []repo.Listed{older}, kind: fail.NoBackup},
		{what: "bbbbbbbb", all: all, kind: fail.NoBackup},
	} {
		got, err := pick(c.all, c.what)
		if got.ID != c.want || fail.KindOf(err) != c.kind || (err != nil) != (c.kind != "") {
			t.Errorf("pick(%d backups, %q) = %q, %v; want %q and kind %q", len(c.all), c.what, got.ID, err, c.want, c.kind)
		}
	}
	if _, err := finished(planted); !errors.Is(err, fail.Untrusted) {
		t.Errorf("finished of a manifest that is not trusted = %v", err)
	}
	if _, err := finished(running); !errors.Is(err, fail.NoBackup) {
		t.Errorf("finished of an unfinished backup = %v", err)
	}
}
