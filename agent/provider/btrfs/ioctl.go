package btrfs

import (
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The requests and structures of the kernel's include/uapi/linux/btrfs.h, in
// the encoding that amd64 and arm64 share.
const (
	iocSubvolCreate = 0x5000940e // _IOW(0x94, 14, volArgs)
	iocSnapDestroy  = 0x5000940f // _IOW(0x94, 15, volArgs)
	iocSnapCreateV2 = 0x50009417 // _IOW(0x94, 23, volArgsV2)
	iocSubvolInfo   = 0x81f8943c // _IOR(0x94, 60, subvolInfo)
	subvolReadOnly  = 1 << 1     // BTRFS_SUBVOL_RDONLY, in volArgsV2
	rootReadOnly    = 1 << 0     // BTRFS_ROOT_SUBVOL_RDONLY, in the answer of iocSubvolInfo
	subvolRootInode = 256        // BTRFS_FIRST_FREE_OBJECTID: every subvolume's root
)

// volArgs is btrfs_ioctl_vol_args; its descriptor is not used here.
type volArgs struct {
	_    int64
	name [4088]byte
}

// volArgsV2 is btrfs_ioctl_vol_args_v2.
type volArgsV2 struct {
	fd    int64
	_     uint64 // transaction
	flags uint64
	_     [4]uint64
	name  [4040]byte
}

// subvolInfo is btrfs_ioctl_get_subvol_info_args.
type subvolInfo struct {
	_          [264]byte // id and name
	_          [3]uint64 // parent, directory, generation
	flags      uint64
	_          [48]byte // uuids
	_          uint64   // last changed in
	originated uint64
	_          [2]uint64 // sent, received
	_          timespec  // last changed at
	madeAt     timespec
	_          [2]timespec // sent, received
	_          [8]uint64
}

type timespec struct {
	sec  int64
	nsec uint32
	_    uint32
}

// subvolume is what the filesystem knows of a subvolume.
type subvolume struct {
	readOnly bool
	// made is when it was created, by the wall clock; transaction orders
	// creations even when that clock jumped.
	made        time.Time
	transaction uint64
}

// ioctl makes one request of the filesystem under f; arg has the request's
// layout.
func ioctl[T any](f *os.File, request uintptr, arg *T) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(unsafe.Pointer(arg))) //nolint:gosec // G103: this is what an ioctl takes; arg outlives the call
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// createSubvolume makes an empty subvolume.
func createSubvolume(path string) error {
	var args volArgs
	copy(args.name[:len(args.name)-1], filepath.Base(path))
	return atParent("create subvolume", path, func(parent *os.File) error {
		return ioctl(parent, iocSubvolCreate, &args)
	})
}

// snapshot makes path an atomic snapshot of the subvolume source, including
// what its page cache holds. The transaction is on disk when it returns.
func snapshot(source, path string, readOnly bool) error {
	src, err := os.Open(source) //nolint:gosec // G304: the ids in the path were checked
	if err != nil {
		return err
	}
	defer func() { _ = src.Close() }()
	args := volArgsV2{fd: int64(src.Fd())} //nolint:gosec // G115: a descriptor's number is small
	if readOnly {
		args.flags = subvolReadOnly
	}
	copy(args.name[:len(args.name)-1], filepath.Base(path))
	return atParent("snapshot to", path, func(parent *os.File) error {
		return ioctl(parent, iocSnapCreateV2, &args)
	})
}

// destroySubvolume unlinks one subvolume at once; its space comes back in the
// background.
func destroySubvolume(path string) error {
	var args volArgs
	copy(args.name[:len(args.name)-1], filepath.Base(path))
	return atParent("destroy subvolume", path, func(parent *os.File) error {
		return ioctl(parent, iocSnapDestroy, &args)
	})
}

func atParent(op, path string, act func(parent *os.File) error) error {
	parent, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer func() { _ = parent.Close() }()
	if err := act(parent); err != nil {
		return &os.PathError{Op: op, Path: path, Err: err}
	}
	return nil
}

// inspectSubvolume tells what kind of subvolume path is. It needs Linux 4.18.
func inspectSubvolume(path string) (subvolume, error) {
	f, err := os.Open(path) //nolint:gosec // G304: the ids in the path were checked
	if err != nil {
		return subvolume{}, err
	}
	defer func() { _ = f.Close() }()
	var info subvolInfo
	if err := ioctl(f, iocSubvolInfo, &info); err != nil {
		return subvolume{}, &os.PathError{Op: "inspect subvolume", Path: path, Err: err}
	}
	return subvolume{
		readOnly:    info.flags&rootReadOnly != 0,
		made:        time.Unix(info.madeAt.sec, int64(info.madeAt.nsec)).UTC(),
		transaction: info.originated,
	}, nil
}

// isSubvolume reports whether path is the root of a subvolume.
func isSubvolume(path string) (bool, error) {
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return false, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return stat.Ino == subvolRootInode && stat.Mode&unix.S_IFMT == unix.S_IFDIR, nil
}
