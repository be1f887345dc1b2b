package machine

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	depotv1 "github.com/opendepot/depot/controlplane/api/depot/v1"
)

// childConfig names the configuration of a machine that this test binary
// shall be, instead of running tests.
const childConfig = "DEPOT_MACHINE_TEST_CONFIG"

func TestMain(m *testing.M) {
	if path := os.Getenv(childConfig); path != "" { //nolint:forbidigo // a test's main
		os.Exit(beMachine(path)) //nolint:forbidigo // as above
	}
	os.Exit(m.Run()) //nolint:forbidigo // as above
}

// beMachine does what the program's main does, as PID 1 of its namespace. It
// also makes an orphan each time that it gets USR1, for the reaper.
func beMachine(path string) int {
	terminate, orphan := make(chan os.Signal, 1), make(chan os.Signal, 1)
	signal.Notify(terminate, unix.SIGTERM, unix.SIGINT)
	signal.Notify(orphan, unix.SIGUSR1)
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return fail(err)
	}
	config, err := LoadConfig(path)
	if err != nil {
		return fail(err)
	}
	listener, err := Inherited(2)
	if err != nil {
		return fail(err)
	}
	go func() {
		for range orphan {
			// The outer shell ends at once, and nobody waits for it either;
			// the inner one becomes PID 1's.
			_ = (&reaper{}).start(exec.CommandContext(context.Background(), "sh", "-c", "sh -c 'exit 3' &"))
		}
	}()
	err = Run(context.Background(), config, Surroundings{
		Listener: listener, Terminate: terminate, Output: os.Stderr,
		Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
	if err != nil {
		return 1
	}
	return 0
}

// child is a machine in namespaces of its own.
type child struct {
	*bench
	cmd  *exec.Cmd
	done chan error
}

// startChild runs the machine as PID 1 in pid, mount, ipc and uts namespaces,
// with its listening socket and a lock inherited, as the local provider does.
func startChild(t *testing.T, b *bench) *child {
	t.Helper()
	data, err := json.Marshal(b.config)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(b.config.Paths.Run, "machine.json")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(b.config.Paths.Root, 0o700); err != nil {
		t.Fatal(err)
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // at once
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()                            //nolint:errcheck // the child has a copy
	socket, err := listener.(*net.TCPListener).File() //nolint:errcheck // a TCP listener's
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close() //nolint:errcheck // the child has a copy
	lock, err := os.Create(filepath.Join(b.config.Paths.Run, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close() //nolint:errcheck // the child has a copy
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	b.address = listener.Addr().String()
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe") // ended by cleanup
	cmd.Env = append(os.Environ(), childConfig+"="+path)
	cmd.ExtraFiles = []*os.File{socket, lock}
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	cmd.WaitDelay = 5 * time.Second
	cmd.SysProcAttr = &unix.SysProcAttr{
		Cloneflags:   unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
		Unshareflags: unix.CLONE_NEWNS, // makes the mounts private
		Pdeathsig:    unix.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatalf("start a machine in namespaces of its own (needs root): %v", err)
	}
	c := &child{bench: b, cmd: cmd, done: make(chan error, 1)}
	waited := make(chan struct{})
	go func() {
		c.done <- cmd.Wait()
		close(waited)
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-waited
	})
	return c
}

func (c *child) wait(t *testing.T) int {
	t.Helper()
	select {
	case <-c.done:
		return c.cmd.ProcessState.ExitCode()
	case <-time.After(30 * time.Second):
		t.Fatal("the machine did not end within 30 s")
		return 0
	}
}

// process is one of the machine's, seen from outside.
type process struct {
	pid   int
	name  string
	state string
}

// children returns the machine's processes but PID 1: its children.
func (c *child) children(t *testing.T) []process {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var out []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue // it has ended
		}
		// pid (name) state ppid …
		open, end := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
		fields := strings.Fields(string(stat[end+1:]))
		if len(fields) > 1 && fields[1] == strconv.Itoa(c.cmd.Process.Pid) {
			out = append(out, process{pid: pid, name: string(stat[open+1 : end]), state: fields[0]})
		}
	}
	return out
}

func (c *child) buildkitd(t *testing.T) int {
	t.Helper()
	for _, p := range c.children(t) {
		if p.name == "buildkitd" {
			return p.pid
		}
	}
	t.Fatal("no buildkitd among the machine's processes")
	return 0
}

// locked reports whether the volume's lock is held.
func (c *child) locked(t *testing.T) bool {
	t.Helper()
	f, err := os.Open(filepath.Join(c.config.Paths.Run, "lock"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // only locked
	return unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil
}

func TestPID1(t *testing.T) {
	b := prepare(t)
	c := startChild(t, b)
	b.ready(t)
	if !c.locked(t) {
		t.Error("the volume's lock is not held")
	}
	// It inherits neither the listening socket nor the lock.
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", c.buildkitd(t)))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if target, err := os.Readlink(fd); err == nil && strings.HasSuffix(target, "/lock") {
			t.Error("buildkitd has inherited the volume's lock")
		}
	}
	if _, err := b.client(t, testID("lse", "1")).ListWorkers(t.Context()); err != nil {
		t.Fatal(err)
	}

	// Orphans are reaped; buildkitd is not.
	for range 20 { // some arrive as one
		if err := c.cmd.Process.Signal(unix.SIGUSR1); err != nil {
			t.Fatal(err)
		}
	}
	for deadline := time.Now().Add(10 * time.Second); ; {
		var zombies int
		for _, p := range c.children(t) {
			if p.state == "Z" {
				zombies++
			}
		}
		if zombies == 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d zombies after 10 s", zombies)
		}
	}
	if err := c.cmd.Process.Signal(unix.SIGINT); err != nil {
		t.Fatal(err)
	}
	if code := c.wait(t); code != 0 {
		t.Errorf("exit code %d", code)
	}
	if exit := readExit(t, b.config.Paths); !exit.Clean {
		t.Errorf("ended with %+v", exit)
	}
	if c.locked(t) {
		t.Error("the volume's lock outlives the machine")
	}
}

