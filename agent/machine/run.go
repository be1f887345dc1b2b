package machine

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// Surroundings are what a machine is given at its start beside its [Config].
type Surroundings struct {
	// Listener is the socket for clients; see [Inherited]. Run closes it.
	Listener net.Listener
	// Terminate carries the signals that ask the machine to end. TERM drains
	// it, however often it comes (a provider may repeat it); INT does not wait
	// for builds.
	Terminate <-chan os.Signal
	// Log is where state changes go.
	Log *slog.Logger
	// Output is where buildkitd's log goes.
	Output io.Writer
}

// Inherited returns the listening socket that was handed over as descriptor 3
// (n is the value of LISTEN_FDS). A second descriptor, the volume's lock, is
// left open for as long as the process lives; buildkitd inherits neither.
func Inherited(n int) (net.Listener, error) {
	const first = 3
	if n < 1 || n > 2 {
		return nil, fmt.Errorf("LISTEN_FDS is %d: the launcher hands over the listening socket as descriptor 3 and, if there is one, the volume's lock as 4", n)
	}
	for fd := first; fd < first+n; fd++ {
		unix.CloseOnExec(fd)
	}
	f := os.NewFile(first, "clients")
	defer f.Close() //nolint:errcheck // FileListener has a copy
	l, err := net.FileListener(f)
	if err != nil {
		return nil, fmt.Errorf("use descriptor 3 as the listening socket: %w", err)
	}
	return l, nil
}

// Run is a machine's life: it registers, runs buildkitd, serves clients, and
// ends when it was told to, when buildkitd ends, or when ctx does, which waits
// for no build. How it ended is in exit.json when Run returns; the error is
// nil after an end in order.
func Run(ctx context.Context, c Config, s Surroundings) error {
	if err := c.Validate(); err != nil {
		_ = s.Listener.Close()
		return err
	}
	c = c.withDefaults()
	log := s.Log.With("machine", c.MachineID)
	session, err := newSession(c, log)
	if err != nil {
		_ = s.Listener.Close()
		return errors.Join(err, writeExit(c.Paths.exit(), provider.Exit{Reason: err.Error()}))
	}
	changed := &bell{}
	m := &machine{
		config:  c,
		log:     log,
		session: session,
		status:  newStatus(changed),
		leases:  newLeases(c.MachineID, c.ServerID, changed.ring),
		changed: changed,
		kids:    &reaper{},
		output:  s.Output,
	}
	m.front = newFront(s.Listener, &session.server, &session.anchors, m.leases, c.Paths.socket(), log)
	m.reporter = &reporter{session: session, status: m.status, leases: m.leases, changed: changed, log: log}
	return m.run(ctx, s.Terminate)
}

type machine struct {
	config   Config
	log      *slog.Logger
	session  *session
	status   *status
	leases   *leases
	changed  *bell
	kids     *reaper
	front    *front
	reporter *reporter
	output   io.Writer // buildkitd's log
}

// run owns the machine's goroutines: all have ended when it returns.
func (m *machine) run(ctx context.Context, terminate <-chan os.Signal) error {
	// What runs in the background goes on while the machine drains.
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var tasks sync.WaitGroup
	defer tasks.Wait()
	defer stop()
	if os.Getpid() == 1 {
		tasks.Go(func() { m.kids.run(background) })
	}
	tasks.Go(func() { m.obey(ctx, background, terminate) })
	tasks.Go(func() {
		if err := m.front.run(background); err != nil {
			m.log.ErrorContext(ctx, "serve clients", "err", err)
			m.status.drain("clients can no longer be served: "+err.Error(), false)
		}
	})

	reporting, silence := context.WithCancel(background)
	defer silence()
	var reports sync.WaitGroup
	err := m.live(background, func() {
		reports.Go(func() { m.reporter.run(reporting) })
		reports.Go(func() { m.session.renew(reporting) })
	})
	exit := provider.Exit{Clean: err == nil}
	if err != nil {
		exit.Reason = err.Error()
	}
	if writeErr := writeExit(m.config.Paths.exit(), exit); writeErr != nil {
		err = errors.Join(err, writeErr)
	}
	silence()
	reports.Wait()
	if err != nil {
		m.log.ErrorContext(ctx, "machine failed", "err", err)
		m.status.set(depotv1.MachineState_MACHINE_STATE_FAILED, err.Error())
	} else {
		m.log.InfoContext(ctx, "machine stopped")
		m.status.set(depotv1.MachineState_MACHINE_STATE_STOPPED, m.status.drainReason())
	}
	if m.session.identity.Leaf() != nil {
		m.reporter.last(background)
	}
	return err
}

