package driver

import (
	"context"
	"sync"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// table holds the leases of the process. Its zero value is empty.
type table struct {
	mu      sync.Mutex
	entries map[leaseKey]*entry // guarded by mu
}

// entry is a place for one lease. Whoever holds busy may fill or empty it.
type entry struct {
	busy chan struct{} // holds one token while someone acquires or releases

	mu    sync.Mutex
	lease *lease // guarded by mu; nil if there is none
}

func (t *table) entry(key leaseKey) *entry {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.entries == nil {
		t.entries = map[leaseKey]*entry{}
	}
	e, ok := t.entries[key]
	if !ok {
		e = &entry{busy: make(chan struct{}, 1)}
		t.entries[key] = e
	}
	return e
}

// current returns the live lease of the entry, or nil.
func (e *entry) current() *lease {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.lease != nil && e.lease.live() {
		return e.lease
	}
	return nil
}

func (e *entry) set(l *lease) (old *lease) {
	e.mu.Lock()
	defer e.mu.Unlock()
	old, e.lease = e.lease, l
	return old
}

// want is what acquire needs to know.
type want struct {
	key     leaseKey
	api     *session
	project *depotv1.ProjectRef
	launch  bool
	// wait is told each new reason to wait for a machine.
	wait func(reason string)
}

// acquire returns the live lease for a key, and makes one if there is none.
// Callers for the same key wait for each other. A lease that is not got, for
// whatever reason, is given back at once.
func (t *table) acquire(ctx context.Context, w want) (*lease, error) {
	e := t.entry(w.key)
	select {
	case e.busy <- struct{}{}:
		defer func() { <-e.busy }()
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	if l := e.current(); l != nil {
		return l, nil
	}
	l, err := newLease(w.key, w.api)
	if err != nil {
		return nil, err
	}
	if err := l.acquire(ctx, w.project, w.launch, w.wait); err != nil {
		l.release(context.WithoutCancel(ctx))
		return nil, err
	}
	// The renewals outlive the call that asked for the lease: releaseAll ends
	// them.
	renewals, stop := context.WithCancel(context.WithoutCancel(ctx))
	l.stop = stop
	go l.run(renewals)
	if old := e.set(l); old != nil {
		old.release(context.WithoutCancel(ctx))
	}
	return l, nil
}

// drop gives back l, unless that was done before.
func (t *table) drop(ctx context.Context, l *lease) {
	e := t.entry(l.key)
	e.busy <- struct{}{}
	defer func() { <-e.busy }()
	e.mu.Lock()
	mine := e.lease == l
	if mine {
		e.lease = nil
	}
	e.mu.Unlock()
	if mine {
		l.release(ctx)
	}
}

// releaseAll gives back all leases at once. No call of acquire is in progress.
func (t *table) releaseAll(ctx context.Context) {
	t.mu.Lock()
	entries := t.entries
	t.entries = nil
	t.mu.Unlock()
	var wg sync.WaitGroup
	for _, e := range entries {
		if l := e.set(nil); l != nil {
			wg.Go(func() { l.release(ctx) })
		}
	}
	wg.Wait()
}
