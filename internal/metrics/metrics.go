// Package metrics tells Prometheus how the clusters of a host are doing: how old
// their backups are, which of them were proved, what can be recovered and what
// waits; and how Temporal's worker is doing.
package metrics

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.temporal.io/sdk/client"

	"github.com/pgkeep/pgkeep/internal/audit"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/health"
	"github.com/pgkeep/pgkeep/internal/pg"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/schedule"
	"github.com/pgkeep/pgkeep/workflows"
)

// Options are what Metrics need. The zero value of each field in the last group
// is right.
type Options struct {
	Clusters []*audit.Auditor // of this host
	Log      *slog.Logger

	Memory   audit.Memory       // where looks note what they found; "": each lists all
	Promises map[string]Promise // what the configuration says of each cluster, by name
	Rarely   time.Duration      // how often all that is stored is listed; 0: 10 minutes
	Often    time.Duration      // how often the server, its newest segment and Temporal are asked; 0: 30 s
}

// Metrics watches clusters and serves what it sees. Use New.
type Metrics struct {
	opt      Options
	registry *prometheus.Registry
	temporal *temporalHandler
	watches  []*watch

	mu     sync.Mutex
	client client.Client // nil: not connected yet
}

// New returns Metrics that know nothing yet, and have every series all the same.
func New(opt Options) (*Metrics, error) {
	if opt.Rarely == 0 {
		opt.Rarely = 10 * time.Minute
	}
	if opt.Often == 0 {
		opt.Often = 30 * time.Second
	}
	m := &Metrics{opt: opt, registry: prometheus.NewRegistry()}
	for _, a := range opt.Clusters {
		m.watches = append(m.watches, &watch{auditor: a, failing: make(map[Source]bool),
			state: State{Promise: opt.Promises[a.Name], Seen: make(map[Source]time.Time), Good: make(map[Source]bool)}})
	}
	m.temporal = &temporalHandler{series: &seriesSet{all: make(map[string]*series)}}
	for _, c := range []prometheus.Collector{collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), clusters{m}, m.temporal.series} {
		if err := m.registry.Register(c); err != nil {
			return nil, fmt.Errorf("metrics: %w", err)
		}
	}
	return m, nil
}

// Temporal is for the options of a client of Temporal: what its SDK measures is
// served too.
func (m *Metrics) Temporal() client.MetricsHandler { return m.temporal }

// Connected says that Temporal can be asked about schedules, from now on.
func (m *Metrics) Connected(c client.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.client = c
}

func (m *Metrics) connection() (client.Client, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.client == nil {
		return nil, fmt.Errorf("not connected to Temporal yet: %w", fail.TemporalDown)
	}
	return m.client, nil
}

// Handler serves /metrics.
func (m *Metrics) Handler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 4, ErrorHandling: promhttp.ContinueOnError}))
	return mux
}

// Serve watches the clusters, and answers at l, until ctx ends: then it returns
// nil. It closes l.
func (m *Metrics) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	server := &http.Server{Handler: m.Handler(), ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: 2 * time.Minute,
		ErrorLog: slog.NewLogLogger(m.opt.Log.Handler(), slog.LevelWarn)}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for _, task := range []struct {
		every time.Duration
		look  func(context.Context, *watch)
	}{{m.opt.Rarely, m.lookRepository}, {m.opt.Often, m.lookServer}, {m.opt.Often, m.lookSchedules}} {
		wg.Go(func() {
			tick := time.NewTicker(task.every)
			defer tick.Stop()
			for ctx.Err() == nil {
				for _, w := range m.watches {
					task.look(ctx, w)
				}
				select {
				case <-ctx.Done():
				case <-tick.C:
				}
			}
		})
	}
	defer context.AfterFunc(ctx, func() { server.Close() })()
	if err := server.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}

// A watch is what is known of a cluster, and how more is learnt.
type watch struct {
	auditor *audit.Auditor

	mu      sync.Mutex
	state   State
	failing map[Source]bool // and it was said
	repo    *repo.Repo      // as the last look at the repository opened it
}

// seen is the state now. What it points to never changes.
func (w *watch) seen() State {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.state
	s.Seen, s.Good = maps.Clone(s.Seen), maps.Clone(s.Good)
	return s
}

// look asks a source, for at most that long, and takes note of how that went.
func (m *Metrics) look(ctx context.Context, w *watch, src Source, most time.Duration, ask func(context.Context) (func(*State), error)) {
	asking, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	update, err := ask(asking)
	if ctx.Err() != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	said := w.failing[src]
	w.state.Good[src], w.failing[src] = err == nil, err != nil
	if err != nil {
		if !said {
			m.opt.Log.Warn("metrics: a look failed", "cluster", w.auditor.Name, "source", string(src), "error", err)
		}
		return
	}
	w.state.Seen[src] = time.Now()
	update(&w.state)
}

