package server

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// agentService answers cloud agents.
type agentService struct{ s *Server }

// Join binds an agent token to the first key that comes with it, and returns
// the agent's identity.
func (a *agentService) Join(ctx context.Context, req *depotv1.JoinRequest) (*depotv1.JoinResponse, error) {
	s := a.s
	token, err := s.Authenticator.AgentToken(ctx, req.GetToken(), s.Now())
	if err != nil {
		return nil, err
	}
	key, err := s.Authority.KeyHash(req.GetCsr())
	if err != nil {
		return nil, err
	}
	var agent controlplane.Agent
	err = s.Store.Update(ctx, func(tx controlplane.Tx) (err error) {
		if token, err = tx.Token(ctx, token.ID); err != nil {
			return err
		}
		if token.UsedKey != nil {
			if !bytes.Equal(token.UsedKey, key) {
				return controlplane.Errorf(controlplane.Denied, "agent token %q was used before, by another host: make a new one with `docker depot agent token`", token.Name)
			}
			agent, err = agentOfToken(ctx, tx, token)
			return err
		}
		token.UsedKey, token.Used = key, s.Now()
		if err := tx.PutToken(ctx, token); err != nil {
			return err
		}
		if agent, err = s.joining(ctx, tx, key); err != nil {
			return err
		}
		agent.Token, agent.Name = token.ID, cmp.Or(controlplane.Words(req.GetName()), agent.Name, token.Name)
		return tx.PutAgent(ctx, agent)
	})
	if err != nil {
		return nil, err
	}
	identity, err := s.signIdentity(ctx, controlplane.PrincipalAgent, agent.ID, req.GetCsr())
	if err != nil {
		return nil, err
	}
	s.Log.InfoContext(ctx, "agent joined", "agent", agent.ID, "name", agent.Name)
	return &depotv1.JoinResponse{AgentId: agent.ID, Identity: identity, ServerId: s.Record.ID}, nil
}

// joining returns the agent that a new token's key makes: the one that has the
// key already, whose certificate ran out while it was off, or a new one.
func (s *Server) joining(ctx context.Context, tx controlplane.Tx, key []byte) (controlplane.Agent, error) {
	agents, err := tx.Agents(ctx)
	if err != nil {
		return controlplane.Agent{}, err
	}
	for _, a := range agents {
		if bytes.Equal(a.Key, key) {
			return a, nil
		}
	}
	return controlplane.Agent{ID: s.newID(controlplane.KindAgent), Key: key, Created: s.Now()}, nil
}

func agentOfToken(ctx context.Context, tx controlplane.Tx, t controlplane.Token) (controlplane.Agent, error) {
	agents, err := tx.Agents(ctx)
	if err != nil {
		return controlplane.Agent{}, err
	}
	for _, a := range agents {
		if a.Token == t.ID {
			return a, nil
		}
	}
	return controlplane.Agent{}, controlplane.Errorf(controlplane.Denied, "the agent of token %q was removed: make a new token with `docker depot agent token`", t.Name)
}

// RenewIdentity signs a new identity for an agent that is known.
func (a *agentService) RenewIdentity(ctx context.Context, req *depotv1.RenewIdentityRequest) (*depotv1.RenewIdentityResponse, error) {
	s := a.s
	key, err := s.Authority.KeyHash(req.GetCsr())
	if err != nil {
		return nil, err
	}
	id := caller(ctx).ID
	err = s.Store.Update(ctx, func(tx controlplane.Tx) error {
		agent, err := tx.Agent(ctx, id)
		if err != nil {
			return removedAgent(id, err)
		}
		agent.Key = key
		return tx.PutAgent(ctx, agent)
	})
	if err != nil {
		return nil, err
	}
	identity, err := s.signIdentity(ctx, controlplane.PrincipalAgent, id, req.GetCsr())
	if err != nil {
		return nil, err
	}
	return &depotv1.RenewIdentityResponse{Identity: identity}, nil
}

