package server_test

import (
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// silence lets an agent's silence be noted.
func (cp *controlPlane) silence(tb testing.TB, a *agent) {
	tb.Helper()
	cp.pass(tb, cp.times.AgentSilent)
	cp.eventually(tb, "the agent's silence is noted", func() bool {
		connected := true
		cp.view(tb, func(tx controlplane.Tx) error {
			got, err := tx.Agent(tb.Context(), a.id)
			connected = got.Connected
			return err
		})
		return !connected
	})
}

// TestOneWriterSilence has an agent fall silent while its machine may still
// write: whatever else is decided, no other machine gets the volume before the
// agent has said that the first is gone.
func TestOneWriterSilence(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(3))
	b := cp.agent(t, "host-2", pool(3))
	first := cp.driver(t, token)
	first.waits(t, "is being launched")
	if len(a.sync(t).GetMachines()) == 0 {
		a, b = b, a // either may have got it
	}
	m := a.serve(t)
	first.ready(t)
	stop(t, cp, m.id, true)
	cp.silence(t, a)
	cp.pass(t, cp.times.Drain)

	next := cp.driver(t, token)
	next.waits(t, "host "+a.name+" is silent", m.id, "may still write the cache", "docker depot agent rm")
	next.waits(t, a.name, "silent")
	if got := cp.machineNow(t, m.id); got.State != controlplane.MachineFailed || !got.Gone.IsZero() {
		t.Errorf("machine is %s, gone %s", got.State, got.Gone)
	}
	if orders := b.sync(t); len(orders.GetMachines()) > 0 {
		t.Errorf("the other host got orders: %v", orders)
	}

	a.exited(t, m, false)
	n := a.serve(t)
	if n.launch.GetVolumeId() != m.launch.GetVolumeId() || n.launch.GetWriterEpoch() <= m.launch.GetWriterEpoch() {
		t.Errorf("next launch %v after %v", n.launch, m.launch)
	}
	next.ready(t)
	if g := cp.generationNow(t, m.launch.GetGenerationId()); g.State != controlplane.GenerationDirty {
		t.Errorf("generation is %s, want dirty", g.State)
	}
}

// TestOneWriterSilentLaunch has the agent fall silent before it launched: the
// lease says which host it waits for, and goes on when that is back.
func TestOneWriterSilentLaunch(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched on host-1")
	cp.silence(t, a)
	d.waits(t, "host-1", "silent")
	m := a.launch(t)
	d.waits(t, m.id, "is starting")
}

func stop(tb testing.TB, cp *controlPlane, machine string, now bool) {
	tb.Helper()
	_, err := cp.admin(tb).Admin.StopMachine(tb.Context(), &depotv1.StopMachineRequest{Id: machine, Now: now})
	must(tb, err)
}

// TestOneWriterReturn has a silent agent come back while its machine still
// runs: who waits is told so.
func TestOneWriterReturn(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	first := cp.driver(t, token)
	first.waits(t, "is being launched")
	m := a.serve(t)
	first.ready(t)
	m.connected(t, first.lease(), 1, 1)
	stop(t, cp, m.id, false)
	cp.silence(t, a)
	next := cp.driver(t, token)
	next.waits(t, "host-1 is silent")
	a.sync(t)
	next.waits(t, m.id, "is stopping")
}

// TestOneWriterRemoval forgets an agent that is silent for good: the audited
// act that frees what it held. Its leases go on elsewhere, cold.
func TestOneWriterRemoval(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	m := a.serve(t)
	d.ready(t)
	d.release(t)
	cp.pass(t, controlplane.DefaultIdleTimeout)
	a.stopped(t, m)
	admin := cp.admin(t).Admin
	_, err := admin.DeleteAgent(t.Context(), &depotv1.DeleteAgentRequest{Id: a.id, Force: true})
	refused(t, err, connect.CodeFailedPrecondition, "host-1", "is connected", "stop it first")
	cp.silence(t, a)
	d.renew(t)
	d.waits(t, "host-1", "is silent")
	_, err = admin.DeleteAgent(t.Context(), &depotv1.DeleteAgentRequest{Id: a.id})
	refused(t, err, connect.CodeFailedPrecondition, "host-1", "holds 1 caches", "--force")

	b := cp.agent(t, "host-2", pool(1))
	_, err = admin.DeleteAgent(t.Context(), &depotv1.DeleteAgentRequest{Id: a.id, Force: true})
	must(t, err)
	n := b.serve(t)
	d.ready(t)
	if n.launch.GetVolumeId() == m.launch.GetVolumeId() {
		t.Error("the lost volume is used on another host")
	}
	_, err = a.call(t.Context(), 0)
	refused(t, err, connect.CodePermissionDenied, a.id, "was removed", "join again")
	_, err = a.Agent.RenewIdentity(t.Context(), &depotv1.RenewIdentityRequest{Csr: m.csr})
	refused(t, err, connect.CodePermissionDenied, a.id, "was removed")
}

