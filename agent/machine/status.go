package machine

import (
	"sync"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// bell wakes those who wait for any change. The zero value is ready.
type bell struct {
	mu sync.Mutex
	ch chan struct{} // closed by ring
}

// next returns a channel that the next ring closes.
func (b *bell) next() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch == nil {
		b.ch = make(chan struct{})
	}
	return b.ch
}

func (b *bell) ring() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ch != nil {
		close(b.ch)
		b.ch = nil
	}
}

// status is what the machine says of itself, and what it was told to do.
type status struct {
	changed *bell

	mu      sync.Mutex // guards all below
	state   depotv1.MachineState
	reason  string
	version string

	draining chan struct{} // closed once the machine shall end
	hurry    chan struct{} // closed once it shall not wait for builds
	why      string        // of draining
}

func newStatus(changed *bell) *status {
	return &status{
		changed:  changed,
		state:    depotv1.MachineState_MACHINE_STATE_STARTING,
		draining: make(chan struct{}),
		hurry:    make(chan struct{}),
	}
}

// set changes the state.
func (s *status) set(state depotv1.MachineState, reason string) {
	s.mu.Lock()
	s.state, s.reason = state, reason
	s.mu.Unlock()
	s.changed.ring()
}

func (s *status) setVersion(v string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.version = v
}

// drain asks the machine to end, for the first reason given; with now, builds
// are not waited for. Repeating it is harmless.
func (s *status) drain(why string, now bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !closed(s.draining) {
		s.why = why
		close(s.draining)
	}
	if now && !closed(s.hurry) {
		close(s.hurry)
	}
}

func (s *status) drainReason() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.why
}

func (s *status) get() (state depotv1.MachineState, reason, version string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state, s.reason, s.version
}

func closed(ch <-chan struct{}) bool {
	select {
	case <-ch:
		return true
	default:
		return false
	}
}
