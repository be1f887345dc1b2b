package btrfs

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// attachLoop returns an open loop device over the file at path: the one that
// already has it, since two devices over one filesystem would destroy it, or a
// new one. A new one detaches itself at its last close (autoclear), so a
// process that dies before it mounts it leaves nothing, and neither does the
// unmount. directIO tells whether the device bypasses the page cache of the
// filesystem below, which else would hold everything twice.
func attachLoop(path string) (device *os.File, directIO bool, err error) {
	if device, err = findLoop(path); err != nil {
		return nil, false, err
	}
	if device == nil {
		if device, err = newLoop(path); err != nil {
			return nil, false, err
		}
	}
	info, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
	if err != nil {
		return nil, false, errors.Join(&os.PathError{Op: "loop status", Path: device.Name(), Err: err}, device.Close())
	}
	return device, info.Flags&unix.LO_FLAGS_DIRECT_IO != 0, nil
}

// findLoop returns the loop device that has the file at path, nil if none has.
func findLoop(path string) (*os.File, error) {
	var want unix.Stat_t
	if err := unix.Stat(path, &want); err != nil {
		return nil, &os.PathError{Op: "stat", Path: path, Err: err}
	}
	// Only attached devices have the loop directory.
	attached, err := filepath.Glob("/sys/block/loop*/loop")
	if err != nil {
		return nil, err
	}
	for _, sys := range attached {
		name := filepath.Join("/dev", filepath.Base(filepath.Dir(sys)))
		device, err := os.OpenFile(name, os.O_RDWR, 0) //nolint:gosec // G304: a device named by the kernel
		if err != nil {
			// Another's device, gone meanwhile or not shown in this /dev.
			continue
		}
		info, err := unix.IoctlLoopGetStatus64(int(device.Fd()))
		if err == nil && info.Device == want.Dev && info.Inode == want.Ino {
			return device, nil
		}
		if err := device.Close(); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func newLoop(path string) (*os.File, error) {
	backing, err := os.OpenFile(path, os.O_RDWR, 0) //nolint:gosec // G304: the store's own pool
	if err != nil {
		return nil, err
	}
	defer func() { _ = backing.Close() }()
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("this host has no loop devices (modprobe loop, or put the data directory on btrfs): %w", err)
	}
	defer func() { _ = control.Close() }()
	for {
		number, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		device, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", number), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = configureLoop(device, backing)
		if err == nil {
			return device, nil
		}
		if err = errors.Join(err, device.Close()); !errors.Is(err, unix.EBUSY) {
			return nil, &os.PathError{Op: "attach", Path: path, Err: err}
		}
		// Another process took this one between the two calls: ask again.
	}
}

// configureLoop attaches backing in one step. It needs Linux 5.8.
func configureLoop(device, backing *os.File) error {
	config := unix.LoopConfig{Fd: uint32(backing.Fd())} //nolint:gosec // G115: a descriptor's number is small
	// The filesystem's sector size: smaller blocks rule out direct I/O on
	// disks with 4 KiB sectors.
	config.Size = sectorBytes
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	copy(config.Info.File_name[:len(config.Info.File_name)-1], backing.Name())
	return unix.IoctlLoopConfigure(int(device.Fd()), &config)
}
