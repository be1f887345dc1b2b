package server_test

import (
	"crypto/x509"
	"slices"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/google/go-cmp/cmp"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/internal/mtls"
)

// leaf parses a chain's leaf and checks it against the authority.
func leaf(tb testing.TB, chain [][]byte, authority []byte, usage x509.ExtKeyUsage) *x509.Certificate {
	tb.Helper()
	cert, err := x509.ParseCertificate(chain[0])
	must(tb, err)
	root, err := x509.ParseCertificate(authority)
	must(tb, err)
	roots := x509.NewCertPool()
	roots.AddCert(root)
	_, err = cert.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{usage}})
	must(tb, err)
	if !slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{usage}) || cert.IsCA || len(cert.UnknownExtKeyUsage) > 0 {
		tb.Errorf("usages %v, authority %v; want %v alone", cert.ExtKeyUsage, cert.IsCA, usage)
	}
	return cert
}

// names are all the names that a certificate carries.
func names(c *x509.Certificate) []string {
	all := slices.Concat(c.DNSNames, c.EmailAddresses)
	for _, ip := range c.IPAddresses {
		all = append(all, ip.String())
	}
	for _, u := range c.URIs {
		all = append(all, u.String())
	}
	return all
}

func lifetime(tb testing.TB, cp *controlPlane, c *x509.Certificate, want time.Duration) {
	tb.Helper()
	if d := c.NotAfter.Sub(cp.now()); d > want || d < want-time.Minute {
		tb.Errorf("good for %s more, want %s", d, want)
	}
	if d := cp.now().Sub(c.NotBefore); d < cp.times.Backdate || d > cp.times.Backdate+time.Minute {
		tb.Errorf("good since %s ago, want %s", d, cp.times.Backdate)
	}
}

// TestOwnLeaseCertificates looks at all that the server signs.
func TestOwnLeaseCertificates(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	id, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	m := a.launch(t)
	registered := m.register(t)
	m.ready(t)
	ready := d.ready(t)
	var project controlplane.Project
	cp.view(t, func(tx controlplane.Tx) (err error) {
		project, err = tx.Project(t.Context(), id)
		return err
	})
	prefix := "depot://" + cp.record.ID + "/"
	clientNames := []string{prefix + "lease/" + d.lease(), prefix + "machine/" + m.id}

	cert := leaf(t, ready.GetCertificate().GetChain(), project.Authority.Certificate, x509.ExtKeyUsageClientAuth)
	if diff := cmp.Diff(clientNames, names(cert)); diff != "" {
		t.Errorf("client's names: %s", diff)
	}
	lifetime(t, cp, cert, cp.times.ClientCertificate)
	if half := ready.GetCertificate().GetRenewAfter().AsTime().Sub(cp.now()); half > cp.times.ClientCertificate/2 || half < cp.times.ClientCertificate/2-time.Minute {
		t.Errorf("to be renewed in %s", half)
	}
	// A renewal may be for a new key, and is for the same lease and machine.
	newOne, csr := newKey(t)
	renewed, err := d.Builder.RenewLease(t.Context(), &depotv1.RenewLeaseRequest{LeaseId: d.lease(), Csr: csr})
	must(t, err)
	cert = leaf(t, renewed.GetCertificate().GetChain(), project.Authority.Certificate, x509.ExtKeyUsageClientAuth)
	if diff := cmp.Diff(clientNames, names(cert)); diff != "" {
		t.Errorf("renewed client's names: %s", diff)
	}
	_, err = mtls.NewIdentity(newOne, renewed.GetCertificate().GetChain())
	must(t, err)

	cert = leaf(t, registered.GetServerCertificate().GetChain(), project.Authority.Certificate, x509.ExtKeyUsageServerAuth)
	if diff := cmp.Diff([]string{controlplane.ServerName(m.id)}, names(cert)); diff != "" {
		t.Errorf("machine's names: %s", diff)
	}
	lifetime(t, cp, cert, cp.times.MachineCertificate)
	cert = leaf(t, registered.GetIdentity().GetChain(), cp.record.Agents.Certificate, x509.ExtKeyUsageClientAuth)
	if diff := cmp.Diff([]string{prefix + "identity/machine/" + m.id}, names(cert)); diff != "" {
		t.Errorf("machine's identity: %s", diff)
	}

	key, csr := newKey(t)
	again, err := m.Machine.RenewMachine(t.Context(), &depotv1.RenewMachineRequest{MachineId: m.id, Csr: csr})
	must(t, err)
	leaf(t, again.GetServerCertificate().GetChain(), project.Authority.Certificate, x509.ExtKeyUsageServerAuth)
	must(t, m.identity.Install(key, again.GetIdentity().GetChain()))
	m.sync(t)

	identity, err := a.Agent.RenewIdentity(t.Context(), &depotv1.RenewIdentityRequest{Csr: csr})
	must(t, err)
	cert = leaf(t, identity.GetIdentity().GetChain(), cp.record.Agents.Certificate, x509.ExtKeyUsageClientAuth)
	if diff := cmp.Diff([]string{prefix + "identity/agent/" + a.id}, names(cert)); diff != "" {
		t.Errorf("agent's identity: %s", diff)
	}
}

