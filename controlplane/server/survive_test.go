package server_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// away has the control plane down for some time, and starts it again.
func (cp *controlPlane) away(tb testing.TB, d time.Duration) {
	tb.Helper()
	cp.stop(tb)
	cp.mu.Lock()
	cp.passed += d
	cp.mu.Unlock()
	cp.start(tb)
}

// TestBuildsSurvive has the control plane down for longer than any lease lives:
// builds that run go on, and the fleet is known again as it was.
func TestBuildsSurvive(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	_, other := cp.project(t, "api", nil)
	a := cp.agent(t, "host-1", pool(2))
	building, arriving, silent := cp.driver(t, token), cp.driver(t, token), cp.driver(t, token)
	building.waits(t, "is being launched")
	m := a.serve(t)
	for _, d := range []*driver{building, arriving, silent} {
		d.ready(t)
	}
	m.connected(t, building.lease(), 1, 1)
	waiting := cp.driver(t, other)
	waiting.waits(t, "is being launched")
	order := a.ordered(t, depotv1.MachineOrder_ACTION_RUN, "")
	server, before := cp.record.ID, cp.machineNow(t, m.id)

	cp.away(t, 10*time.Minute)
	cp.plan(t)
	if cp.record.ID != server || cp.record.Epoch != 2 {
		t.Errorf("started again as %s at epoch %d", cp.record.ID, cp.record.Epoch)
	}
	for name, d := range map[string]*driver{"building": building, "arriving": arriving, "silent": silent, "waiting": waiting} {
		if l := cp.leaseNow(t, d.lease()); !l.Live() {
			t.Errorf("the %s lease ended: %s", name, l.Reason)
		}
	}
	// Machines: known again, not launched again; the order that was on its way
	// is given again, and is the same.
	orders := a.sync(t)
	if orders.GetEpoch() != 2 || len(orders.GetMachines()) != 2 {
		t.Fatalf("orders %v", orders)
	}
	for _, o := range orders.GetMachines() {
		switch o.GetId() {
		case m.id:
			if o.GetAction() != depotv1.MachineOrder_ACTION_RUN || o.GetLaunch() != nil {
				t.Errorf("the running machine is ordered %v", o)
			}
		case order.GetId():
			if diff := cmp.Diff(order.String(), o.String()); diff != "" {
				t.Errorf("the order is another after the restart: %s", diff)
			}
		default:
			t.Errorf("unknown order %v", o)
		}
	}
	m.sync(t)
	if after := cp.machineNow(t, m.id); after.State != before.State || after.Address != before.Address || after.WriterEpoch != before.WriterEpoch {
		t.Errorf("machine was %+v, is %+v", before, after)
	}

	// A renewal that comes late is accepted; who connects now keeps its lease.
	cp.pass(t, cp.times.LeaseTTL-10*time.Second)
	renewed, err := arriving.Builder.RenewLease(t.Context(), &depotv1.RenewLeaseRequest{LeaseId: arriving.lease()})
	must(t, err)
	if renewed.GetState() != depotv1.LeaseState_LEASE_STATE_READY {
		t.Errorf("a late renewal is answered %s: %s", renewed.GetState(), renewed.GetReason())
	}
	m.report.Connections = []*depotv1.LeaseConnections{{LeaseId: building.lease(), Open: 1, Total: 1}, {LeaseId: arriving.lease(), Open: 1, Total: 1}}
	m.sync(t)
	waiting.poll(t)

	// One TTL after the start, what was not heard of any more ends.
	cp.pass(t, 20*time.Second)
	if l := cp.leaseNow(t, silent.lease()); l.End != controlplane.EndExpired {
		t.Errorf("the silent lease is %s", l.State)
	}
	for name, d := range map[string]*driver{"building": building, "arriving": arriving, "waiting": waiting} {
		if l := cp.leaseNow(t, d.lease()); !l.Live() {
			t.Errorf("the %s lease ended: %s", name, l.Reason)
		}
	}
	n := a.serve(t)
	if n.id != order.GetId() {
		t.Errorf("machine %s was launched for the order of %s", n.id, order.GetId())
	}
	waiting.ready(t)
	for _, d := range []*driver{building, arriving, waiting} {
		d.release(t)
	}
}

// TestBuildsSurviveHangingCalls restarts the control plane while every kind of
// call hangs: the clients' retries carry them over.
func TestBuildsSurviveHangingCalls(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	type answer struct {
		resp *depotv1.AcquireLeaseResponse
		err  error
	}
	acquired := make(chan answer, 1)
	go func() {
		resp, err := d.acquire(t.Context())
		acquired <- answer{resp, err}
	}()
	cp.restart(t)
	m := a.serve(t)
	got := <-acquired
	must(t, got.err)
	if got.resp.GetEndpoint().GetMachineId() != m.id {
		t.Errorf("answer %v", got.resp)
	}
}

// TestBuildsSurviveEpochs counts up the epoch at each start, and with it what
// fences the volumes.
func TestBuildsSurviveEpochs(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	var last uint64
	for epoch := range 3 {
		d.renew(t)
		d.waits(t, "is being launched")
		m := a.serve(t)
		d.ready(t)
		if got := m.launch.GetWriterEpoch(); got>>32 != uint64(epoch)+1 || got <= last {
			t.Errorf("writer epoch %#x after %#x at epoch %d", got, last, epoch+1)
		}
		last = m.launch.GetWriterEpoch()
		stop(t, cp, m.id, false)
		d.release(t)
		a.stopped(t, m)
		cp.restart(t)
		a.sync(t)
	}
}
