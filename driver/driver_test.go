package driver

import (
	"context"
	"errors"
	"strings"
	"testing"

	"connectrpc.com/connect"
	bx "github.com/docker/buildx/driver"
	control "github.com/moby/buildkit/api/services/control"
	bkclient "github.com/moby/buildkit/client"
	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// running sets what GetBuilder says of amd64.
func (w *world) running(s depotv1.MachineState) { w.arch[1].MachineState = s }

func TestBuildOnAMachineThatRuns(t *testing.T) {
	w := newWorld(t)
	w.machines = []*machine{newMachine(t, w.project, mch1)}
	w.running(depotv1.MachineState_MACHINE_STATE_READY)
	w.notices = []string{"the cache is cold after a recovery"}
	d := w.node(t, nil)
	c, err := bx.Boot(t.Context(), t.Context(), d, w.screen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if info, err := c.Info(t.Context()); err != nil || info.BuildkitVersion.Version != "v0.33.1" {
		t.Fatalf("Info = %v, %v", info, err)
	}
	if got := w.screen.String(); got != "" {
		t.Errorf("a machine that runs needs no words, got %q", got)
	}
	if w.acquired[0].GetLaunch() {
		t.Error("the lease could have launched a machine, though Info said that one runs")
	}
	preparer, ok := d.Driver.(bx.BuildPreparer)
	if !ok {
		t.Fatal("the driver prepares no builds")
	}
	if err := preparer.PrepareBuild(t.Context(), &bx.PrepareBuildOptions{NoOutput: true, Progress: w.screen}); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(w.screen.String(), "[depot] the cache is cold after a recovery") {
		t.Errorf("the notice is not shown: %q", w.screen)
	}
	// Another node object of the same process uses the same lease.
	second := w.node(t, nil)
	c2, err := second.Client(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c2.Close() })
	if n := len(w.held()); n != 1 {
		t.Errorf("the process holds %d leases, want 1", n)
	}
}

func TestBootstrapWaitsAndSaysWhy(t *testing.T) {
	w := newWorld(t)
	w.machines = []*machine{newMachine(t, w.project, mch1)}
	w.waits = []string{"launching on host a", "launching on host a", "buildkitd is starting"}
	c, err := bx.Boot(t.Context(), t.Context(), w.node(t, nil), w.screen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	got := w.screen.String()
	want := "[depot] waiting for an amd64 machine\nlaunching on host a\nbuildkitd is starting\nmachine " + mch1 + " is ready, after "
	if !strings.HasPrefix(got, want) {
		t.Errorf("shown:\n%s\nwant it to begin with:\n%s", got, want)
	}
	id := w.acquired[0].GetLeaseId()
	for _, a := range w.acquired {
		if a.GetLeaseId() != id || string(a.GetCsr()) != string(w.acquired[0].GetCsr()) || !a.GetLaunch() {
			t.Errorf("a repetition differs: %v", a)
		}
	}
}

func TestCancelWhileWaitingReleases(t *testing.T) {
	w := newWorld(t) // no machine: the pool is full
	w.waits = []string{"the pool is full"}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	d := w.node(t, nil)
	err := d.Bootstrap(ctx, func(s *bkclient.SolveStatus) {
		w.screen.Write(s)
		if strings.Contains(w.screen.String(), "the pool is full") {
			cancel()
		}
	})
	if !errors.Is(err, context.Canceled) {
		t.Fatalf("err = %v, want cancelled", err)
	}
	if ids := w.held(); len(ids) > 0 {
		t.Errorf("still held: %v", ids)
	}
}

func TestWaitTimeout(t *testing.T) {
	w := newWorld(t)
	w.waits = []string{"the pool is full"}
	err := w.node(t, map[string]string{"wait-timeout": "100ms"}).Bootstrap(t.Context(), w.screen.Write)
	expect(t, err, "within the wait-timeout of 100ms: the pool is full")
}

func TestMachineGoneAfterInfo(t *testing.T) {
	w := newWorld(t)
	w.running(depotv1.MachineState_MACHINE_STATE_READY) // but none is there
	d := w.node(t, nil)
	if info, err := d.Info(t.Context()); err != nil || info.Status != bx.Running {
		t.Fatalf("Info = %v, %v", info, err)
	}
	if _, err := d.Client(t.Context()); !errors.Is(err, bx.ErrNotRunning{}) {
		t.Fatalf("Client = %v, want not running", err)
	}
	if info, err := d.Info(t.Context()); err != nil || info.Status == bx.Running {
		t.Fatalf("Info = %v, %v, want anything but running", info, err)
	}
	w.update(func() { w.machines = []*machine{newMachine(t, w.project, mch1)} })
	c, err := bx.Boot(t.Context(), t.Context(), d, w.screen)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
}

func TestMachineLostWhileConnectingIsReplacedOnce(t *testing.T) {
	for name, tt := range map[string]struct {
		good bool
		want string
	}{
		"the second works": {good: true},
		"both are lost":    {want: "machine " + mch2 + " was lost: the host is out of memory"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			first, second := newMachine(t, w.project, mch1), newMachine(t, w.project, mch2)
			w.machines = []*machine{first, second}
			lose := func() { w.endAll("the host is out of memory") }
			first.onConnect.Store(&lose)
			if !tt.good {
				second.onConnect.Store(&lose)
			}
			d := w.node(t, nil)
			if err := d.Bootstrap(t.Context(), w.screen.Write); err != nil {
				t.Fatal(err)
			}
			c, err := d.Client(t.Context())
			if c != nil {
				t.Cleanup(func() { _ = c.Close() })
			}
			expect(t, err, tt.want)
			if !strings.Contains(w.screen.String(), "machine: machine "+mch1+" was lost: the host is out of memory") {
				t.Errorf("the replacement is not explained:\n%s", w.screen)
			}
		})
	}
}

func TestSolveEndsWithTheMachine(t *testing.T) {
	for name, tt := range map[string]struct {
		end  func(*world, *machine, string)
		want string
	}{
		"the server says so": {
			end: func(w *world, _ *machine, _ string) {
				w.endAll("its host was powered off; the cache was kept at 10:00")
			},
			want: "machine " + mch1 + " was lost: its host was powered off; the cache was kept at 10:00",
		},
		"the connection breaks first": {
			end: func(w *world, m *machine, _ string) {
				m.kill()
				w.endAll("buildkitd was killed; the cache is being checked")
			},
			want: "machine " + mch1 + " was lost: buildkitd was killed; the cache is being checked",
		},
		"cancelled by ref": {
			end:  func(w *world, _ *machine, ref string) { w.update(func() { w.cancel = []string{"other", ref} }) },
			want: "build ref-1 was cancelled on the server",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			m := newMachine(t, w.project, mch1)
			w.machines = []*machine{m}
			c, err := w.node(t, nil).Client(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = c.Close() })
			done := make(chan error, 2)
			go func() {
				s, err := c.ControlClient().Status(t.Context(), &control.StatusRequest{Ref: "ref-1"})
				if err == nil {
					_, err = s.Recv()
				}
				done <- err
			}()
			solved := make(chan error, 1)
			go func() {
				_, err := c.ControlClient().Solve(t.Context(), &control.SolveRequest{Ref: "ref-1"})
				solved <- err
			}()
			tt.end(w, m, <-m.solving)
			expect(t, <-solved, tt.want)
			m.kill()
			<-done
		})
	}
}

