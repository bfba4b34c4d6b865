package repo

import "context"

// PriorBytes returns how many bytes of files the packs of a backup in progress
// hold.
func (r *Repo) PriorBytes(ctx context.Context, b Ref) (sum int64, err error) {
	w := &Writer{repo: r, opt: Writing{Ref: b}, feet: newFooters(r, feetMemory)}
	attempts, _, err := w.findAttempts(ctx)
	if err != nil {
		return 0, err
	}
	for _, a := range attempts {
		foot, err := w.feet.get(ctx, a.pack)
		if err != nil {
			return 0, err
		}
		for _, f := range foot.Frames {
			sum += int64(f.Content)
		}
	}
	return sum, nil
}
