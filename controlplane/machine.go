package controlplane

import (
	"fmt"
	"time"
)

// MachineState is where a machine is in its life:
// pending → starting → ready → draining → stopped, or failed from any.
type MachineState string

// The states of a machine.
const (
	MachinePending  MachineState = "pending"
	MachineStarting MachineState = "starting"
	MachineReady    MachineState = "ready"
	MachineDraining MachineState = "draining"
	MachineStopped  MachineState = "stopped"
	MachineFailed   MachineState = "failed"
)

// Machine is one ephemeral instance for a project and architecture.
//
// State is what the control plane has decided and heard; Gone says what its
// agent has seen. A machine that failed may still run on a host that nobody
// hears from, so its volume is free only once Gone is set (one-writer).
type Machine struct {
	ID       string
	Project  string
	Arch     string
	Emulated bool
	Isolated bool
	Agent    string // the agent's id
	Pool     string // the pool's name in that agent
	Volume   string
	// WriterEpoch fences the volume: the control plane's epoch in the high 32
	// bits, a count in the low ones. See [WriterEpoch].
	WriterEpoch uint64
	// Generation is the generation that this start opened.
	Generation  string
	CPUs        int
	MemoryBytes int64
	State       MachineState
	// Reason is for people: why it waits, drains, stopped or failed.
	Reason string
	// Now asks a draining machine not to wait for its builds.
	Now bool
	// Key is the SHA-256 of the public key that Register bound.
	Key     []byte
	Address string // host:port, once launched
	// Created, Ordered (the agent was told), Launched, Ready, Idle (no live
	// lease since; zero while there is one), Drained (draining since), Ended.
	Created  time.Time
	Ordered  time.Time
	Launched time.Time
	Ready    time.Time
	Idle     time.Time
	Draining time.Time
	Ended    time.Time
	// Gone is when its agent saw that nothing of it runs.
	Gone time.Time
	// Seen is the machine's own last report.
	Seen     time.Time
	Usage    Usage
	Buildkit string // version
	Warnings []string
	// Clean says that buildkitd was stopped in order.
	Clean bool
}

// Usage is a machine's last report of its resources.
type Usage struct {
	At               time.Time
	DiskUsedBytes    int64
	DiskFreeBytes    int64
	CPUTime          time.Duration
	MemoryBytes      int64
	MemoryLimitBytes int64
}

// Over reports whether the machine has stopped or failed.
func (m Machine) Over() bool { return m.State == MachineStopped || m.State == MachineFailed }

// Holds reports whether the machine may still write its volume.
func (m Machine) Holds() bool { return m.Gone.IsZero() }

// ServerName is the DNS name in the machine's certificate.
func (m Machine) ServerName() string { return ServerName(m.ID) }

// ServerName is the DNS name in the certificate of the machine with that id.
func ServerName(machine string) string { return "m-" + machine[len(KindMachine)+1:] + ".machine.depot" }

// Fail returns m failed at now with words for people; Gone stays as it is.
func (m Machine) Fail(now time.Time, format string, args ...any) Machine {
	m.State, m.Reason, m.Ended = MachineFailed, fmt.Sprintf(format, args...), now
	return m
}

// WriterEpoch composes the fencing number of a volume's next writer from the
// control plane's epoch and a count. It grows with either, so a control plane
// that was restored from a backup and given a new epoch fences all that the
// lost one had handed out.
func WriterEpoch(epoch uint32, count uint32) uint64 { return uint64(epoch)<<32 | uint64(count) }

// Volume is the persistent cache of a project and architecture.
type Volume struct {
	ID      string
	Project string
	Arch    string
	// Agent is the id of the agent whose storage holds it.
	Agent string
	// Pool is the pool's name.
	Pool string
	// Isolated volumes belong to one isolated machine and go with it.
	Isolated bool
	// Writers counts the machines that were given it.
	Writers uint32
	State   VolumeState
	Created time.Time
}

// VolumeState is where a volume is in its life.
type VolumeState string

// The states of a volume.
const (
	VolumeActive VolumeState = "active"
	// VolumeTombstone is a volume that its agent has been told to delete.
	VolumeTombstone VolumeState = "tombstone"
	// VolumeLost is one whose agent was forgotten.
	VolumeLost VolumeState = "lost"
)

// GenerationState is where a generation is in its life: open → committed or
// dirty; dirty → committed or discarded; committed → expired or lost.
type GenerationState string

// The states of a generation.
const (
	GenerationOpen      GenerationState = "open"
	GenerationCommitted GenerationState = "committed"
	GenerationDirty     GenerationState = "dirty"
	GenerationDiscarded GenerationState = "discarded"
	GenerationExpired   GenerationState = "expired"
	GenerationLost      GenerationState = "lost"
)

// Generation is one state of a volume: opened by a machine's start, committed
// by its clean stop.
type Generation struct {
	ID      string
	Volume  string
	Machine string
	State   GenerationState
	Created time.Time
	Closed  time.Time
}

// KeepGenerations is how many committed generations of a volume are kept: the
// last, and one to go back to if that is not sound. Each keeps on its disk what
// the live tree has dropped since.
const KeepGenerations = 2

// Agent is a cloud agent: a host or cluster that launches machines.
type Agent struct {
	ID   string
	Name string
	// Token is the join token that it came with; Key the SHA-256 of its key.
	Token string
	Key   []byte
	// Session is the process that is connected; Connected says that it is.
	Session   string
	Connected bool
	Seen      time.Time
	Version   string
	// Orphans are machines that it lists and that no order names.
	Orphans []string
	Created time.Time
}

// Pool is an agent's capacity for one architecture.
type Pool struct {
	Agent       string
	Name        string
	Provider    string
	Arch        string
	Emulated    bool
	MaxMachines int
	Isolated    bool
	CPUs        int
	MemoryBytes int64
	Warnings    []string
	// Closed is empty, or why the pool takes no new machines now.
	Closed string
}

// Arches are the architectures that depot builds on, as Go names them.
func Arches() []string { return []string{"amd64", "arm64"} }

// Platforms are the platforms that a machine of that architecture lists, its
// own first.
func Platforms(arch string) []string {
	switch arch {
	case "amd64":
		return []string{"linux/amd64", "linux/amd64/v2", "linux/amd64/v3", "linux/386"}
	case "arm64":
		return []string{"linux/arm64", "linux/arm/v7", "linux/arm/v6"}
	}
	return nil
}
