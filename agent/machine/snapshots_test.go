package machine

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/google/go-cmp/cmp"
)

// A snapshotter that was killed before its commit has left a directory: it
// goes, those that were committed stay, and without any commit all go.
func TestSweepSnapshots(t *testing.T) {
	for name, tt := range map[string]struct {
		commit bool
		want   []string
	}{
		"one was committed": {commit: true, want: []string{"1"}},
		"none was ever":     {},
	} {
		t.Run(name, func(t *testing.T) {
			p := Paths{Root: t.TempDir()}
			root := filepath.Join(p.Root, "runc-overlayfs", "snapshots")
			for _, dir := range []string{"1/fs", "2/fs", "new-17/fs"} {
				if err := os.MkdirAll(filepath.Join(root, "snapshots", dir), 0o700); err != nil {
					t.Fatal(err)
				}
			}
			store, err := storage.NewMetaStore(filepath.Join(root, "metadata.db"))
			if err != nil {
				t.Fatal(err)
			}
			err = store.WithTransaction(t.Context(), true, func(ctx context.Context) (err error) {
				if tt.commit {
					_, err = storage.CreateSnapshot(ctx, snapshots.KindActive, "key", "")
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
			if err := store.Close(); err != nil {
				t.Fatal(err)
			}
			if err := sweepSnapshots(t.Context(), p, slog.New(slog.DiscardHandler)); err != nil {
				t.Fatal(err)
			}
			var left []string
			entries, err := os.ReadDir(filepath.Join(root, "snapshots"))
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				left = append(left, e.Name())
			}
			if diff := cmp.Diff(tt.want, left); diff != "" {
				t.Errorf("what is left (-want +got):\n%s", diff)
			}
		})
	}
}
