package cloud

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opendepot/depot/agent/provider"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/controlplane/client"
)

// rig is a control plane, a host, and the agents that come and go between.
type rig struct {
	*server
	host  *host
	dir   string
	token client.Token
	quiet bool // do not show the agents' logs
}

func newRig(t *testing.T) *rig {
	t.Helper()
	r := &rig{server: newServer(t), host: newHost(), dir: filepath.Join(t.TempDir(), "state")}
	r.token = r.parsedToken()
	return r
}

// running is an agent's process.
type running struct {
	t      *testing.T
	agent  *Agent
	cancel context.CancelFunc
	done   chan error
}

// launch starts an agent; it ends with the test at the latest.
func (r *rig) launch() *running {
	r.t.Helper()
	state, err := OpenState(r.dir)
	must(r.t, err)
	agent, err := New(r.config(state))
	must(r.t, err)
	ctx, cancel := context.WithCancel(r.t.Context())
	run := &running{t: r.t, agent: agent, cancel: cancel, done: make(chan error, 1)}
	go func() {
		err := agent.Run(ctx)
		run.done <- errors.Join(err, state.Close())
	}()
	r.t.Cleanup(func() { cancel(); synctest.Wait() })
	return run
}

func (r *rig) config(state *State) Config {
	log := slog.New(slog.DiscardHandler)
	if !r.quiet {
		log = slog.New(slog.NewTextHandler(r.t.Output(), nil))
	}
	return Config{
		URL: "https://controlplane:1", Token: r.token, State: state, Name: "host", Version: "1",
		Pools: []Pool{{
			Name: "local-amd64", Kind: "local", Arch: "amd64", MaxMachines: 3, CPUs: 4, MemoryBytes: 1 << 30,
			Provider: r.host, Volumes: disk{r.host},
		}},
		MachineFiles: func(m MachineInfo) (map[string][]byte, error) {
			return map[string][]byte{"machine.json": []byte(m.ID)}, nil
		},
		Dial: r.dial,
		Log:  log,
	}
}

// stop ends the agent and waits for it.
func (a *running) stop() {
	a.t.Helper()
	a.cancel()
	if err := <-a.done; err != nil {
		a.t.Fatalf("the agent ended with %v", err)
	}
}

// until lets time pass until done, for ten minutes at most.
func until(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 6000 {
		synctest.Wait()
		if done() {
			return
		}
		wait(t.Context(), 100*time.Millisecond)
	}
	t.Fatalf("still not so after ten minutes: %s", what)
}

// pass lets that much time pass.
func pass(t *testing.T, d time.Duration) {
	t.Helper()
	wait(t.Context(), d)
	synctest.Wait()
}

func id(kind string, n int) string {
	return fmt.Sprintf("%s_0192aaaaaaaa7000800000000000%04d", kind, n)
}

// run orders machine n on volume v.
func run(n, v int) *depotv1.MachineOrder {
	return &depotv1.MachineOrder{Id: id("mch", n), Action: depotv1.MachineOrder_ACTION_RUN, Launch: &depotv1.Launch{
		Pool: "local-amd64", Arch: "amd64", VolumeId: id("vol", v), WriterEpoch: uint64(n), GenerationId: id("gen", n), //nolint:gosec // small
		Cpus: 2, MemoryBytes: 1 << 28, JoinToken: "join", ProjectId: id("prj", 1),
	}}
}

func (r *rig) state(n int) depotv1.ObservedMachine_State { return r.machine(id("mch", n)).GetState() }

func toStop(n int) *depotv1.MachineOrder {
	return &depotv1.MachineOrder{Id: id("mch", n), Action: depotv1.MachineOrder_ACTION_STOP}
}

// toDestroy orders machine 1 away.
func toDestroy() *depotv1.MachineOrder {
	return &depotv1.MachineOrder{Id: id("mch", 1), Action: depotv1.MachineOrder_ACTION_DESTROY}
}

const (
	blocked = depotv1.ObservedMachine_STATE_BLOCKED
	up      = depotv1.ObservedMachine_STATE_RUNNING
	exited  = depotv1.ObservedMachine_STATE_EXITED
	unseen  = depotv1.ObservedMachine_STATE_UNSPECIFIED
)

