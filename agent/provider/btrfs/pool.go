package btrfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

const (
	sectorBytes = 4096
	// minPoolBytes is what mkfs.btrfs and one small build need.
	minPoolBytes = 256 << 20
	// belowReserve is the part of the free space below that a pool never
	// claims: one in belowReserve.
	belowReserve = 10
)

// pool is the btrfs filesystem under a store: the data directory itself or a
// loop-mounted file in it.
type pool struct {
	dir      string // the data directory
	path     string // where the store's trees are
	file     string // the loop's backing file; empty on a btrfs data directory
	warnings []string
}

// openPool finds, makes or mounts the pool. The caller holds the data
// directory's lock.
func openPool(ctx context.Context, dir string, wantBytes int64) (pool, error) {
	p := pool{dir: dir, path: dir}
	direct, err := onBtrfs(dir)
	if err != nil || direct {
		return p, err
	}
	if err := haveBtrfs(ctx); err != nil {
		return p, err
	}
	p.path, p.file = filepath.Join(dir, "pool"), filepath.Join(dir, "pool.btrfs")
	if err := os.MkdirAll(p.path, 0o700); err != nil {
		return p, err
	}
	if mounted, err := onBtrfs(p.path); err != nil || mounted {
		return p, err
	}
	if err := p.format(ctx, wantBytes); err != nil {
		return p, err
	}
	return p, p.mount()
}

// haveBtrfs makes sure that the kernel knows btrfs.
func haveBtrfs(ctx context.Context) error {
	for range 2 {
		known, err := os.ReadFile("/proc/filesystems")
		if err != nil {
			return err
		}
		if bytes.Contains(known, []byte("\tbtrfs\n")) {
			return nil
		}
		// Its answer is read from /proc: a built-in module makes modprobe fail.
		_ = exec.CommandContext(ctx, "modprobe", "btrfs").Run()
	}
	return fmt.Errorf("%w: this kernel has no btrfs: install the kernel package that carries its module "+
		"(on Debian and Ubuntu linux-image-<flavour>, not a cloud or container kernel), then start the agent again", provider.ErrUnusable)
}

