package e2e

import (
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
	"github.com/opendepot/depot/e2e/site"
)

// machine returns a machine, ended or not.
func (a *arena) machine(id string) *depotv1.Machine {
	a.t.Helper()
	resp, err := a.s.Admin(a.t).Admin.GetMachine(a.t.Context(), &depotv1.GetMachineRequest{Id: id})
	if err != nil {
		a.t.Fatalf("get machine: %v", err)
	}
	return resp.GetMachine()
}

// system runs a program to its end, and it has to succeed.
func (a *arena) system(args ...string) {
	a.t.Helper()
	out, err := exec.CommandContext(a.t.Context(), args[0], args[1:]...).CombinedOutput() //nolint:gosec // the test's own arguments
	if err != nil {
		a.t.Fatalf("%s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// readyz asks a control plane, by the address of its loopback listener,
// whether it is ready.
func (a *arena) readyz(address string) (code int, text string) {
	a.t.Helper()
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return a.s.ControlPlaneNet.Dial(ctx, network, addr)
		},
		DisableKeepAlives: true,
	}}
	req, err := http.NewRequestWithContext(a.t.Context(), http.MethodGet, "http://"+address+"/readyz", nil)
	if err != nil {
		a.t.Fatal(err)
	}
	resp, err := c.Do(req)
	if err != nil {
		a.t.Fatalf("ask %s: %v", address, err)
	}
	defer resp.Body.Close() //nolint:errcheck // only read
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// TestHostReboot has a host lose all its processes, mounts, devices and rules,
// and everything that it keeps in memory, in the middle of a build. The agent
// starts on what is left, and builds go on from the cache.
func TestHostReboot(t *testing.T) {
	t.Parallel()
	a := newArena(t, 0, 0)
	a.buildOnce()
	b := a.start("held")
	if !b.untilHeld() {
		t.Fatalf("the build ended:\n%s", b.Output())
	}
	first := b.stands().Machine
	a.h.Reboot(t)
	if r := b.Wait(t); r.Code == 0 || !strings.Contains(r.All(), first) || !strings.Contains(r.All(), "reboot") {
		t.Errorf("the build ended with code %d, and should name machine %s and the reboot:\n%s", r.Code, first, r.All())
	}
	next := a.start("0")
	next.succeeds()
	if !strings.Contains(next.Output(), "CACHED") {
		t.Errorf("the build after the reboot had nothing from the cache:\n%s", next.Output())
	}
	old, now := a.machine(first), a.machine(next.stands().Machine)
	if old.GetGone() == nil || !strings.Contains(old.GetReason(), "reboot") || now.GetVolumeId() != old.GetVolumeId() {
		t.Errorf("the machine before the reboot is %v, the one after it %v", old, now)
	}
	a.consistent()
}

// TestRestoredControlPlane starts a second control plane on the same state,
// one on a copy, and one on a backup: none of them gets an agent to obey, and
// the last one does once a person has said that it is the right one.
func TestRestoredControlPlane(t *testing.T) {
	t.Parallel()
	a := newArena(t, 0, 0)
	a.buildOnce()
	cp, bin, data := a.s.ControlPlane, filepath.Join(site.Bin(t), "depot-controlplane"), a.s.ControlPlaneDir()

	// Taken in order, from a stopped control plane.
	cp.Stop(t)
	backup, elsewhere := filepath.Join(a.s.Dir, "backup.db"), filepath.Join(a.s.Dir, "elsewhere")
	a.system(bin, "backup", "--data-dir", data, backup)
	a.system("cp", "-a", data, elsewhere)
	a.system("cp", "-a", data+"-master.key", elsewhere+"-master.key")
	for range 2 { // the agent sees two more epochs
		a.s.StartControlPlane(t)
		site.Eventually(t, "the agent is connected", func() bool { return a.count("agents WHERE connected") == 1 })
		a.h.WaitEpoch(t, a.epoch())
		cp.Stop(t)
	}
	a.s.StartControlPlane(t)
	a.h.WaitEpoch(t, a.epoch())
	seen := a.epoch()

	serve := func(name, dir string) *site.Process {
		return a.s.AddProcess(t, name, a.s.ControlPlaneNet, "depot-controlplane", "serve", "--data-dir", dir,
			"--client-listen", "127.0.0.1:9443", "--agent-listen", "127.0.0.1:9444", "--ops-listen", "127.0.0.1:9445")
	}
	second := serve("second", data)
	second.Start(t)
	if code := second.Wait(t); code == 0 || !strings.Contains(second.Log(), "in use by another control plane") {
		t.Errorf("a second control plane on the same state ended with code %d:\n%s", code, second.Log())
	}

	// The agent is led to the copy, with machines of the right one's running.
	copied := serve("copied", elsewhere)
	copied.Start(t)
	copied.WaitLog(t, "control plane ready")
	a.h.Agent.Kill(t)
	misled := a.s.AddProcess(t, "misled-agent", a.s.HostNet, replaced(a.h.Agent.Args, a.s.AgentURL(), "https://127.0.0.1:9444")...)
	misled.Start(t)
	misled.WaitLog(t, "epoch")
	if log := misled.Log(); !strings.Contains(log, "restored from a backup, or another one runs") {
		t.Errorf("the agent that was led to a copy says:\n%s", log)
	}
	if code, text := a.readyz("127.0.0.1:9445"); code != http.StatusServiceUnavailable || !strings.Contains(text, "depot-controlplane recover") {
		t.Errorf("the copy answers %d on /readyz: %s", code, text)
	}
	misled.Stop(t)
	copied.Stop(t)
	a.h.Start(t)
	a.buildOnce() // with the right one
	a.consistent()

	// The backup takes the place of the state.
	cp.Stop(t)
	a.closeStore()
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.RemoveAll(filepath.Join(data, "depot.db"+suffix)); err != nil {
			t.Fatal(err)
		}
	}
	a.system("cp", backup, filepath.Join(data, "depot.db"))
	a.s.StartControlPlane(t)
	site.Eventually(t, "the control plane knows that it is not the newest", func() bool {
		code, text := a.readyz("127.0.0.1:8445")
		return code == http.StatusServiceUnavailable && strings.Contains(text, "depot-controlplane recover --epoch")
	})
	cp.Stop(t)
	a.system(bin, "recover", "--data-dir", data, "--epoch", itoa(seen))
	a.s.StartControlPlane(t)
	if e := a.epoch(); e <= seen {
		t.Errorf("the recovered control plane is in epoch %d, the agent has seen %d", e, seen)
	}
	a.buildOnce()
	a.h.WaitEpoch(t, a.epoch())
	if code, text := a.readyz("127.0.0.1:8445"); code != http.StatusOK {
		t.Errorf("the recovered control plane answers %d on /readyz: %s", code, text)
	}
	a.consistent()
}

