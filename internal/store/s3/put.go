package s3

import (
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"io"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/aws/aws-sdk-go-v2/service/s3/types"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/store"
)

// Put implements store.Store. An object goes in one request if it can. A reader
// that cannot seek is cut into parts, of which one at a time is in memory: 16
// MiB, and more as the object turns out to be large.
func (b *Bucket) Put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	err := check(ctx, key)
	if err == nil {
		err = b.put(ctx, key, r, opt)
	}
	if err != nil {
		return fmt.Errorf("put %s: %w", key, err)
	}
	return nil
}

func (b *Bucket) put(ctx context.Context, key string, r io.Reader, opt store.PutOptions) error {
	next := streamed(r)
	if s, ok := r.(io.ReadSeeker); ok {
		whole, err := sectionOf(s)
		if err != nil {
			return err
		}
		if whole.n <= b.maxPut {
			return b.putOne(ctx, key, whole, opt)
		}
		next = whole.cut(max(partSize, (whole.n+maxParts-1)/maxParts))
	}
	first, last, err := next(1)
	if err != nil {
		return err
	}
	if last {
		return b.putOne(ctx, key, first, opt)
	}
	return b.putParts(ctx, key, first, next, opt)
}

// putOne stores body with one request.
func (b *Bucket) putOne(ctx context.Context, key string, body *section, opt store.PutOptions) error {
	sum := crc32.New(castagnoli)
	if err := body.copyTo(sum); err != nil {
		return err
	}
	return b.try(ctx, putObject, func() error {
		w := b.watch(ctx)
		defer w.stop()
		out, err := b.api.PutObject(w, &s3.PutObjectInput{
			Bucket:         &b.bucket,
			Key:            b.name(key),
			Body:           body.watched(w),
			ContentLength:  &body.n,
			ContentType:    aws.String("application/octet-stream"),
			ChecksumCRC32C: aws.String(encode(sum)),
			IfNoneMatch:    onlyIf(opt.IfAbsent),
		})
		if err != nil {
			return body.why(w.why(err))
		}
		return confirm(out.ETag, out.ChecksumCRC32C, encode(sum))
	})
}

// An upload is a multipart upload that has begun.
type upload struct {
	*Bucket
	key, id string
	parts   []types.CompletedPart
	size    int64
	sum     hash.Hash32 // of all parts
}

// putParts stores first and what follows it with a multipart upload. It is
// aborted if anything fails.
func (b *Bucket) putParts(ctx context.Context, key string, body *section, next parts, opt store.PutOptions) (err error) {
	u := &upload{Bucket: b, key: key, sum: crc32.New(castagnoli)}
	if err := u.begin(ctx); err != nil {
		return err
	}
	defer func() {
		if err == nil {
			return
		}
		// A context that ended must not keep the parts in the bucket.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
		defer cancel()
		if aerr := b.abort(ctx, u.name(key), u.id); aerr != nil {
			err = fmt.Errorf("%w (and the upload is not aborted: %w)", err, aerr)
		}
	}()
	for n, last := int32(1), false; ; {
		if err := u.part(ctx, n, body); err != nil {
			return err
		}
		if last {
			return u.complete(ctx, opt)
		}
		n++
		if body, last, err = next(n); err != nil {
			return err
		}
	}
}

func (u *upload) begin(ctx context.Context) error {
	return u.try(ctx, putObject, func() error {
		w := u.watch(ctx)
		defer w.stop()
		out, err := u.api.CreateMultipartUpload(w, &s3.CreateMultipartUploadInput{
			Bucket:            &u.bucket,
			Key:               u.name(u.key),
			ContentType:       aws.String("application/octet-stream"),
			ChecksumAlgorithm: types.ChecksumAlgorithmCrc32c,
			ChecksumType:      types.ChecksumTypeFullObject,
		})
		if err != nil {
			return w.why(err)
		}
		if u.id = aws.ToString(out.UploadId); u.id == "" {
			return errStrange
		}
		return nil
	})
}

