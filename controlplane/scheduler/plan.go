// Package scheduler decides which machine serves which lease.
//
// [Plan] is a pure function over a [Snapshot] of one scope (a project and an
// architecture) and the counters of the pools that can serve it, never of the
// fleet; [Scheduler] is the loop that loads snapshots, stores plans and wakes
// whoever waits for them. A plan is stored in the transaction that its
// snapshot was read in, so what it decides is still true when it is stored,
// and a machine exists in the store before any agent hears of it
// (intent-first).
//
// What a plan never does: give a volume to a machine while another machine may
// still write it (one-writer), end a lease that has a live connection
// (builds-survive), or pass an older lease of another scope in the queue for a
// full pool.
package scheduler

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/opendepot/depot/controlplane"
)

// Snapshot is everything that a plan depends on.
type Snapshot struct {
	// Now is the time of the plan and Started that of the control plane.
	Now     time.Time
	Started time.Time
	Times   controlplane.Times
	Scope   controlplane.Scope
	// Project is nil when it was deleted.
	Project *controlplane.Project
	// Size is the project's machine size.
	Size controlplane.Size
	// Epoch is the control plane's, for writer epochs.
	Epoch uint32
	// Leases are the scope's live leases by Seq.
	Leases []controlplane.Lease
	// Machines are those of the scope that are not over or not gone, and those
	// of Leases.
	Machines []controlplane.Machine
	// Volume is the scope's volume, nil before the first machine.
	Volume *controlplane.Volume
	// Pools are the pools for the architecture, with their agents.
	Pools []PoolView
	// NewID makes ids; it is the plan's only source of randomness.
	NewID func(controlplane.Kind) string
}

// PoolView is a pool as a plan sees it.
type PoolView struct {
	controlplane.Pool
	Agent controlplane.Agent
	// Machines take room in the pool now.
	Machines int
	// Ahead counts the other scopes that stand before this one in the queue and
	// could take room in this pool.
	Ahead int
}

func (p PoolView) free() int { return p.MaxMachines - p.Machines }

// Changes is a plan: the objects to store as they shall be.
type Changes struct {
	Leases      []controlplane.Lease
	Machines    []controlplane.Machine
	Volumes     []controlplane.Volume
	Generations []controlplane.Generation
	// Next is when the scope has to be planned again though nothing changes;
	// zero means never.
	Next time.Time
}

// plan is the working state of one call of Plan.
type plan struct {
	Snapshot
	leases   []controlplane.Lease // as they shall be; Snapshot has them as they were
	machines []controlplane.Machine
	out      Changes
}

// Plan decides what becomes of a scope's leases and machines.
func Plan(s Snapshot) Changes {
	p := &plan{
		Snapshot: s,
		leases:   slices.Clone(s.Leases),
		machines: slices.Clone(s.Machines),
	}
	p.failLateMachines()
	p.endLeases()
	p.assignLeases()
	p.settleMachines()
	p.collect()
	return p.out
}

// failLateMachines fails the machines whose launch or registration took too
// long.
func (p *plan) failLateMachines() {
	for i := range p.machines {
		m := &p.machines[i]
		switch {
		case m.State == controlplane.MachinePending && !m.Ordered.IsZero() &&
			p.due(p.counted(m.Ordered).Add(p.Times.Launch)):
			*m = m.Fail(p.Now, "agent %s did not launch it within %s%s: see `docker depot agent ls` and the agent's log",
				p.agentName(m.Agent), p.Times.Launch, because(m.Reason))
		case m.State == controlplane.MachineStarting && p.due(p.counted(m.Launched).Add(p.Times.Register)):
			*m = m.Fail(p.Now, "it was launched but not ready within %s%s: see its log on host %s",
				p.Times.Register, because(m.Reason), p.agentName(m.Agent))
		}
	}
}

// endLeases ends the leases whose time, machine or project is over.
func (p *plan) endLeases() {
	for i := range p.leases {
		l := &p.leases[i]
		at := l.Expires(p.Times, p.Started)
		switch {
		case p.Project == nil:
			*l = l.Finish(p.Now, controlplane.EndRevoked, "the project was deleted")
		case l.Machine != "" && p.machine(l.Machine).Over():
			m := p.machine(l.Machine)
			*l = l.Finish(p.Now, controlplane.EndMachineLost, fmt.Sprintf("machine %s ended: %s", m.ID, cmp.Or(m.Reason, "it was stopped")))
		case !at.IsZero() && p.due(at):
			*l = l.Finish(p.Now, controlplane.EndExpired, "its client was not heard of any more")
		}
	}
}

