//nolint:thelper // each function is a test of its own: a failure must name its lines
package providertest

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/opendepot/depot/agent/provider"
)

// Volumes is a store as its suite uses it.
type Volumes struct {
	provider.VolumeStore
	// Open admits a machine as the volume's writer, as a launch does. release
	// gives the volume up, as the machine's end does.
	Open func(ctx context.Context, volume, machine string, writerEpoch uint64) (live string, release func() error, err error)
	// Close ends this use of the store, as the agent's end does.
	Close func() error
}

// RunVolumes checks a volume store. open opens the one that is kept in dir: at
// first dir is empty, later calls see what earlier ones kept, as an agent does
// that was started again.
func RunVolumes(t *testing.T, open func(t *testing.T, dir string) Volumes) {
	t.Helper()
	for name, test := range map[string]func(*testing.T, *volumes){
		"ensure is idempotent":             ensureIdempotent,
		"ensure at once makes one":         ensureConcurrently,
		"clone of a live tree":             cloneLive,
		"clone of a generation":            cloneGeneration,
		"clone of what is missing":         cloneMissing,
		"commit is idempotent":             commitIdempotent,
		"commit at once makes one":         commitConcurrently,
		"commit of a volume in use":        commitBusy,
		"commit without a volume":          commitMissing,
		"generations are oldest first":     generationOrder,
		"delete generation":                deleteGeneration,
		"delete":                           deleteVolume,
		"delete of a volume in use":        deleteBusy,
		"list finds all on storage":        listReopened,
		"one-writer":                       oneWriter,
		"one-writer outlives the agent":    oneWriterReopened,
		"stale writers are refused":        staleWriter,
		"hostile ids are refused":          hostileVolumes,
		"a cancelled call changes nothing": cancelledVolumes,
	} {
		t.Run(name, func(t *testing.T) {
			v := &volumes{dir: t.TempDir(), open: open}
			v.reopen(t)
			t.Cleanup(func() {
				if err := v.Close(); err != nil {
					t.Errorf("close: %v", err)
				}
			})
			test(t, v)
		})
	}
}

// volumes is the store of one test.
type volumes struct {
	Volumes
	dir  string
	open func(t *testing.T, dir string) Volumes
}

// reopen puts another store in the place of the first, which is forgotten as a
// killed agent's is.
func (v *volumes) reopen(t *testing.T) {
	t.Helper()
	before := v.Volumes
	v.Volumes = v.open(t, v.dir)
	if before.Close == nil {
		return
	}
	// A machine or the new store may use it: that is not for it to end.
	if err := before.Close(); err != nil {
		wantErr(t, "close of the first store", err, provider.ErrVolumeBusy)
	}
}

func (v *volumes) ensure(t *testing.T, spec provider.VolumeSpec) provider.Volume {
	t.Helper()
	volume, err := v.Ensure(t.Context(), spec)
	must(t, err)
	return volume
}

// commit commits volumeA.
func (v *volumes) commit(t *testing.T, generation string) provider.Generation {
	t.Helper()
	g, err := v.Commit(t.Context(), volumeA, generation)
	must(t, err)
	return g
}

func (v *volumes) list(t *testing.T) []provider.Volume {
	t.Helper()
	all, err := v.List(t.Context())
	must(t, err)
	slices.SortFunc(all, func(a, b provider.Volume) int { return strings.Compare(a.ID, b.ID) })
	return all
}

// write puts text into the volume's file as a machine with the next epoch.
func (v *volumes) write(t *testing.T, volume, text string) {
	t.Helper()
	v.as(t, volume, func(live string) {
		must(t, os.WriteFile(filepath.Join(live, "file"), []byte(text), 0o600))
	})
}

// read returns what write put there; empty if nothing did.
func (v *volumes) read(t *testing.T, volume string) (text string) {
	t.Helper()
	v.as(t, volume, func(live string) {
		data, err := os.ReadFile(filepath.Join(live, "file")) //nolint:gosec // G304: a test's own directory
		if !os.IsNotExist(err) {
			must(t, err)
		}
		text = string(data)
	})
	return text
}

func (v *volumes) as(t *testing.T, volume string, act func(live string)) {
	t.Helper()
	all := v.list(t)
	i := slices.IndexFunc(all, func(each provider.Volume) bool { return each.ID == volume })
	if i < 0 {
		t.Fatalf("volume %s is not listed", volume)
	}
	live, release, err := v.Open(t.Context(), volume, machineA, all[i].WriterEpoch+1)
	must(t, err)
	act(live)
	must(t, release())
}

