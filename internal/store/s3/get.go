package s3

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"
	"github.com/aws/smithy-go"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

// Get implements store.Store. Its reader goes on by itself where a connection
// broke, if the object is still the same.
func (b *Bucket) Get(ctx context.Context, key string, part store.Range) (io.ReadCloser, error) {
	err := check(ctx, key)
	if err == nil && (part.Off < 0 || part.Len < 0) {
		_, _, err = part.Within(0)
	}
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	r := &reader{Bucket: b, ctx: ctx, key: key, off: part.Off, left: part.Len}
	err = b.try(ctx, getObject, r.open)
	if errors.Is(err, errOutside) {
		err = b.outside(ctx, r, part)
	}
	if err != nil {
		return nil, fmt.Errorf("get %s: %w", key, err)
	}
	return r, nil
}

// outside decides about a part that does not begin within the object: the
// empty rest is one, all else is beyond the end.
func (b *Bucket) outside(ctx context.Context, r *reader, part store.Range) error {
	var size int64
	err := b.try(ctx, getObject, func() error {
		w := b.watch(ctx)
		defer w.stop()
		out, err := b.api.HeadObject(w, &s3.HeadObjectInput{Bucket: &b.bucket, Key: b.name(r.key)})
		if isCode(err, "NotFound") { // an answer to HEAD has no body to say more
			return store.ErrNotExist
		}
		if err != nil {
			return w.why(err)
		}
		size = aws.ToInt64(out.ContentLength)
		return nil
	})
	if err == nil {
		_, r.left, err = part.Within(size)
	}
	if err == nil && r.left != 0 {
		err = fmt.Errorf("%w, says the store, and it does", errOutside)
	}
	r.opened = true
	return err
}

var (
	errBody    = errors.New("the body broke off")
	errOutside = errors.New("the part does not begin within the object")
	errBeyond  = fmt.Errorf("the object ends before the part does: %w", io.ErrUnexpectedEOF)
)

// A reader reads the part [off, off+left) of an object. It keeps the context
// of Get, as the body of a http.Response does.
type reader struct {
	*Bucket
	ctx context.Context
	key string
	off int64
	// left is, before opened, the length asked for, 0 meaning the rest.
	left   int64
	opened bool
	etag   *string

	body io.ReadCloser // nil: to be requested
	w    *watch        // of body
}

// open requests what is left.
func (r *reader) open() error {
	in := &s3.GetObjectInput{Bucket: &r.bucket, Key: r.name(r.key), IfMatch: r.etag}
	switch {
	case r.left > 0:
		in.Range = aws.String(fmt.Sprintf("bytes=%d-%d", r.off, r.off+r.left-1))
	case r.off > 0:
		in.Range = aws.String(fmt.Sprintf("bytes=%d-", r.off))
	}
	w := r.watch(r.ctx)
	out, err := r.api.GetObject(w, in)
	if err != nil {
		defer w.stop()
		if isCode(err, "PreconditionFailed") {
			return errChanged
		}
		return w.why(err)
	}
	n, err := answered(out, in.Range != nil, r.off)
	if err == nil && n < r.left {
		err = fmt.Errorf("bytes %d+%d: %w", r.off, r.left, errBeyond)
	}
	if err != nil {
		w.stop()
		out.Body.Close()
		return err
	}
	if r.left == 0 {
		r.left = n
	}
	w.pause()
	r.opened, r.etag, r.body, r.w = true, out.ETag, out.Body, w
	return nil
}

// answered returns how many bytes the store is about to give, from off. A store
// that ignores the range would give others.
func answered(out *s3.GetObjectOutput, ranged bool, off int64) (int64, error) {
	if aws.ToString(out.ETag) == "" {
		return 0, errStrange
	}
	if !ranged {
		if out.ContentLength == nil {
			return 0, fmt.Errorf("%w: the store does not say how long an object is", fail.StoreUnfit)
		}
		return *out.ContentLength, nil
	}
	text := aws.ToString(out.ContentRange) // bytes 3-6/10
	span, _, ok1 := strings.Cut(strings.TrimPrefix(text, "bytes "), "/")
	from, to, ok2 := strings.Cut(span, "-")
	first, err1 := strconv.ParseInt(from, 10, 64)
	last, err2 := strconv.ParseInt(to, 10, 64)
	if !ok1 || !ok2 || err1 != nil || err2 != nil || first != off || last < first {
		return 0, fmt.Errorf("%w: asked for bytes from %d, the store answers with %.40q", fail.StoreUnfit, off, text)
	}
	return last - first + 1, nil
}

