package local

import (
	"errors"
	"fmt"
	"net/netip"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/opendepot/depot/agent/provider"
)

func mustPrefix(t *testing.T, s string) netip.Prefix {
	t.Helper()
	p, err := netip.ParsePrefix(s)
	must(t, err)
	return p
}

func TestParseAllow(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.7":          "192.0.2.7/32 0",
		"192.0.2.7:5000":     "192.0.2.7/32 5000",
		"192.0.2.7/24":       "192.0.2.0/24 0",
		"192.0.2.0/24:443":   "192.0.2.0/24 443",
		"":                   "",
		"registry:5000":      "",
		"192.0.2.7:0":        "",
		"192.0.2.7:70000":    "",
		"127.0.0.1:5000":     "",
		"[fd00::1]:5000":     "",
		"fd00::1":            "",
		"192.0.2.7:5000; ip": "",
	} {
		t.Run(in, func(t *testing.T) {
			a, err := ParseAllow(in)
			got := ""
			if err == nil {
				got = fmt.Sprint(a.Prefix, a.Port)
			}
			if got != want {
				t.Errorf("got %q, %v, want %q", got, err, want)
			}
		})
	}
}

func TestReachableNameservers(t *testing.T) {
	local := []netip.Addr{netip.MustParseAddr("192.0.2.2")}
	for name, test := range map[string]struct {
		conf  string
		allow []Allow
		want  string
		why   []string
	}{
		"upstream":          {"search x\nnameserver 10.0.0.2\nnameserver 1.1.1.1\n", nil, "[10.0.0.2 1.1.1.1]", nil},
		"stub":              {"nameserver 127.0.0.53\n", nil, "[]", []string{"127.0.0.53 is the host's loopback"}},
		"the host itself":   {"nameserver 192.0.2.2\n", nil, "[]", []string{"192.0.2.2 is this host"}},
		"the host, allowed": {"nameserver 192.0.2.2\n", allow(t, "192.0.2.2:53"), "[192.0.2.2]", nil},
		"link-local":        {"nameserver 169.254.169.254\n", nil, "[]", []string{"169.254.169.254 is link-local"}},
		"another port":      {"nameserver 192.0.2.2\n", allow(t, "192.0.2.2:5000"), "[]", []string{"192.0.2.2 is this host"}},
		"IPv6":              {"nameserver fd00::53\n", nil, "[]", []string{"fd00::53 is not IPv4"}},
		"nothing":           {"# nameserver 1.1.1.1\nnameserver\n", nil, "[]", nil},
	} {
		t.Run(name, func(t *testing.T) {
			servers, why := reachable([]byte(test.conf), local, test.allow)
			if got := fmt.Sprint(servers); got != test.want {
				t.Errorf("got %s, want %s", got, test.want)
			}
			if diff := cmp.Diff(test.why, why); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestLimits(t *testing.T) {
	h := host{cpus: 4, memoryBytes: 8 << 30}
	for name, test := range map[string]struct {
		spec     provider.MachineSpec
		cpus     int
		memory   int64
		warnings int
	}{
		"none":         {provider.MachineSpec{}, 0, 0, 0},
		"fits":         {provider.MachineSpec{CPUs: 4, MemoryBytes: 8 << 30}, 4, 8 << 30, 0},
		"both too big": {provider.MachineSpec{CPUs: 5, MemoryBytes: 9 << 30}, 4, 8 << 30, 2},
	} {
		t.Run(name, func(t *testing.T) {
			cpus, memory, warnings := h.limits(test.spec)
			if cpus != test.cpus || memory != test.memory || len(warnings) != test.warnings {
				t.Errorf("got %d CPUs, %d bytes, %v", cpus, memory, warnings)
			}
		})
	}
}

func TestSubnets(t *testing.T) {
	network := mustPrefix(t, "10.213.0.0/16")
	if n := slots(network); n != 256 {
		t.Errorf("room for %d machines, want 256", n)
	}
	s := subnetOf(network, 255)
	got := fmt.Sprint(s.prefix, s.host(), s.machine(), s.steps())
	if want := "10.213.255.0/24 10.213.255.1 10.213.255.2 10.213.255.128/25"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if s := subnetOf(mustPrefix(t, "10.0.0.0/8"), 256); s.prefix.String() != "10.1.0.0/24" {
		t.Errorf("slot 256 of a /8: %s", s.prefix)
	}
}

func TestFreeSlot(t *testing.T) {
	for name, test := range map[string]struct {
		taken []int
		limit int
		want  int
		ok    bool
	}{
		"first": {nil, 2, 0, true},
		"gap":   {[]int{0, 2}, 4, 1, true},
		"full":  {[]int{1, 0}, 2, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			var recs []record
			for _, slot := range test.taken {
				recs = append(recs, record{Slot: slot})
			}
			if got, ok := freeSlot(recs, test.limit); got != test.want || ok != test.ok {
				t.Errorf("got %d, %v", got, ok)
			}
		})
	}
}

// Overlapping intervals in one set would make nft refuse the whole table.
func TestClosedDoNotOverlap(t *testing.T) {
	f := firewall{network: mustPrefix(t, "10.213.0.0/16"), deny: []netip.Prefix{
		mustPrefix(t, "10.213.7.0/24"), mustPrefix(t, "10.0.0.0/8"), mustPrefix(t, "192.0.2.1/32"), mustPrefix(t, "192.0.2.1/32"), mustPrefix(t, "fd00::/8"),
	}}
	got := f.closed()
	for i, p := range got {
		if slices.ContainsFunc(got[i+1:], p.Overlaps) {
			t.Errorf("%s overlaps in %v", p, got)
		}
	}
	for _, addr := range []string{"10.213.1.1", "10.1.1.1", "192.0.2.1", "169.254.169.254", "224.0.0.1", "255.255.255.255"} {
		if !slices.ContainsFunc(got, func(p netip.Prefix) bool { return p.Contains(netip.MustParseAddr(addr)) }) {
			t.Errorf("%s is open: %v", addr, got)
		}
	}
}

func TestHeldCapabilities(t *testing.T) {
	const all, resource = 1<<32 - 1, 1 << 24
	if got := held(all); !slices.Equal(got, machineCapabilities()) {
		t.Errorf("of all: %v", got)
	}
	if got := held(all &^ resource); slices.Contains(got, "CAP_SYS_RESOURCE") || len(got) != len(machineCapabilities())-1 {
		t.Errorf("without CAP_SYS_RESOURCE: %v", got)
	}
}

// The closure is held against what the dynamic loader itself says.
func TestClosure(t *testing.T) {
	for _, name := range []string{"git", "ssh", "sh"} {
		t.Run(name, func(t *testing.T) {
			path, err := exec.LookPath(name)
			must(t, err)
			var want []string
			for line := range strings.Lines(output(t, "ldd", path)) {
				for word := range strings.FieldsSeq(line) {
					if strings.HasPrefix(word, "/") {
						want = append(want, filepath.Base(word))
					}
				}
			}
			found, err := hostLoader().closure(path)
			must(t, err)
			var got []string
			for _, p := range found {
				got = append(got, filepath.Base(p))
			}
			slices.Sort(got)
			slices.Sort(want)
			if diff := cmp.Diff(slices.Compact(want), slices.Compact(got), cmpopts.EquateEmpty()); diff != "" {
				t.Errorf("(-ldd +got):\n%s", diff)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	for name, change := range map[string]func(s *provider.MachineSpec){
		"machine's id":   func(s *provider.MachineSpec) { s.ID = "../x" },
		"volume's id":    func(s *provider.MachineSpec) { s.Volume = "volume_1" },
		"architecture":   func(s *provider.MachineSpec) { s.Arch = "riscv64" },
		"size":           func(s *provider.MachineSpec) { s.CPUs = -1 },
		"file elsewhere": func(s *provider.MachineSpec) { s.Files = map[string][]byte{"../x": nil} },
		"file in state":  func(s *provider.MachineSpec) { s.Files = map[string][]byte{"state": nil} },
		"file below":     func(s *provider.MachineSpec) { s.Files = map[string][]byte{"state/exit.json": nil} },
	} {
		t.Run(name, func(t *testing.T) {
			s := specA()
			change(&s)
			if err := validate(s); !errors.Is(err, provider.ErrUnusable) {
				t.Errorf("got %v", err)
			}
		})
	}
	must(t, validate(specA()))
}
