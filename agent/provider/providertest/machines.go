//nolint:thelper // each function is a test of its own: a failure must name its lines
package providertest

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/opendepot/depot/agent/provider"
)

// Harness is an implementation of provider.Provider as its suite uses it.
type Harness struct {
	// Arch is one that this provider launches here.
	Arch string
	// Open opens the provider and the volume store whose state is kept in dir:
	// at first dir is empty, later calls see what earlier ones kept, as an
	// agent does that was started again. pid1 is the path of a static program
	// for this host, to be launched as PID 1 of each machine.
	Open func(t *testing.T, dir, pid1 string) Machines
	// Leftovers lists what providers keep on the host for machines: processes,
	// mounts, network devices, firewall rules, cgroups, files under dir. It is
	// called without any machine, before and after there was one, and both
	// lists must have the same lines, in any order.
	Leftovers func(t *testing.T, dir string) []string
}

// Machines is an open provider with its volumes.
type Machines struct {
	provider.Provider
	Volumes provider.VolumeStore
	// Close ends this use of both, as the agent's end does: machines live on.
	// provider.ErrVolumeBusy is not a failure then.
	Close func() error
}

// BuildPID1 builds the program that the suite launches as PID 1, and returns
// its path.
func BuildPID1(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "pid1")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", path, "github.com/opendepot/depot/agent/provider/providertest/pid1") //nolint:gosec // G204: the test's own directory
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build pid1: %v\n%s", err, out)
	}
	return path
}

// RunProvider checks a provider.
func RunProvider(t *testing.T, h Harness) {
	t.Helper()
	pid1 := BuildPID1(t)
	for name, test := range map[string]func(*testing.T, *machines){
		"launch runs PID 1 as agreed":         launchSurroundings,
		"launch is idempotent":                launchIdempotent,
		"launch at once launches one":         launchConcurrently,
		"launch refuses":                      launchRefuses,
		"launch caps limits":                  launchLimits,
		"one-writer":                          machinesOneWriter,
		"stale writers are refused":           machinesStaleWriter,
		"stop ends cleanly":                   stopClean,
		"a crash is no clean end":             crashUnclean,
		"machines outlive the agent":          outliveAgent,
		"ends are seen by the next agent":     endWithoutAgent,
		"destroy ends all of it":              destroyStubborn,
		"destroy of what is not there":        destroyMissing,
		"checkpoint and clone of a live tree": checkpointLive,
	} {
		t.Run(name, func(t *testing.T) {
			m := &machines{dir: t.TempDir(), pid1: pid1, harness: h}
			m.reopen(t)
			t.Cleanup(func() { m.end(t) })
			m.before = m.leftovers(t)
			test(t, m)
		})
	}
}

// machines is the provider of one test.
type machines struct {
	Machines
	dir, pid1 string
	harness   Harness
	before    []string
}

// reopen puts another provider in the place of the first, which is forgotten
// as a killed agent's is.
func (m *machines) reopen(t *testing.T) {
	t.Helper()
	m.close(t)
	m.Machines = m.harness.Open(t, m.dir, m.pid1)
}

// close closes the provider, if one is open. Machines that run keep volumes
// busy.
func (m *machines) close(t *testing.T) {
	t.Helper()
	before := m.Machines
	m.Machines = Machines{} // so that it is closed once, also where Open fails
	if before.Close == nil {
		return
	}
	if err := before.Close(); err != nil {
		wantErr(t, "close", err, provider.ErrVolumeBusy)
	}
}

