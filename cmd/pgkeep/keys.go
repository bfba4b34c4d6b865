package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"filippo.io/age"
	"github.com/urfave/cli/v2"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/durable"
	"github.com/pgkeep/pgkeep/internal/fail"
	"github.com/pgkeep/pgkeep/internal/open"
	"github.com/pgkeep/pgkeep/internal/repo"
	"github.com/pgkeep/pgkeep/internal/seal"
)

func keyCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:     "key",
		Usage:    "make keys, change who may open backups, check what opens",
		Category: setUp,
		Description: "A host signs what it writes, and encrypts it so that it cannot open it itself.\n" +
			"Operators' age identities open everything: have at least two, one offline.",
		Subcommands: []*cli.Command{
			keyInitCommand(e),
			keyAddRecipientCommand(e),
			keyRotateCommand(e),
			keyCheckCommand(e),
		},
	}
}

func newIdentityFlag() cli.Flag {
	return &cli.StringFlag{Name: "new-identity", Usage: "let the identity in `FILE` open backups; make it"}
}

func keyInitCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:        "init",
		Usage:       "make the keys of this host, and the repository's first",
		Description: "What is there already is kept. \"pgkeep init\" does this and the rest.",
		Flags:       []cli.Flag{newIdentityFlag(), jsonFlag()},
		Action: func(c *cli.Context) error {
			s := &setup{e: e, json: c.Bool("json")}
			defer s.advise()
			if err := s.keys(c.Context, c.String("new-identity"), time.Now()); err != nil {
				return err
			}
			return s.end("key init")
		},
	}
}

func keyAddRecipientCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:      "add-recipient",
		Usage:     "let more operators open all backups, old and new",
		ArgsUsage: "RECIPIENT...",
		Description: "It takes an identity that opens them now, as keys.identity. No backup changes.\n\n" + examples(
			"pgkeep key add-recipient age1…", "as age-keygen printed it"),
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			return e.addRecipients(c.Context, c.Args().Slice(), c.Bool("json"))
		},
	}
}

func keyRotateCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "rotate",
		Usage: "make a new key for the backups from now on",
		Description: "It is for keys.recipients; if there are none, for whoever opens the newest key.\n" +
			"Backups that are there stay as they are, and whoever opens them still does.",
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			return e.rotate(c.Context, c.Bool("json"))
		},
	}
}

func keyCheckCommand(e *env) *cli.Command {
	return &cli.Command{
		Name:  "check",
		Usage: "show the keys of this host, and what they open",
		Description: "Where keys.identity is set, it must open every key of the repository; elsewhere\n" +
			"the keys that writing needs must be there. If not, the exit status is not 0.",
		Flags: []cli.Flag{jsonFlag()},
		Action: func(c *cli.Context) error {
			return e.checkKeys(c.Context, c.Bool("json"))
		},
	}
}

// A setup makes what is missing, and says each thing it made or found.
type setup struct {
	e      *env
	json   bool
	did    []step
	advice []string // for the end
}

type step struct {
	Made bool   `json:"made"` // false: it was there
	What string `json:"what"`
	Is   string `json:"is"`
}

// step notes a thing, and shows it at once: what comes next may fail.
func (s *setup) step(made bool, what, format string, args ...any) {
	one := step{made, what, fmt.Sprintf(format, args...)}
	s.did = append(s.did, one)
	if !s.json {
		did := "found"
		if made {
			did = "made"
		}
		fmt.Fprintf(s.e.out, "%-5s  %-18s  %s\n", did, one.What, one.Is)
	}
}

func (s *setup) note(format string, args ...any) {
	s.advice = append(s.advice, fmt.Sprintf(format, args...))
}

// advise tells what there is to do, after everything else.
func (s *setup) advise() {
	for _, line := range s.advice {
		s.e.say("%s", line)
	}
}

func (s *setup) end(command string) error {
	if !s.json {
		return nil
	}
	return printJSON(s.e.out, command, struct {
		Steps []step `json:"steps"`
	}{s.did})
}

