package btrfs_test

import (
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
	"github.com/opendepot/depot/agent/provider/btrfs"
	"github.com/opendepot/depot/agent/provider/providertest"
)

const (
	volumeA     = "volume_0190f1c2a3b47c5d8e9f0a1b2c3d4e01"
	volumeB     = "volume_0190f1c2a3b47c5d8e9f0a1b2c3d4e02"
	machineA    = "machine_0190f1c2a3b47c5d8e9f0a1b2c3d4e11"
	machineB    = "machine_0190f1c2a3b47c5d8e9f0a1b2c3d4e12"
	generationA = "generation_0190f1c2a3b47c5d8e9f0a1b2c3d4e21"
	poolBytes   = 1 << 30
)

// TestMain lets the test binary be the process that a crash test kills, or
// the machine that outlives its launcher.
func TestMain(m *testing.M) {
	switch {
	case len(os.Args) == 3 && os.Args[1] == "hammer":
		hammer(os.Args[2])
		return
	case len(os.Args) == 2 && os.Args[1] == "hold":
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	}
	m.Run()
}

func TestConformance(t *testing.T) {
	t.Parallel()
	t.Run("loop-backed pool", func(t *testing.T) {
		t.Parallel()
		providertest.RunVolumes(t, func(t *testing.T, dir string) providertest.Volumes {
			t.Helper()
			return adapt(open(t, dir))
		})
	})
	t.Run("data directory on btrfs", func(t *testing.T) {
		t.Parallel()
		// A pool of one store is the btrfs data directory of others.
		host := open(t, t.TempDir())
		t.Cleanup(func() { closeStore(t, host) })
		if _, err := host.Ensure(t.Context(), provider.VolumeSpec{ID: volumeA}); err != nil {
			t.Fatal(err)
		}
		w, err := host.Open(t.Context(), volumeA, machineA, 1)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = w.Close() })
		providertest.RunVolumes(t, func(t *testing.T, dir string) providertest.Volumes {
			t.Helper()
			return adapt(open(t, filepath.Join(w.Path(), filepath.Base(filepath.Dir(dir)))))
		})
	})
}

func adapt(s *btrfs.Store) providertest.Volumes {
	return providertest.Volumes{
		VolumeStore: s,
		Close:       s.Close,
		Open: func(ctx context.Context, volume, machine string, epoch uint64) (string, func() error, error) {
			w, err := s.Open(ctx, volume, machine, epoch)
			if err != nil {
				return "", nil, err
			}
			return w.Path(), w.Close, nil
		},
	}
}

// open opens a store in dir. A test that uses it closes it.
func open(t *testing.T, dir string) *btrfs.Store {
	t.Helper()
	if entries, err := os.ReadDir(dir); err != nil || len(entries) == 0 {
		t.Cleanup(func() { assertNothingLeft(t, dir) }) // once, after all stores of dir
	}
	s, err := btrfs.Open(t.Context(), btrfs.Config{Dir: dir, PoolBytes: poolBytes})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func closeStore(t *testing.T, s *btrfs.Store) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// assertNothingLeft checks that no mount and no loop device is under dir.
func assertNothingLeft(t *testing.T, dir string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), dir+"/") {
		t.Errorf("something is still mounted under %s", dir)
	}
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range backing {
		if file, err := os.ReadFile(path); err == nil && strings.HasPrefix(string(file), dir+"/") { //nolint:gosec // G304: a file of the kernel's
			t.Errorf("%s still has %s", path, file)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// written makes volumeA, if needed, and writes text into its file.
func written(t *testing.T, s *btrfs.Store, epoch uint64, text string) *btrfs.Writer {
	t.Helper()
	_, err := s.Ensure(t.Context(), provider.VolumeSpec{ID: volumeA})
	must(t, err)
	w, err := s.Open(t.Context(), volumeA, machineA, epoch)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(w.Path(), "file"), []byte(text), 0o600))
	return w
}

func content(t *testing.T, w *btrfs.Writer) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(w.Path(), "file"))
	must(t, err)
	return string(data)
}

