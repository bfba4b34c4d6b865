package health

import (
	"fmt"
	"slices"
)

// A Severity says how much a finding matters.
type Severity string

const (
	Critical Severity = "critical" // what is promised does not hold now
	Warning  Severity = "warning"  // it will not hold for long, or nobody knows
	Notice   Severity = "notice"   // it could be better
)

// A Finding is something that is not as it should be.
type Finding struct {
	Name     string   `json:"name"` // for scripts: it never changes
	Severity Severity `json:"severity"`
	Cluster  string   `json:"cluster,omitempty"` // "": it is not of one cluster
	What     string   `json:"what"`
	Fix      string   `json:"fix"` // a command or a setting
}

// BySeverity orders findings: what matters most comes first.
func BySeverity(a, b Finding) int {
	order := []Severity{Critical, Warning, Notice}
	return slices.Index(order, a.Severity) - slices.Index(order, b.Severity)
}

// findings collects what is wrong with one cluster, or with what all share.
type findings struct {
	cluster string
	all     []Finding
}

func (f *findings) add(name string, severity Severity, fix, what string, args ...any) {
	f.all = append(f.all, Finding{name, severity, f.cluster, fmt.Sprintf(what, args...), fix})
}
