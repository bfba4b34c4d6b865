package s3

import (
	"context"
	"errors"
	"fmt"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

var _ store.Locker = (*Bucket)(nil)

var errNoLock = fail.Hint(fmt.Errorf("the bucket has no Object Lock: %w", fail.StoreUnfit), "turn Object Lock on, as pgkeep bucket suggest prints it, or take retention.lock out of the configuration")

// Locked implements store.Locker.
func (b *Bucket) Locked(ctx context.Context, key string) (lock store.Lock, err error) {
	if err = check(ctx, key); err == nil {
		err = b.try(ctx, "s3:GetObjectRetention", func() error {
			w := b.watch(ctx)
			defer w.stop()
			out, err := b.api.GetObjectRetention(w, &s3.GetObjectRetentionInput{Bucket: &b.bucket, Key: b.name(key)})
			if isCode(err, "NoSuchObjectLockConfiguration") {
				return nil
			}
			if err == nil && out.Retention != nil {
				lock = store.Lock{Until: aws.ToTime(out.Retention.RetainUntilDate), Mode: store.LockMode(out.Retention.Mode)}
			}
			return w.why(unlockable(err))
		})
	}
	if err != nil {
		return lock, fmt.Errorf("lock of %s: %w", key, err)
	}
	return lock, nil
}

// Lock implements store.Locker. One request is enough for an object that is to be
// locked for longer: without the right to bypass a lock, S3 refuses to shorten it,
// and then it is looked at. See "Locking objects with Object Lock" in the S3 User
// Guide.
func (b *Bucket) Lock(ctx context.Context, key string, lock store.Lock) error {
	err := check(ctx, key)
	if err == nil {
		err = b.lock(ctx, key, lock)
	}
	if errors.Is(err, fail.StoreDenied) {
		have, herr := b.Locked(ctx, key)
		switch {
		case herr != nil:
		case !have.Until.Before(lock.Until):
			err = nil
		case have.Mode != "" && have.Mode != lock.Mode:
			err = b.lock(ctx, key, store.Lock{Until: lock.Until, Mode: have.Mode})
		}
	}
	if err != nil {
		return fmt.Errorf("lock %s: %w", key, err)
	}
	return nil
}

func (b *Bucket) lock(ctx context.Context, key string, lock store.Lock) error {
	return b.try(ctx, "s3:PutObjectRetention", func() error {
		w := b.watch(ctx)
		defer w.stop()
		_, err := b.api.PutObjectRetention(w, &s3.PutObjectRetentionInput{Bucket: &b.bucket, Key: b.name(key),
			Retention: &types.ObjectLockRetention{Mode: types.ObjectLockRetentionMode(lock.Mode), RetainUntilDate: &lock.Until}})
		return w.why(unlockable(err))
	})
}

// unlockable tells what the service says where there is nothing to lock.
func unlockable(err error) error {
	switch {
	case isCode(err, "NoSuchKey", "MethodNotAllowed"): // the second: what is newest of it is the mark of its deletion
		return store.ErrNotExist
	case isCode(err, "InvalidRequest"):
		return errNoLock
	}
	return err
}