// Read implements io.Reader.
func (r *reader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	if len(p) == 0 {
		return 0, nil
	}
	var n int
	err := r.try(r.ctx, getObject, func() (err error) {
		if r.body == nil {
			if err := r.open(); err != nil {
				return err
			}
		}
		n, err = r.some(p)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("get %s at byte %d: %w", r.key, r.off, err)
	}
	return n, nil
}

// some reads at least one byte. A body that yields none is given up.
func (r *reader) some(p []byte) (int, error) {
	r.w.progress()
	n, err := io.ReadAtLeast(r.body, p[:min(int64(len(p)), r.left)], 1)
	r.w.pause()
	r.off += int64(n)
	r.left -= int64(n)
	if n > 0 {
		return n, nil // if the body broke, the next read finds out
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	err = r.w.why(fmt.Errorf("%w: %w", errBody, err))
	r.Close()
	return 0, err
}

// Close implements io.Closer.
func (r *reader) Close() error {
	if r.body == nil {
		return nil
	}
	err := r.body.Close()
	r.w.stop()
	r.body = nil
	return err
}

// List implements store.Store, with ListObjectsV2. What lies below the prefix
// and has no valid key is not ours, and left out.
func (b *Bucket) List(ctx context.Context, prefix, after string) iter.Seq2[store.Object, error] {
	return func(yield func(store.Object, error) bool) {
		if err := b.list(ctx, prefix, after, yield); err != nil {
			yield(store.Object{}, fmt.Errorf("list %q: %w", prefix, err))
		}
	}
}

func (b *Bucket) list(ctx context.Context, prefix, after string, yield func(store.Object, error) bool) error {
	in := &s3.ListObjectsV2Input{Bucket: &b.bucket, Prefix: b.name(prefix)}
	if after != "" {
		in.StartAfter = b.name(after)
	}
	before := ""
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		var page *s3.ListObjectsV2Output
		err := b.try(ctx, listBucket, func() (err error) {
			w := b.watch(ctx)
			defer w.stop()
			page, err = b.api.ListObjectsV2(w, in)
			if err == nil && page.IsTruncated == nil {
				err = errStrange
			}
			return w.why(err)
		})
		if err != nil {
			return err
		}
		for _, o := range page.Contents {
			name := aws.ToString(o.Key)
			if name <= before {
				return fmt.Errorf("%w: the store lists %q after %q", fail.StoreUnfit, name, before)
			}
			before = name
			key, ours := strings.CutPrefix(name, b.prefix)
			if !ours || !strings.HasPrefix(key, prefix) || key <= after || store.CheckKey(key) != nil {
				continue
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if !yield(store.Object{Key: key, Size: aws.ToInt64(o.Size), Modified: aws.ToTime(o.LastModified)}, nil) {
				return nil
			}
		}
		if !*page.IsTruncated {
			return nil
		}
		if aws.ToString(page.NextContinuationToken) == "" {
			return fmt.Errorf("%w: the store says that a list goes on, and not how", fail.StoreUnfit)
		}
		in.ContinuationToken = page.NextContinuationToken
	}
}

// Delete implements store.Store, a thousand keys to a request.
func (b *Bucket) Delete(ctx context.Context, keys ...string) error {
	for len(keys) > 0 {
		n := min(len(keys), 1000)
		var ids []types.ObjectIdentifier
		for _, key := range keys[:n] {
			if err := check(ctx, key); err != nil {
				return fmt.Errorf("delete %s: %w", key, err)
			}
			ids = append(ids, types.ObjectIdentifier{Key: b.name(key)})
		}
		err := b.try(ctx, delObject, func() error {
			w := b.watch(ctx)
			defer w.stop()
			out, err := b.api.DeleteObjects(w, &s3.DeleteObjectsInput{Bucket: &b.bucket, Delete: &types.Delete{Objects: ids}})
			if err != nil {
				return w.why(err)
			}
			return undeleted(out, n)
		})
		if err != nil {
			return fmt.Errorf("delete %d objects from %s on: %w", n, keys[0], err)
		}
		keys = keys[n:]
	}
	return nil
}

// undeleted makes an error of the first failure that an answer of 200 holds. It
// must account for n keys.
func undeleted(out *s3.DeleteObjectsOutput, n int) error {
	for _, e := range out.Errors {
		if code := aws.ToString(e.Code); code != "NoSuchKey" {
			return &smithy.GenericAPIError{Code: code, Message: aws.ToString(e.Key) + ": " + aws.ToString(e.Message)}
		}
	}
	if len(out.Deleted)+len(out.Errors) < n {
		return errStrange
	}
	return nil
}
