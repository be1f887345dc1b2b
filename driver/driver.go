package driver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	bx "github.com/docker/buildx/driver"
	"github.com/docker/buildx/util/progress"
	bkclient "github.com/moby/buildkit/client"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// infoTimeout bounds Info: a listing of builders must not hang on one server.
const infoTimeout = 3 * time.Second

// Driver is one node of a builder. It is safe for concurrent use.
type Driver struct {
	factory  *Factory
	cfg      bx.InitConfig
	endpoint Endpoint
	opts     driverOpts

	mu          sync.Mutex
	saidRunning bool                    // the last Info did, so Client must not launch; guarded by mu
	mustLaunch  bool                    // what Info called running was not; guarded by mu
	known       []*depotv1.Architecture // as the last Info heard; guarded by mu
	log         progress.Logger         // of the last Bootstrap; guarded by mu
}

var _ interface {
	bx.Driver
	bx.BuildPreparer
} = (*Driver)(nil)

// Info tells whether a machine runs. It launches nothing.
func (d *Driver) Info(ctx context.Context) (*bx.Info, error) {
	s, err := d.factory.session(d.endpoint.Server())
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.saidRunning = false
	if d.factory.leases.entry(d.key(s)).current() != nil {
		return &bx.Info{Status: bx.Running}, nil
	}
	if d.mustLaunch {
		return &bx.Info{Status: bx.Inactive}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, infoTimeout)
	defer cancel()
	b, err := s.Builder.GetBuilder(ctx, &depotv1.GetBuilderRequest{Project: d.endpoint.ref()})
	if err != nil {
		return nil, err
	}
	d.known = b.GetArchitectures()
	for _, a := range d.known {
		if a.GetName() != d.endpoint.Arch {
			continue
		}
		status := statusOf(a.GetMachineState())
		if d.opts.isolated {
			status = bx.Inactive // an isolated lease shares no machine that runs
		}
		d.saidRunning = status == bx.Running
		return &bx.Info{Status: status}, nil
	}
	return nil, fmt.Errorf("project %s has no pool for %s any more: start an agent with one, or run `docker depot configure` to make the builder fit",
		d.endpoint.Name(), d.endpoint.Arch)
}

func statusOf(s depotv1.MachineState) bx.Status {
	switch s {
	case depotv1.MachineState_MACHINE_STATE_READY:
		return bx.Running
	case depotv1.MachineState_MACHINE_STATE_PENDING, depotv1.MachineState_MACHINE_STATE_STARTING:
		return bx.Starting
	case depotv1.MachineState_MACHINE_STATE_DRAINING:
		return bx.Stopping
	default:
		return bx.Inactive
	}
}

// Bootstrap waits until a machine is ready, launching one if need be, and
// shows what it waits for.
func (d *Driver) Bootstrap(ctx context.Context, log progress.Logger) error {
	d.mu.Lock()
	d.saidRunning, d.mustLaunch, d.log = false, false, log
	d.mu.Unlock()
	_, err := d.await(ctx, log, "")
	return err
}

// await gets a lease with a progress line of its own.
func (d *Driver) await(ctx context.Context, log progress.Logger, why string) (l *lease, err error) {
	title := "[depot] waiting for " + article(d.endpoint.Arch) + " machine"
	if d.emulated() {
		title += " (emulated)"
	}
	if why != "" {
		title += ": " + why
	}
	err = progress.Wrap(title, log, func(sub progress.SubLogger) error {
		say := func(format string, args ...any) { sub.Log(1, fmt.Appendf(nil, format+"\n", args...)) }
		began := time.Now()
		l, err = d.lease(ctx, true, func(reason string) { say("%s", reason) })
		if err != nil {
			return err
		}
		say("machine %s is ready, after %s", l.machine, time.Since(began).Round(10*time.Millisecond))
		return nil
	})
	if err != nil {
		return nil, err
	}
	showNotices(log, l)
	return l, nil
}

// emulated reports whether every pool for the architecture emulates it, as far
// as is known.
func (d *Driver) emulated() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range d.known {
		if a.GetName() == d.endpoint.Arch {
			return a.GetEmulated()
		}
	}
	return false
}

// showNotices shows each notice of a lease once, as a line that stays.
func showNotices(log progress.Logger, l *lease) {
	for _, n := range l.takeNotices() {
		_ = progress.Wrap("[depot] "+n, log, func(progress.SubLogger) error { return nil })
	}
}

// Client connects to the machine and completes one call. After an Info that
// said Running it launches nothing: it returns bx.ErrNotRunning if that
// machine is gone. A machine that is lost while connecting is replaced once.
func (d *Driver) Client(ctx context.Context, opts ...bkclient.ClientOpt) (*bkclient.Client, error) {
	var c *bkclient.Client
	err := d.connect(ctx, func(l *lease) (err error) {
		c, err = (&link{lease: l}).client(ctx, opts)
		return err
	})
	return c, err
}