func removedAgent(id string, err error) error {
	if controlplane.CodeOf(err) == controlplane.NotFound {
		return controlplane.Errorf(controlplane.Denied, "agent %s was removed from this control plane: join again with a new token and an empty state directory", id)
	}
	return err
}

// SyncAgent stores a report and hangs until the orders are not those that the
// agent has.
func (a *agentService) SyncAgent(ctx context.Context, req *depotv1.SyncAgentRequest) (*depotv1.SyncAgentResponse, error) {
	s := a.s
	id := caller(ctx).ID
	if err := s.sameServer(ctx, id, req); err != nil {
		return nil, err
	}
	if !s.sessions.enter(id, req.GetSessionId(), s.Now()) {
		return nil, controlplane.Errorf(controlplane.Exists, "agent %s is connected from another process: stop one of the two, or join the second with a token of its own", id)
	}
	defer func() { s.sessions.leave(id, req.GetSessionId(), s.Now()) }()

	watcher := s.Store.Watch(controlplane.TopicAgent, id)
	defer watcher.Close()
	err := s.Store.Update(ctx, func(tx controlplane.Tx) error {
		// Here, as transactions have an order and calls have none.
		if !s.sessions.last(id, req.GetSessionId(), req.GetSequence()) {
			return controlplane.Errorf(controlplane.Unavailable, "agent %s has sent a later report than number %d: this one is not heard", id, req.GetSequence())
		}
		return s.noteObservation(ctx, tx, id, req)
	})
	if err != nil {
		return nil, removedAgent(id, err)
	}
	timeout := time.NewTimer(s.Times.Hang)
	defer timeout.Stop()
	for {
		orders, err := s.orders(ctx, id, req)
		if err != nil {
			return nil, removedAgent(id, err)
		}
		if orders.GetRevision() != req.GetHaveRevision() || !hang(ctx, watcher, timeout.C) {
			return orders, nil
		}
	}
}

// sameServer refuses an agent that belongs to another control plane, or that
// knows a later state of this one.
func (s *Server) sameServer(ctx context.Context, agent string, req *depotv1.SyncAgentRequest) error {
	if id := req.GetServerId(); id != "" && id != s.Record.ID {
		return controlplane.Errorf(controlplane.Precondition, "agent %s belongs to control plane %s, and this is %s: give the agent the other's URL, or join it here with a new token and an empty state directory", agent, id, s.Record.ID)
	}
	if seen := req.GetEpoch(); seen > uint64(s.Record.Epoch) {
		s.ahead.Store(max(s.ahead.Load(), seen))
		s.Log.ErrorContext(ctx, "agent knows a later state of this control plane", "agent", agent, "epoch", s.Record.Epoch, "seen", seen)
		return restoredError(seen, s.Record.Epoch)
	}
	return nil
}

func restoredError(seen uint64, epoch uint32) error {
	return controlplane.Errorf(controlplane.Precondition, "this control plane is at epoch %d, and its agents have seen epoch %d: its store was restored from a backup, or another one runs; stop the other, then run `depot-controlplane recover --epoch %d` and start again", epoch, seen, seen)
}

// noteObservation stores what an agent sees: its pools, what became of its
// machines, and which generations its volumes have.
func (s *Server) noteObservation(ctx context.Context, tx controlplane.Tx, id string, req *depotv1.SyncAgentRequest) error {
	agent, err := tx.Agent(ctx, id)
	if err != nil {
		return err
	}
	came := !agent.Connected
	agent.Connected, agent.Session, agent.Seen, agent.Version = true, req.GetSessionId(), s.Now(), controlplane.Words(req.GetVersion())
	changed, err := s.notePools(ctx, tx, id, req.GetPools())
	if err != nil {
		return err
	}
	machines, err := tx.AgentMachines(ctx, id)
	if err != nil {
		return err
	}
	observed := make(map[string]*depotv1.ObservedMachine, len(req.GetMachines()))
	for _, o := range req.GetMachines() {
		observed[o.GetId()] = o
	}
	for _, m := range machines {
		if err := s.noteMachine(ctx, tx, m, agent, observed[m.ID]); err != nil {
			return err
		}
	}
	if agent.Orphans, err = s.orphans(ctx, tx, agent, req.GetMachines()); err != nil {
		return err
	}
	if err := s.noteVolumes(ctx, tx, agent, machines, req.GetVolumes()); err != nil {
		return err
	}
	if came {
		announceMachines(tx, machines) // who waits for one is told that its host is back
	}
	if came || changed {
		for _, arch := range controlplane.Arches() {
			if err := controlplane.WakeQueue(ctx, tx, arch); err != nil {
				return err
			}
		}
		s.Log.InfoContext(ctx, "agent connected", "agent", id, "name", agent.Name, "pools", len(req.GetPools()))
	}
	return tx.PutAgent(ctx, agent)
}

