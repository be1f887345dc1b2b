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
func (cp *controlPlane) driver(t testing.TB, token string) *driver {
	t.Helper()
	d := &driver{Client: cp.client(t, token)}
	d.renew(t)
	return d
}

// renew gives the driver a new lease id and key, as a new process has.
func (d *driver) renew(t testing.TB) {
	t.Helper()
	key, csr := newKey(t)
	d.key, d.req = key, &depotv1.AcquireLeaseRequest{LeaseId: newLeaseID(), Project: &depotv1.ProjectRef{}, Arch: "amd64", Csr: csr, Launch: true}
}

func newLeaseID() string {
	return controlplane.NewID(controlplane.KindLease, time.Now(), rand.Reader)
}

func (d *driver) lease() string { return d.req.GetLeaseId() }

// poll calls once.
func (d *driver) poll(t testing.TB) *depotv1.AcquireLeaseResponse {
	t.Helper()
	resp, err := d.Builder.AcquireLease(t.Context(), d.req)
	must(t, err)
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
func (d *driver) ready(t testing.TB) *depotv1.AcquireLeaseResponse {
	t.Helper()
	resp, err := d.acquire(t.Context())
	must(t, err)
	if resp.GetState() != depotv1.LeaseState_LEASE_STATE_READY {
		t.Fatalf("lease is %s (%s), want ready", resp.GetState(), resp.GetReason())
	}
	return resp
}

// waits calls until the lease waits for what words say, and returns the reason.
func (d *driver) waits(t testing.TB, words ...string) string {
	t.Helper()
	reason := ""
	for end := time.Now().Add(patience); time.Now().Before(end); {
		resp := d.poll(t)
		if resp.GetState() != depotv1.LeaseState_LEASE_STATE_WAITING {
			t.Fatalf("lease is %s (%s), want waiting", resp.GetState(), resp.GetReason())
		}
		if reason = resp.GetReason(); containsAll(reason, words) {
			return reason
		}
	}
	t.Fatalf("the lease waits for %q, want %q", reason, words)
	return ""
}

func (d *driver) release(t testing.TB) {
	t.Helper()
	_, err := d.Builder.ReleaseLease(t.Context(), &depotv1.ReleaseLeaseRequest{LeaseId: d.lease()})
	must(t, err)
}

// agent is a cloud agent: what it sees is in its maps, and what it does about
// orders is the test's to say.
type agent struct {
	cp *controlPlane
	*client.Client
	id, name string
	report   *depotv1.SyncAgentRequest
	machines map[string]*depotv1.ObservedMachine
	volumes  map[string]*depotv1.ObservedVolume
}

// agent joins an agent with pools and connects it.
func (cp *controlPlane) agent(t testing.TB, name string, pools ...*depotv1.Pool) *agent {
	t.Helper()
	token := cp.token(t, &depotv1.CreateTokenRequest{Kind: "agent", Name: name})
	key, csr := newKey(t)
	joined, err := cp.agentClient(t, nil).Agent.Join(t.Context(), &depotv1.JoinRequest{Token: token, Csr: csr, Name: name})
	must(t, err)
	identity, err := mtls.NewIdentity(key, joined.GetIdentity().GetChain())
	must(t, err)
	a := &agent{
		cp: cp, Client: cp.agentClient(t, identity), id: joined.GetAgentId(), name: name,
		report:   &depotv1.SyncAgentRequest{SessionId: "first", ServerId: joined.GetServerId(), Pools: pools, Version: "test"},
		machines: make(map[string]*depotv1.ObservedMachine), volumes: make(map[string]*depotv1.ObservedVolume),
	}
	a.sync(t)
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
func (a *agent) sync(t testing.TB) *depotv1.SyncAgentResponse {
	t.Helper()
	resp, err := a.call(t.Context(), 0)
	must(t, err)
	return resp
}

// until syncs until the orders are as wanted.
func (a *agent) until(t testing.TB, what string, wanted func(*depotv1.SyncAgentResponse) bool) *depotv1.SyncAgentResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for revision := uint64(0); ; {
		resp, err := a.call(ctx, revision)
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			t.Fatalf("agent %s waited in vain for orders: %s", a.name, what)
		}
		must(t, err)
		if wanted(resp) {
			return resp
		}
		revision = resp.GetRevision()
	}
}