// epoch is the control plane's.
func (a *arena) epoch() uint64 {
	a.t.Helper()
	var epoch uint64
	a.query([]any{&epoch}, "SELECT epoch FROM server")
	return epoch
}

// TestForeignAgent starts an agent for another control plane than the one that
// its state belongs to, with a token of that one and without: it refuses, and
// its machines run on.
func TestForeignAgent(t *testing.T) {
	t.Parallel()
	a := newArena(t, 0, 0)
	a.buildOnce()
	machine := a.machines()[0].GetId()
	data := filepath.Join(a.s.Dir, "foreign")
	foreign := a.s.AddProcess(t, "foreign", a.s.ControlPlaneNet, "depot-controlplane", "serve", "--data-dir", data,
		"--client-listen", "127.0.0.1:9443", "--agent-listen", "127.0.0.1:9444", "--ops-listen", "127.0.0.1:9445")
	foreign.Start(t)
	foreign.WaitLog(t, "control plane ready")
	api := a.s.APIAt(t, "https://127.0.0.1:9443", strings.TrimSpace(read(t, filepath.Join(data, "admin-token"))))
	resp, err := api.Admin.CreateToken(t.Context(), &depotv1.CreateTokenRequest{Kind: "agent", Name: "host1"})
	if err != nil {
		t.Fatal(err)
	}
	token := filepath.Join(a.s.Dir, "foreign-token")
	if err := os.WriteFile(token, []byte(resp.GetSecret()), 0o600); err != nil {
		t.Fatal(err)
	}
	a.h.Agent.Kill(t)
	args := replaced(a.h.Agent.Args, a.s.AgentURL(), "https://127.0.0.1:9444")
	own := args[slices.Index(args, "--token-file")+1]

	withToken := a.s.AddProcess(t, "with-token", a.s.HostNet, replaced(args, own, token)...)
	withToken.Start(t)
	if code := withToken.Wait(t); code == 0 || !strings.Contains(withToken.Log(), "belongs to another control plane") {
		t.Errorf("with the other's token the agent ended with code %d:\n%s", code, withToken.Log())
	}
	without := a.s.AddProcess(t, "without-token", a.s.HostNet, args...)
	without.Start(t)
	without.WaitLog(t, "pin")
	without.Stop(t)
	if strings.Contains(without.Log(), "msg=ready") {
		t.Errorf("the agent obeyed another control plane:\n%s", without.Log())
	}
	if n := a.h.Processes(t, "buildkitd"); len(n) != 1 || n[0].Machine != machine {
		t.Errorf("the host runs %v, want machine %s as before", n, machine)
	}
	a.h.Start(t)
	a.buildOnce()
	if now := a.machines()[0].GetId(); now != machine {
		t.Errorf("machine %s was replaced by %s", machine, now)
	}
}

