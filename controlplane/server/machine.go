package server

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// machineService answers machine agents.
type machineService struct{ s *Server }

// Register binds the join token to the first key that comes with it, and
// returns the machine's certificates.
func (m *machineService) Register(ctx context.Context, req *depotv1.RegisterRequest) (*depotv1.RegisterResponse, error) {
	s := m.s
	id := req.GetMachineId()
	if !controlplane.ValidID(controlplane.KindMachine, id) || !s.Authenticator.CheckMachineToken(s.JoinKey, id, req.GetJoinToken()) {
		return nil, controlplane.Errorf(controlplane.Unauthenticated, "the join token of machine %q is not valid: machines are launched by an agent's order only", id)
	}
	key, err := s.Authority.KeyHash(req.GetCsr())
	if err != nil {
		return nil, err
	}
	var machine controlplane.Machine
	var project controlplane.Project
	stolen := false
	err = s.Store.Update(ctx, func(tx controlplane.Tx) (err error) {
		if machine, err = tx.Machine(ctx, id); err != nil {
			return err
		}
		switch {
		case machine.Key != nil && !bytes.Equal(machine.Key, key):
			stolen = true
			if machine.Over() {
				return nil // how it ended stays as it was
			}
			machine = machine.Fail(s.Now(), "its join token came with a second key: somebody else had the token")
			return s.putMachine(ctx, tx, machine)
		case machine.State != controlplane.MachinePending && machine.State != controlplane.MachineStarting:
			return controlplane.Errorf(controlplane.Precondition, "machine %s is %s and cannot register: %s", id, machine.State, cmp.Or(machine.Reason, "it registered before"))
		}
		if project, err = tx.Project(ctx, machine.Project); err != nil {
			return err
		}
		machine.Key = key
		if machine.State == controlplane.MachinePending {
			machine.State, machine.Launched = controlplane.MachineStarting, s.Now()
		}
		return s.putMachine(ctx, tx, machine)
	})
	if err != nil {
		return nil, err
	}
	if stolen {
		s.Log.WarnContext(ctx, "join token used with a second key", "machine", id, "project", machine.Project)
		return nil, controlplane.Errorf(controlplane.Denied, "the join token of machine %s was used with another key before: the machine is %s, look at its host", id, machine.State)
	}
	certificate, identity, err := m.certify(ctx, machine, project, req.GetCsr())
	if err != nil {
		return nil, err
	}
	return &depotv1.RegisterResponse{
		ServerCertificate: certificate,
		Identity:          identity,
		TrustAnchors:      [][]byte{project.Authority.Certificate},
		Buildkit:          buildkitSettings(project, machine),
		ServerId:          s.Record.ID,
	}, nil
}

func buildkitSettings(p controlplane.Project, m controlplane.Machine) *depotv1.BuildkitSettings {
	return &depotv1.BuildkitSettings{
		Arch:             m.Arch,
		Platforms:        controlplane.Platforms(m.Arch),
		CacheKeepSeconds: int64(p.CacheKeep / time.Second),
		CacheBytes:       p.CacheBytes,
		Entitlements:     p.Entitlements,
	}
}

// certify signs the two certificates of a machine: one to serve clients with,
// by its project's authority, and one to call with, by the server's.
func (m *machineService) certify(ctx context.Context, machine controlplane.Machine, project controlplane.Project, csr []byte) (server, identity *depotv1.Certificate, err error) {
	s := m.s
	now := s.Now()
	leaf := controlplane.Leaf{
		CSR: csr, Usage: controlplane.UsageServer, DNSNames: []string{machine.ServerName()},
		NotBefore: now.Add(-s.Times.Backdate), NotAfter: now.Add(s.Times.MachineCertificate),
	}
	served, err := s.Authority.Sign(ctx, project.Authority, project.ID, leaf)
	if err != nil {
		return nil, nil, err
	}
	identity, err = s.signIdentity(ctx, controlplane.PrincipalMachine, machine.ID, csr)
	return wireCertificate(served, now), identity, err
}

