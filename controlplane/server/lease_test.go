package server_test

import (
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// ended checks that the lease ended for why.
func (cp *controlPlane) ended(tb testing.TB, d *driver, why controlplane.LeaseEnd) {
	tb.Helper()
	if l := cp.leaseNow(tb, d.lease()); l.State != controlplane.LeaseEnded || l.End != why {
		tb.Fatalf("lease is %s (%s), want ended by %s", l.State, l.End, why)
	}
}

// lives checks that the lease has not ended.
func (cp *controlPlane) lives(tb testing.TB, d *driver) {
	tb.Helper()
	if l := cp.leaseNow(tb, d.lease()); !l.Live() {
		tb.Fatalf("lease ended: %s", l.Reason)
	}
}

// TestWaitingLeaseSilent has a client go away while its machine is launched.
func TestWaitingLeaseSilent(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	order := a.ordered(t, depotv1.MachineOrder_ACTION_RUN, "")
	cp.pass(t, cp.times.WaitTTL-5*time.Second)
	cp.lives(t, d)
	d.poll(t)
	cp.pass(t, cp.times.WaitTTL-5*time.Second)
	cp.lives(t, d)
	cp.pass(t, 10*time.Second)
	cp.ended(t, d, controlplane.EndExpired)
	a.sync(t) // it was not launched, so this says that it is gone
	if m := cp.machineNow(t, order.GetId()); m.State != controlplane.MachineStopped || m.Gone.IsZero() {
		t.Errorf("machine is %s, gone %s", m.State, m.Gone)
	}
	if got := d.poll(t); got.GetState() != depotv1.LeaseState_LEASE_STATE_ENDED || got.GetReason() == "" {
		t.Errorf("a poll that comes too late is answered %v", got)
	}
}

// TestSharedLaunch has one of two clients go away: the launch is still wanted.
func TestSharedLaunch(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d, e := cp.driver(t, token), cp.driver(t, token)
	d.waits(t, "is being launched")
	e.waits(t, "is being launched")
	d.release(t)
	cp.plan(t)
	a.serve(t)
	e.ready(t)
}

// TestReadyLeaseEnds follows the times of a lease that is ready.
func TestReadyLeaseEnds(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", &depotv1.ProjectSettings{IdleTimeout: durationpb.New(24 * time.Hour)})
	a := cp.agent(t, "host-1", pool(1))
	first := cp.driver(t, token)
	first.waits(t, "is being launched")
	m := a.serve(t)
	first.ready(t)
	again := func(t *testing.T) *driver {
		t.Helper()
		d := cp.driver(t, token)
		d.ready(t)
		return d
	}
	t.Run("never connected", func(t *testing.T) {
		d := again(t)
		cp.pass(t, cp.times.ConnectTTL-5*time.Second)
		cp.lives(t, d)
		cp.pass(t, 10*time.Second)
		cp.ended(t, d, controlplane.EndExpired)
		resp, err := d.Builder.RenewLease(t.Context(), &depotv1.RenewLeaseRequest{LeaseId: d.lease(), Csr: d.req.GetCsr(), Wait: true})
		must(t, err)
		if resp.GetState() != depotv1.LeaseState_LEASE_STATE_ENDED || resp.GetReason() == "" || resp.GetCertificate() != nil {
			t.Errorf("renewal is answered %v", resp)
		}
	})
	t.Run("quiet", func(t *testing.T) {
		d := again(t)
		m.connected(t, d.lease(), 1, 1)
		m.connected(t, d.lease(), 0, 1)
		cp.pass(t, cp.times.QuietTTL-time.Second)
		cp.lives(t, d)
		cp.pass(t, time.Second)
		cp.ended(t, d, controlplane.EndExpired)
	})
	t.Run("quiet between two reports", func(t *testing.T) {
		d := again(t)
		m.connected(t, d.lease(), 0, 1)
		cp.pass(t, cp.times.QuietTTL)
		cp.ended(t, d, controlplane.EndExpired)
	})
	t.Run("renewed while quiet", func(t *testing.T) {
		d := again(t)
		m.connected(t, d.lease(), 1, 1)
		m.connected(t, d.lease(), 0, 1)
		for i := range 5 {
			// The first comes before QuietTTL is over, the others as usual.
			cp.pass(t, min(cp.times.LeaseRenew, cp.times.QuietTTL/2+time.Duration(i)*time.Hour))
			a.sync(t)
			_, err := d.Builder.RenewLease(t.Context(), &depotv1.RenewLeaseRequest{LeaseId: d.lease()})
			must(t, err)
		}
		cp.plan(t)
		cp.lives(t, d)
		cp.pass(t, cp.times.LeaseRenew+cp.times.QuietTTL)
		cp.ended(t, d, controlplane.EndExpired)
	})
	t.Run("connected", func(t *testing.T) {
		d := again(t)
		m.connected(t, d.lease(), 1, 1)
		cp.pass(t, time.Hour)
		cp.lives(t, d)
	})
	if got := cp.machineNow(t, m.id); got.State != controlplane.MachineReady {
		t.Errorf("machine is %s: %s", got.State, got.Reason)
	}
}

// TestRevokedToken ends what a deleted token holds, and has the machine cut it.
func TestRevokedToken(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	_, other := cp.project(t, "api", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	m := a.serve(t)
	d.ready(t)
	m.connected(t, d.lease(), 1, 1)
	queued := cp.driver(t, other)
	queued.waits(t, "is full")
	me, err := d.Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{})
	must(t, err)

	_, err = queued.Admin.DeleteToken(t.Context(), &depotv1.DeleteTokenRequest{Id: me.GetPrincipalId()})
	refused(t, err, connect.CodePermissionDenied)
	_, err = cp.admin(t).Admin.DeleteToken(t.Context(), &depotv1.DeleteTokenRequest{Id: me.GetPrincipalId()})
	must(t, err)
	cp.ended(t, d, controlplane.EndRevoked)
	directive := m.until(t, "the revoked lease", func(r *depotv1.SyncMachineResponse) bool { return len(r.GetEndedLeases()) > 0 })
	if !slices.Equal(directive.GetEndedLeases(), []string{d.lease()}) {
		t.Errorf("ended leases %q", directive.GetEndedLeases())
	}
	_, err = d.Builder.RenewLease(t.Context(), &depotv1.RenewLeaseRequest{LeaseId: d.lease()})
	refused(t, err, connect.CodeUnauthenticated, "token")
	// Once its certificate has expired, the lease need not be named any more.
	cp.pass(t, cp.times.ClientCertificate+time.Minute)
	if directive = m.sync(t); len(directive.GetEndedLeases()) > 0 {
		t.Errorf("ended leases after their certificates' end: %q", directive.GetEndedLeases())
	}
}

// TestQueue has three projects want the one machine of a pool.
func TestQueue(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	soon := &depotv1.ProjectSettings{IdleTimeout: durationpb.New(time.Second)}
	_, webToken := cp.project(t, "web", soon)
	_, apiToken := cp.project(t, "api", soon)
	_, docsToken := cp.project(t, "docs", soon)
	a := cp.agent(t, "host-1", pool(1))
	web, api, docs := cp.driver(t, webToken), cp.driver(t, apiToken), cp.driver(t, docsToken)
	web.waits(t, "is being launched")
	m := a.serve(t)
	web.ready(t)
	api.waits(t, "pool main of host host-1 is full", "1 of 1 machines run", "0 projects wait before")
	docs.waits(t, "is full", "1 projects wait before")

	// The machine of web goes; api is next, and docs is not.
	web.release(t)
	cp.pass(t, 2*time.Second)
	a.stopped(t, m)
	n := a.serve(t)
	api.ready(t)
	docs.waits(t, "is full", "0 projects wait before")
	if got := cp.machineNow(t, n.id); got.Project != cp.leaseNow(t, api.lease()).Project {
		t.Errorf("the machine is of project %s", got.Project)
	}

	// web waits behind docs, until the client of docs is silent for too long.
	web.renew(t)
	web.waits(t, "1 projects wait before")
	cp.pass(t, 20*time.Second)
	web.poll(t)
	a.sync(t)
	cp.pass(t, 20*time.Second)
	cp.ended(t, docs, controlplane.EndExpired)
	web.waits(t, "is full", "0 projects wait before")
	api.release(t)
	cp.pass(t, 2*time.Second)
	a.stopped(t, n)
	a.serve(t)
	web.ready(t)
}

// TestRefusedLeases asks for what cannot be.
func TestRefusedLeases(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	cp.agent(t, "host-1", pool(1))
	for name, c := range map[string]struct {
		change func(*depotv1.AcquireLeaseRequest)
		code   connect.Code
		words  []string
	}{
		"no pool":         {func(r *depotv1.AcquireLeaseRequest) { r.Arch = "arm64" }, connect.CodeFailedPrecondition, []string{`"web"`, "no arm64 pool", "--pool arch=arm64", "--platform"}},
		"no architecture": {func(r *depotv1.AcquireLeaseRequest) { r.Arch = "sparc" }, connect.CodeInvalidArgument, []string{`"sparc"`, "amd64"}},
		"isolated":        {func(r *depotv1.AcquireLeaseRequest) { r.Isolated = true }, connect.CodeFailedPrecondition, []string{"isolated", "without isolation"}},
		"nothing runs":    {func(r *depotv1.AcquireLeaseRequest) { r.Launch = false }, connect.CodeFailedPrecondition, []string{"no amd64 machine running", "a build starts one"}},
		"no id":           {func(r *depotv1.AcquireLeaseRequest) { r.LeaseId = "lse_1" }, connect.CodeInvalidArgument, []string{`"lse_1"`, "32 hexadecimal"}},
		"no request":      {func(r *depotv1.AcquireLeaseRequest) { r.Csr = nil }, connect.CodeInvalidArgument, []string{"certificate request"}},
		"no project":      {func(r *depotv1.AcquireLeaseRequest) { r.Project = &depotv1.ProjectRef{Name: "nope"} }, connect.CodeNotFound, []string{`"nope"`, "docker depot project ls"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := cp.driver(t, token)
			c.change(d.req)
			_, err := d.Builder.AcquireLease(t.Context(), d.req)
			refused(t, err, c.code, c.words...)
			err = cp.store.View(t.Context(), func(tx controlplane.Tx) error {
				_, err := tx.Lease(t.Context(), d.lease())
				return err
			})
			if controlplane.CodeOf(err) != controlplane.NotFound {
				t.Errorf("the refused lease is known: %v", err)
			}
		})
	}
}