func (u *upload) part(ctx context.Context, n int32, body *section) error {
	sum := crc32.New(castagnoli)
	if err := body.copyTo(io.MultiWriter(sum, u.sum)); err != nil {
		return err
	}
	u.size += body.n
	return u.try(ctx, putObject, func() error {
		w := u.watch(ctx)
		defer w.stop()
		out, err := u.api.UploadPart(w, &s3.UploadPartInput{
			Bucket:         &u.bucket,
			Key:            u.name(u.key),
			UploadId:       &u.id,
			PartNumber:     &n,
			Body:           body.watched(w),
			ContentLength:  &body.n,
			ChecksumCRC32C: aws.String(encode(sum)),
		})
		if err != nil {
			return body.why(w.why(err))
		}
		if err := confirm(out.ETag, out.ChecksumCRC32C, encode(sum)); err != nil {
			return err
		}
		u.parts = append(u.parts, types.CompletedPart{PartNumber: &n, ETag: out.ETag, ChecksumCRC32C: aws.String(encode(sum))})
		return nil
	})
}

func (u *upload) complete(ctx context.Context, opt store.PutOptions) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	tries := 0
	return u.try(ctx, putObject, func() error {
		w := newWatch(ctx, 10*u.stall) // the service may have gigabytes to move
		defer w.stop()
		tries++
		out, err := u.api.CompleteMultipartUpload(w, &s3.CompleteMultipartUploadInput{
			Bucket:          &u.bucket,
			Key:             u.name(u.key),
			UploadId:        &u.id,
			MultipartUpload: &types.CompletedMultipartUpload{Parts: u.parts},
			ChecksumCRC32C:  aws.String(encode(u.sum)),
			ChecksumType:    types.ChecksumTypeFullObject,
			MpuObjectSize:   &u.size,
			IfNoneMatch:     onlyIf(opt.IfAbsent),
		})
		if tries > 1 && isCode(err, "NoSuchUpload") {
			return u.stored(w) // an earlier try may have been answered to nobody
		}
		if err != nil {
			return w.why(err)
		}
		return confirm(out.ETag, out.ChecksumCRC32C, encode(u.sum))
	})
}

// stored succeeds if the object is there as it was sent.
func (u *upload) stored(w *watch) error {
	out, err := u.api.HeadObject(w, &s3.HeadObjectInput{Bucket: &u.bucket, Key: u.name(u.key), ChecksumMode: types.ChecksumModeEnabled})
	switch {
	case isCode(err, "NotFound", "NoSuchKey"):
		return fmt.Errorf("%w: the service has forgotten the upload", fail.StoreDown)
	case err != nil:
		return w.why(err)
	case aws.ToInt64(out.ContentLength) != u.size || aws.ToString(out.ChecksumCRC32C) != encode(u.sum):
		return store.ErrExist
	}
	return nil
}

// AbortStale implements store.Sweeper: it aborts the multipart uploads below
// the prefix that began longer than age ago. A lifecycle rule of the bucket
// does the same (S3 User Guide, "Configuring a bucket lifecycle configuration
// to delete incomplete multipart uploads").
func (b *Bucket) AbortStale(ctx context.Context, age time.Duration) (int, error) {
	n := 0
	in := &s3.ListMultipartUploadsInput{Bucket: &b.bucket, Prefix: &b.prefix}
	for {
		var out *s3.ListMultipartUploadsOutput
		err := b.try(ctx, listUploads, func() (err error) {
			w := b.watch(ctx)
			defer w.stop()
			out, err = b.api.ListMultipartUploads(w, in)
			if err == nil && out.IsTruncated == nil {
				err = errStrange
			}
			return w.why(err)
		})
		if err != nil {
			return n, fmt.Errorf("abort stale uploads: %w", err)
		}
		for _, u := range out.Uploads {
			if time.Since(aws.ToTime(u.Initiated)) <= age {
				continue
			}
			if err := b.abort(ctx, u.Key, aws.ToString(u.UploadId)); err != nil {
				return n, fmt.Errorf("abort stale upload of %s: %w", aws.ToString(u.Key), err)
			}
			n++
		}
		if !*out.IsTruncated {
			return n, nil
		}
		in.KeyMarker, in.UploadIdMarker = out.NextKeyMarker, out.NextUploadIdMarker
	}
}

func (b *Bucket) abort(ctx context.Context, name *string, id string) error {
	return b.try(ctx, abortUpload, func() error {
		w := b.watch(ctx)
		defer w.stop()
		_, err := b.api.AbortMultipartUpload(w, &s3.AbortMultipartUploadInput{Bucket: &b.bucket, Key: name, UploadId: &id})
		if isCode(err, "NoSuchUpload") {
			return nil
		}
		return w.why(err)
	})
}

// CRC32C is the checksum that services know longest and processors compute
// themselves. S3 User Guide, "Checking object integrity".
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func encode(sum hash.Hash32) string { return base64.StdEncoding.EncodeToString(sum.Sum(nil)) }

