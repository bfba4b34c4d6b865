package repo

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"io"
	"testing"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/seal"
)

// What comes from the bucket may be anything. A parser that takes it answers
// for every index and length in it.

func FuzzFooter(f *testing.F) {
	good := footer{Header: Header{Type: "pack", Format: 1}, Backup: "b", Number: 1, Seed: 7,
		Files:  []packFile{{"a", 100, 100}, {"b", 8192*20 + 1, 8192}},
		Frames: []frame{{File: 0, Stored: 50, Content: 100, Blocks: []run{{0, 1}}}, {File: 1, Stored: 9, Content: 8193, Blocks: []run{{3, 1}, {20, 1}}}}, ids: make([]seal.BlockID, 3)}
	b, err := good.encode()
	if err != nil {
		f.Fatal(err)
	}
	if _, err := decodeFooter(b); err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add([]byte("{}\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		foot, err := decodeFooter(b)
		if err != nil {
			if !errors.Is(err, fail.Corrupt) && !errors.Is(err, fail.Unsupported) {
				t.Errorf("err = %v: of no kind", err)
			}
			return
		}
		ids := foot.ids
		for _, fr := range foot.Frames {
			file, n := foot.Files[fr.File], int64(0)
			for _, r := range fr.Blocks {
				for b := r[0]; b < r[0]+r[1]; b++ {
					if file.length(b) < 1 || file.length(b) > file.Block {
						t.Fatalf("block %d of %+v has %d bytes", b, file, file.length(b))
					}
					n += file.length(b)
				}
			}
			if n != int64(fr.Content) {
				t.Fatalf("frame of %d bytes has blocks of %d", fr.Content, n)
			}
			ids = ids[fr.blocks():]
		}
		if len(ids) != 0 {
			t.Fatal("ids left over")
		}
	})
}

func FuzzTree(f *testing.F) {
	f.Add([]byte(`{"pgkeep":"tree","format":1,"backup":"b"}
{"pack":{"key":"k","size":9,"data":1}}
{"entry":{"p":"a/b","m":384,"sz":10,"bs":10,"L":[[0,0,1,0]]}}
{"end":2}
`))
	f.Add([]byte(`{"pgkeep":"tree","format":1,"backup":"b"}
{"entry":{"p":"../etc/passwd","m":384,"sz":10,"bs":10}}
{"end":1}
`))
	f.Fuzz(func(t *testing.T, b []byte) {
		tree, err := newTreeReader(bytes.NewReader(b), "b")
		if err != nil {
			return
		}
		for {
			e, err := tree.next()
			if err != nil {
				return
			}
			if validPath(e.Path) != nil {
				t.Errorf("path %q", e.Path)
			}
			for _, l := range e.Layers {
				_ = tree.packs[l.Pack]
			}
			for _, z := range e.Zero {
				if e.runLength(z) < 1 || e.after(z) < 0 {
					t.Errorf("zero run %v of %+v", z, e)
				}
			}
		}
	})
}

func FuzzTail(f *testing.F) {
	buf := new(bytes.Buffer)
	b, err := newBuilder(buf, Header{Type: "pack", Format: 1}, "b", 1, 7, recipients{})
	if err == nil {
		err = b.add(packFile{"a", 3, 3}, []run{{0, 1}}, make([]seal.BlockID, 1), 3, []byte("xyz"))
	}
	if err == nil {
		err = b.finish("k")
	}
	if err != nil {
		f.Fatal(err)
	}
	r := new(Repo)
	if _, _, err := r.decodeTail(buf.Bytes(), int64(buf.Len()), nil); err != nil {
		f.Fatal(err)
	}
	f.Add(buf.Bytes(), int64(buf.Len()))
	f.Fuzz(func(t *testing.T, tail []byte, size int64) {
		if foot, p, err := r.decodeTail(tail, size, nil); err == nil && (foot == nil || p.Data > size) {
			t.Errorf("pack %+v", p)
		}
	})
}

func FuzzWALHeader(f *testing.F) {
	signer, err := seal.NewSigner()
	if err != nil {
		f.Fatal(err)
	}
	r := &Repo{access: Access{Signer: signer}}
	sign := func(line []byte) []byte {
		doc, err := signer.Sign(json.RawMessage(line))
		if err != nil {
			return line
		}
		return append(encodeSkip(int64(len(doc))), doc...)
	}
	f.Add([]byte(`{"pgkeep":"wal","format":1,"cluster":"main","system_id":"7","name":"n","size":1,"sha256":"AA=="}`), true)
	f.Add([]byte("\x50\x2a\x4d\x18\xff\xff\xff\xff"), false)
	f.Fuzz(func(t *testing.T, b []byte, signed bool) {
		if signed {
			b = sign(b) // else little gets past the signature
		}
		o := &walObject{ReadCloser: io.NopCloser(bytes.NewReader(b)), sum: sha256.New()}
		if _, err := r.readWALHeader(o); err != nil {
			if err = o.why(err); !errors.Is(err, fail.Corrupt) && !errors.Is(err, fail.Unsupported) {
				t.Errorf("err = %v: of no kind", err)
			}
		}
	})
}