func ensureIdempotent(t *testing.T, v *volumes) {
	first := v.ensure(t, provider.VolumeSpec{ID: volumeA, Labels: labels()})
	if diff := cmp.Diff(provider.Volume{ID: volumeA, Labels: labels()}, first); diff != "" {
		t.Errorf("a new volume (-want +got):\n%s", diff)
	}
	v.write(t, volumeA, "kept")
	v.ensure(t, provider.VolumeSpec{ID: volumeB})
	// A repeated order must not turn a used volume into a clone.
	again := v.ensure(t, provider.VolumeSpec{ID: volumeA, Labels: map[string]string{"other": "x"}, From: &provider.Source{Volume: volumeB}})
	if diff := cmp.Diff(labels(), again.Labels); diff != "" {
		t.Errorf("labels after a second Ensure (-want +got):\n%s", diff)
	}
	if got := v.read(t, volumeA); got != "kept" {
		t.Errorf("after a second Ensure the tree holds %q, want it kept", got)
	}
}

func ensureConcurrently(t *testing.T, v *volumes) {
	var calls sync.WaitGroup
	for range 8 {
		calls.Go(func() {
			if _, err := v.Ensure(t.Context(), provider.VolumeSpec{ID: volumeA, Labels: labels()}); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	if all := v.list(t); len(all) != 1 {
		t.Errorf("%d volumes, want 1: %v", len(all), all)
	}
}

func cloneLive(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA, Labels: labels()})
	live, release, err := v.Open(t.Context(), volumeA, machineA, 7)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(live, "file"), []byte("source"), 0o600))
	// Not closed or synced by its writer: a clone needs neither.
	clone := v.ensure(t, provider.VolumeSpec{ID: volumeB, From: &provider.Source{Volume: volumeA}})
	if diff := cmp.Diff(provider.Volume{ID: volumeB}, clone); diff != "" {
		t.Errorf("a clone is a volume of its own (-want +got):\n%s", diff)
	}
	must(t, release())
	v.write(t, volumeB, "clone")
	if got := v.read(t, volumeA); got != "source" {
		t.Errorf("a write to the clone reached its source: %q", got)
	}
	must(t, v.Delete(t.Context(), volumeA))
	if got := v.read(t, volumeB); got != "clone" {
		t.Errorf("without its source the clone holds %q", got)
	}
}

func cloneGeneration(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	v.write(t, volumeA, "committed")
	v.commit(t, generationA)
	v.write(t, volumeA, "later")
	v.ensure(t, provider.VolumeSpec{ID: volumeB, From: &provider.Source{Volume: volumeA, Generation: generationA}})
	if got := v.read(t, volumeB); got != "committed" {
		t.Errorf("the clone of a generation holds %q", got)
	}
	must(t, v.DeleteGeneration(t.Context(), volumeA, generationA))
	v.write(t, volumeB, "own")
	if got := v.read(t, volumeB); got != "own" {
		t.Errorf("without its generation the clone holds %q", got)
	}
}

func cloneMissing(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	for name, from := range map[string]provider.Source{
		"no volume":     {Volume: volumeC},
		"no generation": {Volume: volumeA, Generation: generationA},
	} {
		_, err := v.Ensure(t.Context(), provider.VolumeSpec{ID: volumeB, From: &from})
		wantErr(t, name, err, provider.ErrNotFound)
	}
	if all := v.list(t); len(all) != 1 {
		t.Errorf("a refused clone left a volume: %v", all)
	}
}

func commitIdempotent(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	v.write(t, volumeA, "first")
	before := time.Now().Add(-time.Second)
	first := v.commit(t, generationA)
	if first.ID != generationA || first.Committed.Before(before) || first.Committed.After(time.Now().Add(time.Second)) {
		t.Errorf("committed %+v, want %s of now", first, generationA)
	}
	v.write(t, volumeA, "second")
	if diff := cmp.Diff(first, v.commit(t, generationA)); diff != "" {
		t.Errorf("a repeated commit (-first +second):\n%s", diff)
	}
	v.ensure(t, provider.VolumeSpec{ID: volumeB, From: &provider.Source{Volume: volumeA, Generation: generationA}})
	if got := v.read(t, volumeB); got != "first" {
		t.Errorf("a repeated commit changed the generation to %q", got)
	}
}

