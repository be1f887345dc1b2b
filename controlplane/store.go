package controlplane

import (
	"context"
	"time"
)

// Store is the truth. View and Update run fn in one serializable transaction;
// on a conflict fn runs again, so it must not act on anything but tx. Errors
// that fn returns come back unchanged and roll the transaction back.
type Store interface {
	View(ctx context.Context, fn func(tx Tx) error) error
	Update(ctx context.Context, fn func(tx Tx) error) error
	// Watch returns a watcher of the changes that transactions announce with
	// Announce under topic: of one key, or of all if key is empty.
	Watch(topic Topic, key string) Watcher
}

// Topic is a kind of announced change; its key is the id of what changed.
type Topic string

// The topics.
const (
	TopicLease   Topic = "lease"   // key: lease id
	TopicMachine Topic = "machine" // key: machine id; its directive or leases changed
	TopicAgent   Topic = "agent"   // key: agent id; its orders may have changed
	TopicScope   Topic = "scope"   // key: Scope.String(); the scheduler looks again
)

// Watcher collects announced keys until it is closed. C receives when there is
// something to Take; keys coalesce, and none is lost.
type Watcher interface {
	C() <-chan struct{}
	Take() []string
	Close()
}

// Tx is one transaction. Getters return NotFound errors that name the id; in a
// View, putters fail.
type Tx interface {
	ServerTx
	OrganizationTx
	ProjectTx
	TokenTx
	LeaseTx
	MachineTx
	FleetTx
	VolumeTx
	AgentTx
}

// Server is the control plane's own record.
type Server struct {
	ID string
	// Epoch is raised at every start.
	Epoch uint32
	// Agents is the authority that signs agents' and machines' identities, and
	// TLS is the self-made authority of the listeners.
	Agents SealedAuthority
	TLS    SealedAuthority
	// JoinKey is sealed: it makes machines' join tokens.
	JoinKey []byte
	Created time.Time
}

// ServerTx reads and writes the control plane's own record.
type ServerTx interface {
	// Server returns NotFound before the first start.
	Server(ctx context.Context) (Server, error)
	PutServer(ctx context.Context, s Server) error
	// Announce wakes watchers of topic and key when the transaction commits.
	Announce(topic Topic, key string)
}

// OrganizationTx reads and writes organizations.
type OrganizationTx interface {
	Organization(ctx context.Context, id string) (Organization, error)
	OrganizationByName(ctx context.Context, name string) (Organization, error)
	Organizations(ctx context.Context) ([]Organization, error)
	PutOrganization(ctx context.Context, o Organization) error
}

// ProjectTx reads and writes projects.
type ProjectTx interface {
	Project(ctx context.Context, id string) (Project, error)
	ProjectByName(ctx context.Context, org, name string) (Project, error)
	// Projects lists those of an organization by name, or all if org is empty.
	Projects(ctx context.Context, org string) ([]Project, error)
	// PutProject returns Exists when another project of the organization has the name.
	PutProject(ctx context.Context, p Project) error
	DeleteProject(ctx context.Context, id string) error
}

// TokenTx reads and writes tokens.
type TokenTx interface {
	Token(ctx context.Context, id string) (Token, error)
	// Tokens lists all tokens, oldest first, of a project, or all if it is empty.
	Tokens(ctx context.Context, project string) ([]Token, error)
	PutToken(ctx context.Context, t Token) error
	DeleteToken(ctx context.Context, id string) error
}

// LeaseTx reads and writes leases.
type LeaseTx interface {
	Lease(ctx context.Context, id string) (Lease, error)
	// PutLease gives a new lease its Seq, and returns the lease as stored.
	PutLease(ctx context.Context, l Lease) (Lease, error)
	// LiveLeases returns the leases of a scope that have not ended, by Seq.
	LiveLeases(ctx context.Context, s Scope) ([]Lease, error)
	// MachineLeases returns the leases assigned to a machine that have not
	// ended, or whose certificate is still valid at now.
	MachineLeases(ctx context.Context, machine string, now time.Time) ([]Lease, error)
	// PrincipalLeases returns a principal's leases that have not ended.
	PrincipalLeases(ctx context.Context, principal string) ([]Lease, error)
}

