package restore

// WithFree is p where the file systems have that much room.
func (p Physical) WithFree(free func(dir string) (device uint64, free int64, err error)) Physical {
	p.free = free
	return p
}
