package server_test

import (
	"bufio"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/api/depot/v1/depotv1connect"
	"github.com/opendepot/depot/controlplane/server"
)

// interposed is a store in which something happens just before the nth Update.
type interposed struct {
	controlplane.Store
	mu     sync.Mutex // guards n
	n      int
	before func()
}

func (s *interposed) Update(ctx context.Context, fn func(tx controlplane.Tx) error) error {
	s.mu.Lock()
	s.n--
	now := s.n == 0
	s.mu.Unlock()
	if now {
		s.before()
	}
	return s.Store.Update(ctx, fn)
}

// meanwhile calls as the holder of token; before happens just before the
// call's nth Update. It returns the code and message of a refusal, or none.
func (cp *controlPlane) meanwhile(t *testing.T, n int, before func(), token, procedure string, req, resp proto.Message) (code, message string) {
	t.Helper()
	config := cp.server.Config
	config.Store = &interposed{Store: cp.store, n: n, before: before}
	body, err := proto.Marshal(req)
	must(t, err)
	r := httptest.NewRequestWithContext(t.Context(), http.MethodPost, procedure, strings.NewReader(string(body)))
	r.Header = http.Header{
		"Content-Type": {"application/proto"}, server.APIVersionHeader: {server.APIVersion}, "Authorization": {"Bearer " + token},
	}
	w := httptest.NewRecorder()
	server.New(config).Clients().ServeHTTP(w, r)
	if w.Code == http.StatusOK {
		must(t, proto.Unmarshal(w.Body.Bytes(), resp))
		return "", ""
	}
	var answer struct{ Code, Message string }
	must(t, json.Unmarshal(w.Body.Bytes(), &answer))
	return answer.Code, answer.Message
}

// TestRevokedInFlight revokes a token while a call of its holder is past the
// gate: nothing that it asked for may come to be.
func TestRevokedInFlight(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	id, _ := cp.project(t, "web", nil)
	cp.agent(t, "host-1", pool(1))
	// admin makes a token and returns how to revoke it.
	admin := func(t *testing.T) (text string, revoke func()) {
		t.Helper()
		made, err := cp.admin(t).Admin.CreateToken(t.Context(), &depotv1.CreateTokenRequest{
			Kind: "project", Name: "stolen", Role: "admin", Project: &depotv1.ProjectRef{Id: id},
		})
		must(t, err)
		_, err = cp.client(t, made.GetSecret()).Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{}) // its use is recorded
		must(t, err)
		return made.GetSecret(), func() {
			_, err := cp.admin(t).Admin.DeleteToken(t.Context(), &depotv1.DeleteTokenRequest{Id: made.GetToken().GetId()})
			must(t, err)
		}
	}
	t.Run("lease", func(t *testing.T) {
		text, revoke := admin(t)
		_, csr := newKey(t)
		req := &depotv1.AcquireLeaseRequest{LeaseId: newLeaseID(), Project: &depotv1.ProjectRef{}, Arch: "amd64", Csr: csr, Launch: true}
		code, message := cp.meanwhile(t, 1, revoke, text, depotv1connect.BuilderServiceAcquireLeaseProcedure, req, &depotv1.AcquireLeaseResponse{})
		if code != connect.CodeUnauthenticated.String() || !strings.Contains(message, "was removed") {
			t.Errorf("answered %q: %q", code, message)
		}
		cp.view(t, func(tx controlplane.Tx) error {
			if l, err := tx.Lease(t.Context(), req.GetLeaseId()); controlplane.CodeOf(err) != controlplane.NotFound {
				t.Errorf("the lease is stored: %s", l.State)
			}
			return nil
		})
	})
	t.Run("token", func(t *testing.T) {
		text, revoke := admin(t)
		req := &depotv1.CreateTokenRequest{Kind: "project", Name: "second", Project: &depotv1.ProjectRef{}}
		code, message := cp.meanwhile(t, 1, revoke, text, depotv1connect.AdminServiceCreateTokenProcedure, req, &depotv1.CreateTokenResponse{})
		if code != connect.CodeUnauthenticated.String() || !strings.Contains(message, "was removed") {
			t.Errorf("answered %q: %q", code, message)
		}
	})
}

