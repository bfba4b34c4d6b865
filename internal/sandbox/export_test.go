package sandbox

var ParseControl, ParseReplay = parseControl, parseReplay

// Refuse makes s do without namespaces, as where the kernel refuses them.
func Refuse(s *Sandbox) { s.refused = true }
