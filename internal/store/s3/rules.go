package s3

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

var _ store.Ruled = (*Bucket)(nil)

// Rules returns the lifecycle rules of the bucket that concern objects below the
// prefix. See the S3 User Guide, "Managing the lifecycle of objects".
func (b *Bucket) Rules(ctx context.Context) (rules []store.Rule, versioned bool, err error) {
	all, err := b.Settings(ctx)
	if err != nil {
		return nil, false, err
	}
	var versioning struct{ Status types.BucketVersioningStatus }
	var lifecycle struct{ Rules []types.LifecycleRule }
	for name, to := range map[string]any{"versioning": &versioning, "lifecycle": &lifecycle} {
		i := slices.IndexFunc(all, func(s Setting) bool { return s.Name == name })
		err := all[i].Err
		if err == nil && all[i].Value != nil {
			err = json.Unmarshal(all[i].Value, to)
		}
		if err != nil && !errors.Is(err, fail.StoreUnfit) { // such a service has none
			return nil, false, fmt.Errorf("read the %s of the bucket: %w", name, err)
		}
	}
	for _, r := range lifecycle.Rules {
		if one, ok := b.rule(r); ok {
			rules = append(rules, one)
		}
	}
	return rules, versioning.Status == types.BucketVersioningStatusEnabled, nil
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