// keys makes the files with this host's keys, then the repository and its first
// key. In identity, if it is not "", is an operator's.
func (s *setup) keys(ctx context.Context, identity string, now time.Time) error {
	cfg, err := s.e.config()
	if err != nil {
		return err
	}
	recipients := slices.Clone(cfg.Keys.Recipients)
	encrypted := cfg.Repository.Encryption != config.EncryptionNone
	if err := named(cfg.Keys, encrypted); err != nil { // before anything is made
		return err
	}
	if identity != "" {
		recipient, err := s.identity(identity, now)
		if err != nil {
			return err
		}
		recipients = append(recipients, recipient)
		slices.Sort(recipients)
		recipients = slices.Compact(recipients)
	}
	if err := s.hostKeys(cfg.Keys, encrypted, now); err != nil {
		return err
	}
	st, access, err := storeAndKeys(ctx, cfg)
	if err != nil {
		return err
	}
	before := 0
	if r, err := repo.Open(ctx, st, access); err == nil { // else Init says what is wrong
		before = len(r.Epochs())
	}
	r, created, err := repo.Init(ctx, st, access, recipients, now)
	if err != nil {
		return err
	}
	how := "not encrypted"
	if r.Marker.Encrypted {
		how = "encrypted"
	}
	s.step(created, "repository", "%s, id %.8s, %s", cfg.Repository.URL, r.Marker.ID, how)
	epochs := r.Epochs()
	for _, ep := range epochs {
		s.step(ep.Number > before, fmt.Sprintf("key epoch %d", ep.Number), "for %s", count(len(ep.Wraps), "recipient"))
	}
	if len(epochs) > 0 {
		s.adviseRecipients(epochs[len(epochs)-1], recipients)
	}
	s.note("this host signs as %s", access.Signer.Public())
	s.note("pin that as one of keys.trusted_signers wherever else its backups are to be believed")
	return nil
}

// adviseRecipients warns where the loss of one key would be the loss of all
// backups, and where somebody wanted is locked out.
func (s *setup) adviseRecipients(newest repo.Epoch, wanted []string) {
	have := recipientsOf(newest)
	for _, text := range wanted {
		if !slices.Contains(have, text) {
			s.note("warning: %s does not open the backups: pgkeep key add-recipient %[1]s", text)
		}
	}
	if len(have) == 1 {
		s.note("warning: only one key opens the backups; if it is lost, so are they")
		s.note("  keep a second one offline: age-keygen makes it, pgkeep key add-recipient lets it in")
	}
}

func recipientsOf(ep repo.Epoch) []string {
	var all []string
	for _, w := range ep.Wraps {
		all = append(all, w.Recipient)
	}
	return all
}

// named reports whether the configuration says where the keys are to be that this
// host needs to write.
func named(keys config.Keys, encrypted bool) error {
	switch {
	case keys.SigningKey == "":
		return fail.Hint(config.Errorf("keys.signing_key is not set"), "name a file, as /etc/pgkeep/signing.key: it will be made")
	case encrypted && keys.MetadataIdentity == "":
		return fail.Hint(config.Errorf("keys.metadata_identity is not set"), "name a file, as /etc/pgkeep/metadata.key: it will be made")
	}
	return nil
}

// hostKeys makes the files with these keys.
func (s *setup) hostKeys(keys config.Keys, encrypted bool, now time.Time) error {
	made, err := makeKey(string(keys.SigningKey), func() (string, error) {
		signer, err := seal.NewSigner()
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("# pgkeep signing key, made %s\n# public: %s\n%s\n", moment(now), signer.Public(), signer.Secret()), nil
	})
	if err != nil {
		return fmt.Errorf("keys.signing_key: %w", err)
	}
	s.step(made, "signing key", "%s", keys.SigningKey)
	if !encrypted {
		return nil
	}
	made, err = makeKey(string(keys.MetadataIdentity), newIdentity(now))
	if err != nil {
		return fmt.Errorf("keys.metadata_identity: %w", err)
	}
	s.step(made, "metadata identity", "%s", keys.MetadataIdentity)
	return nil
}

