package local

import (
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opendepot/depot/agent/provider"
)

// buildkitConfig is what a machine agent would write: enough for RUN steps with
// a network each.
const buildkitConfig = `
root = "/var/lib/buildkit"
[worker.containerd]
  enabled = false
[worker.oci]
  enabled = true
  binary = "buildkit-runc"
  snapshotter = "overlayfs"
  networkMode = "cni"
  cniConfigPath = "` + CNIConfig + `"
  cniBinaryPath = "` + CNIBin + `"
`

// probes are what a machine tries to reach, and whether it may.
func probes(t *testing.T, neighbour string) map[string]bool {
	t.Helper()
	return map[string]bool{
		"tcp " + net.JoinHostPort(serverAddr, "80"): true,
		"udp " + net.JoinHostPort(serverAddr, "80"): true,
		"tcp " + net.JoinHostPort(worldAddr, "80"):  true,
		"tcp " + net.JoinHostPort(hostAddr, "5000"): true, // allowed by name

		"tcp " + net.JoinHostPort(hostAddr, "7000"):    false,
		"udp " + net.JoinHostPort(hostAddr, "7000"):    false,
		"tcp 10.213.0.1:7000":                          false, // the host's end of its link
		"tcp 10.213.1.1:7000":                          false, // of another machine's
		"tcp " + neighbour:                             false, // another machine
		"tcp 10.213.1.2:7001":                          false, // its inside
		"tcp " + net.JoinHostPort(planeAddr, "443"):    false,
		"udp " + net.JoinHostPort(planeAddr, "443"):    false,
		"tcp " + net.JoinHostPort(metadataAddr, "80"):  false,
		"tcp [fd00:1::1]:7000":                         false,
		"tcp " + net.JoinHostPort(hostAddr, "8080"):    false, // a port that the host publishes for a container
		"udp 198.51.100.255:7000":                      false,
		"tcp " + net.JoinHostPort(containerAddr, "80"): false, // it publishes nothing
		"udp " + net.JoinHostPort(containerAddr, "80"): false,
	}
}

// TestReach runs real buildkitd in a machine, beside a host that drops what it
// does not know, and asks both from a RUN step and from the machine itself.
func TestReach(t *testing.T) {
	for name, setup := range map[string][]string{
		"open host":         {},
		"FORWARD is DROP":   {"-P FORWARD DROP"},
		"dockerd's own":     {"-P FORWARD DROP", "-N DOCKER-USER", "-A DOCKER-USER -j RETURN", "-I FORWARD -j DOCKER-USER"},
		"INPUT is DROP too": {"-P FORWARD DROP", "-A INPUT -i lo -j ACCEPT", "-A INPUT -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT", "-P INPUT DROP"},
	} {
		t.Run(name, func(t *testing.T) {
			iptables(t, append(setup, "-t nat -A PREROUTING -d "+hostAddr+" -p tcp --dport 8080 -j DNAT --to-destination "+serverAddr+":80")...)
			r := newRig(t)
			r.config.Allow = allow(t, hostAddr+":5000")
			r.reopen(t)
			spec := specA()
			spec.Files = map[string][]byte{"buildkitd.toml": []byte(buildkitConfig)}
			r.launch(t, spec)
			relayed, err := echoes("unix", filepath.Join(r.config.Relay, "echo.sock"))
			must(t, err)
			defer func() { must(t, relayed.Close()) }()
			neighbour := r.launch(t, provider.MachineSpec{ID: machineB, Arch: "amd64", Volume: volumeB, WriterEpoch: 1})

			want := probes(t, neighbour.Address)
			var args []string
			for p := range want {
				args = append(args, strings.Fields(p)...)
			}
			const relay = "/run/depot/relay/echo.sock"
			fromMachine := answers(t, r.inside(t, machineA, append([]string{"probe", "unix", relay}, args...)...))
			if !fromMachine["unix "+relay] {
				t.Error("from the machine: the relay does not answer")
			}
			delete(fromMachine, "unix "+relay)
			if diff := cmp.Diff(want, fromMachine); diff != "" {
				t.Errorf("from the machine (-want +got):\n%s", diff)
			}
			// A socket's path is short.
			socket := filepath.Join(filepath.Dir(r.config.Run), "s")
			must(t, os.Symlink(filepath.Join(r.machineDir(machineA), stateDir, "buildkitd.sock"), socket))
			fromStep := output(t, filepath.Join(r.config.Binaries, "depot-agent"), append([]string{"solve", socket}, args...)...)
			if diff := cmp.Diff(want, answers(t, fromStep)); diff != "" {
				t.Errorf("from a RUN step (-want +got):\n%s", diff)
			}
			if t.Failed() {
				t.Logf("log:\n%s", contentsIfAny(r.records.log(machineA)))
			}
			must(t, r.Stop(t.Context(), machineA))
			if exit := r.exited(t, machineA); !exit.Clean {
				t.Errorf("exit: %+v", exit)
			}
			must(t, r.Destroy(t.Context(), machineA))
			must(t, r.Destroy(t.Context(), machineB))
			r.noTrace(t)
		})
	}
}

