package scheduler_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/opendepot/depot/controlplane"
	"github.com/opendepot/depot/controlplane/scheduler"
)

// world is a model of everything around a plan: one scope, one host that does
// what it is told, late or never, and clients that come and go.
type world struct {
	now      time.Time
	started  time.Time
	times    controlplane.Times
	project  *controlplane.Project
	leases   map[string]controlplane.Lease
	machines map[string]controlplane.Machine
	volume   *controlplane.Volume
	agent    controlplane.Agent
	others   int // machines of other scopes in the pool
	ahead    int
	room     int
	seq      int
	// running is what the host really runs: machine id → writer epoch.
	running map[string]uint64
	// written is the highest writer epoch that opened the volume.
	written uint64
}

func newWorld() *world {
	now := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	return &world{
		now: now, started: now, times: controlplane.DefaultTimes(), room: 2,
		project:  &controlplane.Project{ID: "prj", Name: "web", IdleTimeout: 2 * time.Minute, MaxMachines: 1},
		leases:   map[string]controlplane.Lease{},
		machines: map[string]controlplane.Machine{},
		running:  map[string]uint64{},
		agent:    controlplane.Agent{ID: "agt", Name: "host", Connected: true, Seen: now},
	}
}

func (w *world) id(kind controlplane.Kind) string {
	w.seq++
	return fmt.Sprintf("%s_%04d", kind, w.seq)
}

func (w *world) snapshot() scheduler.Snapshot {
	s := scheduler.Snapshot{
		Now: w.now, Started: w.started, Times: w.times, Scope: controlplane.Scope{Project: "prj", Arch: "amd64"},
		Project: w.project, Size: controlplane.DefaultSizes()[0], Epoch: 1, NewID: w.id,
	}
	if w.volume != nil {
		v := *w.volume
		s.Volume = &v
	}
	taken := w.others
	for _, id := range sortedKeys(w.machines) {
		m := w.machines[id]
		if m.Holds() {
			taken++
		}
		leased := false
		for _, l := range w.leases {
			leased = leased || l.Live() && l.Machine == id
		}
		if !m.Over() || m.Holds() || leased {
			s.Machines = append(s.Machines, m)
		}
	}
	for _, id := range sortedKeys(w.leases) {
		if l := w.leases[id]; l.Live() {
			s.Leases = append(s.Leases, l)
		}
	}
	slices.SortFunc(s.Leases, func(a, b controlplane.Lease) int { return int(a.Seq - b.Seq) })
	s.Pools = []scheduler.PoolView{{
		Pool:  controlplane.Pool{Agent: "agt", Name: "p", Arch: "amd64", MaxMachines: w.room},
		Agent: w.agent, Machines: taken, Ahead: w.ahead,
	}}
	return s
}

func sortedKeys[V any](m map[string]V) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}

// plan plans, checks the plan against the snapshot, and stores it.
func (w *world) plan(t failer) scheduler.Changes {
	s := w.snapshot()
	c := scheduler.Plan(s)
	for _, l := range c.Leases {
		was := w.leases[l.ID]
		if was.Connections > 0 && !l.Live() && w.project != nil {
			if m, ok := w.machines[l.Machine]; ok && !m.Over() && !slices.ContainsFunc(c.Machines, func(n controlplane.Machine) bool { return n.ID == m.ID && n.Over() }) {
				t.Fatalf("builds-survive: lease %s with %d connections was ended: %s", l.ID, was.Connections, l.Reason)
			}
		}
		if !l.Live() && l.Reason == "" {
			t.Fatalf("say-why: lease %s ended without a reason", l.ID)
		}
		if l.State == controlplane.LeaseWaiting && l.Reason == "" {
			t.Fatalf("say-why: lease %s waits without a reason", l.ID)
		}
		w.leases[l.ID] = l
	}
	for _, m := range c.Machines {
		if m.Over() && m.Reason == "" {
			t.Fatalf("say-why: machine %s ended without a reason", m.ID)
		}
		w.machines[m.ID] = m
	}
	for _, v := range c.Volumes {
		w.volume = &v
	}
	w.check(t)
	return c
}

type failer interface {
	Helper()
	Fatalf(format string, args ...any)
}