// identity makes an operator's identity, or finds one, and returns its
// recipient.
func (s *setup) identity(file string, now time.Time) (string, error) {
	made, err := makeKey(file, newIdentity(now))
	if err != nil {
		return "", fmt.Errorf("--new-identity: %w", err)
	}
	recipient, err := recipientIn(file)
	if err != nil {
		return "", fmt.Errorf("--new-identity %s: %w", file, err)
	}
	s.step(made, "operator identity", "%s, %s", file, recipient)
	if made {
		s.note("whoever has %s opens the backups: move it off this host, and keep a copy elsewhere", file)
	}
	return recipient, nil
}

// newIdentity writes an age identity as age-keygen does.
func newIdentity(now time.Time) func() (string, error) {
	return func() (string, error) {
		id, err := age.GenerateX25519Identity()
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("# created: %s\n# public key: %s\n%s\n", now.UTC().Format(time.RFC3339), id.Recipient(), id), nil
	}
}

// recipientIn returns the recipient of the first identity in a file.
func recipientIn(file string) (string, error) {
	secret, err := config.ReadSecret(file)
	if err != nil {
		return "", err
	}
	ids, err := age.ParseIdentities(strings.NewReader(secret.Reveal()))
	if err != nil {
		return "", config.Errorf("not a file of age identities") // the error may quote it
	}
	switch id := ids[0].(type) {
	case *age.X25519Identity:
		return id.Recipient().String(), nil
	case *age.HybridIdentity:
		return id.Recipient().String(), nil
	}
	return "", config.Errorf("an identity of a kind that has no recipient")
}

// makeKey makes a file that its owner alone can read, unless there is one. A
// file that is there is never touched.
func makeKey(file string, content func() (string, error)) (made bool, err error) {
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		return false, err
	}
	text, err := content()
	if err != nil {
		return false, err
	}
	dir := filepath.Dir(file)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return false, config.Errorf("%w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return false, config.Errorf("%w", err)
	}
	defer root.Close()
	err = durable.Create(root, filepath.Base(file), 0o600, func(w io.Writer) error {
		_, err := io.WriteString(w, text)
		return err
	})
	if errors.Is(err, os.ErrExist) { // made by somebody else just now
		return false, nil
	}
	if err != nil {
		return false, config.Errorf("make %s: %w", file, err)
	}
	return true, nil
}

// encrypted opens the repository and fails unless it has keys.
func (e *env) encrypted(ctx context.Context) (*config.Config, *repo.Repo, error) {
	cfg, r, err := e.repository(ctx)
	if err == nil && !r.Marker.Encrypted {
		err = config.Errorf("the repository is not encrypted: it has no keys")
	}
	return cfg, r, err
}

func (e *env) addRecipients(ctx context.Context, recipients []string, asJSON bool) error {
	for _, text := range recipients {
		if _, err := repo.ParseRecipient(text); err != nil {
			return err
		}
	}
	cfg, r, err := e.encrypted(ctx)
	if err != nil {
		return err
	}
	written, err := r.AddRecipients(ctx, recipients, time.Now())
	if errors.Is(err, fail.NoKey) {
		err = fail.Hint(err, "run this where keys.identity names the identity of somebody who is a recipient already")
	}
	if err != nil {
		return err
	}
	if asJSON {
		err = printJSON(e.out, "key add-recipient", struct {
			Epochs int `json:"epochs"` // that were changed
		}{written})
	} else if written == 0 {
		e.say("nothing to do: all of them are recipients already")
	} else {
		fmt.Fprintf(e.out, "added %s to %s\n", count(len(recipients), "recipient"), count(written, "key epoch"))
	}
	if written > 0 {
		e.saySigned(cfg)
	}
	return err
}

func (e *env) rotate(ctx context.Context, asJSON bool) error {
	cfg, r, err := e.encrypted(ctx)
	if err != nil {
		return err
	}
	recipients := cfg.Keys.Recipients
	if epochs := r.Epochs(); len(recipients) == 0 && len(epochs) > 0 {
		recipients = recipientsOf(epochs[len(epochs)-1])
	}
	made, err := r.NewEpoch(ctx, recipients, time.Now())
	if err != nil {
		return err
	}
	if asJSON {
		err = printJSON(e.out, "key rotate", struct {
			Epoch      int      `json:"epoch"`
			Recipients []string `json:"recipients"`
		}{made.Number, recipients})
	} else {
		fmt.Fprintf(e.out, "made key epoch %d for %s\n", made.Number, count(len(recipients), "recipient"))
	}
	e.saySigned(cfg)
	return err
}

