package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"time"

	"go.temporal.io/api/serviceerror"
	"go.temporal.io/sdk/client"
	"go.temporal.io/sdk/contrib/envconfig"
	"go.temporal.io/sdk/log"

	"github.com/pgkeep/pgkeep/internal/config"
	"github.com/pgkeep/pgkeep/internal/fail"
)

// A server is a connection to the Temporal server.
type server struct {
	client.Client
	namespace string
	ui        string // of the Web UI, "" if unknown
}

// dialTimeout is how long a server may take to answer the first time.
const dialTimeout = 5 * time.Second

// temporal connects to the server that the configuration, or else Temporal's
// own environment, names. The caller closes it. If it does not answer, the
// error is of kind fail.TemporalDown.
func (e *env) temporal(ctx context.Context) (*server, error) { return e.dial(ctx, nil) }

// dial is temporal; what the SDK measures goes to m, nil for nowhere.
func (e *env) dial(ctx context.Context, m client.MetricsHandler) (*server, error) {
	c, err := e.config()
	if err != nil {
		return nil, err
	}
	logger, err := e.log()
	if err != nil {
		return nil, err
	}
	opt, err := e.temporalOptions()
	if err != nil {
		return nil, err
	}
	opt.Logger = log.NewStructuredLogger(logger)
	opt.Identity = "pgkeep@" + string(c.Host)
	opt.MetricsHandler = m

	dialing, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	conn, err := client.DialContext(dialing, opt)
	if err != nil {
		return nil, dialError(ctx, opt.HostPort, err)
	}
	return &server{conn, opt.Namespace, cmp.Or(string(c.Temporal.UIURL), uiOf(opt.HostPort))}, nil
}

// temporalOptions says which server is meant, without asking it.
func (e *env) temporalOptions() (client.Options, error) {
	c, err := e.config()
	if err != nil {
		return client.Options{}, err
	}
	opt, err := envconfig.LoadClientOptions(envconfig.LoadClientOptionsRequest{ConfigFileProfile: c.Temporal.Profile})
	if err != nil {
		return client.Options{}, config.Errorf("temporal: %w", err)
	}
	opt.HostPort = cmp.Or(string(c.Temporal.Address), opt.HostPort, client.DefaultHostPort)
	opt.Namespace = cmp.Or(c.Temporal.Namespace, opt.Namespace, defaultNamespace)
	return opt, nil
}

// defaultNamespace is the one that pgkeep-server makes.
const defaultNamespace = "pgkeep"

func dialError(ctx context.Context, addr string, err error) error {
	err = fmt.Errorf("connect to Temporal at %s: %w", addr, err)
	if ctx.Err() != nil {
		return err
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fail.With(fail.TemporalDown, fmt.Errorf("connect to Temporal at %s: no answer in %s", addr, dialTimeout))
	}
	return temporalError(err)
}

// temporalError gives a kind to what the server says, and to its silence.
func temporalError(err error) error {
	if missing, ok := errors.AsType[*serviceerror.NamespaceNotFound](err); ok {
		return fail.With(fail.BadConfig, fail.Hint(fmt.Errorf("the Temporal server has no namespace %q", missing.Namespace),
			"name another as temporal.namespace, or create it: temporal operator namespace create --retention 90d "+missing.Namespace))
	}
	_, unavailable := errors.AsType[*serviceerror.Unavailable](err)
	_, late := errors.AsType[*serviceerror.DeadlineExceeded](err)
	if unavailable || late {
		return fail.With(fail.TemporalDown, err)
	}
	return err
}

// uiOf guesses where the Web UI of a server is: that of pgkeep-server, or of
// Temporal Cloud.
func uiOf(addr string) string {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return ""
	}
	if ip := net.ParseIP(host); host == "localhost" || ip != nil && ip.IsLoopback() {
		return "http://" + net.JoinHostPort(host, "8233")
	}
	if strings.HasSuffix(host, ".tmprl.cloud") || strings.HasSuffix(host, ".api.temporal.io") {
		return "https://cloud.temporal.io"
	}
	return ""
}

// link is the page of a run in the Web UI, or "" if that is not known.
func (s *server) link(workflowID, runID string) string {
	if s.ui == "" {
		return ""
	}
	return s.ui + "/namespaces/" + url.PathEscape(s.namespace) + "/workflows/" + url.PathEscape(workflowID) + "/" + url.PathEscape(runID)
}