// Dial returns a connection that speaks to the machine's buildkitd.
func (d *Driver) Dial(ctx context.Context) (net.Conn, error) {
	var conn net.Conn
	err := d.connect(ctx, func(l *lease) error {
		return l.patiently(ctx, func(ctx context.Context) (err error) {
			conn, err = l.dial(ctx)
			return err
		})
	})
	return conn, err
}

// connect gets a lease and calls use with it; see Client for when it launches
// and replaces.
func (d *Driver) connect(ctx context.Context, use func(*lease) error) error {
	d.mu.Lock()
	launch, log := !d.saidRunning, d.log
	d.mu.Unlock()
	if log == nil {
		log = d.printLog
	}
	l, err := d.lease(ctx, launch, d.print)
	if err == nil {
		if err = use(l); err == nil || ctx.Err() != nil {
			return err
		}
		d.factory.leases.drop(context.WithoutCancel(ctx), l)
	}
	if !launch && (l != nil || errors.Is(err, errNoMachine)) {
		d.mu.Lock()
		d.saidRunning, d.mustLaunch = false, true
		d.mu.Unlock()
		return bx.ErrNotRunning{}
	}
	if l == nil || ctx.Err() != nil {
		return err
	}
	if l, err = d.await(ctx, log, err.Error()); err != nil {
		return err
	}
	if err = use(l); err != nil && ctx.Err() == nil {
		d.factory.leases.drop(context.WithoutCancel(ctx), l)
	}
	return err
}

// lease returns this process's lease for the node.
func (d *Driver) lease(ctx context.Context, launch bool, wait func(string)) (*lease, error) {
	s, err := d.factory.session(d.endpoint.Server())
	if err != nil {
		return nil, err
	}
	last := "the server gave no reason"
	parent := ctx
	if d.opts.waitTimeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, d.opts.waitTimeout)
		defer cancel()
	}
	l, err := d.factory.leases.acquire(ctx, want{
		key: d.key(s), api: s, project: d.endpoint.ref(), launch: launch,
		wait: func(reason string) { last = reason; wait(reason) },
	})
	if err != nil && ctx.Err() != nil && parent.Err() == nil {
		return nil, fmt.Errorf("got no %s machine for project %s within the wait-timeout of %s: %s",
			d.endpoint.Arch, d.endpoint.Name(), d.opts.waitTimeout, last)
	}
	return l, err
}

func (d *Driver) key(s *session) leaseKey {
	return leaseKey{
		server: d.endpoint.Server(), principal: s.principal,
		project: d.endpoint.Name(), arch: d.endpoint.Arch, isolated: d.opts.isolated,
	}
}

// print shows why a command without a progress display waits.
func (d *Driver) print(reason string) {
	fmt.Fprintf(d.factory.opts.Stderr, "[depot] waiting for %s machine: %s\n", article(d.endpoint.Arch), reason) //nolint:errcheck // nobody reads it then
}

// printLog is a progress display of plain lines.
func (d *Driver) printLog(s *bkclient.SolveStatus) {
	for _, v := range s.Vertexes {
		if v.Completed == nil {
			fmt.Fprintln(d.factory.opts.Stderr, v.Name) //nolint:errcheck // nobody reads it then
		}
	}
	for _, l := range s.Logs {
		fmt.Fprintln(d.factory.opts.Stderr, "[depot] "+strings.TrimRight(string(l.Data), "\n")) //nolint:errcheck // nobody reads it then
	}
}

// Stop gives back this process's lease. The machine is the project's, and its
// idle timeout decides.
func (d *Driver) Stop(ctx context.Context, _ bool) error {
	s, err := d.factory.session(d.endpoint.Server())
	if err != nil {
		return nil //nolint:nilerr // without credentials this process holds no lease
	}
	if l := d.factory.leases.entry(d.key(s)).current(); l != nil {
		d.factory.leases.drop(ctx, l)
	}
	return nil
}

// Rm removes nothing: a builder is this user's view of what belongs to the
// project.
func (d *Driver) Rm(context.Context, bool, bool, bool) error { return nil }

// Version is asked only of machines whose buildkitd cannot tell.
func (d *Driver) Version(context.Context) (string, error) { return "", nil }

// Features says what the machines' BuildKit can do.
func (d *Driver) Features(context.Context) map[bx.Feature]bool {
	return map[bx.Feature]bool{
		bx.OCIExporter:    true,
		bx.DockerExporter: true,
		bx.CacheExport:    true,
		bx.MultiPlatform:  true,
		bx.DirectPush:     true,
		bx.DefaultLoad:    d.opts.defaultLoad,
	}
}

// HostGatewayIP fails: a step on a machine cannot reach the client's host.
func (d *Driver) HostGatewayIP(context.Context) (net.IP, error) {
	return nil, errors.New("host-gateway cannot be used with the depot driver: builds run on other hosts, so give the address itself in --add-host")
}

// Factory returns the driver's factory.
func (d *Driver) Factory() bx.Factory { return d.factory } //nolint:ireturn // buildx's interface

// IsMobyDriver says that this is not the Docker Engine's own builder.
func (d *Driver) IsMobyDriver() bool { return false }

// Config returns what the driver was made with.
func (d *Driver) Config() bx.InitConfig { return d.cfg }
