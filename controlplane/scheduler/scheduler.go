package scheduler

import (
	"context"
	"crypto/rand"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/opendepot/depot/controlplane"
)

// Scheduler plans each scope when something in it changes or falls due.
type Scheduler struct {
	Store controlplane.Store
	Times controlplane.Times
	// Sizes are the machine sizes that projects can name.
	Sizes []controlplane.Size
	// Started is when the control plane started, and Now its clock, which no
	// jump of the wall clock moves.
	Started time.Time
	Now     func() time.Time
	Log     *slog.Logger
	// Planned, if set, is told how long each plan took, store included.
	Planned func(time.Duration)
}

// retry is how long a scope whose plan could not be stored waits.
const retry = time.Second

// Run plans until ctx ends. It returns an error only if the first look at the
// store fails.
func (s *Scheduler) Run(ctx context.Context) error {
	watcher := s.Store.Watch(controlplane.TopicScope, "")
	defer watcher.Close()
	due := make(map[controlplane.Scope]time.Time)
	err := s.Store.View(ctx, func(tx controlplane.Tx) error {
		clear(due)
		scopes, err := tx.LiveScopes(ctx)
		for _, sc := range scopes {
			due[sc] = s.Now()
		}
		return err
	})
	if err != nil {
		return ignoreCancel(ctx, err)
	}
	for ctx.Err() == nil {
		s.planDue(ctx, due)
		timer := time.NewTimer(s.untilNext(due))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-watcher.C():
			for _, key := range watcher.Take() {
				if sc, ok := parseScope(key); ok {
					due[sc] = s.Now()
				}
			}
		}
		timer.Stop()
	}
	return nil
}

// planDue plans every scope that is due and notes when it is due again. A
// scope that fails does not hold up the others.
func (s *Scheduler) planDue(ctx context.Context, due map[controlplane.Scope]time.Time) {
	for sc, at := range due {
		if s.Now().Before(at) {
			continue
		}
		next, err := s.PlanScope(ctx, sc)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			s.Log.ErrorContext(ctx, "plan scope", "project", sc.Project, "arch", sc.Arch, "err", err)
			due[sc] = s.Now().Add(retry)
		case next.IsZero():
			delete(due, sc)
		default:
			due[sc] = next
		}
	}
}

// untilNext returns how long nothing is due: at most a minute.
func (s *Scheduler) untilNext(due map[controlplane.Scope]time.Time) time.Duration {
	wait := time.Minute
	for _, at := range due {
		wait = min(wait, at.Sub(s.Now()))
	}
	return max(wait, 0)
}

// PlanScope plans one scope now, stores the plan, and returns when it has to be
// planned again.
func (s *Scheduler) PlanScope(ctx context.Context, sc controlplane.Scope) (time.Time, error) {
	begin := time.Now()
	var changes Changes
	var before Snapshot
	err := s.Store.Update(ctx, func(tx controlplane.Tx) (err error) {
		if before, err = s.load(ctx, tx, sc); err != nil {
			return err
		}
		changes = Plan(before)
		return store(ctx, tx, sc, before, changes)
	})
	if err != nil {
		return time.Time{}, err
	}
	s.log(ctx, before, changes)
	if s.Planned != nil {
		s.Planned(time.Since(begin))
	}
	return changes.Next, nil
}

// load reads a scope's snapshot.
func (s *Scheduler) load(ctx context.Context, tx controlplane.Tx, sc controlplane.Scope) (Snapshot, error) {
	snap := Snapshot{
		Now: s.Now(), Started: s.Started, Times: s.Times, Scope: sc,
		NewID: func(k controlplane.Kind) string { return controlplane.NewID(k, s.Now(), rand.Reader) },
	}
	server, err := tx.Server(ctx)
	if err != nil {
		return snap, err
	}
	snap.Epoch = server.Epoch
	project, err := tx.Project(ctx, sc.Project)
	switch {
	case err == nil:
		snap.Project = &project
		snap.Size = s.size(project.Size)
	case controlplane.CodeOf(err) != controlplane.NotFound:
		return snap, err
	}
	if snap.Leases, err = tx.LiveLeases(ctx, sc); err != nil {
		return snap, err
	}
	if snap.Machines, err = tx.ScopeMachines(ctx, sc); err != nil {
		return snap, err
	}
	if err := addLeased(ctx, tx, &snap); err != nil {
		return snap, err
	}
	if snap.Volume, err = scopeVolume(ctx, tx, sc); err != nil {
		return snap, err
	}
	snap.Pools, err = loadPools(ctx, tx, sc)
	return snap, err
}

// addLeased adds the machines of live leases that are gone already: the plan
// ends those leases, and says what became of their machine.
func addLeased(ctx context.Context, tx controlplane.Tx, snap *Snapshot) error {
	for _, l := range snap.Leases {
		if l.Machine == "" || slices.ContainsFunc(snap.Machines, func(m controlplane.Machine) bool { return m.ID == l.Machine }) {
			continue
		}
		m, err := tx.Machine(ctx, l.Machine)
		if err != nil {
			return err
		}
		snap.Machines = append(snap.Machines, m)
	}
	return nil
}

func (s *Scheduler) size(name string) controlplane.Size {
	for _, size := range s.Sizes {
		if size.Name == name {
			return size
		}
	}
	return s.Sizes[0]
}