// check asserts the invariants on the stored state and on the host.
func (w *world) check(t failer) {
	t.Helper()
	holders := map[string][]string{}
	for _, m := range w.machines {
		if m.Holds() {
			holders[m.Volume] = append(holders[m.Volume], m.ID)
		}
	}
	for v, ms := range holders {
		if len(ms) > 1 {
			t.Fatalf("one-writer: volume %s is held by %v", v, ms)
		}
	}
	if len(w.running) > 1 {
		t.Fatalf("one-writer: the host runs %v on one volume", w.running)
	}
	for id := range w.running {
		if m, ok := w.machines[id]; !ok {
			t.Fatalf("intent-first: machine %s runs and is not stored", id)
		} else if !m.Holds() {
			t.Fatalf("one-writer: machine %s runs, and its volume is free", id)
		}
	}
	for _, l := range w.leases {
		if l.State != controlplane.LeaseReady {
			continue
		}
		m, ok := w.machines[l.Machine]
		if !ok || m.Ready.IsZero() {
			t.Fatalf("own-lease: lease %s is ready on machine %q, which never was", l.ID, l.Machine)
		}
	}
}

func (w *world) advance(d time.Duration) {
	w.now = w.now.Add(d)
	if w.agent.Connected {
		w.agent.Seen = w.now
	}
}

// pick draws one of the values that keep keeps; false if there is none.
func pick[V controlplane.Lease | controlplane.Machine](t *rapid.T, m map[string]V, label string, keep func(V) bool) (v V, ok bool) {
	var keys []string
	for _, k := range sortedKeys(m) {
		if keep(m[k]) {
			keys = append(keys, k)
		}
	}
	if len(keys) == 0 {
		return v, false
	}
	return m[rapid.SampledFrom(keys).Draw(t, label)], true
}

// TestPlanKeepsInvariants runs random histories of clients, a host that obeys
// late or not at all, crashes, and time; after each event every invariant holds.
func TestPlanKeepsInvariants(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		t.Repeat(map[string]func(*rapid.T){
			"ask": func(t *rapid.T) {
				w.seq++
				l := controlplane.Lease{
					ID: fmt.Sprintf("lse_%04d", w.seq), Seq: int64(w.seq), Project: "prj", Arch: "amd64",
					State: controlplane.LeaseWaiting, Created: w.now, Polled: w.now,
					Isolated: rapid.IntRange(0, 9).Draw(t, "isolated") == 0,
				}
				w.leases[l.ID] = l
				w.plan(t)
			},
			"poll": func(t *rapid.T) {
				if l, ok := pick(t, w.leases, "lease", func(l controlplane.Lease) bool { return l.State == controlplane.LeaseWaiting }); ok {
					l.Polled = w.now
					w.leases[l.ID] = l
				}
				w.plan(t)
			},
			"renew": func(t *rapid.T) {
				if l, ok := pick(t, w.leases, "lease", func(l controlplane.Lease) bool { return l.State == controlplane.LeaseReady }); ok {
					l.Renewed = w.now
					w.leases[l.ID] = l
				}
				w.plan(t)
			},
			"connect": func(t *rapid.T) {
				l, ok := pick(t, w.leases, "lease", func(l controlplane.Lease) bool { return l.State == controlplane.LeaseReady })
				if _, runs := w.running[l.Machine]; ok && runs {
					l.Connections, l.Connected = l.Connections+1, true
					w.leases[l.ID] = l
				}
				w.plan(t)
			},
			"disconnect": func(t *rapid.T) {
				if l, ok := pick(t, w.leases, "lease", func(l controlplane.Lease) bool { return l.Connections > 0 }); ok {
					l.Connections--
					if l.Connections == 0 {
						l.Quiet = w.now
					}
					w.leases[l.ID] = l
				}
				w.plan(t)
			},
			"release": func(t *rapid.T) {
				if l, ok := pick(t, w.leases, "lease", controlplane.Lease.Live); ok {
					w.leases[l.ID] = l.Finish(w.now, controlplane.EndReleased, "released")
				}
				w.plan(t)
			},
			"agent obeys": func(t *rapid.T) {
				if w.agent.Connected {
					w.obey(t)
				}
				w.plan(t)
			},
			"machine ready": func(t *rapid.T) {
				if m, ok := pick(t, w.machines, "machine", func(m controlplane.Machine) bool { return m.State == controlplane.MachineStarting }); ok {
					m.State, m.Ready = controlplane.MachineReady, w.now
					w.machines[m.ID] = m
				}
				w.plan(t)
			},
			"machine crashes": func(t *rapid.T) {
				clear(w.running)
				w.plan(t)
			},
			"token stolen": func(t *rapid.T) {
				if m, ok := pick(t, w.machines, "machine", func(m controlplane.Machine) bool { return m.State == controlplane.MachineStarting }); ok {
					w.machines[m.ID] = m.Fail(w.now, "its join token came with a second key")
				}
				w.plan(t)
			},
			"agent falls silent": func(t *rapid.T) {
				w.agent.Connected = false
				w.plan(t)
			},
			"agent comes back": func(t *rapid.T) {
				w.agent.Connected = true
				w.plan(t)
			},
			"control plane restarts": func(t *rapid.T) {
				w.started = w.now
				w.plan(t)
			},
			"others come and go": func(t *rapid.T) {
				w.others = rapid.IntRange(0, w.room).Draw(t, "others")
				w.ahead = rapid.IntRange(0, 1).Draw(t, "ahead")
				w.plan(t)
			},
			"time passes": func(t *rapid.T) {
				w.advance(rapid.SampledFrom([]time.Duration{
					time.Second, w.times.QuietTTL, w.times.WaitTTL, w.times.LeaseTTL, w.times.Register, 10 * time.Minute,
				}).Draw(t, "time"))
				w.plan(t)
			},
		})
	})
}

