package store

import (
	"context"
	"time"
)

// A Lock keeps an object from being destroyed until some time: S3 calls it Object
// Lock. In a store that keeps versions a locked object can be deleted; what it was
// is there still, as an older version. The zero Lock locks nothing.
type Lock struct {
	Until time.Time
	Mode  LockMode
}

// LockMode says who may end a lock early: in GOVERNANCE whoever has a right of its
// own for that, in COMPLIANCE nobody.
type LockMode string

// The modes there are.
const (
	Governance LockMode = "GOVERNANCE"
	Compliance LockMode = "COMPLIANCE"
)

// A Locker is a Store that can lock objects. Its methods fail with ErrNotExist if
// there is no such object, and with fail.StoreUnfit if objects cannot be locked in
// this place.
type Locker interface {
	// Locked returns the lock of an object.
	Locked(ctx context.Context, key string) (Lock, error)
	// Lock locks an object until then at least. It never shortens a lock, and an
	// object that is locked in the other mode stays in that.
	Lock(ctx context.Context, key string, lock Lock) error
}