// scopeVolume returns the scope's shared volume, or nil.
func scopeVolume(ctx context.Context, tx controlplane.Tx, sc controlplane.Scope) (*controlplane.Volume, error) {
	volumes, err := tx.Volumes(ctx, sc.Project)
	if err != nil {
		return nil, err
	}
	for _, v := range volumes {
		if v.Arch == sc.Arch && v.State == controlplane.VolumeActive && !v.Isolated {
			return &v, nil
		}
	}
	return nil, nil //nolint:nilnil // no volume yet is an ordinary answer
}

// loadPools returns the pools for the scope's architecture with their counters.
func loadPools(ctx context.Context, tx controlplane.Tx, sc controlplane.Scope) ([]PoolView, error) {
	pools, err := tx.Pools(ctx, sc.Arch)
	if err != nil {
		return nil, err
	}
	ahead, err := queueAhead(ctx, tx, sc)
	if err != nil {
		return nil, err
	}
	views := make([]PoolView, 0, len(pools))
	for _, pool := range pools {
		agent, err := tx.Agent(ctx, pool.Agent)
		if err != nil {
			return nil, err
		}
		n, err := tx.PoolMachines(ctx, pool.Agent, pool.Name)
		if err != nil {
			return nil, err
		}
		views = append(views, PoolView{Pool: pool, Agent: agent, Machines: n, Ahead: ahead[volumePlace{}] + ahead[volumePlace{pool.Agent, pool.Name}]})
	}
	return views, nil
}

// volumePlace is the one pool that can run a scope's machine: where its volume
// is. It is empty for a scope without one, which any pool can.
type volumePlace struct{ agent, pool string }

// queueAhead counts the scopes that stand before sc in its architecture's
// queue, by the place of their volume: they pass none but who could take their
// room.
func queueAhead(ctx context.Context, tx controlplane.Tx, sc controlplane.Scope) (map[volumePlace]int, error) {
	queue, err := tx.QueuedScopes(ctx, sc.Arch, controlplane.QueueDepth)
	if err != nil {
		return nil, err
	}
	if at := slices.Index(queue, sc); at >= 0 {
		queue = queue[:at]
	}
	ahead := make(map[volumePlace]int)
	for _, other := range queue {
		v, err := scopeVolume(ctx, tx, other)
		if err != nil {
			return nil, err
		}
		if v == nil {
			ahead[volumePlace{}]++
		} else {
			ahead[volumePlace{v.Agent, v.Pool}]++
		}
	}
	return ahead, nil
}

// store writes a plan and announces what it changed.
func store(ctx context.Context, tx controlplane.Tx, sc controlplane.Scope, before Snapshot, c Changes) error {
	for _, v := range c.Volumes {
		if err := tx.PutVolume(ctx, v); err != nil {
			return err
		}
	}
	for _, m := range c.Machines {
		if err := tx.PutMachine(ctx, m); err != nil {
			return err
		}
		tx.Announce(controlplane.TopicMachine, m.ID)
		tx.Announce(controlplane.TopicAgent, m.Agent)
	}
	for _, g := range c.Generations {
		if err := tx.PutGeneration(ctx, g); err != nil {
			return err
		}
	}
	for _, l := range c.Leases {
		if _, err := tx.PutLease(ctx, l); err != nil {
			return err
		}
		tx.Announce(controlplane.TopicLease, l.ID)
		if l.Machine != "" {
			tx.Announce(controlplane.TopicMachine, l.Machine)
		}
	}
	if leftQueue(before.Leases, c.Leases) || anyGone(c.Machines) {
		return controlplane.WakeQueue(ctx, tx, sc.Arch)
	}
	return nil
}

// leftQueue reports whether a lease that was queued is not any more.
func leftQueue(before, changed []controlplane.Lease) bool {
	return slices.ContainsFunc(before, func(b controlplane.Lease) bool {
		return b.Queued && slices.ContainsFunc(changed, func(l controlplane.Lease) bool {
			return l.ID == b.ID && (!l.Queued || !l.Live())
		})
	})
}

func anyGone(machines []controlplane.Machine) bool {
	return slices.ContainsFunc(machines, func(m controlplane.Machine) bool { return !m.Gone.IsZero() })
}

// log tells state changes, once they are stored.
func (s *Scheduler) log(ctx context.Context, before Snapshot, c Changes) {
	for _, m := range c.Machines {
		was := controlplane.MachineState("")
		for _, b := range before.Machines {
			if b.ID == m.ID {
				was = b.State
			}
		}
		if was != m.State {
			s.Log.InfoContext(ctx, "machine state", "project", m.Project, "arch", m.Arch, "machine", m.ID, "volume", m.Volume,
				"agent", m.Agent, "state", string(m.State), "reason", m.Reason)
		}
	}
	for _, l := range c.Leases {
		if l.State != controlplane.LeaseWaiting {
			s.Log.InfoContext(ctx, "lease state", "project", l.Project, "arch", l.Arch, "lease", l.ID, "machine", l.Machine,
				"state", string(l.State), "reason", l.Reason)
		}
	}
}

func parseScope(key string) (controlplane.Scope, bool) {
	project, arch, ok := strings.Cut(key, "/")
	return controlplane.Scope{Project: project, Arch: arch}, ok
}

func ignoreCancel(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, ctx.Err()) {
		return nil
	}
	return err
}