// A machine that is lost between two calls is named by the next ones.
func TestCallsAfterTheMachineIsLost(t *testing.T) {
	w := newWorld(t)
	m := newMachine(t, w.project, mch1)
	w.machines = []*machine{m}
	c, err := w.node(t, nil).Client(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	m.kill()
	w.endAll("buildkitd was killed; the cache is being checked")
	for range 3 {
		_, err := c.ControlClient().Info(t.Context(), &control.InfoRequest{})
		expect(t, err, "machine "+mch1+" was lost: buildkitd was killed")
		if ended := (*endedError)(nil); !errors.As(err, &ended) {
			t.Errorf("the call's error is gRPC's: %v", err)
		}
	}
}

func TestRefusals(t *testing.T) {
	t.Run("what the server refuses is passed on", func(t *testing.T) {
		w := newWorld(t)
		w.refuse = connect.NewError(connect.CodeFailedPrecondition, errors.New("project acme/web has no amd64 pool: start an agent"))
		expect(t, w.node(t, nil).Bootstrap(t.Context(), w.screen.Write), "has no amd64 pool: start an agent")
	})
	t.Run("an architecture without a pool", func(t *testing.T) {
		w := newWorld(t)
		w.arch = w.arch[:1]
		_, err := w.node(t, nil).Info(t.Context())
		expect(t, err, "has no pool for amd64 any more")
	})
	t.Run("no credentials", func(t *testing.T) {
		w := newWorld(t)
		d := w.node(t, nil)
		delete(w.env, "DEPOT_TOKEN")
		_, err := d.Info(t.Context())
		expect(t, err, "not logged in to https://"+w.host)
		if err := d.Stop(t.Context(), true); err != nil {
			t.Errorf("stop without credentials: %v", err)
		}
	})
	t.Run("buildkitd flags", func(t *testing.T) {
		w := newWorld(t)
		_, err := w.factory.New(t.Context(), bx.InitConfig{EndpointAddr: "depot://h/o/p/amd64", BuildkitdFlags: []string{"--debug"}})
		expect(t, err, "--buildkitd-flags cannot be used")
	})
	t.Run("a config file is ignored with a warning", func(t *testing.T) {
		w := newWorld(t)
		for range 2 {
			if _, err := w.factory.New(t.Context(), bx.InitConfig{EndpointAddr: "depot://h/o/p/amd64", Files: map[string][]byte{"buildkitd.toml": nil}}); err != nil {
				t.Fatal(err)
			}
		}
		if n := strings.Count(w.stderr.String(), "WARNING"); n != 1 {
			t.Errorf("%d warnings, want 1: %q", n, w.stderr)
		}
	})
}

func TestIsolatedNeverUsesWhatRuns(t *testing.T) {
	w := newWorld(t)
	w.machines = []*machine{newMachine(t, w.project, mch1)}
	w.running(depotv1.MachineState_MACHINE_STATE_READY)
	d := w.node(t, map[string]string{"isolated": "true"})
	if info, err := d.Info(t.Context()); err != nil || info.Status == bx.Running {
		t.Fatalf("Info = %v, %v", info, err)
	}
	c, err := d.Client(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if !w.acquired[0].GetIsolated() {
		t.Error("the lease is not isolated")
	}
}

func TestStopReleases(t *testing.T) {
	w := newWorld(t)
	w.machines = []*machine{newMachine(t, w.project, mch1)}
	d := w.node(t, nil)
	conn, err := d.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	if err := d.Stop(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	if ids := w.held(); len(ids) > 0 {
		t.Errorf("still held: %v", ids)
	}
}

func expect(t *testing.T, err error, want string) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Fatalf("unexpected error: %v", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Fatalf("error %q, want one with %q", err, want)
	}
}
