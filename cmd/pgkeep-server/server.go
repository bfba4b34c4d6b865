package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	uiserver "github.com/temporalio/ui-server/v2/server"
	uiconfig "github.com/temporalio/ui-server/v2/server/config"
	uioptions "github.com/temporalio/ui-server/v2/server/server_options"
	enumspb "go.temporal.io/api/enums/v1"
	namespacepb "go.temporal.io/api/namespace/v1"
	"go.temporal.io/api/workflowservice/v1"
	"go.temporal.io/sdk/client"
	sdklog "go.temporal.io/sdk/log"
	"go.temporal.io/server/common/authorization"
	"go.temporal.io/server/common/cluster"
	"go.temporal.io/server/common/config"
	"go.temporal.io/server/common/dynamicconfig"
	"go.temporal.io/server/common/membership/static"
	"go.temporal.io/server/common/persistence/sql/sqlplugin/sqlite"
	"go.temporal.io/server/common/primitives"
	sqliteschema "go.temporal.io/server/schema/sqlite"
	"go.temporal.io/server/temporal"
	"google.golang.org/protobuf/types/known/durationpb"
)

// searchAttributes are what pgkeep's workflows can be searched by. A namespace
// has them from its first moment. pgkeep init registers the same ones on any
// other Temporal: keep the two lists alike.
func searchAttributes() map[string]enumspb.IndexedValueType {
	return map[string]enumspb.IndexedValueType{
		"PgkeepCluster":  enumspb.INDEXED_VALUE_TYPE_KEYWORD,
		"PgkeepHost":     enumspb.INDEXED_VALUE_TYPE_KEYWORD,
		"PgkeepKind":     enumspb.INDEXED_VALUE_TYPE_KEYWORD,
		"PgkeepBackupID": enumspb.INDEXED_VALUE_TYPE_KEYWORD,
		"PgkeepStage":    enumspb.INDEXED_VALUE_TYPE_KEYWORD,
		"PgkeepOutcome":  enumspb.INDEXED_VALUE_TYPE_KEYWORD,
		"PgkeepBytes":    enumspb.INDEXED_VALUE_TYPE_INT,
	}
}

// Options says what to serve, and where.
type Options struct {
	DB        string        // path of the SQLite database; made if it is not there
	IP        netip.Addr    // address to listen on
	Port      int           // of Temporal; 0 is any free one
	UIPort    int           // of the Web UI; 0 is any free one
	Namespace string        // to have, with pgkeep's search attributes
	Retention time.Duration // of closed workflows in Namespace; an hour or more
}

// server is a running Temporal with its Web UI.
type server struct {
	address   string // host:port of Temporal
	namespace string
	uiURL     string // without a path

	broken <-chan error // tells once that the server can go on no longer

	file     string
	lock     lock
	temporal temporal.Server
	ui       *uiserver.Server
	uiDone   sync.WaitGroup
}

// start starts a server and returns when it serves. A start that fails leaves
// nothing running; one that fails on a port has not touched the database.
func start(ctx context.Context, opts Options, log *slog.Logger) (*server, error) {
	if err := reserve(&opts); err != nil {
		return nil, err
	}
	file, err := filepath.Abs(opts.DB)
	if err != nil {
		return nil, err
	}
	if real, err := filepath.EvalSymlinks(file); err == nil {
		file = real // one database, one lock, whatever its names
	}
	held, err := lockDB(file)
	if err != nil {
		return nil, err
	}
	s := &server{
		address:   net.JoinHostPort(dialable(opts.IP).String(), strconv.Itoa(opts.Port)),
		namespace: opts.Namespace,
		uiURL:     "http://" + net.JoinHostPort(dialable(opts.IP).String(), strconv.Itoa(opts.UIPort)),
		file:      file,
		lock:      held,
	}
	if err := s.start(ctx, opts, log); err != nil {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopWithin)
		defer cancel()
		return nil, errors.Join(err, s.stop(ctx))
	}
	return s, nil
}

