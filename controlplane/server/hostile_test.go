package server_test

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"

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
