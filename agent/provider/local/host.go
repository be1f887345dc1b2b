package local

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

// host is what decisions about a machine need to know of this host.
type host struct {
	cpus         int
	memoryBytes  int64
	capabilities []string // that this process may hand on
	cgroupV2     bool
	swapLimits   bool // v1 only: the kernel accounts for swap
}

// limits caps the size asked for by what the host has.
func (h host) limits(spec provider.MachineSpec) (cpus int, memoryBytes int64, warnings []string) {
	cpus, memoryBytes = spec.CPUs, spec.MemoryBytes
	if cpus > h.cpus {
		warnings = append(warnings, fmt.Sprintf("%d CPUs were asked for, the host has %d: the machine gets %d", cpus, h.cpus, h.cpus))
		cpus = h.cpus
	}
	if memoryBytes > h.memoryBytes {
		const mib = 1 << 20
		warnings = append(warnings, fmt.Sprintf("%d MiB of memory were asked for, the host has %d MiB: the machine gets that", memoryBytes/mib, h.memoryBytes/mib))
		memoryBytes = h.memoryBytes
	}
	return cpus, memoryBytes, warnings
}

// machineCapabilities is what a machine gets, as far as the host has it:
// containers of its own need most of these; RUN steps get fewer by far.
func machineCapabilities() []string {
	return []string{
		"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_IPC_LOCK", "CAP_IPC_OWNER",
		"CAP_KILL", "CAP_LEASE", "CAP_LINUX_IMMUTABLE", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_RAW",
		"CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SYS_NICE", "CAP_SYS_PTRACE",
		"CAP_SYS_RESOURCE", "CAP_SYS_TTY_CONFIG",
	}
}

// held leaves out what is not in the host's mask: sandboxes and nested hosts
// take CAP_SYS_RESOURCE away, and runc fails if it is to hand on what it does
// not have. The numbers are those of linux/capability.h.
func held(mask uint64) []string {
	const inOrder = "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE NET_BIND_SERVICE NET_BROADCAST " +
		"NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE " +
		"SYS_TIME SYS_TTY_CONFIG MKNOD LEASE AUDIT_WRITE AUDIT_CONTROL SETFCAP"
	numbers := strings.Fields(inOrder)
	return slices.DeleteFunc(machineCapabilities(), func(name string) bool {
		n := slices.Index(numbers, strings.TrimPrefix(name, "CAP_"))
		return n < 0 || mask&(1<<n) == 0
	})
}

// thisHost reads what the host has.
func thisHost() (host, error) {
	h := host{cpus: runtime.NumCPU()}
	meminfo, err := procValue("/proc/meminfo", "MemTotal:")
	if err != nil {
		return host{}, err
	}
	kib, err := strconv.ParseInt(meminfo, 10, 64)
	if err != nil {
		return host{}, fmt.Errorf("read the host's memory: %w", err)
	}
	h.memoryBytes = kib << 10
	bounding, err := procValue("/proc/self/status", "CapBnd:")
	if err != nil {
		return host{}, err
	}
	mask, err := strconv.ParseUint(bounding, 16, 64)
	if err != nil {
		return host{}, fmt.Errorf("read this process's capabilities: %w", err)
	}
	h.capabilities = held(mask)
	var fs unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &fs); err != nil {
		return host{}, fmt.Errorf("look at %s: %w", cgroupRoot, err)
	}
	h.cgroupV2 = fs.Type == unix.CGROUP2_SUPER_MAGIC
	h.swapLimits = exists(filepath.Join(cgroupRoot, "memory/memory.memsw.limit_in_bytes"))
	return h, nil
}

// procValue finds the first word after a key in a file of lines.
func procValue(path, key string) (value string, err error) {
	f, err := os.Open(path) //nolint:gosec // G304: a file of the kernel's
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 1 && fields[0] == key {
			return fields[1], nil
		}
	}
	return "", errors.Join(fmt.Errorf("%s has no %s", path, key), lines.Err())
}