// TestOwnLeaseEndsBeforeItsCertificate ends a ready lease after its client was
// seen to be entitled to a certificate and before it has one: the machine, who
// hears of ended leases that have certificates, would not know of this one.
func TestOwnLeaseEndsBeforeItsCertificate(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.poll(t)
	a.serve(t)
	cp.eventually(t, "the lease is ready", func() bool { return cp.leaseNow(t, d.lease()).State == controlplane.LeaseReady })
	// The second Update of the call notes the certificate.
	resp := &depotv1.AcquireLeaseResponse{}
	code, _ := cp.meanwhile(t, 2, func() { d.release(t) }, token, depotv1connect.BuilderServiceAcquireLeaseProcedure, d.req, resp)
	if code != connect.CodeUnavailable.String() || resp.GetCertificate() != nil {
		t.Errorf("answered %q, certificate %v", code, resp.GetCertificate())
	}
	if resp := d.poll(t); resp.GetState() != depotv1.LeaseState_LEASE_STATE_ENDED || resp.GetCertificate() != nil {
		t.Errorf("then the lease is %s, certificate %v", resp.GetState(), resp.GetCertificate())
	}
}

// TestTombstoneWaitsForItsMachine deletes a project while its first machine is
// being launched: the volume, which the agent does not list yet, is deleted
// once it is there.
func TestTombstoneWaitsForItsMachine(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	id, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	cp.driver(t, token).poll(t)
	order := a.ordered(t, depotv1.MachineOrder_ACTION_RUN, "")
	volume := order.GetLaunch().GetVolumeId()
	_, err := cp.admin(t).Admin.DeleteProject(t.Context(), &depotv1.DeleteProjectRequest{Project: &depotv1.ProjectRef{Id: id}, Force: true})
	must(t, err)
	a.machines[order.GetId()] = &depotv1.ObservedMachine{Id: order.GetId(), State: depotv1.ObservedMachine_STATE_BLOCKED, VolumeId: volume}
	a.ordered(t, depotv1.MachineOrder_ACTION_DESTROY, order.GetId()) // the launch goes on meanwhile
	a.volumes[volume] = &depotv1.ObservedVolume{Id: volume}
	delete(a.machines, order.GetId())
	orders := a.sync(t)
	if got := orders.GetDeleteVolumes(); len(got) != 1 || got[0] != volume {
		t.Fatalf("volumes to delete: %q, want %s", got, volume)
	}
	delete(a.volumes, volume)
	if got := a.sync(t).GetDeleteVolumes(); len(got) != 0 {
		t.Errorf("volumes to delete: %q, want none", got)
	}
}

// TestQueueOfAnotherPool has one project wait for its cache's full pool: the
// other pool of that host has room, and takes the next project.
func TestQueueOfAnotherPool(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	two := pool(1)
	two.Name = "other"
	a := cp.agent(t, "host-1", pool(1), two)
	_, first := cp.project(t, "first", nil)
	_, second := cp.project(t, "second", nil)
	_, third := cp.project(t, "third", nil)

	d := cp.driver(t, first) // its cache comes to be in one pool
	d.poll(t)
	m := a.serve(t)
	place := m.launch.GetPool()
	d.ready(t)
	d.release(t)
	cp.pass(t, controlplane.DefaultIdleTimeout)
	a.stopped(t, m)

	cp.update(t, func(tx controlplane.Tx) error { // the other pool is away for a moment
		return tx.PutPools(t.Context(), a.id, []controlplane.Pool{{Agent: a.id, Name: place, Provider: "local", Arch: "amd64", MaxMachines: 1}})
	})
	cp.driver(t, second).poll(t) // takes the room of the first
	cp.plan(t)
	d.renew(t)
	d.waits(t, "pool "+place, "full")
	a.sync(t) // the other pool is back
	e := cp.driver(t, third)
	e.waits(t, "is being launched")
}

// TestLeasesAreBounded has one token ask without end.
func TestLeasesAreBounded(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	id, token := cp.project(t, "web", nil)
	cp.agent(t, "host-1", pool(1))
	cp.update(t, func(tx controlplane.Tx) error {
		for range server.MaxLeases {
			l := controlplane.Lease{ID: newLeaseID(), Project: id, Arch: "amd64", State: controlplane.LeaseWaiting, Created: cp.now(), Polled: cp.now()}
			if _, err := tx.PutLease(t.Context(), l); err != nil {
				return err
			}
		}
		return nil
	})
	d := cp.driver(t, token)
	_, err := d.Builder.AcquireLease(t.Context(), d.req)
	refused(t, err, connect.CodeResourceExhausted, "1000 amd64 builds", "try again")
}

