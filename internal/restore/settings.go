package restore

import (
	"bytes"
	"fmt"
	"slices"
	"strings"

	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/pg"
)

// An Action is what the server does at the target.
type Action string

const (
	Pause    Action = "pause" // reads can be answered, and pg_wal_replay_resume() ends recovery
	Promote  Action = "promote"
	ShutDown Action = "shutdown"
)

// ParseAction reads one of the words above; "" is Pause.
func ParseAction(s string) (Action, error) {
	switch a := Action(s); a {
	case "":
		return Pause, nil
	case Pause, Promote, ShutDown:
		return a, nil
	}
	return "", fail.Hint(fmt.Errorf("action %q: %w", s, fail.BadConfig), "pause, promote or shutdown")
}

// A setting is a line of a configuration file.
type setting struct{ name, value string }

// recoverySettings are those under which a server recovers to the target, and
// does no harm to what its source still uses. Each stands for itself: what
// another file says about recovery does not count.
func (p Physical) recoverySettings(plan PhysicalPlan) []setting {
	t, res := p.Target, plan.resolved
	target, exclusive := setting{}, t.Exclusive
	switch t.Kind {
	case Immediate:
		target = setting{"recovery_target", "immediate"}
	case ToTime:
		// The very record before which the plan says that it stops: had the source's
		// clock been set back, the time would be passed several times.
		target, exclusive = setting{"recovery_target_lsn", res.Stop.At.String()}, true
	case ToLSN:
		target = setting{"recovery_target_lsn", t.LSN.String()}
	case ToXID:
		target = setting{"recovery_target_xid", fmt.Sprint(t.XID)}
	case ToName:
		target = setting{"recovery_target_name", t.Name}
	}
	timeline := fmt.Sprint(uint32(res.Timeline)) // the very one: "latest" is the newest that can be read just then
	if p.Standby {
		timeline = "latest"
	}
	set := []setting{
		{"restore_command", p.fetchCommand(res)},
		{"recovery_end_command", ""}, {"archive_cleanup_command", ""},
		{"recovery_target_timeline", timeline},
		{"recovery_target_action", string(p.Action)},
		{"recovery_target_inclusive", onOff(!exclusive)},
	}
	for _, name := range []string{"recovery_target", "recovery_target_time", "recovery_target_lsn", "recovery_target_xid", "recovery_target_name"} {
		if name != target.name {
			set = append(set, setting{name, ""})
		}
	}
	if target.name != "" {
		set = append(set, target) // behind them: to set even an empty one behind it would be a second target
	}
	if plan.inPlace { // else recovery ends where it meets one (CheckTablespaceDirectory in access/transam/xlogrecovery.c)
		set = append(set, setting{"allow_in_place_tablespaces", "on"})
	}
	// PostgreSQL looks ahead of what it replays, also into the segment behind the last
	// that is needed. One that was let go, or is damaged, would end recovery just
	// before its target (XLogPrefetcherNextBlock in access/transam/xlogprefetcher.c).
	if res.Backup.Version.Major() >= 15 && (t.Kind == Immediate || res.Alone) {
		set = append(set, setting{"recovery_prefetch", "off"})
	}
	if p.Takeover {
		return set
	}
	set = append(set,
		setting{"archive_mode", "off"}, // two servers must not archive as one
		setting{"archive_command", ""},
		setting{"max_logical_replication_workers", "0"}, // its subscriptions would take from the slots of the source
		setting{"synchronous_standby_names", ""},        // nobody would confirm a commit
	)
	if res.Backup.Version.Major() >= 15 {
		set = append(set, setting{"archive_library", ""})
	}
	if !p.Standby {
		set = append(set, setting{"primary_conninfo", ""}, setting{"primary_slot_name", ""})
	}
	return set
}

func onOff(on bool) string {
	if on {
		return "on"
	}
	return "off"
}

// fetchCommand is the restore_command. Up to the last segment that was archived
// when the restore was planned, absence is not the end of the log: it is a loss
// (promise P29). What an older timeline holds behind where this one left it
// is absence, whenever it comes there.
func (p Physical) fetchCommand(res Resolved) string {
	words := slices.Clone(p.Fetch)
	if last := lastSegment(res); last != "" {
		words = append(words, "--expect", last)
	}
	words = append(words, "--timeline", fmt.Sprint(uint32(res.Timeline)))
	for i, w := range words {
		words[i] = strings.ReplaceAll(shellWord(w), "%", "%%")
	}
	return strings.Join(append(words, "%f", `"%p"`), " ")
}

// lastSegment is the name of the last segment that is needed.
func lastSegment(res Resolved) (name string) {
	for n := range res.Window.Segments(res.segmentSize(), res.Until-1, res.Until) {
		name = n.String()
	}
	return name
}

func (res Resolved) segmentSize() pg.SegmentSize { return res.Backup.Physical.SegmentSize }

// shellWord quotes a word for a shell, if it needs to be.
func shellWord(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+=:,@%", r)
	}
	if s != "" && strings.TrimFunc(s, plain) == "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// The lines around the settings that a restore writes. Another restore of the
// same directory replaces what is between them.
const (
	blockBegin = "# pgkeep restore: from here …"
	blockEnd   = "# pgkeep restore: … to here"
	outOfForce = "# pgkeep restore took out: "
)

// withSettings returns the text of postgresql.auto.conf with the settings in
// force: earlier lines for the same names become comments.
func withSettings(text []byte, note string, set []setting) []byte {
	var out bytes.Buffer
	inside := false
	for line := range strings.Lines(string(text)) {
		bare := strings.TrimRight(line, "\r\n")
		switch {
		case bare == blockBegin:
			inside = true
		case bare == blockEnd && inside:
			inside = false
		case inside:
		case slices.ContainsFunc(set, func(s setting) bool { return strings.EqualFold(s.name, settingName(bare)) }), isRecoveryTarget(bare):
			out.WriteString(outOfForce + bare + "\n")
		default:
			out.WriteString(bare + "\n")
		}
	}
	out.WriteString(blockBegin + "\n# " + note + "\n")
	for _, s := range set {
		fmt.Fprintf(&out, "%s = '%s'\n", s.name, confQuote(s.value))
	}
	out.WriteString(blockEnd + "\n")
	return out.Bytes()
}

// isRecoveryTarget reports whether a line is one of the settings of which only
// one may be there, whatever a later version calls it.
func isRecoveryTarget(line string) bool {
	return strings.HasPrefix(strings.ToLower(settingName(line)), "recovery_target")
}

// settingName is the name that a line of a configuration file sets; "" for
// none. The equals sign may be missing.
func settingName(line string) string {
	line = strings.TrimLeft(line, " \t\f")
	end := strings.IndexAny(line, "= \t\f")
	if end < 0 || strings.HasPrefix(line, "#") {
		return ""
	}
	return line[:end]
}

// confQuote is for what stands between single quotes in a configuration file
// (guc-file.l): both that sign and the backslash mean something there.
func confQuote(s string) string {
	return strings.NewReplacer(`\`, `\\`, `'`, `''`, "\n", `\n`).Replace(s)
}
