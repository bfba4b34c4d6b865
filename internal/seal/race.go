//go:build race

package seal

import (
	"runtime"
	"unsafe"
)

// used tells the race detector what a library did for one that is not to be shared.
// It does not look into that library itself: see RACE in the Makefile.
func used[T any](by *T, read, written []byte) {
	runtime.RaceWrite(unsafe.Pointer(by))
	if len(read) > 0 {
		runtime.RaceReadRange(unsafe.Pointer(&read[0]), len(read))
	}
	if len(written) > 0 {
		runtime.RaceWriteRange(unsafe.Pointer(&written[0]), len(written))
	}
}