func TestLifeOfAMachine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		a := r.launch()
		r.order(run(1, 1))
		until(t, "the machine runs", func() bool { return r.state(1) == up })
		if m := r.machine(id("mch", 1)); m.GetAddress() != "192.0.2.1:24000" || m.GetVolumeId() != id("vol", 1) {
			t.Errorf("reported %v", m)
		}
		spec := look(r.host, func(h *host) provider.MachineSpec { return h.specs[id("mch", 1)] })
		want := map[string]string{
			"server": serverID, "agent": agentID, "machine": id("mch", 1), "project": id("prj", 1), "arch": "amd64",
			"volume": id("vol", 1), "generation": id("gen", 1), "pool": "local-amd64",
		}
		if fmt.Sprint(spec.Labels) != fmt.Sprint(want) {
			t.Errorf("labels are %v", spec.Labels)
		}
		if string(spec.Files["join-token"]) != "join" || string(spec.Files["machine.json"]) != id("mch", 1) {
			t.Errorf("files are %v", spec.Files)
		}

		r.order(toStop(1))
		until(t, "the machine was stopped", func() bool { return look(r.host, func(h *host) int { return h.stops[id("mch", 1)] }) == 1 })
		pass(t, time.Hour)
		if n := look(r.host, func(h *host) int { return h.stops[id("mch", 1)] }); n != 1 {
			t.Errorf("the machine was stopped %d times", n)
		}
		r.host.exit(id("mch", 1), provider.Exit{Clean: true})
		until(t, "the end is reported", func() bool { return r.state(1) == exited })
		if m := r.machine(id("mch", 1)); !m.GetClean() || m.GetGenerationId() != id("gen", 1) {
			t.Errorf("reported %v", m)
		}

		r.order(toDestroy())
		until(t, "the machine is gone", func() bool { return r.state(1) == unseen })
		if acts := look(r.host, func(h *host) string { return strings.Join(h.acts, " ") }); acts != "launch commit destroy" {
			t.Errorf("done: %s", acts)
		}
		until(t, "the volume is reported with its generation", func() bool {
			v := get(r.server, func(s *server) []*depotv1.ObservedVolume { return s.report.GetVolumes() })
			return len(v) == 1 && slices.Equal(v[0].GetGenerations(), []string{id("gen", 1)}) && v[0].GetWriter() == id("mch", 1) && !v[0].GetBusy()
		})
		a.stop()
	})
}

// An exit must not wait for the hanging call, whose answer is 25 s away.
func TestChangeCutsTheCall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.launch()
		r.order(run(1, 1))
		until(t, "the machine runs", func() bool { return r.state(1) == up })
		pass(t, 5*time.Second)
		r.host.exit(id("mch", 1), provider.Exit{Reason: "buildkitd was killed"})
		pass(t, 1500*time.Millisecond)
		m := r.machine(id("mch", 1))
		if m.GetState() != exited || m.GetClean() || m.GetGenerationId() != "" || m.GetReason() != "buildkitd was killed" {
			t.Errorf("reported %v", m)
		}
		if acts := look(r.host, func(h *host) []string { return h.acts }); slices.Contains(acts, "commit") {
			t.Errorf("a dirty tree was committed")
		}
	})
}

func TestIdleAgentIsQuiet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.launch()
		until(t, "the first call", func() bool { return get(r.server, func(s *server) int { return s.syncs }) > 1 })
		before := get(r.server, func(s *server) int { return s.syncs })
		pass(t, 10*time.Minute)
		if n := get(r.server, func(s *server) int { return s.syncs }) - before; n > 25 {
			t.Errorf("%d calls in ten minutes", n)
		}
	})
}

