package repo

import "context"

// PriorBytes returns how many bytes of files the packs of a backup in progress
// hold.
func (r *Repo) PriorBytes(ctx context.Context, b Ref) (sum int64, err error) {
	p, err := r.findPrior(ctx, b, func() {})
	if err != nil {
		return 0, err
	}
	for _, frames := range p.frames {
		for _, f := range frames {
			for _, run := range f.blocks {
				for n := run[0]; n < run[0]+run[1]; n++ {
					sum += f.file.length(n)
				}
			}
		}
	}
	return sum, nil
}
