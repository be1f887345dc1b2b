package local

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupRoot is where every distribution mounts the hierarchies: one for each
// controller with v1, a single one with v2.
//
// Machines have cgroups in a directory of the provider's own at the top, beside
// systemd's slices; docs/adr/0007 says why that is no quarrel with systemd.
const cgroupRoot = "/sys/fs/cgroup"

// agentGroup is the machine agent's leaf of a machine's cgroup with v2; see
// package machine, which moves there.
const agentGroup = "init"

// hierarchies are the directories below which a path of a cgroup may exist.
func hierarchies(root string) ([]string, error) {
	roots := []string{root}
	if exists(filepath.Join(root, "cgroup.controllers")) {
		return roots, nil // v2: what is below are cgroups, other people's
	}
	entries, err := os.ReadDir(root)
	if err != nil {
		return nil, fmt.Errorf("list cgroup hierarchies: %w", err)
	}
	for _, e := range entries {
		if e.IsDir() {
			roots = append(roots, filepath.Join(root, e.Name()))
		}
	}
	return roots, nil
}

// removeCgroup ends what runs in a cgroup, of whatever hierarchy, and removes it
// with all below it. No error if there is none.
func removeCgroup(ctx context.Context, path string) error {
	roots, err := hierarchies(cgroupRoot)
	if err != nil {
		return err
	}
	var errs []error
	for _, root := range roots {
		errs = append(errs, removeBelow(ctx, filepath.Join(root, path)))
	}
	return errors.Join(errs...)
}

// removeBelow removes directories from the leaves up; in a cgroup's, files go
// with the directory and cannot be removed.
func removeBelow(ctx context.Context, dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("remove cgroup: %w", err)
	}
	for _, d := range slices.Backward(dirs) {
		if err := endAll(ctx, d); err != nil {
			return fmt.Errorf("remove cgroup %s: %w", d, err)
		}
		if err := rmdir(ctx, d); err != nil {
			return fmt.Errorf("remove cgroup %s: %w", d, err)
		}
	}
	return nil
}

// endAll ends what a killed runc put into a cgroup and could not record. In the
// ordinary case nothing is there.
func endAll(ctx context.Context, dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs")) //nolint:gosec // G304: a file of the kernel's
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil // gone, or threaded: then its processes are listed further up
	}
	if err != nil {
		return err
	}
	for word := range strings.FieldsSeq(string(b)) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			return err
		}
		p, err := find(pid)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		if err := p.kill(ctx); err != nil {
			return err
		}
	}
	return nil
}

// rmdir removes one cgroup. For a moment after its last process ended, the
// kernel may still call it busy.
func rmdir(ctx context.Context, dir string) error {
	const patience = 2 * time.Second
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		err := unix.Rmdir(dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// outOfMemory reports whether the kernel ended the machine agent or buildkitd
// for want of memory; not a process of a RUN step, which has a cgroup of its own.
func outOfMemory(root, path string) bool {
	for _, file := range []string{
		filepath.Join(root, "memory", path, "memory.oom_control"),    // v1
		filepath.Join(root, path, agentGroup, "memory.events.local"), // v2
		filepath.Join(root, path, "memory.events.local"),             // v2, before it moved
	} {
		if n, err := procValue(file, "oom_kill"); err == nil && n != "0" {
			return true
		}
	}
	return false
}