// end destroys what the test launched and checks that nothing is left.
func (m *machines) end(t *testing.T) {
	t.Helper()
	if m.Provider == nil {
		return // Open failed and said why
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
	defer cancel()
	all, err := m.List(ctx)
	if err != nil {
		t.Errorf("list: %v", err)
	}
	for _, each := range all {
		if err := m.Destroy(ctx, each.ID); err != nil {
			t.Errorf("destroy %s: %v", each.ID, err)
		}
	}
	if diff := cmp.Diff(m.before, m.leftovers(t)); diff != "" {
		t.Errorf("what machines left behind (-before +after):\n%s", diff)
	}
	volumes, err := m.Volumes.List(ctx)
	if err != nil {
		t.Errorf("list volumes: %v", err)
	}
	for _, v := range volumes {
		if v.Busy {
			t.Errorf("volume %s is busy without a machine", v.ID)
		}
	}
	if err := m.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

func (m *machines) leftovers(t *testing.T) []string {
	t.Helper()
	return slices.Sorted(slices.Values(m.harness.Leftovers(t, m.dir)))
}

// spec is of a machine with the volume, which it makes.
func (m *machines) spec(t *testing.T, id, volume string, epoch uint64) provider.MachineSpec {
	t.Helper()
	_, err := m.Volumes.Ensure(t.Context(), provider.VolumeSpec{ID: volume})
	must(t, err)
	return provider.MachineSpec{
		ID: id, Arch: m.harness.Arch, Volume: volume, WriterEpoch: epoch, Labels: labels(),
		Files: map[string][]byte{"machine.json": []byte(`{}`), "join-token": []byte("secret")},
	}
}

func (m *machines) launch(t *testing.T, spec provider.MachineSpec) provider.Instance {
	t.Helper()
	instance, err := m.Launch(t.Context(), spec)
	must(t, err)
	if instance.State == provider.Running {
		ask(t, instance, request{Do: "about"})
	}
	return instance
}

// find returns the listed machine, nil if it is not listed.
func (m *machines) find(t *testing.T, id string) *provider.Instance {
	t.Helper()
	all, err := m.List(t.Context())
	must(t, err)
	for _, each := range all {
		if each.ID == id {
			return &each
		}
	}
	return nil
}

// exit waits for the end of machineA and returns how it ended.
func (m *machines) exit(t *testing.T) provider.Exit {
	t.Helper()
	var exit provider.Exit
	eventually(t, "machine "+machineA+" is listed as exited", func() bool {
		instance := m.find(t, machineA)
		if instance == nil {
			t.Fatalf("machine %s is no longer listed, and nobody destroyed it", machineA)
		}
		if instance.State != provider.Exited {
			return false
		}
		if instance.Exit == nil {
			t.Fatalf("machine %s exited without saying how", machineA)
		}
		exit = *instance.Exit
		return true
	})
	return exit
}

// volume returns volumeA as it is listed.
func (m *machines) volume(t *testing.T) provider.Volume {
	t.Helper()
	all, err := m.Volumes.List(t.Context())
	must(t, err)
	i := slices.IndexFunc(all, func(v provider.Volume) bool { return v.ID == volumeA })
	if i < 0 {
		t.Fatalf("volume %s is gone", volumeA)
	}
	return all[i]
}

// request and answer are what pid1 understands.
type request struct {
	Do         string
	Path, Text string
}

type answer struct {
	Text      string
	Mode      os.FileMode
	Error     string
	PID       int
	Started   time.Time
	Inherited string
}

// ask waits for an answer of the machine's PID 1.
func ask(t *testing.T, instance provider.Instance, r request) answer {
	t.Helper()
	a, err := tryAsk(t, instance, r)
	must(t, err)
	if a.Error != "" {
		t.Fatalf("machine %s: %s %s: %s", instance.ID, r.Do, r.Path, a.Error)
	}
	return a
}

func tryAsk(t *testing.T, instance provider.Instance, r request) (a answer, err error) {
	t.Helper()
	// The socket listens from before the launch returns: no retries.
	conn, err := (&net.Dialer{Timeout: 10 * time.Second}).DialContext(t.Context(), "tcp", instance.Address)
	if err != nil {
		return a, err
	}
	defer func() { _ = conn.Close() }()
	must(t, conn.SetDeadline(time.Now().Add(10*time.Second)))
	if err := json.NewEncoder(conn).Encode(r); err != nil {
		return a, err
	}
	return a, json.NewDecoder(conn).Decode(&a)
}

func launchSurroundings(t *testing.T, m *machines) {
	before := time.Now().Add(-time.Second)
	spec := m.spec(t, machineA, volumeA, 3)
	instance := m.launch(t, spec)
	if instance.Launched.Before(before) || instance.Launched.After(time.Now().Add(time.Second)) {
		t.Errorf("launched at %v, want now", instance.Launched)
	}
	instance.Launched, instance.Address, instance.Warnings = time.Time{}, "", nil
	if diff := cmp.Diff(provider.Instance{ID: machineA, Volume: volumeA, State: provider.Running, Labels: labels()}, instance); diff != "" {
		t.Errorf("launched (-want +got):\n%s", diff)
	}
	instance = *m.find(t, machineA)
	if a := ask(t, instance, request{Do: "about"}); a.PID != 1 || a.Inherited == "" {
		t.Errorf("process %d with LISTEN_FDS=%q, want PID 1 with inherited descriptors", a.PID, a.Inherited)
	}
	for name, want := range spec.Files {
		path := filepath.Join("/run/depot", name)
		if got := ask(t, instance, request{Do: "read", Path: path}).Text; got != string(want) {
			t.Errorf("%s holds %q, want %q", path, got, want)
		}
		if mode := ask(t, instance, request{Do: "stat", Path: path}).Mode; mode != 0o600 {
			t.Errorf("%s has mode %v, want 0600", path, mode)
		}
	}
	if got := ask(t, instance, request{Do: "read", Path: "/etc/resolv.conf"}).Text; !strings.Contains(got, "nameserver") || strings.Contains(got, "127.0.0.53") {
		t.Errorf("resolv.conf holds %q, want name servers that can be reached", got)
	}
	v := m.volume(t)
	v.Labels = nil
	if diff := cmp.Diff(provider.Volume{ID: volumeA, WriterEpoch: 3, Writer: machineA, Busy: true}, v); diff != "" {
		t.Errorf("its volume (-want +got):\n%s", diff)
	}
}

func launchIdempotent(t *testing.T, m *machines) {
	spec := m.spec(t, machineA, volumeA, 1)
	first := m.launch(t, spec)
	started := ask(t, first, request{Do: "about"}).Started
	again := m.launch(t, spec)
	if diff := cmp.Diff(first, again); diff != "" {
		t.Errorf("a repeated launch (-first +second):\n%s", diff)
	}
	if got := ask(t, again, request{Do: "about"}).Started; !got.Equal(started) {
		t.Error("a repeated launch started the machine anew")
	}
	must(t, m.Stop(t.Context(), machineA))
	m.exit(t)
	if ended := m.launch(t, spec); ended.State != provider.Exited {
		t.Errorf("a launch of a machine that ended: %s, want it as it is", ended.State)
	}
}

func launchConcurrently(t *testing.T, m *machines) {
	spec := m.spec(t, machineA, volumeA, 1)
	var calls sync.WaitGroup
	instances := make([]provider.Instance, 6)
	for i := range instances {
		calls.Go(func() {
			var err error
			if instances[i], err = m.Launch(t.Context(), spec); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	for _, each := range instances[1:] {
		if diff := cmp.Diff(instances[0], each); diff != "" {
			t.Errorf("launches at once (-one +other):\n%s", diff)
		}
	}
	if all, err := m.List(t.Context()); err != nil || len(all) != 1 {
		t.Errorf("%d machines, %v; want 1", len(all), err)
	}
}

func launchRefuses(t *testing.T, m *machines) {
	change := func(change func(*provider.MachineSpec)) provider.MachineSpec {
		spec := m.spec(t, machineA, volumeA, 1)
		change(&spec)
		return spec
	}
	type refusal struct {
		spec provider.MachineSpec
		want error
	}
	refusals := map[string]refusal{
		"a volume that is not there": {change(func(s *provider.MachineSpec) { s.Volume = volumeC }), provider.ErrNotFound},
		"an unknown architecture":    {change(func(s *provider.MachineSpec) { s.Arch = "pdp11" }), provider.ErrUnusable},
	}
	for name, id := range hostileIDs() {
		refusals["machine id "+name] = refusal{change(func(s *provider.MachineSpec) { s.ID = id }), provider.ErrUnusable}
		refusals["volume id "+name] = refusal{change(func(s *provider.MachineSpec) { s.Volume = id }), provider.ErrUnusable}
	}
	for _, name := range []string{"", ".", "..", "../x", "/etc/passwd", "a/b", "nul\x00"} {
		refusals[fmt.Sprintf("file %q", name)] = refusal{change(func(s *provider.MachineSpec) { s.Files = map[string][]byte{name: nil} }), provider.ErrUnusable}
	}
	for name, r := range refusals {
		_, err := m.Launch(t.Context(), r.spec)
		wantErr(t, name, err, r.want)
	}
	for name, id := range hostileIDs() {
		if err := m.Stop(t.Context(), id); err == nil {
			t.Errorf("stop of id %s succeeded", name)
		}
	}
	if all, err := m.List(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("refused launches left %v, %v", all, err)
	}
	// A refusal must not keep the volume from the next.
	m.launch(t, m.spec(t, machineB, volumeA, 2))
}

func launchLimits(t *testing.T, m *machines) {
	spec := m.spec(t, machineA, volumeA, 1)
	spec.CPUs, spec.MemoryBytes = 1<<20, 1<<60
	if instance := m.launch(t, spec); len(instance.Warnings) == 0 {
		t.Error("limits beyond the host's were capped without a warning")
	}
	spec = m.spec(t, machineB, volumeB, 1)
	spec.CPUs, spec.MemoryBytes = 1, 256<<20
	m.launch(t, spec)
}

func machinesOneWriter(t *testing.T, m *machines) {
	first := m.launch(t, m.spec(t, machineA, volumeA, 1))
	ask(t, first, request{Do: "write", Path: "/var/lib/buildkit/file", Text: "of A"})
	second := m.spec(t, machineB, volumeA, 2)
	_, err := m.Launch(t.Context(), second)
	wantErr(t, "launch on a volume in use", err, provider.ErrVolumeBusy)
	if m.find(t, machineB) != nil {
		t.Error("a refused machine is listed")
	}
	wantErr(t, "delete of a volume in use", m.Volumes.Delete(t.Context(), volumeA), provider.ErrVolumeBusy)
	ask(t, first, request{Do: "about"})
	must(t, m.Stop(t.Context(), machineA))
	m.exit(t)
	// The machine ended: its volume is free although nobody destroyed it yet.
	after := m.launch(t, second)
	if got := ask(t, after, request{Do: "read", Path: "/var/lib/buildkit/file"}).Text; got != "of A" {
		t.Errorf("the next machine reads %q in the volume", got)
	}
	must(t, m.Destroy(t.Context(), machineA))
	ask(t, after, request{Do: "about"})
}

func machinesStaleWriter(t *testing.T, m *machines) {
	m.launch(t, m.spec(t, machineA, volumeA, 10))
	must(t, m.Destroy(t.Context(), machineA))
	for name, epoch := range map[string]uint64{"a lower epoch": 9, "the same epoch": 10} {
		_, err := m.Launch(t.Context(), m.spec(t, machineB, volumeA, epoch))
		wantErr(t, name, err, provider.ErrStaleWriter)
	}
	m.launch(t, m.spec(t, machineB, volumeA, 11))
}

func stopClean(t *testing.T, m *machines) {
	m.launch(t, m.spec(t, machineA, volumeA, 1))
	must(t, m.Stop(t.Context(), machineA))
	if exit := m.exit(t); !exit.Clean {
		t.Errorf("a stopped machine ended %+v, want clean", exit)
	}
	if v := m.volume(t); v.Busy || v.Writer != machineA {
		t.Errorf("its volume: %+v, want it free", v)
	}
	must(t, m.Stop(t.Context(), machineA)) // it is there, and it has ended
	m.reopen(t)
	if exit := m.exit(t); !exit.Clean {
		t.Errorf("the next agent says that it ended %+v, want clean", exit)
	}
	must(t, m.Destroy(t.Context(), machineA))
	wantErr(t, "stop after destroy", m.Stop(t.Context(), machineA), provider.ErrNotFound)
	_, err := m.Volumes.Commit(t.Context(), volumeA, generationA)
	must(t, err)
}

func crashUnclean(t *testing.T, m *machines) {
	instance := m.launch(t, m.spec(t, machineA, volumeA, 1))
	_, _ = tryAsk(t, instance, request{Do: "crash"}) // ends the connection without an answer
	if exit := m.exit(t); exit.Clean || exit.Reason == "" {
		t.Errorf("a crashed machine ended %+v, want unclean with a reason", exit)
	}
	if m.volume(t).Busy {
		t.Error("the volume of a crashed machine is busy")
	}
}

func outliveAgent(t *testing.T, m *machines) {
	first := m.launch(t, m.spec(t, machineA, volumeA, 1))
	started := ask(t, first, request{Do: "about"}).Started
	for range 2 {
		m.reopen(t)
		found := m.find(t, machineA)
		if found == nil {
			t.Fatal("the next agent does not list the machine")
		}
		found.Warnings = first.Warnings // said at launch, perhaps not again
		if diff := cmp.Diff(first, *found); diff != "" {
			t.Errorf("as the next agent sees it (-launched +listed):\n%s", diff)
		}
		if got := ask(t, *found, request{Do: "about"}).Started; !got.Equal(started) {
			t.Error("the machine was started anew")
		}
		_, err := m.Launch(t.Context(), m.spec(t, machineB, volumeA, 2))
		wantErr(t, "launch on its volume", err, provider.ErrVolumeBusy)
		again := m.launch(t, m.spec(t, machineA, volumeA, 1))
		if again.Address != first.Address {
			t.Errorf("launched again it is at %s, want %s", again.Address, first.Address)
		}
	}
	must(t, m.Stop(t.Context(), machineA))
	if exit := m.exit(t); !exit.Clean {
		t.Errorf("stopped by the next agent it ended %+v", exit)
	}
}

func endWithoutAgent(t *testing.T, m *machines) {
	instance := m.launch(t, m.spec(t, machineA, volumeA, 1))
	m.close(t)
	_, _ = tryAsk(t, instance, request{Do: "crash"})
	m.reopen(t)
	if exit := m.exit(t); exit.Clean {
		t.Error("a crash without an agent is called clean")
	}
	must(t, m.Destroy(t.Context(), machineA))
	m.launch(t, m.spec(t, machineB, volumeA, 2))
}

func destroyStubborn(t *testing.T, m *machines) {
	instance := m.launch(t, m.spec(t, machineA, volumeA, 1))
	ask(t, instance, request{Do: "linger"})
	ask(t, instance, request{Do: "stubborn"})
	must(t, m.Stop(t.Context(), machineA))
	if found := m.find(t, machineA); found == nil || found.State != provider.Running {
		t.Errorf("a machine that does not obey TERM is listed as %+v", found)
	}
	for range 2 {
		must(t, m.Destroy(t.Context(), machineA))
		if m.find(t, machineA) != nil {
			t.Error("a destroyed machine is listed")
		}
	}
	if _, err := tryAsk(t, instance, request{Do: "about"}); err == nil {
		t.Error("a destroyed machine answers")
	}
	if diff := cmp.Diff(m.before, m.leftovers(t)); diff != "" {
		t.Errorf("left behind (-before +after):\n%s", diff)
	}
	if v := m.volume(t); v.Busy {
		t.Error("the volume of a destroyed machine is busy")
	}
}

func destroyMissing(t *testing.T, m *machines) {
	must(t, m.Destroy(t.Context(), machineA))
	wantErr(t, "stop", m.Stop(t.Context(), machineA), provider.ErrNotFound)
	if all, err := m.List(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("without machines: %v, %v", all, err)
	}
}

func checkpointLive(t *testing.T, m *machines) {
	first := m.launch(t, m.spec(t, machineA, volumeA, 1))
	ask(t, first, request{Do: "write", Path: "/var/lib/buildkit/file", Text: "warm"})
	_, err := m.Volumes.Commit(t.Context(), volumeA, generationA)
	must(t, err)
	for volume, from := range map[string]provider.Source{
		volumeB: {Volume: volumeA},
		volumeC: {Volume: volumeA, Generation: generationA},
	} {
		_, err := m.Volumes.Ensure(t.Context(), provider.VolumeSpec{ID: volume, From: &from})
		must(t, err)
		second := m.launch(t, m.spec(t, machineB, volume, 1))
		if got := ask(t, second, request{Do: "read", Path: "/var/lib/buildkit/file"}).Text; got != "warm" {
			t.Errorf("a machine on a clone reads %q", got)
		}
		must(t, m.Destroy(t.Context(), machineB))
	}
	ask(t, first, request{Do: "about"})
}
