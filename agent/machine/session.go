package machine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/internal/mtls"
)

// The session's pace.
const (
	retryMin = 250 * time.Millisecond
	retryMax = 15 * time.Second
	// coalesce is waited after a change, so that changes which come together
	// are reported together.
	coalesce = 50 * time.Millisecond
	// lastReport bounds the report of the end; nobody waits for it.
	lastReport = 3 * time.Second
)

// session is the machine's standing with the control plane: its key, what was
// issued for it, and the calls.
type session struct {
	config Config
	log    *slog.Logger
	// dial reaches the control plane's listener through the relay.
	dial func(ctx context.Context) (net.Conn, error)

	key      *mtls.Key
	identity mtls.Identity // for calls to the control plane
	server   mtls.Identity // for clients
	anchors  mtls.Anchors  // of clients

	mu       sync.Mutex // guards all below
	serverID string
	client   *client.Client
	renewAt  time.Time
}

func newSession(c Config, log *slog.Logger) (*session, error) {
	key, err := mtls.NewKey()
	if err != nil {
		return nil, err
	}
	s := &session{config: c, log: log, key: key, serverID: c.ServerID}
	s.dial = func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", c.Paths.relay())
	}
	if err := s.reconnect(); err != nil {
		return nil, err
	}
	return s, nil
}

// reconnect makes the next call use a connection of its own: one that was
// opened before a certificate was installed does not show it.
func (s *session) reconnect() error {
	next, err := client.New(client.Config{
		URL:       s.config.ControlPlane.URL,
		Pin:       s.config.ControlPlane.Pin,
		Identity:  &s.identity,
		UserAgent: "depot-agent machine",
		Dial:      func(ctx context.Context, _, _ string) (net.Conn, error) { return s.dial(ctx) },
		Tries:     1, // the loops here repeat
	})
	if err != nil {
		return fmt.Errorf("connect to the control plane: %w", err)
	}
	s.mu.Lock()
	last := s.client
	s.client = next
	s.mu.Unlock()
	if last != nil {
		last.Close()
	}
	return nil
}

func (s *session) calls() *client.Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.client
}

// id returns the control plane's id, once it is known.
func (s *session) id() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.serverID
}

// accept refuses answers of another control plane than the first.
func (s *session) accept(serverID string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.serverID == "" {
		s.serverID = serverID
	}
	if serverID == "" || serverID != s.serverID {
		return fmt.Errorf("the control plane calls itself %q, but this machine belongs to %q: "+
			"it obeys that one alone; check where the agent's relay leads", serverID, s.serverID)
	}
	return nil
}

// register trades the join token for certificates, again and again until ctx
// ends or the refusal is final. The token's file is removed in either case
// but the first.
func (s *session) register(ctx context.Context) (*depotv1.BuildkitSettings, error) {
	token, err := os.ReadFile(s.config.Paths.joinToken())
	if err != nil {
		return nil, fmt.Errorf("read the join token: %w", err)
	}
	csr, err := s.key.CSR()
	if err != nil {
		return nil, err
	}
	req := &depotv1.RegisterRequest{
		MachineId: s.config.MachineID,
		JoinToken: strings.TrimSpace(string(token)),
		Csr:       csr,
	}
	var resp *depotv1.RegisterResponse
	err = repeat(ctx, s.log, "register", func(ctx context.Context) (err error) {
		resp, err = s.calls().Machine.Register(ctx, req)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("register with the control plane: %w", err)
	}
	if err := os.Remove(s.config.Paths.joinToken()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove the used join token: %w", err)
	}
	if err := s.accept(resp.GetServerId()); err != nil {
		return nil, err
	}
	if err := s.anchors.Replace(resp.GetTrustAnchors()); err != nil {
		return nil, err
	}
	if err := s.install(resp.GetServerCertificate(), resp.GetIdentity(), time.Now()); err != nil {
		return nil, err
	}
	return resp.GetBuildkit(), nil
}

// install takes over both certificates, and reconnects to show the new one.
func (s *session) install(server, identity *depotv1.Certificate, now time.Time) error {
	if err := s.server.Install(s.key, server.GetChain()); err != nil {
		return fmt.Errorf("for clients: %w", err)
	}
	if err := s.identity.Install(s.key, identity.GetChain()); err != nil {
		return fmt.Errorf("for the control plane: %w", err)
	}
	s.mu.Lock()
	s.renewAt = now.Add(min(
		untilRenewal(s.server.Leaf().NotBefore, s.server.Leaf().NotAfter, server.GetRenewAfter().AsTime(), now),
		untilRenewal(s.identity.Leaf().NotBefore, s.identity.Leaf().NotAfter, identity.GetRenewAfter().AsTime(), now),
	))
	s.mu.Unlock()
	return s.reconnect()
}

// untilRenewal is how long to wait before asking for the next certificate: as
// the server said, but neither past half of the lifetime nor at once, for the
// clocks may differ.
func untilRenewal(notBefore, notAfter, renewAfter, now time.Time) time.Duration {
	life := notAfter.Sub(notBefore)
	return min(max(renewAfter.Sub(now), life/20), life/2)
}

// renew keeps the certificates fresh until ctx ends. One that cannot be
// renewed is used on: whoever is connected stays so.
func (s *session) renew(ctx context.Context) {
	for {
		s.mu.Lock()
		wait := time.Until(s.renewAt)
		s.mu.Unlock()
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		err := repeat(ctx, s.log, "renew certificates", s.renewOnce)
		if err != nil && ctx.Err() == nil {
			s.log.ErrorContext(ctx, "renew certificates", "err", err)
			s.mu.Lock()
			s.renewAt = time.Now().Add(time.Minute)
			s.mu.Unlock()
		}
	}
}

func (s *session) renewOnce(ctx context.Context) error {
	csr, err := s.key.CSR()
	if err != nil {
		return err
	}
	resp, err := s.calls().Machine.RenewMachine(ctx, &depotv1.RenewMachineRequest{MachineId: s.config.MachineID, Csr: csr})
	if err != nil {
		return err
	}
	return s.install(resp.GetServerCertificate(), resp.GetIdentity(), time.Now())
}

// repeat calls fn until it succeeds, is refused for good, or ctx ends.
func repeat(ctx context.Context, log *slog.Logger, act string, fn func(context.Context) error) error {
	for n := 0; ; n++ {
		err := fn(ctx)
		if err == nil || final(err) {
			return err
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%w; the last answer: %w", context.Cause(ctx), err)
		}
		log.WarnContext(ctx, "control plane did not answer; trying again", "act", act, "err", err)
		select {
		case <-ctx.Done():
		case <-time.After(backoff(n)):
		}
	}
}

// final reports whether repeating a call cannot help.
func final(err error) bool {
	switch connect.CodeOf(err) {
	case connect.CodeUnauthenticated, connect.CodePermissionDenied, connect.CodeInvalidArgument,
		connect.CodeFailedPrecondition, connect.CodeNotFound, connect.CodeUnimplemented:
		return true
	default:
		var pin *mtls.PinError
		return errors.As(err, &pin)
	}
}

// backoff doubles from retryMin to retryMax, less up to half at random.
func backoff(n int) time.Duration {
	d := min(retryMin<<min(n, 10), retryMax)
	return d - rand.N(d/2) //nolint:gosec // spreads load, guards nothing
}