// notePools stores an agent's pools and reports whether they changed.
func (s *Server) notePools(ctx context.Context, tx controlplane.Tx, agent string, declared []*depotv1.Pool) (bool, error) {
	pools := make([]controlplane.Pool, 0, len(declared))
	for _, d := range declared {
		p := domainPool(agent, d)
		if !slices.Contains(controlplane.Arches(), p.Arch) || p.Name == "" || p.Name != controlplane.Words(p.Name) || p.MaxMachines < 0 {
			return false, controlplane.Errorf(controlplane.Invalid, "pool %q (architecture %q, at most %d machines) is not valid: name it, and use one of %v", p.Name, p.Arch, p.MaxMachines, controlplane.Arches())
		}
		if slices.ContainsFunc(pools, func(q controlplane.Pool) bool { return q.Name == p.Name }) {
			return false, controlplane.Errorf(controlplane.Invalid, "two pools are named %q: give each pool of an agent a name of its own", p.Name)
		}
		pools = append(pools, p)
	}
	all, err := tx.Pools(ctx, "")
	if err != nil {
		return false, err
	}
	stored := slices.DeleteFunc(all, func(p controlplane.Pool) bool { return p.Agent != agent })
	if samePools(stored, pools) {
		return false, nil
	}
	return true, tx.PutPools(ctx, agent, pools)
}

func samePools(a, b []controlplane.Pool) bool {
	byName := func(x, y controlplane.Pool) int { return cmp.Compare(x.Name, y.Name) }
	a, b = slices.SortedFunc(slices.Values(a), byName), slices.SortedFunc(slices.Values(b), byName)
	return slices.EqualFunc(a, b, func(x, y controlplane.Pool) bool {
		return proto.Equal(wirePool(x), wirePool(y))
	})
}

// noteMachine stores what the agent sees of one machine that the store knows;
// o is nil if the agent does not list it.
func (s *Server) noteMachine(ctx context.Context, tx controlplane.Tx, m controlplane.Machine, agent controlplane.Agent, o *depotv1.ObservedMachine) error {
	now := s.Now()
	was := m
	switch {
	case o == nil:
		m = missing(m, agent, now)
	case o.GetState() == depotv1.ObservedMachine_STATE_RUNNING:
		m.Address, m.Warnings = controlplane.Words(o.GetAddress()), controlplane.WordList(o.GetWarnings())
		if m.State == controlplane.MachinePending {
			m.State, m.Launched, m.Reason = controlplane.MachineStarting, now, ""
		}
		m = becomeReady(m)
	case o.GetState() == depotv1.ObservedMachine_STATE_BLOCKED:
		switch {
		case o.GetFinal() && !m.Over():
			m = m.Fail(now, "host %s cannot launch it: %s", agent.Name, controlplane.Words(o.GetReason()))
			m.Gone = now
		case !m.Over():
			m.Reason = controlplane.Words(o.GetReason())
		}
	case o.GetState() == depotv1.ObservedMachine_STATE_EXITED:
		m = exited(m, o, now)
	}
	if ran := o.GetState() == depotv1.ObservedMachine_STATE_EXITED || !m.Launched.IsZero(); ran && !m.Holds() {
		if err := s.closeGeneration(ctx, tx, m, o); err != nil {
			return err
		}
	}
	if m.State == was.State && m.Reason == was.Reason && m.Address == was.Address && m.Gone.Equal(was.Gone) &&
		slices.Equal(m.Warnings, was.Warnings) {
		return nil
	}
	s.Log.InfoContext(ctx, "machine observed", "machine", m.ID, "project", m.Project, "agent", m.Agent,
		"state", string(m.State), "reason", m.Reason, "gone", !m.Gone.IsZero())
	return s.putMachine(ctx, tx, m)
}

