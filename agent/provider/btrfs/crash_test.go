package btrfs_test

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/opendepot/depot/agent/provider"
	"github.com/opendepot/depot/agent/provider/btrfs"
)

// hammer uses the store in dir without end and says on standard output what it
// is about to do. It runs in a process of its own, which is killed.
func hammer(dir string) {
	ctx := context.Background()
	check := func(err error) {
		if err != nil {
			panic(err)
		}
	}
	say := func(act string) { _, _ = os.Stdout.WriteString(act + "\n") }
	say("open")
	s, err := btrfs.Open(ctx, btrfs.Config{Dir: dir, PoolBytes: poolBytes})
	check(err)
	for n := uint64(os.Getpid()) << 32; ; n++ { //nolint:gosec // G115: process ids are positive
		id, generation := fmt.Sprintf("volume_%032x", n), fmt.Sprintf("generation_%032x", n)
		spec := provider.VolumeSpec{ID: id, Labels: map[string]string{"of": id}}
		say("ensure")
		_, err := s.Ensure(ctx, spec)
		check(err)
		w, err := s.Open(ctx, id, machineA, 1)
		check(err)
		check(os.WriteFile(filepath.Join(w.Path(), "file"), []byte(id), 0o600))
		check(w.Close())
		say("commit")
		_, err = s.Commit(ctx, id, generation)
		check(err)
		say("restore")
		check(s.Restore(ctx, id, generation))
		clone := fmt.Sprintf("volume_c%031x", n)
		say("clone")
		_, err = s.Ensure(ctx, provider.VolumeSpec{ID: clone, Labels: map[string]string{"of": id}, From: &provider.Source{Volume: id, Generation: generation}})
		check(err)
		say("delete")
		check(s.Delete(ctx, clone))
	}
}

// killIn starts hammer and kills it some time after it began act for the
// round-th time.
func killIn(t *testing.T, dir, act string, round int, after time.Duration) {
	t.Helper()
	process := exec.CommandContext(t.Context(), os.Args[0], "hammer", dir) //nolint:gosec // G204, G702: this test binary
	var stderr strings.Builder
	process.Stderr = &stderr
	stdout, err := process.StdoutPipe()
	must(t, err)
	must(t, process.Start())
	lines := bufio.NewScanner(stdout)
	for seen := 0; seen < round && lines.Scan(); {
		if lines.Text() == act {
			seen++
		}
	}
	<-time.After(after) // the kill may fall anywhere; that is the point
	must(t, process.Process.Kill())
	for lines.Scan() { // read to the end before Wait, which closes it
		continue
	}
	_ = process.Wait()
	if stderr.Len() > 0 {
		t.Fatalf("the process to kill failed before: %s", &stderr)
	}
}

func TestKilledInAnyAct(t *testing.T) {
	t.Parallel()
	for _, act := range []string{"ensure", "commit", "restore", "clone", "delete"} {
		t.Run(act, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			t.Cleanup(func() { assertNothingLeft(t, dir) })
			for round := range 5 {
				killIn(t, dir, act, 1+round%2, time.Duration(round)*700*time.Microsecond)
				s := open(t, dir)
				assertWhole(t, dir, s)
				closeStore(t, s)
			}
		})
	}
}

func TestKilledWhileMakingThePool(t *testing.T) {
	t.Parallel()
	for round := range 8 {
		dir := t.TempDir()
		t.Cleanup(func() { assertNothingLeft(t, dir) })
		killIn(t, dir, "open", 1, time.Duration(round)*4*time.Millisecond)
		s := open(t, dir)
		assertWhole(t, dir, s)
		closeStore(t, s)
	}
}

// assertWhole checks that every volume is whole and that the store goes on.
func assertWhole(t *testing.T, dir string, s *btrfs.Store) {
	t.Helper()
	volumes, err := s.List(t.Context())
	must(t, err)
	for _, v := range volumes {
		if v.Busy {
			t.Errorf("volume %s is held by a process that was killed", v.ID)
		}
		for _, g := range v.Generations {
			if again, err := s.Commit(t.Context(), v.ID, g.ID); err != nil || again != g {
				t.Errorf("generation %v committed again: %v, %v", g, again, err)
			}
			data, err := os.ReadFile(filepath.Join(dir, "pool", "volumes", v.ID, "generations", g.ID, "file")) //nolint:gosec // G304: the test's own directory
			if err != nil || string(data) != v.ID {
				t.Errorf("generation %s holds %q: %v", g.ID, data, err)
			}
			must(t, s.Restore(t.Context(), v.ID, g.ID))
		}
		want := map[string]string{"of": v.ID}
		if source := v.Labels["of"]; strings.HasPrefix(v.ID, "volume_c") {
			want["of"] = source
		}
		if diff := cmp.Diff(want, v.Labels); diff != "" {
			t.Errorf("labels of %s (-want +got):\n%s", v.ID, diff)
		}
		w, err := s.Open(t.Context(), v.ID, machineB, v.WriterEpoch+1)
		must(t, err)
		must(t, w.Close())
		must(t, s.Delete(t.Context(), v.ID))
	}
	must(t, written(t, s, 1, "x").Close())
	must(t, s.Delete(t.Context(), volumeA))
	left, err := filepath.Glob(filepath.Join(dir, "pool", "scratch", "*"))
	if must(t, err); len(left) > 0 {
		t.Errorf("left in scratch: %v", left)
	}
}