// TestNoMassacreMissing has an agent's full observation lack a machine.
func TestNoMassacreMissing(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	order := a.ordered(t, depotv1.MachineOrder_ACTION_RUN, "")

	// Not launched yet: it is not there, and that is no news.
	a.sync(t)
	if got := cp.machineNow(t, order.GetId()); got.State != controlplane.MachinePending {
		t.Fatalf("a machine that was not launched yet is %s: %s", got.State, got.Reason)
	}
	m := a.serve(t)
	d.ready(t)
	// Seen running, then not there any more.
	delete(a.machines, m.id)
	a.sync(t)
	got := cp.machineNow(t, m.id)
	if got.State != controlplane.MachineFailed || got.Gone.IsZero() {
		t.Errorf("a machine that vanished is %s, gone %s", got.State, got.Gone)
	}
	has(t, got.Reason, "vanished from host host-1", "goes on with what the host still has of the cache")
	if g := cp.generationNow(t, m.launch.GetGenerationId()); g.State != controlplane.GenerationDirty {
		t.Errorf("the generation of a machine that vanished is %s, want dirty", g.State)
	}
	ended, err := d.acquire(t.Context())
	must(t, err)
	if l := cp.leaseNow(t, d.lease()); ended.GetState() != depotv1.LeaseState_LEASE_STATE_ENDED || l.End != controlplane.EndMachineLost {
		t.Errorf("lease is %s by %q", ended.GetState(), l.End)
	}
	has(t, ended.GetReason(), m.id, "vanished")
}

// TestNoMassacreOrphans has an agent list machines and volumes that nobody
// ordered: they are reported, and nothing is done to them.
func TestNoMassacreOrphans(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(2))
	b := cp.agent(t, "host-2", &depotv1.Pool{Name: "arm", Arch: "arm64", MaxMachines: 1})
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	m := a.serve(t)
	stranger, volume := "mch_"+newLeaseID()[4:], "vol_"+newLeaseID()[4:]
	running := depotv1.ObservedMachine_STATE_RUNNING
	b.machines[stranger] = &depotv1.ObservedMachine{Id: stranger, State: running, VolumeId: volume, Address: "192.0.2.2:1"}
	b.machines[m.id] = &depotv1.ObservedMachine{Id: m.id, State: depotv1.ObservedMachine_STATE_EXITED} // another agent's
	b.volumes[volume] = &depotv1.ObservedVolume{Id: volume}
	orders := b.sync(t)
	if len(orders.GetMachines())+len(orders.GetDeleteVolumes())+len(orders.GetDeleteGenerations()) > 0 {
		t.Errorf("orders about what is not known: %v", orders)
	}
	if got := cp.machineNow(t, m.id); got.State != controlplane.MachineReady {
		t.Errorf("another agent's word made the machine %s", got.State)
	}
	listed, err := cp.admin(t).Admin.ListAgents(t.Context(), &depotv1.ListAgentsRequest{})
	must(t, err)
	want := []string{m.id, stranger}
	slices.Sort(want)
	for _, ag := range listed.GetAgents() {
		if ag.GetId() == b.id && !slices.Equal(ag.GetOrphans(), want) {
			t.Errorf("orphans %q, want %q", ag.GetOrphans(), want)
		}
	}
	// An empty report is no order either: nothing is deleted, and all that the
	// store knows stays.
	clear(a.volumes)
	if orders := a.sync(t); len(orders.GetDeleteVolumes()) > 0 {
		t.Errorf("volumes to delete: %q", orders.GetDeleteVolumes())
	}
	var v controlplane.Volume
	cp.view(t, func(tx controlplane.Tx) (err error) {
		v, err = tx.Volume(t.Context(), m.launch.GetVolumeId())
		return err
	})
	if v.State != controlplane.VolumeActive {
		t.Errorf("the volume is %s", v.State)
	}
}

