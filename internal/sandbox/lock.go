package sandbox

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pgkeep/pgkeep/internal/fail"
)

const (
	// lockName is the file that the user of a sandbox has locked.
	lockName = "lock"
	// badgeName is the file that the server and every process it starts inherit
	// open, and nobody else opens: so whatever is left of it can be found.
	badgeName = "badge"

	undying = 30 * time.Second // how long somebody who lives, or a killed process, is waited for
	poll    = 10 * time.Millisecond
)

// take locks a sandbox and ends what still runs in it. The lock goes when the
// file is closed, or with us. One who has it is waited for, and then it is
// fail.AlreadyRunning.
func take(ctx context.Context, dir string, wait time.Duration) (*os.File, error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = lock(ctx, f, wait)
	if err == nil && !atPath(f, path) {
		err = fmt.Errorf("lock %s: removed meanwhile: %w", path, fs.ErrNotExist)
	}
	if err == nil {
		err = endHolders(ctx, filepath.Join(dir, badgeName))
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func lock(ctx context.Context, f *os.File, wait time.Duration) error {
	for begun := time.Now(); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case !errors.Is(err, unix.EWOULDBLOCK):
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		case time.Since(begun) >= wait:
			return fmt.Errorf("sandbox %s is in use: %w", filepath.Dir(f.Name()), fail.AlreadyRunning)
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("lock %s: %w", f.Name(), err)
		}
	}
}

// pause waits a moment; it ends early with ctx.
func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(poll):
		return nil
	}
}

// atPath reports whether path still is the file that is open.
func atPath(f *os.File, path string) bool {
	open, err := f.Stat()
	if err != nil {
		return false
	}
	there, err := os.Stat(path)
	return err == nil && os.SameFile(open, there)
}

// endHolders kills the processes that have the file open, and waits until they
// have gone.
func endHolders(ctx context.Context, path string) error {
	file, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for begun := time.Now(); ; {
		pids := holders(file)
		if len(pids) == 0 {
			return nil
		}
		if time.Since(begun) > undying {
			return fmt.Errorf("process %d of an earlier attempt does not die: %w", pids[0], fail.AlreadyRunning)
		}
		for _, pid := range pids {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}

// holders lists the processes that have a file open, from /proc/<pid>/fd
// (proc(5)).
func holders(file os.FileInfo) (pids []int) {
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || pid == os.Getpid() {
			continue
		}
		fds, _ := filepath.Glob(dir + "/fd/*")
		for _, fd := range fds {
			if got, err := os.Stat(fd); err == nil && os.SameFile(got, file) {
				pids = append(pids, pid)
				break
			}
		}
	}
	return pids
}