// iptables applies rules, and has them all gone after the test.
func iptables(t *testing.T, rules ...string) {
	t.Helper()
	t.Cleanup(func() {
		for _, args := range []string{"-P FORWARD ACCEPT", "-P INPUT ACCEPT", "-F", "-X", "-t nat -F"} {
			output(t, "iptables", strings.Fields(args)...)
		}
	})
	for _, args := range rules {
		output(t, "iptables", strings.Fields(args)...)
	}
}

func allow(t *testing.T, list ...string) []Allow {
	t.Helper()
	var all []Allow
	for _, s := range list {
		a, err := ParseAllow(s)
		must(t, err)
		all = append(all, a)
	}
	return all
}

func answers(t *testing.T, text string) map[string]bool {
	t.Helper()
	var got map[string]bool
	if err := json.Unmarshal([]byte(text), &got); err != nil {
		t.Fatalf("probe said %q: %v", text, err)
	}
	return got
}

// TestForwardingAfterCrash checks that what the agent turned on is turned off
// even if the agent that did so died before it could tell.
func TestForwardingAfterCrash(t *testing.T) {
	r := newRig(t)
	r.launch(t, specA())
	if got := contents(t, "/proc/sys/net/ipv4/conf/up0/forwarding"); got != "1\n" {
		t.Fatalf("forwarding on the uplink: %s", got)
	}
	must(t, r.lock.Close()) // as the death of the process would
	r.open(t)
	must(t, r.Destroy(t.Context(), machineA))
	r.noTrace(t)
}

func TestOpenRefuses(t *testing.T) {
	r := newRig(t)
	must(t, r.Close(t.Context()))
	for name, test := range map[string]struct {
		change func(c *Config)
		want   string
	}{
		"a network of the host's":     {func(c *Config) { c.Network = mustPrefix(t, "198.51.0.0/16") }, "overlaps with the host's route to 198.51.100.0/24 by up0"},
		"a network too small":         {func(c *Config) { c.Network = mustPrefix(t, "10.1.2.0/25") }, "from /8 to /24"},
		"no address":                  {func(c *Config) { c.Advertise = "" }, "advertised address"},
		"no ports":                    {func(c *Config) { c.FirstPort = 0 }, "port range"},
		"programs that are not there": {func(c *Config) { c.Binaries = t.TempDir() }, "build the programs into"},
		"no runc":                     {func(c *Config) { c.Runc = "/nowhere/runc" }, "install it"},
	} {
		t.Run(name, func(t *testing.T) {
			c := r.config
			test.change(&c)
			p, err := Open(t.Context(), c)
			if err == nil {
				must(t, p.Close(t.Context()))
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("got %v, want %q", err, test.want)
			}
		})
	}
	r.open(t)
}

func TestNoCapacity(t *testing.T) {
	specB := provider.MachineSpec{ID: machineB, Arch: "amd64", Volume: volumeB, WriterEpoch: 1}
	for name, test := range map[string]struct {
		change func(c *Config)
		want   string
	}{
		"no network": {func(c *Config) { c.Network = mustPrefix(t, "10.213.9.0/24") }, "all 1 networks"},
		"no port":    {func(c *Config) { c.LastPort = c.FirstPort }, "all ports from 40000 to 40000"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			test.change(&r.config)
			r.reopen(t)
			r.launch(t, specA())
			if _, err := r.Launch(t.Context(), specB); !errors.Is(err, provider.ErrNoCapacity) || !strings.Contains(err.Error(), test.want) {
				t.Errorf("a machine too many: %v", err)
			}
			if list, err := r.List(t.Context()); err != nil || len(list) != 1 {
				t.Errorf("it is listed: %+v, %v", list, err)
			}
			must(t, r.Destroy(t.Context(), machineA))
			r.launch(t, specB)
			must(t, r.Destroy(t.Context(), machineB))
		})
	}
}