// TestOldAgentState copies a host's state back from earlier: the generations
// since are lost, and the next build goes on and says so.
func TestOldAgentState(t *testing.T) {
	t.Parallel()
	a := newArena(t, 0, 0)
	a.buildOnce()
	a.fresh()
	a.h.Agent.Stop(t)
	old := filepath.Join(a.s.Dir, "old-state")
	a.system("cp", "-a", "--sparse=always", a.h.StateDir, old)
	a.h.Start(t)
	a.buildOnce()
	a.fresh()
	if n := a.count("generations WHERE state = 'committed'"); n != 2 {
		t.Errorf("%d generations are committed, want one for each machine", n)
	}
	a.h.Agent.Stop(t)
	if err := os.RemoveAll(a.h.StateDir); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(old, a.h.StateDir); err != nil {
		t.Fatal(err)
	}
	a.h.Start(t)
	site.Eventually(t, "the second generation is known to be lost", func() bool {
		return a.count("generations WHERE state = 'lost'") == 1
	})
	b := a.start("0")
	b.succeeds()
	if !strings.Contains(b.Output(), "lost the saved cache") {
		t.Errorf("the build does not say that the saved cache is lost:\n%s", b.Output())
	}
	a.consistent()
}

// TestControlPlaneAway takes the control plane away for a minute in the middle
// of a build.
func TestControlPlaneAway(t *testing.T) {
	t.Parallel()
	a := newArena(t, 0, 0)
	b, during := a.start("held"), a.start("held")
	if !b.untilHeld() || !during.untilHeld() {
		t.Fatalf("a build ended:\n%s\n%s", b.Output(), during.Output())
	}
	a.s.ControlPlane.Kill(t)
	<-time.After(30 * time.Second)
	during.letGo()
	during.succeeds()
	<-time.After(30 * time.Second)
	a.s.StartControlPlane(t)
	b.letGo()
	b.succeeds()
	a.buildOnce()
	a.consistent()
}

