package server_test

import (
	"context"
	"crypto/rand"
	"errors"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
	"github.com/opendepot/depot/internal/mtls"
)

// driver is a client process with one lease.
type driver struct {
	*client.Client
	key *mtls.Key
	req *depotv1.AcquireLeaseRequest
}

// driver returns a client that asks for amd64 machines of its token's project.
func (cp *controlPlane) driver(tb testing.TB, token string) *driver {
	tb.Helper()
	d := &driver{Client: cp.client(tb, token)}
	d.renew(tb)
	return d
}

// renew gives the driver a new lease id and key, as a new process has.
func (d *driver) renew(tb testing.TB) {
	tb.Helper()
	key, csr := newKey(tb)
	d.key, d.req = key, &depotv1.AcquireLeaseRequest{LeaseId: newLeaseID(), Project: &depotv1.ProjectRef{}, Arch: "amd64", Csr: csr, Launch: true}
}

func newLeaseID() string {
	return controlplane.NewID(controlplane.KindLease, time.Now(), rand.Reader)
}

func (d *driver) lease() string { return d.req.GetLeaseId() }

// poll calls once.
func (d *driver) poll(tb testing.TB) *depotv1.AcquireLeaseResponse {
	tb.Helper()
	resp, err := d.Builder.AcquireLease(tb.Context(), d.req)
	must(tb, err)
	return resp
}

// acquire calls until the lease is not waiting.
func (d *driver) acquire(ctx context.Context) (*depotv1.AcquireLeaseResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		resp, err := d.Builder.AcquireLease(ctx, d.req)
		if err != nil || resp.GetState() != depotv1.LeaseState_LEASE_STATE_WAITING {
			return resp, err
		}
	}
}

// ready is acquire for a lease that becomes ready.
func (d *driver) ready(tb testing.TB) *depotv1.AcquireLeaseResponse {
	tb.Helper()
	resp, err := d.acquire(tb.Context())
	must(tb, err)
	if resp.GetState() != depotv1.LeaseState_LEASE_STATE_READY {
		tb.Fatalf("lease is %s (%s), want ready", resp.GetState(), resp.GetReason())
	}
	return resp
}

// waits calls until the lease waits for what words say.
func (d *driver) waits(tb testing.TB, words ...string) {
	tb.Helper()
	reason := ""
	for end := time.Now().Add(patience); time.Now().Before(end); {
		resp := d.poll(tb)
		if resp.GetState() != depotv1.LeaseState_LEASE_STATE_WAITING {
			tb.Fatalf("lease is %s (%s), want waiting", resp.GetState(), resp.GetReason())
		}
		if reason = resp.GetReason(); containsAll(reason, words) {
			return
		}
	}
	tb.Fatalf("the lease waits for %q, want %q", reason, words)
}

func (d *driver) release(tb testing.TB) {
	tb.Helper()
	_, err := d.Builder.ReleaseLease(tb.Context(), &depotv1.ReleaseLeaseRequest{LeaseId: d.lease()})
	must(tb, err)
}

// agent is a cloud agent: what it sees is in its maps, and what it does about
// orders is the test's to say.
type agent struct {
	cp *controlPlane
	*client.Client
	id, name string
	identity *mtls.Identity
	report   *depotv1.SyncAgentRequest
	machines map[string]*depotv1.ObservedMachine
	volumes  map[string]*depotv1.ObservedVolume
}