// signIdentity signs what an agent or a machine calls the control plane with.
func (s *Server) signIdentity(ctx context.Context, kind controlplane.PrincipalKind, id string, csr []byte) (*depotv1.Certificate, error) {
	now := s.Now()
	issued, err := s.Authority.Sign(ctx, s.Record.Agents, s.Record.ID, controlplane.Leaf{
		CSR: csr, Usage: controlplane.UsageClient, URIs: []string{identityURI(s.Record.ID, kind, id)},
		NotBefore: now.Add(-s.Times.Backdate), NotAfter: now.Add(s.Times.MachineCertificate),
	})
	if err != nil {
		return nil, err
	}
	return wireCertificate(issued, now), nil
}

// RenewMachine signs new certificates for a machine that is not over.
func (m *machineService) RenewMachine(ctx context.Context, req *depotv1.RenewMachineRequest) (*depotv1.RenewMachineResponse, error) {
	s := m.s
	key, err := s.Authority.KeyHash(req.GetCsr())
	if err != nil {
		return nil, err
	}
	var machine controlplane.Machine
	var project controlplane.Project
	err = s.Store.Update(ctx, func(tx controlplane.Tx) (err error) {
		if machine, err = ownMachine(ctx, tx, req.GetMachineId()); err != nil {
			return err
		}
		if machine.Over() {
			return controlplane.Errorf(controlplane.Precondition, "machine %s is %s: %s", machine.ID, machine.State, machine.Reason)
		}
		if project, err = tx.Project(ctx, machine.Project); err != nil {
			return err
		}
		machine.Key = key
		return tx.PutMachine(ctx, machine)
	})
	if err != nil {
		return nil, err
	}
	certificate, identity, err := m.certify(ctx, machine, project, req.GetCsr())
	if err != nil {
		return nil, err
	}
	return &depotv1.RenewMachineResponse{ServerCertificate: certificate, Identity: identity}, nil
}

// ownMachine returns the caller's machine, which the request has to name.
func ownMachine(ctx context.Context, tx controlplane.Tx, id string) (controlplane.Machine, error) {
	if p := caller(ctx); p.ID != id {
		return controlplane.Machine{}, controlplane.Errorf(controlplane.Denied, "machine %s may not speak for machine %q", p.ID, id)
	}
	return tx.Machine(ctx, id)
}

// putMachine stores a machine and wakes all whom it concerns.
func (s *Server) putMachine(ctx context.Context, tx controlplane.Tx, m controlplane.Machine) error {
	if err := tx.PutMachine(ctx, m); err != nil {
		return err
	}
	tx.Announce(controlplane.TopicMachine, m.ID)
	tx.Announce(controlplane.TopicAgent, m.Agent)
	tx.Announce(controlplane.TopicScope, controlplane.Scope{Project: m.Project, Arch: m.Arch}.String())
	if !m.Holds() {
		return controlplane.WakeQueue(ctx, tx, m.Arch)
	}
	return nil
}

// SyncMachine stores a report and hangs until the directive is not the one
// that the machine has.
func (m *machineService) SyncMachine(ctx context.Context, req *depotv1.SyncMachineRequest) (*depotv1.SyncMachineResponse, error) {
	s := m.s
	watcher := s.Store.Watch(controlplane.TopicMachine, req.GetMachineId())
	defer watcher.Close()
	err := s.Store.Update(ctx, func(tx controlplane.Tx) error {
		machine, err := ownMachine(ctx, tx, req.GetMachineId())
		if err != nil {
			return err
		}
		if err := s.noteConnections(ctx, tx, machine, req.GetConnections()); err != nil {
			return err
		}
		return s.noteReport(ctx, tx, machine, req)
	})
	if err != nil {
		return nil, err
	}
	timeout := time.NewTimer(s.Times.Hang)
	defer timeout.Stop()
	for {
		directive, err := s.directive(ctx, req.GetMachineId())
		if err != nil {
			return nil, err
		}
		if directive.GetRevision() != req.GetHaveRevision() || !hang(ctx, watcher, timeout.C) {
			return directive, nil
		}
	}
}

