package cloud

import (
	"context"
	"crypto/rand"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opendepot/depot/agent/provider"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

const (
	// idlePoll is how often machines are looked at while there are none.
	idlePoll = 15 * time.Second
	// volumesEvery is how often volumes are looked at while nothing happens.
	volumesEvery = time.Minute
	// listTimeout ends a listing; the next one may be luckier.
	listTimeout = time.Minute
	// actsAtOnce bounds the acts that run at the same time.
	actsAtOnce = 16
	// stopGrace is how long acts may take to end once the agent shall.
	stopGrace = 20 * time.Second
)

// backend is a provider with its store, and the pools that use them.
type backend struct {
	provider provider.Provider
	volumes  provider.VolumeStore
	pools    []Pool
	listed   bool  // at least once
	err      error // of the last listing
}

// volume is what the loop knows of one volume.
type volume struct {
	seen    *provider.Volume // nil: not listed
	host    *backend
	doing   bool   // an act on it runs
	settled uint64 // as machine.settled
	try     attempts
}

// loop is the state of one Run. One goroutine owns all of it: calls, listings
// and acts run in goroutines of their own, and end by sending what to change.
type loop struct {
	*Agent
	backends []*backend
	machines map[string]*machine // those that are seen, ordered, or being acted on
	ledger   map[string]launchRecord
	volumes  map[string]*volume
	orders   *depotv1.SyncAgentResponse // the last accepted; nil before the first
	session  string

	events   chan func(now time.Time)
	wg       sync.WaitGroup
	acting   int
	counts   map[act]uint64
	failures map[act]uint64

	renewing    bool
	nextRenewal time.Time
	renewals    int  // failed in a row
	outdated    bool // the next call shall show a new certificate
	nextPruning time.Time

	listing     uint64 // the number of the last listing begun
	listRunning bool
	nextList    time.Time
	nextVolumes time.Time

	call call
}

func newLoop(a *Agent, ledger map[string]launchRecord) *loop {
	l := &loop{
		Agent:    a,
		machines: map[string]*machine{},
		ledger:   ledger,
		volumes:  map[string]*volume{},
		session:  rand.Text(),
		events:   make(chan func(time.Time)),
		counts:   map[act]uint64{},
		failures: map[act]uint64{},
	}
	for _, p := range a.cfg.Pools {
		i := slices.IndexFunc(l.backends, func(b *backend) bool { return b.provider == p.Provider && b.volumes == p.Volumes })
		if i < 0 {
			i = len(l.backends)
			l.backends = append(l.backends, &backend{provider: p.Provider, volumes: p.Volumes})
		}
		l.backends[i].pools = append(l.backends[i].pools, p)
	}
	return l
}

// run turns until ctx ends. Acts that run then are given a grace, so that a
// launch is not cut in two.
func (l *loop) run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer l.drain()
	defer cancel()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case event := <-l.events:
			event(time.Now())
		case <-timer.C:
		}
		if l.call.refused != nil {
			return l.call.refused
		}
		timer.Reset(max(0, time.Until(l.step(ctx, time.Now()))))
	}
}

// drain waits for all goroutines.
func (l *loop) drain() {
	done := make(chan struct{})
	go func() { l.wg.Wait(); close(done) }()
	for {
		select {
		case event := <-l.events:
			event(time.Now())
		case <-done:
			return
		}
	}
}

// begin runs f in a goroutine; what it returns is applied by the loop.
func (l *loop) begin(f func() func(now time.Time)) {
	l.wg.Go(func() { l.events <- f() })
}

// step starts all that is due and returns when the next thing is.
func (l *loop) step(ctx context.Context, now time.Time) time.Time {
	next := now.Add(time.Hour)
	soonest := func(t time.Time) {
		if !t.IsZero() && t.Before(next) {
			next = t
		}
	}
	soonest(l.keepIdentity(ctx, now))
	soonest(l.prune(ctx, now))
	if !l.listRunning {
		if !now.Before(l.nextList) {
			l.list(ctx, now)
		} else {
			soonest(l.nextList)
		}
	}
	if l.observed() {
		for _, id := range slices.Sorted(maps.Keys(l.machines)) {
			soonest(l.stepMachine(ctx, now, l.machines[id]))
		}
		soonest(l.stepVolumes(ctx, now))
		soonest(l.sync(ctx, now))
	}
	l.publish()
	return next
}

// observed reports whether all that there is has been seen.
func (l *loop) observed() bool {
	return !slices.ContainsFunc(l.backends, func(b *backend) bool { return !b.listed })
}

// list looks at what the providers have, and now and then at the volumes.
func (l *loop) list(ctx context.Context, now time.Time) {
	l.listing++
	l.listRunning = true
	number, withVolumes := l.listing, !now.Before(l.nextVolumes)
	l.begin(func() func(time.Time) {
		ctx, cancel := context.WithTimeout(ctx, listTimeout)
		defer cancel()
		all := make([]found, len(l.backends))
		for i, b := range l.backends {
			// Machines first: the generations of one that is seen ended are then
			// those after its end.
			all[i].machines, all[i].err = b.provider.List(ctx)
			if withVolumes && all[i].err == nil {
				all[i].volumes, all[i].err = b.volumes.List(ctx)
			}
		}
		return func(now time.Time) { l.listed(ctx, now, number, withVolumes, all) }
	})
}

// found is what one backend has.
type found struct {
	machines []provider.Instance
	volumes  []provider.Volume
	err      error
}

