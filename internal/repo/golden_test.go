package repo_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"testing"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store"
)

// What was written before there were physical backups can be read.
func TestOlderRepositoryIsRead(t *testing.T) {
	st := new(store.Mem)
	root := os.DirFS("testdata/format1/repository")
	err := fs.WalkDir(root, ".", func(p string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := fs.ReadFile(root, p)
		if err == nil {
			err = st.Put(ctx, p, bytes.NewReader(b), store.PutOptions{})
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	var keys struct {
		Metadata, Operator string
		SigningKey         string `json:"signing_key"`
	}
	b, err := os.ReadFile("testdata/format1/keys.json")
	if err == nil {
		err = json.Unmarshal(b, &keys)
	}
	if err != nil {
		t.Fatal(err)
	}
	signer, err := seal.ParseSigner(keys.SigningKey)
	if err != nil {
		t.Fatal(err)
	}
	operator, err := age.ParseX25519Identity(keys.Operator)
	if err != nil {
		t.Fatal(err)
	}
	r, err := repo.Open(ctx, st, repo.Access{Encrypted: true, Trusted: []seal.PublicKey{signer.Public()}, Identities: []age.Identity{operator}})
	if err != nil {
		t.Fatal(err)
	}
	if err := verify(r, ref); err != nil {
		t.Error(err)
	}
	m, err := r.Backup(ctx, ref)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := extract(t, r, m); err != nil || !same(goldenFiles(), got) {
		t.Errorf("restored files differ, %v", err)
	}
}

// goldenFiles is what testdata/format1 holds.
func goldenFiles() map[string][]byte {
	files := make(map[string][]byte)
	x := uint32(1)
	for _, size := range []int{0, 1, 8192, 20_000, 64 << 10, 64<<10 + 1, 8192*20 + 5} {
		b := make([]byte, size)
		for i := range b {
			x = x*1664525 + 1013904223
			b[i] = "0123456789abcdef\n\t,.;"[(x>>24)%21]
		}
		if size > 100_000 {
			clear(b[8192*3 : 8192*9])
		}
		files[fmt.Sprintf("databases/app/%d.dat", size)] = b
	}
	files["globals.sql"] = []byte("CREATE ROLE app;\n")
	return files
}