// TestSilentHost cuts the network between the control plane and a host whose
// machine is wanted gone: a lease waits, though another host has room, and
// says for whom; when the host is back the build goes on there.
func TestSilentHost(t *testing.T) {
	t.Parallel()
	control, host, clients := site.NewNetns(t), site.NewNetns(t), site.NewNetns(t)
	control.Link(t, "host", "10.1.0.1/24", host, "control", "10.1.0.2/24")
	control.Link(t, "clients", "10.2.0.1/24", clients, "control", "10.2.0.2/24")
	host.Link(t, "clients", "10.3.0.1/24", clients, "host", "10.3.0.2/24")
	clients.IP(t, "route", "add", "10.1.0.1", "via", "10.2.0.1")
	s := site.New(t, site.Config{ControlPlaneNet: control, HostNet: host, ClientNet: clients, ControlPlaneAddress: "10.1.0.1"})
	a := arenaOn(t, s, site.HostConfig{Address: "10.3.0.1"})
	held := a.start("held")
	if !held.untilHeld() {
		t.Fatalf("the build ended:\n%s", held.Output())
	}
	machine := held.stands().Machine
	volume := a.machine(machine).GetVolumeId()
	other := s.AddHost(t, site.HostConfig{Net: control, Address: "10.1.0.1"})
	other.Watch(t)

	control.Run(t, "nft", "add table inet e2e; add chain inet e2e in { type filter hook prerouting priority -300; }; add rule inet e2e in iifname host drop; "+
		"add chain inet e2e out { type filter hook postrouting priority 300; }; add rule inet e2e out oifname host drop")
	mend := sync.OnceFunc(func() { control.Run(t, "nft", "delete table inet e2e") })
	defer mend()
	a.stop(machine)
	waiting := a.start("0")
	waiting.WaitOutput(t, "host host1 is silent")
	held.letGo()
	held.succeeds() // its client has a way to the machine
	// Longer than any silence that the control plane has a time for, but for
	// those of machines' own deadlines.
	select {
	case <-waiting.Ended():
	case <-time.After(40 * time.Second):
	}
	if st := waiting.stands(); st.State != "waiting" || st.Machine != "" {
		t.Errorf("one-writer: while the host is silent the lease should wait: %+v", st)
	}
	if n := other.Processes(t, ""); len(n) > 0 {
		t.Errorf("the other host runs %v", n)
	}
	mend()
	waiting.succeeds()
	if now := a.machine(waiting.stands().Machine); now.GetVolumeId() != volume || now.GetAgent() != "host1" {
		t.Errorf("the build went on on %v, want volume %s of host1", now, volume)
	}
	if gone := a.machine(machine); gone.GetGone() == nil {
		t.Errorf("the first machine is %v, want it gone", gone)
	}
}

// TestKilledClient kills clients in the middle of a build: buildx, and the
// docker command that runs it. The machine is free within seconds: it reports
// that the connection is gone, and the lease ends long before it would if
// nothing were known.
func TestKilledClient(t *testing.T) {
	t.Parallel()
	a := newArena(t, 0, 0)
	for name, start := range map[string]func() *build{
		"buildx": func() *build { return a.start("held") },
		"docker": func() *build { return a.startAs("held", filepath.Join(site.Deps(t), "bin", "docker"), "buildx") },
	} {
		b := start()
		if !b.untilHeld() || !b.until("the connection is reported", func(s standing) bool { return s.Connected }) {
			t.Fatalf("%s: the build ended:\n%s", name, b.Output())
		}
		lease := b.stands().Lease
		kill(b.Pid())
		if !b.Killed() {
			t.Errorf("%s: was not killed", name)
		}
		site.Eventually(t, "no connection is left, or the lease was released", func() bool {
			return a.count("leases WHERE id = ? AND (connections = 0 AND quiet IS NOT NULL OR end_cause = 'released')", lease) == 1
		})
		site.Eventually(t, "the lease has ended", func() bool { return a.count("leases WHERE id = ? AND state = 'ended'", lease) == 1 })
		site.Eventually(t, "the RUN has ended", func() bool { return b.sleeper() == 0 })
		var cause string
		var took int64
		a.query([]any{&cause, &took}, "SELECT end_cause, coalesce(ended - quiet, 0) FROM leases WHERE id = ?", lease)
		t.Logf("%s: the lease was %s, %s after its last connection", name, cause, time.Duration(took))
		if name == "buildx" && cause != "expired" || time.Duration(took) > 15*time.Second {
			t.Errorf("%s: the lease was %s, %s after its last connection", name, cause, time.Duration(took))
		}
	}
	a.buildOnce()
	a.consistent()
}