// missing is what becomes of a machine that its agent, who lists all that it
// has, does not list. Before it was seen running it may not have been launched
// yet; after its end was decided, its absence is what was asked for.
func missing(m controlplane.Machine, agent controlplane.Agent, now time.Time) controlplane.Machine {
	switch {
	case m.Over():
		m.Gone = now
	case m.Address != "":
		m = m.Fail(now, "it vanished from host %s: the host lost its state or was cleaned by hand; the cache keeps its last saved state", agent.Name)
		m.Gone = now
	}
	return m
}

// exited is what becomes of a machine of which nothing runs any more.
func exited(m controlplane.Machine, o *depotv1.ObservedMachine, now time.Time) controlplane.Machine {
	m.Gone, m.Clean = now, o.GetClean()
	switch {
	case m.Over():
	case o.GetClean():
		m.State, m.Ended = controlplane.MachineStopped, now
		m.Reason = cmp.Or(m.Reason, controlplane.Words(o.GetReason()), "it stopped on its own")
	default:
		m = m.Fail(now, "%s; the cache keeps what was saved, and is checked before its next use", cmp.Or(controlplane.Words(o.GetReason()), "it ended unexpectedly"))
	}
	return m
}

// closeGeneration stores what became of the generation that the machine's
// start opened; o is nil if the machine vanished.
func (s *Server) closeGeneration(ctx context.Context, tx controlplane.Tx, m controlplane.Machine, o *depotv1.ObservedMachine) error {
	g, err := tx.Generation(ctx, m.Generation)
	if controlplane.CodeOf(err) == controlplane.NotFound {
		return nil
	}
	if err != nil || g.State != controlplane.GenerationOpen {
		return err
	}
	g.State, g.Closed = controlplane.GenerationDirty, s.Now()
	if o.GetClean() && o.GetGenerationId() == g.ID {
		g.State = controlplane.GenerationCommitted
	}
	return tx.PutGeneration(ctx, g)
}

// orphans returns the machines that the agent lists and the store does not
// know as its own. They are reported, never touched (no-massacre).
func (s *Server) orphans(ctx context.Context, tx controlplane.Tx, agent controlplane.Agent, listed []*depotv1.ObservedMachine) ([]string, error) {
	var out []string
	for _, o := range listed {
		m, err := tx.Machine(ctx, o.GetId())
		switch {
		case controlplane.CodeOf(err) == controlplane.NotFound, err == nil && m.Agent != agent.ID:
			out = append(out, o.GetId())
		case err != nil:
			return nil, err
		}
	}
	slices.Sort(out)
	if len(out) > 0 && !slices.Equal(out, agent.Orphans) {
		s.Log.WarnContext(ctx, "agent lists machines that are not known", "agent", agent.ID, "machines", out)
	}
	return out, nil
}