func TestRestore(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	defer closeStore(t, s)
	w := written(t, s, 1, "sound")
	_, err := s.Commit(t.Context(), volumeA, generationA)
	must(t, err)
	must(t, os.WriteFile(filepath.Join(w.Path(), "file"), []byte("corrupt"), 0o600))

	if err := s.Restore(t.Context(), volumeA, generationA); !errors.Is(err, provider.ErrVolumeBusy) {
		t.Errorf("restore of a volume in use: %v", err)
	}
	if got := content(t, w); got != "corrupt" {
		t.Errorf("a refused restore changed the live tree to %q", got)
	}
	must(t, w.Close())
	for range 2 {
		must(t, s.Restore(t.Context(), volumeA, generationA))
		if got := content(t, w); got != "sound" {
			t.Errorf("restored %q", got)
		}
	}
	if err := s.Restore(t.Context(), volumeA, generationA[:len(generationA)-1]+"f"); !errors.Is(err, provider.ErrNotFound) {
		t.Errorf("restore of a missing generation: %v", err)
	}
	if err := s.Restore(t.Context(), volumeB, generationA); !errors.Is(err, provider.ErrNotFound) {
		t.Errorf("restore of a missing volume: %v", err)
	}
	volumes, err := s.List(t.Context())
	must(t, err)
	if len(volumes) != 1 || volumes[0].WriterEpoch != 1 || len(volumes[0].Generations) != 1 {
		t.Errorf("a restore keeps the writer's epoch and the generations: %+v", volumes)
	}
	must(t, written(t, s, 2, "writable").Close())
}

// The machine's PID 1 inherits the lock, its launcher ends: the volume is busy
// until the machine ends, however it does.
func TestLockOutlivesLauncher(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, dir)
	w := written(t, s, 1, "x")
	machine := exec.CommandContext(t.Context(), os.Args[0], "hold") //nolint:gosec // G204, G702: this test binary
	machine.ExtraFiles = []*os.File{w.LockFile()}
	stdin, err := machine.StdinPipe()
	must(t, err)
	must(t, machine.Start())
	must(t, w.Close())

	if err := s.Close(); !errors.Is(err, provider.ErrVolumeBusy) || !strings.Contains(err.Error(), volumeA) {
		t.Errorf("close while a machine writes: %v, want ErrVolumeBusy that names the volume", err)
	}
	s = open(t, dir)
	defer func() { closeStore(t, s) }()
	if _, err := s.Open(t.Context(), volumeA, machineB, 2); !errors.Is(err, provider.ErrVolumeBusy) || !strings.Contains(err.Error(), machineA) {
		t.Errorf("open while a machine writes: %v, want ErrVolumeBusy that names the machine", err)
	}
	must(t, machine.Process.Kill())
	_ = machine.Wait()
	_ = stdin.Close()
	w, err = s.Open(t.Context(), volumeA, machineB, 2)
	must(t, err)
	must(t, w.Close())
}