// TestOwnLeaseCallers has each kind of caller try what is another's.
func TestOwnLeaseCallers(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, webToken := cp.project(t, "web", nil)
	_, apiToken := cp.project(t, "api", nil)
	a := cp.agent(t, "host-1", pool(2))
	web, api := cp.driver(t, webToken), cp.driver(t, apiToken)
	web.waits(t, "is being launched")
	m := a.serve(t)
	ready := web.ready(t)
	api.waits(t, "is being launched")
	n := a.serve(t)
	api.ready(t)
	ctx := t.Context()

	t.Run("a machine speaks for itself", func(t *testing.T) {
		_, err := m.Machine.SyncMachine(ctx, &depotv1.SyncMachineRequest{MachineId: n.id, State: depotv1.MachineState_MACHINE_STATE_DRAINING})
		refused(t, err, connect.CodePermissionDenied, m.id, n.id)
		_, err = m.Machine.RenewMachine(ctx, &depotv1.RenewMachineRequest{MachineId: n.id, Csr: m.csr})
		refused(t, err, connect.CodePermissionDenied, m.id, n.id)
		if got := cp.machineNow(t, n.id); got.State != controlplane.MachineReady {
			t.Errorf("the other machine is %s", got.State)
		}
	})
	t.Run("a machine reports its own leases", func(t *testing.T) {
		m.connected(t, api.lease(), 3, 3)
		if l := cp.leaseNow(t, api.lease()); l.Connections != 0 || l.Connected {
			t.Errorf("the foreign lease has %d connections", l.Connections)
		}
	})
	t.Run("a machine is no agent", func(t *testing.T) {
		_, err := m.Agent.SyncAgent(ctx, &depotv1.SyncAgentRequest{SessionId: "x"})
		refused(t, err, connect.CodePermissionDenied, "agent")
		_, err = m.Agent.RenewIdentity(ctx, &depotv1.RenewIdentityRequest{Csr: m.csr})
		refused(t, err, connect.CodePermissionDenied, "agent")
	})
	t.Run("an agent is no machine", func(t *testing.T) {
		_, err := a.Machine.SyncMachine(ctx, &depotv1.SyncMachineRequest{MachineId: m.id})
		refused(t, err, connect.CodePermissionDenied, "machine")
		_, err = a.Machine.RenewMachine(ctx, &depotv1.RenewMachineRequest{MachineId: m.id, Csr: m.csr})
		refused(t, err, connect.CodePermissionDenied, "machine")
	})
	t.Run("a token opens neither", func(t *testing.T) {
		bearer := newClient(t, cp.agentsWithToken(t, cp.operator))
		_, err := bearer.Agent.SyncAgent(ctx, &depotv1.SyncAgentRequest{SessionId: "x"})
		refused(t, err, connect.CodeUnauthenticated, "certificate")
		_, err = bearer.Machine.SyncMachine(ctx, &depotv1.SyncMachineRequest{MachineId: m.id})
		refused(t, err, connect.CodeUnauthenticated, "certificate")
	})
	t.Run("the listeners are apart", func(t *testing.T) {
		_, err := a.Admin.WhoAmI(ctx, &depotv1.WhoAmIRequest{})
		if err == nil {
			t.Error("the agents' listener serves administrators")
		}
		_, err = cp.admin(t).Agent.SyncAgent(ctx, &depotv1.SyncAgentRequest{SessionId: "x"})
		if err == nil {
			t.Error("the clients' listener serves agents")
		}
	})
	t.Run("a lease's certificate is no agent's", func(t *testing.T) {
		identity, err := mtls.NewIdentity(web.key, ready.GetCertificate().GetChain())
		must(t, err)
		_, err = cp.agentClient(t, identity).Machine.SyncMachine(ctx, &depotv1.SyncMachineRequest{MachineId: m.id})
		if err == nil {
			t.Fatal("a project's leaf was taken for a machine's identity")
		}
		if connect.CodeOf(err) == connect.CodePermissionDenied {
			t.Errorf("a project's leaf got through the handshake: %v", err)
		}
	})
}
