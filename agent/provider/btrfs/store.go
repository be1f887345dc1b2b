// Package btrfs keeps volumes as btrfs subvolumes, so that a generation or a
// clone of gigabytes takes milliseconds and no space.
//
// Where the data directory is on btrfs, the trees lie directly in it. Elsewhere
// the store makes a sparse file, pool.btrfs, on first use and mounts it at
// pool/ through a loop device; after a reboot it is mounted again. Either way:
//
//	volumes/<id>/live                the tree that a machine writes (subvolume)
//	volumes/<id>/generations/<id>    committed generations (read-only snapshots)
//	volumes/<id>/volume.json         labels
//	volumes/<id>/writer.json         the highest writer epoch and its machine
//	volumes/<id>/lock                held for as long as a machine writes
//	scratch/                         what is being made or removed
//
// Invariants:
//
//   - one-writer: [Store.Open] locks the volume and records the writer epoch
//     durably before anybody may write. The lock belongs to an open file
//     description (fcntl F_OFD_SETLK), which the machine's PID 1 inherits: it
//     ends with the machine, not with the agent, and can be looked at without
//     being taken.
//   - A volume and a generation exist whole or not at all, under kill -9 and
//     power cuts: trees are made in scratch/ and renamed, snapshots are one
//     transaction. What an interrupted call left in scratch/ is removed by the
//     next one.
//   - Storage is the truth: nothing is remembered between calls.
package btrfs

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

// Config says where a store keeps its volumes.
type Config struct {
	// Dir is the data directory, absolute. It is made if it is missing, for
	// root only.
	Dir string
	// PoolBytes is the size of the sparse pool file, made only if Dir is not on
	// btrfs. 0 means nine tenths of what is free below it; more than that is
	// cut to it, with a warning. It does not resize a pool that exists.
	PoolBytes int64
	// Logger receives state changes; nil means none.
	Logger *slog.Logger
}

// Store keeps volumes. It is safe for concurrent use, also by several
// processes.
type Store struct {
	log  *slog.Logger
	pool pool
	// root keeps the pool mounted as long as any store uses it.
	root *os.File
	ids  *regexp.Regexp
}

var _ provider.VolumeStore = (*Store)(nil)

// Open makes or mounts the pool as needed. provider.ErrUnusable means that
// this host cannot have one, provider.ErrNoCapacity that its disk is too full;
// the message says what to do.
func Open(ctx context.Context, config Config) (*Store, error) {
	if !filepath.IsAbs(config.Dir) {
		return nil, fmt.Errorf("%w: volume directory %q: give an absolute path", provider.ErrUnusable, config.Dir)
	}
	s := &Store{log: config.Logger, ids: regexp.MustCompile(`^[a-z]{1,16}_[0-9a-f]{32}$`)}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if err := os.MkdirAll(config.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open volume store: %w", err)
	}
	dir, err := filepath.EvalSymlinks(config.Dir)
	if err != nil {
		return nil, fmt.Errorf("open volume store: %w", err)
	}
	lock, err := lockFile(filepath.Join(dir, "pool.lock"))
	if err != nil {
		return nil, fmt.Errorf("open volume store: %w", err)
	}
	defer func() { _ = lock.Close() }()
	if s.pool, err = openPool(ctx, dir, config.PoolBytes); err != nil {
		return nil, fmt.Errorf("open volume store in %s: %w", dir, err)
	}
	for _, name := range []string{"volumes", "scratch"} {
		if err := os.MkdirAll(filepath.Join(s.pool.path, name), 0o700); err != nil {
			return nil, fmt.Errorf("open volume store: %w", err)
		}
	}
	if s.root, err = os.Open(s.pool.path); err != nil {
		return nil, fmt.Errorf("open volume store: %w", err)
	}
	for _, warning := range s.Warnings() {
		s.log.WarnContext(ctx, "volume pool", "warning", warning)
	}
	return s, nil
}

// Close gives the pool up: it unmounts it and frees its loop device. While a
// machine writes a volume or another store uses the pool, it stays mounted and
// Close returns provider.ErrVolumeBusy; the store is closed all the same.
func (s *Store) Close() error {
	lock, err := lockFile(filepath.Join(s.pool.dir, "pool.lock"))
	if err != nil {
		return fmt.Errorf("close volume store: %w", err)
	}
	defer func() { _ = lock.Close() }()
	var busy []string
	ids, err := s.volumeIDs()
	for _, id := range ids {
		held, probeErr := lockHeld(s.path(id, "lock"))
		if !errors.Is(probeErr, fs.ErrNotExist) { // else deleted meanwhile
			err = errors.Join(err, probeErr)
		}
		if held {
			busy = append(busy, id)
		}
	}
	if err = errors.Join(err, closeUnforked(s.root)); err != nil {
		return fmt.Errorf("close volume store: %w", err)
	}
	if len(busy) > 0 && s.pool.file != "" {
		return fmt.Errorf("%w: pool %s stays mounted for %s", provider.ErrVolumeBusy, s.pool.path, strings.Join(busy, ", "))
	}
	err = s.pool.unmount()
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%w: %w", provider.ErrVolumeBusy, err)
	}
	return err
}