// assignLeases gives each waiting lease, in order, a machine that is ready or
// will be, or what it waits for in words.
func (p *plan) assignLeases() {
	for i := range p.leases {
		l := &p.leases[i]
		if l.State != controlplane.LeaseWaiting {
			continue
		}
		l.Queued = false
		if m := p.machineFor(*l); m != nil {
			p.assign(l, m)
			continue
		}
		l.Machine = ""
		m, why := p.newMachine(*l)
		if m == nil {
			l.Reason, l.Queued = why.words, why.queued
			if why.refused {
				*l = l.Finish(p.Now, controlplane.EndRefused, why.words)
			}
			continue
		}
		p.machines = append(p.machines, *m)
		p.assign(l, m)
	}
}

// assign makes m the lease's machine: at once if m is ready, else as intent.
func (p *plan) assign(l *controlplane.Lease, m *controlplane.Machine) {
	l.Machine = m.ID
	switch m.State {
	case controlplane.MachineReady:
		l.State, l.Ready, l.Renewed, l.Reason = controlplane.LeaseReady, p.Now, p.Now, ""
	case controlplane.MachinePending:
		l.Reason = fmt.Sprintf("machine %s is being launched on %s%s", m.ID, p.agentName(m.Agent), because(m.Reason))
		if a := p.agent(m.Agent); a == nil || !a.Connected {
			l.Reason = fmt.Sprintf("machine %s is to be launched on host %s, which is silent%s: see that its agent runs", m.ID, p.agentName(m.Agent), p.since(a))
		}
	default:
		l.Reason = fmt.Sprintf("machine %s is starting", m.ID)
	}
}

// machineFor returns the machine with room for the lease that is ready, or will
// be first; nil if there is none.
func (p *plan) machineFor(l controlplane.Lease) *controlplane.Machine {
	var best *controlplane.Machine
	for i := range p.machines {
		m := &p.machines[i]
		if rank(*m) == 0 || m.Isolated || l.Isolated || !p.room(*m, l) {
			continue
		}
		if best == nil || rank(*m) > rank(*best) {
			best = m
		}
	}
	return best
}

// rank orders the machines that can take a lease; 0 cannot.
func rank(m controlplane.Machine) int {
	switch m.State {
	case controlplane.MachineReady:
		return 3
	case controlplane.MachineStarting:
		return 2
	case controlplane.MachinePending:
		return 1
	case controlplane.MachineDraining, controlplane.MachineStopped, controlplane.MachineFailed:
	}
	return 0
}

// room reports whether m can take l beside the leases that it has.
func (p *plan) room(m controlplane.Machine, l controlplane.Lease) bool {
	return p.Project.MaxBuildsPerMachine == 0 ||
		p.load(m.ID, l.ID) < p.Project.MaxBuildsPerMachine
}

// load counts the live leases of a machine other than the one named.
func (p *plan) load(machine, but string) int {
	n := 0
	for _, l := range p.leases {
		if l.Live() && l.Machine == machine && l.ID != but {
			n++
		}
	}
	return n
}

// wait says why a lease gets no machine now.
type wait struct {
	words string
	// queued: room in a pool would help. refused: nothing that may happen by
	// itself would.
	queued  bool
	refused bool
}

// newMachine returns a machine to store for the lease, on the scope's volume,
// or why there is none.
func (p *plan) newMachine(l controlplane.Lease) (*controlplane.Machine, wait) {
	if l.Isolated {
		return nil, wait{words: fmt.Sprintf("no %s pool runs isolated machines: ask an operator for one, or build without isolation", p.Scope.Arch), refused: true}
	}
	if holder := p.holder(); holder != nil {
		return nil, p.waitForHolder(*holder)
	}
	pool, why := p.choosePool()
	if pool == nil {
		return nil, why
	}
	v := p.volumeOn(*pool)
	v.Writers++
	p.Volume = &v
	p.out.Volumes = append(p.out.Volumes, v)
	m := controlplane.Machine{
		ID:          p.NewID(controlplane.KindMachine),
		Project:     p.Scope.Project,
		Arch:        p.Scope.Arch,
		Emulated:    pool.Emulated,
		Agent:       pool.Pool.Agent,
		Pool:        pool.Name,
		Volume:      v.ID,
		WriterEpoch: controlplane.WriterEpoch(p.Epoch, v.Writers),
		Generation:  p.NewID(controlplane.KindGeneration),
		CPUs:        p.Size.CPUs,
		MemoryBytes: p.Size.MemoryBytes,
		State:       controlplane.MachinePending,
		Created:     p.Now,
	}
	p.out.Generations = append(p.out.Generations, controlplane.Generation{
		ID: m.Generation, Volume: v.ID, Machine: m.ID, State: controlplane.GenerationOpen, Created: p.Now,
	})
	pool.Machines++
	return &m, wait{}
}