// reported is final for errors that no other try can mend.
func TestLaunchErrors(t *testing.T) {
	tests := map[string]struct {
		call  string
		err   error
		final bool
	}{
		"volume busy":   {"launch", fmt.Errorf("volume: %w", provider.ErrVolumeBusy), false},
		"no capacity":   {"launch", provider.ErrNoCapacity, false},
		"stale writer":  {"launch", fmt.Errorf("volume: %w", provider.ErrStaleWriter), true},
		"unusable":      {"launch", provider.ErrUnusable, true},
		"anything else": {"launch", errors.New("runc: broken"), false},
		"disk full":     {"ensure", errors.New("no space left on device"), false},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.host.fail[test.call] = test.err
				r.launch()
				r.order(run(1, 1))
				until(t, "the machine is blocked", func() bool { return r.state(1) == blocked })
				m := r.machine(id("mch", 1))
				if m.GetFinal() != test.final || !strings.Contains(m.GetReason(), test.err.Error()) {
					t.Errorf("reported %v", m)
				}
				r.host.set(func(h *host) { clear(h.fail) })
				pass(t, 6*time.Second)
				want := up
				if test.final {
					want = blocked
				}
				if got := r.state(1); got != want {
					t.Errorf("after the cause has gone it is %v", got)
				}
			})
		})
	}
}

func TestOrdersThatCannotBe(t *testing.T) {
	tests := map[string]struct {
		change func(*depotv1.MachineOrder)
		reason string
	}{
		"unknown pool":  {func(o *depotv1.MachineOrder) { o.Launch.Pool = "gpu" }, `no pool "gpu": it has local-amd64`},
		"another arch":  {func(o *depotv1.MachineOrder) { o.Launch.Arch = "arm64" }, "for amd64, not for arm64"},
		"a path":        {func(o *depotv1.MachineOrder) { o.Launch.VolumeId = "../etc" }, "no valid volume"},
		"no generation": {func(o *depotv1.MachineOrder) { o.Launch.GenerationId = "" }, "no valid generation"},
		"negative cpus": {func(o *depotv1.MachineOrder) { o.Launch.Cpus = -1 }, "negative"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := newRig(t)
				r.launch()
				o := run(1, 1)
				test.change(o)
				r.order(o, &depotv1.MachineOrder{Id: "../../x", Action: depotv1.MachineOrder_ACTION_DESTROY}, run(2, 2))
				until(t, "the machine is blocked", func() bool { return r.state(1) == blocked })
				if m := r.machine(id("mch", 1)); !m.GetFinal() || !strings.Contains(m.GetReason(), test.reason) {
					t.Errorf("reported %v", m)
				}
				until(t, "the other machine runs", func() bool { return r.state(2) == up })
			})
		})
	}
}

func TestPoolIsFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.launch()
		r.order(run(1, 1), run(2, 2), run(3, 3), run(4, 4))
		until(t, "one is blocked", func() bool { return r.state(4) == blocked })
		if m := r.machine(id("mch", 4)); m.GetFinal() || !strings.Contains(m.GetReason(), "3 of at most 3") {
			t.Errorf("reported %v", m)
		}
		r.order(toDestroy(), run(2, 2), run(3, 3), run(4, 4))
		until(t, "it has room", func() bool { return r.state(4) == up })
	})
}

// no-massacre: what no order names is left alone, whatever the orders are.
func TestAbsenceIsNoOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.launch()
		r.order(run(1, 1))
		until(t, "the machine runs", func() bool { return r.state(1) == up })
		r.order()
		pass(t, time.Hour)
		if r.state(1) != up || len(look(r.host, func(h *host) map[string]*provider.Volume { return h.volumes })) != 1 {
			t.Error("an empty answer destroyed something")
		}
		r.host.exit(id("mch", 1), provider.Exit{})
		pass(t, time.Hour)
		if r.state(1) != exited {
			t.Error("an orphan that ended is not reported, or was removed")
		}
	})
}

func TestForeignObjectsAreLeftAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		theirs := map[string]string{"server": "srv_0192aaaaaaaa70008000000000009999", "generation": id("gen", 1)}
		r.host.volumes[id("vol", 1)] = &provider.Volume{ID: id("vol", 1), Labels: theirs, Writer: id("mch", 1)}
		r.host.machines[id("mch", 1)] = &provider.Instance{
			ID: id("mch", 1), Volume: id("vol", 1), Labels: theirs, State: provider.Exited, Exit: &provider.Exit{Clean: true},
		}
		r.launch()
		r.orderAll(&depotv1.SyncAgentResponse{
			Machines: []*depotv1.MachineOrder{toDestroy(), run(2, 1)}, DeleteVolumes: []string{id("vol", 1)},
		})
		until(t, "the order is refused", func() bool { return r.state(2) == blocked })
		pass(t, time.Hour)
		if m := r.machine(id("mch", 2)); !m.GetFinal() || !strings.Contains(m.GetReason(), "another control plane") {
			t.Errorf("reported %v", m)
		}
		if r.machine(id("mch", 1)) != nil || len(get(r.server, func(s *server) []*depotv1.ObservedVolume { return s.report.GetVolumes() })) > 0 {
			t.Error("another control plane's objects are reported")
		}
		if acts := look(r.host, func(h *host) []string { return h.acts }); len(acts) > 0 || len(r.host.machines) != 1 || len(r.host.volumes) != 1 {
			t.Errorf("done to them: %v", acts)
		}
	})
}

func TestVolumesGoByName(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		for n := 1; n <= 3; n++ {
			r.host.volumes[id("vol", n)] = &provider.Volume{ID: id("vol", n), Generations: []provider.Generation{{ID: id("gen", 1)}, {ID: id("gen", 2)}}}
		}
		r.host.volumes[id("vol", 2)].Busy = true
		r.launch()
		r.orderAll(&depotv1.SyncAgentResponse{
			DeleteVolumes:     []string{id("vol", 1), id("vol", 2), id("vol", 9)},
			DeleteGenerations: []*depotv1.GenerationRef{{VolumeId: id("vol", 3), GenerationId: id("gen", 1)}, {VolumeId: id("vol", 9), GenerationId: id("gen", 1)}},
		})
		volumes := func() string {
			var all []string
			for _, v := range get(r.server, func(s *server) []*depotv1.ObservedVolume { return s.report.GetVolumes() }) {
				all = append(all, fmt.Sprint(v.GetId()[len(v.GetId())-1:], len(v.GetGenerations())))
			}
			return strings.Join(all, " ")
		}
		until(t, "one is gone, one lost a generation", func() bool { return volumes() == "22 31" })
		pass(t, time.Minute)
		r.host.set(func(h *host) { h.volumes[id("vol", 2)].Busy = false })
		until(t, "the busy one is gone too", func() bool { return volumes() == "31" })
	})
}

// A clean end is not reported before its generation is durable, and not held
// back for ever if it cannot be.
func TestCommitFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.launch()
		r.order(run(1, 1))
		until(t, "the machine runs", func() bool { return r.state(1) == up })
		r.host.set(func(h *host) { h.fail["commit"] = errors.New("no space left on device") })
		r.host.exit(id("mch", 1), provider.Exit{Clean: true})
		pass(t, 3*time.Second)
		if r.state(1) != up {
			t.Errorf("reported %v while the commit is being tried", r.state(1))
		}
		until(t, "the end is reported", func() bool { return r.state(1) == exited })
		if m := r.machine(id("mch", 1)); !m.GetClean() || m.GetGenerationId() != "" || !strings.Contains(m.GetReason(), "no space left") {
			t.Errorf("reported %v", m)
		}
	})
}

func TestListingFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t)
		r.host.fail["list"] = errors.New("the daemon is down")
		r.launch()
		pass(t, time.Minute)
		if n := get(r.server, func(s *server) int { return s.syncs }); n != 0 {
			t.Fatal("an agent that sees nothing made a report")
		}
		r.host.set(func(h *host) { clear(h.fail) })
		r.order(run(1, 1))
		until(t, "the machine runs", func() bool { return r.state(1) == up })
		r.host.set(func(h *host) { h.fail["list"] = errors.New("the daemon is down") })
		pool := func() *depotv1.Pool {
			return get(r.server, func(s *server) *depotv1.Pool { return s.report.GetPools()[0] })
		}
		until(t, "the pool is closed", func() bool { return strings.Contains(pool().GetClosed(), "the daemon is down") })
		if r.state(1) != up {
			t.Error("a machine that cannot be looked at was reported gone")
		}
		r.host.set(func(h *host) { clear(h.fail) })
		until(t, "the pool is open", func() bool { return pool().GetClosed() == "" })
	})
}
