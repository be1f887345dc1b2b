package local

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

const (
	// agentPath is a machine's PID 1, told to be one by its first argument.
	agentPath = "/usr/bin/depot-agent"
	// secretsBytes bounds the tmpfs with a machine's files: pages of it are the
	// machine's memory, but the room is the host's.
	secretsBytes = 16 << 20
	// pidsMax keeps a fork bomb in a RUN step from using up the host's numbers.
	pidsMax = 16384
	// cpuPeriodMicros is the kernel's default period of CPU limits.
	cpuPeriodMicros = 100_000
	// Descriptors that PID 1 finds open: 3 is the door, 4 the volume's lock.
	listenFDs = 2
)

// bundle is what varies from one machine's configuration to another's.
type bundle struct {
	id          string
	rootfs      string // absolute path
	cgroup      string // path below each hierarchy's root
	volume      string // the live tree
	dir         string // the machine's run directory
	relay       string // may be empty
	cpus        int
	memoryBytes int64
}

// The names below a machine's run directory.
const (
	secretsDir = "depot" // its /run/depot
	stateDir   = "depot/state"
)

// config is the OCI runtime configuration. What a machine needs beyond an
// ordinary container is what buildkitd needs to run containers of its own:
// mounts, network devices, cgroups. It gets nothing that loads modules, reaches
// hardware or sets the clock.
func (b bundle) config(h host) *specs.Spec {
	c := &specs.Spec{
		Version:  "1.0.2",
		Hostname: hostname(b.id),
		Root:     &specs.Root{Path: b.rootfs, Readonly: true},
		Process: &specs.Process{
			Args: []string{agentPath, "machine"},
			Cwd:  "/",
			Env: []string{
				"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
				"HOME=/root",
				"LISTEN_FDS=" + strconv.Itoa(listenFDs),
				"LISTEN_PID=1",
			},
			Capabilities: &specs.LinuxCapabilities{
				Bounding: h.capabilities, Effective: h.capabilities, Permitted: h.capabilities,
			},
			// RUN steps may run setuid programs, as they do elsewhere.
			NoNewPrivileges: false,
		},
		Mounts: b.mounts(),
		Linux: &specs.Linux{
			CgroupsPath: b.cgroup,
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace},
				{Type: specs.MountNamespace},
				{Type: specs.UTSNamespace},
				{Type: specs.IPCNamespace},
				{Type: specs.CgroupNamespace},
				{Type: specs.NetworkNamespace},
			},
			Sysctl: map[string]string{
				"net.ipv4.ip_forward":                 "1", // from RUN steps to the way out
				"net.ipv4.ping_group_range":           "0 2147483647",
				"net.ipv4.ip_unprivileged_port_start": "0",
			},
			Devices: []specs.LinuxDevice{device("/dev/fuse", 10, 229)},
			Resources: &specs.LinuxResources{
				Devices: allowDevices(),
				Pids:    &specs.LinuxPids{Limit: new(int64(pidsMax))},
			},
			MaskedPaths: []string{
				"/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/proc/sched_debug", "/proc/scsi", "/sys/firmware",
			},
			// All of /proc/sys but net, which the machine's own namespace has
			// and the CNI plugins set.
			ReadonlyPaths: []string{
				"/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sysrq-trigger",
				"/proc/sys/abi", "/proc/sys/debug", "/proc/sys/dev", "/proc/sys/fs", "/proc/sys/kernel", "/proc/sys/user", "/proc/sys/vm",
			},
		},
	}
	if exists("/proc/sys/net/ipv6") {
		c.Linux.Sysctl["net.ipv6.conf.all.disable_ipv6"] = "1"
		c.Linux.Sysctl["net.ipv6.conf.default.disable_ipv6"] = "1"
	}
	b.limit(c.Linux.Resources, h)
	return c
}

