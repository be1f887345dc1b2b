package server_test

import (
	"crypto/tls"
	"crypto/x509"
	"slices"
	"testing"
	"time"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/internal/mtls"
)

// TestMainPath follows one lease from its first poll to the committed
// generation of its machine.
func TestMainPath(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	project, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)

	d.waits(t, "is being launched on host-1")
	m := a.launch(t)
	if got, want := m.launch.GetWriterEpoch(), controlplane.WriterEpoch(1, 1); got != want {
		t.Errorf("writer epoch %#x, want %#x", got, want)
	}
	if m.launch.GetProjectId() != project || m.launch.GetPool() != "main" || m.launch.GetArch() != "amd64" || m.launch.GetCpus() == 0 {
		t.Errorf("launch %v", m.launch)
	}
	d.waits(t, "is starting")
	registered := m.register(t)
	if got := registered.GetBuildkit(); got.GetArch() != "amd64" || got.GetPlatforms()[0] != "linux/amd64" || got.GetCacheBytes() != controlplane.DefaultCacheBytes {
		t.Errorf("buildkit's settings %v", got)
	}
	m.ready(t)
	ready := d.ready(t)
	endpoint := ready.GetEndpoint()
	if endpoint.GetAddress() != "192.0.2.1:4000" || endpoint.GetMachineId() != m.id || endpoint.GetServerName() != controlplane.ServerName(m.id) {
		t.Errorf("endpoint %v", endpoint)
	}
	if ready.GetRenewEvery().AsDuration() != cp.times.LeaseRenew || len(ready.GetNotices()) > 0 {
		t.Errorf("answer %v", ready)
	}
	meet(t, d, ready, m, registered)

	m.connected(t, d.lease(), 1, 1)
	renewed, err := d.Builder.RenewLease(t.Context(), &depotv1.RenewLeaseRequest{LeaseId: d.lease(), Csr: d.req.GetCsr()})
	must(t, err)
	if renewed.GetState() != depotv1.LeaseState_LEASE_STATE_READY || len(renewed.GetCertificate().GetChain()) != 2 {
		t.Errorf("renewal %v", renewed)
	}
	d.release(t)
	ended := m.until(t, "the released lease", func(r *depotv1.SyncMachineResponse) bool { return len(r.GetEndedLeases()) > 0 })
	if !slices.Equal(ended.GetEndedLeases(), []string{d.lease()}) || ended.GetDrain() {
		t.Errorf("directive %v", ended)
	}
	m.connected(t, d.lease(), 0, 1)

	cp.pass(t, controlplane.DefaultIdleTimeout)
	if r := m.until(t, "drain", (*depotv1.SyncMachineResponse).GetDrain); r.GetNow() {
		t.Errorf("an idle machine is told to drop its builds: %v", r)
	}
	a.stopped(t, m)
	got := cp.machineNow(t, m.id)
	if got.State != controlplane.MachineStopped || got.Gone.IsZero() || !got.Clean || got.Reason != "idle for 2m0s" {
		t.Errorf("machine %+v", got)
	}
	if g := cp.generationNow(t, m.launch.GetGenerationId()); g.State != controlplane.GenerationCommitted {
		t.Errorf("generation is %s, want committed", g.State)
	}
	if orders := a.sync(t); len(orders.GetMachines()) > 0 {
		t.Errorf("orders for machines that are gone: %v", orders.GetMachines())
	}

	// The cache outlives the machine.
	d.renew(t)
	d.waits(t, "is being launched")
	if next := a.serve(t); next.launch.GetVolumeId() != m.launch.GetVolumeId() || next.launch.GetWriterEpoch() <= m.launch.GetWriterEpoch() {
		t.Errorf("next launch %v after %v", next.launch, m.launch)
	}
	if notices := d.ready(t).GetNotices(); len(notices) > 0 {
		t.Errorf("notices of a warm cache: %q", notices)
	}
}

// meet has the driver and its machine meet over TLS, with nothing but what the
// control plane gave each of them.
func meet(tb testing.TB, d *driver, ready *depotv1.AcquireLeaseResponse, m *machine, registered *depotv1.RegisterResponse) {
	tb.Helper()
	served, err := mtls.NewIdentity(m.key, registered.GetServerCertificate().GetChain())
	must(tb, err)
	clients, err := mtls.NewAnchors(registered.GetTrustAnchors())
	must(tb, err)
	admitted := make(chan mtls.LeafName, 1)
	l := listen(tb, mtls.Server{Identity: served, Anchors: clients, Admit: func(leaf *x509.Certificate) error {
		name, err := mtls.ParseLeafName(leaf)
		admitted <- name
		return err
	}}.Config())
	defer l.Close() //nolint:errcheck // nothing is written to it
	done := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			_, err = conn.Write([]byte("hello"))
			_ = conn.Close()
		}
		done <- err
	}()
	identity, err := mtls.NewIdentity(d.key, ready.GetCertificate().GetChain())
	must(tb, err)
	anchors, err := mtls.NewAnchors(ready.GetEndpoint().GetTrustAnchors())
	must(tb, err)
	config := mtls.Client{Identity: identity, Anchors: anchors, ServerName: ready.GetEndpoint().GetServerName()}.Config()
	conn, err := (&tls.Dialer{Config: config}).DialContext(tb.Context(), "tcp", l.Addr().String())
	must(tb, err)
	buf := make([]byte, 5)
	_, err = conn.Read(buf)
	must(tb, err)
	_ = conn.Close()
	must(tb, <-done)
	if got, want := <-admitted, (mtls.LeafName{Server: m.cp.record.ID, Lease: d.lease(), Machine: m.id}); got != want {
		tb.Errorf("the machine sees %v, want %v", got, want)
	}
}

// TestDeadlinesOnTheirOwn reaches deadlines on the real clock: nobody calls,
// and the scheduler wakes by itself.
func TestDeadlinesOnTheirOwn(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t, func(times *controlplane.Times) { times.WaitTTL = 300 * time.Millisecond })
	cp.run()
	_, token := cp.project(t, "web", nil)
	cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.waits(t, "is being launched")
	cp.eventually(t, "the end of a lease that nobody polls", func() bool { return !cp.leaseNow(t, d.lease()).Live() })
}