// saySigned reminds that a key object of a new signer shuts out whoever does
// not trust it.
func (e *env) saySigned(cfg *config.Config) {
	access, err := open.Access(cfg, thisVersion().Version)
	if err != nil || access.Signer == nil {
		return
	}
	e.say("signed by %s: hosts that do not have it under keys.trusted_signers refuse the repository from now on", access.Signer.Public())
}

// keysShown is what key check prints.
type keysShown struct {
	Signer   string          `json:"signer,omitempty"`             // public key
	Trusted  []string        `json:"trusted_signers"`              // beside it
	Metadata string          `json:"metadata_recipient,omitempty"` // public key
	Identity bool            `json:"identity"`                     // keys.identity is there
	Epochs   []repo.KeyCheck `json:"epochs"`
}

func (e *env) checkKeys(ctx context.Context, asJSON bool) error {
	cfg, err := e.config()
	if err != nil {
		return err
	}
	access, err := open.Access(cfg, thisVersion().Version)
	if err != nil {
		return err
	}
	shown := keysShown{Trusted: append([]string{}, cfg.Keys.TrustedSigners...), Identity: len(access.Identities) > 0, Epochs: []repo.KeyCheck{}}
	if access.Signer != nil {
		shown.Signer = string(access.Signer.Public())
	}
	if access.Metadata != nil {
		shown.Metadata = access.Metadata.Recipient().String()
	}
	r, failed := e.openWith(ctx, cfg, access) // the keys of this host are shown all the same
	if failed == nil {
		shown.Epochs = append(shown.Epochs, r.CheckKeys()...)
		failed = shown.role(r.Marker.Encrypted)
	}
	if asJSON {
		err = printJSON(e.out, "key check", shown)
	} else {
		err = e.printKeys(shown)
	}
	return cmp.Or(failed, err)
}

func (e *env) openWith(ctx context.Context, cfg *config.Config, access repo.Access) (*repo.Repo, error) {
	st, err := open.Store(ctx, cfg.Repository)
	if err != nil {
		return nil, err
	}
	return repo.Open(ctx, st, access)
}

// role fails unless a host with these keys can do its part: an operator's, with
// an identity, opens every epoch; another one writes.
func (k keysShown) role(encrypted bool) error {
	if k.Identity {
		for _, c := range k.Epochs {
			if !c.Opens {
				return fail.With(fail.NoKey, fmt.Errorf("epoch %d: %s", c.Epoch, c.Reason))
			}
		}
		return nil
	}
	switch {
	case k.Signer == "":
		return fail.Hint(config.Errorf("this host can neither write nor open backups: it has no signing key, and no identity"),
			"pgkeep key init makes the keys of a host that writes; where backups are opened, name an operator's identity as keys.identity")
	case encrypted && k.Metadata == "":
		return fail.Hint(fmt.Errorf("this host cannot write: it has no metadata identity: %w", fail.NoKey), "pgkeep key init makes it")
	}
	return nil
}

func (e *env) printKeys(k keysShown) error {
	lines := [][2]string{{"signer", cmp.Or(k.Signer, "none: this host writes nothing")}}
	for _, s := range k.Trusted {
		lines = append(lines, [2]string{"trusted", s})
	}
	lines = append(lines, [2]string{"metadata identity", cmp.Or(k.Metadata, "none")})
	for _, c := range k.Epochs {
		does := "opens here"
		if !c.Opens {
			does = "does not open here"
		}
		lines = append(lines, [2]string{fmt.Sprintf("epoch %d", c.Epoch), fmt.Sprintf("%s, for %s", does, count(len(c.Recipients), "recipient"))})
		for _, r := range c.Recipients {
			lines = append(lines, [2]string{"", r})
		}
	}
	if err := pairs(e.out, lines); err != nil {
		return err
	}
	if n := len(k.Epochs); n > 0 && len(k.Epochs[n-1].Recipients) == 1 {
		e.say("warning: only one key opens the newest backups; if it is lost, so are they")
	}
	return nil
}