// noteVolumes stores which committed generations an agent has lost, and which
// have expired as newer ones are kept, and forgets deleted volumes that it does
// not list any more. One that a machine held before this report is kept: its launch may be about to make the volume,
// which nobody would ever delete.
func (s *Server) noteVolumes(ctx context.Context, tx controlplane.Tx, agent controlplane.Agent, machines []controlplane.Machine, listed []*depotv1.ObservedVolume) error {
	volumes, err := tx.AgentVolumes(ctx, agent.ID)
	if err != nil {
		return err
	}
	for _, v := range volumes {
		i := slices.IndexFunc(listed, func(o *depotv1.ObservedVolume) bool { return o.GetId() == v.ID })
		if v.State == controlplane.VolumeTombstone {
			held := slices.ContainsFunc(machines, func(m controlplane.Machine) bool { return m.Volume == v.ID && m.Holds() })
			if i < 0 && !held {
				if err := tx.DeleteVolume(ctx, v.ID); err != nil {
					return err
				}
			}
			continue
		}
		var has []string
		if i >= 0 {
			has = listed[i].GetGenerations()
		}
		if err := s.noteGenerations(ctx, tx, v, has); err != nil {
			return err
		}
	}
	return nil
}

func (s *Server) noteGenerations(ctx context.Context, tx controlplane.Tx, v controlplane.Volume, has []string) error {
	generations, err := tx.Generations(ctx, v.ID)
	if err != nil {
		return err
	}
	kept := 0
	for _, g := range generations { // newest first
		if g.State != controlplane.GenerationCommitted {
			continue
		}
		if slices.Contains(has, g.ID) {
			if kept++; kept <= controlplane.KeepGenerations {
				continue
			}
			g.State = controlplane.GenerationExpired
			if err := tx.PutGeneration(ctx, g); err != nil {
				return err
			}
			continue
		}
		g.State = controlplane.GenerationLost
		if err := tx.PutGeneration(ctx, g); err != nil {
			return err
		}
		s.Log.WarnContext(ctx, "generation lost", "volume", v.ID, "project", v.Project, "agent", v.Agent, "generation", g.ID)
	}
	return nil
}