// obey turns signals, and the end of ctx, into orders to drain.
func (m *machine) obey(ctx, background context.Context, terminate <-chan os.Signal) {
	for {
		select {
		case <-background.Done():
			return
		case <-ctx.Done():
			m.status.drain("its process was cancelled", true)
			return
		case signal := <-terminate:
			m.status.drain("its agent asked for it", signal == unix.SIGINT)
		}
	}
}

// live takes the machine from its start to buildkitd's end. Nil means that
// buildkitd was stopped in order and its tree is durable. It calls registered
// once the machine has an identity.
func (m *machine) live(ctx context.Context, registered func()) error {
	settings, err := m.register(ctx)
	if err != nil {
		return fmt.Errorf("%w; buildkitd was never started", err)
	}
	if arch := settings.GetArch(); arch != m.config.Arch {
		return fmt.Errorf("the control plane ordered a machine for %q, but this one was launched for %q: check the agent's pool; buildkitd was never started", arch, m.config.Arch)
	}
	registered()
	m.prepareCgroup()
	d, err := m.startDaemon(ctx, settings)
	if err != nil {
		return err
	}
	if err := m.becomeReady(ctx, d); err != nil {
		if closed(d.done) {
			return err
		}
		if stopErr := d.stop(m.config.Times.Stop); stopErr != nil {
			return fmt.Errorf("%w; then: %w", err, stopErr)
		}
		if errors.Is(err, errDrained) {
			return syncTree(m.config.Paths.Root)
		}
		return err
	}
	select {
	case <-d.done:
		m.leases.deny("buildkitd has ended")
		return d.failure()
	case <-m.status.draining:
	}
	if err := m.drain(ctx, d); err != nil {
		return err
	}
	return syncTree(m.config.Paths.Root)
}

// errDrained says that the machine was told to end before it was ready.
var errDrained = errors.New("told to end before it was ready")

// register bounds the registration by its deadline and by orders to end.
func (m *machine) register(ctx context.Context) (*depotv1.BuildkitSettings, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, m.config.Times.Register,
		fmt.Errorf("not possible within %s", m.config.Times.Register))
	defer cancel()
	ctx, cut := m.untilDrained(ctx)
	defer cut()
	return m.session.register(ctx)
}

// becomeReady waits for buildkitd and lets clients in.
func (m *machine) becomeReady(ctx context.Context, d *daemon) error {
	ctx, cancel := context.WithTimeout(ctx, m.config.Times.Ready)
	defer cancel()
	ctx, cut := m.untilDrained(ctx)
	defer cut()
	began := time.Now()
	version, err := d.awaitReady(ctx, m.config.Paths.socket())
	if err != nil {
		if cause := context.Cause(ctx); errors.Is(cause, errDrained) && !closed(d.done) {
			return cause
		}
		return err
	}
	m.log.InfoContext(ctx, "machine ready", "buildkit", version, "after", time.Since(began))
	m.status.setVersion(version)
	m.leases.allow(m.session.id())
	m.status.set(depotv1.MachineState_MACHINE_STATE_READY, "")
	return nil
}

// untilDrained returns a context that ends when the machine is told to.
func (m *machine) untilDrained(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	go func() { // ends with ctx
		select {
		case <-ctx.Done():
		case <-m.status.draining:
			cancel(errDrained)
		}
	}()
	return ctx, func() { cancel(nil) }
}

// drain lets nobody in, waits for the builds that run, unless it shall not,
// and stops buildkitd.
func (m *machine) drain(ctx context.Context, d *daemon) error {
	why := m.status.drainReason()
	m.log.InfoContext(ctx, "machine draining", "reason", why, "connections", m.leases.connections())
	m.leases.deny("it is draining")
	m.status.set(depotv1.MachineState_MACHINE_STATE_DRAINING, why)
	hurry := m.status.hurry
	for {
		changed := m.changed.next()
		if m.leases.connections() == 0 {
			return d.stop(m.config.Times.Stop)
		}
		select {
		case <-d.done:
			return d.failure()
		case <-hurry:
			m.leases.cutAll(errors.New("the machine ends now: " + why))
			hurry = nil
		case <-changed:
		}
	}
}
