package btrfs

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

// description is volume.json.
type description struct {
	Labels map[string]string `json:"labels,omitempty"`
}

// Ensure implements provider.VolumeStore. Cloning does not stop or lock the
// source. provider.ErrNotFound means that the source is missing.
func (s *Store) Ensure(ctx context.Context, spec provider.VolumeSpec) (provider.Volume, error) {
	ids := []string{spec.ID}
	if spec.From != nil {
		ids = append(ids, spec.From.Volume)
		if spec.From.Generation != "" {
			ids = append(ids, spec.From.Generation)
		}
	}
	if err := s.check(ctx, ids...); err != nil {
		return provider.Volume{}, fmt.Errorf("ensure volume: %w", err)
	}
	v, err := s.volume(spec.ID)
	if !errors.Is(err, provider.ErrNotFound) {
		return v, err
	}
	made := false
	err = s.scratch(ctx, func(tree string) error {
		if s.require(spec.ID) == nil {
			return nil
		}
		if err := s.make(tree, spec); err != nil {
			return err
		}
		if err := os.Rename(tree, s.path(spec.ID)); err != nil {
			return err
		}
		made = true
		return s.sync()
	})
	if err != nil {
		return provider.Volume{}, fmt.Errorf("make volume %s: %w", spec.ID, err)
	}
	if made {
		s.log.InfoContext(ctx, "volume made", "volume", spec.ID)
	}
	return s.volume(spec.ID)
}

// make builds a volume's directory at tree.
func (s *Store) make(tree string, spec provider.VolumeSpec) error {
	if err := os.MkdirAll(filepath.Join(tree, "generations"), 0o700); err != nil {
		return err
	}
	live := filepath.Join(tree, "live")
	if spec.From == nil {
		if err := createSubvolume(live); err != nil {
			return err
		}
	} else if err := s.snapshotOf(*spec.From, live); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(tree, "lock"), nil, 0o600); err != nil {
		return err
	}
	return writeJSON(filepath.Join(tree, "volume.json"), description{Labels: spec.Labels})
}

// snapshotOf makes a writable copy of source at path.
func (s *Store) snapshotOf(source provider.Source, path string) error {
	if err := s.require(source.Volume); err != nil {
		return err
	}
	tree := s.path(source.Volume, "live")
	if source.Generation != "" {
		tree = s.path(source.Volume, "generations", source.Generation)
	}
	err := snapshot(tree, path, false)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("generation %s of volume %s: %w", source.Generation, source.Volume, provider.ErrNotFound)
	}
	return err
}

// Commit implements provider.VolumeStore. It works while a machine writes the
// volume: the generation is then what a power cut at that moment would leave.
// provider.ErrNotFound means that there is no such volume.
func (s *Store) Commit(ctx context.Context, volume, generation string) (provider.Generation, error) {
	if err := s.check(ctx, volume, generation); err != nil {
		return provider.Generation{}, fmt.Errorf("commit generation: %w", err)
	}
	if err := s.require(volume); err != nil {
		return provider.Generation{}, fmt.Errorf("commit generation %s: %w", generation, err)
	}
	path := s.path(volume, "generations", generation)
	err := snapshot(s.path(volume, "live"), path, true)
	// One that exists may come from a call that did not live to sync it.
	if err == nil || errors.Is(err, fs.ErrExist) {
		err = s.sync()
	}
	if err != nil {
		return provider.Generation{}, fmt.Errorf("commit generation %s of volume %s: %w", generation, volume, err)
	}
	sub, err := inspectSubvolume(path)
	if err != nil {
		return provider.Generation{}, fmt.Errorf("commit generation %s of volume %s: %w", generation, volume, err)
	}
	return provider.Generation{ID: generation, Committed: sub.made}, nil
}

// DeleteGeneration implements provider.VolumeStore. Clones of the generation
// stay whole.
func (s *Store) DeleteGeneration(ctx context.Context, volume, generation string) error {
	if err := s.check(ctx, volume, generation); err != nil {
		return fmt.Errorf("delete generation: %w", err)
	}
	if err := removeTree(s.path(volume, "generations", generation)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("delete generation %s of volume %s: %w", generation, volume, err)
	}
	return nil
}

// Delete implements provider.VolumeStore.
func (s *Store) Delete(ctx context.Context, volume string) error {
	if err := s.check(ctx, volume); err != nil {
		return fmt.Errorf("delete volume: %w", err)
	}
	lock, err := s.lock(volume)
	if errors.Is(err, provider.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", volume, err)
	}
	// Held until the volume has left its place: a later Open finds none.
	defer func() { _ = closeUnforked(lock) }()
	err = s.scratch(ctx, func(tree string) error { return os.Rename(s.path(volume), tree) })
	if err == nil {
		err = s.sync()
	}
	if err != nil {
		return fmt.Errorf("delete volume %s: %w", volume, err)
	}
	s.log.InfoContext(ctx, "volume deleted", "volume", volume)
	return nil
}

