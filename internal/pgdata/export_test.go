package pgdata

import "os"

// Cold tells which 128 KiB of a file are not in memory at all.
func Cold(f *os.File, size int64) []bool { return coldIn(f, size) }