// TestHostileWords has a machine and its host say what steers a terminal.
func TestHostileWords(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	d := cp.driver(t, token)
	d.poll(t)
	m := a.launch(t)
	const evil = "\x1b]0;owned\a\ngone"
	a.machines[m.id].Warnings = []string{evil}
	a.sync(t)
	m.register(t)
	m.ready(t)
	m.report.State, m.report.Reason, m.report.BuildkitVersion = depotv1.MachineState_MACHINE_STATE_DRAINING, evil, evil+strings.Repeat("x", 100<<10)
	m.sync(t)
	got := cp.machineNow(t, m.id)
	for what, text := range map[string]string{"reason": got.Reason, "warning": got.Warnings[0], "version": got.Buildkit} {
		if !strings.HasPrefix(text, "]0;owned  gone") || len(text) > 1000 {
			t.Errorf("%s: %.100q, %d bytes", what, text, len(text))
		}
	}
	a.report.Pools = []*depotv1.Pool{{Name: evil, Provider: "local", Arch: "amd64", MaxMachines: 1}}
	_, err := a.call(t.Context(), 0)
	refused(t, err, connect.CodeInvalidArgument, "name it")
}

// TestRequestsAreBounded sends what nobody has to send.
func TestRequestsAreBounded(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	a := cp.agent(t, "host-1", pool(1))
	big := strings.Repeat("x", 512<<10)
	_, err := cp.client(t, cp.operator).Admin.WhoAmI(t.Context(), &depotv1.WhoAmIRequest{}) // it is reached
	must(t, err)
	_, err = cp.client(t, "").Builder.GetBuilder(t.Context(), &depotv1.GetBuilderRequest{Project: &depotv1.ProjectRef{Id: big}})
	refused(t, err, connect.CodeResourceExhausted)
	_, err = cp.agentClient(t, nil).Agent.Join(t.Context(), &depotv1.JoinRequest{Token: big})
	refused(t, err, connect.CodeResourceExhausted)
	a.volumes["vol_"+strings.Repeat("0", 32)] = &depotv1.ObservedVolume{Id: big}
	a.sync(t) // an agent has much to say
}

// TestSlowRequest sends a request that never ends.
func TestSlowRequest(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ours, theirs := net.Pipe()
		hs := &http.Server{Handler: server.New(server.Config{}).Clients(), ReadHeaderTimeout: time.Second}
		done := make(chan error, 1)
		go func() { done <- hs.Serve(&oneConn{conn: theirs}) }()
		_, err := io.WriteString(ours, "POST "+depotv1connect.BuilderServiceGetBuilderProcedure+
			" HTTP/1.1\r\nHost: x\r\nContent-Type: application/proto\r\nContent-Length: 100\r\n\r\nx")
		must(t, err)
		begin := time.Now()
		resp, err := http.ReadResponse(bufio.NewReader(ours), nil)
		must(t, err)
		if took := time.Since(begin); took != 30*time.Second || resp.StatusCode == http.StatusOK {
			t.Errorf("it was answered %d after %s", resp.StatusCode, took)
		}
		must(t, resp.Body.Close())
		must(t, ours.Close())
		must(t, hs.Close())
		<-done
	})
}

// oneConn is a listener with one connection.
type oneConn struct {
	conn   net.Conn // nil once it was accepted
	closed chan struct{}
	once   sync.Once
}

func (l *oneConn) Accept() (net.Conn, error) {
	if c := l.conn; c != nil {
		l.conn, l.closed = nil, make(chan struct{})
		return c, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *oneConn) Addr() net.Addr { return &net.UnixAddr{} }

func (l *oneConn) Close() error {
	l.once.Do(func() { close(l.closed) })
	return nil
}

// TestLateReport has a report arrive after a later one, as one does that was
// under way when its connection was given up: the machine that it does not list
// has been launched since.
func TestLateReport(t *testing.T) {
	t.Parallel()
	cp := newControlPlane(t)
	_, token := cp.project(t, "web", nil)
	a := cp.agent(t, "host-1", pool(1))
	a.report.Sequence = 2
	late := proto.CloneOf(a.report)
	late.Sequence = 1
	cp.driver(t, token).poll(t)
	m := a.serve(t)
	_, err := a.Agent.SyncAgent(t.Context(), late)
	refused(t, err, connect.CodeUnavailable, "later report")
	if got := cp.machineNow(t, m.id); got.State != controlplane.MachineReady || !got.Gone.IsZero() {
		t.Errorf("machine is %s (%s), gone %s", got.State, got.Reason, got.Gone)
	}
	a.sync(t) // the same number again is the same report, or an agent that does not count
}