// obey has the host do what the store orders, and report what it sees.
func (w *world) obey(t failer) {
	for id, m := range w.machines {
		_, runs := w.running[id]
		switch {
		case m.State == controlplane.MachinePending:
			if m.WriterEpoch <= w.written {
				t.Fatalf("one-writer: machine %s has writer epoch %d, and %d has written", id, m.WriterEpoch, w.written)
			}
			m.Ordered, m.Launched, m.Address = w.now, w.now, "host:1"
			m.State = controlplane.MachineStarting
			w.running[id], w.written = m.WriterEpoch, m.WriterEpoch
		case m.Holds() && !runs && !m.Over():
			m = m.Fail(w.now, "it ended unexpectedly")
			m.Gone = w.now
		case m.Holds() && (m.Over() || m.State == controlplane.MachineDraining):
			delete(w.running, id)
			if !m.Over() {
				m.State, m.Ended = controlplane.MachineStopped, w.now
			}
			m.Gone = w.now
		}
		w.machines[id] = m
	}
}

// ask puts a waiting lease into w.
func (w *world) ask(id string) {
	w.seq++
	w.leases[id] = controlplane.Lease{
		ID: id, Seq: int64(w.seq), Project: "prj", Arch: "amd64", State: controlplane.LeaseWaiting, Created: w.now, Polled: w.now,
	}
}

// serve brings w to a ready machine with one ready lease.
func (w *world) serve(t *testing.T) controlplane.Machine {
	t.Helper()
	w.ask("lse_first")
	w.plan(t)
	w.obey(t)
	for id, m := range w.machines {
		m.State, m.Ready = controlplane.MachineReady, w.now
		w.machines[id] = m
	}
	w.plan(t)
	if l := w.leases["lse_first"]; l.State != controlplane.LeaseReady {
		t.Fatalf("lease is %s (%s), want ready", l.State, l.Reason)
	}
	return w.machines[w.leases["lse_first"].Machine]
}

func TestTwentyLeasesShareOneMachine(t *testing.T) {
	t.Parallel()
	w := newWorld()
	m := w.serve(t)
	for i := range 20 {
		w.ask(fmt.Sprintf("lse_%02d", i))
	}
	w.plan(t)
	for id, l := range w.leases {
		if l.State != controlplane.LeaseReady || l.Machine != m.ID {
			t.Errorf("lease %s is %s on %q, want ready on %q", id, l.State, l.Machine, m.ID)
		}
	}
}