func (s *server) start(ctx context.Context, opts Options, log *slog.Logger) error {
	if err := prepare(ctx, s.file); err != nil {
		return err
	}
	store := &config.SQL{PluginName: sqlite.PluginName, DatabaseName: escape(s.file), ConnectAttributes: map[string]string{
		"mode":         "rw",
		"journal_mode": "wal",
		"synchronous":  "full", // what a client was told stays, also after a power cut
		"busy_timeout": "10000",
	}}
	ns, err := sqliteschema.NewNamespaceConfig(clusterName, opts.Namespace, false, searchAttributes())
	if err != nil {
		return err
	}
	ns.Detail.Config.Retention = durationpb.New(opts.Retention)
	if err := sqliteschema.CreateNamespaces(store, ns); err != nil {
		return err
	}

	broken := make(chan error, 1)
	s.broken = broken
	tlog := logger{log, broken}
	cfg, hosts, err := serverConfig(opts, s.address, store)
	if err != nil {
		return err
	}
	auth, err := authorization.GetAuthorizerFromConfig(&cfg.Global.Authorization)
	if err != nil {
		return err
	}
	claims, err := authorization.GetClaimMapperFromConfig(&cfg.Global.Authorization, tlog)
	if err != nil {
		return err
	}
	srv, err := temporal.NewServer(
		temporal.WithConfig(cfg),
		temporal.ForServices(temporal.DefaultServices),
		temporal.WithStaticHosts(hosts),
		temporal.WithLogger(tlog),
		temporal.WithAuthorizer(auth),
		temporal.WithClaimMapper(func(*config.Config) authorization.ClaimMapper { return claims }),
		temporal.WithDynamicConfigClient(dynamicConfig()),
	)
	if err != nil {
		return fmt.Errorf("make the temporal server: %w", err)
	}
	s.temporal = srv
	if err := srv.Start(); err != nil {
		return fmt.Errorf("start the temporal server: %w", err)
	}

	s.ui = uiserver.NewServer(uioptions.WithConfigProvider(&uiconfig.Config{
		Host:                hostOf(opts.IP),
		Port:                opts.UIPort,
		TemporalGRPCAddress: s.address,
		EnableUI:            true,
		DefaultNamespace:    opts.Namespace,
		HideLogs:            true,
		DisableNewsFetch:    true,
		CORS:                uiconfig.CORS{CookieInsecure: true}, // it speaks plain HTTP
	}))
	s.uiDone.Go(func() { _ = s.ui.Start() })
	return s.ready(ctx, opts.Retention, log)
}

// ready waits until the server answers, brings the retention of a namespace
// that was there before in line, and waits for the Web UI.
func (s *server) ready(ctx context.Context, retention time.Duration, log *slog.Logger) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	c, err := client.NewLazyClient(client.Options{HostPort: s.address, Namespace: s.namespace, Logger: sdklog.NewStructuredLogger(log)})
	if err != nil {
		return err
	}
	defer c.Close()
	err = s.poll(ctx, func() error {
		_, err := c.CheckHealth(ctx, &client.CheckHealthRequest{})
		return err
	})
	if err != nil {
		return fmt.Errorf("wait for the temporal server: %w", err)
	}

	ns, err := c.WorkflowService().DescribeNamespace(ctx, &workflowservice.DescribeNamespaceRequest{Namespace: s.namespace})
	if err != nil {
		return fmt.Errorf("describe namespace %s: %w", s.namespace, err)
	}
	if ns.Config.WorkflowExecutionRetentionTtl.AsDuration() != retention {
		_, err := c.WorkflowService().UpdateNamespace(ctx, &workflowservice.UpdateNamespaceRequest{
			Namespace: s.namespace,
			Config:    &namespacepb.NamespaceConfig{WorkflowExecutionRetentionTtl: durationpb.New(retention)},
		})
		if err != nil {
			return fmt.Errorf("set the retention of namespace %s: %w", s.namespace, err)
		}
	}

	err = s.poll(ctx, func() error {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.uiURL+"/healthz", nil)
		if err != nil {
			return err
		}
		resp, err := http.DefaultTransport.RoundTrip(req)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
	if err != nil {
		return fmt.Errorf("wait for the web ui: %w", err)
	}
	return nil
}

// poll calls try until it succeeds, ctx is done or the server is broken, and
// then returns why the last call failed.
func (s *server) poll(ctx context.Context, try func() error) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case broken := <-s.broken:
			return broken
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", context.Cause(ctx), err)
		}
	}
}

// stop stops what runs, in reverse order, within ctx. What was not stopped when
// ctx is done ends with the process, and loses nothing either.
func (s *server) stop(ctx context.Context) error {
	stopped := make(chan error, 1)
	go func() { stopped <- s.halt(ctx) }()
	select {
	case err := <-stopped:
		return err
	case <-ctx.Done():
		return fmt.Errorf("stop the temporal server: %w", ctx.Err())
	}
}

func (s *server) halt(ctx context.Context) error {
	if s.ui != nil {
		s.ui.Stop()
		s.uiDone.Wait()
	}
	var errs []error
	if s.temporal != nil {
		errs = append(errs, s.temporal.Stop(), checkpoint(ctx, s.file))
	}
	return errors.Join(append(errs, s.lock.release())...)
}

const clusterName = "active"

