package s3

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"

	"github.com/pgkeep/pgkeep/internal/fail"
)

// A Setting is one of those of a bucket.
type Setting struct {
	Name  string          // versioning, object_lock, lifecycle or bucket_policy
	Value json.RawMessage // as the service's API writes it; nil: there is none
	// Err, if not nil, is why it cannot be told: the credentials may not read it
	// (fail.StoreDenied), or the service does not know of such a thing.
	Err error
}

// Settings asks for what a bucket does with what is in it: whether it keeps
// versions, locks and ends them, and who may do what. A setting that cannot be
// read says so; the error is of a service that does not answer.
func (b *Bucket) Settings(ctx context.Context) ([]Setting, error) {
	var all []Setting
	for _, ask := range []struct {
		name, none string // none is the code for one that is not set
		needs      right
		get        func(context.Context) (any, error)
	}{
		{"versioning", "none", "s3:GetBucketVersioning", func(ctx context.Context) (any, error) {
			out, err := b.api.GetBucketVersioning(ctx, &s3.GetBucketVersioningInput{Bucket: &b.bucket})
			if err != nil || out.Status == "" {
				return nil, err
			}
			return map[string]any{"Status": out.Status}, nil
		}},
		{"object_lock", "ObjectLockConfigurationNotFoundError", "s3:GetBucketObjectLockConfiguration", func(ctx context.Context) (any, error) {
			out, err := b.api.GetObjectLockConfiguration(ctx, &s3.GetObjectLockConfigurationInput{Bucket: &b.bucket})
			if err != nil {
				return nil, err
			}
			return out.ObjectLockConfiguration, nil
		}},
		{"lifecycle", "NoSuchLifecycleConfiguration", "s3:GetLifecycleConfiguration", func(ctx context.Context) (any, error) {
			out, err := b.api.GetBucketLifecycleConfiguration(ctx, &s3.GetBucketLifecycleConfigurationInput{Bucket: &b.bucket})
			if err != nil {
				return nil, err
			}
			return map[string]any{"Rules": out.Rules}, nil
		}},
		{"bucket_policy", "NoSuchBucketPolicy", "s3:GetBucketPolicy", func(ctx context.Context) (any, error) {
			out, err := b.api.GetBucketPolicy(ctx, &s3.GetBucketPolicyInput{Bucket: &b.bucket})
			if err != nil {
				return nil, err
			}
			return json.RawMessage(aws.ToString(out.Policy)), nil
		}},
	} {
		var value any
		err := b.try(ctx, ask.needs, func() (err error) {
			w := b.watch(ctx)
			defer w.stop()
			value, err = ask.get(w)
			if isCode(err, ask.none) {
				value, err = nil, nil
			}
			return w.why(err)
		})
		if ctx.Err() != nil || errors.Is(err, fail.StoreDown) {
			return nil, fmt.Errorf("ask for the %s of bucket %s: %w", ask.name, b.bucket, err)
		}
		s := Setting{Name: ask.name, Err: err}
		if err == nil && value != nil {
			if s.Value, err = plain(value); err != nil {
				return nil, fmt.Errorf("read the %s of bucket %s: %w", ask.name, b.bucket, err)
			}
		}
		all = append(all, s)
	}
	return all, nil
}

// plain writes a value as JSON without what is not set.
func plain(value any) (json.RawMessage, error) {
	b, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	var v any
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, err
	}
	return json.Marshal(pruned(v))
}

func pruned(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key, value := range v {
			if value == nil || value == "" {
				delete(v, key)
			} else {
				v[key] = pruned(value)
			}
		}
	case []any:
		for i := range v {
			v[i] = pruned(v[i])
		}
	}
	return v
}