func TestIdleMachineDrains(t *testing.T) {
	t.Parallel()
	w := newWorld()
	m := w.serve(t)
	w.leases["lse_first"] = w.leases["lse_first"].Finish(w.now, controlplane.EndReleased, "released")
	c := w.plan(t)
	if want := w.now.Add(w.project.IdleTimeout); !c.Next.Equal(want) {
		t.Errorf("planned again at %s, want at the idle timeout %s", c.Next, want)
	}
	w.advance(w.project.IdleTimeout)
	w.plan(t)
	if got := w.machines[m.ID].State; got != controlplane.MachineDraining {
		t.Errorf("machine is %s, want draining", got)
	}
}

func TestNextMachineWaitsForTheLast(t *testing.T) {
	t.Parallel()
	w := newWorld()
	m := w.serve(t)
	m.State, m.Reason, m.Draining = controlplane.MachineDraining, "stopped by somebody", w.now
	w.machines[m.ID] = m
	w.ask("lse_next")
	w.plan(t)
	if l := w.leases["lse_next"]; l.Machine != "" || !strings.Contains(l.Reason, m.ID) {
		t.Fatalf("lease has machine %q and reason %q, want none and one that names %s", l.Machine, l.Reason, m.ID)
	}
	w.obey(t)
	w.plan(t)
	if l := w.leases["lse_next"]; l.Machine == "" || l.Machine == m.ID {
		t.Fatalf("lease has machine %q, want a new one", l.Machine)
	}
}

func TestSilentHostIsNamed(t *testing.T) {
	t.Parallel()
	w := newWorld()
	m := w.serve(t)
	w.agent.Connected = false
	w.machines[m.ID] = m.Fail(w.now, "its join token came with a second key")
	w.ask("lse_next")
	w.advance(30 * time.Second)
	w.plan(t)
	l := w.leases["lse_next"]
	if l.Machine != "" || !strings.Contains(l.Reason, "host host is silent for 30s") || !strings.Contains(l.Reason, "agent rm --force") {
		t.Errorf("lease has machine %q and reason %q", l.Machine, l.Reason)
	}
	w.advance(time.Hour)
	w.leases["lse_next"] = func() controlplane.Lease { l.Polled = w.now; return l }()
	w.plan(t)
	if w.leases["lse_next"].Machine != "" {
		t.Error("one-writer: silence released the volume")
	}
}

func TestWaitingLeases(t *testing.T) {
	t.Parallel()
	tests := map[string]struct {
		change func(*world)
		reason string
		queued bool
		ended  bool
	}{
		"pool full":      {func(w *world) { w.others = w.room }, "is full (2 of 2 machines run", true, false},
		"others ahead":   {func(w *world) { w.ahead, w.others = 1, 1 }, "1 projects wait before", true, false},
		"host silent":    {func(w *world) { w.agent.Connected = false }, "is silent", true, false},
		"nobody is left": {func(w *world) { w.project = nil }, "deleted", false, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld()
			tt.change(w)
			w.ask("lse_x")
			w.plan(t)
			l := w.leases["lse_x"]
			if !strings.Contains(l.Reason, tt.reason) || l.Queued != tt.queued || l.Live() == tt.ended || l.Machine != "" {
				t.Errorf("lease %+v, want reason with %q, queued %v, ended %v", l, tt.reason, tt.queued, tt.ended)
			}
		})
	}
}

func TestAbandonedLaunchIsCancelled(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.ask("lse_x")
	w.plan(t)
	w.advance(w.times.WaitTTL)
	w.plan(t)
	if l := w.leases["lse_x"]; l.End != controlplane.EndExpired {
		t.Errorf("lease ended %q (%s), want expired", l.End, l.Reason)
	}
	for _, m := range w.machines {
		if m.State != controlplane.MachineStopped || m.Holds() {
			t.Errorf("machine is %s and holds its volume: %v; want stopped and gone", m.State, m.Holds())
		}
	}
}

func TestLateLaunchFails(t *testing.T) {
	t.Parallel()
	w := newWorld()
	w.ask("lse_x")
	w.plan(t)
	for id, m := range w.machines {
		m.Ordered = w.now
		w.machines[id] = m
	}
	w.advance(w.times.Launch)
	l := w.leases["lse_x"]
	l.Polled = w.now
	w.leases["lse_x"] = l
	w.plan(t)
	if l := w.leases["lse_x"]; l.End != controlplane.EndMachineLost || !strings.Contains(l.Reason, "did not launch it within 2m0s") {
		t.Errorf("lease ended %q: %s", l.End, l.Reason)
	}
}
