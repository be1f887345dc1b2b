package driver

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"connectrpc.com/connect"
	"github.com/google/uuid"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/internal/mtls"
)

// Times of a lease's calls.
const (
	releaseTimeout = 2 * time.Second
	retryAfter     = time.Second     // between calls to a server that is not there
	renewPause     = time.Second     // at least, between two renewals without news
	serverPatience = 2 * time.Minute // for a server that went away while a lease waits
)

// leaseKey says what a lease is for; a process has at most one lease for each.
type leaseKey struct {
	server, principal, project, arch string
	isolated                         bool
}

// lease is this process's claim on one machine. It is made waiting, becomes
// ready once, and ends once.
type lease struct {
	id  string
	key leaseKey
	api *session
	own *mtls.Key
	csr []byte

	// What follows is set before ready and only read afterwards; the identity
	// and the anchors replace their content by themselves.
	machine    string
	address    string
	serverName string
	emulated   bool
	identity   *mtls.Identity
	anchors    *mtls.Anchors

	ended   chan struct{} // closed when the server has ended the lease
	stop    context.CancelFunc
	stopped chan struct{} // closed when the renewal goroutine is gone

	mu         sync.Mutex
	reason     string                             // why it ended; guarded by mu
	notices    []string                           // not shown yet; guarded by mu
	renewAfter time.Time                          // of the certificate, the server's time; guarded by mu
	heard      time.Time                          // when serverTime was heard; guarded by mu
	serverTime time.Time                          // guarded by mu
	solves     map[string]context.CancelCauseFunc // by Ref; guarded by mu
}

func newLease(key leaseKey, api *session) (*lease, error) {
	own, err := mtls.NewKey()
	if err != nil {
		return nil, err
	}
	csr, err := own.CSR()
	if err != nil {
		return nil, err
	}
	id, err := uuid.NewV7()
	if err != nil {
		return nil, fmt.Errorf("make lease id: %w", err)
	}
	return &lease{
		id: "lse_" + strings.ReplaceAll(id.String(), "-", ""), key: key, api: api, own: own, csr: csr,
		ended: make(chan struct{}), stopped: make(chan struct{}),
		solves: map[string]context.CancelCauseFunc{},
	}, nil
}

// endedError reports a lease that the server ended.
type endedError struct{ machine, arch, reason string }

func (e *endedError) Error() string {
	if e.machine == "" {
		return fmt.Sprintf("the wait for %s machine was ended by the server: %s", article(e.arch), e.reason)
	}
	return fmt.Sprintf("machine %s was lost: %s", e.machine, e.reason)
}

// errNoMachine means that none runs and none was to be launched.
var errNoMachine = errors.New("no machine is running")

// acquire asks for the machine until the lease is ready or ended, and tells
// wait each new reason to wait. It starts no goroutine.
func (l *lease) acquire(ctx context.Context, project *depotv1.ProjectRef, launch bool, wait func(reason string)) error {
	req := &depotv1.AcquireLeaseRequest{
		LeaseId: l.id, Project: project, Arch: l.key.arch, Csr: l.csr, Isolated: l.key.isolated, Launch: launch,
	}
	var lostSince time.Time // when the server went away; zero while it is there
	for said := ""; ; {
		resp, err := l.api.Builder.AcquireLease(ctx, req)
		var reason string
		switch {
		case err == nil && resp.GetState() == depotv1.LeaseState_LEASE_STATE_READY:
			return l.becomeReady(resp)
		case err == nil && resp.GetState() == depotv1.LeaseState_LEASE_STATE_ENDED:
			return &endedError{arch: l.key.arch, reason: resp.GetReason()}
		case err == nil:
			reason, lostSince = resp.GetReason(), time.Time{}
		default:
			if lostSince.IsZero() {
				lostSince = time.Now()
			}
			if reason, err = l.waitOut(ctx, err, lostSince, launch); err != nil {
				return err
			}
		}
		if reason != said && reason != "" {
			said = reason
			wait(reason)
		}
	}
}

// waitOut decides about a failed call for a lease: it waits a moment and
// returns what to tell the user meanwhile, or it returns the error to give up
// with.
func (l *lease) waitOut(ctx context.Context, err error, lostSince time.Time, launch bool) (reason string, _ error) {
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case client.Temporary(err) && time.Since(lostSince) < serverPatience:
		if connect.CodeOf(err) == connect.CodeUnavailable {
			reason = err.Error()
		}
		return reason, pause(ctx, retryAfter)
	case !launch && connect.CodeOf(err) == connect.CodeFailedPrecondition:
		return "", fmt.Errorf("%w: %w", errNoMachine, err)
	default:
		return "", err
	}
}