// serverConfig is the configuration of a Temporal of one node, and where its
// four services are. Only the frontend listens on opts.IP.
func serverConfig(opts Options, front string, store *config.SQL) (*config.Config, map[primitives.ServiceName]static.Hosts, error) {
	const local = "127.0.0.1"
	services := map[string]config.Service{
		"frontend": {RPC: config.RPC{GRPCPort: opts.Port, BindOnIP: opts.IP.String()}},
	}
	hosts := map[primitives.ServiceName]static.Hosts{primitives.FrontendService: static.SingleLocalHost(front)}
	for _, name := range []primitives.ServiceName{primitives.HistoryService, primitives.MatchingService, primitives.WorkerService} {
		port, err := reservePort(local, 0)
		if err != nil {
			return nil, nil, err
		}
		services[string(name)] = config.Service{RPC: config.RPC{GRPCPort: port, BindOnIP: local}}
		hosts[name] = static.SingleLocalHost(net.JoinHostPort(local, strconv.Itoa(port)))
	}
	cfg := &config.Config{
		Global: config.Global{Membership: config.Membership{MaxJoinDuration: 30 * time.Second, BroadcastAddress: local}},
		Persistence: config.Persistence{
			DefaultStore:     "sqlite",
			VisibilityStore:  "sqlite",
			NumHistoryShards: 1, // SQLite has one writer; and a database keeps its number for ever
			DataStores:       map[string]config.DataStore{"sqlite": {SQL: store}},
		},
		ClusterMetadata: &cluster.Config{
			FailoverVersionIncrement: 10,
			MasterClusterName:        clusterName,
			CurrentClusterName:       clusterName,
			ClusterInformation: map[string]cluster.ClusterInformation{
				clusterName: {Enabled: true, InitialFailoverVersion: 1, RPCAddress: front},
			},
		},
		DCRedirectionPolicy: config.DCRedirectionPolicy{Policy: "noop"},
		Services:            services,
		Archival: config.Archival{
			History:    config.HistoryArchival{State: "disabled"},
			Visibility: config.VisibilityArchival{State: "disabled"},
		},
		NamespaceDefaults: config.NamespaceDefaults{Archival: config.ArchivalNamespaceDefaults{
			History:    config.HistoryArchivalNamespaceDefaults{State: "disabled"},
			Visibility: config.VisibilityArchivalNamespaceDefaults{State: "disabled"},
		}},
		PublicClient: config.PublicClient{HostPort: front},
	}
	return cfg, hosts, nil
}

// dynamicConfig is what differs from Temporal's defaults, which are made for
// clusters of many nodes.
func dynamicConfig() dynamicconfig.Client {
	return dynamicconfig.StaticClient{
		dynamicconfig.HistoryCacheHostLevelMaxSize.Key():                 8096,
		dynamicconfig.FrontendMaxNamespaceVisibilityRPSPerInstance.Key(): 100, // 10 is less than a Web UI and a CLI ask for
		dynamicconfig.MatchingNumTaskqueueReadPartitions.Key():           1,   // with one, priorities are strict
		dynamicconfig.MatchingNumTaskqueueWritePartitions.Key():          1,
		dynamicconfig.ForceSearchAttributesCacheRefreshOnRead.Key():      true,
		dynamicconfig.MatchingEnableFairness.Key():                       true,
		dynamicconfig.WorkflowPauseEnabled.Key():                         true,
		// A cancelled activity hears of it at once, not at its next heartbeat.
		dynamicconfig.WorkerCommandsEnabled.Key():             true,
		dynamicconfig.EnableCancelActivityWorkerCommand.Key(): true,
		// A worker that stops takes no task with it.
		dynamicconfig.EnableCancelWorkerPollsOnShutdown.Key(): true,
		// It would tell Temporal's makers once a day that it runs here.
		dynamicconfig.EnableServerVersionCheck.Key(): false,
	}
}

// reserve makes sure of both ports, and fills in those that were 0. The Web UI
// would end the process if it could not listen.
func reserve(opts *Options) error {
	for _, p := range []struct {
		flag string
		port *int
	}{{"--port", &opts.Port}, {"--ui-port", &opts.UIPort}} {
		port, err := reservePort(opts.IP.String(), *p.port)
		if err != nil {
			return advise(err, "stop what listens there, or choose another port with "+p.flag)
		}
		*p.port = port
	}
	if opts.Port == opts.UIPort {
		return advise(fmt.Errorf("%w: port %d is asked for twice", errUsage, opts.Port), "give --port and --ui-port different values")
	}
	return nil
}

// reservePort returns a port that can be listened on: port itself, or for 0 a
// free one. It connects to a free one once, because the kernel gives nobody
// else a port where a connection has just ended.
func reservePort(ip string, port int) (int, error) {
	l, err := net.Listen("tcp", net.JoinHostPort(ip, strconv.Itoa(port)))
	if err != nil {
		return 0, err
	}
	defer l.Close()
	if port != 0 {
		return port, nil
	}
	addr := l.Addr().(*net.TCPAddr)
	out, err := net.Dial("tcp", addr.String())
	if err != nil {
		return 0, err
	}
	defer out.Close()
	in, err := l.Accept()
	if err != nil {
		return 0, err
	}
	return addr.Port, in.Close() // the side that closes first is the one that lingers
}

// dialable is where a client on this host finds what listens on ip.
func dialable(ip netip.Addr) netip.Addr {
	switch ip {
	case netip.IPv4Unspecified():
		return netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case netip.IPv6Unspecified():
		return netip.IPv6Loopback()
	}
	return ip
}

// hostOf is ip as the host part of host:port.
func hostOf(ip netip.Addr) string {
	if ip.Is6() {
		return "[" + ip.String() + "]"
	}
	return ip.String()
}