// Usage is what the store holds, in bytes.
type Usage struct {
	// Size and Used are the pool's.
	Size, Used int64
	// Free is what can still be written: the pool's free space, or less where
	// the disk below a sparse pool has less.
	Free int64
	// Sparse tells that the pool is a sparse file; BelowFree is then the free
	// space of the disk below it.
	Sparse    bool
	BelowFree int64
}

// Usage measures the pool and the disk below it. Space of deleted generations
// comes back within seconds, not at once.
func (s *Store) Usage(ctx context.Context) (Usage, error) {
	if err := ctx.Err(); err != nil {
		return Usage{}, err
	}
	in, err := statfs(s.pool.path)
	if err != nil {
		return Usage{}, fmt.Errorf("measure volume store: %w", err)
	}
	u := Usage{Size: in.size, Used: in.used, Free: in.free}
	if s.pool.file == "" {
		return u, nil
	}
	below, err := statfs(s.pool.dir)
	if err != nil {
		return Usage{}, fmt.Errorf("measure the disk below the volume store: %w", err)
	}
	u.Sparse, u.BelowFree = true, below.free
	u.Free = min(u.Free, u.BelowFree)
	return u, nil
}

// Warnings returns what people should know of the store, now: a pool that was
// made smaller than asked for, slow loop devices, a disk below that can no
// longer hold what the sparse pool promises.
func (s *Store) Warnings() []string {
	warnings := append([]string(nil), s.pool.warnings...)
	if s.pool.file == "" {
		return warnings
	}
	var file unix.Stat_t
	if err := unix.Stat(s.pool.file, &file); err != nil {
		return append(warnings, fmt.Sprintf("cannot measure the cache pool %s: %v", s.pool.file, err))
	}
	below, err := statfs(s.pool.dir)
	if err != nil {
		return append(warnings, fmt.Sprintf("cannot measure the disk below the cache pool: %v", err))
	}
	if growth := file.Size - file.Blocks*512; growth > below.free {
		warnings = append(warnings, fmt.Sprintf("the cache pool %s may still grow by %d MiB but the disk below has %d MiB free: "+
			"free some space there, or builds will fail when it is full", s.pool.file, growth>>20, below.free>>20))
	}
	return warnings
}

// path returns a path in the volume of a checked id.
func (s *Store) path(volume string, names ...string) string {
	return filepath.Join(append([]string{s.pool.path, "volumes", volume}, names...)...)
}

// check refuses ids that the control plane would never give: they reach paths.
func (s *Store) check(ctx context.Context, ids ...string) error {
	for _, id := range ids {
		if !s.ids.MatchString(id) {
			return fmt.Errorf("%w: %q is not an id of a volume, generation or machine", provider.ErrUnusable, id)
		}
	}
	return ctx.Err()
}

// require returns provider.ErrNotFound if there is no such volume.
func (s *Store) require(volume string) error {
	_, err := os.Lstat(s.path(volume))
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("volume %s: %w", volume, provider.ErrNotFound)
	}
	return err
}

// scratch hands act an unused path in scratch/, alone in all processes, after
// removing what interrupted calls left there, and removes what act leaves.
// Whatever resists removal is logged and tried again by the next call: it is
// in nobody's way.
func (s *Store) scratch(ctx context.Context, act func(path string) error) error {
	dir := filepath.Join(s.pool.path, "scratch")
	lock, err := lockFile(filepath.Join(s.pool.path, "scratch.lock"))
	if err != nil {
		return err
	}
	defer func() { _ = lock.Close() }()
	sweep := func() {
		entries, err := os.ReadDir(dir)
		for _, entry := range entries {
			err = errors.Join(err, removeTree(filepath.Join(dir, entry.Name())))
		}
		if err != nil {
			s.log.WarnContext(ctx, "scratch space of the volume store kept", "err", err)
		}
	}
	sweep()
	own, err := os.MkdirTemp(dir, "")
	if err != nil {
		return err
	}
	defer sweep()
	return act(filepath.Join(own, "tree"))
}

// sync returns when all that was done in the pool survives a power cut.
func (s *Store) sync() error {
	if err := unix.Syncfs(int(s.root.Fd())); err != nil {
		return &os.PathError{Op: "syncfs", Path: s.pool.path, Err: err}
	}
	return nil
}
