package btrfs

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// writeJSON replaces path by value's JSON, whole or not at all, and returns
// when that survives a power cut.
func writeJSON(path string, value any) (err error) {
	data, err := json.Marshal(value)
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	next := path + ".next"
	f, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600) //nolint:gosec // G304: the id in the path was checked
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := os.Rename(next, path); err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func readJSON(path string, value any) error {
	data, err := os.ReadFile(path) //nolint:gosec // G304: the id in the path was checked
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, value); err != nil {
		return fmt.Errorf("%s is damaged: %w", path, err)
	}
	return nil
}

func syncDir(path string) error {
	dir, err := os.Open(path) //nolint:gosec // G304: a directory of the store's own
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// removeTree removes path and all subvolumes in it. A build step may have made
// subvolumes of its own inside a live tree (that takes no privilege), and the
// kernel refuses to drop one that holds another: those go first.
func removeTree(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return os.Remove(path)
	}
	sub, err := isSubvolume(path)
	if err != nil {
		return err
	}
	if !sub {
		entries, err := os.ReadDir(path)
		if err != nil {
			return err
		}
		for _, entry := range entries {
			if err := removeTree(filepath.Join(path, entry.Name())); err != nil {
				return err
			}
		}
		return os.Remove(path)
	}
	err = destroySubvolume(path)
	if !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	if err := removeNested(path); err != nil {
		return err
	}
	return destroySubvolume(path)
}

// removeNested removes the subvolumes inside the subvolume root. It follows no
// symbolic link and keeps ordinary files, which go with root itself.
func removeNested(root string) error {
	return filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() || path == root {
			return err
		}
		sub, err := isSubvolume(path)
		if err != nil || !sub {
			return err
		}
		if err := removeTree(path); err != nil {
			return err
		}
		return fs.SkipDir
	})
}

// lockFile waits for the exclusive lock of path, which ends with its process.
// It is for short sections only: holders make bounded system calls.
func lockFile(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600) //nolint:gosec // G304: a file of the store's own
	if err != nil {
		return nil, err
	}
	for {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(&os.PathError{Op: "lock", Path: path, Err: err}, f.Close())
		}
	}
}