// format makes the backing file if there is none. It gets its name only when
// it is whole and on disk: a half-made one is made again.
func (p *pool) format(ctx context.Context, wantBytes int64) error {
	if _, err := os.Stat(p.file); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	// The name is new each time: the mkfs of a process that was killed may still
	// run, and opens its file by name.
	pattern := filepath.Base(p.file) + ".new-*"
	halves, err := filepath.Glob(filepath.Join(p.dir, pattern))
	for _, half := range halves {
		err = errors.Join(err, os.Remove(half))
	}
	if err != nil {
		return err
	}
	below, err := statfs(p.dir)
	if err != nil {
		return err
	}
	size, warning, err := poolSize(wantBytes, below.free)
	if err != nil {
		return fmt.Errorf("make a pool in %s: %w", p.dir, err)
	}
	if warning != "" {
		p.warnings = append(p.warnings, warning)
	}
	f, err := os.CreateTemp(p.dir, pattern)
	if err != nil {
		return err
	}
	half := f.Name()
	defer func() { _ = f.Close() }()
	if err := f.Truncate(size); err != nil {
		return err
	}
	// Metadata once, not twice: both copies would sit on the same disk below.
	mkfs := exec.CommandContext(ctx, "mkfs.btrfs", "--quiet", "--metadata", "single", "--data", "single", half) //nolint:gosec // G204: no shell, our own path
	out, err := mkfs.CombinedOutput()
	switch {
	case errors.Is(err, exec.ErrNotFound):
		return fmt.Errorf("%w: mkfs.btrfs is missing: install btrfs-progs, or put the data directory %s on a btrfs filesystem", provider.ErrUnusable, p.dir)
	case err != nil:
		return fmt.Errorf("mkfs.btrfs %s: %w: %s", half, err, bytes.TrimSpace(out))
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(half, p.file); err != nil {
		return err
	}
	return syncDir(p.dir)
}

// poolSize says how large the sparse file may be, in bytes, given the free
// bytes below it, and warns if that is less than was wanted.
func poolSize(want, free int64) (size int64, warning string, err error) {
	most := (free - free/belowReserve) / sectorBytes * sectorBytes
	if most < minPoolBytes {
		return 0, "", fmt.Errorf("%w: %d MiB are free and a pool needs %d MiB: free some space or choose another data directory",
			provider.ErrNoCapacity, free>>20, int64(minPoolBytes*belowReserve/(belowReserve-1))>>20)
	}
	switch {
	case want == 0:
		return most, "", nil
	case want < minPoolBytes:
		return 0, "", fmt.Errorf("%w: a pool of %d MiB is too small: give it %d MiB or more", provider.ErrUnusable, want>>20, minPoolBytes>>20)
	case want > most:
		return most, fmt.Sprintf("the cache pool was made with %d MiB instead of %d MiB: the disk below has %d MiB free", most>>20, want>>20, free>>20), nil
	}
	return want / sectorBytes * sectorBytes, "", nil
}

func (p *pool) mount() error {
	device, directIO, err := attachLoop(p.file)
	if err != nil {
		return err
	}
	// Closed only once it is mounted: the last close detaches it.
	defer func() { _ = device.Close() }()
	if !directIO {
		p.warnings = append(p.warnings, fmt.Sprintf("the cache pool %s has no direct I/O: it uses more memory and is slower; "+
			"put the data directory on ext4, XFS or btrfs", p.file))
	}
	// discard gives freed blocks back to the disk below, else the sparse file
	// only ever grows.
	const flags = unix.MS_NOATIME
	err = unix.Mount(device.Name(), p.path, "btrfs", flags, "discard=async")
	if errors.Is(err, unix.EINVAL) { // before Linux 5.6
		err = unix.Mount(device.Name(), p.path, "btrfs", flags, "discard")
	}
	if err != nil {
		return fmt.Errorf("mount %s on %s: %w", p.file, p.path, err)
	}
	if err := unix.Mount("", p.path, "", unix.MS_PRIVATE, ""); err != nil {
		return errors.Join(fmt.Errorf("make %s private: %w", p.path, err), unix.Unmount(p.path, 0))
	}
	return nil
}

// unmount takes the pool out of the system. The caller holds the data
// directory's lock.
func (p *pool) unmount() error {
	if p.file == "" {
		return nil
	}
	mounted, err := onBtrfs(p.path)
	if err != nil || !mounted {
		return err
	}
	if err := unix.Unmount(p.path, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", p.path, err)
	}
	return p.awaitDetached()
}

// awaitDetached returns when no loop device has the pool's file. The device
// detaches when its last user goes, which may be a prober (udev) that opened
// it, or a container that is being started and still has a copy of this host's
// mounts: both go by themselves.
func (p *pool) awaitDetached() error {
	const attempts, pause = 500, 20 * time.Millisecond
	for range attempts {
		device, err := findLoop(p.file)
		if err != nil || device == nil {
			return err
		}
		if err := device.Close(); err != nil {
			return err
		}
		<-time.After(pause)
	}
	return fmt.Errorf("%s is unmounted but its loop device stays: another mount namespace still has it mounted (findmnt --task <pid>); it detaches when that ends", p.file)
}

// space is what a filesystem can hold, in bytes.
type space struct {
	size, used, free int64
}

func statfs(path string) (space, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return space{}, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	block := s.Bsize
	return space{
		size: int64(s.Blocks) * block,         //nolint:gosec // G115: no disk has 2^63 bytes
		used: int64(s.Blocks-s.Bfree) * block, //nolint:gosec // G115: no disk has 2^63 bytes
		free: int64(s.Bavail) * block,         //nolint:gosec // G115: no disk has 2^63 bytes
	}, nil
}

func onBtrfs(path string) (bool, error) {
	var s unix.Statfs_t
	if err := unix.Statfs(path, &s); err != nil {
		return false, &os.PathError{Op: "statfs", Path: path, Err: err}
	}
	return s.Type == unix.BTRFS_SUPER_MAGIC, nil
}
