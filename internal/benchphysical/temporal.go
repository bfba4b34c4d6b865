package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/pgkeep/pgkeep/internal/compare"
	"github.com/pgkeep/pgkeep/internal/lab"
)

// throughTemporal compares backups that a worker takes with those that the
// command takes itself. Nothing has changed between them.
func (b *bench) throughTemporal(ctx context.Context) (err error) {
	t, err := lab.StartTemporal(ctx, lab.TemporalOptions{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.Stop()) }()
	keeper, err := b.PgKeep(ctx, "temporal", compare.Options{Conninfo: b.pg.Conninfo(),
		Temporal: fmt.Sprintf("{address: '%s', namespace: %s, ui_url: '%s'}", t.Address, t.Namespace, t.UIURL)})
	if err != nil {
		return err
	}
	line := b.program + " --config " + keeper.Config
	var said bytes.Buffer
	worker := b.Command(ctx, b.Dir, "exec "+line+" worker")
	worker.Stdout, worker.Stderr = &said, &said
	if err := worker.Start(); err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, worker.Process.Signal(syscall.SIGTERM))
		if werr := worker.Wait(); err != nil {
			err = fmt.Errorf("%w; worker: %v\n%s", err, werr, said.Bytes())
		}
	}()
	if err := errors.Join(b.settle(ctx), b.archiver(keeper.Archive)); err != nil {
		return err
	}
	var through, direct []float64
	for n := range b.temporal + 1 {
		for _, how := range []string{"", "--direct "} {
			began := time.Now()
			if err := b.Run(ctx, b.Dir, strings.TrimSpace(line+" backup "+how+"main")); err != nil {
				return err
			}
			switch took := time.Since(began).Seconds(); {
			case n == 0: // the first has everything to store
			case how == "":
				through = append(through, took)
			default:
				direct = append(direct, took)
			}
		}
	}
	more := median(through) - median(direct)
	fmt.Printf("\nBackup with nothing changed, %d pairs: %.2f s through Temporal, %.2f s with --direct; %.2f s more\n", b.temporal, median(through), median(direct), more)
	b.want(more <= 1, "through Temporal it takes %.2f s more than directly; at most 1", more)
	return b.archiver("exit 0")
}