// TestBuildkitdKilled: nothing is restarted inside; the end says why.
func TestBuildkitdKilled(t *testing.T) {
	b := prepare(t)
	c := startChild(t, b)
	b.ready(t)
	if err := unix.Kill(c.buildkitd(t), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if code := c.wait(t); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	exit := readExit(t, b.config.Paths)
	if exit.Clean || !strings.Contains(exit.Reason, "signal: killed") || !strings.Contains(exit.Reason, "running server on") {
		t.Errorf("ended with %+v", exit)
	}
	b.controlPlane.await(t, "failed", func(r *depotv1.SyncMachineRequest) bool {
		return r.GetState() == depotv1.MachineState_MACHINE_STATE_FAILED && r.GetReason() == exit.Reason
	})
}

// TestBuildkitdHangs: one that does not stop is killed, which is not clean.
func TestBuildkitdHangs(t *testing.T) {
	b := prepare(t)
	b.config.Times.Stop = time.Second
	c := startChild(t, b)
	b.ready(t)
	if err := unix.Kill(c.buildkitd(t), unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := c.wait(t); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	if exit := readExit(t, b.config.Paths); exit.Clean || !strings.Contains(exit.Reason, "did not stop within 1s") {
		t.Errorf("ended with %+v", exit)
	}
}

// TestBuildkitdDoesNotStart: the reason has its own words.
func TestBuildkitdDoesNotStart(t *testing.T) {
	b := prepare(t)
	b.config.Paths.Runc = filepath.Join(t.TempDir(), "no-runc")
	b.start(t)
	exit, err := b.ended(t)
	if err == nil || exit.Clean || !strings.Contains(exit.Reason, "no-runc") {
		t.Errorf("ended with %+v, %v", exit, err)
	}
}

// TestBuildsSurvive is builds-survive, at the machine: the control plane is
// gone and returns, and its clients notice nothing.
func TestBuildsSurvive(t *testing.T) {
	b := prepare(t)
	b.start(t)
	b.ready(t)
	lease := testID("lse", "1")
	c := b.client(t, lease)
	if _, err := c.ListWorkers(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.controlPlane.stop()
	if _, err := c.ListWorkers(t.Context()); err != nil {
		t.Errorf("without a control plane, a client that was connected: %v", err)
	}
	if _, err := b.client(t, testID("lse", "2")).ListWorkers(t.Context()); err != nil {
		t.Errorf("without a control plane, a client with a valid certificate: %v", err)
	}
	b.controlPlane.mu.Lock()
	b.controlPlane.reports = nil
	b.controlPlane.mu.Unlock()
	b.controlPlane.start(t)
	awaitOpen(t, b, map[string][2]int64{lease: {1, 1}, testID("lse", "2"): {1, 1}})
	// And it is the same machine that obeys again.
	b.controlPlane.direct(&depotv1.SyncMachineResponse{EndedLeases: []string{lease}})
	b.controlPlane.await(t, "cut", func(r *depotv1.SyncMachineRequest) bool { return open(r)[lease] == [2]int64{} })
	b.controlPlane.direct(&depotv1.SyncMachineResponse{Drain: true, Now: true})
	if exit, err := b.ended(t); err != nil || !exit.Clean {
		t.Errorf("ended with %+v, %v", exit, err)
	}
}

// TestRestartOnTheSameTree: what a killed machine leaves does not hinder the
// next one.
func TestRestartOnTheSameTree(t *testing.T) {
	b := prepare(t)
	c := startChild(t, b)
	b.ready(t)
	left := filepath.Join(b.config.Paths.Root, "runc-overlayfs", "executor", "left")
	if err := os.MkdirAll(filepath.Join(left, "rootfs"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	c.wait(t)
	if _, err := os.Stat(b.config.Paths.exit()); !os.IsNotExist(err) {
		t.Errorf("a killed machine has left a word on its end: %v", err)
	}
	next := prepare(t)
	next.config.Paths.Root = b.config.Paths.Root
	next.start(t)
	next.ready(t)
	if _, err := os.Stat(left); !os.IsNotExist(err) {
		t.Errorf("the bundle of a killed container is still there: %v", err)
	}
}

// TestTail keeps whole lines.
func TestTail(t *testing.T) {
	for name, test := range map[string]struct{ in, want string }{
		"nothing": {"", "none"},
		"lines":   {"a\nb\n", "a | b"},
		"long":    {strings.Repeat("x", tailBytes) + "\nlast\n", "last"},
		"one":     {strings.Repeat("x", tailBytes+1), strings.Repeat("x", tailBytes)},
	} {
		t.Run(name, func(t *testing.T) {
			l := &tail{out: io.Discard}
			w := bufio.NewWriterSize(l, 100)
			if _, err := w.WriteString(test.in); err != nil {
				t.Fatal(err)
			}
			if err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			if got := l.String(); got != test.want {
				t.Errorf("got %q", got)
			}
		})
	}
}