func (l *lease) becomeReady(resp *depotv1.AcquireLeaseResponse) error {
	var err error
	e := resp.GetEndpoint()
	if l.anchors, err = mtls.NewAnchors(e.GetTrustAnchors()); err != nil {
		return fmt.Errorf("lease %s: %w", l.id, err)
	}
	if l.identity, err = mtls.NewIdentity(l.own, resp.GetCertificate().GetChain()); err != nil {
		return fmt.Errorf("lease %s: %w", l.id, err)
	}
	if e.GetVia() != "" {
		return fmt.Errorf("machine %s is behind the gateway %q, which this version cannot use: update the depot plugin", e.GetMachineId(), e.GetVia())
	}
	l.machine, l.address, l.serverName, l.emulated = e.GetMachineId(), e.GetAddress(), e.GetServerName(), e.GetEmulated()
	if resp.GetServerTime() == nil || resp.GetCertificate().GetRenewAfter() == nil {
		return fmt.Errorf("lease %s: the server's answer lacks its time or the certificate's renewal: update the server", l.id)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.heard, l.serverTime = time.Now(), resp.GetServerTime().AsTime()
	l.renewAfter = resp.GetCertificate().GetRenewAfter().AsTime()
	l.notices = resp.GetNotices()
	return nil
}

// now is the server's time: certificates are verified by it, because the
// clocks of clients' hosts are often wrong.
func (l *lease) now() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.serverTime.Add(time.Since(l.heard))
}

// live reports whether the lease is ready and has not ended.
func (l *lease) live() bool {
	select {
	case <-l.ended:
		return false
	default:
		return true
	}
}

// takeNotices returns what the user is still to be shown.
func (l *lease) takeNotices() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := l.notices
	l.notices = nil
	return n
}

// err says how the lease ended; nil while it has not.
func (l *lease) err() error {
	if l.live() {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return &endedError{machine: l.machine, arch: l.key.arch, reason: l.reason}
}

// run renews the lease until ctx ends or the server ends the lease. A server
// that does not answer ends nothing (builds-survive).
func (l *lease) run(ctx context.Context) {
	defer close(l.stopped)
	for {
		wait, reason := l.renew(ctx)
		if reason != "" {
			l.end(reason)
			return
		}
		if pause(ctx, wait) != nil {
			return
		}
	}
}

// renew makes one renewal, which hangs until there is something to say. It
// returns how long to wait before the next, or why the lease has ended.
func (l *lease) renew(ctx context.Context) (wait time.Duration, ended string) {
	began := time.Now()
	req := &depotv1.RenewLeaseRequest{LeaseId: l.id, Wait: true}
	l.mu.Lock()
	due := l.renewAfter
	l.mu.Unlock()
	if l.now().After(due) {
		req.Csr, req.Wait = l.csr, false
	}
	resp, err := l.api.Builder.RenewLease(ctx, req)
	if err != nil {
		switch connect.CodeOf(err) {
		case connect.CodeNotFound, connect.CodePermissionDenied, connect.CodeUnauthenticated:
			return 0, err.Error()
		default:
			return retryAfter, ""
		}
	}
	l.cancel(resp.GetCancelRefs())
	if resp.GetState() == depotv1.LeaseState_LEASE_STATE_ENDED {
		return 0, resp.GetReason()
	}
	l.install(resp)
	return max(0, renewPause-time.Since(began)), ""
}

// install takes over what a renewal brought. What is not valid is left: the
// certificate in use stays good for the other half of its lifetime.
func (l *lease) install(resp *depotv1.RenewLeaseResponse) {
	if anchors := resp.GetTrustAnchors(); len(anchors) > 0 {
		_ = l.anchors.Replace(anchors)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if at := resp.GetServerTime(); at != nil {
		l.heard, l.serverTime = time.Now(), at.AsTime()
	}
	if c := resp.GetCertificate(); len(c.GetChain()) > 0 && c.GetRenewAfter() != nil && l.identity.Install(l.own, c.GetChain()) == nil {
		l.renewAfter = c.GetRenewAfter().AsTime()
	}
}

// end marks the lease ended and ends what still runs on it.
func (l *lease) end(reason string) {
	if reason == "" {
		reason = "the server gave no reason"
	}
	l.mu.Lock()
	l.reason = reason
	close(l.ended)
	solves := slices.Collect(maps.Values(l.solves))
	l.mu.Unlock()
	for _, cancel := range solves {
		cancel(l.err())
	}
}

// cancelledError ends a build that someone else cancelled.
type cancelledError struct{ ref string }

func (e *cancelledError) Error() string {
	return "build " + e.ref + " was cancelled on the server"
}

func (l *lease) cancel(refs []string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ref := range refs {
		if cancel, ok := l.solves[ref]; ok {
			cancel(&cancelledError{ref})
		}
	}
}

// track makes a solve known by its ref, so that it can be cancelled, until the
// returned function is called.
func (l *lease) track(ctx context.Context, ref string) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	l.mu.Lock()
	l.solves[ref] = cancel
	l.mu.Unlock()
	if err := l.err(); err != nil {
		cancel(err)
	}
	return ctx, func() {
		l.mu.Lock()
		delete(l.solves, ref)
		l.mu.Unlock()
		cancel(nil)
	}
}

// release gives the lease back, ready or waiting. It is tried once: the server
// ends a lease that nobody renews.
func (l *lease) release(ctx context.Context) {
	if l.stop != nil {
		l.stop()
		<-l.stopped
	}
	ctx, cancel := context.WithTimeout(ctx, releaseTimeout)
	defer cancel()
	_, _ = l.api.Builder.ReleaseLease(ctx, &depotv1.ReleaseLeaseRequest{LeaseId: l.id})
}

// pause waits, or returns the cause of ctx's end.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return nil
	}
}
