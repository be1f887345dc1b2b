package machine

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// sweepSnapshots removes the directories of snapshots that the snapshotter's
// database does not know. One that was killed between a directory's last rename
// and its commit leaves such a directory behind, gives the same number to the
// next snapshot, and fails at "file exists", now and for ever.
func sweepSnapshots(ctx context.Context, p Paths, log *slog.Logger) error {
	roots, err := filepath.Glob(filepath.Join(p.Root, "runc-*", "snapshots"))
	if err != nil {
		return fmt.Errorf("sweep %s: %w", p.Root, err)
	}
	for _, root := range roots {
		if err := sweepSnapshotter(ctx, root, log); err != nil {
			return fmt.Errorf("sweep %s: %w", root, err)
		}
	}
	return nil
}

func sweepSnapshotter(ctx context.Context, root string, log *slog.Logger) error {
	path := filepath.Join(root, "metadata.db")
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		return nil // to open it would make one
	}
	known, err := snapshotIDs(ctx, path)
	if err != nil {
		// buildkitd deals with a database that it cannot read, as a whole.
		log.Warn("look for snapshots that were not committed", "path", path, "err", err)
		return nil
	}
	entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, e := range entries {
		dir := filepath.Join(root, "snapshots", e.Name())
		if _, ok := known[e.Name()]; ok || !e.IsDir() {
			continue
		}
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
		log.Info("removed a snapshot that was not committed", "path", dir)
	}
	return nil
}

// snapshotIDs lists the snapshots that were committed, by the names of their
// directories.
func snapshotIDs(ctx context.Context, path string) (ids map[string]string, err error) {
	store, err := storage.NewMetaStore(path)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, store.Close()) }()
	err = store.WithTransaction(ctx, false, func(ctx context.Context) (err error) {
		ids, err = storage.IDMap(ctx)
		if errors.Is(err, errdefs.ErrNotFound) {
			return nil // there was never one
		}
		return err
	})
	return ids, err
}
