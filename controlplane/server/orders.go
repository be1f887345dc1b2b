package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

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

// revision tells one set of orders from another.
func revision(m proto.Message) uint64 {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(fmt.Sprintf("marshal %T: %v", m, err)) // only invalid UTF-8 in our own strings could
	}
	sum := sha256.Sum256(b)
	return max(binary.BigEndian.Uint64(sum[:8]), 1)
}
