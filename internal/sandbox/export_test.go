package sandbox

var ParseControl, ParseReplay = parseControl, parseReplay

// Bare makes s do without namespaces, as where the kernel refuses them.
func Bare(s *Sandbox) { s.bare = true }
