package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
)

const pageSize = 8192

// A pageSet knows the pages of a data directory by their hashes.
type pageSet struct {
	seed   maphash.Seed
	hashes map[string][]uint64 // by path
}

func pages(dir string) (pageSet, error) {
	p := pageSet{maphash.MakeSeed(), make(map[string][]uint64)}
	return p, p.walk(dir, func(path string, _ []byte, h uint64) error {
		p.hashes[path] = append(p.hashes[path], h)
		return nil
	})
}

// walk visits the pages of all files that belong into a backup.
func (p pageSet) walk(dir string, visit func(path string, page []byte, hash uint64) error) error {
	buf := make([]byte, pageSize)
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if d != nil && d.IsDir() && d.Name() == "pg_wal" {
			return fs.SkipDir
		}
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for {
			n, err := io.ReadFull(f, buf)
			if n > 0 {
				if err := visit(path, buf[:n], maphash.Bytes(p.seed, buf[:n])); err != nil {
					return err
				}
			}
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	})
}

type changed struct {
	pages int
	bytes int64 // compressed
}

// compressed returns how many pages are others now, and what zstd -1 makes of
// all of them together.
func (p pageSet) compressed(ctx context.Context, dir string) (c changed, err error) {
	var out counter
	zstd := exec.CommandContext(ctx, "zstd", "-1", "-q", "-c")
	zstd.Stdout, zstd.Stderr = &out, os.Stderr
	in, err := zstd.StdinPipe()
	if err != nil {
		return c, err
	}
	if err := zstd.Start(); err != nil {
		return c, err
	}
	at := make(map[string]int)
	err = p.walk(dir, func(path string, page []byte, h uint64) error {
		n := at[path]
		at[path]++
		if had := p.hashes[path]; n < len(had) && had[n] == h || len(bytes.Trim(page, "\x00")) == 0 {
			return nil
		}
		c.pages++
		_, err := in.Write(page)
		return err
	})
	if err = errors.Join(err, in.Close(), zstd.Wait()); err != nil {
		return c, fmt.Errorf("pages that changed: %w", err)
	}
	c.bytes = int64(out)
	return c, nil
}

type counter int64

func (c *counter) Write(b []byte) (int, error) {
	*c += counter(len(b))
	return len(b), nil
}
