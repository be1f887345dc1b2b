package site

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// HostConfig says what a host is like.
type HostConfig struct {
	// Name is the host's name in listings; empty means "host" and a number.
	Name string
	// Pools are --pool flags; none means one native pool of 4 machines.
	Pools []string
	// Net is where it lives; nil means the site's HostNet.
	Net *Netns
	// Address is what it advertises; empty means 127.0.0.1.
	Address string
	// Flags are further flags for depot-agent cloud.
	Flags []string
	// PoolSize is the size of the volume pool; empty means 8GiB.
	PoolSize string
}

// Host is a host with a cloud agent.
type Host struct {
	Agent *Process
	// StateDir and RunDir are the agent's.
	StateDir string
	RunDir   string
	site     *Site
	net      *Netns
	shared   string // a mount that Reboot made; empty if there is none
}

// AddHost makes a host, starts its agent and waits until it is connected.
func (s *Site) AddHost(tb TB, c HostConfig) *Host {
	tb.Helper()
	n := len(s.hosts)
	if c.Name == "" {
		c.Name = "host" + strconv.Itoa(n+1)
	}
	if c.Net == nil {
		c.Net = s.HostNet
	}
	if c.Address == "" {
		c.Address = "127.0.0.1"
	}
	if len(c.Pools) == 0 {
		c.Pools = []string{"arch=" + NativeArch() + ",max=4"}
	}
	if c.PoolSize == "" {
		c.PoolSize = "8GiB"
	}
	dir := filepath.Join(s.Dir, c.Name)
	h := &Host{site: s, net: c.Net, StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run")}
	token := filepath.Join(dir, "token")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		tb.Fatalf("host directory: %v", err)
	}
	resp, err := s.Admin(tb).Admin.CreateToken(tb.Context(), &depotv1.CreateTokenRequest{Kind: "agent", Name: c.Name})
	if err != nil {
		tb.Fatalf("make an agent token: %v", err)
	}
	if err := os.WriteFile(token, []byte(resp.GetSecret()), 0o600); err != nil {
		tb.Fatalf("write the agent token: %v", err)
	}
	args := []string{
		filepath.Join(s.bin, "depot-agent"), "cloud", "--server", s.AgentURL(), "--token-file", token, "--name", c.Name,
		"--state-dir", h.StateDir, "--run-dir", h.RunDir, "--bin-dir", s.bin, "--runc", filepath.Join(s.bin, "buildkit-runc"),
		"--advertise-address", c.Address, "--pool-size", c.PoolSize, "--dns", "192.0.2.53",
		"--port-range", strconv.Itoa(24000+100*n) + "-" + strconv.Itoa(24099+100*n),
		"--health-address", "127.0.0.1:" + strconv.Itoa(9465+n), "--log-level", "debug",
	}
	for _, p := range c.Pools {
		args = append(args, "--pool", p)
	}
	h.Agent = s.process(c.Name+"-agent", c.Net, append(args, c.Flags...)...)
	s.hosts = append(s.hosts, h)
	tb.Cleanup(func() { h.remove(tb) })
	h.Start(tb)
	return h
}

// Start starts the agent and waits until it is ready.
func (h *Host) Start(tb TB) {
	tb.Helper()
	h.Agent.Start(tb)
	h.Agent.WaitLog(tb, "msg=ready")
}