// TestNoMassacreTombstone deletes a project: its volume goes by name, and only
// then, and is forgotten once it is gone.
func TestNoMassacreTombstone(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	id, token := cp.project(t, "web", nil)
	_, other := cp.project(t, "api", nil)
	a := cp.agent(t, "host-1", pool(2))
	d, e := cp.driver(t, token), cp.driver(t, other)
	d.waits(t, "is being launched")
	m := a.serve(t)
	d.ready(t)
	e.waits(t, "is being launched")
	n := a.serve(t)
	e.ready(t)
	admin := cp.admin(t).Admin
	ref := &depotv1.ProjectRef{Id: id}
	_, err := admin.DeleteProject(t.Context(), &depotv1.DeleteProjectRequest{Project: ref})
	refused(t, err, connect.CodeFailedPrecondition, `"web"`, "1 amd64 builds", "--force")
	_, err = admin.DeleteProject(t.Context(), &depotv1.DeleteProjectRequest{Project: ref, Force: true})
	must(t, err)
	_, err = d.Builder.RenewLease(t.Context(), &depotv1.RenewLeaseRequest{LeaseId: d.lease()})
	refused(t, err, connect.CodeUnauthenticated, "token") // it went with its project
	m.until(t, "stop now", func(r *depotv1.SyncMachineResponse) bool { return r.GetDrain() && r.GetNow() })
	if l := cp.leaseNow(t, d.lease()); l.End != controlplane.EndRevoked {
		t.Errorf("lease ended by %q, want revoked", l.End)
	}
	a.stopped(t, m)
	orders := a.sync(t)
	if !slices.Equal(orders.GetDeleteVolumes(), []string{m.launch.GetVolumeId()}) {
		t.Fatalf("volumes to delete: %q", orders.GetDeleteVolumes())
	}
	delete(a.volumes, m.launch.GetVolumeId())
	if orders = a.sync(t); len(orders.GetDeleteVolumes()) > 0 {
		t.Errorf("still to delete: %q", orders.GetDeleteVolumes())
	}
	err = cp.store.View(t.Context(), func(tx controlplane.Tx) error {
		_, err := tx.Volume(t.Context(), m.launch.GetVolumeId())
		return err
	})
	if controlplane.CodeOf(err) != controlplane.NotFound {
		t.Errorf("the deleted volume is still known: %v", err)
	}
	if got := cp.machineNow(t, n.id); got.State != controlplane.MachineReady {
		t.Errorf("the other project's machine is %s", got.State)
	}
}

// TestNoMassacreLostGeneration has a host lose a saved cache: the next build
// goes on cold, and says so.
func TestNoMassacreLostGeneration(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	m := a.serve(t)
	d.ready(t)
	d.release(t)
	cp.pass(t, controlplane.DefaultIdleTimeout)
	a.stopped(t, m)
	a.volumes[m.launch.GetVolumeId()].Generations = nil
	a.sync(t)
	if g := cp.generationNow(t, m.launch.GetGenerationId()); g.State != controlplane.GenerationLost {
		t.Errorf("generation is %s, want lost", g.State)
	}
	d.renew(t)
	d.waits(t, "is being launched")
	a.serve(t)
	notices := d.ready(t).GetNotices()
	if len(notices) != 1 {
		t.Fatalf("notices %q", notices)
	}
	has(t, notices[0], m.launch.GetGenerationId(), "starts cold")
}

// TestNoMassacreForeignAgent refuses agents that belong elsewhere.
func TestNoMassacreForeignAgent(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	a := cp.agent(t, "host-1", pool(1))
	if status, body := cp.readyz(t); status != 200 {
		t.Fatalf("readyz: %d %s", status, body)
	}
	own := a.report.GetServerId()
	a.report.ServerId = "srv_" + newLeaseID()[4:]
	_, err := a.call(t.Context(), 0)
	refused(t, err, connect.CodeFailedPrecondition, a.report.GetServerId(), own, "join it here with a new token")
	a.report.ServerId = own
	a.report.Epoch = uint64(cp.record.Epoch) + 3
	_, err = a.call(t.Context(), 0)
	refused(t, err, connect.CodeFailedPrecondition, "epoch 1", "epoch 4", "restored from a backup", "recover --epoch 4")
	status, body := cp.readyz(t)
	if status != 503 {
		t.Errorf("readyz: %d", status)
	}
	has(t, body, "epoch 4", "recover --epoch 4")
}

// TestNoMassacreSessions has two processes of one agent.
func TestNoMassacreSessions(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	a := cp.agent(t, "host-1", pool(1))
	a.report.SessionId = "second"
	_, err := a.call(t.Context(), 0)
	refused(t, err, connect.CodeAlreadyExists, a.id, "another process", "a token of its own")
	cp.pass(t, 3*time.Second)
	a.sync(t)
	a.report.SessionId = "first"
	_, err = a.call(t.Context(), 0)
	refused(t, err, connect.CodeAlreadyExists, a.id)
}
