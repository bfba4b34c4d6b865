package metrics

// Set makes s what is known of a cluster.
func (m *Metrics) Set(cluster string, s State) {
	for _, w := range m.watches {
		if w.auditor.Name == cluster {
			w.state = s
		}
	}
}
