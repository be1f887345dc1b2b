package machine

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// noLimit is the smallest value that version 1 shows for "no memory limit"
// (the largest multiple of a page in 63 bits; pages are 64 kB at most).
const noLimit = 1<<63 - 1<<16

// sample reads the use of resources. The cgroup's files are read as seen in
// the machine's own cgroup namespace, in version 2 or 1; what is not there is
// reported as 0: a host without a controller is no reason to be silent about
// the rest.
func sample(p Paths, now time.Time) (*depotv1.Usage, error) {
	u := &depotv1.Usage{At: timestamppb.New(now)}
	var fs unix.Statfs_t
	if err := unix.Statfs(p.Root, &fs); err != nil {
		return nil, fmt.Errorf("measure %s: %w", p.Root, err)
	}
	size := fs.Frsize
	u.DiskUsedBytes = int64(fs.Blocks-fs.Bfree) * size //nolint:gosec // no disk has 2^63 bytes
	u.DiskFreeBytes = int64(fs.Bavail) * size          //nolint:gosec // as above
	if _, err := os.Stat(filepath.Join(p.Cgroup, "cgroup.controllers")); err == nil {
		u.CpuNanoseconds = 1000 * readField(filepath.Join(p.Cgroup, "cpu.stat"), "usage_usec")
		u.MemoryBytes = readNumber(filepath.Join(p.Cgroup, "memory.current"))
		u.MemoryLimitBytes = readNumber(filepath.Join(p.Cgroup, "memory.max")) // "max" reads as 0
		return u, nil
	}
	u.CpuNanoseconds = readNumber(filepath.Join(p.Cgroup, "cpuacct", "cpuacct.usage"))
	u.MemoryBytes = readNumber(filepath.Join(p.Cgroup, "memory", "memory.usage_in_bytes"))
	if limit := readNumber(filepath.Join(p.Cgroup, "memory", "memory.limit_in_bytes")); limit < noLimit {
		u.MemoryLimitBytes = limit
	}
	return u, nil
}

// readNumber returns the number that a file holds, or 0.
func readNumber(path string) int64 {
	data, err := os.ReadFile(path) //nolint:gosec // a kernel's file
	if err != nil {
		return 0
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// readField returns the number after key in a file of "key number" lines, or 0.
func readField(path, key string) int64 {
	data, err := os.ReadFile(path) //nolint:gosec // a kernel's file
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, key+" "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			if err != nil {
				return 0
			}
			return n
		}
	}
	return 0
}
