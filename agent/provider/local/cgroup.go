package local

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// cgroupRoot is where every distribution mounts the hierarchies: one for each
// controller with v1, a single one with v2.
const cgroupRoot = "/sys/fs/cgroup"

// hierarchies are the directories below which a path of a cgroup may exist.
func hierarchies() ([]string, error) {
	entries, err := os.ReadDir(cgroupRoot)
	if err != nil {
		return nil, fmt.Errorf("list cgroup hierarchies: %w", err)
	}
	roots := []string{cgroupRoot}
	for _, e := range entries {
		if e.IsDir() {
			roots = append(roots, filepath.Join(cgroupRoot, e.Name()))
		}
	}
	return roots, nil
}

// removeCgroup removes a cgroup of all hierarchies with all below it, which
// nothing may run in. No error if there is none.
func removeCgroup(path string) error {
	roots, err := hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, root := range roots {
		errs = append(errs, removeDirs(filepath.Join(root, path)))
	}
	return errors.Join(errs...)
}

// removeDirs removes directories from the leaves up; in a cgroup's, files go
// with the directory and cannot be removed.
func removeDirs(dir string) error {
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
	var errs []error
	for _, d := range slices.Backward(dirs) {
		if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
			errs = append(errs, fmt.Errorf("remove cgroup %s: %w", d, err))
		}
	}
	return errors.Join(errs...)
}

// outOfMemory reports whether the kernel ended a process of the cgroup itself
// for want of memory; not one of a RUN step, which has a cgroup of its own.
func outOfMemory(path string) bool {
	for _, file := range []string{
		filepath.Join(cgroupRoot, "memory", path, "memory.oom_control"), // v1
		filepath.Join(cgroupRoot, path, "memory.events.local"),          // v2
	} {
		if n, err := procValue(file, "oom_kill"); err == nil && n != "0" {
			return true
		}
	}
	return false
}
