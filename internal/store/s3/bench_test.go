package s3_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"golang.org/x/sync/errgroup"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/store"
)

// 200 MB in objects of 16 MiB, four at a time: what an upload of packs does.
// The server runs on the same machine.
func BenchmarkPut(b *testing.B) {
	srv := lab.S3ForTest(b)
	st := open(b, options(srv))
	data := make([]byte, 16<<20)
	rand.NewChaCha8([32]byte{}).Read(data)
	for name, reader := range map[string]func() io.Reader{
		"seekable": func() io.Reader { return bytes.NewReader(data) },
		"streamed": func() io.Reader { return struct{ io.Reader }{bytes.NewReader(data)} },
	} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(13 * 16 << 20)
			for n := 0; b.Loop(); n++ {
				g, ctx := errgroup.WithContext(b.Context())
				g.SetLimit(4)
				for i := range 13 {
					g.Go(func() error { return st.Put(ctx, fmt.Sprintf("%s/%d/%d", name, n%3, i), reader(), store.PutOptions{}) })
				}
				if err := g.Wait(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