func (l *loop) listed(ctx context.Context, now time.Time, number uint64, withVolumes bool, all []found) {
	l.listRunning = false
	failed := false
	for i, f := range all {
		b := l.backends[i]
		if f.err != nil {
			failed = true
			if b.err == nil {
				l.log.ErrorContext(ctx, "look at machines and volumes", "pool", b.pools[0].Name, "err", f.err)
			}
			b.err = f.err
			continue
		}
		b.err, b.listed = nil, b.listed || withVolumes
		l.seeMachines(b, number, f.machines)
		if withVolumes {
			l.seeVolumes(b, number, f.volumes)
		}
	}
	if withVolumes && !failed {
		l.nextVolumes = now.Add(volumesEvery)
	}
	l.nextList = now.Add(idlePoll)
	if failed || slices.ContainsFunc(slices.Collect(maps.Values(l.machines)), (*machine).watched) {
		l.nextList = now.Add(l.cfg.Poll)
	}
}

// watched reports whether m may change without an act.
func (m *machine) watched() bool { return m.running() || m.doing != none }

// seeMachines takes over a listing of b's machines. What it says of a machine
// whose act ended after it began is old.
func (l *loop) seeMachines(b *backend, number uint64, instances []provider.Instance) {
	listed := make(map[string]*provider.Instance, len(instances))
	for i := range instances {
		in := &instances[i]
		listed[in.ID] = in
		l.know(in.ID)
	}
	for id, m := range l.machines {
		in := listed[id]
		if m.doing != none || m.settled >= number || in == nil && m.host != b {
			continue
		}
		if m.running() && (in == nil || in.State == provider.Exited) {
			l.nextVolumes = time.Time{} // who wrote what, and what is committed?
		}
		m.seen, m.host = in, b
		l.forget(m)
	}
}

// know makes room for what is known of a machine.
func (l *loop) know(id string) {
	if l.machines[id] == nil {
		l.machines[id] = &machine{id: id, noted: l.ledger[id]}
	}
}

// forget drops m if nothing is to be known of it but what the ledger says.
func (l *loop) forget(m *machine) {
	if m.seen == nil && m.order == nil && m.doing == none {
		delete(l.machines, m.id)
	}
}

// seeVolumes takes over a listing of b's volumes.
func (l *loop) seeVolumes(b *backend, number uint64, volumes []provider.Volume) {
	listed := make(map[string]*provider.Volume, len(volumes))
	for i := range volumes {
		v := &volumes[i]
		listed[v.ID] = v
		l.volume(v.ID)
	}
	for id, v := range l.volumes {
		seen := listed[id]
		if v.doing || v.settled >= number || seen == nil && v.host != nil && v.host != b {
			continue
		}
		v.seen, v.host = seen, b
		if seen == nil {
			delete(l.volumes, id)
		}
	}
}

// volume returns what is known of a volume, which may be nothing yet.
func (l *loop) volume(id string) *volume {
	if id == "" { // of a machine that nothing is known of
		return &volume{}
	}
	if l.volumes[id] == nil {
		l.volumes[id] = &volume{}
	}
	return l.volumes[id]
}

// volumeOf returns the volume of m as it is seen, or nil.
func (l *loop) volumeOf(m *machine) *provider.Volume {
	if v := l.volumes[m.volumeID()]; v != nil {
		return v.seen
	}
	return nil
}

// volumeID is the volume that m writes or shall write.
func (m *machine) volumeID() string {
	if m.seen != nil {
		return m.seen.Volume
	}
	return m.order.GetLaunch().GetVolumeId()
}

// foreign reports whether labels are those of another control plane's object.
func (l *loop) foreign(labels map[string]string) bool {
	server := labels[labelServer]
	return server != "" && server != l.obeys.ServerID
}

func (l *loop) foreignMachine(m *machine) bool { return m.seen != nil && l.foreign(m.seen.Labels) }

// publish makes the status that others may read.
func (l *loop) publish() {
	s := Status{
		ServerID: l.obeys.ServerID, Epoch: l.obeys.Epoch,
		Connected: l.call.failures == 0 && l.orders != nil, Synced: l.call.answeredAt,
		Machines: map[string]int{}, Volumes: len(l.volumes),
		Acts: map[string]uint64{}, Failures: map[string]uint64{},
	}
	for _, m := range l.machines {
		switch {
		case m.seen != nil:
			s.Machines[string(m.seen.State)]++
		case m.order.GetAction() == depotv1.MachineOrder_ACTION_RUN && m.noted != ended:
			s.Machines["pending"]++
		}
	}
	for a, n := range l.counts {
		s.Acts[string(a)] = n
	}
	for a, n := range l.failures {
		s.Failures[string(a)] = n
	}
	l.mu.Lock()
	l.status = s
	l.mu.Unlock()
}

// prune forgets the ends of machines that are older than any backup that may
// still be restored.
func (l *loop) prune(ctx context.Context, now time.Time) time.Time {
	if now.Before(l.nextPruning) {
		return l.nextPruning
	}
	l.nextPruning = now.Add(24 * time.Hour)
	for id, record := range l.ledger {
		if record != ended || l.machines[id] != nil || now.Sub(idTime(id)) < ledgerKeep {
			continue
		}
		if err := l.state.forget(id); err != nil {
			l.log.WarnContext(ctx, "prune the ledger of machines", "err", err)
			break
		}
		delete(l.ledger, id)
	}
	return l.nextPruning
}
