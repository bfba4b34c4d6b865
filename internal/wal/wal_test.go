package wal_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/fault"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
	"github.com/pgkeep/pgkeep/internal/wal"
)

var (
	ctx    = context.Background()
	server = wal.Server{System: 7_300_000_000_000_000_001, Major: 15, Timeline: 1, SegmentSize: 1 << 20}
)

// access is that of a host whose key is always the same.
func access(t *testing.T) repo.Access {
	t.Helper()
	signer, err := seal.ParseSigner("PGKEEP-SIGNING-KEY:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA")
	if err != nil {
		t.Fatal(err)
	}
	return repo.Access{Signer: signer, Version: "1.2.3"}
}

func archiveIn(t *testing.T, st store.Store) *repo.Repo {
	t.Helper()
	r, _, err := repo.Init(ctx, st, access(t), nil, time.Date(2026, 11, 22, 1, 30, 0, 0, time.UTC))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// content makes a file that fits its name.
func content(t *testing.T, name string) []byte {
	t.Helper()
	n, err := pg.ParseWALName(name)
	if err != nil {
		t.Fatal(err)
	}
	switch n.Kind {
	case pg.History:
		return fmt.Appendf(nil, "%d\t0/4A0B0C0\tno recovery target specified\n", n.Timeline-1) // in segment 4A
	case pg.BackupHistory:
		return []byte("START WAL LOCATION: 0/4200028 (file 000000010000000000000042)\n")
	}
	start, err := n.Start(server.SegmentSize)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, server.SegmentSize)
	le := binary.LittleEndian
	le.PutUint16(b, 0xD110)
	le.PutUint16(b[2:], 2)
	le.PutUint32(b[4:], 1)
	le.PutUint64(b[8:], uint64(start))
	le.PutUint64(b[24:], uint64(server.System))
	le.PutUint32(b[32:], uint32(server.SegmentSize))
	le.PutUint32(b[36:], 8192)
	return b
}

// push archives a file as the one server there is.
func push(t *testing.T, r *repo.Repo, name string, b []byte) error {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return (wal.Pusher{Cluster: "main", DataDir: serverDir(t), Connect: archiver(r)}).Push(ctx, path)
}

func TestEveryKindOfFileComesBack(t *testing.T) {
	r := archiveIn(t, new(store.Mem))
	for _, name := range []string{"000000010000000000000042", "000000010000000000000042.partial", "000000010000000000000042.00000028.backup", "00000002.history"} {
		b := content(t, name)
		if err := push(t, r, name, b); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "RECOVERYXLOG")
		if err := wal.Fetch(ctx, r, "main", server, name, path); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, b) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}

func TestPushRefusesWhatCannotBe(t *testing.T) {
	const name = "000000010000000000000042"
	change := func(at int, by byte) []byte {
		b := content(t, name)
		b[at] += by
		return b
	}
	for what, tt := range map[string]struct {
		name string
		b    []byte
		want fail.Kind
	}{
		"another system":       {name, change(24, 1), fail.WrongSystem},
		"another major":        {name, change(0, 3), fail.WrongSystem},
		"another segment size": {name, change(34, 0x10), fail.WrongSystem},
		"another page address": {name, change(10, 0x10), fail.Corrupt},
		"a later timeline":     {name, change(4, 1), fail.Corrupt},
		"too short":            {name, content(t, name)[:8192], fail.Corrupt},
		"too long":             {name, append(content(t, name), 0), fail.Corrupt},
		"nothing":              {name, nil, fail.Corrupt},
		"no history":           {"00000003.history", []byte("3\t0/1\tx\n"), fail.Corrupt},
		"no note of a backup":  {name + ".00000028.backup", []byte("hello"), fail.Corrupt},
		"no name":              {"xlogtemp.123", content(t, name), fail.BadConfig},
	} {
		st := new(store.Mem)
		r := archiveIn(t, st)
		if err := push(t, r, tt.name, tt.b); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", what, err, tt.want)
		}
		for o := range st.List(ctx, "clusters/", "") {
			t.Errorf("%s: %s was written", what, o.Key)
		}
	}
}