// Restore replaces the live tree by a copy of a generation, at once and
// durably; what the live tree held is gone. provider.ErrVolumeBusy while a
// machine writes it, provider.ErrNotFound without such a generation.
func (s *Store) Restore(ctx context.Context, volume, generation string) error {
	if err := s.check(ctx, volume, generation); err != nil {
		return fmt.Errorf("restore generation: %w", err)
	}
	lock, err := s.lock(volume)
	if err == nil {
		defer func() { _ = closeUnforked(lock) }()
		err = s.scratch(ctx, func(tree string) error {
			if err := s.snapshotOf(provider.Source{Volume: volume, Generation: generation}, tree); err != nil {
				return err
			}
			// The old tree takes the scratch name and is swept from there.
			if err := unix.Renameat2(unix.AT_FDCWD, tree, unix.AT_FDCWD, s.path(volume, "live"), unix.RENAME_EXCHANGE); err != nil {
				return &os.PathError{Op: "exchange", Path: tree, Err: err}
			}
			return s.sync()
		})
	}
	if err != nil {
		return fmt.Errorf("restore generation %s of volume %s: %w", generation, volume, err)
	}
	s.log.InfoContext(ctx, "volume restored", "volume", volume, "generation", generation)
	return nil
}

// List implements provider.VolumeStore, ordered by id. A volume that cannot be
// read does not hide the others: they are returned with the error.
func (s *Store) List(ctx context.Context) ([]provider.Volume, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ids, err := s.volumeIDs()
	volumes := make([]provider.Volume, 0, len(ids))
	for _, id := range ids {
		v, one := s.volume(id)
		switch {
		case one == nil:
			volumes = append(volumes, v)
		case !errors.Is(one, provider.ErrNotFound): // else deleted meanwhile
			err = errors.Join(err, one)
		}
	}
	return volumes, err
}

func (s *Store) volumeIDs() ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(s.pool.path, "volumes"))
	if err != nil {
		return nil, fmt.Errorf("list volumes: %w", err)
	}
	var ids []string
	for _, entry := range entries {
		if s.ids.MatchString(entry.Name()) {
			ids = append(ids, entry.Name())
		}
	}
	return ids, nil
}

// volume reads one volume from storage.
func (s *Store) volume(id string) (provider.Volume, error) {
	v, err := s.readVolume(id)
	if errors.Is(err, fs.ErrNotExist) && errors.Is(s.require(id), provider.ErrNotFound) {
		return provider.Volume{}, fmt.Errorf("volume %s: %w", id, provider.ErrNotFound)
	}
	if err != nil {
		return provider.Volume{}, fmt.Errorf("read volume %s: %w", id, err)
	}
	return v, nil
}

func (s *Store) readVolume(id string) (provider.Volume, error) {
	var about description
	if err := readJSON(s.path(id, "volume.json"), &about); err != nil {
		return provider.Volume{}, err
	}
	last, err := s.lastWriter(id)
	if err != nil {
		return provider.Volume{}, err
	}
	busy, err := lockHeld(s.path(id, "lock"))
	if err != nil {
		return provider.Volume{}, err
	}
	generations, err := s.generations(id)
	if err != nil {
		return provider.Volume{}, err
	}
	return provider.Volume{
		ID: id, Labels: about.Labels, WriterEpoch: last.Epoch, Writer: last.Machine, Busy: busy, Generations: generations,
	}, nil
}

// generations returns the committed ones in the order of their transactions,
// which is right even where the clock was set back between two.
func (s *Store) generations(volume string) ([]provider.Generation, error) {
	dir := s.path(volume, "generations")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	type committed struct {
		provider.Generation
		transaction uint64
	}
	var found []committed
	for _, entry := range entries {
		if !s.ids.MatchString(entry.Name()) {
			continue
		}
		sub, err := inspectSubvolume(filepath.Join(dir, entry.Name()))
		if errors.Is(err, fs.ErrNotExist) {
			continue // deleted meanwhile
		}
		if err != nil {
			return nil, err
		}
		if sub.readOnly {
			found = append(found, committed{provider.Generation{ID: entry.Name(), Committed: sub.made}, sub.transaction})
		}
	}
	slices.SortFunc(found, func(a, b committed) int {
		return cmp.Or(cmp.Compare(a.transaction, b.transaction), a.Committed.Compare(b.Committed), cmp.Compare(a.ID, b.ID))
	})
	var generations []provider.Generation
	for _, g := range found {
		generations = append(generations, g.Generation)
	}
	return generations, nil
}