// orders returns all that the agent should do, and notes which machines it has
// been told of.
func (s *Server) orders(ctx context.Context, id string, req *depotv1.SyncAgentRequest) (*depotv1.SyncAgentResponse, error) {
	resp := &depotv1.SyncAgentResponse{ServerId: s.Record.ID, Epoch: uint64(s.Record.Epoch)}
	err := s.Store.Update(ctx, func(tx controlplane.Tx) error {
		resp.Machines, resp.DeleteVolumes, resp.DeleteGenerations = nil, nil, nil
		machines, err := tx.AgentMachines(ctx, id)
		if err != nil {
			return err
		}
		for _, m := range machines {
			resp.Machines = append(resp.Machines, s.order(m))
			if m.State != controlplane.MachinePending || !m.Ordered.IsZero() {
				continue
			}
			m.Ordered = s.Now()
			if err := tx.PutMachine(ctx, m); err != nil {
				return err
			}
			tx.Announce(controlplane.TopicScope, controlplane.Scope{Project: m.Project, Arch: m.Arch}.String())
		}
		if err := orderRemovals(ctx, tx, id, req.GetMachines(), resp); err != nil {
			return err
		}
		return orderVolumes(ctx, tx, id, req.GetVolumes(), resp)
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(resp.Machines, func(a, b *depotv1.MachineOrder) int { return cmp.Compare(a.GetId(), b.GetId()) })
	resp.Revision = revision(resp)
	return resp, nil
}

// orderVolumes has the agent delete volumes and generations that are not wanted
// any more.
func orderVolumes(ctx context.Context, tx controlplane.Tx, agent string, listed []*depotv1.ObservedVolume, resp *depotv1.SyncAgentResponse) error {
	volumes, err := tx.AgentVolumes(ctx, agent)
	if err != nil {
		return err
	}
	for _, v := range volumes {
		if v.State == controlplane.VolumeTombstone {
			resp.DeleteVolumes = append(resp.DeleteVolumes, v.ID)
			continue
		}
		if err := orderExpired(ctx, tx, v, listed, resp); err != nil {
			return err
		}
	}
	return nil
}

// orderExpired has the agent delete the expired generations that it lists.
func orderExpired(ctx context.Context, tx controlplane.Tx, v controlplane.Volume, listed []*depotv1.ObservedVolume, resp *depotv1.SyncAgentResponse) error {
	i := slices.IndexFunc(listed, func(o *depotv1.ObservedVolume) bool { return o.GetId() == v.ID })
	if i < 0 {
		return nil
	}
	for _, id := range listed[i].GetGenerations() {
		g, err := tx.Generation(ctx, id)
		switch {
		case controlplane.CodeOf(err) == controlplane.NotFound: // reported by nobody, touched by nobody
		case err != nil:
			return err
		case g.Volume == v.ID && g.State == controlplane.GenerationExpired:
			resp.DeleteGenerations = append(resp.DeleteGenerations, &depotv1.GenerationRef{VolumeId: v.ID, GenerationId: id})
		}
	}
	return nil
}

// orderRemovals has the agent remove what is left of machines that it has
// reported as ended.
func orderRemovals(ctx context.Context, tx controlplane.Tx, agent string, listed []*depotv1.ObservedMachine, resp *depotv1.SyncAgentResponse) error {
	for _, o := range listed {
		m, err := tx.Machine(ctx, o.GetId())
		if controlplane.CodeOf(err) == controlplane.NotFound {
			continue
		}
		if err != nil {
			return err
		}
		if m.Agent == agent && m.Over() && !m.Holds() {
			resp.Machines = append(resp.Machines, &depotv1.MachineOrder{Id: m.ID, Action: depotv1.MachineOrder_ACTION_DESTROY})
		}
	}
	return nil
}

// order is what shall become of one machine.
func (s *Server) order(m controlplane.Machine) *depotv1.MachineOrder {
	o := &depotv1.MachineOrder{Id: m.ID, Action: depotv1.MachineOrder_ACTION_RUN}
	switch m.State {
	case controlplane.MachinePending:
		o.Launch = &depotv1.Launch{
			Pool: m.Pool, Arch: m.Arch, VolumeId: m.Volume, WriterEpoch: m.WriterEpoch, GenerationId: m.Generation,
			Cpus:        int32(m.CPUs), //nolint:gosec // sizes are small
			MemoryBytes: m.MemoryBytes, ProjectId: m.Project,
			JoinToken: s.Authenticator.MachineToken(s.JoinKey, m.ID),
		}
	case controlplane.MachineDraining:
		o.Action = depotv1.MachineOrder_ACTION_STOP
	case controlplane.MachineStopped, controlplane.MachineFailed:
		o.Action = depotv1.MachineOrder_ACTION_DESTROY
	case controlplane.MachineStarting, controlplane.MachineReady:
	}
	return o
}

// disconnectAgent notes that an agent is silent. Nothing of its machines
// changes (builds-survive): only who waits for it is told.
func (s *Server) disconnectAgent(ctx context.Context, id string) error {
	return s.Store.Update(ctx, func(tx controlplane.Tx) error {
		agent, err := tx.Agent(ctx, id)
		if controlplane.CodeOf(err) == controlplane.NotFound {
			return nil
		}
		if err != nil || s.sessions.connected(id, s.Now(), s.Times.AgentSilent) {
			return err
		}
		s.Log.WarnContext(ctx, "agent silent", "agent", id, "name", agent.Name, "seen", agent.Seen)
		agent.Connected = false
		machines, err := tx.AgentMachines(ctx, id)
		if err != nil {
			return err
		}
		announceMachines(tx, machines)
		return tx.PutAgent(ctx, agent)
	})
}

// announceMachines has the scopes of an agent's machines planned again.
func announceMachines(tx controlplane.Tx, machines []controlplane.Machine) {
	for _, m := range machines {
		tx.Announce(controlplane.TopicScope, controlplane.Scope{Project: m.Project, Arch: m.Arch}.String())
	}
}

// revision tells one set of orders from another.
func revision(m proto.Message) uint64 {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("marshal %T: %v", m, err)) // only invalid UTF-8 in our own strings could
	}
	sum := sha256.Sum256(b)
	return max(binary.BigEndian.Uint64(sum[:8]), 1)
}
