package s3

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

var _ store.Ruled = (*Bucket)(nil)

const (
	getLifecycle  right = "s3:GetLifecycleConfiguration"
	getVersioning right = "s3:GetBucketVersioning"
)

// Rules returns the lifecycle rules of the bucket that concern objects below the
// prefix. See the S3 User Guide, "Managing the lifecycle of objects".
func (b *Bucket) Rules(ctx context.Context) (rules []store.Rule, versioned bool, err error) {
	var lifecycle *s3.GetBucketLifecycleConfigurationOutput
	err = b.try(ctx, getLifecycle, func() (err error) {
		w := b.watch(ctx)
		defer w.stop()
		lifecycle, err = b.api.GetBucketLifecycleConfiguration(w, &s3.GetBucketLifecycleConfigurationInput{Bucket: &b.bucket})
		if isCode(err, "NoSuchLifecycleConfiguration") {
			return nil
		}
		return w.why(err)
	})
	if err != nil && !errors.Is(err, fail.StoreUnfit) { // a service without rules
		return nil, false, fmt.Errorf("read the lifecycle rules: %w", err)
	}
	if lifecycle != nil && err == nil {
		for _, r := range lifecycle.Rules {
			if one, ok := b.rule(r); ok {
				rules = append(rules, one)
			}
		}
	}
	var out *s3.GetBucketVersioningOutput
	err = b.try(ctx, getVersioning, func() (err error) {
		w := b.watch(ctx)
		defer w.stop()
		out, err = b.api.GetBucketVersioning(w, &s3.GetBucketVersioningInput{Bucket: &b.bucket})
		return w.why(err)
	})
	if errors.Is(err, fail.StoreUnfit) {
		return rules, false, nil
	}
	if err != nil {
		return rules, false, fmt.Errorf("read whether the bucket keeps versions: %w", err)
	}
	return rules, out.Status == types.BucketVersioningStatusEnabled, nil
}

// rule is what r does with our objects; false if that is nothing.
func (b *Bucket) rule(r types.LifecycleRule) (store.Rule, bool) {
	//lint:ignore SA1019 rules of old have their prefix there
	prefix := aws.ToString(r.Prefix)
	if f := r.Filter; f != nil {
		if f.Tag != nil || f.And != nil && len(f.And.Tags) > 0 { // ours have no tags
			return store.Rule{}, false
		}
		if f.Prefix != nil {
			prefix = *f.Prefix
		}
		if f.And != nil {
			prefix = aws.ToString(f.And.Prefix)
		}
	}
	within := strings.HasPrefix(b.prefix, prefix)
	if r.Status != types.ExpirationStatusEnabled || !within && !strings.HasPrefix(prefix, b.prefix) {
		return store.Rule{}, false
	}
	one := store.Rule{ID: aws.ToString(r.ID)}
	if !within {
		one.Prefix = strings.TrimPrefix(prefix, b.prefix)
	}
	if e := r.Expiration; e != nil {
		one.Removes = e.Days != nil || e.Date != nil // else it only clears markers of what is deleted
	}
	for _, t := range r.Transitions {
		switch t.StorageClass {
		case types.TransitionStorageClassGlacier, types.TransitionStorageClassDeepArchive:
			one.Freezes = true
		}
	}
	return one, one.Removes || one.Freezes
}