// A build step may make subvolumes inside its cache mounts.
func TestDeleteNestedSubvolumes(t *testing.T) {
	t.Parallel()
	s := open(t, t.TempDir())
	defer closeStore(t, s)
	outside := filepath.Join(t.TempDir(), "outside")
	must(t, os.WriteFile(outside, nil, 0o600))
	w := written(t, s, 1, "x")
	for _, name := range []string{"deep", "deep/er", "plain/hidden"} {
		path := filepath.Join(w.Path(), name)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		out, err := exec.CommandContext(t.Context(), "btrfs", "subvolume", "create", path).CombinedOutput() //nolint:gosec // G204: the test's own directory
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	must(t, os.Symlink(filepath.Dir(outside), filepath.Join(w.Path(), "deep", "link")))
	_, err := s.Commit(t.Context(), volumeA, generationA)
	must(t, err)
	must(t, w.Close())
	must(t, s.Restore(t.Context(), volumeA, generationA))
	must(t, s.Delete(t.Context(), volumeA))
	scratch, err := filepath.Glob(filepath.Join(filepath.Dir(w.Path()), "..", "..", "scratch", "*"))
	if must(t, err); len(scratch) > 0 {
		t.Errorf("left in scratch: %v", scratch)
	}
	if _, err := os.Stat(outside); err != nil {
		t.Errorf("the removal followed a link: %v", err)
	}
}

func TestPool(t *testing.T) {
	t.Parallel()
	t.Run("survives a reboot", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		s := open(t, dir)
		must(t, written(t, s, 1, "kept").Close())
		for range 2 { // all mounts and loop devices go, the file stays
			closeStore(t, s)
			assertNothingLeft(t, dir)
			s = open(t, dir)
		}
		defer closeStore(t, s)
		w, err := s.Open(t.Context(), volumeA, machineA, 2)
		must(t, err)
		defer w.Close() //nolint:errcheck // the next close would report it
		if got := content(t, w); got != "kept" {
			t.Errorf("after a reboot the volume holds %q", got)
		}
	})
	t.Run("waits for a copy of the mount", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		s := open(t, dir)
		// As a container does that is being started while the agent ends.
		other := exec.CommandContext(t.Context(), os.Args[0], "hold") //nolint:gosec // G204, G702: this test binary
		other.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS}
		stdin, err := other.StdinPipe()
		must(t, err)
		must(t, other.Start())
		closed := make(chan error)
		go func() { closed <- s.Close() }()
		for mounted := true; mounted; { // until Close has unmounted it here
			mounts, err := os.ReadFile("/proc/self/mountinfo")
			must(t, err)
			mounted = strings.Contains(string(mounts), dir+"/")
		}
		must(t, stdin.Close())
		must(t, other.Wait())
		must(t, <-closed)
		assertNothingLeft(t, dir)
	})
	t.Run("half-made is made again", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		half := filepath.Join(dir, "pool.btrfs.new-1")
		must(t, os.WriteFile(half, []byte("half"), 0o600))
		t.Cleanup(func() { assertNothingLeft(t, dir) })
		s := open(t, dir)
		closeStore(t, s)
		if _, err := os.Stat(half); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the half-made pool is still there: %v", err)
		}
	})
	t.Run("promises what the disk below holds", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=512m"))
		t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
		s := open(t, dir) // asks for 1 GiB
		defer func() { closeStore(t, s) }()
		usage, err := s.Usage(t.Context())
		must(t, err)
		if !usage.Sparse || usage.Size > 512<<20 || usage.Free > usage.BelowFree {
			t.Errorf("a pool on 512 MiB promises %+v", usage)
		}
		if !mentions(s.Warnings(), "instead of 1024 MiB") {
			t.Errorf("warnings %q do not say that the pool is smaller", s.Warnings())
		}
		must(t, os.WriteFile(filepath.Join(dir, "ballast"), make([]byte, 300<<20), 0o600))
		if !mentions(s.Warnings(), "may still grow") {
			t.Errorf("warnings %q do not say that the disk below is too full", s.Warnings())
		}
		usage, err = s.Usage(t.Context())
		must(t, err)
		if usage.Free > 212<<20 {
			t.Errorf("with 212 MiB below, %d MiB are called free", usage.Free>>20)
		}
		must(t, os.Remove(filepath.Join(dir, "ballast")))
		if mentions(s.Warnings(), "may still grow") {
			t.Errorf("the warning stays: %q", s.Warnings())
		}
	})
	for name, c := range map[string]struct {
		config btrfs.Config
		want   error
	}{
		"relative directory": {btrfs.Config{Dir: "volumes"}, provider.ErrUnusable},
		"too small":          {btrfs.Config{Dir: t.TempDir(), PoolBytes: 1 << 20}, provider.ErrUnusable},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			if _, err := btrfs.Open(t.Context(), c.config); !errors.Is(err, c.want) {
				t.Errorf("got %v, want %v", err, c.want)
			}
		})
	}
	t.Run("full disk", func(t *testing.T) {
		t.Parallel()
		dir := t.TempDir()
		must(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"))
		t.Cleanup(func() { must(t, unix.Unmount(dir, 0)) })
		if _, err := btrfs.Open(t.Context(), btrfs.Config{Dir: dir}); !errors.Is(err, provider.ErrNoCapacity) {
			t.Errorf("got %v, want ErrNoCapacity", err)
		}
	})
}

func mentions(warnings []string, text string) bool {
	return strings.Contains(strings.Join(warnings, "\n"), text)
}
