package server_test

import (
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// TestIntentFirstLease asks again for one lease: the same request finds it, and
// one that differs in anything is refused and changes nothing.
func TestIntentFirstLease(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	other, _ := cp.project(t, "other", nil)
	user := cp.token(t, &depotv1.CreateTokenRequest{Kind: "user", Name: "ann"})
	a := cp.agent(t, "host-1", pool(2), &depotv1.Pool{Name: "arm", Arch: "arm64", MaxMachines: 1, Isolated: true})
	d := cp.driver(t, user)
	d.req.Project = &depotv1.ProjectRef{Organization: "acme", Name: "web"}
	d.waits(t, "is being launched")
	before := cp.leaseNow(t, d.lease())
	_, strange := newKey(t)

	for name, c := range map[string]struct {
		token  string
		change func(*depotv1.AcquireLeaseRequest)
		differ string
	}{
		"another principal":    {token, func(*depotv1.AcquireLeaseRequest) {}, "principal"},
		"another project":      {user, func(r *depotv1.AcquireLeaseRequest) { r.Project = &depotv1.ProjectRef{Id: other} }, "project"},
		"another architecture": {user, func(r *depotv1.AcquireLeaseRequest) { r.Arch = "arm64" }, "architecture"},
		"isolated":             {user, func(r *depotv1.AcquireLeaseRequest) { r.Isolated = true }, "isolation"},
		"another key":          {user, func(r *depotv1.AcquireLeaseRequest) { r.Csr = strange }, "key"},
	} {
		t.Run(name, func(t *testing.T) {
			req := proto.CloneOf(d.req)
			c.change(req)
			_, err := cp.client(t, c.token).Builder.AcquireLease(t.Context(), req)
			refused(t, err, connect.CodePermissionDenied, d.lease(), "another "+c.differ, "use a new lease id")
			after := cp.leaseNow(t, d.lease())
			after.Polled = before.Polled
			if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("the refused request changed the lease: %s", diff)
			}
		})
	}

	m := a.serve(t)
	first := d.ready(t)
	again := d.poll(t)
	if again.GetState() != depotv1.LeaseState_LEASE_STATE_READY || again.GetEndpoint().GetMachineId() != m.id ||
		!proto.Equal(first.GetEndpoint(), again.GetEndpoint()) {
		t.Errorf("asked again: %v, first: %v", again, first)
	}
	if orders := a.sync(t); len(orders.GetMachines()) != 1 {
		t.Errorf("one lease has %d machines", len(orders.GetMachines()))
	}
	d.release(t)
	d.release(t)
	if ended := d.poll(t); ended.GetState() != depotv1.LeaseState_LEASE_STATE_ENDED || ended.GetCertificate() != nil || ended.GetEndpoint() != nil {
		t.Errorf("a released lease is answered %v", ended)
	}
	// Releasing what was never known succeeds: the first request was lost.
	_, err := d.Builder.ReleaseLease(t.Context(), &depotv1.ReleaseLeaseRequest{LeaseId: newLeaseID()})
	must(t, err)
}

// TestForeignLease has another principal of the project find nothing.
func TestForeignLease(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	id, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	a.serve(t)
	d.ready(t)
	thief := cp.client(t, cp.token(t, &depotv1.CreateTokenRequest{Kind: "project", Name: "second", Project: &depotv1.ProjectRef{Id: id}}))
	_, err := thief.Builder.RenewLease(t.Context(), &depotv1.RenewLeaseRequest{LeaseId: d.lease(), Csr: d.req.GetCsr()})
	refused(t, err, connect.CodeNotFound, d.lease(), "ask for a new one")
	_, err = thief.Builder.ReleaseLease(t.Context(), &depotv1.ReleaseLeaseRequest{LeaseId: d.lease()})
	must(t, err) // as for one that was never known
	if l := cp.leaseNow(t, d.lease()); l.State != controlplane.LeaseReady {
		t.Errorf("the lease is %s after another principal released it", l.State)
	}
}

// TestIntentFirstRegister registers one machine again and again.
func TestIntentFirstRegister(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	m := a.launch(t)
	first, again := m.register(t), m.register(t)
	if !proto.Equal(first.GetBuildkit(), again.GetBuildkit()) || !cmp.Equal(first.GetTrustAnchors(), again.GetTrustAnchors()) || first.GetServerId() != again.GetServerId() {
		t.Errorf("registered again: %v, first: %v", again, first)
	}
	anyone := cp.agentClient(t, nil)
	for name, change := range map[string]func(*depotv1.RegisterRequest){
		"wrong token":        func(r *depotv1.RegisterRequest) { r.JoinToken = r.GetJoinToken()[:len(r.GetJoinToken())-1] + "_" },
		"no token":           func(r *depotv1.RegisterRequest) { r.JoinToken = "" },
		"another's token":    func(r *depotv1.RegisterRequest) { r.MachineId = "mch_" + newLeaseID()[4:] },
		"an id that is none": func(r *depotv1.RegisterRequest) { r.MachineId = "../../etc" },
	} {
		t.Run(name, func(t *testing.T) {
			req := m.request()
			change(req)
			_, err := anyone.Machine.Register(t.Context(), req)
			refused(t, err, connect.CodeUnauthenticated, "join token", "agent's order")
		})
	}

	_, strange := newKey(t)
	stolen := m.request()
	stolen.Csr = strange
	_, err := anyone.Machine.Register(t.Context(), stolen)
	refused(t, err, connect.CodePermissionDenied, m.id, "another key", "look at its host")
	if got := cp.machineNow(t, m.id); got.State != controlplane.MachineFailed || !got.Gone.IsZero() {
		t.Errorf("machine is %s, gone %s; want failed, and on its host until the agent says otherwise", got.State, got.Gone)
	}
	has(t, cp.log.String(), "join token used with a second key")
	a.ordered(t, depotv1.MachineOrder_ACTION_DESTROY, m.id)
	_, err = anyone.Machine.Register(t.Context(), m.request())
	refused(t, err, connect.CodeFailedPrecondition, m.id, "failed")
	ended, err := d.acquire(t.Context())
	must(t, err)
	has(t, ended.GetReason(), m.id, "second key")
}