func (b bundle) limit(r *specs.LinuxResources, h host) {
	if b.cpus > 0 {
		r.CPU = &specs.LinuxCPU{Quota: new(int64(b.cpus) * cpuPeriodMicros), Period: new(uint64(cpuPeriodMicros))}
	}
	if b.memoryBytes > 0 {
		r.Memory = &specs.LinuxMemory{Limit: new(b.memoryBytes)}
		if h.cgroupV2 || h.swapLimits {
			r.Memory.Swap = new(b.memoryBytes) // memory and swap together: no swap
		}
	}
}

func (b bundle) mounts() []specs.Mount {
	tmpfs := func(path, mode, size string) specs.Mount {
		return specs.Mount{Destination: path, Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "nodev", "mode=" + mode, "size=" + size}}
	}
	bind := func(path, src string, options ...string) specs.Mount {
		return specs.Mount{Destination: path, Type: "bind", Source: src, Options: append([]string{"bind", "rprivate"}, options...)}
	}
	mounts := []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=64k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=64m"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev"}},
		tmpfs("/run", "755", "64m"),
		tmpfs("/tmp", "1777", "256m"),
		tmpfs("/root", "700", "16m"),
		tmpfs("/var/lib", "755", "16m"),
		bind("/var/lib/buildkit", b.volume),
		bind("/run/depot", filepath.Join(b.dir, secretsDir), "nosuid", "nodev", "noexec"),
		bind(resolvConf, filepath.Join(b.dir, "resolv.conf"), "ro"),
		bind(CNIConfig, filepath.Join(b.dir, "cni.conflist"), "ro"),
	}
	if b.relay != "" {
		mounts = append(mounts, bind("/run/depot/relay", b.relay, "ro", "nosuid", "nodev", "noexec"))
	}
	return mounts
}

// write puts the configuration where runc looks for it.
func (b bundle) write(h host) error {
	c, err := json.Marshal(b.config(h))
	if err != nil {
		return fmt.Errorf("bundle: %w", err)
	}
	return os.WriteFile(filepath.Join(b.dir, "config.json"), c, 0o600)
}

// writeSecrets mounts a machine's own tmpfs and fills it.
func writeSecrets(dir string, files map[string][]byte) error {
	root := filepath.Join(dir, secretsDir)
	if err := os.MkdirAll(root, 0o700); err != nil {
		return fmt.Errorf("machine's files: %w", err)
	}
	options := fmt.Sprintf("mode=700,size=%d,nr_inodes=1024", secretsBytes)
	if err := unix.Mount("depot", root, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, options); err != nil {
		return fmt.Errorf("machine's files: mount memory at %s: %w", root, err)
	}
	for _, sub := range []string{"relay", "state"} {
		if err := os.Mkdir(filepath.Join(root, sub), 0o700); err != nil {
			return fmt.Errorf("machine's files: %w", err)
		}
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(root, name), content, 0o600); err != nil {
			return fmt.Errorf("machine's files: %w", err)
		}
	}
	return nil
}

// hostname is the id in letters that host names may have.
func hostname(id string) string { return strings.ReplaceAll(id, "_", "-") }

func device(path string, major, minor int64) specs.LinuxDevice {
	return specs.LinuxDevice{Path: path, Type: "c", Major: major, Minor: minor, FileMode: new(os.FileMode(0o666))}
}

// allowDevices names the devices of a machine; runc makes all but fuse itself.
// RUN steps may make nodes of any kind (an image's layer may hold some), but
// not open them.
func allowDevices() []specs.LinuxDeviceCgroup {
	rules := []specs.LinuxDeviceCgroup{
		{Allow: false, Access: "rwm"},
		{Allow: true, Type: "c", Access: "m"},
		{Allow: true, Type: "b", Access: "m"},
		{Allow: true, Type: "c", Major: new(int64(136)), Access: "rwm"}, // pseudo-terminals
	}
	for _, n := range [][2]int64{{1, 3}, {1, 5}, {1, 7}, {1, 8}, {1, 9}, {5, 0}, {5, 1}, {5, 2}, {10, 229}} {
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: new(n[0]), Minor: new(n[1]), Access: "rwm"})
	}
	return rules
}