func commitConcurrently(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	var calls sync.WaitGroup
	for range 8 {
		calls.Go(func() {
			if _, err := v.Commit(t.Context(), volumeA, generationA); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	if got := v.list(t)[0].Generations; len(got) != 1 {
		t.Errorf("%d generations, want 1: %v", len(got), got)
	}
}

func commitBusy(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	live, release, err := v.Open(t.Context(), volumeA, machineA, 1)
	must(t, err)
	file, err := os.Create(filepath.Join(live, "file")) //nolint:gosec // G304: a test's own directory
	must(t, err)
	_, err = file.WriteString("checkpoint")
	must(t, err)
	v.commit(t, generationA)
	_, err = file.WriteString(" and more")
	must(t, err)
	must(t, file.Close())
	must(t, release())
	v.ensure(t, provider.VolumeSpec{ID: volumeB, From: &provider.Source{Volume: volumeA, Generation: generationA}})
	if got := v.read(t, volumeB); got != "checkpoint" {
		t.Errorf("the checkpoint of a volume in use holds %q", got)
	}
}

func commitMissing(t *testing.T, v *volumes) {
	_, err := v.Commit(t.Context(), volumeA, generationA)
	wantErr(t, "commit", err, provider.ErrNotFound)
}

func generationOrder(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	var want []provider.Generation
	for _, id := range []string{generationB, generationC, generationA} {
		want = append(want, v.commit(t, id))
	}
	if diff := cmp.Diff(want, v.list(t)[0].Generations); diff != "" {
		t.Errorf("generations (-want +got):\n%s", diff)
	}
}

func deleteGeneration(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	v.write(t, volumeA, "live")
	v.commit(t, generationA)
	kept := v.commit(t, generationB)
	for _, each := range [][2]string{{volumeA, generationA}, {volumeA, generationA}, {volumeB, generationA}} {
		must(t, v.DeleteGeneration(t.Context(), each[0], each[1]))
	}
	if diff := cmp.Diff([]provider.Generation{kept}, v.list(t)[0].Generations); diff != "" {
		t.Errorf("generations (-want +got):\n%s", diff)
	}
	if got := v.read(t, volumeA); got != "live" {
		t.Errorf("the live tree holds %q", got)
	}
}

func deleteVolume(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA, Labels: labels()})
	v.write(t, volumeA, "old")
	v.commit(t, generationA)
	v.ensure(t, provider.VolumeSpec{ID: volumeB})
	for range 2 {
		must(t, v.Delete(t.Context(), volumeA))
	}
	if all := v.list(t); len(all) != 1 || all[0].ID != volumeB {
		t.Errorf("after Delete: %v, want only %s", all, volumeB)
	}
	_, _, err := v.Open(t.Context(), volumeA, machineA, 9)
	wantErr(t, "open of a deleted volume", err, provider.ErrNotFound)
	if diff := cmp.Diff(provider.Volume{ID: volumeA}, v.ensure(t, provider.VolumeSpec{ID: volumeA})); diff != "" {
		t.Errorf("made anew (-want +got):\n%s", diff)
	}
	if got := v.read(t, volumeA); got != "" {
		t.Errorf("made anew it holds %q", got)
	}
}

func deleteBusy(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	v.write(t, volumeA, "kept")
	v.commit(t, generationA)
	_, release, err := v.Open(t.Context(), volumeA, machineB, 5)
	must(t, err)
	wantErr(t, "delete", v.Delete(t.Context(), volumeA), provider.ErrVolumeBusy)
	if got := v.list(t); len(got) != 1 || len(got[0].Generations) != 1 {
		t.Errorf("after a refused Delete: %v", got)
	}
	must(t, release())
	if got := v.read(t, volumeA); got != "kept" {
		t.Errorf("after a refused Delete it holds %q", got)
	}
	must(t, v.Delete(t.Context(), volumeA))
}

func listReopened(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA, Labels: labels()})
	v.ensure(t, provider.VolumeSpec{ID: volumeB, From: &provider.Source{Volume: volumeA}})
	_, release, err := v.Open(t.Context(), volumeA, machineB, 41)
	must(t, err)
	must(t, release())
	g := v.commit(t, generationA)
	want := []provider.Volume{
		{ID: volumeA, Labels: labels(), WriterEpoch: 41, Writer: machineB, Generations: []provider.Generation{g}},
		{ID: volumeB},
	}
	for _, when := range []string{"at first", "after the store was opened anew", "and again"} {
		if diff := cmp.Diff(want, v.list(t)); diff != "" {
			t.Errorf("list %s (-want +got):\n%s", when, diff)
		}
		v.reopen(t)
	}
}

func oneWriter(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	_, release, err := v.Open(t.Context(), volumeA, machineA, 1)
	must(t, err)
	if !v.list(t)[0].Busy {
		t.Error("a volume in use is not listed as busy")
	}
	for _, machine := range []string{machineA, machineB} {
		_, _, err = v.Open(t.Context(), volumeA, machine, 2)
		wantErr(t, "open of a volume in use by "+machine, err, provider.ErrVolumeBusy)
		if err != nil && !strings.Contains(err.Error(), machineA) {
			t.Errorf("the refusal does not name the holder: %v", err)
		}
	}
	if got := v.list(t)[0]; got.WriterEpoch != 1 || got.Writer != machineA {
		t.Errorf("a refused writer was recorded: %+v", got)
	}
	must(t, release())
	if v.list(t)[0].Busy {
		t.Error("a volume given up is listed as busy")
	}
	_, release, err = v.Open(t.Context(), volumeA, machineB, 2)
	must(t, err)
	must(t, release())
}