// TestStaleJoinToken uses the token of a machine that stopped in order: what is
// known of the machine stays as it was.
func TestStaleJoinToken(t *testing.T) {
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
	req := m.request()
	_, req.Csr = newKey(t)
	_, err := cp.agentClient(t, nil).Machine.Register(t.Context(), req)
	if connect.CodeOf(err) != connect.CodePermissionDenied && connect.CodeOf(err) != connect.CodeFailedPrecondition {
		t.Errorf("answer %v", err)
	}
	if got := cp.machineNow(t, m.id); got.State != controlplane.MachineStopped {
		t.Errorf("a machine that stopped in order became %s: %s", got.State, got.Reason)
	}
}

// TestIntentFirstJoin joins one agent again, and others with its token.
func TestIntentFirstJoin(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	text := cp.token(t, &depotv1.CreateTokenRequest{Kind: "agent", Name: "host-1"})
	late := cp.token(t, &depotv1.CreateTokenRequest{Kind: "agent", Name: "host-2", Lifetime: durationpb.New(time.Minute)})
	unused := cp.token(t, &depotv1.CreateTokenRequest{Kind: "agent", Name: "host-3"})
	_, builds := cp.project(t, "web", nil)
	_, csr := newKey(t)
	_, strange := newKey(t)
	c := cp.agentClient(t, nil)
	first, err := c.Agent.Join(t.Context(), &depotv1.JoinRequest{Token: text, Csr: csr, Name: "host-1"})
	must(t, err)
	again, err := c.Agent.Join(t.Context(), &depotv1.JoinRequest{Token: text, Csr: csr, Name: "host-1"})
	must(t, err)
	if first.GetAgentId() != again.GetAgentId() || first.GetServerId() != again.GetServerId() {
		t.Errorf("joined again as %s, first as %s", again.GetAgentId(), first.GetAgentId())
	}
	cp.pass(t, 2*time.Minute)
	for name, r := range map[string]struct {
		req   *depotv1.JoinRequest
		code  connect.Code
		words string
	}{
		"second key":      {&depotv1.JoinRequest{Token: text, Csr: strange}, connect.CodePermissionDenied, "make a new one"},
		"expired":         {&depotv1.JoinRequest{Token: late, Csr: csr}, connect.CodeUnauthenticated, "expired"},
		"a build's token": {&depotv1.JoinRequest{Token: builds, Csr: csr}, connect.CodeUnauthenticated, "lets no agent join"},
		"no token":        {&depotv1.JoinRequest{Csr: csr}, connect.CodeUnauthenticated, "token"},
		"no request":      {&depotv1.JoinRequest{Token: unused, Csr: []byte("no CSR")}, connect.CodeInvalidArgument, "certificate request"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := c.Agent.Join(t.Context(), r.req)
			refused(t, err, r.code, r.words)
		})
	}
	agents, err := cp.admin(t).Admin.ListAgents(t.Context(), &depotv1.ListAgentsRequest{})
	must(t, err)
	if n := len(agents.GetAgents()); n != 1 {
		t.Errorf("%d agents after one joined", n)
	}
	// A bad request has not used up the token.
	_, err = c.Agent.Join(t.Context(), &depotv1.JoinRequest{Token: unused, Csr: csr})
	must(t, err)
	// An agent token opens nothing for clients.
	_, err = cp.client(t, text).Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{})
	refused(t, err, connect.CodeUnauthenticated, "agent token")
}

// TestIntentFirstProject makes a project again.
func TestIntentFirstProject(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	c := cp.admin(t).Admin
	first, err := c.CreateProject(t.Context(), &depotv1.CreateProjectRequest{RequestId: "r1", Name: "web"})
	must(t, err)
	_, err = c.CreateProject(t.Context(), &depotv1.CreateProjectRequest{RequestId: "r1", Name: "other"})
	refused(t, err, connect.CodePermissionDenied, `made project "web" before`)
	again, err := c.CreateProject(t.Context(), &depotv1.CreateProjectRequest{RequestId: "r1", Name: "web"})
	must(t, err)
	if !proto.Equal(first, again) {
		t.Errorf("made again: %v, first: %v", again, first)
	}
	for _, id := range []string{"", "r2"} {
		_, err = c.CreateProject(t.Context(), &depotv1.CreateProjectRequest{RequestId: id, Name: "web"})
		refused(t, err, connect.CodeAlreadyExists, `"web"`, "acme", "choose another name")
	}
}
