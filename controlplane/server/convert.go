package server

import (
	"crypto/rand"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/opendepot/depot/controlplane"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// stamp returns t for the wire; the zero time is unset.
func stamp(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func machineState(s controlplane.MachineState) depotv1.MachineState {
	switch s {
	case controlplane.MachinePending:
		return depotv1.MachineState_MACHINE_STATE_PENDING
	case controlplane.MachineStarting:
		return depotv1.MachineState_MACHINE_STATE_STARTING
	case controlplane.MachineReady:
		return depotv1.MachineState_MACHINE_STATE_READY
	case controlplane.MachineDraining:
		return depotv1.MachineState_MACHINE_STATE_DRAINING
	case controlplane.MachineStopped:
		return depotv1.MachineState_MACHINE_STATE_STOPPED
	case controlplane.MachineFailed:
		return depotv1.MachineState_MACHINE_STATE_FAILED
	}
	return depotv1.MachineState_MACHINE_STATE_UNSPECIFIED
}

func leaseState(s controlplane.LeaseState) depotv1.LeaseState {
	switch s {
	case controlplane.LeaseWaiting:
		return depotv1.LeaseState_LEASE_STATE_WAITING
	case controlplane.LeaseReady:
		return depotv1.LeaseState_LEASE_STATE_READY
	case controlplane.LeaseEnded:
		return depotv1.LeaseState_LEASE_STATE_ENDED
	}
	return depotv1.LeaseState_LEASE_STATE_UNSPECIFIED
}

func wireUsage(u controlplane.Usage) *depotv1.Usage {
	if u.At.IsZero() {
		return nil
	}
	return &depotv1.Usage{
		At:               stamp(u.At),
		DiskUsedBytes:    u.DiskUsedBytes,
		DiskFreeBytes:    u.DiskFreeBytes,
		CpuNanoseconds:   u.CPUTime.Nanoseconds(),
		MemoryBytes:      u.MemoryBytes,
		MemoryLimitBytes: u.MemoryLimitBytes,
	}
}

func domainUsage(u *depotv1.Usage) controlplane.Usage {
	if u == nil {
		return controlplane.Usage{}
	}
	return controlplane.Usage{
		At:               readAt(u.GetAt()),
		DiskUsedBytes:    u.GetDiskUsedBytes(),
		DiskFreeBytes:    u.GetDiskFreeBytes(),
		CPUTime:          time.Duration(u.GetCpuNanoseconds()),
		MemoryBytes:      u.GetMemoryBytes(),
		MemoryLimitBytes: u.GetMemoryLimitBytes(),
	}
}

// readAt is when a machine read its usage, by its own clock. One that is so
// wrong that no store holds its time leaves none.
func readAt(at *timestamppb.Timestamp) time.Time {
	t := at.AsTime()
	if !at.IsValid() || t.Year() < 1970 || t.Year() > 2260 {
		return time.Time{}
	}
	return t
}

func wireProject(p controlplane.Project, org string) *depotv1.Project {
	perMachine, machines := int32(p.MaxBuildsPerMachine), int32(p.MaxMachines) //nolint:gosec // validated small
	return &depotv1.Project{
		Id: p.ID, Organization: org, Name: p.Name, Created: stamp(p.Created),
		Settings: &depotv1.ProjectSettings{
			Size:                &p.Size,
			IdleTimeout:         durationpb.New(p.IdleTimeout),
			MaxBuildsPerMachine: &perMachine,
			MaxMachines:         &machines,
			CacheKeep:           durationpb.New(p.CacheKeep),
			CacheBytes:          &p.CacheBytes,
			Entitlements:        &depotv1.EntitlementList{Names: p.Entitlements},
		},
	}
}

// applySettings returns p with the settings that are set.
func applySettings(p controlplane.Project, s *depotv1.ProjectSettings) controlplane.Project {
	if s == nil {
		return p
	}
	if s.Size != nil {
		p.Size = s.GetSize()
	}
	if s.GetIdleTimeout() != nil {
		p.IdleTimeout = s.GetIdleTimeout().AsDuration()
	}
	if s.MaxBuildsPerMachine != nil {
		p.MaxBuildsPerMachine = int(s.GetMaxBuildsPerMachine())
	}
	if s.MaxMachines != nil {
		p.MaxMachines = int(s.GetMaxMachines())
	}
	if s.GetCacheKeep() != nil {
		p.CacheKeep = s.GetCacheKeep().AsDuration()
	}
	if s.CacheBytes != nil {
		p.CacheBytes = s.GetCacheBytes()
	}
	if s.GetEntitlements() != nil {
		p.Entitlements = s.GetEntitlements().GetNames()
	}
	return p
}

func wirePool(p controlplane.Pool) *depotv1.Pool {
	return &depotv1.Pool{
		Name: p.Name, Provider: p.Provider, Arch: p.Arch, Emulated: p.Emulated,
		MaxMachines: int32(p.MaxMachines), //nolint:gosec // came as one
		Isolated:    p.Isolated,
		Cpus:        int32(p.CPUs), //nolint:gosec // came as one
		MemoryBytes: p.MemoryBytes, Warnings: p.Warnings, Closed: p.Closed,
	}
}

func domainPool(agent string, p *depotv1.Pool) controlplane.Pool {
	return controlplane.Pool{
		Agent: agent, Name: p.GetName(), Provider: controlplane.Words(p.GetProvider()), Arch: p.GetArch(), Emulated: p.GetEmulated(),
		MaxMachines: int(p.GetMaxMachines()), Isolated: p.GetIsolated(), CPUs: int(p.GetCpus()),
		MemoryBytes: p.GetMemoryBytes(), Warnings: controlplane.WordList(p.GetWarnings()), Closed: controlplane.Words(p.GetClosed()),
	}
}

func wireCertificate(i controlplane.Issued, now time.Time) *depotv1.Certificate {
	return &depotv1.Certificate{Chain: i.Chain, RenewAfter: stamp(now.Add(i.NotAfter.Sub(now) / 2))}
}

func randomBytes(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b) // never fails: see crypto/rand
	return b
}