// agent joins an agent with pools and connects it.
func (cp *controlPlane) agent(tb testing.TB, name string, pools ...*depotv1.Pool) *agent {
	tb.Helper()
	token := cp.token(tb, &depotv1.CreateTokenRequest{Kind: "agent", Name: name})
	key, csr := newKey(tb)
	joined, err := cp.agentClient(tb, nil).Agent.Join(tb.Context(), &depotv1.JoinRequest{Token: token, Csr: csr, Name: name})
	must(tb, err)
	identity, err := mtls.NewIdentity(key, joined.GetIdentity().GetChain())
	must(tb, err)
	a := &agent{
		cp: cp, Client: cp.agentClient(tb, identity), id: joined.GetAgentId(), name: name, identity: identity,
		report:   &depotv1.SyncAgentRequest{SessionId: "first", ServerId: joined.GetServerId(), Pools: pools, Version: "test"},
		machines: make(map[string]*depotv1.ObservedMachine), volumes: make(map[string]*depotv1.ObservedVolume),
	}
	a.sync(tb)
	return a
}

// pool is a pool of amd64 machines.
func pool(machines int32) *depotv1.Pool {
	return &depotv1.Pool{Name: "main", Provider: "local", Arch: "amd64", MaxMachines: machines}
}

// call reports what the agent sees and waits for orders that are not those of
// revision.
func (a *agent) call(ctx context.Context, revision uint64) (*depotv1.SyncAgentResponse, error) {
	a.report.HaveRevision = revision
	a.report.Machines = slices.Collect(maps.Values(a.machines))
	a.report.Volumes = slices.Collect(maps.Values(a.volumes))
	resp, err := a.Agent.SyncAgent(ctx, a.report)
	if err == nil {
		a.report.Epoch = resp.GetEpoch()
	}
	return resp, err
}

// sync reports, and returns the orders as they are.
func (a *agent) sync(tb testing.TB) *depotv1.SyncAgentResponse {
	tb.Helper()
	resp, err := a.call(tb.Context(), 0)
	must(tb, err)
	return resp
}

// until syncs until the orders are as wanted.
func (a *agent) until(tb testing.TB, what string, wanted func(*depotv1.SyncAgentResponse) bool) *depotv1.SyncAgentResponse {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	for revision := uint64(0); ; {
		resp, err := a.call(ctx, revision)
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			tb.Fatalf("agent %s waited in vain for orders: %s", a.name, what)
		}
		must(tb, err)
		if wanted(resp) {
			return resp
		}
		revision = resp.GetRevision()
	}
}

// ordered waits for a machine of which the order says action, and that the
// agent does not list unless known says so.
func (a *agent) ordered(tb testing.TB, action depotv1.MachineOrder_Action, id string) *depotv1.MachineOrder {
	tb.Helper()
	var found *depotv1.MachineOrder
	a.until(tb, action.String()+" "+id, func(resp *depotv1.SyncAgentResponse) bool {
		found = nil
		for _, o := range resp.GetMachines() {
			if o.GetAction() == action && (o.GetId() == id || id == "" && o.GetLaunch() != nil && a.machines[o.GetId()] == nil) {
				found = o
			}
		}
		return found != nil
	})
	return found
}

// launch waits for the order of a new machine and launches it: it runs, and
// has not registered yet.
func (a *agent) launch(tb testing.TB) *machine {
	tb.Helper()
	order := a.ordered(tb, depotv1.MachineOrder_ACTION_RUN, "")
	l := order.GetLaunch()
	a.machines[order.GetId()] = &depotv1.ObservedMachine{
		Id: order.GetId(), State: depotv1.ObservedMachine_STATE_RUNNING, Address: "192.0.2.1:4000", VolumeId: l.GetVolumeId(),
	}
	if a.volumes[l.GetVolumeId()] == nil {
		a.volumes[l.GetVolumeId()] = &depotv1.ObservedVolume{Id: l.GetVolumeId()}
	}
	a.sync(tb)
	return a.cp.machine(tb, order)
}

// serve launches a machine and makes it ready.
func (a *agent) serve(tb testing.TB) *machine {
	tb.Helper()
	m := a.launch(tb)
	m.register(tb)
	m.ready(tb)
	return m
}

