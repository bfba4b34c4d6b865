package wal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
)

// A Pusher archives the files of one data directory.
type Pusher struct {
	// Connect returns what puts files into the archive in the name of an
	// instance. It is not called where a local record says all there is to say.
	Connect func(ctx context.Context, a repo.Archive, instance string) (*repo.Archiver, error)
	// Place says where the repository is, and as whom it is reached: a local
	// record made with another one does not count.
	Place   string
	Cluster string
	Host    string // for people, who want to know who claimed a timeline
	DataDir string
	// Parallel is how many files go up at a time. 0: as many as cores and
	// memory are good for. 1: only the one that is asked for.
	Parallel int
	// Spawn starts a process that calls PushAhead, without waiting for it. It is
	// called where several files wait and nobody seems to be at them. Nil, or an
	// error: Push sends a few of them itself.
	Spawn func(after pg.WALName) error
}

// A push is what a Pusher knows once it has looked around.
type push struct {
	Pusher
	server   Server
	instance Instance
	archiver *repo.Archiver
	// When the claim on the server's timeline was asked for and found to be this
	// instance's, in nanoseconds. For a moment it is not asked for again: a process
	// that sends many files would do so for each.
	confirmed atomic.Int64
}

func (p Pusher) begin() (*push, error) {
	s, err := ReadServer(p.DataDir)
	if err != nil {
		return nil, err
	}
	i, err := OpenInstance(p.DataDir)
	if err != nil {
		return nil, err
	}
	return &push{Pusher: p, server: s, instance: i}, nil
}

func (p *push) connect(ctx context.Context) (err error) {
	p.archiver, err = p.Connect(ctx, p.server.archive(p.Cluster), p.instance.ID)
	return err
}

// Push archives the file at path, which PostgreSQL calls by the last part of it.
// When it returns nil, the whole file is durable in the repository. A file that
// cannot be one of this server is refused before anything is sent:
// fail.WrongSystem if it is another's, fail.Corrupt if it is none. So is one of a
// timeline that another instance has claimed, with fail.TimelineTaken.
//
// Files that wait behind it go up meanwhile, in a process of its own; or Push
// sends some of them, and waits for those it has begun. What becomes of them says
// nothing about its own file.
func (p Pusher) Push(ctx context.Context, path string) error {
	n, err := pg.ParseWALName(filepath.Base(path))
	if err != nil {
		return fail.With(fail.BadConfig, err)
	}
	j, err := p.begin()
	if err != nil {
		return err
	}
	inPlace := filepath.Clean(path) == j.path(n)
	if inPlace && j.archived(ctx, n) {
		j.keepAhead(j.following(n))
		return nil
	}
	if err := j.connect(ctx); err != nil {
		return err
	}
	alone := !inPlace || j.keepAhead(n)
	ahead, cancel := context.WithCancel(ctx)
	var g sync.WaitGroup
	defer g.Wait()
	slots := make(chan struct{}, j.parallel())
	slots <- struct{}{}
	if !alone {
		g.Go(func() { j.lookAhead(ahead, n, slots) })
	}
	_, _, err = j.push(ctx, n, path)
	<-slots
	if err != nil {
		cancel()
		return fmt.Errorf("push %v: %w", n, err)
	}
	g.Wait()
	cancel()
	return nil
}

func (p *push) path(n pg.WALName) string { return filepath.Join(p.DataDir, "pg_wal", n.String()) }

// push archives one file, and returns what it was before it was read, and its
// SHA-256.
func (p *push) push(ctx context.Context, n pg.WALName, path string) (info fs.FileInfo, sum []byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, nil, err
	}
	defer f.Close()
	info, err = f.Stat()
	if err != nil {
		return nil, nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxFile {
		return nil, nil, fmt.Errorf("%s: %d bytes, %v: %w", path, info.Size(), info.Mode(), fail.Corrupt)
	}
	content, err := p.checked(n, f, info)
	if err != nil {
		if errors.Is(err, fail.Corrupt) {
			err = fail.Hint(err, "the file in the data directory is not what its name says, and nothing was sent; is the disk sound?")
		}
		return nil, nil, err
	}
	sum, err = p.archiver.Put(ctx, repo.WALFile{Name: n, Size: info.Size(), Content: content,
		May: func(ctx context.Context) error { return p.may(ctx, n) }})
	return info, sum, err
}

// checked returns a reader of a file whose beginning can be what the name says.
func (p *push) checked(n pg.WALName, f *os.File, info fs.FileInfo) (io.Reader, error) {
	head := make([]byte, min(info.Size(), pg.PageHeaderSize))
	if n.Kind == pg.History || n.Kind == pg.BackupHistory {
		head = make([]byte, min(info.Size(), maxText+1)) // all there is
	}
	if _, err := io.ReadFull(f, head); err != nil {
		return nil, err
	}
	if err := check(n, p.server, head, info.Size()); err != nil {
		return nil, err
	}
	return io.MultiReader(bytes.NewReader(head), f, unchanged{f, info, head}), nil
}

// unchanged is the empty end of a file, or an error if the file became another
// while it was read: PostgreSQL recycles segments.
type unchanged struct {
	f    *os.File
	info fs.FileInfo
	head []byte
}

func (u unchanged) Read([]byte) (int, error) {
	info, err := u.f.Stat()
	if err != nil {
		return 0, err
	}
	head := make([]byte, len(u.head))
	if _, err := u.f.ReadAt(head, 0); err != nil {
		return 0, err
	}
	if info.Size() != u.info.Size() || !info.ModTime().Equal(u.info.ModTime()) || !bytes.Equal(head, u.head) {
		return 0, errors.New("the file changed while it was read")
	}
	return 0, io.EOF
}