// noteReport stores what a machine says of itself. It moves starting machines
// to ready once the agent has said where they are; the rest of a machine's
// life is the scheduler's and the agent's to tell.
func (s *Server) noteReport(ctx context.Context, tx controlplane.Tx, m controlplane.Machine, req *depotv1.SyncMachineRequest) error {
	was := m
	m.Seen = s.Now()
	if u := req.GetUsage(); u != nil {
		m.Usage = domainUsage(u)
	}
	m.Buildkit = cmp.Or(controlplane.Words(req.GetBuildkitVersion()), m.Buildkit)
	switch {
	case req.GetState() == depotv1.MachineState_MACHINE_STATE_READY && m.Ready.IsZero() && !m.Over():
		m.Ready = m.Seen
		m = becomeReady(m)
	case req.GetState() == depotv1.MachineState_MACHINE_STATE_DRAINING && m.State == controlplane.MachineReady:
		m.State, m.Draining = controlplane.MachineDraining, m.Seen
		m.Reason = cmp.Or(controlplane.Words(req.GetReason()), "it drains on its own")
	case (req.GetState() == depotv1.MachineState_MACHINE_STATE_STOPPED || req.GetState() == depotv1.MachineState_MACHINE_STATE_FAILED) && !m.Over():
		m.Reason = cmp.Or(m.Reason, controlplane.Words(req.GetReason())) // why it was asked to stop says more than that it was
	}
	if m.State == was.State && m.Reason == was.Reason && m.Ready.Equal(was.Ready) {
		return tx.PutMachine(ctx, m)
	}
	return s.putMachine(ctx, tx, m)
}

// becomeReady moves a machine to ready once both have spoken: the machine
// itself, and its agent, who knows its address.
func becomeReady(m controlplane.Machine) controlplane.Machine {
	if m.State == controlplane.MachineStarting && !m.Ready.IsZero() && m.Address != "" {
		m.State, m.Reason = controlplane.MachineReady, ""
	}
	return m
}

// noteConnections stores how many connections each lease of the machine has.
// What it says of other machines' leases is not heard.
func (s *Server) noteConnections(ctx context.Context, tx controlplane.Tx, m controlplane.Machine, reported []*depotv1.LeaseConnections) error {
	leases, err := tx.LiveLeases(ctx, controlplane.Scope{Project: m.Project, Arch: m.Arch})
	if err != nil {
		return err
	}
	for _, l := range leases {
		if l.State != controlplane.LeaseReady || l.Machine != m.ID {
			continue
		}
		was := l
		l.Connections = 0
		if i := slices.IndexFunc(reported, func(c *depotv1.LeaseConnections) bool { return c.GetLeaseId() == l.ID }); i >= 0 {
			l.Connections = int(reported[i].GetOpen())
			l.Connected = l.Connected || reported[i].GetTotal() > 0
		}
		if l.Connected && l.Connections == 0 && (was.Connections > 0 || !was.Connected) {
			l.Quiet = s.Now()
		}
		if l.Connections == was.Connections && l.Connected == was.Connected {
			continue
		}
		if _, err := tx.PutLease(ctx, l); err != nil {
			return err
		}
		tx.Announce(controlplane.TopicScope, scopeOf(l).String())
	}
	return nil
}

// directive is what the machine should do, from the store.
func (s *Server) directive(ctx context.Context, id string) (*depotv1.SyncMachineResponse, error) {
	resp := &depotv1.SyncMachineResponse{ServerId: s.Record.ID}
	err := s.Store.View(ctx, func(tx controlplane.Tx) error {
		m, err := tx.Machine(ctx, id)
		if err != nil {
			return err
		}
		resp.Drain = m.Over() || m.State == controlplane.MachineDraining
		resp.Now = m.Over() || m.Now
		leases, err := tx.MachineLeases(ctx, id, s.Now())
		if err != nil {
			return err
		}
		resp.EndedLeases = nil
		for _, l := range leases {
			if l.State == controlplane.LeaseEnded {
				resp.EndedLeases = append(resp.EndedLeases, l.ID)
			}
		}
		slices.Sort(resp.EndedLeases)
		project, err := tx.Project(ctx, m.Project)
		switch controlplane.CodeOf(err) {
		case controlplane.NotFound:
		default:
			if err != nil {
				return err
			}
			resp.TrustAnchors = [][]byte{project.Authority.Certificate}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	resp.Revision = revision(resp)
	return resp, nil
}
