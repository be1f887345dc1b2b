package site

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Reboot does to the host what a sudden reboot does: all processes, mounts,
// loop devices, network devices, firewall rules and cgroups of the agent and
// its machines are gone, with the run directory, and the kernel has another
// boot id. What is on disk stays. The agent is started again and is ready when
// Reboot returns.
//
// The boot id is a file that is mounted over the kernel's, in a mount namespace
// that the agent has from then on.
func (h *Host) Reboot(tb TB) {
	tb.Helper()
	h.Agent.Kill(tb)
	for _, r := range h.records() {
		if r.alive() {
			_ = syscall.Kill(r.PID, syscall.SIGKILL)
		}
		Eventually(tb, "the machine's processes are gone", func() bool { return !r.alive() })
	}
	dir := filepath.Dir(h.StateDir)
	Eventually(tb, "the host's mounts are gone", func() bool {
		mounts := mountsBelow(dir)
		for _, m := range slices.Backward(mounts) {
			_ = syscall.Unmount(m, 0)
		}
		return len(mounts) == 0
	})
	for loop := range strings.Lines(run(tb, "losetup", "-n", "-O", "NAME", "-j", filepath.Join(h.StateDir, "volumes", "pool.btrfs"))) {
		_ = try("losetup", "-d", strings.TrimSpace(loop)) // it may detach itself
	}
	if err := os.RemoveAll(h.RunDir); err != nil {
		tb.Fatalf("empty the run directory: %v", err)
	}
	h.net.Run(tb, "nft", "flush", "ruleset")
	for _, c := range h.cgroups(tb) {
		removeCgroups(tb, c)
	}

	// What the agent mounts from its own namespace is seen from here.
	run(tb, "mount", "--bind", dir, dir)
	run(tb, "mount", "--make-shared", dir)
	h.shared = dir
	id := filepath.Join(h.site.Dir, "boot-id")
	if err := os.WriteFile(id, []byte("e2e00000-0000-4000-8000-"+hex.EncodeToString([]byte(time.Now().Format("150405")))+"\n"), 0o600); err != nil {
		tb.Fatalf("boot id: %v", err)
	}
	h.Agent.Args = append([]string{
		"unshare", "--mount", "--propagation", "unchanged", "sh", "-c",
		"mount --make-rprivate /proc && mount --bind " + id + " /proc/sys/kernel/random/boot_id && exec \"$@\"", "sh",
	}, h.Agent.Args...)
	h.Start(tb)
}

// mountsBelow lists mount points, parents first.
func mountsBelow(dir string) []string {
	b, _ := os.ReadFile("/proc/self/mountinfo")
	var out []string
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			out = append(out, fields[4])
		}
	}
	return out
}

// key is what the local provider's things on the host are named by.
func (h *Host) key(tb TB) string {
	tb.Helper()
	path, err := filepath.EvalSymlinks(filepath.Join(h.StateDir, "local"))
	if err != nil {
		tb.Fatalf("state directory: %v", err)
	}
	sum := sha256.Sum256([]byte(path))
	return hex.EncodeToString(sum[:3])
}

// cgroups are those of the host's machines, in all hierarchies.
func (h *Host) cgroups(tb TB) []string {
	tb.Helper()
	var out []string
	for _, root := range []string{"/sys/fs/cgroup/", "/sys/fs/cgroup/*/"} {
		found, err := filepath.Glob(root + "depot_" + h.key(tb))
		if err != nil {
			tb.Fatalf("look at cgroups: %v", err)
		}
		out = append(out, found...)
	}
	return out
}

func removeCgroups(tb TB, dir string) {
	tb.Helper()
	Eventually(tb, "cgroup "+dir+" is gone", func() bool {
		entries, err := os.ReadDir(dir)
		for _, e := range entries {
			if e.IsDir() {
				removeCgroups(tb, filepath.Join(dir, e.Name()))
			}
		}
		return err != nil || syscall.Rmdir(dir) == nil
	})
}

// Strays lists what is on the host that belongs to none of the machines named:
// cgroups, mounts, files of the run directory, and network devices, of which a
// machine has one.
func (h *Host) Strays(tb TB, machines []string) []string {
	tb.Helper()
	var out []string
	stray := func(what, dir string) {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return // gone meanwhile
		}
		for _, e := range entries {
			if e.IsDir() && !slices.Contains(machines, e.Name()) {
				out = append(out, what+" "+filepath.Join(dir, e.Name()))
			}
		}
	}
	for _, c := range h.cgroups(tb) {
		stray("cgroup", c)
	}
	for _, name := range []string{"machines", "runc"} {
		stray("directory", filepath.Join(h.RunDir, "local", name))
	}
	for _, m := range mountsBelow(filepath.Join(h.RunDir, "local", "machines")) {
		if !slices.ContainsFunc(machines, func(id string) bool { return strings.Contains(m, id) }) {
			out = append(out, "mount "+m)
		}
	}
	if n := strings.Count(h.net.IP(tb, "-o", "link"), ": dp"+h.key(tb)+"-"); n > len(machines) {
		out = append(out, strconv.Itoa(n)+" network devices")
	}
	return out
}

// checkLeft fails the test if anything of the host's machines is left that does
// not belong to a process or a mount: those are looked for at the end. An agent
// that ended in order, without machines, has removed all of it.
func (h *Host) checkLeft(tb TB) {
	tb.Helper()
	key := h.key(tb)
	for _, c := range h.cgroups(tb) {
		tb.Errorf("left behind: cgroup %s", c)
	}
	for line := range strings.Lines(h.net.IP(tb, "-o", "link")) {
		if strings.Contains(line, "dp"+key+"-") {
			tb.Errorf("left behind: network device %s", line)
		}
	}
	// The rules of iptables are among those of nft.
	for line := range strings.Lines(h.net.Run(tb, "nft", "list", "ruleset")) {
		if strings.Contains(line, "depot_"+key) || strings.Contains(line, "dp"+key+"-") {
			tb.Errorf("left behind: firewall rule %s", line)
		}
	}
	for _, name := range []string{"machines", "runc"} {
		if below, _ := os.ReadDir(filepath.Join(h.RunDir, "local", name)); len(below) > 0 {
			tb.Errorf("left behind: %s in %s of the run directory", below[0].Name(), name)
		}
	}
}

// WaitEpoch waits until the agent obeys the control plane in that epoch.
func (h *Host) WaitEpoch(tb TB, epoch uint64) {
	tb.Helper()
	Eventually(tb, "the agent obeys the newest epoch", func() bool {
		var known struct {
			Epoch uint64 `json:"epoch"`
		}
		b, err := os.ReadFile(filepath.Join(h.StateDir, "controlplane.json"))
		return err == nil && json.Unmarshal(b, &known) == nil && known.Epoch >= epoch
	})
}