// confirm fails if the service computed another checksum. One that answers
// without has still been told it, and refuses what does not fit; but an ETag
// they all give.
func confirm(etag, got *string, want string) error {
	switch {
	case aws.ToString(etag) == "":
		return errStrange
	case got != nil && *got != want:
		return errWrongSum
	}
	return nil
}

func onlyIf(absent bool) *string {
	if absent {
		return aws.String("*")
	}
	return nil
}

// parts returns part n, from 1, and whether it is the last. The one before is
// not used any more then.
type parts func(n int32) (body *section, last bool, err error)

// streamed reads parts into memory. They grow so that 10,000 of them hold 5
// TiB, the largest object there is.
func streamed(r io.Reader) parts {
	in := bufio.NewReader(r)
	buf := make([]byte, 64<<10) // enough for what is small
	return func(n int32) (*section, bool, error) {
		size := partSize * (1 + int(n)/150)
		got, err := fill(in, buf[:min(size, len(buf))])
		if err == nil && got < size {
			buf = append(make([]byte, 0, size), buf...)[:size]
			var more int
			more, err = fill(in, buf[got:])
			got += more
		}
		if err == nil {
			_, err = in.Peek(1)
		}
		if err != nil && err != io.EOF {
			return nil, false, fmt.Errorf("%w: %w", errSource, err)
		}
		return &section{r: bytes.NewReader(buf[:got]), n: int64(got)}, err == io.EOF, nil
	}
}

// fill reads until p is full. Other than io.ReadFull it leaves an unexpected
// EOF to r: there it means that the object is cut short.
func fill(r io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var got int
		got, err = r.Read(p[n:])
		n += got
	}
	return n, err
}

// A section is a part of what a reader yields, read several times: for the
// checksum, and for each try to send it.
type section struct {
	r    io.ReadSeeker
	off  int64 // where it begins in r
	n    int64
	at   int64
	w    *watch // nil: nobody watches
	fail error  // of r
}

// sectionOf returns what r yields from where it stands.
func sectionOf(r io.ReadSeeker) (*section, error) {
	off, err := r.Seek(0, io.SeekCurrent)
	var end int64
	if err == nil {
		end, err = r.Seek(0, io.SeekEnd)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errSource, err)
	}
	return &section{r: r, off: off, n: max(0, end-off)}, nil
}

// cut returns the parts of s, each of size bytes but the last.
func (s *section) cut(size int64) parts {
	return func(n int32) (*section, bool, error) {
		skip := int64(n-1) * size
		return &section{r: s.r, off: s.off + skip, n: min(size, s.n-skip)}, skip+size >= s.n, nil
	}
}

// copyTo writes all of s to w, a hash.
func (s *section) copyTo(w io.Writer) error {
	if _, err := s.Seek(0, io.SeekStart); err != nil {
		return err
	}
	n, err := io.Copy(w, s)
	if err == nil && n < s.n {
		err = fmt.Errorf("%w: %w", errSource, io.ErrUnexpectedEOF)
	}
	return err
}

// watched returns s from its beginning, with w told of each read.
func (s *section) watched(w *watch) *section {
	s.w, s.at, s.fail = w, 0, nil
	return s
}

func (s *section) Read(p []byte) (int, error) {
	if s.fail != nil {
		return 0, s.fail
	}
	if s.at == s.n {
		return 0, io.EOF
	}
	if s.w != nil {
		s.w.progress()
	}
	if _, err := s.r.Seek(s.off+s.at, io.SeekStart); err != nil {
		s.fail = fmt.Errorf("%w: %w", errSource, err)
		return 0, s.fail
	}
	n, err := s.r.Read(p[:min(int64(len(p)), s.n-s.at)])
	s.at += int64(n)
	if err == io.EOF && s.at < s.n {
		err = io.ErrUnexpectedEOF
	}
	if err != nil && err != io.EOF {
		s.fail = fmt.Errorf("%w: %w", errSource, err)
		return n, s.fail
	}
	return n, nil
}

// Seek implements io.Seeker within the section.
func (s *section) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += s.at
	case io.SeekEnd:
		off += s.n
	}
	if off < 0 || off > s.n {
		return 0, errors.New("seek outside of a section")
	}
	s.at = off
	return off, nil
}

// why returns err, or the reason for it if that is the reader.
func (s *section) why(err error) error {
	if s.fail != nil {
		return s.fail
	}
	return err
}
