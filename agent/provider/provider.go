// Package provider is the seam between a cloud agent and whatever it launches
// machines on: one host, a Docker Engine, Kubernetes, EC2.
//
// A [Provider] launches machines and a [VolumeStore] keeps the caches that
// they mount. Both know specs only: nothing of the control plane's protocol
// reaches them. The rules that every implementation keeps, and that
// providertest checks:
//
//   - Every act is idempotent by the id in its spec. Launching a machine that
//     exists returns it; destroying one that does not exist succeeds.
//   - one-writer: a volume is mounted writable by at most one machine. The
//     implementation holds a lock that ends only with the machine itself, not
//     with the agent, and keeps the highest writer epoch that it has seen
//     beside the tree: a lower one is refused with [ErrStaleWriter].
//   - Machines outlive the agent. [Provider.List] finds them again by what is
//     on the host, never by what this process remembers, and it goes on
//     listing one that ended until Destroy is called.
//   - Destroy leaves nothing: no process, mount, network device, firewall
//     rule, cgroup or file, but for the volume.
package provider

import (
	"context"
	"errors"
	"time"
)

// The errors that carry a decision; everything else is retried by the caller.
var (
	// ErrVolumeBusy means that another machine, still running, writes the volume.
	ErrVolumeBusy = errors.New("volume is written by another machine")
	// ErrStaleWriter means that the volume has seen a higher writer epoch: the
	// order comes from a control plane that was restored or replaced.
	ErrStaleWriter = errors.New("volume has seen a higher writer epoch")
	// ErrNotFound means that there is no machine, volume or generation of that id.
	ErrNotFound = errors.New("not found")
	// ErrNoCapacity means that the host or cloud has no room now.
	ErrNoCapacity = errors.New("no capacity")
	// ErrUnusable means that the spec can never work here; the message says why.
	ErrUnusable = errors.New("not possible on this provider")
)

// Provider launches machines. It is safe for concurrent use.
type Provider interface {
	// Launch starts the machine of spec.ID, or returns it as it is if it was
	// launched before, running or ended. It returns when the machine's PID 1
	// runs, which is before it is ready. The errors that decide: ErrVolumeBusy,
	// ErrStaleWriter, ErrNoCapacity, ErrUnusable.
	Launch(ctx context.Context, spec MachineSpec) (Instance, error)
	// Stop asks a machine to end cleanly (TERM to its PID 1) and returns at
	// once; List tells when it has ended. ErrNotFound if there is none.
	Stop(ctx context.Context, id string) error
	// Destroy ends the machine if it runs, waits until nothing of it runs, and
	// removes every trace of it but its volume. No error if there is none.
	Destroy(ctx context.Context, id string) error
	// List returns all machines of this provider's owner, running or ended but
	// not yet destroyed, found on the host itself.
	List(ctx context.Context) ([]Instance, error)
}

// VolumeStore keeps volumes and their generations.
type VolumeStore interface {
	// Ensure makes the volume if there is none, empty or, with spec.From, as a
	// clone of another volume's live tree or generation.
	Ensure(ctx context.Context, spec VolumeSpec) (Volume, error)
	// Commit makes an atomic snapshot of the live tree under generation's id,
	// durable when it returns. Committing an id again returns the first result.
	Commit(ctx context.Context, volume, generation string) (Generation, error)
	// DeleteGeneration removes one committed generation; no error if there is none.
	DeleteGeneration(ctx context.Context, volume, generation string) error
	// Delete removes a volume and all its generations; no error if there is
	// none. ErrVolumeBusy while a machine writes it.
	Delete(ctx context.Context, volume string) error
	// List returns all volumes of this store's owner, found on storage itself.
	List(ctx context.Context) ([]Volume, error)
}

// MachineSpec says what to launch. All of it is set by the control plane and
// checked again by the provider: ids reach paths.
type MachineSpec struct {
	// ID is the control plane's id of the machine.
	ID string
	// Arch is the architecture as Go names it: amd64 or arm64.
	Arch string
	// Volume is the id of a volume that Ensure has made. It becomes
	// buildkitd's root.
	Volume string
	// WriterEpoch fences the volume: see ErrStaleWriter.
	WriterEpoch uint64
	// CPUs and MemoryBytes are the limits; the provider caps them by what the
	// host has and says so in Instance.Warnings. 0 means no limit.
	CPUs        int
	MemoryBytes int64
	// Labels are stored with the machine and returned by List, unchanged.
	Labels map[string]string
	// Files are put into the machine's /run/depot, which is memory, mode 0600.
	// Keys are plain file names. They hold secrets: never log them.
	Files map[string][]byte
}

// State is what a provider can tell of a machine from outside.
type State string

// The states of an instance.
const (
	Running State = "running" // its PID 1 runs
	Exited  State = "exited"  // nothing of it runs; see Exit
)

// Instance is a machine as the provider sees it.
type Instance struct {
	ID     string
	Volume string
	State  State
	// Address is host:port where clients reach the machine.
	Address string
	// Labels are those of the spec.
	Labels map[string]string
	// Launched is when it was launched.
	Launched time.Time
	// Exit is set once State is Exited.
	Exit *Exit
	// Warnings are for people: limits that were capped, a slow kind of volume.
	Warnings []string
}

// Exit says how a machine ended.
type Exit struct {
	// Clean means that buildkitd was stopped in order and its databases were
	// closed: the live tree may be committed as a generation.
	Clean bool `json:"clean"`
	// Reason is for people; empty after an ordinary stop.
	Reason string `json:"reason,omitempty"`
}

// VolumeSpec says which volume to make.
type VolumeSpec struct {
	ID string
	// From, if set, is what to clone: a volume and, unless empty, one of its
	// generations (otherwise its live tree).
	From *Source
	// Labels are stored with the volume and returned by List, unchanged.
	Labels map[string]string
}

// Source names a tree to clone from.
type Source struct {
	Volume     string
	Generation string
}

// Volume is a volume as the store sees it.
type Volume struct {
	ID     string
	Labels map[string]string
	// WriterEpoch is the highest that wrote it; Writer is that machine's id.
	WriterEpoch uint64
	Writer      string
	// Busy means that a machine holds it now.
	Busy bool
	// Generations are the committed ones, oldest first.
	Generations []Generation
}

// Generation is a committed snapshot.
type Generation struct {
	ID        string
	Committed time.Time
}