// MachineTx reads and writes machines.
type MachineTx interface {
	Machine(ctx context.Context, id string) (Machine, error)
	// PutMachine returns Precondition when another machine still holds the
	// volume: the store itself guards one-writer.
	PutMachine(ctx context.Context, m Machine) error
	// ScopeMachines returns the machines of a scope that are not over or not gone.
	ScopeMachines(ctx context.Context, s Scope) ([]Machine, error)
	// AgentMachines returns the machines of an agent that are not over or not gone.
	AgentMachines(ctx context.Context, agent string) ([]Machine, error)
	// Machines lists a page of machines, newest first.
	Machines(ctx context.Context, f MachineFilter) ([]Machine, error)
}

// MachineFilter selects a page of machines.
type MachineFilter struct {
	// Org and Project are ids; empty means any.
	Org     string
	Project string
	// Ended asks for those that have ended too.
	Ended bool
	// Before is the id after which the page begins (ids sort by age); Limit is
	// its size.
	Before string
	Limit  int
}

// FleetTx answers the scheduler's questions that reach over scopes, each by an
// index: none reads the fleet.
type FleetTx interface {
	// LiveScopes returns every scope with a live lease or a machine that is not
	// gone: read once, at start.
	LiveScopes(ctx context.Context) ([]Scope, error)
	// ScopeLeases counts the leases of a scope that have not ended.
	ScopeLeases(ctx context.Context, s Scope) (int, error)
	// PoolMachines counts the machines that take room in a pool: not gone.
	PoolMachines(ctx context.Context, agent, pool string) (int, error)
	// QueuedScopes returns the scopes of an architecture with a lease that is
	// waiting and Queued, by their first such lease's Seq, limit at most.
	QueuedScopes(ctx context.Context, arch string, limit int) ([]Scope, error)
}

// VolumeTx reads and writes volumes and generations.
type VolumeTx interface {
	Volume(ctx context.Context, id string) (Volume, error)
	// Volumes returns those of a project that are not tombstones.
	Volumes(ctx context.Context, project string) ([]Volume, error)
	// AgentVolumes returns those on an agent, tombstones too.
	AgentVolumes(ctx context.Context, agent string) ([]Volume, error)
	PutVolume(ctx context.Context, v Volume) error
	DeleteVolume(ctx context.Context, id string) error
	GenerationTx
}

// GenerationTx reads and writes generations.
type GenerationTx interface {
	Generation(ctx context.Context, id string) (Generation, error)
	// Generations returns those of a volume, newest first.
	Generations(ctx context.Context, volume string) ([]Generation, error)
	PutGeneration(ctx context.Context, g Generation) error
}

// AgentTx reads and writes agents and their pools.
type AgentTx interface {
	Agent(ctx context.Context, id string) (Agent, error)
	Agents(ctx context.Context) ([]Agent, error)
	PutAgent(ctx context.Context, a Agent) error
	DeleteAgent(ctx context.Context, id string) error
	PoolTx
}

// PoolTx reads and writes pools.
type PoolTx interface {
	// Pools returns the pools for an architecture, or all if it is empty.
	Pools(ctx context.Context, arch string) ([]Pool, error)
	// PutPools replaces an agent's pools.
	PutPools(ctx context.Context, agent string, pools []Pool) error
}

// Scope is what is scheduled as one: the machines and leases of a project and
// architecture.
type Scope struct {
	Project string
	Arch    string
}

// String returns the scope as a topic's key.
func (s Scope) String() string { return s.Project + "/" + s.Arch }

// QueueDepth is how many queued scopes of an architecture are looked at: more
// than any pool frees machines for at once.
const QueueDepth = 64

// WakeQueue has the scheduler look again at the scopes that wait for room in a
// pool of the architecture. Call it in the transaction that makes room.
func WakeQueue(ctx context.Context, tx Tx, arch string) error {
	queue, err := tx.QueuedScopes(ctx, arch, QueueDepth)
	if err != nil {
		return err
	}
	for _, sc := range queue {
		tx.Announce(TopicScope, sc.String())
	}
	return nil
}