// exited has the agent see that nothing of the machine runs any more, cleanly
// with its generation committed or not.
func (a *agent) exited(tb testing.TB, m *machine, clean bool) {
	tb.Helper()
	seen := &depotv1.ObservedMachine{Id: m.id, State: depotv1.ObservedMachine_STATE_EXITED, VolumeId: m.launch.GetVolumeId(), Clean: clean}
	if clean {
		seen.GenerationId = m.launch.GetGenerationId()
		v := a.volumes[seen.GetVolumeId()]
		v.Generations = append(v.Generations, seen.GetGenerationId())
	} else {
		seen.Reason = "buildkitd was killed"
	}
	a.machines[m.id] = seen
	a.sync(tb)
}

// stopped brings a draining machine to its clean end, up to its removal.
func (a *agent) stopped(tb testing.TB, m *machine) {
	tb.Helper()
	a.ordered(tb, depotv1.MachineOrder_ACTION_STOP, m.id)
	a.exited(tb, m, true)
	a.ordered(tb, depotv1.MachineOrder_ACTION_DESTROY, m.id)
	delete(a.machines, m.id)
	a.sync(tb)
}

// machine is a machine agent.
type machine struct {
	cp *controlPlane
	*client.Client
	id       string
	launch   *depotv1.Launch
	key      *mtls.Key
	csr      []byte
	identity *mtls.Identity
	report   *depotv1.SyncMachineRequest
}

// machine returns the machine of an order, before it registers.
func (cp *controlPlane) machine(tb testing.TB, order *depotv1.MachineOrder) *machine {
	tb.Helper()
	m := &machine{cp: cp, id: order.GetId(), launch: order.GetLaunch(), report: &depotv1.SyncMachineRequest{MachineId: order.GetId()}}
	m.key, m.csr = newKey(tb)
	return m
}

// request is what the machine registers with.
func (m *machine) request() *depotv1.RegisterRequest {
	return &depotv1.RegisterRequest{MachineId: m.id, JoinToken: m.launch.GetJoinToken(), Csr: m.csr}
}

func (m *machine) register(tb testing.TB) *depotv1.RegisterResponse {
	tb.Helper()
	resp, err := m.cp.agentClient(tb, nil).Machine.Register(tb.Context(), m.request())
	must(tb, err)
	m.identity, err = mtls.NewIdentity(m.key, resp.GetIdentity().GetChain())
	must(tb, err)
	m.Client = m.cp.agentClient(tb, m.identity)
	return resp
}

// sync reports, and returns the directive as it is.
func (m *machine) sync(tb testing.TB) *depotv1.SyncMachineResponse {
	tb.Helper()
	m.report.HaveRevision = 0
	resp, err := m.Machine.SyncMachine(tb.Context(), m.report)
	must(tb, err)
	return resp
}

// until syncs until the directive is as wanted.
func (m *machine) until(tb testing.TB, what string, wanted func(*depotv1.SyncMachineResponse) bool) *depotv1.SyncMachineResponse {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	for m.report.HaveRevision = 0; ; {
		resp, err := m.Machine.SyncMachine(ctx, m.report)
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			tb.Fatalf("machine %s waited in vain for a directive: %s", m.id, what)
		}
		must(tb, err)
		if wanted(resp) {
			return resp
		}
		m.report.HaveRevision = resp.GetRevision()
	}
}

// ready reports that buildkitd answers.
func (m *machine) ready(tb testing.TB) {
	tb.Helper()
	m.report.State, m.report.BuildkitVersion = depotv1.MachineState_MACHINE_STATE_READY, "v0.33.1"
	m.sync(tb)
}

// connected reports how many connections a lease has, and how many it had.
func (m *machine) connected(tb testing.TB, lease string, open int32, total int64) {
	tb.Helper()
	m.report.Connections = []*depotv1.LeaseConnections{{LeaseId: lease, Open: open, Total: total}}
	m.sync(tb)
}

func containsAll(text string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(text, w) {
			return false
		}
	}
	return true
}
