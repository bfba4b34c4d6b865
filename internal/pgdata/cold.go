package pgdata

import (
	"os"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"
)

// granule is the unit in which the page cache is left as it was.
const granule = 128 << 10

// cold tells which granules of a file the kernel did not hold in memory when it
// was opened. What we read of those is of use to nobody else: the pages that
// PostgreSQL works with are there already, and ours would push them out.
type cold []bool

// coldIn asks the kernel about a file that is about to be read from beginning to
// end. Where it does not answer, nothing is cold: mincore says of files that
// are not ours that all is there.
func coldIn(f *os.File, size int64) cold {
	if size < granule {
		return nil
	}
	unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_SEQUENTIAL) // advice: an error changes nothing
	m, err := unix.Mmap(int(f.Fd()), 0, int(size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil
	}
	defer unix.Munmap(m)
	c := make(cold, (size+granule-1)/granule)
	page := os.Getpagesize()
	there := make([]byte, granule/page)
	for i := range c {
		part := m[i*granule : min((i+1)*granule, len(m))]
		pages := there[:(len(part)+page-1)/page]
		_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&part[0])), uintptr(len(part)), uintptr(unsafe.Pointer(&pages[0])))
		if errno != 0 {
			return nil
		}
		c[i] = !slices.ContainsFunc(pages, func(b byte) bool { return b&1 != 0 })
	}
	return c
}

// drop tells the kernel that what was read is not needed again, where it was
// cold. Only whole granules go, so that reads of any size fit together.
func (c cold) drop(f *os.File, from, to, size int64) {
	if to == size {
		to = int64(len(c)) * granule
	}
	i, end := (from+granule-1)/granule, min(to/granule, int64(len(c)))
	for i < end {
		run := i
		for run < end && c[run] {
			run++
		}
		if run > i {
			unix.Fadvise(int(f.Fd()), i*granule, (run-i)*granule, unix.FADV_DONTNEED)
		}
		i = run + 1
	}
}