func oneWriterReopened(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	_, release, err := v.Open(t.Context(), volumeA, machineA, 1)
	must(t, err)
	v.reopen(t)
	_, _, err = v.Open(t.Context(), volumeA, machineB, 2)
	wantErr(t, "open through another store", err, provider.ErrVolumeBusy)
	wantErr(t, "delete through another store", v.Delete(t.Context(), volumeA), provider.ErrVolumeBusy)
	must(t, release())
	_, release, err = v.Open(t.Context(), volumeA, machineB, 2)
	must(t, err)
	must(t, release())
}

func staleWriter(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	for _, step := range []struct {
		name    string
		machine string
		epoch   uint64
		want    error
	}{
		{"the first", machineA, 10, nil},
		{"a lower epoch", machineB, 9, provider.ErrStaleWriter},
		{"a lower epoch of the same machine", machineA, 9, provider.ErrStaleWriter},
		{"the same epoch of another machine", machineB, 10, provider.ErrStaleWriter},
		{"the same epoch of the same machine", machineA, 10, nil},
		{"a higher epoch", machineB, 1 << 63, nil},
		{"the former", machineA, 10, provider.ErrStaleWriter},
	} {
		v.reopen(t)
		_, release, err := v.Open(t.Context(), volumeA, step.machine, step.epoch)
		wantErr(t, step.name, err, step.want)
		if err == nil {
			must(t, release())
		} else if v.list(t)[0].Busy {
			t.Errorf("%s: the refused writer holds the volume", step.name)
		}
	}
	if got := v.list(t)[0]; got.WriterEpoch != 1<<63 || got.Writer != machineB {
		t.Errorf("recorded %d of %s, want the highest epoch", got.WriterEpoch, got.Writer)
	}
}

func hostileVolumes(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	v.commit(t, generationA)
	before := v.list(t)
	ctx := t.Context()
	for name, id := range hostileIDs() {
		_, ensure := v.Ensure(ctx, provider.VolumeSpec{ID: id})
		_, cloneVolume := v.Ensure(ctx, provider.VolumeSpec{ID: volumeB, From: &provider.Source{Volume: id}})
		_, commitVolume := v.Commit(ctx, id, generationA)
		_, commitGeneration := v.Commit(ctx, volumeA, id)
		_, _, openVolume := v.Open(ctx, id, machineA, 1)
		_, _, openMachine := v.Open(ctx, volumeA, id, 1)
		errs := map[string]error{
			"ensure": ensure, "clone of volume": cloneVolume,
			"commit of volume": commitVolume, "commit as generation": commitGeneration,
			"open of volume": openVolume, "open for machine": openMachine,
			"delete generation of volume": v.DeleteGeneration(ctx, id, generationA),
			"delete generation":           v.DeleteGeneration(ctx, volumeA, id),
			"delete":                      v.Delete(ctx, id),
		}
		if id != "" { // which means the live tree
			_, errs["clone of generation"] = v.Ensure(ctx, provider.VolumeSpec{ID: volumeB, From: &provider.Source{Volume: volumeA, Generation: id}})
		}
		for act, err := range errs {
			wantErr(t, act+" with id "+name, err, provider.ErrUnusable)
		}
	}
	if diff := cmp.Diff(before, v.list(t)); diff != "" {
		t.Errorf("refused calls changed something (-before +after):\n%s", diff)
	}
}

func cancelledVolumes(t *testing.T, v *volumes) {
	v.ensure(t, provider.VolumeSpec{ID: volumeA})
	v.commit(t, generationA)
	before := v.list(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, ensure := v.Ensure(ctx, provider.VolumeSpec{ID: volumeB})
	_, commit := v.Commit(ctx, volumeA, generationB)
	_, list := v.List(ctx)
	for act, err := range map[string]error{
		"ensure": ensure, "commit": commit, "list": list,
		"delete generation": v.DeleteGeneration(ctx, volumeA, generationA), "delete": v.Delete(ctx, volumeA),
	} {
		wantErr(t, act, err, context.Canceled)
	}
	if diff := cmp.Diff(before, v.list(t)); diff != "" {
		t.Errorf("cancelled calls changed something (-before +after):\n%s", diff)
	}
}
