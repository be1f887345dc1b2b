package server

import (
	"sync"
	"time"
)

// sessions knows which process of each agent is connected. It is memory only:
// after a restart the first to call is the one.
type sessions struct {
	mu      sync.Mutex
	byAgent map[string]*session // guarded by mu
}

// session is one process of an agent.
type session struct {
	id string
	// calls is how many calls of it hang now; seen is when the last one ended.
	calls int
	seen  time.Time
	// sequence is that of the last report.
	sequence uint64
	// noted says that the store was told of its silence.
	noted bool
}

// takeover is how long a process has to be silent before another of the same
// agent takes its place: longer than the gap between two of its calls, which is
// a second at most, but no longer than an agent that crashed can be done
// without.
const takeover = 2 * time.Second

// enter begins a call of an agent's session. It reports false while another
// session of the agent is connected.
func (s *sessions) enter(agent, id string, now time.Time) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	cur := s.byAgent[agent]
	if cur != nil && cur.id != id && (cur.calls > 0 || now.Sub(cur.seen) < takeover) {
		return false
	}
	if cur == nil || cur.id != id {
		cur = &session{id: id}
		s.byAgent[agent] = cur
	}
	cur.calls++
	cur.noted = false
	return true
}

// last reports whether no later report of the session has come than that of
// sequence, and takes it for the last.
func (s *sessions) last(agent, id string, sequence uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	cur := s.byAgent[agent]
	if cur == nil || cur.id != id || sequence < cur.sequence {
		return false
	}
	cur.sequence = sequence
	return true
}

// leave ends a call.
func (s *sessions) leave(agent, id string, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if cur := s.byAgent[agent]; cur != nil && cur.id == id {
		cur.calls--
		cur.seen = now
	}
}

// silent returns the agents that have made no call for the given time, each
// once.
func (s *sessions) silent(now time.Time, after time.Duration) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for agent, cur := range s.byAgent {
		if cur.calls == 0 && !cur.noted && now.Sub(cur.seen) >= after {
			cur.noted = true
			out = append(out, agent)
		}
	}
	return out
}

// connected reports whether the agent has a call that hangs, or had one just
// now.
func (s *sessions) connected(agent string, now time.Time, after time.Duration) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	cur := s.byAgent[agent]
	return cur != nil && (cur.calls > 0 || now.Sub(cur.seen) < after)
}
