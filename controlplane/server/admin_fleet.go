package server

import (
	"context"
	"slices"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// machine returns a machine that the caller has right on.
func (s *Server) machine(ctx context.Context, tx controlplane.Tx, id string, right controlplane.Right) (controlplane.Machine, error) {
	unknown := controlplane.Errorf(controlplane.NotFound, "machine %q does not exist: see `docker depot machine ls --all`", id)
	m, err := tx.Machine(ctx, id)
	if controlplane.CodeOf(err) == controlplane.NotFound {
		return m, unknown
	}
	if err != nil {
		return m, err
	}
	p := caller(ctx)
	project, err := tx.Project(ctx, m.Project)
	if controlplane.CodeOf(err) == controlplane.NotFound {
		if p.Operator() {
			return m, nil
		}
		return m, unknown
	}
	switch {
	case err != nil:
		return m, err
	case !p.May(controlplane.RightView, project):
		return m, unknown
	case !p.May(right, project):
		return m, controlplane.Errorf(controlplane.Denied, "%s %q may not %s machines of project %q", p.Kind, p.Name, right, project.Name)
	}
	return m, nil
}

// wireMachine adds to a machine what listings show beside it.
func wireMachine(ctx context.Context, tx controlplane.Tx, m controlplane.Machine) (*depotv1.Machine, []controlplane.Lease, error) {
	out := &depotv1.Machine{
		Id: m.ID, Project: m.Project, Arch: m.Arch, Emulated: m.Emulated, State: machineState(m.State), Reason: m.Reason,
		Agent: m.Agent, Pool: m.Pool, Address: m.Address, VolumeId: m.Volume,
		Created: stamp(m.Created), Ready: stamp(m.Ready), Gone: stamp(m.Gone), Usage: wireUsage(m.Usage),
		Cpus: int32(m.CPUs), MemoryBytes: m.MemoryBytes, BuildkitVersion: m.Buildkit, Warnings: m.Warnings, //nolint:gosec // sizes are small
	}
	if p, err := tx.Project(ctx, m.Project); err == nil {
		org, _, err := names(ctx, tx, p.Org, "")
		if err != nil {
			return nil, nil, err
		}
		out.Project = org + "/" + p.Name
	}
	if a, err := tx.Agent(ctx, m.Agent); err == nil {
		out.Agent = a.Name
	}
	leases, err := tx.LiveLeases(ctx, controlplane.Scope{Project: m.Project, Arch: m.Arch})
	if err != nil {
		return nil, nil, err
	}
	leases = slices.DeleteFunc(leases, func(l controlplane.Lease) bool { return l.Machine != m.ID })
	for _, l := range leases {
		out.Leases++
		out.Connections += int32(l.Connections) //nolint:gosec // bounded by the machine's front
	}
	return out, leases, nil
}

// The bounds of a page.
const (
	pageSize    = 100
	maxPageSize = 1000
)

// ListMachines lists a page of machines, newest first.
func (a *adminService) ListMachines(ctx context.Context, req *depotv1.ListMachinesRequest) (*depotv1.ListMachinesResponse, error) {
	size := int(req.GetPage().GetSize())
	if size <= 0 {
		size = pageSize
	}
	size = min(size, maxPageSize)
	filter := controlplane.MachineFilter{Ended: req.GetAll(), Before: req.GetPage().GetToken(), Limit: size}
	if filter.Before != "" && !controlplane.ValidID(controlplane.KindMachine, filter.Before) {
		return nil, controlplane.Errorf(controlplane.Invalid, "page token %q is not one of this listing's", filter.Before)
	}
	var resp *depotv1.ListMachinesResponse
	err := a.s.Store.View(ctx, func(tx controlplane.Tx) error {
		resp = &depotv1.ListMachinesResponse{}
		p := caller(ctx)
		filter.Org, filter.Project = p.Org, p.Project
		if req.GetProject() != nil {
			project, err := a.s.project(ctx, tx, req.GetProject(), controlplane.RightView)
			if err != nil {
				return err
			}
			filter.Project = project.ID
		}
		machines, err := tx.Machines(ctx, filter)
		if err != nil {
			return err
		}
		for _, m := range machines {
			wire, _, err := wireMachine(ctx, tx, m)
			if err != nil {
				return err
			}
			resp.Machines = append(resp.Machines, wire)
		}
		if len(machines) == size {
			resp.NextPageToken = machines[size-1].ID
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// GetMachine returns one machine with its leases.
func (a *adminService) GetMachine(ctx context.Context, req *depotv1.GetMachineRequest) (*depotv1.GetMachineResponse, error) {
	var resp *depotv1.GetMachineResponse
	err := a.s.Store.View(ctx, func(tx controlplane.Tx) error {
		resp = &depotv1.GetMachineResponse{}
		m, err := a.s.machine(ctx, tx, req.GetId(), controlplane.RightView)
		if err != nil {
			return err
		}
		wire, leases, err := wireMachine(ctx, tx, m)
		resp.Machine = wire
		for _, l := range leases {
			resp.Leases = append(resp.Leases, &depotv1.LeaseInfo{
				Id: l.ID, State: leaseState(l.State), Principal: l.PrincipalName,
				Connections: int32(l.Connections), Created: stamp(l.Created), //nolint:gosec // bounded by the machine's front
			})
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// StopMachine drains a machine.
func (a *adminService) StopMachine(ctx context.Context, req *depotv1.StopMachineRequest) (*depotv1.StopMachineResponse, error) {
	s := a.s
	err := s.Store.Update(ctx, func(tx controlplane.Tx) error {
		m, err := s.machine(ctx, tx, req.GetId(), controlplane.RightAdmin)
		if err != nil {
			return err
		}
		if m.Over() {
			return nil
		}
		m.Now = m.Now || req.GetNow()
		switch m.State {
		case controlplane.MachinePending, controlplane.MachineStarting:
			m = m.Fail(s.Now(), "stopped by %s before it was ready", caller(ctx).Name)
		case controlplane.MachineReady:
			m.State, m.Draining, m.Reason = controlplane.MachineDraining, s.Now(), "stopped by "+caller(ctx).Name
		case controlplane.MachineDraining, controlplane.MachineStopped, controlplane.MachineFailed:
		}
		return s.putMachine(ctx, tx, m)
	})
	if err != nil {
		return nil, err
	}
	s.Log.InfoContext(ctx, "machine stop asked for", "machine", req.GetId(), "now", req.GetNow(), "principal", caller(ctx).ID)
	return &depotv1.StopMachineResponse{}, nil
}

// ListPools lists the pools of all agents with their use.
func (a *adminService) ListPools(ctx context.Context, _ *depotv1.ListPoolsRequest) (*depotv1.ListPoolsResponse, error) {
	var resp *depotv1.ListPoolsResponse
	err := a.s.Store.View(ctx, func(tx controlplane.Tx) error {
		resp = &depotv1.ListPoolsResponse{}
		pools, err := tx.Pools(ctx, "")
		if err != nil {
			return err
		}
		for _, p := range pools {
			agent, err := tx.Agent(ctx, p.Agent)
			if err != nil {
				return err
			}
			n, err := tx.PoolMachines(ctx, p.Agent, p.Name)
			if err != nil {
				return err
			}
			resp.Pools = append(resp.Pools, &depotv1.PoolInfo{
				Pool: wirePool(p), Agent: agent.Name, Machines: int32(n), Connected: agent.Connected, //nolint:gosec // bounded by max_machines
			})
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// ListAgents lists the cloud agents.
func (a *adminService) ListAgents(ctx context.Context, _ *depotv1.ListAgentsRequest) (*depotv1.ListAgentsResponse, error) {
	var resp *depotv1.ListAgentsResponse
	err := a.s.Store.View(ctx, func(tx controlplane.Tx) error {
		resp = &depotv1.ListAgentsResponse{}
		agents, err := tx.Agents(ctx)
		if err != nil {
			return err
		}
		pools, err := tx.Pools(ctx, "")
		if err != nil {
			return err
		}
		for _, ag := range agents {
			wire := &depotv1.Agent{Id: ag.ID, Name: ag.Name, Connected: ag.Connected, LastSeen: stamp(ag.Seen), Version: ag.Version, Orphans: ag.Orphans}
			for _, p := range pools {
				if p.Agent == ag.ID {
					wire.Pools = append(wire.Pools, p.Name)
				}
			}
			resp.Agents = append(resp.Agents, wire)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return resp, nil
}

// DeleteAgent forgets an agent that is gone for good. It is the only way in
// which silence frees a volume, and an administrator has to say so.
func (a *adminService) DeleteAgent(ctx context.Context, req *depotv1.DeleteAgentRequest) (*depotv1.DeleteAgentResponse, error) {
	s := a.s
	err := s.Store.Update(ctx, func(tx controlplane.Tx) error {
		agent, err := tx.Agent(ctx, req.GetId())
		if controlplane.CodeOf(err) == controlplane.NotFound {
			return controlplane.Errorf(controlplane.NotFound, "agent %q does not exist: see `docker depot agent ls`", req.GetId())
		}
		if err != nil {
			return err
		}
		if agent.Connected {
			return controlplane.Errorf(controlplane.Precondition, "agent %s (%s) is connected: stop it first", agent.Name, agent.ID)
		}
		volumes, err := tx.AgentVolumes(ctx, agent.ID)
		if err != nil {
			return err
		}
		if len(volumes) > 0 && !req.GetForce() {
			return controlplane.Errorf(controlplane.Precondition, "agent %s (%s) holds %d caches, which would be lost: use --force if its host is gone for good", agent.Name, agent.ID, len(volumes))
		}
		return s.forgetAgent(ctx, tx, agent, volumes)
	})
	if err != nil {
		return nil, err
	}
	s.Log.WarnContext(ctx, "agent removed", "agent", req.GetId(), "force", req.GetForce(), "principal", caller(ctx).ID)
	return &depotv1.DeleteAgentResponse{}, nil
}

func (s *Server) forgetAgent(ctx context.Context, tx controlplane.Tx, agent controlplane.Agent, volumes []controlplane.Volume) error {
	machines, err := tx.AgentMachines(ctx, agent.ID)
	if err != nil {
		return err
	}
	for _, m := range machines {
		if !m.Over() {
			m = m.Fail(s.Now(), "agent %s was removed by %s", agent.Name, caller(ctx).Name)
		}
		m.Gone = s.Now()
		if err := s.putMachine(ctx, tx, m); err != nil {
			return err
		}
	}
	for _, v := range volumes {
		v.State = controlplane.VolumeLost
		if err := tx.PutVolume(ctx, v); err != nil {
			return err
		}
		// Who waits for this host's cache goes on elsewhere.
		tx.Announce(controlplane.TopicScope, controlplane.Scope{Project: v.Project, Arch: v.Arch}.String())
	}
	if err := tx.PutPools(ctx, agent.ID, nil); err != nil {
		return err
	}
	return tx.DeleteAgent(ctx, agent.ID)
}