// holder returns the machine that writes the scope's volume, or may.
func (p *plan) holder() *controlplane.Machine {
	for i, m := range p.machines {
		if m.Holds() && !m.Isolated {
			return &p.machines[i]
		}
	}
	return nil
}

// waitForHolder says what a lease waits for while m has the volume.
func (p *plan) waitForHolder(m controlplane.Machine) wait {
	a := p.agent(m.Agent)
	silent := a == nil || !a.Connected
	switch {
	case silent && m.Over(), silent && m.State == controlplane.MachineDraining:
		return wait{words: fmt.Sprintf("host %s is silent%s, and machine %s there may still write the cache: bring its agent back, or have an operator remove it with `docker depot agent rm --force`",
			p.agentName(m.Agent), p.since(a), m.ID)}
	case m.Over():
		return wait{words: fmt.Sprintf("machine %s ended (%s) and is being removed", m.ID, cmp.Or(m.Reason, "stopped"))}
	case m.State == controlplane.MachineDraining:
		return wait{words: fmt.Sprintf("machine %s is stopping; the next one starts when its cache is saved", m.ID)}
	default:
		return wait{words: fmt.Sprintf("all machines of the project are full (%d builds per machine, %d machines): it waits for one to end",
			p.Project.MaxBuildsPerMachine, p.Project.MaxMachines)}
	}
}

// choosePool returns the pool for a new machine: the one that holds the
// volume, else the one with the most room, native before emulated.
func (p *plan) choosePool() (*PoolView, wait) {
	var best *PoolView
	why := wait{words: fmt.Sprintf("no agent has a pool for %s: start one with --pool arch=%s, or build with another --platform", p.Scope.Arch, p.Scope.Arch), refused: true}
	for i := range p.Pools {
		c := &p.Pools[i]
		if p.Volume != nil && (p.Volume.Agent != c.Pool.Agent || p.Volume.Pool != c.Name) {
			continue
		}
		if w := p.cannotTake(*c); w.words != "" {
			why = w
			continue
		}
		if best == nil || better(*c, *best) {
			best = c
		}
	}
	if best == nil && why.refused && p.Volume != nil && len(p.Pools) > 0 {
		why = wait{words: fmt.Sprintf("the cache is on host %s, whose pool %s is not there any more: bring it back, or remove the agent with `docker depot agent rm --force` and build cold",
			p.agentName(p.Volume.Agent), p.Volume.Pool)}
	}
	return best, why
}

// cannotTake says why the pool takes no new machine now; no words means it does.
func (p *plan) cannotTake(c PoolView) wait {
	switch {
	case !c.Agent.Connected:
		return wait{words: fmt.Sprintf("host %s, whose pool %s would run it, is silent%s: see that its agent runs", c.Agent.Name, c.Name, p.since(&c.Agent)), queued: true}
	case c.Closed != "":
		return wait{words: fmt.Sprintf("pool %s of host %s takes no new machines: %s", c.Name, c.Agent.Name, c.Closed), queued: true}
	case c.free() <= c.Ahead:
		return wait{words: fmt.Sprintf("pool %s of host %s is full (%d of %d machines run, %d projects wait before this one)",
			c.Name, c.Agent.Name, c.Machines, c.MaxMachines, c.Ahead), queued: true}
	}
	return wait{}
}

// better prefers native pools, then the most room, then the name.
func better(a, b PoolView) bool {
	if a.Emulated != b.Emulated {
		return b.Emulated
	}
	if fa, fb := a.free()-a.Ahead, b.free()-b.Ahead; fa != fb {
		return fa > fb
	}
	return a.Pool.Agent+a.Name < b.Pool.Agent+b.Name
}

// volumeOn returns the scope's volume, a new one on the pool if there is none.
func (p *plan) volumeOn(pool PoolView) controlplane.Volume {
	if p.Volume != nil {
		return *p.Volume
	}
	return controlplane.Volume{
		ID:      p.NewID(controlplane.KindVolume),
		Project: p.Scope.Project,
		Arch:    p.Scope.Arch,
		Agent:   pool.Pool.Agent,
		Pool:    pool.Name,
		State:   controlplane.VolumeActive,
		Created: p.Now,
	}
}

// settleMachines drains idle machines, cancels launches that nobody wants, and
// destroys those that drain for too long.
func (p *plan) settleMachines() {
	for i := range p.machines {
		m := &p.machines[i]
		switch {
		case m.Over():
			continue
		case p.load(m.ID, "") > 0:
			m.Idle = time.Time{}
		case m.Idle.IsZero():
			m.Idle = p.Now
		}
		switch m.State {
		case controlplane.MachinePending:
			p.settlePending(m)
		case controlplane.MachineReady:
			p.settleReady(m)
		case controlplane.MachineDraining:
			p.settleDraining(m)
		case controlplane.MachineStarting, controlplane.MachineStopped, controlplane.MachineFailed:
			// A starting machine that nobody wants any more is let to become
			// ready, and drains then: ended now, it would leave a dirty tree.
		}
	}
}