// ordered waits for a machine of which the order says action, and that the
// agent does not list unless known says so.
func (a *agent) ordered(t testing.TB, action depotv1.MachineOrder_Action, id string) *depotv1.MachineOrder {
	t.Helper()
	var found *depotv1.MachineOrder
	a.until(t, action.String()+" "+id, func(resp *depotv1.SyncAgentResponse) bool {
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
func (a *agent) launch(t testing.TB) *machine {
	t.Helper()
	order := a.ordered(t, depotv1.MachineOrder_ACTION_RUN, "")
	l := order.GetLaunch()
	a.machines[order.GetId()] = &depotv1.ObservedMachine{
		Id: order.GetId(), State: depotv1.ObservedMachine_STATE_RUNNING, Address: "192.0.2.1:4000", VolumeId: l.GetVolumeId(),
	}
	if a.volumes[l.GetVolumeId()] == nil {
		a.volumes[l.GetVolumeId()] = &depotv1.ObservedVolume{Id: l.GetVolumeId()}
	}
	a.sync(t)
	return a.cp.machine(t, order)
}

// serve launches a machine and makes it ready.
func (a *agent) serve(t testing.TB) *machine {
	t.Helper()
	m := a.launch(t)
	m.register(t)
	m.ready(t)
	return m
}

// exited has the agent see that nothing of the machine runs any more, cleanly
// with its generation committed or not.
func (a *agent) exited(t testing.TB, m *machine, clean bool) *depotv1.SyncAgentResponse {
	t.Helper()
	seen := &depotv1.ObservedMachine{Id: m.id, State: depotv1.ObservedMachine_STATE_EXITED, VolumeId: m.launch.GetVolumeId(), Clean: clean}
	if clean {
		seen.GenerationId = m.launch.GetGenerationId()
		v := a.volumes[seen.GetVolumeId()]
		v.Generations = append(v.Generations, seen.GetGenerationId())
	} else {
		seen.Reason = "buildkitd was killed"
	}
	a.machines[m.id] = seen
	return a.sync(t)
}

// stopped brings a draining machine to its clean end, up to its removal.
func (a *agent) stopped(t testing.TB, m *machine) {
	t.Helper()
	a.ordered(t, depotv1.MachineOrder_ACTION_STOP, m.id)
	a.exited(t, m, true)
	a.ordered(t, depotv1.MachineOrder_ACTION_DESTROY, m.id)
	delete(a.machines, m.id)
	a.sync(t)
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
func (cp *controlPlane) machine(t testing.TB, order *depotv1.MachineOrder) *machine {
	t.Helper()
	m := &machine{cp: cp, id: order.GetId(), launch: order.GetLaunch(), report: &depotv1.SyncMachineRequest{MachineId: order.GetId()}}
	m.key, m.csr = newKey(t)
	return m
}

// request is what the machine registers with.
func (m *machine) request() *depotv1.RegisterRequest {
	return &depotv1.RegisterRequest{MachineId: m.id, JoinToken: m.launch.GetJoinToken(), Csr: m.csr}
}

func (m *machine) register(t testing.TB) *depotv1.RegisterResponse {
	t.Helper()
	resp, err := m.cp.agentClient(t, nil).Machine.Register(t.Context(), m.request())
	must(t, err)
	m.identity, err = mtls.NewIdentity(m.key, resp.GetIdentity().GetChain())
	must(t, err)
	m.Client = m.cp.agentClient(t, m.identity)
	return resp
}

// sync reports, and returns the directive as it is.
func (m *machine) sync(t testing.TB) *depotv1.SyncMachineResponse {
	t.Helper()
	m.report.HaveRevision = 0
	resp, err := m.Machine.SyncMachine(t.Context(), m.report)
	must(t, err)
	return resp
}

// until syncs until the directive is as wanted.
func (m *machine) until(t testing.TB, what string, wanted func(*depotv1.SyncMachineResponse) bool) *depotv1.SyncMachineResponse {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for m.report.HaveRevision = 0; ; {
		resp, err := m.Machine.SyncMachine(ctx, m.report)
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			t.Fatalf("machine %s waited in vain for a directive: %s", m.id, what)
		}
		must(t, err)
		if wanted(resp) {
			return resp
		}
		m.report.HaveRevision = resp.GetRevision()
	}
}

// ready reports that buildkitd answers.
func (m *machine) ready(t testing.TB) {
	t.Helper()
	m.report.State, m.report.BuildkitVersion = depotv1.MachineState_MACHINE_STATE_READY, "v0.33.1"
	m.sync(t)
}

// connected reports how many connections a lease has, and how many it had.
func (m *machine) connected(t testing.TB, lease string, open int32, total int64) {
	t.Helper()
	m.report.Connections = []*depotv1.LeaseConnections{{LeaseId: lease, Open: open, Total: total}}
	m.sync(t)
}

func containsAll(text string, words []string) bool {
	for _, w := range words {
		if !strings.Contains(text, w) {
			return false
		}
	}
	return true
}