func (m *Metrics) lookRepository(ctx context.Context, w *watch) {
	m.look(ctx, w, Repository, m.opt.Rarely, func(ctx context.Context) (func(*State), error) {
		r, err := w.auditor.Open(ctx)
		if err != nil {
			return nil, err
		}
		stored, err := health.Look(ctx, r, w.auditor.Name, m.opt.Memory, time.Now())
		if err != nil {
			return nil, err
		}
		usage, err := r.Usage(ctx, w.auditor.Name)
		if err != nil {
			return nil, err
		}
		return func(s *State) {
			w.repo = r
			s.Stored, s.Usage = stored, usage
			for _, a := range stored.Archives {
				if n, ok := newestOf(a.Ledger); ok && !n.Archived.Before(s.Newest.Archived) {
					s.Newest = n
				}
			}
		}, nil
	})
}

// newestOf is the newest segment of an archive, if there is one.
func newestOf(l audit.Ledger) (n Segment, ok bool) {
	at, t, end := l.Newest()
	if at.IsZero() {
		return n, false
	}
	text, err := pg.SegmentName(t, end-1, l.SegmentSize)
	if err != nil {
		return n, false
	}
	name, err := pg.ParseWALName(text)
	return Segment{l.Archive, name, l.SegmentSize, end, at}, err == nil
}

// lookServer asks the server, and how far its archive goes by now.
func (m *Metrics) lookServer(ctx context.Context, w *watch) {
	m.look(ctx, w, Server, time.Minute, func(ctx context.Context) (func(*State), error) {
		a, err := w.auditor.Cluster.Archiver(ctx)
		if err != nil {
			return nil, err
		}
		w.mu.Lock()
		r, newest := w.repo, w.state.Newest
		w.mu.Unlock()
		if r != nil && newest.Archive != (repo.Archive{}) {
			newest = follow(ctx, r, newest)
		}
		return func(s *State) {
			s.Archiver = a
			if newest.Archived.After(s.Newest.Archived) {
				s.Newest = newest
			}
		}, nil
	})
}

// follow lists what came into an archive behind a segment. What the store does
// not tell counts as not there: so the lag is the greater.
func follow(ctx context.Context, r *repo.Repo, n Segment) Segment {
	for o, err := range r.WALObjects(ctx, n.Archive, n.Name) {
		if err != nil {
			break
		}
		if o.Name.Kind != pg.Segment || o.Name == (pg.WALName{}) {
			continue
		}
		start, err := o.Name.Start(n.Size)
		if err != nil {
			continue // the audit calls it odd
		}
		n.Name, n.End, n.Archived = o.Name, start+pg.LSN(n.Size), o.Modified
	}
	return n
}

func (m *Metrics) lookSchedules(ctx context.Context, w *watch) {
	m.look(ctx, w, Schedules, time.Minute, func(ctx context.Context) (func(*State), error) {
		c, err := m.connection()
		if err != nil {
			return nil, err
		}
		found, ended := make(map[string]schedule.Existing), make(map[string]schedule.Ended)
		for _, kind := range scheduled() {
			e, ok, err := schedule.Describe(ctx, c, workflows.BackupWorkflowID(w.auditor.Name, kind))
			if err != nil {
				return nil, err
			}
			if !ok {
				continue
			}
			found[kind] = e
			if ended[kind], err = schedule.LastEnded(ctx, c, e); err != nil {
				return nil, err
			}
		}
		return func(s *State) { s.Schedules, s.Ended = found, ended }, nil
	})
}

// clusters collects what the catalogue lists.
type clusters struct{ m *Metrics }

// Describe names nothing: what there is depends on the clusters.
func (clusters) Describe(chan<- *prometheus.Desc) {}

// Collect makes every series of every cluster.
func (c clusters) Collect(to chan<- prometheus.Metric) {
	now := time.Now()
	catalogue := Catalogue()
	for _, w := range c.m.watches {
		s := w.seen()
		for _, metric := range catalogue {
			labels, values := []string{"cluster"}, metric.Values
			if metric.Label == "" {
				values = []string{""}
			} else {
				labels = append(labels, metric.Label)
			}
			desc := prometheus.NewDesc(metric.Name, metric.Help, labels, nil)
			for _, of := range values {
				one, err := prometheus.NewConstMetric(desc, prometheus.GaugeValue, metric.value(&s, of, now), []string{w.auditor.Name, of}[:len(labels)]...)
				send(to, desc, one, err)
			}
		}
	}
}

// send sends a metric, or why there is none.
func send(to chan<- prometheus.Metric, desc *prometheus.Desc, one prometheus.Metric, err error) {
	if err != nil {
		one = prometheus.NewInvalidMetric(desc, err)
	}
	to <- one
}