func (p *plan) settlePending(m *controlplane.Machine) {
	if m.Idle.IsZero() {
		return
	}
	m.State, m.Reason, m.Ended = controlplane.MachineStopped, "nobody waited for it any more", p.Now
	if m.Ordered.IsZero() {
		m.Gone = p.Now // no agent was told, so nothing can run
	}
}

func (p *plan) settleReady(m *controlplane.Machine) {
	switch {
	case p.Project == nil:
		m.State, m.Reason, m.Draining, m.Now = controlplane.MachineDraining, "the project was deleted", p.Now, true
	case !m.Idle.IsZero() && p.due(m.Idle.Add(p.Project.IdleTimeout)):
		m.State, m.Reason, m.Draining = controlplane.MachineDraining, fmt.Sprintf("idle for %s", p.Project.IdleTimeout), p.Now
	}
}

func (p *plan) settleDraining(m *controlplane.Machine) {
	since := m.Draining
	switch {
	case m.Now:
	case m.Idle.IsZero():
		return // its builds go on
	case m.Idle.After(since):
		since = m.Idle
	}
	if p.due(p.counted(since).Add(p.Times.Drain)) {
		*m = m.Fail(p.Now, "it did not stop within %s and is destroyed; the next machine goes on with the cache as it was left", p.Times.Drain)
	}
}

// collect puts what differs from the snapshot into the plan.
func (p *plan) collect() {
	for i, l := range p.leases {
		if !sameLease(l, p.Leases[i]) {
			p.out.Leases = append(p.out.Leases, l)
		}
		if l.Live() {
			p.wake(l.Expires(p.Times, p.Started))
		}
	}
	for i, m := range p.machines {
		if i >= len(p.Machines) || !sameMachine(m, p.Machines[i]) {
			p.out.Machines = append(p.out.Machines, m)
		}
		p.wakeFor(m)
	}
}

// wakeFor notes the next deadline of m.
func (p *plan) wakeFor(m controlplane.Machine) {
	switch m.State {
	case controlplane.MachinePending:
		if !m.Ordered.IsZero() {
			p.wake(p.counted(m.Ordered).Add(p.Times.Launch))
		}
	case controlplane.MachineStarting:
		p.wake(p.counted(m.Launched).Add(p.Times.Register))
	case controlplane.MachineReady:
		if !m.Idle.IsZero() && p.Project != nil {
			p.wake(m.Idle.Add(p.Project.IdleTimeout))
		}
	case controlplane.MachineDraining:
		if m.Now || !m.Idle.IsZero() {
			p.wake(p.counted(m.Draining).Add(p.Times.Drain))
			p.wake(p.counted(m.Idle).Add(p.Times.Drain))
		}
	case controlplane.MachineStopped, controlplane.MachineFailed:
	}
}

// wake keeps the earliest time after now.
func (p *plan) wake(at time.Time) {
	if at.After(p.Now) && (p.out.Next.IsZero() || at.Before(p.out.Next)) {
		p.out.Next = at
	}
}

// counted is when a machine's deadline begins to count: while the control
// plane was down, nobody could have met it (builds-survive).
func (p *plan) counted(since time.Time) time.Time {
	if since.Before(p.Started) {
		return p.Started
	}
	return since
}

func (p *plan) due(at time.Time) bool { return !p.Now.Before(at) }

func (p *plan) machine(id string) *controlplane.Machine {
	for i := range p.machines {
		if p.machines[i].ID == id {
			return &p.machines[i]
		}
	}
	return nil
}

func (p *plan) agent(id string) *controlplane.Agent {
	for i := range p.Pools {
		if p.Pools[i].Agent.ID == id {
			return &p.Pools[i].Agent
		}
	}
	return nil
}

func (p *plan) agentName(id string) string {
	if a := p.agent(id); a != nil {
		return a.Name
	}
	return id
}

func (p *plan) since(a *controlplane.Agent) string {
	if a == nil || a.Seen.IsZero() {
		return ""
	}
	return " for " + p.Now.Sub(a.Seen).Round(time.Second).String()
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return " (" + reason + ")"
}

// sameLease compares what a plan may change.
func sameLease(a, b controlplane.Lease) bool {
	return a.State == b.State && a.Machine == b.Machine && a.Reason == b.Reason && a.Queued == b.Queued
}

// sameMachine compares what a plan may change.
func sameMachine(a, b controlplane.Machine) bool {
	return a.State == b.State && a.Reason == b.Reason && a.Now == b.Now && a.Idle.Equal(b.Idle) &&
		a.Gone.Equal(b.Gone) && a.Draining.Equal(b.Draining)
}
