// Command bench measures pgkeep beside a yardstick, in one run, and prints
// ratios: seconds alone say more about the machine.
//
// Storing a dump (read, hash, compress, encrypt, send to an S3 server over TLS,
// on the same processors) is compared with zstd -1 -T0 over the same files into
// nothing.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"syscall"
	"time"

	"filippo.io/age"

	"github.com/pgkeep/pgkeep/internal/lab"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
	"github.com/pgkeep/pgkeep/internal/store/s3"
)

func main() {
	size := flag.Int64("size", 2<<30, "bytes of the dump")
	runs := flag.Int("runs", 3, "pairs of runs")
	flag.Parse()
	run := func() error { return compare(*size, *runs) }
	if flag.Arg(0) == "store" {
		run = store
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// A job is what the measured process is told on its standard input.
type job struct {
	Dir string
	S3  s3.Options
	ID  repo.ID
}

// A measure is what a run took.
type measure struct {
	Seconds float64
	CPU     float64 // seconds of user and system time
	Memory  int64   // largest resident set, bytes
	Stored  int64   // bytes
}

// compare runs both, one after the other, and prints medians.
func compare(size int64, runs int) error {
	ctx := context.Background()
	dir, err := os.MkdirTemp("", "pgkeep-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	files, err := dump(filepath.Join(dir, "dump"), size)
	if err != nil {
		return err
	}
	server, err := lab.StartS3(ctx, lab.S3Options{Dir: filepath.Join(dir, "s3")})
	if err != nil {
		return err
	}
	defer server.Stop()
	self, err := os.Executable()
	if err != nil {
		return err
	}
	fmt.Printf("%d MB of dump in %d files; %d processors; S3 server on the same ones\n\n", size>>20, len(files), runtime.NumCPU())
	fmt.Printf("%-24s %9s %9s %9s %9s\n", "", "MB/s", "CPU s", "peak MB", "stored MB")
	var ours, theirs []measure
	for n := range runs {
		var out bytes.Buffer
		z, err := timed(exec.Command("zstd", append([]string{"-1", "-T0", "-q", "-c"}, files...)...), nil, io.Discard)
		if err != nil {
			return err
		}
		p, err := timed(exec.Command(self, "store"), job{filepath.Join(dir, "dump"), s3.Options{Bucket: server.Bucket, Prefix: fmt.Sprint("run", n),
			Endpoint: server.Endpoint, Region: server.Region, PathStyle: true, CAFile: server.CAFile,
			AccessKeyID: server.AccessKeyID, SecretAccessKey: server.SecretAccessKey}, repo.NewID(time.Now(), fmt.Sprintf("%08x", n))}, &out)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(out.Bytes(), &p.Stored); err != nil {
			return err
		}
		theirs, ours = append(theirs, z), append(ours, p)
		z.print("zstd -1 -T0", size)
		p.print("pgkeep store", size)
	}
	zstd, pgkeep := median(theirs), median(ours)
	fmt.Printf("\nthroughput as a ratio to zstd -1 -T0, of medians: %.2f\n", zstd.Seconds/pgkeep.Seconds)
	fmt.Printf("processors kept busy: %.2f of %d\n", pgkeep.CPU/pgkeep.Seconds, runtime.NumCPU())
	return nil
}

func (m measure) print(what string, size int64) {
	fmt.Printf("%-24s %9.0f %9.2f %9d %9d\n", what, float64(size)/m.Seconds/(1<<20), m.CPU, m.Memory>>20, m.Stored>>20)
}

func median(all []measure) measure {
	slices.SortFunc(all, func(a, b measure) int { return int((a.Seconds - b.Seconds) * 1e9) })
	return all[len(all)/2]
}

// timed runs a command and asks the system what it took.
func timed(cmd *exec.Cmd, in any, out io.Writer) (m measure, err error) {
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return m, err
		}
		cmd.Stdin = bytes.NewReader(b)
	}
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	began := time.Now()
	if err := cmd.Run(); err != nil {
		return m, fmt.Errorf("%s: %w", cmd.Path, err)
	}
	m.Seconds = time.Since(began).Seconds()
	m.CPU = (cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime()).Seconds()
	m.Memory = cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10
	return m, nil
}

// store is the measured process: it stores one dump as pgkeep's Upload does.
func store() error {
	ctx := context.Background()
	var j job
	if err := json.NewDecoder(os.Stdin).Decode(&j); err != nil {
		return err
	}
	bucket, err := s3.Open(ctx, j.S3)
	if err != nil {
		return err
	}
	signer, err := seal.NewSigner()
	if err != nil {
		return err
	}
	metadata, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	operator, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	r, _, err := repo.Init(ctx, bucket, repo.Access{Encrypted: true, Signer: signer, Metadata: metadata, Version: "bench"},
		[]string{operator.Recipient().String()}, time.Now())
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(j.Dir)
	if err != nil {
		return err
	}
	files, err := repo.ListFiles(root.FS())
	if err != nil {
		return err
	}
	c, err := r.Write(ctx, repo.Writing{Ref: repo.Ref{Cluster: "bench", ID: j.ID}, Root: root}, files)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(c.Stored)
}

// dump writes files like those of pg_dump --format=directory --compress=0: rows
// of numbers, dates, words and hashes. It compresses about as tables do.
func dump(dir string, size int64) (files []string, err error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	const count = 12
	for n := range int64(count) {
		name := filepath.Join(dir, fmt.Sprintf("%d.dat", 4000+n))
		if err := table(name, size/count, uint64(n)); err != nil {
			return nil, err
		}
		files = append(files, name)
	}
	return files, nil
}

func table(name string, size int64, seed uint64) error {
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	defer f.Close()
	w := bufio.NewWriterSize(f, 1<<20)
	rnd := rand.New(rand.NewPCG(seed, 7))
	words := []string{"alpha", "bravo", "charlie", "delta", "echo", "foxtrot", "golf", "hotel", "india", "juliet"}
	for row, written := int64(1), int64(0); written < size; row++ {
		n, err := fmt.Fprintf(w, "%d\t%d\t2026-%02d-%02d %02d:%02d:%02d+00\t%s %s %s\t%016x\t%d.%02d\t\\N\n", row, rnd.IntN(100_000), 1+rnd.IntN(12), 1+rnd.IntN(28),
			rnd.IntN(24), rnd.IntN(60), rnd.IntN(60), words[rnd.IntN(10)], words[rnd.IntN(10)], words[rnd.IntN(10)], rnd.Uint64(), rnd.IntN(10_000), rnd.IntN(100))
		if err != nil {
			return err
		}
		written += int64(n)
	}
	return w.Flush()
}