// remove ends the host as an operator would: its machines are stopped through
// the control plane, then its agent, which takes down what it made.
func (h *Host) remove(tb TB) {
	tb.Helper()
	if !h.site.ControlPlane.Running() {
		h.site.StartControlPlane(tb)
	}
	if !h.Agent.Running() {
		h.Start(tb)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	api := h.site.Admin(tb).Admin
	Eventually(tb, "all machines are gone", func() bool {
		resp, err := api.ListMachines(ctx, &depotv1.ListMachinesRequest{})
		if err != nil {
			tb.Fatalf("list machines at the end: %v", err)
		}
		for _, m := range resp.GetMachines() {
			if m.GetState() == depotv1.MachineState_MACHINE_STATE_DRAINING {
				continue
			}
			if _, err := api.StopMachine(ctx, &depotv1.StopMachineRequest{Id: m.GetId(), Now: true}); err != nil {
				tb.Errorf("stop machine at the end: %v", err)
			}
		}
		return len(resp.GetMachines()) == 0
	})
	Eventually(tb, "the host has removed its machines", func() bool {
		left, err := os.ReadDir(filepath.Join(h.StateDir, "local", "machines"))
		return err != nil || len(left) == 0
	})
	h.Agent.Stop(tb)
	h.checkLeft(tb)
	if h.shared != "" {
		run(tb, "umount", h.shared)
	}
}

// MachineProcess is a process of a machine, found on the host.
type MachineProcess struct {
	Machine string
	Pid     int
	Command string
}

// Processes lists the processes of the host's machines whose command line
// begins with command ("depot-agent", "buildkitd"), or all if it is empty.
func (h *Host) Processes(tb TB, command string) []MachineProcess {
	tb.Helper()
	var out []MachineProcess
	for _, init := range h.inits(tb) {
		for _, pid := range descendants(init.Pid) {
			line, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "cmdline"))
			if err != nil || len(line) == 0 {
				continue
			}
			argv0, _, _ := strings.Cut(string(line), "\x00")
			if command == "" || filepath.Base(argv0) == command {
				out = append(out, MachineProcess{Machine: init.Machine, Pid: pid, Command: filepath.Base(argv0)})
			}
		}
	}
	return out
}

// inits lists the first process of each of the host's machines, as runc knows
// them.
func (h *Host) inits(tb TB) []MachineProcess {
	tb.Helper()
	root := filepath.Join(h.RunDir, "local", "runc")
	if _, err := os.Stat(root); err != nil {
		return nil // it has run none yet
	}
	out := run(tb, filepath.Join(h.site.bin, "buildkit-runc"), "--root", root, "list", "--format", "json")
	var containers []struct {
		ID     string `json:"id"`
		Pid    int    `json:"pid"`
		Status string `json:"status"`
	}
	if s := strings.TrimSpace(out); s == "" || s == "null" {
		return nil
	}
	if err := json.Unmarshal([]byte(out), &containers); err != nil {
		tb.Fatalf("list machines: %v in %s", err, out)
	}
	var inits []MachineProcess
	for _, c := range containers {
		if c.Pid > 0 && c.Status == "running" {
			inits = append(inits, MachineProcess{Machine: c.ID, Pid: c.Pid})
		}
	}
	return inits
}

// descendants lists pid and all processes below it.
func descendants(pid int) []int {
	children := map[int][]int{}
	for _, name := range pids() {
		b, err := os.ReadFile(filepath.Join("/proc", name, "stat"))
		if err != nil {
			continue
		}
		// The name of the program, in parentheses, may hold anything.
		_, rest, ok := strings.Cut(string(b[strings.LastIndexByte(string(b), ')')+1:]), " ")
		fields := strings.Fields(rest)
		if !ok || len(fields) < 2 {
			continue
		}
		child, err1 := strconv.Atoi(name)
		parent, err2 := strconv.Atoi(fields[1])
		if err1 == nil && err2 == nil {
			children[parent] = append(children[parent], child)
		}
	}
	out := []int{pid}
	for i := 0; i < len(out); i++ {
		out = append(out, children[out[i]]...)
	}
	return out
}

// WaitMachines waits until the store has exactly n machines that hold their
// volume.
func (s *Site) WaitMachines(tb TB, n int) {
	tb.Helper()
	var got []*depotv1.Machine
	if !within(time.Minute, func() bool { got = s.Machines(tb); return len(got) == n }) {
		tb.Fatalf("%d machines after a minute, want %d: %v", len(got), n, got)
	}
}
