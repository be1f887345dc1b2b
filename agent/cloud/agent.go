package cloud

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/opendepot/depot/agent/provider"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
)

// Config says whom an agent serves, and with what.
type Config struct {
	// URL is the control plane's listener for machines and agents.
	URL string
	// Token joins the control plane; it is needed once. It carries the pin by
	// which the control plane is known afterwards.
	Token client.Token
	// Roots are the authorities to trust where there is no pin; nil means the
	// system's.
	Roots *x509.CertPool
	// State is what the agent must not forget.
	State *State
	// Name is the host's, for listings; Version the program's.
	Name, Version string
	// Pools are what it serves; there must be one.
	Pools []Pool
	// MachineFiles are the files that a machine finds in /run/depot besides its
	// join token: see [provider.MachineSpec].
	MachineFiles func(MachineInfo) (map[string][]byte, error)
	// Dial connects to the control plane; nil means TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// Poll is how often machines are looked at while there are any; 0 means 1 s.
	Poll time.Duration
	// Synced, if set, is called once: when the control plane first answered.
	Synced func()
	// Log must be set.
	Log *slog.Logger
}

// Pool is a capacity that is offered to the control plane. Pools may share a
// provider and a store, which then are listed once; both must be comparable.
type Pool struct {
	// Name is unique in the agent.
	Name string
	// Kind is the provider's: local, docker, kubernetes, ec2.
	Kind string
	// Arch is the architecture as Go names it; Emulated says that the host is
	// of another.
	Arch     string
	Emulated bool
	// MaxMachines is the most at once.
	MaxMachines int
	// Isolated says whether isolated machines may run here.
	Isolated bool
	// CPUs and MemoryBytes are what the host has.
	CPUs        int
	MemoryBytes int64
	// Warnings are for people: what is slower or weaker here than it could be.
	Warnings []string
	// Closed, if set, returns why the pool takes no new machines now, or "". It
	// is asked at each observation and must not block.
	Closed   func() string
	Provider provider.Provider
	Volumes  provider.VolumeStore
}

// MachineInfo is what a machine must be told about itself.
type MachineInfo struct {
	ID, ServerID, Arch string
	Emulated           bool
	// URL is the control plane's; Pin is empty where the system's roots are used.
	URL, Pin string
}

// RefusedError says that the agent will not obey: the control plane is another
// one than it joined, or an older state of it.
type RefusedError struct{ message string }

// Error says what to do about it.
func (e *RefusedError) Error() string { return e.message }

// Agent is a cloud agent.
type Agent struct {
	cfg      Config
	log      *slog.Logger
	state    *State
	identity *identity
	client   *client.Client
	obeys    controlPlane // like client, after New: the loop's only

	mu     sync.Mutex // guards status
	status Status
}

// New returns an agent that goes on from its state directory. Its errors are
// about the configuration and the directory; it does not connect.
func New(cfg Config) (*Agent, error) {
	if err := checkPools(cfg.Pools); err != nil {
		return nil, err
	}
	if cfg.State == nil || cfg.MachineFiles == nil || cfg.Log == nil {
		return nil, errors.New("an agent needs a state directory, machine files and a log")
	}
	if cfg.Poll == 0 {
		cfg.Poll = time.Second
	}
	obeys, err := cfg.State.controlPlane()
	if err != nil {
		return nil, err
	}
	if given := cfg.Token.Pin(); obeys.ServerID != "" && !cfg.Token.IsZero() && given != obeys.Pin {
		return nil, &RefusedError{fmt.Sprintf("the agent's token belongs to another control plane than %s, which this agent joined: "+
			"start the agent without the token, or with an empty --state-dir to hand this host over", obeys.ServerID)}
	}
	if kind := cfg.Token.Kind(); !cfg.Token.IsZero() && kind != "agent" {
		return nil, fmt.Errorf("the token is one for a %s, not for an agent: run `docker depot agent token`", kind)
	}
	id, err := openIdentity(cfg.State)
	if err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, log: cfg.Log, state: cfg.State, identity: id, obeys: obeys}
	if a.client, err = a.connect(); err != nil {
		return nil, err
	}
	return a, nil
}

