package metrics

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.temporal.io/sdk/client"
)

// temporalHandler takes what Temporal's SDK measures. Names and units are those
// of its documentation, "SDK metrics reference": counters end in _total, times in
// _seconds.
type temporalHandler struct {
	series *seriesSet
	tags   map[string]string
}

// WithTags returns a handler whose series have these labels too.
func (h *temporalHandler) WithTags(tags map[string]string) client.MetricsHandler {
	all := maps.Clone(h.tags)
	if all == nil {
		all = make(map[string]string)
	}
	maps.Copy(all, tags)
	return &temporalHandler{h.series, all}
}

// Counter returns what counts up.
func (h *temporalHandler) Counter(name string) client.MetricsCounter {
	return counter{h.series.get(name+"_total", h.tags, nil)}
}

// Gauge returns what is set.
func (h *temporalHandler) Gauge(name string) client.MetricsGauge {
	return gauge{h.series.get(name, h.tags, nil)}
}

// Timer returns what times are counted in.
func (h *temporalHandler) Timer(name string) client.MetricsTimer {
	return timer{h.series.get(name+"_seconds", h.tags, bounds())}
}

// bounds are the limits of a histogram's buckets, in seconds: from a request to a
// backup.
func bounds() []float64 {
	return []float64{0.005, 0.02, 0.1, 0.5, 1, 5, 30, 60, 300, 1800, 3600, 4 * 3600, 12 * 3600, 24 * 3600}
}

// A seriesSet is all there is of series. The SDK gives one metric different
// labels at different places, which a prometheus.GaugeVec does not take.
type seriesSet struct {
	mu  sync.Mutex
	all map[string]*series
}

// A series is a metric with certain labels. All share the lock of their set:
// they change some hundred times in a second, at most.
type series struct {
	mu     *sync.Mutex
	desc   *prometheus.Desc
	kind   prometheus.ValueType
	labels []string // values

	value  float64 // the sum, of times
	count  uint64
	bounds []float64 // nil: it is no histogram
	below  []uint64  // how many times were that short; for each of bounds
}

type (
	counter struct{ *series }
	gauge   struct{ *series }
	timer   struct{ *series }
)

// Inc counts n more.
func (c counter) Inc(n int64) { c.change(func(s *series) { s.value += float64(n) }) }

// Update sets the value.
func (g gauge) Update(v float64) {
	g.change(func(s *series) { s.value, s.kind = finite(v), prometheus.GaugeValue })
}

// Record counts one more time.
func (t timer) Record(d time.Duration) {
	t.change(func(s *series) {
		seconds := d.Seconds()
		s.value += seconds
		s.count++
		for i, limit := range s.bounds {
			if seconds <= limit {
				s.below[i]++
			}
		}
	})
}

func (s *series) change(f func(*series)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(s)
}

func (set *seriesSet) get(name string, tags map[string]string, bounds []float64) *series {
	keys := slices.Sorted(maps.Keys(tags))
	var values []string
	key := name
	for _, k := range keys {
		values = append(values, tags[k])
		key += "\x00" + k + "\x00" + tags[k]
	}
	set.mu.Lock()
	defer set.mu.Unlock()
	s, ok := set.all[key]
	if !ok {
		for i, k := range keys {
			keys[i] = strings.Map(labelRune, k)
		}
		s = &series{mu: &set.mu, desc: prometheus.NewDesc(name, "Of Temporal's SDK: see its metrics reference.", keys, nil), labels: values,
			kind: prometheus.CounterValue, bounds: bounds, below: make([]uint64, len(bounds))}
		set.all[key] = s
	}
	return s
}

// labelRune keeps names of labels to what Prometheus takes.
func labelRune(r rune) rune {
	if r == '_' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' {
		return r
	}
	return '_'
}

// Describe names nothing: what there is turns out later.
func (set *seriesSet) Describe(chan<- *prometheus.Desc) {}

// Collect makes every series that there was something of.
func (set *seriesSet) Collect(to chan<- prometheus.Metric) {
	set.mu.Lock()
	defer set.mu.Unlock()
	for _, s := range set.all {
		if s.bounds == nil {
			one, err := prometheus.NewConstMetric(s.desc, s.kind, s.value, s.labels...)
			send(to, s.desc, one, err)
			continue
		}
		buckets := make(map[float64]uint64, len(s.bounds))
		for i, limit := range s.bounds {
			buckets[limit] = s.below[i]
		}
		one, err := prometheus.NewConstHistogram(s.desc, s.count, s.value, buckets, s.labels...)
		send(to, s.desc, one, err)
	}
}
