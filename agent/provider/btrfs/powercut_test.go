package btrfs_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/opendepot/depot/agent/provider"
	"github.com/opendepot/depot/agent/provider/btrfs"
)

// What a call has returned for is on disk: a copy of the pool's file, taken
// while it is mounted, holds what a power cut at that moment would leave.
func TestPowerCut(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	cuts := map[string]string{} // copies by what had just returned
	cut := func(after string) {
		t.Helper()
		cuts[after] = t.TempDir()
		out, err := exec.CommandContext(t.Context(), "cp", "--sparse=always", filepath.Join(dir, "pool.btrfs"), cuts[after]).CombinedOutput() //nolint:gosec // G204: the test's own directories
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	labels := map[string]string{"project": "x"}
	_, err := s.Ensure(t.Context(), provider.VolumeSpec{ID: volumeA, Labels: labels})
	must(t, err)
	cut("ensure")
	w, err := s.Open(t.Context(), volumeA, machineA, 7)
	must(t, err)
	cut("open")
	file := filepath.Join(w.Path(), "file")
	must(t, os.WriteFile(file, []byte("committed"), 0o600))
	cut("write")
	g, err := s.Commit(t.Context(), volumeA, generationA)
	must(t, err)
	cut("commit")
	must(t, os.WriteFile(file, []byte("corrupt"), 0o600))
	must(t, w.Close())
	_, err = s.Ensure(t.Context(), provider.VolumeSpec{ID: volumeB, From: &provider.Source{Volume: volumeA}})
	must(t, err)
	cut("clone")
	must(t, s.Restore(t.Context(), volumeA, generationA))
	cut("restore")
	must(t, s.Delete(t.Context(), volumeA))
	cut("delete")
	closeStore(t, s) // one filesystem cannot be mounted twice

	type left struct {
		Volumes []provider.Volume
		File    string // of volumeA's live tree
	}
	written := provider.Volume{ID: volumeA, Labels: labels, WriterEpoch: 7, Writer: machineA}
	committed := written
	committed.Generations = []provider.Generation{g}
	clone := provider.Volume{ID: volumeB}
	for after, want := range map[string]left{
		"ensure": {Volumes: []provider.Volume{{ID: volumeA, Labels: labels}}},
		"open":   {Volumes: []provider.Volume{written}},
		// Nothing asked for it to be kept: were it here, the cuts would prove nothing.
		"write":   {Volumes: []provider.Volume{written}},
		"commit":  {Volumes: []provider.Volume{committed}, File: "committed"},
		"clone":   {Volumes: []provider.Volume{committed, clone}, File: "corrupt"},
		"restore": {Volumes: []provider.Volume{committed, clone}, File: "committed"},
		"delete":  {Volumes: []provider.Volume{clone}},
	} {
		t.Run("after "+after, func(t *testing.T) {
			s, err := btrfs.Open(t.Context(), btrfs.Config{Dir: cuts[after]})
			must(t, err)
			defer closeStore(t, s)
			var got left
			got.Volumes, err = s.List(t.Context())
			must(t, err)
			data, err := os.ReadFile(filepath.Join(cuts[after], "pool", "volumes", volumeA, "live", "file"))
			if !os.IsNotExist(err) {
				must(t, err)
			}
			got.File = string(data)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("what is left (-want +got):\n%s", diff)
			}
		})
	}
}
