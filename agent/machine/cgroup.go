package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// agentGroup is the cgroup of the machine agent and buildkitd, with version
	// 2; providers look there for how a machine ended.
	agentGroup = "init"
	// stepsGroup is where buildkitd makes the cgroups of RUN steps.
	stepsGroup = "buildkit"
	// maxReserveBytes bounds the memory that RUN steps cannot take. buildkitd
	// needs some 100 MB, and more while it unpacks and compares layers.
	maxReserveBytes = 256 << 20
)

// divide readies the machine's cgroup for those of RUN steps, before buildkitd
// starts.
//
// In version 2 a cgroup hands its controllers on only if it holds no process
// itself, and PID 1 begins in the root of the machine's namespace. So all that
// runs there moves to a leaf, and the controllers are enabled for the rest.
//
// In both versions RUN steps together get a little less memory than the
// machine. One that takes too much meets its own bound first, and the kernel
// looks for a process to end among the steps; at the machine's bound it might
// choose buildkitd, and end all builds.
func divide(cgroup string) error {
	controllers, err := os.ReadFile(filepath.Join(cgroup, "cgroup.controllers")) //nolint:gosec // G304: a kernel's file
	switch {
	case errors.Is(err, fs.ErrNotExist):
		memory := filepath.Join(cgroup, "memory")
		limit := readNumber(filepath.Join(memory, "memory.limit_in_bytes"))
		if limit >= noLimit {
			limit = 0
		}
		return boundSteps(memory, "memory.limit_in_bytes", limit)
	case err != nil:
		return err
	}
	if err := moveAll(cgroup, filepath.Join(cgroup, agentGroup)); err != nil {
		return err
	}
	var errs []error
	for name := range strings.FieldsSeq(string(controllers)) {
		// One at a time: what one controller refuses must not cost the others.
		errs = append(errs, writeGroup(cgroup, "cgroup.subtree_control", "+"+name))
	}
	limit := readNumber(filepath.Join(cgroup, "memory.max")) // "max" reads as 0
	return errors.Join(append(errs, boundSteps(cgroup, "memory.max", limit))...)
}

// boundSteps gives RUN steps together what the reserve leaves of the machine's
// limit; nothing to do where there is none (0).
func boundSteps(memory, file string, limit int64) error {
	if limit <= 0 {
		return nil
	}
	steps := filepath.Join(memory, stepsGroup)
	if err := os.MkdirAll(steps, 0o755); err != nil { //nolint:gosec // G301: the mode of cgroups
		return err
	}
	return writeGroup(steps, file, strconv.FormatInt(limit-min(limit/8, maxReserveBytes), 10))
}

// moveAll moves every process of a cgroup to another, which it makes.
func moveAll(from, to string) error {
	if err := os.MkdirAll(to, 0o755); err != nil { //nolint:gosec // G301: the mode of cgroups
		return err
	}
	pids, err := os.ReadFile(filepath.Join(from, "cgroup.procs")) //nolint:gosec // G304: a kernel's file
	if err != nil {
		return err
	}
	for pid := range strings.FieldsSeq(string(pids)) {
		if err := writeGroup(to, "cgroup.procs", pid); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("move process %s: %w", pid, err)
		}
	}
	return nil
}

// writeGroup writes to a file of a cgroup's; the kernel takes one value a call.
func writeGroup(cgroup, file, value string) error {
	if err := os.WriteFile(filepath.Join(cgroup, file), []byte(value), 0o644); err != nil { //nolint:gosec // G306: the kernel made it
		return fmt.Errorf("write %s: %w", value, err)
	}
	return nil
}

// ownCgroup reports whether a process is at the root of its cgroup namespace in
// every hierarchy, given its /proc/self/cgroup, lines of "id:controllers:path".
// Where it is not, what it sees belongs to others too.
func ownCgroup(self string) bool {
	for line := range strings.Lines(self) {
		if fields := strings.SplitN(strings.TrimSpace(line), ":", 3); fields[len(fields)-1] != "/" {
			return false
		}
	}
	return self != ""
}

// prepareCgroup divides the machine's cgroup, if it has one. A host that does
// not let it still builds: the machine's limits are set from outside.
func (m *machine) prepareCgroup() {
	self, err := os.ReadFile("/proc/self/cgroup")
	if err == nil && (os.Getpid() != 1 || !ownCgroup(string(self))) {
		return
	}
	if err == nil {
		err = divide(m.config.Paths.Cgroup)
	}
	if err != nil {
		m.log.Warn("RUN steps cannot be accounted for, nor kept from taking buildkitd's memory", slog.Any("err", err))
	}
}

// outOfMemory reports whether the kernel ended the agent's or buildkitd's
// process for want of memory; not one of a RUN step, which is counted in a
// cgroup of its own.
func outOfMemory(cgroup string) bool {
	return readField(filepath.Join(cgroup, agentGroup, "memory.events.local"), "oom_kill") > 0 || // version 2
		readField(filepath.Join(cgroup, "memory", "memory.oom_control"), "oom_kill") > 0 // version 1
}