func TestC4AbsenceIsProvedOrAnError(t *testing.T) {
	const seg = "0000000100000000000000"
	const third, fifth = "00000003.history", "00000005.history" // of the first, the second and all between
	newer := server
	newer.Timeline = 2
	for what, tt := range map[string]struct {
		archived []string
		name     string
		server   wal.Server
		want     error
	}{
		"a history that a later one names":           {[]string{seg + "41", third}, "00000002.history", server, fail.Corrupt},
		"one that names it behind another gap":       {[]string{seg + "41", "00000002.history", fifth}, "00000004.history", server, fail.Corrupt},
		"a history behind all":                       {[]string{seg + "41", third}, "00000004.history", server, wal.ErrAbsent},
		"a history that nobody needs any more":       {[]string{seg + "41", third}, "00000002.history", newer, wal.ErrAbsent},
		"the tail before a fork, and a history gone": {[]string{seg + "41", third}, seg + "49", server, fail.Corrupt},
		"the end of the log, and a history gone":     {[]string{seg + "41", third}, seg + "4A", server, wal.ErrAbsent},
		"the tail of a timeline without a history":   {[]string{seg + "41", third}, "00000002000000000000004B", server, fail.Corrupt},
		"the end of the log":                         {[]string{seg + "41"}, seg + "42", server, wal.ErrAbsent},
		"only its partial":                           {[]string{seg + "41", seg + "42.partial"}, seg + "42", server, wal.ErrAbsent},
		"a hole":                                     {[]string{seg + "41", seg + "43"}, seg + "42", server, fail.Corrupt},
		"a hole before a partial":                    {[]string{seg + "43.partial"}, seg + "42", server, fail.Corrupt},
		"a hole before a base backup":                {[]string{seg + "43.00000028.backup"}, seg + "42", server, fail.Corrupt},
		"a hole before a fork":                       {[]string{"00000002.history"}, seg + "49", server, fail.Corrupt},
		"the segment of a fork":                      {[]string{"00000002.history"}, seg + "4A", server, wal.ErrAbsent},
		"a hole before a later fork":                 {[]string{"00000002.history", "00000003.history"}, "000000020000000000000049", server, fail.Corrupt},
		"a segment after a fork":                     {[]string{"00000002.history", "00000002000000000000004C"}, seg + "4B", server, wal.ErrAbsent},
		"nothing of this system":                     {nil, seg + "42", server, fail.WrongSystem},
		"no newer timeline":                          {[]string{seg + "41"}, "00000002.history", server, wal.ErrAbsent},
		"a timeline without its history":             {[]string{"00000002000000000000004B"}, "00000002.history", server, fail.Corrupt},
		"the server's own, older than it all":        {[]string{"00000002000000000000004B"}, "00000002.history", newer, wal.ErrAbsent},
	} {
		r := archiveIn(t, new(store.Mem))
		for _, name := range tt.archived {
			b := content(t, name)
			switch name {
			case third:
				b = []byte("1\t0/4A0B0C0\tx\n2\t0/4C0B0C0\tx\n")
			case fifth:
				b = []byte("1\t0/4A0B0C0\tx\n4\t0/4C0B0C0\tx\n")
			}
			if err := push(t, r, name, b); err != nil {
				t.Fatal(err)
			}
		}
		dir := t.TempDir()
		if err := wal.Fetch(ctx, r, "main", tt.server, tt.name, filepath.Join(dir, "x")); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", what, err, tt.want)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%s: left behind %v (%v)", what, left, err)
		}
	}
}

// Whichever call of the store fails, absence is not what comes of it.
func TestC4NoFailureIsAbsence(t *testing.T) {
	mem := new(store.Mem)
	r := archiveIn(t, mem)
	for _, name := range []string{"000000010000000000000041", "00000002.history"} {
		if err := push(t, r, name, content(t, name)); err != nil {
			t.Fatal(err)
		}
	}
	for n := 1; ; n++ {
		f := &fault.Store{Store: mem, At: n}
		r, err := repo.Open(ctx, f, access(t))
		if err == nil {
			err = wal.Fetch(ctx, r, "main", server, "00000001000000000000004A", filepath.Join(t.TempDir(), "x"))
		}
		if !f.Hit() {
			if !errors.Is(err, wal.ErrAbsent) || n < 6 {
				t.Errorf("undisturbed, with %d calls: %v", n, err)
			}
			return
		}
		if !errors.Is(err, fault.ErrInjected) || errors.Is(err, wal.ErrAbsent) {
			t.Errorf("call %d fails: %v", n, err)
		}
	}
}

// torn is a store whose lists of the first timeline break off.
type torn struct {
	store.Store
	after, listed int
}

func (s *torn) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		for o, err := range s.Store.List(ctx, prefix, after) {
			if strings.HasSuffix(prefix, "/00000001/") {
				if s.listed == s.after {
					yield(store.Object{}, context.DeadlineExceeded)
					return
				}
				s.listed++
			}
			if !yield(o, err) {
				return
			}
		}
	}
}

// A hole that is proved stays one, whatever becomes of the list behind it; and
// that is not listed to its end.
func TestC4AHoleIsNoOutage(t *testing.T) {
	mem := new(store.Mem)
	r := archiveIn(t, mem)
	const name = "000000010000000000000043"
	if err := push(t, r, name, content(t, name)); err != nil {
		t.Fatal(err)
	}
	for n := range 3000 {
		key := fmt.Sprintf("clusters/main/wal/%v-15/00000001/00000001%08X%08X.zst", server.System, 1, n)
		if err := mem.Put(ctx, key, strings.NewReader("x"), store.PutOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, after := range []int{0, 1, 500, 5000} {
		st := &torn{Store: mem, after: after}
		r, err := repo.Open(ctx, st, access(t))
		if err != nil {
			t.Fatal(err)
		}
		err = wal.Fetch(ctx, r, "main", server, "000000010000000000000042", filepath.Join(t.TempDir(), "x"))
		if hole := errors.Is(err, fail.Corrupt); hole != (after > 0) || errors.Is(err, context.DeadlineExceeded) == hole || errors.Is(err, wal.ErrAbsent) {
			t.Errorf("the list breaks off after %d: %v", after, err)
		}
		if st.listed > 1100 {
			t.Errorf("%d objects were listed", st.listed)
		}
	}
}