// connect returns a client whose connections show the certificate of now: one
// that was made before goes on with what it showed.
func (a *Agent) connect() (*client.Client, error) {
	pin := a.obeys.Pin
	if a.obeys.ServerID == "" {
		pin = a.cfg.Token.Pin()
	}
	return client.New(client.Config{
		URL: a.cfg.URL, Pin: pin, Roots: a.cfg.Roots, Identity: a.identity.current,
		UserAgent: "depot-agent/" + a.cfg.Version, Dial: a.cfg.Dial, Tries: 1,
	})
}

// reconnect makes the next call show the certificate of now.
func (a *Agent) reconnect() error {
	fresh, err := a.connect()
	if err != nil {
		return err
	}
	a.client.Close()
	a.client = fresh
	return nil
}

func checkPools(pools []Pool) error {
	if len(pools) == 0 {
		return errors.New("the agent has no pool: declare one with --pool")
	}
	names := map[string]bool{}
	for _, p := range pools {
		switch {
		case p.Name == "":
			return fmt.Errorf("a pool for %s has no name", p.Arch)
		case names[p.Name]:
			return fmt.Errorf("two pools are named %q: give each a name of its own", p.Name)
		case p.MaxMachines <= 0:
			return fmt.Errorf("pool %q allows %d machines: allow one or more", p.Name, p.MaxMachines)
		case p.Provider == nil || p.Volumes == nil:
			return fmt.Errorf("pool %q has no provider or no volume store", p.Name)
		}
		names[p.Name] = true
	}
	return nil
}

// Run joins the control plane if need be and serves it until ctx ends, which
// is no error. Machines run on when it returns. Its errors are refusals: of the
// token by the control plane, or of the control plane by the agent at the
// start ([RefusedError]).
func (a *Agent) Run(ctx context.Context) error {
	defer func() { a.client.Close() }()
	if err := a.join(ctx); err != nil || ctx.Err() != nil {
		return err
	}
	ledger, err := a.state.ledger()
	if err != nil {
		return err
	}
	return newLoop(a, ledger).run(ctx)
}

// machineInfo is what the machine of that launch is told.
func (a *Agent) machineInfo(id string, l *depotv1.Launch, p Pool) MachineInfo {
	return MachineInfo{
		ID: id, ServerID: a.obeys.ServerID, Arch: l.GetArch(), Emulated: p.Emulated,
		URL: a.client.URL(), Pin: a.obeys.Pin,
	}
}

// Status is a snapshot for health checks and metrics.
type Status struct {
	// ServerID and Epoch are the control plane's.
	ServerID string
	Epoch    uint64
	// Connected says that the last call was answered; Synced is when one was.
	Connected bool
	Synced    time.Time
	// Machines counts what is reported, by state; Volumes likewise.
	Machines map[string]int
	Volumes  int
	// Acts and Failures count what was done, by kind of act.
	Acts, Failures map[string]uint64
}

// Status returns what the agent is doing. It is safe to call at any time.
func (a *Agent) Status() Status {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.status
}

// The waits between attempts.
const (
	firstWait = 200 * time.Millisecond
	callWait  = 5 * time.Second // the most between calls and between launches
	// takeoverWait is the most between calls while another session of this
	// agent counts as connected: mostly it is this agent's own life before a
	// crash, and is forgotten in a moment.
	takeoverWait = 500 * time.Millisecond
	actWait      = time.Minute // the most between other acts
)

// backoff returns how long to wait after that many failures in a row: doubling
// up to most, and shortened by up to a half with random in [0, 1), so that many
// agents do not come back at once.
func backoff(failures int, most time.Duration, random float64) time.Duration {
	d := most
	if failures < 16 {
		d = min(firstWait<<failures, most)
	}
	return d - time.Duration(random*float64(d)/2)
}

// jitter is the random number for backoff.
func jitter() float64 {
	return rand.Float64() //nolint:gosec // it spreads load and guards nothing
}

// pause waits between two calls of the control plane.
func (a *Agent) pause(ctx context.Context, failures int) {
	wait(ctx, backoff(failures, callWait, jitter()))
}

// wait waits for d or for the end of ctx.
func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
