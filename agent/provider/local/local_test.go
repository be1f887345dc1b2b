package local

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/opendepot/depot/agent/provider"
)

func specA() provider.MachineSpec {
	return provider.MachineSpec{
		ID: machineA, Arch: "amd64", Volume: volumeA, WriterEpoch: 5, CPUs: 1, MemoryBytes: 1 << 30,
		Labels: map[string]string{"project": "web"}, Files: map[string][]byte{"join-token": []byte("secret")},
	}
}

func TestMachine(t *testing.T) {
	r := newRig(t)
	i := r.launch(t, specA())
	if got := greeting(t, i.Address); got != "hello" {
		t.Errorf("at the door: %q", got)
	}
	if diff := cmp.Diff(specA().Labels, i.Labels); diff != "" {
		t.Errorf("labels: %s", diff)
	}
	again := r.launch(t, specA())
	if diff := cmp.Diff(i, again); diff != "" {
		t.Errorf("launched again: %s", diff)
	}
	if diff := cmp.Diff(i, r.instance(t, machineA)); diff != "" {
		t.Errorf("listed: %s", diff)
	}
	token, err := os.Stat(filepath.Join(r.machineDir(machineA), secretsDir, "join-token"))
	must(t, err)
	if token.Mode().Perm() != 0o600 {
		t.Errorf("token has mode %v", token.Mode())
	}
	if limit := cgroupValue(t, r.cgroup(machineA), "memory/%s/memory.limit_in_bytes", "%s/memory.max"); limit != "1073741824" {
		t.Errorf("memory limit: %s", limit)
	}
	if quota := cgroupValue(t, r.cgroup(machineA), "cpu/%s/cpu.cfs_quota_us", "%s/cpu.max"); !strings.HasPrefix(quota, "100000") {
		t.Errorf("CPU limit: %s", quota)
	}

	second := specA()
	second.ID, second.WriterEpoch = machineB, 6
	if _, err := r.Launch(t.Context(), second); !errors.Is(err, provider.ErrVolumeBusy) {
		t.Errorf("a second machine on the volume: %v", err)
	}
	must(t, r.Stop(t.Context(), machineA))
	if diff := cmp.Diff(provider.Exit{Clean: true}, r.exited(t, machineA)); diff != "" {
		t.Errorf("exit: %s", diff)
	}
	if ended, err := r.Launch(t.Context(), specA()); err != nil || ended.State != provider.Exited {
		t.Errorf("launched again after its end: %+v, %v", ended, err)
	}
	must(t, r.Stop(t.Context(), machineA))
	second.WriterEpoch = 4
	if _, err := r.Launch(t.Context(), second); !errors.Is(err, provider.ErrStaleWriter) {
		t.Errorf("with a lower epoch: %v", err)
	}
	must(t, r.Destroy(t.Context(), machineA))
	must(t, r.Destroy(t.Context(), machineA))
	r.noTrace(t)
	if err := r.Stop(t.Context(), machineA); !errors.Is(err, provider.ErrNotFound) {
		t.Errorf("stop what is not there: %v", err)
	}
}

func cgroupValue(t *testing.T, cgroup, v1, v2 string) string {
	t.Helper()
	for _, pattern := range []string{v1, v2} {
		if text := contentsIfAny(filepath.Join(cgroupRoot, strings.Replace(pattern, "%s", cgroup, 1))); text != "" {
			return strings.TrimSpace(text)
		}
	}
	t.Fatalf("cgroup %s has neither %s nor %s", cgroup, v1, v2)
	return ""
}

func TestMachineOutlivesProvider(t *testing.T) {
	r := newRig(t)
	i := r.launch(t, specA())
	if _, err := Open(t.Context(), r.config); err == nil || !strings.Contains(err.Error(), "another agent") {
		t.Errorf("a second provider: %v", err)
	}
	r.reopen(t)
	if diff := cmp.Diff(i, r.instance(t, machineA)); diff != "" {
		t.Errorf("listed by the next provider: %s", diff)
	}
	if got := greeting(t, i.Address); got != "hello" {
		t.Errorf("at the door: %q", got)
	}
	other := specA()
	other.ID, other.WriterEpoch = machineB, 9
	if _, err := r.Launch(t.Context(), other); !errors.Is(err, provider.ErrVolumeBusy) {
		t.Errorf("the volume, to the next provider: %v", err)
	}
	must(t, r.Destroy(t.Context(), machineA))
	r.noTrace(t)
}

// A state directory that was copied back from earlier knows nothing of a
// machine that runs: what is not listed must not be there.
func TestMachineWithoutRecord(t *testing.T) {
	r := newRig(t)
	r.launch(t, specA())
	must(t, r.Close(t.Context()))
	must(t, os.RemoveAll(r.records.machine(machineA)))
	r.open(t)
	if list, err := r.List(t.Context()); err != nil || len(list) != 0 {
		t.Errorf("listed: %+v, %v", list, err)
	}
	// The kernel removes the device with its namespace, in its own time.
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end) && len(traces(t, r.config.State, r.config.Run)) > 0; {
		<-time.After(10 * time.Millisecond)
	}
	r.noTrace(t)
}

func TestExit(t *testing.T) {
	for name, test := range map[string]struct {
		end  func(t *testing.T, r *rig, rec record)
		want string
	}{
		"killed": {func(t *testing.T, _ *rig, rec record) {
			t.Helper()
			must(t, rec.process().signal(unix.SIGKILL))
		}, "killed"},
		"rebooted": {func(t *testing.T, r *rig, rec record) {
			t.Helper()
			must(t, rec.process().kill(t.Context()))
			must(t, unix.Unmount(filepath.Join(r.machineDir(rec.ID), secretsDir), 0))
			must(t, unix.Unmount(r.config.Run, 0))
			must(t, linkDown(r.device(rec.Slot)))
			must(t, r.firewall.down(t.Context()))
			must(t, removeCgroup(t.Context(), r.cgroup(rec.ID)))
			must(t, r.lock.Close())
			rec.BootID = "an earlier one"
			must(t, r.records.write(rec))
			r.open(t)
		}, "rebooted"},
		"a link in place of its last word": {func(t *testing.T, r *rig, rec record) {
			t.Helper()
			must(t, os.Symlink("/etc/passwd", filepath.Join(r.machineDir(rec.ID), stateDir, "exit.json")))
			must(t, rec.process().signal(unix.SIGKILL))
		}, "cannot be read"},
		"a pipe in place of its last word": {func(t *testing.T, r *rig, rec record) {
			t.Helper()
			must(t, unix.Mkfifo(filepath.Join(r.machineDir(rec.ID), stateDir, "exit.json"), 0o600))
			must(t, rec.process().signal(unix.SIGKILL))
		}, "cannot be read"},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			r.launch(t, specA())
			rec, err := r.records.read(machineA)
			must(t, err)
			test.end(t, r, rec)
			exit := r.exited(t, machineA)
			if exit.Clean || !strings.Contains(exit.Reason, test.want) {
				t.Errorf("got %+v, want not clean, %q", exit, test.want)
			}
			next := specA()
			next.ID, next.WriterEpoch = machineB, 6
			r.launch(t, next) // the volume is free
			must(t, r.Destroy(t.Context(), machineA))
			must(t, r.Destroy(t.Context(), machineB))
			r.noTrace(t)
		})
	}
}
