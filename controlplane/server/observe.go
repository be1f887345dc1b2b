package server

import (
	"cmp"
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

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
		m = m.Fail(now, "it vanished from host %s: the host lost its state or was cleaned by hand; the next machine goes on with what the host still has of the cache", agent.Name)
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
		m = m.Fail(now, "%s; the next machine goes on with the cache as it was left", cmp.Or(controlplane.Words(o.GetReason()), "it ended unexpectedly"))
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
